# SPDX-License-Identifier: Apache-2.0
"""A volume whose file data the server cannot reach: superblock and log are files, the rest is the kernel's."""

import os
from collections.abc import Iterator

import pytest

from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import DeviceFaultError, RoleError, UnreachableError
from famfs_server.omf import layout
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, ScratchMemory, formatted

SIZE = 4 << 30
MIB = 1 << 20


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    """Superblock and log of a volume with one file."""
    whole = ScratchMemory(SIZE)
    formatted(whole)
    volume = Volume(whole, HOST, "memory")
    volume.create(NewFile(b"old", 3 * MIB, 0o644, 0, 0))
    volume.close()
    pair = []
    for start, length in ((layout.SUPERBLOCK_OFFSET, layout.SUPERBLOCK_REGION), (layout.LOG_OFFSET, LOG_LENGTH)):
        descriptor = os.memfd_create("meta")
        os.ftruncate(descriptor, length)
        os.pwrite(descriptor, whole.read(start, 64 << 10), 0)
        pair.append(descriptor)
    whole.close()
    yield pair[0], pair[1]
    for descriptor in pair:
        os.close(descriptor)


def volume_of(files: tuple[int, int], *, writable: bool = True) -> Volume:
    parts = [(files[0], layout.SUPERBLOCK_REGION), (files[1], LOG_LENGTH)]
    return Volume(PartialMemory(parts, SIZE, writable=[False, writable]), HOST, "/dev/dax7.7")


def test_names_and_directories(files: tuple[int, int]) -> None:
    volume = volume_of(files)
    old = volume.namespace.resolve(b"old")
    assert volume.namespace.size[old] == 3 * MIB
    assert not volume.reaches_data
    made = volume.mkdir(b"made", 0o755, 0, 0)
    volume.close()
    again = volume_of(files)
    assert again.namespace.resolve(b"made") == made
    again.close()


def test_bytes_are_out_of_reach(files: tuple[int, int]) -> None:
    volume = volume_of(files)
    old = volume.namespace.resolve(b"old")
    for act in (
        lambda: volume.views(old, 0, 1),
        lambda: volume.read(old, 0, 1),
        lambda: volume.write(old, 0, memoryview(b"x")),
    ):
        with pytest.raises(DeviceFaultError, match="for the kernel alone"):
            act()
    volume.write_back(old)
    # The volume's own files can be read.
    assert volume.read(4, 0, 8) == layout.SUPERBLOCK_MAGIC.to_bytes(8, "little")
    volume.close()


def test_new_file_is_refused_and_changes_nothing(files: tuple[int, int]) -> None:
    volume = volume_of(files)
    free, entries = volume.space.free, volume.namespace.replayed
    with pytest.raises(UnreachableError, match="the kernel alone reaches it"):
        volume.create(NewFile(b"new", MIB, 0o644, 0, 0))
    assert (volume.space.free, volume.namespace.replayed) == (free, entries)
    assert not volume.namespace.resolve(b"new")
    volume.close()


def test_log_that_cannot_be_stored_to(files: tuple[int, int]) -> None:
    volume = volume_of(files, writable=False)
    with pytest.raises(RoleError, match="mounted read-only in famfs mode"):
        volume.mkdir(b"made", 0o755, 0, 0)
    volume.close()
