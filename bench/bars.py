# SPDX-License-Identifier: Apache-2.0
"""The bars that the server is held against. The only place where they are written."""

from bench.contenders import BINDFS, LOOP, OURS, RELAYED
from bench.figures import Bar

REPLAY_ROW_15420, REPLAY_ROW_1M = "15,420 entries", "1,000,000 entries"
TREES = ("15k files", "100k files")


def _metadata(tree: str) -> tuple[Bar, ...]:
    stat, opening, listing = (f"{tree}: {what}" for what in ("cold stat", "open+close", "scandir"))
    return (
        Bar("metadata", stat, OURS, "≥", 5, (stat, RELAYED)),
        Bar("metadata", stat, OURS, "≥", 2, (stat, BINDFS)),
        Bar("metadata", stat, OURS, "≥", 0.4, (stat, LOOP)),
        Bar("metadata", opening, OURS, "≥", 1.5, (opening, BINDFS)),
        Bar("metadata", listing, OURS, "≥", 1, (listing, BINDFS)),
    )


BARS: tuple[Bar, ...] = (
    Bar("replay", REPLAY_ROW_15420, "replay", "≤", 0.060),
    Bar("replay", REPLAY_ROW_1M, "replay", "≤", 3.0),
    Bar("replay", REPLAY_ROW_15420, "memory a file", "≤", 300),
    Bar("replay", REPLAY_ROW_1M, "memory a file", "≤", 300),
    Bar("takeover", REPLAY_ROW_15420, OURS, "≤", 0.050),
    Bar("takeover", REPLAY_ROW_1M, OURS, "≤", 0.050),
    *(bar for tree in TREES for bar in _metadata(tree)),
    Bar("data", "sequential read 1 MiB", OURS, "≥", 0.6, ("sequential read 1 MiB", LOOP)),
    Bar("data", "sequential read 1 MiB", OURS, "≥", 1.5, ("sequential read 1 MiB", RELAYED)),
    Bar("data", "random read 1 MiB", OURS, "≥", 0.6, ("random read 1 MiB", LOOP)),
    Bar("data", "random read 1 MiB", OURS, "≥", 1.5, ("random read 1 MiB", RELAYED)),
    Bar("fmap", "simple", "round trip", "≤", 2, ("nothing", "round trip")),
    Bar("fmap", "16 strips", "round trip", "≤", 2, ("nothing", "round trip")),
    # 12 MiB of extents cannot come as fast as nothing: held against the same bytes, made beforehand.
    Bar("fmap", "1 TiB, unrolled", "round trip", "≤", 2, ("as many bytes, made beforehand", "round trip")),
    *(Bar("mapped", f"sequential {what} 1 MiB", "mapped / device", "≥", 0.98) for what in ("read", "write")),
    Bar("mapped", "64 MiB touched", "minor faults", "≤", 32),
    Bar("concurrency", "cold stat, two clients", OURS, "≥", 1, ("cold stat, one client", OURS)),
    Bar("concurrency", "open+close, two clients", OURS, "≥", 1, ("open+close, one client", OURS)),
    Bar("concurrency", "during replay and dump", "requests", "≥", 0.2, ("idle", "requests")),
    Bar("concurrency", "during replay and dump", "p99", "≤", 0.005),
    Bar("creation", "log of 15k", "one by one", "≥", 3_000),
    Bar("creation", "log of 15k", "one batch", "≥", 50_000),
    Bar("creation", "log of 1M", "one by one", "≥", 3_000),
    Bar("creation", "log of 1M", "one batch", "≥", 50_000),
)
