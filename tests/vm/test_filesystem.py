# SPDX-License-Identifier: Apache-2.0
"""The whole server on real dax devices: made, mounted, filled, checked, and what a user is told when the mode is wrong.

Starting a Python program takes seconds in an emulated guest, so one file system goes through all of its life here, and
only its beginning is left to programs that are started: mkfs.famfs, and mount.famfs by mount(8).
"""

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from famfs_server.fuse import kernels
from famfs_server.fuse.dialects import kallsyms_evidence
from one_file import FileLoad, kernel_sends_again
from programs import BIN, SECONDS, fork, here, mounts, run

SetMode = Callable[[str, str], Path]

TREE = Path(json.__file__).parent


def second_device(dax_names: list[str]) -> str | None:
    """Another device that is large enough for a file system."""
    for name in dax_names[-2:-1]:
        if int(Path("/sys/bus/dax/devices", name, "size").read_text()) >= 4 << 30:
            return name
    return None


@pytest.fixture
def master(tmp_path: Path) -> Path:
    return tmp_path / "master.uuid"


@pytest.fixture
def client(tmp_path: Path) -> Path:
    return tmp_path / "client.uuid"


@pytest.fixture
def device(dax_names: list[str], set_mode: SetMode) -> Path:
    """A devdax device that is large enough for a file system."""
    return set_mode(dax_names[-1], "devdax")


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`unmounted(name)` makes a mount point that is empty again afterwards."""
    points: list[Path] = []

    def make(name: str) -> Path:
        point = tmp_path / name
        point.mkdir()
        points.append(point)
        return point

    yield make
    for point in points:
        if os.path.ismount(point):
            subprocess.run(["umount", "-l", str(point)], timeout=SECONDS, check=False)


def helper_for_mount() -> None:
    """What an installation does: mount(8) finds the helper in /sbin."""
    link = Path("/usr/sbin/mount.famfs")
    if not link.exists():
        link.symlink_to(BIN / "mount.famfs")


@pytest.mark.timeout(600)
def test_life_of_a_file_system(
    device: Path, master: Path, client: Path, unmounted: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, theirs = unmounted("ours"), unmounted("theirs")
    run("mkfs.famfs", device, host=master)
    assert "already has a famfs superblock" in here("mkfs.famfs", device, host=master, status=2).error

    helper_for_mount()
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{device} {ours} famfs loglevel=error,noauto,x-systemd.requires=nothing 0 0\n")
    run("mount", "--fstab", fstab, ours, host=master)
    assert len(mounts()) == 1
    assert str(device) in mounts()[0]

    # Ordinary calls, then the tools; a second host sees all of it.
    run("cp", "-r", TREE, ours / "json", host=master)
    here("famfs", "creat", "-s", "3m", "-r", "-S", "7", ours / "seeded", host=master)
    fork("mount.famfs", device, theirs, "-o", "loglevel=error", host=client)
    # The lost sources in __pycache__ come with the tree; symbolic links and empty files it has none of.
    run("diff", "-r", TREE, theirs / "json", host=client)
    here("famfs", "verify", "-S", "7", "-f", theirs / "seeded", host=client)
    run("mkdir", theirs / "not-here", host=client, status=1)

    # What one host writes into a file, the other reads.
    with (theirs / "seeded").open("r+b", buffering=0) as file:
        file.write(b"from the client")
    assert (ours / "seeded").read_bytes()[:15] == b"from the client"

    # A second mount by the same host, and mkfs under a mount, are refused.
    again = unmounted("again")
    assert "already mounted" in fork("mount.famfs", device, again, host=master, status=32).error
    assert "mounted" in here("mkfs.famfs", "-f", device, host=master, status=2).error

    # Workers die under load, and nobody notices; before 6.9, the kernel cannot send again what a worker had in hand.
    with FileLoad(ours / "seeded") as load:
        for _ in range(3):
            load.wait_for(5)
            for worker in run("pgrep", "-x", "famfs-worker", host=master).stdout.split():
                os.kill(int(worker), signal.SIGKILL)
        load.wait_for(5)
    lost = json.loads(here("famfs", "status", "--json", ours, host=master).out)["failed_at_takeover"]
    assert lost == 0 or not kernel_sends_again()
    assert set(load.errors) <= {"EIO"}
    assert len(load.errors) <= lost

    run("umount", theirs, host=client)
    run("umount", ours, host=master)
    assert mounts() == []
    report = here("famfs", "fsck", device, host=master).out
    assert "Free space:" in report
    assert "Device capacity:" in report


@pytest.mark.timeout(600)
def test_driver_is_unbound_under_a_mount(
    device: Path, dax_names: list[str], master: Path, unmounted: Callable[[str], Path], set_mode: SetMode
) -> None:
    """Both mounts are in use all the while. The one on another device does not notice."""
    points = [unmounted("point")]
    devices = [device]
    if second := second_device(dax_names):
        devices.append(set_mode(second, "devdax"))
        points.append(unmounted("other"))
    for each, point in zip(devices, points, strict=True):
        here("mkfs.famfs", "-f", each, host=master)
        fork("mount.famfs", each, point, "-o", "loglevel=error", host=master)
        with (point / "file").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            # close(2) does not wait until the file is in the log; fsync does.
            os.fsync(file.fileno())
    with ExitStack() as stack:
        loads = [stack.enter_context(FileLoad(point / "file")) for point in points]
        for load in loads:
            load.wait_for(5)
        set_mode(device.name, "unbound")
        for load in loads[1:]:
            load.wait_for(5)
        with pytest.raises(OSError, match=r"Input/output error"):
            (points[0] / "file").read_bytes()
        # Names and sizes are known without the device; it comes back with its data.
        assert (points[0] / "file").stat().st_size == 1 << 20
        set_mode(device.name, "devdax")
        for load in loads:
            load.wait_for(5)
    assert set(loads[0].errors) == {"EIO"}
    assert [load.errors for load in loads[1:]] == [[]] * len(loads[1:])
    for point in points:
        # It waits for the server: a device that was bound anew while it was open dies with its last user.
        here("famfs", "umount", point, host=master)
    assert mounts() == []


@pytest.mark.timeout(600)
def test_file_system_on_two_devices(
    device: Path, dax_names: list[str], master: Path, client: Path, unmounted: Callable[[str], Path], set_mode: SetMode
) -> None:
    """The second one is found by its superblock; while it has no driver, its own ranges alone are missing."""
    second = second_device(dax_names)
    if second is None:
        pytest.skip("needs a second device of 4 GiB")
    added = set_mode(second, "devdax")
    ours, theirs = unmounted("ours"), unmounted("theirs")
    here("mkfs.famfs", "-f", device, host=master)
    fork("mount.famfs", device, ours, "-o", "loglevel=error", host=master)
    here("famfs", "devadd", "-f", added, ours, host=master)
    here("famfs", "creat", "-r", "-S", "5", "-s", "8m", "-N", "2", "-B", "2", ours / "striped", host=master)
    fork("mount.famfs", device, theirs, "-o", "loglevel=error,require_all_daxdevs", host=client)
    here("famfs", "verify", "-S", "5", "-f", theirs / "striped", host=client)

    set_mode(second, "unbound")
    parts = []
    with (theirs / "striped").open("rb", buffering=0) as file:
        for chunk in range(4):
            try:
                parts.append(len(os.pread(file.fileno(), 4096, chunk << 21)))
            except OSError as error:
                parts.append(errno.errorcode[error.errno or 0])
    assert parts in ([4096, "EIO"] * 2, ["EIO", 4096] * 2)
    set_mode(second, "devdax")
    here("famfs", "verify", "-S", "5", "-f", theirs / "striped", host=client)
    here("famfs", "umount", theirs, host=client)
    here("famfs", "umount", ours, host=master)
    assert mounts() == []


@pytest.mark.timeout(600)
def test_mode_is_switched_for_a_mount(
    device: Path, master: Path, unmounted: Callable[[str], Path], set_mode: SetMode
) -> None:
    """No kernel here takes a device in famfs mode, so that way is the failure, and devdax mode the success."""
    if kallsyms_evidence(kernels.SYSTEM):
        pytest.skip("a famfs kernel")
    set_mode(device.name, "fsdev")
    set_mode(device.name, "devdax")
    point = unmounted("point")
    driver = Path("/sys/bus/dax/devices", device.name, "driver")
    here("mkfs.famfs", "-f", device, host=master)
    line = fork("famfs", "mount", "--set-daxmode", device, point, host=master, status=32).error
    assert "which only a famfs kernel can use" in line
    assert driver.resolve().name == "device_dax"
    set_mode(device.name, "fsdev")
    fork("mount.famfs", "-o", "daxmode=devdax,loglevel=error", device, point, host=master)
    assert driver.resolve().name == "device_dax"
    busy = fork("mount.famfs", "-o", "daxmode=famfs", device, unmounted("other"), host=master, status=32).error
    assert "unmount it before its mode is switched" in busy
    assert (point / ".meta" / ".superblock").exists()
    run("umount", point, host=master)
    here("mkfs.famfs", "-f", "--set-daxmode", device, host=master)
    assert driver.resolve().name == "fsdev_dax"
