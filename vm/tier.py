# SPDX-License-Identifier: Apache-2.0
"""The runs that make up the tiers of tests in guests."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vm.cache import KERNEL_SUITES, Cache
from vm.report import STATUS_TIMEOUT, say
from vm.runner import Order, run

SYSTEMD_TESTS = "tests/vm/test_systemd.py"

# One device is too small for a file system, two are not.
DEVICES = (512, 4096, 4096)


def one_guest(base: Order, folder: str) -> Order:
    """The tests of a folder that need one host."""
    command = [folder, f"--ignore={folder}/hosts", *base.command]
    return replace(base, pytest=True, command=command, devices=DEVICES)


def two_guests(base: Order, folder: str) -> Order:
    """Those that need two."""
    return replace(base, pytest=True, command=[f"{folder}/hosts", *base.command], hosts=2, devices=(4096,))


def runs(base: Order, *, everything: bool) -> Iterator[tuple[str, Order]]:
    """The runs of tier vm with their names: one guest and two on the newest kernel, or on each kernel in each mode."""
    one, two = one_guest(base, "tests/vm"), two_guests(base, "tests/vm")
    yield "one-guest", one
    yield "two-guests", two
    if everything:
        yield "one-guest-fsdev", replace(one, mode="fsdev")
        # The others skip these tests, which take minutes in an emulated guest.
        yield "one-guest-systemd", replace(one, command=[SYSTEMD_TESTS, *base.command], systemd=True)
        for kernel in KERNEL_SUITES:
            if kernel != base.kernel:
                yield f"one-guest-{kernel}", replace(one, kernel=kernel)
                yield f"two-guests-{kernel}", replace(two, kernel=kernel)


def fmap_runs(base: Order) -> Iterator[tuple[str, Order]]:
    """The runs of tier fmap: the tests change the dialect themselves."""
    base = replace(base, famfs="push")
    yield "one-guest", one_guest(base, "tests/fmap")
    yield "two-guests", two_guests(base, "tests/fmap")


def run_tier(tier: str, base: Order, cache: Cache, *, everything: bool) -> int:
    """Does all runs, also after one that failed; the time limit is for all together. Gives the first bad status."""
    os.chdir(Path(__file__).resolve().parents[1])
    deadline = time.monotonic() + base.timeout
    statuses = []
    for name, order in fmap_runs(base) if tier == "fmap" else runs(base, everything=everything):
        left = deadline - time.monotonic()
        if left <= 0:
            say(f"{name}: no time left of {base.timeout:.0f} s")
            statuses.append(STATUS_TIMEOUT)
            continue
        say(f"{name}:")
        results = base.results / name if base.results else None
        statuses.append(run(replace(order, timeout=left, results=results), cache))
    return next((status for status in statuses if status), 0)
