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
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from tests.twin import trees
from tests.twin.kernel import Device, FakeKernel, Inode
from tests.twin.maps import Dialect
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
