# SPDX-License-Identifier: Apache-2.0
"""Files made by system calls on an fmap connection: never a page cache before the map, never two nodeids for one
file, never a size that changes under a map (findings 1.7, 1.8, 2.f)."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.omf import layout
from tests.twin import trees
from tests.twin.kernel import FakeKernel, Inode, OpenFile
from tests.twin.maps import PMD, Dialect
from tests.twin.server import mounted

SIZE_VALID = 0x48
"""FATTR_SIZE and FATTR_FH, as ftruncate(2) sends them."""


SITES = [*((dialect, True) for dialect in Dialect), (Dialect.PULL, False)]


@pytest.fixture(params=SITES, ids=lambda site: site[0].value + ("" if site[1] else "-mapped"))
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeKernel]:
    """On a device in famfs mode, where new space is reached through the mount; and on one that the server maps."""
    dialect, famfs_mode = request.param
    image = tmp_path / "dax.img"
    trees.empty(image, 4 << 30).close()
    end = layout.LOG_OFFSET + trees.LOG_LENGTH
    more = {"words": (f"dialect={dialect.value}",), "host": trees.MASTER, "metadata_end": end}
    with mounted(image, dialect, famfs_mode=famfs_mode, **more) as kernel:
        yield kernel


def resize(kernel: FakeKernel, file: OpenFile, size: int) -> None:
    kernel.setattr(file.inode, SIZE_VALID, size=size, handle=file.handle)


def evict(kernel: FakeKernel, inode: Inode) -> None:
    """Let go of an inode, once the server has said that its name leads elsewhere; or, where it is not told of closes
    any more, when memory is short."""
    while inode.named and not kernel.no_open:
        assert kernel.pump(kernel.timeout), "nobody says so"
    kernel.forget(inode)


def test_sized_file_is_mapped_when_reopened(kernel: FakeKernel) -> None:
    created = kernel.create(kernel.root(), b"new")
    resize(kernel, created, 3 * PMD)
    opened = kernel.open(created.inode, os.O_RDWR)
    assert kernel.write(opened, 3 * PMD - 3, b"ends") == 3
    # The descriptor that made the file goes through the map from now on, too.
    assert kernel.read(created, 3 * PMD - 4, 10) == b"\0end"
    kernel.close_file(created)
    kernel.close_file(opened)


def test_nodeid_changes_only_when_it_is_forgotten(kernel: FakeKernel) -> None:
    created = kernel.create(kernel.root(), b"new")
    provisional = created.inode.nodeid
    kernel.write(created, 0, b"data")
    assert kernel.lookup(kernel.root(), b"new").nodeid == provisional
    kernel.close_file(created)
    opened = kernel.open(created.inode)
    assert kernel.read(opened, 0, 10) == b"data"
    before = kernel.fetch_fmap(provisional)
    # While somebody has it open the name leads to the old inode, whatever the log says.
    assert kernel.lookup(kernel.root(), b"new").nodeid == provisional
    assert {inode.nodeid for inode in kernel.walk() if inode.path == b"new"} == {provisional}
    kernel.close_file(opened)
    evict(kernel, created.inode)
    logged = kernel.lookup(kernel.root(), b"new")
    assert logged.nodeid != provisional
    assert kernel.fetch_fmap(logged.nodeid) == before
    assert kernel.read(kernel.open(logged), 0, 10) == b"data"


def test_file_that_still_grows_is_not_mapped_under_its_writer(kernel: FakeKernel) -> None:
    created = kernel.create(kernel.root(), b"new")
    kernel.write(created, 0, b"12345")
    try:
        opened = kernel.open(created.inode)
    except OSError as error:
        refusal = error.errno
        assert refusal not in (errno.EIO, errno.ENOSYS)
        kernel.write(created, 5, b"678")
        assert kernel.getattr(created.inode).size == 8
    else:
        # Then its size is settled, and nothing may change it any more.
        assert kernel.read(opened, 0, 10) == b"12345"
        with pytest.raises(OSError, match="answer"):
            resize(kernel, created, 8)
        assert kernel.getattr(created.inode).size == 5
    kernel.close_file(created)


def test_empty_file_is_not_mapped(kernel: FakeKernel) -> None:
    """A map of an empty file would be poisoned by the size that comes after it."""
    created = kernel.create(kernel.root(), b"new")
    with pytest.raises(OSError, match="answer") as refused:
        kernel.open(created.inode)
    assert refused.value.errno not in (errno.EIO, errno.ENOSYS)
    resize(kernel, created, PMD)
    assert kernel.read(kernel.open(created.inode), 0, 4) == bytes(4)
    kernel.close_file(created)


def test_empty_file_is_dropped(kernel: FakeKernel) -> None:
    created = kernel.create(kernel.root(), b"new")
    kernel.close_file(created)
    kernel.forget(created.inode)
    with pytest.raises(OSError, match="No such file"):
        kernel.lookup(kernel.root(), b"new")
    again = kernel.create(kernel.root(), b"new")
    assert again.inode.nodeid != created.inode.nodeid
    kernel.close_file(again)


def test_many_files_never_share_a_page(kernel: FakeKernel) -> None:
    """Made, grown side by side, closed, mapped: the kernel of these tests sees every overlap."""
    root = kernel.root()
    files = [kernel.create(root, b"f%d" % number) for number in range(10)]
    for step in range(4):
        for number, file in enumerate(files):
            assert kernel.write(file, step * 900_000, bytes([number]) * 900_000) == 900_000
    for file in files:
        kernel.close_file(file)
    for number, file in enumerate(files):
        opened = kernel.open(file.inode)
        assert kernel.read(opened, 0, 4_000_000) == bytes([number]) * 3_600_000
