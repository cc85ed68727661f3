# SPDX-License-Identifier: Apache-2.0
"""The bytes of a device: bounds, faults named by their range, stores, and letting go."""

import ctypes
import mmap
import struct
import tempfile
from collections.abc import Callable, Iterator

import pytest

from famfs_server.dax import cacheline
from famfs_server.dax.memory import Memory
from famfs_server.errors import DeviceFaultError

PAGE = mmap.PAGESIZE


@pytest.fixture
def mapping() -> Iterator[mmap.mmap]:
    """Four mapped pages, the last two of which are gone."""
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * PAGE)
        with mmap.mmap(file.fileno(), 4 * PAGE) as mapping:
            file.truncate(2 * PAGE)
            yield mapping


@pytest.fixture(params=[True, False], ids=["flush", "no-flush"])
def memory(mapping: mmap.mmap, request: pytest.FixtureRequest) -> Iterator[Memory]:
    memory = Memory(memoryview(mapping), flush=request.param)
    yield memory
    memory.close()


def test_what_is_written_is_read(memory: Memory) -> None:
    memory.write(5, b"famfs")
    memory.write(11, memoryview(bytearray(b"memory")))
    memory.store_u64(PAGE, 0x1122334455667788)
    memory.write_back(0, 2 * PAGE)
    memory.fence()
    assert memory.read(4, 13) == b"\0famfs\0memory"
    assert memory.read_fresh(PAGE, 8) == bytes.fromhex("8877665544332211")
    assert memory.read(2 * PAGE - 1, 1) == b"\0"
    assert memory.read(4 * PAGE, 0) == b""


def test_data_of_other_item_sizes_is_written_whole(memory: Memory) -> None:
    memory.write(0, memoryview(bytes(range(1, 17))).cast("I"))
    assert memory.read(0, 17) == bytes([*range(1, 17), 0])


def test_it_knows_its_size_and_kind(mapping: mmap.mmap) -> None:
    view = memoryview(mapping)
    memory = Memory(view)
    assert (memory.size, memory.writable, memory.mechanism) == (4 * PAGE, True, cacheline.MECHANISM)
    assert memory.view is view
    assert Memory(memoryview(b"abc")).writable is False
    assert Memory(memoryview(b"abc"), flush=False).mechanism == "none"
    memory.close()


@pytest.mark.parametrize(
    "access",
    [
        lambda memory: memory.read(2 * PAGE, 16),
        lambda memory: memory.read_fresh(2 * PAGE, 16),
        lambda memory: memory.present(2 * PAGE, 16),
        lambda memory: memory.write(2 * PAGE, bytes(16)),
        lambda memory: memory.store_u64(2 * PAGE, 1),
    ],
    ids=["read", "read_fresh", "present", "write", "store_u64"],
)
def test_a_fault_names_the_offset(memory: Memory, access: Callable[[Memory], object]) -> None:
    with pytest.raises(DeviceFaultError, match=f"offset {2 * PAGE:#x} of the device"):
        access(memory)


def pages_mapped(mapping: mmap.mmap, pages: int) -> list[bool]:
    """Which of the first pages of a mapping this process has in its page tables."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(8 * (address // PAGE))
        return [bool(entry >> 63) for entry in struct.unpack(f"{pages}Q", pagemap.read(8 * pages))]


@pytest.mark.parametrize("flush", [True, False])
def test_pages_are_mapped_before_a_system_call_reads_them(flush: bool) -> None:
    """A worker that is killed while the kernel maps a page for an answer costs the caller an EIO."""
    with tempfile.TemporaryFile() as file:
        # Not neighbours, since the kernel maps those as well.
        pages = 256
        file.truncate(pages * PAGE)
        with mmap.mmap(file.fileno(), pages * PAGE) as mapping:
            memory = Memory(memoryview(mapping), flush=flush)
            assert not any(pages_mapped(mapping, pages))
            memory.present(5, 1)
            assert pages_mapped(mapping, 1) == [True]
            memory.present(100 * PAGE - 1, 60 * PAGE)
            found = pages_mapped(mapping, pages)
            assert all(found[99:160])
            assert not all(found)
            memory.close()


@pytest.mark.skipif(cacheline.MECHANISM == "none", reason="no cache-line instructions on this processor")
def test_a_fault_during_maintenance_is_named_too(mapping: mmap.mmap) -> None:
    memory = Memory(memoryview(mapping))
    for maintain in (memory.write_back, memory.invalidate):
        with pytest.raises(DeviceFaultError, match=f"offset {2 * PAGE:#x} of the device"):
            maintain(2 * PAGE, 16)
    memory.close()


def test_without_flush_the_cache_is_left_alone(mapping: mmap.mmap) -> None:
    memory = Memory(memoryview(mapping), flush=False)
    memory.write_back(2 * PAGE, 16)  # would fault
    memory.invalidate(2 * PAGE, 16)
    memory.fence()
    memory.close()


@pytest.mark.parametrize(("offset", "length"), [(4 * PAGE, 1), (-1, 1), (0, 4 * PAGE + 1), (1, -1)])
def test_ranges_are_checked(memory: Memory, offset: int, length: int) -> None:
    for read in (memory.read, memory.read_fresh):
        with pytest.raises(ValueError, match=r"negative|outside"):
            read(offset, length)
    with pytest.raises(ValueError, match=r"negative|outside"):
        memory.write(offset, bytes(max(length, 0) or 5 * PAGE))


def test_read_only_memory_refuses_stores() -> None:
    memory = Memory(memoryview(bytes(64)))
    with pytest.raises(BufferError):
        memory.write(0, b"x")
    with pytest.raises(BufferError):
        memory.store_u64(0, 1)
    assert memory.read(0, 64) == bytes(64)


@pytest.mark.parametrize(
    "view",
    [memoryview(bytes(16)).cast("I"), memoryview(bytes(16)).cast("B", (4, 4)), memoryview(bytes(16))[::2]],
)
def test_only_plain_bytes_are_taken(view: memoryview) -> None:
    with pytest.raises(ValueError, match="plain bytes"):
        Memory(view)


def test_closing_lets_the_owner_unmap(mapping: mmap.mmap) -> None:
    memory = Memory(memoryview(mapping))
    memory.close()
    memory.close()
    mapping.close()
    with pytest.raises(ValueError, match="released"):
        memory.read(0, 1)
