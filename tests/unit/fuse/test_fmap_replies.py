# SPDX-License-Identifier: Apache-2.0
"""What must never be in a map, whatever the namespace says: replay rules it out before, and this looks once more."""

import errno
import logging
from collections.abc import Callable, Iterator
from struct import Struct
from uuid import UUID

import pytest

from famfs_server.fuse import abi
from famfs_server.fuse.dialects import PULL, PUSH, PUSH_INTERLEAVE, Dialect
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.fmap_replies import FmapReplies
from famfs_server.omf import layout
from famfs_server.volume import namespace as ns
from famfs_server.volume.devices import Attached, Device
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, ScratchMemory, formatted

SIZE = 4 << 30
UNIT = layout.ALLOC_UNIT
LOG_END = layout.LOG_OFFSET + LOG_LENGTH
ROOM = Struct("<II").pack(4096, 0)
EXTENT = Struct("<IIQQ")


@pytest.fixture
def filesystem() -> Iterator[FileSystem]:
    memory = ScratchMemory(SIZE)
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    volume.create(NewFile(b"file", 3 * UNIT, 0o644, 0, 0))
    yield FileSystem(volume, Settings(b"/run/here"))
    volume.close()


def asked(filesystem: FileSystem, node: int, dialect: Dialect) -> bytes:
    maps = FmapReplies(filesystem, (dialect,), ("/dev/dax7.7",))
    return bytes(maps.get_fmap(node, ROOM if dialect.size_probe else b""))


@pytest.mark.parametrize("dialect", [PULL, PUSH, PUSH_INTERLEAVE], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(
    ("device", "offset", "length"),
    [
        (0, 0, UNIT),
        (0, layout.LOG_OFFSET, UNIT),
        (0, LOG_END - UNIT, 4 * UNIT),
        (0, LOG_END, 0),
        (0, SIZE - UNIT, 3 * UNIT),
        (0, SIZE, UNIT),
        (0, 2**64 - UNIT, UNIT),
        (0, LOG_END + 512, 3 * UNIT),
        (0, LOG_END, 3 * UNIT + 512),
        (1, LOG_END, 3 * UNIT),
        (2**32 - 1, LOG_END, 3 * UNIT),
    ],
)
def test_extent_that_no_file_may_have(
    filesystem: FileSystem,
    caplog: pytest.LogCaptureFixture,
    dialect: Dialect,
    device: int,
    offset: int,
    length: int,
) -> None:
    tree, node = filesystem.namespace, ns.FIRST_NODEID
    assert EXTENT.unpack_from(asked(filesystem, node, dialect), 32) == (0, 0, LOG_END, 3 * UNIT)
    tree.extent_rows(node)[0] = (device, 0, offset, length)
    maps = FmapReplies(filesystem, (dialect,), ("/dev/dax7.7",))
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            with pytest.raises(OSError, match="not supported") as refusal:
                maps.get_fmap(node, ROOM if dialect.size_probe else b"")
            assert refusal.value.errno == errno.EOPNOTSUPP
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("file cannot be mapped by this kernel: ")
    assert list(maps.refused) == [node]


@pytest.mark.parametrize(
    ("kernel_can_map", "pushed", "size", "cause"),
    [
        (True, True, SIZE, ""),
        (False, True, SIZE, "which is not in famfs mode"),
        (True, False, SIZE, "which the kernel has not been given"),
        (True, True, LOG_END, "reaches beyond its device"),
        (True, True, None, "which is not attached"),
    ],
)
def test_further_device_that_the_kernel_cannot_use(
    filesystem: FileSystem, kernel_can_map: bool, pushed: bool, size: int | None, cause: str
) -> None:
    found = None if size is None else Attached("/dev/dax8.8", size, None, kernel_can_map)
    filesystem.volume.table.enter(Device(1, UUID(int=7), SIZE, found))
    filesystem.namespace.extent_rows(ns.FIRST_NODEID)[0] = (1, 0, LOG_END, 3 * UNIT)
    maps = FmapReplies(filesystem, (PUSH_INTERLEAVE,), ("/dev/dax7.7",), pushed=lambda slot: pushed)
    if not cause:
        assert EXTENT.unpack_from(maps.get_fmap(ns.FIRST_NODEID, ROOM), 32) == (1, 0, LOG_END, 3 * UNIT)
        return
    with pytest.raises(OSError, match="not supported"):
        maps.get_fmap(ns.FIRST_NODEID, ROOM)
    assert cause in maps.refused[ns.FIRST_NODEID]


@pytest.mark.parametrize("dialect", [PULL, PUSH, PUSH_INTERLEAVE], ids=lambda dialect: dialect.name)
def test_file_without_extents(filesystem: FileSystem, dialect: Dialect) -> None:
    filesystem.namespace.extent_count[ns.FIRST_NODEID] = 0
    with pytest.raises(OSError, match="not supported") as refusal:
        asked(filesystem, ns.FIRST_NODEID, dialect)
    assert refusal.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize(
    ("dialect", "chunk_size"),
    [(PUSH_INTERLEAVE, 4096 + 512), (PUSH_INTERLEAVE, 2**32), (PUSH_INTERLEAVE, 8192), (PULL, 2**32), (PULL, 4096)],
)
def test_chunks_that_the_kernel_does_not_take(filesystem: FileSystem, dialect: Dialect, chunk_size: int) -> None:
    """As simple extents they would have the same bytes, where that is possible."""
    filesystem.namespace.chunk[ns.FIRST_NODEID] = chunk_size

    def ask() -> bytes:
        return asked(filesystem, ns.FIRST_NODEID, dialect)

    if chunk_size % dialect.alignment:
        with pytest.raises(OSError, match="not supported") as refusal:
            ask()
        assert refusal.value.errno == errno.EOPNOTSUPP
    else:
        assert abi.FMAP_HEADER.unpack_from(ask())[2] == abi.FMAP_SIMPLE


@pytest.mark.parametrize("path", ["dax0.0", "", "/dev/" + "x" * 251])
def test_device_names_that_a_kernel_does_not_take(filesystem: FileSystem, path: str) -> None:
    def ask(name: str) -> Callable[[], bytes]:
        maps = FmapReplies(filesystem, (PULL,), (name,))
        return lambda: maps.get_daxdev(0)

    with pytest.raises(OSError, match="Invalid argument") as refusal:
        ask(path)()
    assert refusal.value.errno == errno.EINVAL
    longest = "/dev/" + "x" * 250
    assert len(ask(longest)()) == 280
    assert longest.encode() + b"\0" in ask(longest)()
