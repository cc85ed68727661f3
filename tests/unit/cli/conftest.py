# SPDX-License-Identifier: Apache-2.0
"""What the tests of the commands share: a host with a UUID of its own, and devices."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from commands import Device, host_file
from famfs_server.cli import fsck, mkfs, unmounted

HOST = UUID("f00dcafe-0102-4304-8506-0708090a0b0c")


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UUID:
    """This host's UUID, in a file that belongs to the test; the umask is the usual one."""
    for name, value in host_file(tmp_path, HOST).items():
        monkeypatch.setenv(name, value)
    os.umask(0o022)
    for module in (mkfs, unmounted, fsck):
        monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    return HOST


@pytest.fixture
def make_device(tmp_path: Path) -> Callable[..., Device]:
    """Makes blank devices."""
    return lambda name="device", size=4 << 30: Device(tmp_path / name, size)


@pytest.fixture
def device(make_device: Callable[..., Device]) -> Device:
    """A device with an empty file system on it."""
    if os.geteuid() != 0:
        pytest.skip("mkfs.famfs needs root")
    return make_device().make()
