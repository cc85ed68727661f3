# SPDX-License-Identifier: Apache-2.0
"""A device that the server may not map: superblock and log come through the mount, from a kernel that has maps."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from struct import Struct
from uuid import UUID

import pytest

from famfs_server.omf import layout
from tests.twin import trees
from tests.twin.connection import Exchange, Op
from tests.twin.maps import Dialect
from tests.twin.server import Refused, Twin
from tests.twin.trees import Tree

META = {4: (b".meta/.superblock", 0, layout.SUPERBLOCK_REGION), 5: (b".meta/.log", layout.LOG_OFFSET, None)}


@pytest.fixture
def tree(golden_image: Callable[[str, Path], Path], tmp_path: Path) -> Tree:
    return trees.of_volume(golden_image("03-interleaved", tmp_path))


class Site:
    """A twin, and all that it was asked."""

    def __init__(self, tree: Tree, dialect: Dialect, *words: str, named: bool = True, **more: object) -> None:
        self.asked: list[Exchange] = []
        options = (*([f"dialect={dialect.value}"] if named else []), "fmap=require", *words)
        arguments = {"host": tree.host, "metadata_end": tree.metadata_end, **more}
        self.twin = Twin(tree.image, dialect, words=options, famfs_mode=True, watch=self.asked.append, **arguments)

    def opcodes(self) -> list[int]:
        """What was asked since the last time, in order."""
        asked, self.asked[:] = [exchange.opcode for exchange in self.asked], []
        return asked


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.value)
def site(request: pytest.FixtureRequest, tree: Tree) -> Iterator[Site]:
    site = Site(tree, request.param)
    site.twin.mount()
    yield site
    site.twin.kernel.require_silence()
    assert site.twin.end() == 0, site.twin.log()


def test_order_of_messages(site: Site) -> None:
    """Nothing but the two files, each with its map, and their directory before there is a volume; then no request at
    all."""
    asked = [opcode for opcode in site.opcodes() if opcode != Op.GETATTR]
    device = [Op.GET_DAXDEV] if site.twin.kernel.dialect is Dialect.PULL else []
    file = [Op.LOOKUP, Op.LOOKUP, Op.OPEN, Op.GET_FMAP]
    assert asked == [Op.INIT, *file, *device, *file, Op.LOOKUP, Op.FLUSH]
    assert site.twin.kernel.no_flush
    assert not site.twin.kernel.no_open


@pytest.mark.parametrize("dialect", [Dialect.PUSH, Dialect.PUSH_INTERLEAVE])
def test_dialect_is_told_by_the_first_map(dialect: Dialect, tree: Tree) -> None:
    """Without a word of the operator: the first map is interleaved, and a kernel that refuses it asks once more."""
    site = Site(tree, dialect, named=False)
    kernel = site.twin.mount()
    asked = [opcode for opcode in site.opcodes() if opcode != Op.GETATTR]
    file = [Op.LOOKUP, Op.LOOKUP, Op.OPEN, Op.GET_FMAP]
    refused = [*file, Op.RELEASE] if dialect is Dialect.PUSH else []
    assert asked == [Op.INIT, *refused, *file, *file, Op.LOOKUP, Op.FLUSH]
    striped = kernel.openat(b"striped_32m")
    assert striped.inode.map is not None
    assert bool(striped.inode.map.striped) == (dialect is Dialect.PUSH_INTERLEAVE)
    assert site.twin.end() == 0


def test_maps_are_those_of_the_two_files(site: Site, tree: Tree) -> None:
    opened = {file.inode.nodeid: file for file in site.twin.kernel.private}
    assert opened.keys() == META.keys()
    for nodeid, (path, offset, length) in META.items():
        file = opened[nodeid]
        assert file.inode.path == path
        assert not file.inode.failed
        assert file.inode.map is not None
        (extent,) = file.inode.map.ranges()
        expected = tree.metadata_end - layout.LOG_OFFSET if length is None else length
        assert (extent.device, extent.offset, extent.length) == (0, offset, expected)
        # The master stores into the log, and into nothing else.
        assert file.flags & os.O_ACCMODE == (os.O_RDWR if nodeid == 5 else os.O_RDONLY)
    assert sorted(set(site.twin.kernel.slots)) == [0]


def test_every_file_is_mapped(site: Site, tree: Tree) -> None:
    kernel = site.twin.kernel
    assert tree.files
    for path, file in tree.files.items():
        opened = kernel.open(kernel.resolve(path))
        assert opened.inode.size == file.size
        assert opened.inode.map is not None
        for offset in {min(corner, file.size - 1) for corner in file.corners()}:
            assert opened.inode.map.resolve(offset, 1) == file.map.resolve(offset, 1)
        kernel.close_file(opened)


def test_master_writes_the_log(site: Site) -> None:
    kernel = site.twin.kernel
    made = kernel.mkdir(kernel.root(), b"made")
    assert kernel.resolve(b"made").nodeid == made.nodeid
    site.twin.succeed()
    assert kernel.resolve(b"made").nodeid == made.nodeid


def test_successor_asks_for_nothing(site: Site, tree: Tree) -> None:
    kernel = site.twin.kernel
    before = {path: kernel.fetch_fmap(kernel.resolve(path).nodeid) for path in tree.files}
    site.opcodes()
    for _ in range(3):
        site.twin.succeed()
        for path, payload in before.items():
            assert kernel.fetch_fmap(kernel.resolve(path).nodeid) == payload
    assert len(kernel.private) == 2
    assert Op.OPEN not in site.opcodes()


def test_bytes_are_out_of_reach(site: Site) -> None:
    """A kernel that reads in spite of its maps gets EIO; so does one that writes into a new file."""
    kernel = site.twin.kernel
    inode = kernel.resolve(b"sd/odd")
    body = Struct("<QQIIQII").pack(0, 0, 4096, 0, 0, 0, 0)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            kernel.call(Op.READ, inode.nodeid, body, most=4096)
    assert site.twin.log().count("negotiated extent maps but sends reads") == 1
    # The volume itself can be looked at.
    assert kernel.call(Op.READ, 4, body, most=4096)[:8] == layout.SUPERBLOCK_MAGIC.to_bytes(8, "little")


def test_fsync_and_flush_of_a_mapped_file(site: Site) -> None:
    kernel = site.twin.kernel
    opened = kernel.open(kernel.resolve(b"sd/odd"), os.O_RDWR)
    assert kernel.write(opened, 5, b"data") == 4
    kernel.call(Op.FSYNC, opened.inode.nodeid, Struct("<QII").pack(0, 0, 0))
    kernel.close_file(opened)


def test_client(tree: Tree) -> None:
    site = Site(tree, Dialect.PULL, host=trees.OTHER_DEVICE)
    kernel = site.twin.mount()
    assert [file.flags & os.O_ACCMODE for file in kernel.private] == [os.O_RDONLY] * 2
    with pytest.raises(OSError, match="Read-only"):
        kernel.mkdir(kernel.root(), b"made")
    assert site.twin.end() == 0


@pytest.mark.parametrize(
    ("host", "words", "asks"),
    [
        (trees.MASTER, (), True),
        (trees.MASTER, ("nocreate",), False),
        (trees.MASTER, ("ro",), False),
        (trees.OTHER_DEVICE, (), False),
        (trees.OTHER_DEVICE, ("no_open=off",), True),
    ],
    ids=["master", "nocreate", "ro", "client", "no_open=off"],
)
def test_opens_are_asked_for_where_files_can_be_new(host: UUID, words: Sequence[str], asks: bool, tree: Tree) -> None:
    """Elsewhere nothing is asked once a file is mapped, and no RELEASE is sent for what was opened before."""
    site = Site(tree, Dialect.PULL, *words, host=host)
    kernel = site.twin.mount()
    site.opcodes()
    for _ in range(3):
        kernel.close_file(kernel.openat(b"sd/odd"))
    kernel.close_file(kernel.openat(b"sd/eight"))
    asked = [opcode for opcode in site.opcodes() if opcode not in (Op.GETATTR, Op.LOOKUP)]
    if asks:
        again = [Op.OPEN, Op.RELEASE]
        first = [Op.OPEN, Op.GET_FMAP, Op.RELEASE]
        assert asked == [*first, *again, *again, *first]
    else:
        assert asked == [Op.OPEN, Op.GET_FMAP, Op.GET_FMAP]
    assert kernel.no_open == (not asks)
    site.twin.succeed()
    assert int.from_bytes(kernel.read(kernel.openat(b".meta/.superblock"), 0, 8), "little") == layout.SUPERBLOCK_MAGIC
    assert (Op.OPEN in site.opcodes()) == asks
    # Where it is not asked, the kernel refuses this itself: those files belong to a user that it has no place for.
    with pytest.raises(PermissionError) as refused:
        kernel.openat(b".meta/.log", os.O_RDWR)
    assert refused.value.errno == (errno.EPERM if asks else errno.EACCES)
    assert site.twin.end() == 0


def test_kernel_without_famfs(tree: Tree) -> None:
    twin = Twin(tree.image, None, host=tree.host, famfs_mode=True)
    with pytest.raises(Refused, match=r"which only a famfs kernel can use: the kernel.* does not offer FUSE_DAX_FMAP"):
        twin.mount()
    assert twin.end() == 1


def test_maps_that_are_turned_off(tree: Tree) -> None:
    twin = Twin(tree.image, Dialect.PULL, words=("fmap=never",), host=tree.host, famfs_mode=True)
    with pytest.raises(Refused, match=r"which only a famfs kernel can use: extent maps are turned off"):
        twin.mount()
    assert twin.end() == 1


@pytest.mark.parametrize(("at", "words"), [(0, "superblock"), (layout.LOG_OFFSET, "log")])
def test_damaged_media_fail_the_mount(at: int, words: str, tree: Tree) -> None:
    with tree.image.open("r+b") as image:
        image.seek(at)
        image.write(b"\xff" * 64)
    site = Site(tree, Dialect.PULL)
    with pytest.raises(Refused, match=words):
        site.twin.mount()
    assert site.twin.end() == 1


def test_device_that_is_shorter_than_its_log(tree: Tree) -> None:
    os.truncate(tree.image, 4 << 20)
    site = Site(tree, Dialect.PULL)
    with pytest.raises(Refused, match="the log ends beyond the device"):
        site.twin.mount()
    assert site.twin.end() == 1


def test_device_that_the_kernel_cannot_have(tree: Tree) -> None:
    """Pull: the opens work, and the first byte is EIO; that is the end of the mount."""
    site = Site(tree, Dialect.PULL)
    site.twin.devices[0].held = True
    with pytest.raises(Refused, match=r"cannot open \.meta/\.superblock through the new mount: Input/output error"):
        site.twin.mount()
    assert site.twin.end() == 1
