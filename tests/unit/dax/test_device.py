# SPDX-License-Identifier: Apache-2.0
"""Devices: what is one, what its mode allows, the rules of mapping, and the locks.

A real dax device needs hardware or the guest of the vm tier. Here a character device that exists everywhere stands in a
sysfs tree of the test, which is all that the code asks about drivers, sizes and alignment.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax.device import EMULATED_ALIGN, DaxDevice, Lock, Mode
from famfs_server.errors import DeviceBusyError, DeviceError, DeviceModeError

MIB = 1 << 20
NODE = "/dev/null"


@pytest.fixture
def fake_sysfs(tmp_path: Path) -> Callable[..., Path]:
    """`fake_sysfs(driver, size, align)` makes a sysfs in which NODE is a dax device."""

    def make(driver: str | None = "device_dax", size: str = "4294967296", align: str = "2097152") -> Path:
        number = os.stat(NODE).st_rdev
        bus = tmp_path / "bus" / "dax"
        directory = bus / "devices" / "dax0.0"
        directory.mkdir(parents=True)
        (directory / "size").write_text(size + "\n")
        (directory / "align").write_text(align + "\n")
        (directory / "subsystem").symlink_to(bus)
        if driver is not None:
            (bus / "drivers" / driver).mkdir(parents=True)
            (directory / "driver").symlink_to(bus / "drivers" / driver)
        node = tmp_path / "dev" / "char" / f"{os.major(number)}:{os.minor(number)}"
        node.parent.mkdir(parents=True)
        node.symlink_to(directory)
        return tmp_path

    return make


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    return path


@pytest.mark.parametrize(("driver", "mode"), [("device_dax", Mode.DEVDAX), ("fsdev_dax", Mode.FSDEV)])
def test_modes(fake_sysfs: Callable[..., Path], driver: str, mode: Mode) -> None:
    with DaxDevice.open(NODE, sysfs_root=fake_sysfs(driver)) as device:
        assert device.mode is mode
        assert (device.size, device.align) == (4 << 30, 2 * MIB)


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("kmem", "is in system-ram mode; run: daxctl reconfigure-device -m devdax dax0.0"),
        (None, "has no driver bound, and device_dax is not loaded; run: modprobe device_dax "),
        ("novel_dax", "is bound to the unknown driver novel_dax"),
    ],
)
def test_modes_that_are_no_use(fake_sysfs: Callable[..., Path], driver: str | None, words: str) -> None:
    with pytest.raises(DeviceModeError, match=words) as error:
        DaxDevice.open(NODE, sysfs_root=fake_sysfs(driver))
    assert "\n" not in str(error.value)


def test_a_device_whose_driver_is_there_and_not_bound(fake_sysfs: Callable[..., Path]) -> None:
    root = fake_sysfs(None)
    (root / "bus" / "dax" / "drivers" / "device_dax").mkdir(parents=True)
    with pytest.raises(DeviceModeError, match=r"has no driver bound; run: echo dax0\.0 >"):
        DaxDevice.open(NODE, sysfs_root=root)


def test_famfs_mode_cannot_be_mapped(fake_sysfs: Callable[..., Path]) -> None:
    words = r"only a famfs kernel can use.*daxctl reconfigure-device -m devdax"
    with (
        DaxDevice.open(NODE, sysfs_root=fake_sysfs("fsdev_dax")) as device,
        pytest.raises(DeviceModeError, match=words),
    ):
        device.memory()


@pytest.mark.parametrize(("size", "align"), [("", "2097152"), ("4294967296", "none")])
def test_sysfs_that_makes_no_sense(fake_sysfs: Callable[..., Path], size: str, align: str) -> None:
    with pytest.raises(DeviceError, match="cannot read size and align"):
        DaxDevice.open(NODE, sysfs_root=fake_sysfs("device_dax", size, align))


def test_what_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "odd").write_bytes(b"x" * (EMULATED_ALIGN + 1))
    for path, words in (
        (tmp_path / "absent", "No such file or directory"),
        (tmp_path, "is not a dax device"),
        (tmp_path / "empty", "a multiple of 2 MiB, not 0"),
        (tmp_path / "odd", f"not {EMULATED_ALIGN + 1}"),
        (Path("/dev/zero"), "is a character device but not a dax device"),
    ):
        with pytest.raises(DeviceError, match=words) as error:
            DaxDevice.open(str(path))
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 4096), (4096, 2 * MIB), (MIB, 2 * MIB), (0, 10 * MIB), (8 * MIB, 2 * MIB), (-2 * MIB, 2 * MIB)],
)
def test_mapping_rules_of_the_emulated_device(image: Path, offset: int, length: int) -> None:
    with DaxDevice.open(str(image)) as device, pytest.raises(DeviceError, match="cannot map"):
        device.map(offset, length)


def test_memory_is_the_file(image: Path) -> None:
    with DaxDevice.open(str(image)) as device:
        memory = device.memory()
        assert memory.size == 8 * MIB
        assert memory.mechanism == "none"
        memory.write(4 * MIB, b"bytes")
        memory.close()
    with image.open("rb") as file:
        file.seek(4 * MIB)
        assert file.read(5) == b"bytes"


def test_zeroing_leaves_holes(image: Path) -> None:
    with DaxDevice.open(str(image)) as device:
        memory = device.memory()
        memory.write(0, b"x" * 2 * MIB)
        before = image.stat().st_blocks
        memory.zero(0, 2 * MIB)
        assert memory.read(0, 2 * MIB) == bytes(2 * MIB)
        memory.write(0, b"abcdef")
        memory.zero(1, 3)
        assert memory.read(0, 6) == b"a\0\0\0ef"
        memory.close()
    assert image.stat().st_blocks < before


def test_read_only(image: Path) -> None:
    with DaxDevice.open(str(image), writable=False) as device:
        memory = device.memory()
        assert not memory.writable
        assert memory.read(0, 4) == bytes(4)
        with pytest.raises(BufferError):
            memory.write(0, b"x")
        with pytest.raises(DeviceError, match="open for reading only"):
            device.lock(Lock.WRITER, exclusive=True)
        memory.close()


def test_locks_exclude_other_opens(image: Path) -> None:
    one, two = DaxDevice.open(str(image)), DaxDevice.open(str(image))
    with one, two:
        assert one.lock(Lock.MOUNTED, exclusive=False)
        assert two.lock(Lock.MOUNTED, exclusive=False)
        assert not two.lock(Lock.MOUNTED, exclusive=True)
        assert one.lock(Lock.WRITER, exclusive=True)
        assert not two.lock(Lock.WRITER, exclusive=True)
        with pytest.raises(DeviceBusyError, match="why it is so"):
            two.require_lock(Lock.WRITER, exclusive=True, why="why it is so")
        assert one.lock_host(UUID(int=1))
        assert not two.lock_host(UUID(int=1))
        assert two.lock_host(UUID(int=2))
        one.unlock(Lock.WRITER)
        assert two.lock(Lock.WRITER, exclusive=True)


def test_lock_ends_with_its_process(image: Path) -> None:
    code = (
        "import sys, time; from famfs_server.dax.device import DaxDevice, Lock; d = DaxDevice.open(sys.argv[1]);"
        "print(d.lock(Lock.WRITER, exclusive=True), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with DaxDevice.open(str(image)) as device:
            assert not device.lock(Lock.WRITER, exclusive=True)
            holder.kill()
            assert device.lock(Lock.WRITER, exclusive=True, wait=10)
