# SPDX-License-Identifier: Apache-2.0
"""Every file of every volume, in every dialect: its map is accepted, and names the bytes that READ returns."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from famfs_server.errors import MediaError
from famfs_server.omf import append, layout, log
from famfs_server.omf.log import Fmap
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from tests.twin import maps, trees
from tests.twin.kernel import Device, FakeKernel, Inode
from tests.twin.maps import PMD, Dialect
from tests.twin.server import Refused, Twin, mounted
from tests.twin.trees import File, Tree

VOLUMES = 500 if os.environ.get("FAMFS_TEST_LONG") else 60
META = {b".meta/.superblock", b".meta/.log"}


def regular(kernel: FakeKernel) -> dict[bytes, Inode]:
    return {inode.path: inode for inode in kernel.walk() if not inode.is_directory}


def check_volume(tree: Tree, rng: random.Random) -> None:
    """Serve a volume without RAWIO, by READ, and with it, by maps; both must be what the record says."""
    common: dict[str, Any] = {"host": tree.host, "metadata_end": tree.metadata_end}
    plan = {file.path: file.reads(rng) for file in tree.files.values()}
    device = Device(str(tree.image))
    expected = {path: [_recorded(tree.files[path], device, *read) for read in plan[path]] for path in plan}
    device.close()

    words = ("fastpath=off",) if rng.random() < 0.3 else ()
    with mounted(tree.image, rng.choice(list(Dialect)), rawio=False, words=words, **common) as kernel:
        assert not kernel.famfs
        inodes = regular(kernel)
        assert inodes.keys() == tree.files.keys() | META
        for path, file in tree.files.items():
            assert inodes[path].size == kernel.getattr(inodes[path]).size == file.size
            opened = kernel.open(inodes[path])
            if file.attached:
                assert [kernel.read(opened, *read) for read in plan[path]] == expected[path], path
            else:
                with pytest.raises(OSError, match="answer") as refused:
                    kernel.read(opened, 0, 1)
                assert refused.value.errno == errno.EIO
            kernel.close_file(opened)

    for dialect in Dialect:
        with mounted(tree.image, dialect, words=(f"dialect={dialect.value}",), **common) as kernel:
            assert kernel.famfs
            inodes = regular(kernel)
            assert inodes.keys() == tree.files.keys() | META
            for path, file in tree.files.items():
                check_mapped(kernel, inodes[path], file, plan[path], expected[path])


def _recorded(file: File, device: Device, offset: int, length: int) -> bytes:
    """The bytes of a range by the record, if the device is there."""
    found, end = b"", min(offset + length, file.size)
    while file.attached and offset < end:
        place = file.map.resolve(offset, end - offset)
        found += device.memory[place.offset : place.offset + place.length]
        offset += place.length
    return found


def check_mapped(
    kernel: FakeKernel, inode: Inode, file: File, plan: list[tuple[int, int]], expected: list[bytes]
) -> None:
    assert kernel.dialect is not None
    if not file.mappable(kernel.dialect):
        with pytest.raises(OSError, match="answer") as refused:
            kernel.open(inode)
        assert refused.value.errno == errno.EOPNOTSUPP
        return
    opened = kernel.open(inode)
    assert [kernel.read(opened, *read) for read in plan] == expected, file.path
    kernel.close_file(opened)
    again = kernel.open(inode)
    kernel.close_file(again)
    before = kernel.fetch_fmap(inode.nodeid)
    kernel.forget(inode)
    evicted = kernel.resolve(file.path)
    assert kernel.fetch_fmap(evicted.nodeid) == before
    assert kernel.read(kernel.open(evicted), *plan[0]) == expected[0]


def test_golden_image(golden_name: str, golden_image: Callable[[str, Path], Path], tmp_path: Path) -> None:
    image = golden_image(golden_name, tmp_path)
    try:
        tree = trees.of_volume(image)
    except MediaError as error:
        check_refused(image, str(error))
    else:
        check_volume(tree, random.Random(golden_name))


def check_refused(image: Path, line: str) -> None:
    twin = Twin(image, Dialect.PULL, host=trees.MASTER)
    with pytest.raises(Refused) as refused:
        twin.mount()
    assert str(refused.value) == line
    assert twin.end() == 1


@pytest.mark.parametrize("number", range(VOLUMES))
def test_random_volume(number: int, rng: random.Random, tmp_path: Path) -> None:
    tree = trees.random_tree(rng, tmp_path / "dax.img")
    check_volume(tree, rng)
    tree.image.unlink()


def test_map_that_needs_a_second_request(tmp_path: Path) -> None:
    """40 GiB in chunks of 2 MiB: half a megabyte of extents where only simple ones are taken."""
    size = (40 << 30) - 4097
    image = tmp_path / "dax.img"
    device = trees.empty(image, 64 << 30)
    volume = Volume(device.memory(), trees.MASTER, str(image))
    volume.create_many([NewFile(b"big", size, 0o644, 0, 0, Interleave(16, 16))])
    device.close()
    tree = trees.of_volume(image)
    assert tree.files[b"big"].map.striped
    rng = random.Random(0)
    plan = tree.files[b"big"].reads(rng)
    with mounted(image, Dialect.PUSH, host=tree.host, metadata_end=tree.metadata_end) as kernel:
        opened = kernel.open(kernel.resolve(b"big"))
        assert opened.inode.map is not None
        assert len(opened.inode.map.extents) == -(-size >> 21)
        mapped = [kernel.read(opened, *read) for read in plan]
    with mounted(image, host=tree.host) as kernel:
        opened = kernel.open(kernel.resolve(b"big"))
        assert [kernel.read(opened, *read) for read in plan] == mapped
    image.unlink()


@pytest.mark.parametrize("dialect", [Dialect.PUSH, Dialect.PUSH_INTERLEAVE])
def test_push_kernel_of_unknown_text(
    dialect: Dialect, golden_image: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    """Without a word from the operator both push kernels get maps that both take."""
    tree = trees.of_volume(golden_image("03-interleaved", tmp_path))
    with mounted(tree.image, dialect, minor=46, host=tree.host, metadata_end=tree.metadata_end) as kernel:
        assert kernel.famfs
        for path in tree.files:
            opened = kernel.open(kernel.resolve(path))
            assert opened.inode.map is not None
            assert not opened.inode.map.striped


@pytest.mark.parametrize("chunks", [170, 174_763, 349_525, 699_049, 699_050])
def test_maps_up_to_the_kernels_limit(chunks: int, tmp_path: Path, rng: random.Random) -> None:
    """Asked for with a page, then with exactly what it takes, up to 16 MiB in one reply; one extent more is refused."""
    end = layout.LOG_OFFSET + trees.LOG_LENGTH
    size = chunks * PMD - 5
    image = tmp_path / "dax.img"
    device = trees.empty(image, 2 << 40)
    strips = -(-chunks // 2) * PMD
    places = (end, end + strips + 7 * PMD)
    fmap = Fmap(tuple(log.Extent(0, place, strips) for place in places), PMD)
    entry = log.build_file(0, b"large", size=size, mode=0o644, uid=0, gid=0, fmap=fmap)
    append.append(device.memory(), 0, entry)
    device.close()
    twin = Twin(image, Dialect.PUSH, words=("dialect=push",), host=trees.MASTER, stream=True)
    kernel = twin.mount()
    nodeid = kernel.resolve(b"large").nodeid
    if chunks > 699_049:
        with pytest.raises(OSError, match="Operation not supported"):
            kernel.fetch_fmap(nodeid)
    else:
        payload = kernel.fetch_fmap(nodeid)
        assert len(payload) == 32 + 24 * chunks <= 16 << 20
        assert maps.HEADER.unpack_from(payload)[5] == len(payload)
        found = maps.parse(Dialect.PUSH, payload)
        assert (found.size, len(found.extents)) == (size, chunks)
        for offset in (0, size - 1, *(rng.randrange(size) for _ in range(1000))):
            chunk, inside = divmod(offset, PMD)
            assert found.resolve(offset, 1).offset == places[chunk % 2] + chunk // 2 * PMD + inside
        assert kernel.fetch_fmap(nodeid) == payload
    assert kernel.resolve(b"large").size == size
    assert twin.end() == 0
    image.unlink()
