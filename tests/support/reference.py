# SPDX-License-Identifier: Apache-2.0
"""The rules of the log once more, written plainly: entry by entry, byte by byte, with nothing but `struct`.

Tests compare the real replay, which works on columns and in bulk, with this one.
"""

import struct
import zlib
from dataclasses import dataclass, field

LOG_OFFSET = 0x200000
ENTRY, HEADER = 544, 48

Node = tuple[str, int, int, int, int, tuple[tuple[int, int, int], ...], int]
"""Kind, mode, uid, gid, size, extents as (device, offset, length), chunk size."""


@dataclass
class Outcome:
    """What a log shows."""

    nodes: dict[bytes, Node] = field(default_factory=dict)
    """Everything that is visible, by path, in log order."""
    entries: int = 0
    """How many entries were valid."""
    devices: list[int] = field(default_factory=list)
    """Sizes of the devices in bytes."""
    named: list[tuple[int, int, int]] = field(default_factory=list)
    """The extents of all valid entries, shown or not."""


def clean_path(raw: bytes) -> bytes | None:
    """The path that a field of 80 bytes stands for, or None for one that cannot be shown."""
    path, _, rest = raw.partition(b"\0")
    if len(path) == 80 or rest.strip(b"\0") or path.startswith(b"/"):
        return None
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    if not parts or parts[0] == b".meta":
        return None
    return b"/".join(parts)


def extents_of(entry: bytes) -> tuple[list[tuple[int, int, int]], int, bool]:
    """The extents of a FILE entry, its chunk size, and whether kind and counts are possible."""
    kind, count = struct.unpack_from("<I4xI", entry, 120)
    if kind == 0:
        rows = [struct.unpack_from("<QQQ", entry, 136 + 24 * k) for k in range(min(count, 16))]
        return [(a, b, c) for a, b, c in rows], 0, 1 <= count <= 16
    if kind == 1:
        strips, chunk = struct.unpack_from("<QQ", entry, 136)
        rows = [struct.unpack_from("<QQQ", entry, 152 + 24 * k) for k in range(min(strips, 16))]
        return [(a, b, c) for a, b, c in rows], chunk, 1 <= strips <= 16 and count == 1
    return [], 0, False


def servable(outcome: Outcome, extents: list[tuple[int, int, int]], size: int, chunk: int, unit: int, end: int) -> bool:
    """Whether a map with possible counts lies where it may and holds the whole file."""
    for device, offset, length in extents:
        if device >= len(outcome.devices) or offset % unit or length % unit or not length:
            return False
        if offset + length > outcome.devices[device] or offset < (end if device == 0 else 2 << 20):
            return False
    if not chunk:
        return sum(length for _, _, length in extents) >= size
    if chunk & (chunk - 1) or chunk % unit or sum(length for _, _, length in extents) < size:
        return False
    last = (size - 1) // chunk
    for number, (_, _, length) in enumerate(extents):
        # The highest chunk that falls to this strip, and with it the strip's length.
        highest = last - (last - number) % len(extents)
        if highest >= 0 and length < (highest // len(extents) + 1) * chunk:
            return False
    return True


def replay(log: bytes, *, device_size: int, log_length: int, unit: int) -> Outcome:
    """What the log in `log` shows, which begins with its header."""
    outcome = Outcome(devices=[device_size])
    uuids = [b""]
    taken: list[tuple[int, int, int]] = []
    (count,) = struct.unpack_from("<Q", log, 40)
    for index in range(count):
        entry = log[HEADER + index * ENTRY :][:ENTRY]
        sequence, kind = struct.unpack_from("<QI", entry)
        if sequence != index or struct.unpack_from("<Q", entry, 536)[0] != zlib.crc32(entry[:536]):
            break
        outcome.entries += 1
        if kind == 3:
            size, uuid, number = struct.unpack_from("<Q16sI", entry, 16)
            if number == len(outcome.devices) and uuid not in uuids:
                outcome.devices.append(size)
                uuids.append(uuid)
            continue
        extents, chunk, possible = extents_of(entry) if kind == 0 else ([], 0, True)
        outcome.named += extents
        if kind not in (0, 1) or not possible:
            continue
        path = clean_path(entry[40:120] if kind == 0 else entry[28:108])
        if path is None or path in outcome.nodes:
            continue
        parent = path.rpartition(b"/")[0]
        if parent and outcome.nodes.get(parent, ("",))[0] != "directory":
            continue
        if kind == 1:
            uid, gid, mode = struct.unpack_from("<III", entry, 16)
            outcome.nodes[path] = ("directory", mode & 0o7777, uid, gid, 0, (), 0)
            continue
        size, _, uid, gid, mode = struct.unpack_from("<QIIII", entry, 16)
        end = LOG_OFFSET + log_length
        if not size or (struct.unpack_from("<I", entry, 120)[0] == 1 and not chunk):
            continue
        if not servable(outcome, extents, size, chunk, unit, end):
            continue
        mine: list[tuple[int, int, int]] = []
        for device, offset, length in extents:
            if any(d == device and offset < o + n and o < offset + length for d, o, n in taken + mine):
                break
            mine.append((device, offset, length))
        if len(mine) == len(extents):
            taken += mine
            outcome.nodes[path] = ("file", mode & 0o7777, uid, gid, size, tuple(extents), chunk)
    return outcome
