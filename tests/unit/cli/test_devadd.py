# SPDX-License-Identifier: Apache-2.0
"""`famfs devadd` on a file system that is not mounted, and what other commands make of its further devices."""

from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from commands import GIB, Device, host_file, json_of, run
from famfs_server.cli import devadd
from famfs_server.cli.unmounted import DeviceTarget
from famfs_server.daemon.control_client import ControlError
from famfs_server.dax.device import DaxDevice, Lock
from famfs_server.omf import superblock
from famfs_server.omf.superblock import Superblock, SuperblockState


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devadd, "LOCK_SECONDS", 0.1)
    monkeypatch.setenv("FAMFS_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def second(make_device: Callable[..., Device]) -> Device:
    return make_device("second")


def block_of(device: Device) -> Superblock:
    found = superblock.inspect(device.head())
    assert found.superblock is not None
    return found.superblock


def test_device_is_added(device: Device, second: Device) -> None:
    done = run("famfs", "devadd", second.path, device.path)
    assert done.status == 0, done.err
    made = block_of(second)
    assert superblock.inspect(second.head()).state is SuperblockState.SECONDARY
    assert made.uuid == block_of(device).uuid
    assert f"device UUID: {made.device_uuid}" in done.out
    with device.volume() as volume:
        assert volume.devices == [None, made.device_uuid]
        assert volume.space.sizes == [4 * GIB, 4 * GIB]


def test_new_files_may_use_it(device: Device, second: Device, tmp_path: Path) -> None:
    run("famfs", "devadd", second.path, device.path)
    creat = ("famfs", "creat", "--daxdev", device.path, "-N", "2", "-B", "4", "-r", "-S", "5", "-s", "8m")
    assert run(*creat, "striped").status == 0
    # The place was remembered. Elsewhere it has to be named: without it the file cannot be read.
    (tmp_path / "run" / "devices.json").unlink()
    verify = ("famfs", "verify", "-S", "5", "-f", "striped", "--daxdev", device.path)
    failed = run(*verify)
    assert failed.status != 0
    assert "device 1" in failed.err
    named = f"{block_of(second).device_uuid}={second.path}"
    assert run(*verify, "--daxdev", named).status == 0
    with device.volume() as volume:
        strips = volume.namespace.fmap(volume.namespace.resolve(b"striped")).extents
        assert {strip.device for strip in strips} == {0, 1}
    found = json_of(run("famfs", "fsck", "--json", device.path))
    assert found["clean"]


def refused(second: Device, device: Device, *options: str, error: str) -> None:
    before = second.head()
    outcome = run("famfs", "devadd", *options, second.path, device.path)
    assert outcome.status != 0
    assert error in outcome.error
    assert second.head() == before
    with device.volume() as volume:
        assert len(volume.devices) <= 2


def test_what_is_there_is_not_overwritten(device: Device, second: Device, make_device: Callable[..., Device]) -> None:
    other = make_device("other").make()
    refused(other, device, error="holds a famfs file system; use -f")
    refused(device, device, error="is part of the file system")
    assert run("famfs", "devadd", second.path, device.path).status == 0
    refused(second, device, error="is part of the file system")
    refused(second, device, "-f", error="is part of the file system")
    refused(second, other, error=f"further device of the file system {block_of(device).uuid}; use -f")
    assert run("famfs", "devadd", "-f", other.path, device.path).status == 0
    assert block_of(other).uuid == block_of(device).uuid


def test_device_that_cannot_be_added(device: Device, make_device: Callable[..., Device], tmp_path: Path) -> None:
    refused(make_device("small", 2 * GIB), device, error="unsupported memory device size")
    second = make_device("second")
    with second.locked(Lock.MOUNTED, exclusive=False):
        refused(second, device, error="in use by another famfs command")
    assert run("famfs", "devadd", "/nonexistent", device.path).status != 0
    outcome = run("famfs", "devadd", second.path, device.path, env=host_file(tmp_path, UUID(int=77)))
    assert outcome.status != 0
    assert "only the master can add devices" in outcome.error
    assert "not in a mounted famfs" in run("famfs", "devadd", second.path, tmp_path).error


def test_failed_append_leaves_no_superblock(device: Device, second: Device) -> None:
    with DaxDevice.open(str(device.path)) as dax, device.volume() as volume:
        # The log is full: its header says so to whoever looks before an append.
        memory = dax.memory()
        from famfs_server.omf import layout, log

        header = bytearray(log.build_header(volume.superblock.log_length, last_index=0))
        memory.write(layout.LOG_OFFSET, bytes(header))
        memory.close()
    assert run("famfs", "mkdir", "--daxdev", device.path, "d").status == 0
    outcome = run("famfs", "devadd", second.path, device.path)
    assert "log is full" in outcome.error
    assert superblock.inspect(second.head()).state is SuperblockState.ABSENT


@pytest.mark.parametrize(
    ("logged", "error", "state"),
    [
        (True, ControlError("the daemon closed the connection"), SuperblockState.SECONDARY),
        (False, ControlError("the daemon closed the connection"), SuperblockState.ABSENT),
        (True, KeyboardInterrupt(), SuperblockState.SECONDARY),
    ],
)
def test_daemon_that_is_gone_before_it_answers(
    device: Device,
    second: Device,
    monkeypatch: pytest.MonkeyPatch,
    logged: bool,
    error: BaseException,
    state: SuperblockState,
) -> None:
    """A device that the log names must keep the superblock by which it is found."""
    real = DeviceTarget.add_device

    def dying(target: DeviceTarget, uuid: UUID, path: str) -> None:
        if logged:
            real(target, uuid, path)
        raise error

    monkeypatch.setattr(DeviceTarget, "add_device", dying)
    outcome = run("famfs", "devadd", second.path, device.path)
    assert (outcome.status == 0) == (logged and isinstance(error, ControlError))
    assert superblock.inspect(second.head()).state is state
    with device.volume() as volume:
        assert volume.devices == [None, *([block_of(second).device_uuid] if logged else [])]


def test_mkfs_and_fsck_know_further_devices(device: Device, second: Device) -> None:
    run("famfs", "devadd", second.path, device.path)
    outcome = run("mkfs.famfs", second.path)
    assert outcome.status == 2
    assert f"further device of the file system {block_of(device).uuid}" in outcome.error
    outcome = run("famfs", "fsck", second.path)
    assert outcome.status == 1
    assert "name the device that holds its log" in outcome.error
    assert run("mkfs.famfs", "-f", second.path).status == 0
    assert block_of(second).flags == 0


@pytest.mark.parametrize(
    "words", [("--daxdev", "a", "--daxdev", "b"), ("--daxdev", f"{UUID(int=1)}=/x"), ("--daxdev", f"{UUID(int=1)}=")]
)
def test_devices_of_the_command_line(words: tuple[str, ...]) -> None:
    assert run("famfs", "getmap", *words, "file").status == 2
