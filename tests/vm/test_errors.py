# SPDX-License-Identifier: Apache-2.0
"""Every state of a device that a user can meet: each program that is given such a device says in one line what is wrong
and what helps.

The programs run in this process, since starting Python takes seconds in an emulated guest; all of them must end before
they fork. Only a mount in famfs mode gets further, and has a process of its own.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import commands
from famfs_server.dax.device import DaxDevice
from famfs_server.errors import DeviceError, DeviceModeError
from famfs_server.fuse import kernels
from famfs_server.fuse.dialects import kallsyms_evidence
from guest_modules import in_guest_only, with_kmem, without
from programs import fork, mounts

SetMode = Callable[[str, str], Path]


@dataclass(frozen=True)
class State:
    """What was done to the device, and what every program says of it."""

    make: Callable[[SetMode, str], Path]
    words: tuple[str, ...]


def rebound_while_open(set_mode: SetMode, name: str) -> Path:
    """Bound again while somebody still had it open: it serves him, and is dead once he has closed it."""
    number = os.open(set_mode(name, "devdax"), os.O_RDWR)
    set_mode(name, "unbound")
    Path("/sys/bus/dax/drivers/device_dax/new_id").write_text(name)
    os.close(number)
    return Path("/dev", name)


STATES = {
    "unbound": State(
        lambda set_mode, name: set_mode(name, "unbound"),
        ("has no driver bound", "echo {name} > /sys/bus/dax/drivers/device_dax/bind"),
    ),
    "famfs-mode": State(
        lambda set_mode, name: set_mode(name, "fsdev"),
        (
            "is in famfs mode (driver fsdev_dax), which only a famfs kernel can use",
            "daxctl reconfigure-device -m devdax {name}",
        ),
    ),
    "rebound-while-open": State(
        rebound_while_open, ("its driver was unbound while it was in use", "daxctl disable-device {name}")
    ),
    "another-kind": State(lambda *_: Path("/dev/null"), ("/dev/null is a character device but not a dax device",)),
    "absent": State(lambda *_: Path("/dev/dax99.0"), ("/dev/dax99.0: No such file or directory",)),
    "folder": State(lambda *_: Path("/dev"), ("/dev",)),
}
# With the statuses that they end with: 2 and 16 for an argument that is none, the others for a bad device.
PROGRAMS = {
    "mkfs.famfs": {2},
    "mount.famfs": {32},
    "famfs fsck": {1, 2},
    "fsck.famfs": {8, 16},
    "famfs logplay --shadow /tmp/shadow --daxdev": {1, 2},
    "famfs mkdir name --daxdev": {1, 2},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_one_line_for_a_device_that_cannot_be_used(
    dax_names: list[str], set_mode: SetMode, tmp_path: Path, state: State
) -> None:
    if state is STATES["famfs-mode"] and kallsyms_evidence(kernels.SYSTEM):
        pytest.skip("a famfs kernel")
    name = dax_names[-1]
    device = state.make(set_mode, name)
    require_one_line(device, tmp_path, *state.words, gets_further=state is STATES["famfs-mode"])
    assert mounts() == []


def require_one_line(device: Path, folder: Path, *expected: str, gets_further: bool = False) -> None:
    """Each program says of the device in one line all that is expected. `gets_further`: a mount forks before that."""
    point = folder / "point"
    point.mkdir()
    host = folder / "uuid"
    for program, statuses in PROGRAMS.items():
        first, *rest = program.split()
        words = [*rest, device, *([point] if first == "mount.famfs" else [])]
        if first == "mount.famfs" and gets_further:
            line = fork(first, *words, host=host, status=32).error
        else:
            done = commands.run(first, *words, env={"FAMFS_SYSTEM_UUID_FILE": str(host)})
            assert done.status in statuses, (program, done)
            line = done.error
        for part in expected:
            assert part.format(name=device.name) in line, program


def test_one_line_for_a_device_whose_driver_is_not_loaded(
    dax_names: list[str], set_mode: SetMode, tmp_path: Path
) -> None:
    in_guest_only()
    for name in dax_names:
        set_mode(name, "unbound")
    with without("device_dax"):
        words = "has no driver bound, and device_dax is not loaded; run: modprobe device_dax && daxctl enable-device "
        require_one_line(Path("/dev", dax_names[-1]), tmp_path, words + "{name}")


def test_one_line_for_a_device_that_is_ordinary_memory(dax_names: list[str], set_mode: SetMode, tmp_path: Path) -> None:
    in_guest_only()
    for name in dax_names:
        set_mode(name, "devdax")
    with with_kmem():
        device = set_mode(dax_names[0], "system-ram")
        try:
            require_one_line(device, tmp_path, "is in system-ram mode; run: daxctl reconfigure-device -m devdax {name}")
        finally:
            set_mode(dax_names[0], "devdax")


def test_a_device_that_is_too_small(dax_names: list[str], set_mode: SetMode) -> None:
    device = set_mode(dax_names[0], "devdax")
    size = int(Path("/sys/bus/dax/devices", dax_names[0], "size").read_text())
    if size >= 4 << 30:
        pytest.skip("all devices are large enough for a file system")
    done = commands.run("mkfs.famfs", device)
    assert done.status == 2
    assert "unsupported memory device size (<4GiB)" in done.error


def test_a_driver_that_goes_between_opening_and_mapping(dax_names: list[str], set_mode: SetMode) -> None:
    path = set_mode(dax_names[-1], "devdax")
    with DaxDevice.open(str(path)) as device:
        set_mode(dax_names[-1], "unbound")
        with pytest.raises(DeviceModeError, match="has lost its driver; bind it again"):
            device.memory()


def test_a_mapping_off_the_alignment_or_past_the_end(dax_names: list[str], set_mode: SetMode) -> None:
    """The kernel would map what lies behind the end, and end whoever touches it."""
    with DaxDevice.open(str(set_mode(dax_names[-1], "devdax"))) as device:
        for offset, length in ((0, 4096), (4096, device.align), (device.size - device.align, 2 * device.align)):
            with pytest.raises(DeviceError, match="both must be multiples of"):
                device.map(offset, length)
