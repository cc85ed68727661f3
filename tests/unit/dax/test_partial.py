# SPDX-License-Identifier: Apache-2.0
"""The memory of a device that only the kernel maps whole: two files for its first bytes, and others
for parts of the rest, for a time."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import DeviceError, DeviceFaultError

MIB = 1 << 20
SIZE = 1 << 30


def scratch(length: int, fill: bytes) -> int:
    descriptor = os.memfd_create("part")
    os.truncate(descriptor, length)
    os.pwrite(descriptor, fill, 0)
    return descriptor


def is_mapped(descriptor: int) -> bool:
    """Whether this process has any of a file mapped."""
    number = str(os.fstat(descriptor).st_ino)
    return any(line.split()[4] == number for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def parts() -> Iterator[tuple[int, int]]:
    pair = scratch(2 * MIB, b"first"), scratch(4 * MIB, b"second")
    yield pair
    for descriptor in pair:
        os.close(descriptor)


@pytest.fixture
def memory(parts: tuple[int, int]) -> PartialMemory:
    return PartialMemory([(parts[0], 2 * MIB), (parts[1], 4 * MIB)], SIZE, writable=[False, True])


def test_files_lie_one_behind_the_other(memory: PartialMemory, parts: tuple[int, int]) -> None:
    assert (memory.size, memory.reach, memory.writable) == (SIZE, 6 * MIB, True)
    assert memory.read_fresh(0, 5) == b"first"
    assert memory.read(2 * MIB - 2, 8) == b"\0\0second"
    memory.write(3 * MIB, b"stored")
    memory.write_back(3 * MIB, 6)
    memory.fence()
    memory.store_u64(4 * MIB, 77)
    assert os.pread(parts[1], 6, MIB) == b"stored"
    assert os.pread(parts[1], 8, 2 * MIB) == (77).to_bytes(8, "little")


def test_read_only(parts: tuple[int, int]) -> None:
    memory = PartialMemory([(parts[0], 2 * MIB)], SIZE, writable=[False])
    assert not memory.writable
    with pytest.raises(BufferError):
        memory.write(0, b"x")


def test_what_nothing_shows_is_out_of_reach(memory: PartialMemory) -> None:
    for act in (
        lambda: memory.read(6 * MIB, 1),
        lambda: memory.zero(6 * MIB, 2 * MIB),
        lambda: memory.read(SIZE - 1, 1),
    ):
        with pytest.raises(DeviceFaultError):
            act()
    with pytest.raises(ValueError, match="buffer"):
        memory.read(SIZE, 1)
    assert memory.hidden(8 * MIB, 4 * MIB) == [(8 * MIB, 4 * MIB)]
    assert not memory.shows(8 * MIB, 1)
    assert memory.shows(0, 6 * MIB)


def test_files_show_more_for_a_time(memory: PartialMemory) -> None:
    descriptors = [scratch(2 * MIB, b"third"), scratch(4 * MIB, b"fourth")]
    for offset, length, descriptor in zip((10 * MIB, 14 * MIB), (2 * MIB, 4 * MIB), descriptors, strict=True):
        memory.show(offset, length, descriptor)
    assert memory.read(10 * MIB, 5) + memory.read(14 * MIB, 6) == b"thirdfourth"
    memory.write(18 * MIB - 3, b"end")
    assert os.pread(descriptors[1], 3, 4 * MIB - 3) == b"end"
    assert memory.shows(10 * MIB, 2 * MIB)
    assert not memory.shows(10 * MIB, 2 * MIB + 1)
    assert memory.hidden(9 * MIB, 10 * MIB) == [(9 * MIB, MIB), (12 * MIB, 2 * MIB), (18 * MIB, MIB)]
    assert memory.hidden(11 * MIB, 2 * MIB) == [(12 * MIB, MIB)]
    # All of a file goes, whatever part of it is named, and none beside it.
    memory.hide(12 * MIB, 3 * MIB)
    with pytest.raises(DeviceFaultError):
        memory.read(17 * MIB, 1)
    assert memory.read(10 * MIB, 5) == b"third"
    assert is_mapped(descriptors[0])
    assert not is_mapped(descriptors[1])
    assert memory.hidden(0, SIZE)[1:] == [(12 * MIB, SIZE - 12 * MIB)]


def test_mapping_goes_with_its_memory(parts: tuple[int, int]) -> None:
    memory = PartialMemory([(parts[0], 2 * MIB)], SIZE, writable=[False])
    assert is_mapped(parts[0])
    memory.close()
    del memory
    assert not is_mapped(parts[0])


def test_released_memory_is_gone_for_its_users_too(memory: PartialMemory, parts: tuple[int, int]) -> None:
    view = memory.view[2 * MIB : 3 * MIB]
    assert bytes(view[:6]) == b"second"
    memory.release()
    for offset in (0, 2 * MIB, 6 * MIB - 8):
        with pytest.raises(DeviceFaultError):
            memory.read_fresh(offset, 8)
    with pytest.raises(DeviceFaultError):
        memory.store_u64(2 * MIB, 1)
    # What a system call meets there is EFAULT, and not the end of the process.
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.writev(writer, [view[:10]])
    os.close(reader)
    os.close(writer)
    assert os.pread(parts[1], 6, 0) == b"second"
    assert not is_mapped(parts[0])
    assert not is_mapped(parts[1])


def test_children_inherit_none_of_it(memory: PartialMemory, parts: tuple[int, int]) -> None:
    assert is_mapped(parts[1])
    pid = os.fork()
    if pid == 0:
        os._exit(is_mapped(parts[0]) or is_mapped(parts[1]))
    assert os.waitpid(pid, 0)[1] == 0
    assert memory.read(0, 5) == b"first"


def test_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(DeviceError, match="cannot map 2097152 bytes of a file of the own mount: No such device"):
        PartialMemory([(descriptor, 2 * MIB)], SIZE, writable=[False])
    os.close(descriptor)
