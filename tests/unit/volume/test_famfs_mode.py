# SPDX-License-Identifier: Apache-2.0
"""A volume whose file data the kernel alone can map: superblock and log are files, and so is new space for a time."""

import os
from collections.abc import Iterator

import pytest

from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import DeviceError, DeviceFaultError, NoSpaceError, RoleError, SpaceBusyError
from famfs_server.omf import layout
from famfs_server.omf.log import Extent
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, meta_files

SIZE = 4 << 30
MIB = 1 << 20


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    """Superblock and log of a volume with one file."""
    pair = meta_files(SIZE, NewFile(b"old", 3 * MIB, 0o644, 0, 0))
    yield pair
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


class Kernel:
    """The other side of space files: it opens them, as files of their own, and forgets them when it is told to."""

    def __init__(self, volume: Volume) -> None:
        assert volume.spaces is not None
        self.spaces = volume.spaces
        self.nodeids: list[int] = []
        self.files: dict[int, int] = {}
        """Descriptors of what has been stored, by nodeid."""
        self.maps = True
        self.spaces.open = self.open

    def open(self, name: bytes) -> int:
        nodeid = self.spaces.find(name)
        assert nodeid
        self.spaces.remember(nodeid)
        if self.maps:
            self.spaces.give_to_kernel(nodeid)
        descriptor = os.memfd_create("space")
        os.ftruncate(descriptor, self.spaces.live[nodeid].length)
        os.pwrite(descriptor, b"old bytes", 0)
        self.nodeids.append(nodeid)
        self.files[nodeid] = os.dup(descriptor)
        return descriptor

    def forget(self) -> None:
        while self.nodeids:
            self.spaces.forget(self.nodeids.pop(), 1)


@pytest.fixture
def volume(files: tuple[int, int]) -> Iterator[Volume]:
    volume = volume_of(files)
    yield volume
    volume.close()


def new_file(name: bytes, size: int = MIB) -> NewFile:
    return NewFile(name, size, 0o644, 0, 0)


def test_without_a_mount_nothing_is_made(volume: Volume) -> None:
    free, entries = volume.space.free, volume.namespace.replayed
    assert not volume.can_fill
    with pytest.raises(DeviceError, match="reached through its mount, which has ended"):
        volume.create(new_file(b"new"))
    assert (volume.space.free, volume.namespace.replayed) == (free, entries)
    assert not volume.namespace.resolve(b"new")


def test_new_files_are_zeroed_in_their_space(volume: Volume) -> None:
    kernel = Kernel(volume)
    assert volume.can_fill
    nodes = volume.create_many([new_file(b"a", 3 * MIB), new_file(b"b", 10)])
    # One run of space, one file.
    (nodeid,) = kernel.nodeids
    (extent,) = kernel.spaces.live.values()
    assert extent.length == 6 * MIB
    assert os.pread(kernel.files[nodeid], 9, 0) == bytes(9)
    assert not kernel.spaces.shows((extent,))
    # Nobody may have a map of it before the kernel has forgotten the other inode.
    extents = [extent for node in nodes for extent in volume.namespace.fmap(node).extents]
    assert not any(kernel.spaces.quiet((extent,)) for extent in extents)
    kernel.forget()
    assert kernel.spaces.quiet(extents)
    assert not kernel.spaces.live


def test_space_comes_back_when_it_is_forgotten(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famfs_server.volume.spacefiles.QUIET_SECONDS", 0.01)
    kernel = Kernel(volume)
    free = volume.space.free
    with volume.reserve([new_file(b"new", free)]):
        assert volume.space.free == 0
    assert volume.space.free == 0
    with pytest.raises(NoSpaceError):
        volume.reserve([new_file(b"other", free)])
    kernel.forget()
    assert volume.space.free == free
    assert not kernel.spaces.shows((Extent(0, volume.log_end, 1),))


def test_space_that_the_kernel_holds_is_not_opened_again(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famfs_server.volume.spacefiles.QUIET_SECONDS", 0.01)
    kernel = Kernel(volume)
    with volume.reserve([new_file(b"new")]) as reservation:
        extents = reservation.maps[0].extents
        kernel.spaces.hide(extents)
        with pytest.raises(SpaceBusyError, match="the kernel still holds space"):
            kernel.spaces.reach(extents)
        kernel.forget()
        kernel.spaces.reach(extents)
        assert kernel.spaces.shows(extents)


def test_kernel_that_does_not_ask_for_the_map(volume: Volume) -> None:
    kernel = Kernel(volume)
    kernel.maps = False
    with pytest.raises(DeviceError, match="it does not map it"):
        volume.create(new_file(b"new"))
    kernel.forget()
    assert not volume.namespace.resolve(b"new")


def test_names_of_space(volume: Volume) -> None:
    """Nobody can guess them, and they lead nowhere once the file is open."""
    kernel = Kernel(volume)
    seen: list[bytes] = []
    real = kernel.spaces.open
    assert real is not None

    def opening(name: bytes) -> int:
        seen.append(name)
        row = kernel.spaces.row(kernel.spaces.find(name))
        assert volume.namespace.mode[row] == 0o100600
        assert volume.namespace.path(row) == b".meta/" + name
        return real(name)

    kernel.spaces.open = opening
    volume.create(new_file(b"a"))
    volume.create(new_file(b"b"))
    assert len(set(seen)) == 2
    assert {len(name) for name in seen} == {len(b".space-") + 32}
    assert not any(kernel.spaces.find(name) for name in seen)
    assert list(volume.namespace.children(3)) == [4, 5]


def test_successor_holds_what_the_kernel_has_not_forgotten(files: tuple[int, int]) -> None:
    state = os.memfd_create("state")
    parts = [(files[0], layout.SUPERBLOCK_REGION), (files[1], LOG_LENGTH)]

    def worker() -> Volume:
        memory = PartialMemory(parts, SIZE, writable=[False, True])
        return Volume(memory, HOST, "/dev/dax7.7", state=state)

    first = worker()
    kernel = Kernel(first)
    free = first.space.free
    node = first.create(new_file(b"logged"))
    first.reserve([new_file(b"lost", 5 * MIB)])
    nodeids = list(kernel.nodeids)
    second = worker()
    assert second.spaces is not None
    assert second.spaces.live.keys() == set(nodeids)
    assert not second.spaces.quiet(second.namespace.fmap(node).extents)
    assert second.space.free == free - 8 * MIB
    # How often the dead worker has given them is not certain: any word of them is the last.
    second.spaces.remember(nodeids[1])
    for nodeid in nodeids:
        second.spaces.forget(nodeid, 1)
    assert not second.spaces.live
    assert second.space.free == free - 2 * MIB
    again = second.spaces
    again.open = Kernel(second).open
    assert second.create(new_file(b"lost", 5 * MIB)) == node + 1
    os.close(state)


def test_log_that_cannot_be_stored_to(files: tuple[int, int]) -> None:
    volume = volume_of(files, writable=False)
    with pytest.raises(RoleError, match="mounted read-only in famfs mode"):
        volume.mkdir(b"made", 0o755, 0, 0)
    volume.close()
