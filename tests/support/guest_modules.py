# SPDX-License-Identifier: Apache-2.0
"""Kernel modules of a guest that scripts/vm-test has booted: taken out and put in again, or the other way round."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import real_device

GUEST = Path("/run/famfs-vm")
ONLINE_POLICY = Path("/sys/devices/system/memory/auto_online_blocks")
SECONDS = 60


def in_guest_only() -> None:
    """Skips the test elsewhere: nobody takes modules out of a user's kernel."""
    if not GUEST.exists() or real_device.device_name() is not None:
        pytest.skip("needs the modules of the guest that scripts/vm-test boots")


@contextmanager
def without(module: str) -> Iterator[None]:
    """A kernel without this module, which nothing uses now."""
    _busybox("rmmod", module)
    try:
        yield
    finally:
        _busybox("insmod", _file(module))


@contextmanager
def with_kmem() -> Iterator[None]:
    """A kernel with the driver of system-ram mode, which takes every device that has no driver when it is loaded.

    Memory that it adds stays offline, so that the devices can be had back; they must be taken from it by the end.
    """
    policy = ONLINE_POLICY.read_text()
    ONLINE_POLICY.write_text("offline")
    _busybox("insmod", _file("kmem"))
    try:
        yield
    finally:
        _busybox("rmmod", "kmem")
        ONLINE_POLICY.write_text(policy)


def _file(module: str) -> str:
    return str(GUEST / "modules" / f"{module}.ko")


def _busybox(*words: str) -> None:
    subprocess.run([str(GUEST / "busybox"), *words], check=True, timeout=SECONDS)
