# SPDX-License-Identifier: Apache-2.0
"""Files made by system calls on an fmap connection: the inode that a file was made as is never mapped, no page has two
maps, and no size changes under a map (findings 1.7, 1.8, 2.f)."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

import pytest

from famfs_server.omf import layout
from tests.twin import trees
from tests.twin.connection import Op
from tests.twin.kernel import FakeKernel, Inode, OpenFile
from tests.twin.maps import PMD, Dialect
from tests.twin.server import mounted

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


def create(kernel: FakeKernel, name: bytes) -> OpenFile:
    return kernel.openat(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def await_forgotten(kernel: FakeKernel, inode: Inode) -> None:
    """Wait until the server has said that the name of an inode leads elsewhere."""
    while inode.nodeid in kernel.inodes:
        assert kernel.pump(kernel.timeout), "nobody says so"


def refused(kernel: FakeKernel, path: bytes) -> int:
    """The errno that open(2) ends with."""
    with pytest.raises(OSError, match="answer") as error:
        kernel.openat(path)
    return error.value.errno or 0


def test_new_file_is_mapped_when_it_is_closed_and_opened_again(kernel: FakeKernel) -> None:
    """In the ways that log a file: sized, allocated, synced, closed."""
    for name, settle in (
        (b"sized", lambda file: kernel.truncate(file, 3 * PMD)),
        (b"allocated", lambda file: kernel.allocate(file, 0, 3 * PMD)),
        (b"synced", kernel.fsync),
        (b"written", lambda file: None),
    ):
        created = create(kernel, name)
        if name in (b"synced", b"written"):
            assert kernel.write(created, 0, bytes(3 * PMD)) == 3 * PMD
        settle(created)
        kernel.close_file(created)
        await_forgotten(kernel, created.inode)
        opened = kernel.openat(name, os.O_RDWR)
        assert opened.inode.map is not None
        assert kernel.write(opened, 3 * PMD - 3, b"ends") == 3
        assert kernel.read(opened, 3 * PMD - 4, 10) == b"\0end"
        kernel.close_file(opened)


def test_second_opener_is_refused_while_the_creator_has_it_open(kernel: FakeKernel) -> None:
    """Whether the file is logged or not, empty or not; its creator goes on."""
    for name, settle in (
        (b"growing", lambda file: None),
        (b"synced", kernel.fsync),
        (b"sized", lambda file: kernel.truncate(file, 5000)),
        (b"allocated", lambda file: kernel.allocate(file, 0, 5000)),
    ):
        created = create(kernel, name)
        assert refused(kernel, name) == errno.EBUSY
        kernel.write(created, 0, b"12345")
        settle(created)
        assert refused(kernel, name) == errno.EBUSY
        with pytest.raises(OSError, match="busy"):
            kernel.fetch_fmap(created.inode.nodeid)
        assert kernel.write(created, 0, b"abc") == 3
        assert kernel.read(created, 0, 5) == b"abc45"
        assert created.inode.map is None
        kernel.close_file(created)
        opened = kernel.openat(name)
        assert kernel.read(opened, 0, 5) == b"abc45"
        assert opened.inode.map is not None


def test_size_is_settled_by_whatever_logs_the_file(kernel: FakeKernel) -> None:
    created = create(kernel, b"new")
    kernel.write(created, 0, b"12345")
    kernel.write(created, 5, b"678")
    kernel.fsync(created)
    with pytest.raises(OSError, match="answer"):
        kernel.truncate(created, 4)
    with pytest.raises(OSError, match="answer"):
        kernel.write(created, 8, b"9")
    assert kernel.getattr(created.inode).size == 8
    kernel.close_file(created)


def test_mapping_keeps_the_file_open(kernel: FakeKernel) -> None:
    """A private one is all that there is before the map, and its pages are in the cache of the old inode."""
    created = create(kernel, b"new")
    kernel.write(created, 0, b"data")
    with pytest.raises(OSError, match="No such device"):
        kernel.map(created)
    kernel.map(created, private=True)
    kernel.close_file(created)
    assert refused(kernel, b"new") == errno.EBUSY
    assert kernel.touch(created, 1) == ord("a")
    kernel.unmap(created)
    opened = kernel.openat(b"new")
    kernel.map(opened)
    kernel.close_file(opened)
    assert kernel.touch(opened, 2) == ord("t")
    kernel.unmap(opened)


def test_name_leads_to_the_inode_of_the_log_though_the_old_one_lives(kernel: FakeKernel) -> None:
    created = create(kernel, b"new")
    provisional = created.inode.nodeid
    assert kernel.lookup(kernel.root(), b"new") is created.inode
    held = kernel.openat(b"new", os.O_PATH)
    kernel.write(created, 0, b"data")
    assert {inode.nodeid for inode in kernel.walk() if inode.path == b"new"} == {provisional}
    kernel.close_file(created)
    opened = kernel.openat(b"new")
    assert kernel.read(opened, 0, 10) == b"data"
    assert {inode.nodeid for inode in kernel.walk() if inode.path == b"new"} == {opened.inode.nodeid}
    # Who holds the old inode gets nothing by it, and keeps nobody from the file.
    assert kernel.inodes[provisional] is held.inode
    with pytest.raises(OSError, match="Stale"):
        kernel.open(held.inode)
    with pytest.raises(OSError, match="busy"):
        kernel.fetch_fmap(provisional)
    assert kernel.getattr(held.inode).size == 4
    kernel.close_file(held)
    assert provisional not in kernel.inodes
    kernel.close_file(opened)
    with pytest.raises(OSError, match="Stale"):
        kernel.call(Op.GETATTR, provisional, bytes(16), exact=104)


def test_open_that_waits_is_told_of_the_close(kernel: FakeKernel) -> None:
    """A program that opens what it has just closed can overtake its own RELEASE."""
    body = Struct("<II").pack(os.O_RDONLY, 0)
    created = create(kernel, b"new")
    kernel.write(created, 0, b"data")
    early, late = (kernel.send(Op.OPEN, created.inode.nodeid, body) for _ in range(2))
    assert kernel.receive(early)[0] == kernel.receive(late)[0] == errno.EBUSY
    waiting = kernel.send(Op.OPEN, created.inode.nodeid, body)
    kernel.close_file(created)
    assert kernel.receive(waiting)[0] == errno.ESTALE
    assert kernel.read(kernel.openat(b"new"), 0, 10) == b"data"


def test_create_of_a_name_that_is_logged_meanwhile(kernel: FakeKernel) -> None:
    """The kernel asks for no map after CREATE, so it is to look the name up."""
    created = create(kernel, b"new")
    kernel.write(created, 0, b"data")
    flags = os.O_RDWR | os.O_CREAT | 0x8000
    for exclusive, number in ((0, errno.EBUSY), (os.O_EXCL, errno.EEXIST)):
        with pytest.raises(OSError, match="answer") as error:
            kernel.call(Op.CREATE, 1, Struct("<4I").pack(flags | exclusive, 0o644, 0, 0) + b"new\0", exact=144)
        assert error.value.errno == number
    kernel.close_file(created)
    for exclusive, number in ((0, errno.ESTALE), (os.O_EXCL, errno.EEXIST)):
        with pytest.raises(OSError, match="answer") as error:
            kernel.call(Op.CREATE, 1, Struct("<4I").pack(flags | exclusive, 0o644, 0, 0) + b"new\0", exact=144)
        assert error.value.errno == number
    assert kernel.read(kernel.openat(b"new", os.O_RDWR | os.O_CREAT), 0, 10) == b"data"


def test_empty_file_is_dropped(kernel: FakeKernel) -> None:
    created = create(kernel, b"new")
    kernel.close_file(created)
    with pytest.raises(FileNotFoundError):
        kernel.statx(b"new")
    assert created.inode.nodeid not in kernel.inodes
    again = create(kernel, b"new")
    assert again.inode.nodeid != created.inode.nodeid
    kernel.close_file(again)


def test_many_files_never_share_a_page(kernel: FakeKernel) -> None:
    """Made, grown side by side, closed, mapped: the kernel of these tests sees every overlap."""
    files = [create(kernel, b"f%d" % number) for number in range(10)]
    for step in range(4):
        for number, file in enumerate(files):
            assert kernel.write(file, step * 900_000, bytes([number]) * 900_000) == 900_000
    for file in files:
        kernel.close_file(file)
    for number in range(10):
        opened = kernel.openat(b"f%d" % number)
        assert kernel.read(opened, 0, 4_000_000) == bytes([number]) * 3_600_000
