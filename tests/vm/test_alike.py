# SPDX-License-Identifier: Apache-2.0
"""A real device and the file that stands for one answer alike, which is what makes tests on the latter count."""

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import DeviceBusyError, DeviceError

MIB = 1 << 20
ALIGN = 2 * MIB


@pytest.fixture(params=["real", "emulated"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each of the two."""
    if request.param == "real":
        names: list[str] = request.getfixturevalue("dax_names")
        set_mode: Callable[[str, str], Path] = request.getfixturevalue("set_mode")
        return str(set_mode(names[0], "devdax"))
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    return str(image)


@pytest.fixture
def device(path: str) -> Iterator[DaxDevice]:
    with DaxDevice.open(path) as opened:
        yield opened


def test_sizes_come_from_the_device(device: DaxDevice) -> None:
    assert device.mode in (Mode.DEVDAX, Mode.EMULATED)
    assert device.align == ALIGN
    assert device.size % ALIGN == 0
    assert device.memory().size == device.size


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 4096), (0, ALIGN + 4096), (4096, ALIGN), (MIB, ALIGN), (-ALIGN, ALIGN)],
)
def test_mappings_off_the_alignment_are_refused(device: DaxDevice, offset: int, length: int) -> None:
    with pytest.raises(DeviceError, match="both must be multiples of 2097152"):
        device.map(offset, length)


def test_mappings_past_the_end_are_refused(device: DaxDevice) -> None:
    """By us: the kernel makes those of a real device, and a touch is SIGBUS."""
    for offset, length in ((device.size, ALIGN), (device.size - ALIGN, 2 * ALIGN)):
        with pytest.raises(DeviceError, match="within the"):
            device.map(offset, length)
    with device.map(device.size - ALIGN, ALIGN) as last:
        assert len(last) == ALIGN


def test_what_one_writes_another_reads(path: str, device: DaxDevice) -> None:
    memory = device.memory()
    with DaxDevice.open(path) as other:
        theirs = other.memory()
        for offset, data in ((0, b"first"), (ALIGN - 3, b"across"), (device.size - 4, b"last")):
            memory.write(offset, data)
            memory.write_back(offset, len(data))
            memory.fence()
            assert theirs.read_fresh(offset, len(data)) == data
        memory.zero(0, 2 * ALIGN)
        assert theirs.read_fresh(ALIGN - 3, 6) == bytes(6)
        assert theirs.read_fresh(device.size - 4, 4) == b"last"
        theirs.close()
    memory.close()


def test_a_mapping_outlives_the_descriptor(path: str) -> None:
    with DaxDevice.open(path) as opened:
        mapping = opened.map(0, ALIGN)
    mapping[:5] = b"famfs"
    assert mapping[:5] == b"famfs"
    mapping.close()


def test_one_that_is_open_for_reading_cannot_be_written(path: str) -> None:
    with DaxDevice.open(path, writable=False) as opened:
        with opened.map(0, ALIGN) as mapping, pytest.raises(TypeError):
            mapping[0] = 1
        with pytest.raises(DeviceError, match="is open for reading only"):
            opened.lock(Lock.WRITER, exclusive=True)
        assert opened.lock(Lock.MOUNTED, exclusive=False)
        # What the mapping says is the descriptor's doing.
        with pytest.raises(OSError, match="Permission denied"):
            mmap.mmap(opened.fd, ALIGN, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_locks_are_those_of_the_open_device(path: str, device: DaxDevice) -> None:
    with DaxDevice.open(path) as other:
        assert device.lock(Lock.MOUNTED, exclusive=False)
        assert other.lock(Lock.MOUNTED, exclusive=False)
        with pytest.raises(DeviceBusyError, match="in use"):
            other.require_lock(Lock.MOUNTED, exclusive=True, why="in use")
        assert device.lock(Lock.WRITER, exclusive=True)
        assert not other.lock(Lock.WRITER, exclusive=True)
        inherited = os.dup(device.fd)
        device.close()
        assert not other.lock(Lock.WRITER, exclusive=True)
        os.close(inherited)
        assert other.lock(Lock.WRITER, exclusive=True)


def test_flock_of_others_is_no_lock(path: str) -> None:
    stranger = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(stranger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with DaxDevice.open(path) as opened:
            assert opened.lock(Lock.MOUNTED, exclusive=True)
    finally:
        os.close(stranger)
