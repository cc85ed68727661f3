# SPDX-License-Identifier: Apache-2.0
"""The runs that make up the tier of tests in guests."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vm.cache import KERNEL_SUITES, Cache
from vm.report import STATUS_TIMEOUT, say
from vm.runner import Order, run

FOLDER = "tests/vm"
SYSTEMD_TESTS = "tests/vm/test_systemd.py"
HOSTS_FOLDER = "tests/vm/hosts"


def runs(base: Order, *, everything: bool) -> Iterator[tuple[str, Order]]:
    """The runs with their names: one guest and two on the newest kernel, or on each kernel and in each mode."""
    # One device is too small for a file system, two are not.
    devices = (512, 4096, 4096)
    one = replace(base, pytest=True, command=[FOLDER, f"--ignore={HOSTS_FOLDER}", *base.command], devices=devices)
    two = replace(base, pytest=True, command=[HOSTS_FOLDER, *base.command], hosts=2, devices=(4096,))
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


def run_tier(base: Order, cache: Cache, *, everything: bool) -> int:
    """Does all runs, also after one that failed; the time limit is for all together. Gives the first bad status."""
    os.chdir(Path(__file__).resolve().parents[1])
    deadline = time.monotonic() + base.timeout
    statuses = []
    for name, order in runs(base, everything=everything):
        left = deadline - time.monotonic()
        if left <= 0:
            say(f"{name}: no time left of {base.timeout:.0f} s")
            statuses.append(STATUS_TIMEOUT)
            continue
        say(f"{name}:")
        results = base.results / name if base.results else None
        statuses.append(run(replace(order, timeout=left, results=results), cache))
    return next((status for status in statuses if status), 0)
