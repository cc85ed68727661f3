# SPDX-License-Identifier: Apache-2.0
"""The rules of a mounted volume, asked without a kernel: who may do what, and with which error."""

import errno
import logging
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from uuid import UUID

import pytest

from famfs_server.errors import FamfsError
from famfs_server.fuse import abi
from famfs_server.fuse.abi import OpenFlag, SetattrValid
from famfs_server.fuse.filesystem import (
    DAY,
    DOT,
    DOTDOT,
    LONG,
    SHADOW_XATTR,
    Attributes,
    FileSystem,
    Settings,
    errno_of,
)
from famfs_server.omf import layout, log
from famfs_server.volume import namespace as ns
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.provisional import FIRST_PROVISIONAL
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, ScratchMemory, formatted

OTHER = UUID(int=99)
SETTINGS = Settings(shadow=b"/run/famfs/here")
ROOT = ns.ROOT
MIB = 1 << 20


class Hosts:
    """One memory, and a file system on each of two hosts."""

    def __init__(self) -> None:
        self.memory = ScratchMemory()
        formatted(self.memory)
        with_files = Volume(self.memory, HOST, "memory")
        with_files.mkdir(b"dir", 0o755, 1, 2)
        node = with_files.create(NewFile(b"file", 10_000, 0o640, 3, 4))
        with_files.write(node, 0, memoryview(b"data"))
        with_files.close()
        self.master = self.mount(HOST)
        self.client = self.mount(OTHER)

    def mount(self, host: UUID, settings: Settings = SETTINGS) -> FileSystem:
        """A file system as a worker of that host makes it."""
        return FileSystem(Volume(self.memory, host, "memory"), settings)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.master.volume.close()
    hosts.client.volume.close()


@pytest.fixture
def master(hosts: Hosts) -> FileSystem:
    return hosts.master


@pytest.fixture
def client(hosts: Hosts) -> FileSystem:
    return hosts.client


def refused(act: Callable[[], object]) -> str:
    """The name of the errno that a request ends with, as the planes answer it."""
    try:
        act()
    except (OSError, FamfsError) as error:
        return errno.errorcode[errno_of(error)]
    return "done"


def names(fs: FileSystem, directory: int = ROOT, cookie: int = 0) -> list[bytes]:
    return [name for _, _, name in fs.entries(directory, cookie)]


# -- names and attributes -----------------------------------------------------------------------


def test_attributes(master: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    ino, size, blocks, atime, _, _, atime_ns, _, _, mode, nlink, uid, gid, rdev, block, flags = master.attr(node)
    assert (ino, size, blocks) == (node, 10_000, 20)
    assert (mode, nlink, uid, gid, rdev, block, flags) == (stat.S_IFREG | 0o640, 1, 3, 4, 0, 4096, 0)
    assert atime * 10**9 + atime_ns == master.started
    assert len(master.attr(ROOT)) == 16


@pytest.mark.parametrize("nodeid", [2, 10, 18, 19, 1 << 20, 1 << 61, FIRST_PROVISIONAL, (1 << 64) - 1])
def test_nodeids_of_nothing_are_stale(master: FileSystem, nodeid: int) -> None:
    for act in (
        lambda: master.attr(nodeid),
        lambda: master.open(nodeid, os.O_RDONLY),
        lambda: master.opendir(nodeid),
        lambda: master.views(nodeid, 0, 1),
        lambda: master.write(nodeid, 0, memoryview(b"x")),
        lambda: master.setattr(nodeid, Attributes(SetattrValid.MODE)),
        lambda: master.fsync(nodeid),
        lambda: master.lseek(nodeid, 0, os.SEEK_DATA),
        lambda: master.allocate(nodeid, 0, 1, 0),
        lambda: master.getxattr(nodeid, b"user.other"),
    ):
        assert refused(act) == "ESTALE"
    master.forget(nodeid, 1)
    master.release(nodeid)


def test_only_what_never_changes_is_cached(master: FileSystem) -> None:
    assert master.timeouts(master.lookup(ROOT, b"file")) == (DAY, DAY)
    assert master.timeouts(master.create(ROOT, b"new", 0, 0o644, 0, 0)[0]) == (0, 1)


def test_names_that_are_too_long(master: FileSystem) -> None:
    assert master.lookup(ROOT, b"x" * 79) == 0
    assert refused(lambda: master.lookup(ROOT, b"x" * 80)) == "ENAMETOOLONG"
    directory = master.lookup(ROOT, b"dir")
    assert master.mkdir(directory, b"x" * 75, 0o755, 0, 0)
    assert refused(lambda: master.mkdir(directory, b"y" * 76, 0o755, 0, 0)) == "ENAMETOOLONG"
    assert refused(lambda: master.create(directory, b"y" * 76, 0, 0o644, 0, 0)) == "ENAMETOOLONG"


def test_a_listing_shows_what_is_logged_meanwhile_once(master: FileSystem, rng: random.Random) -> None:
    serial = 0

    def make(directory: int) -> int:
        nonlocal serial
        serial += 1
        return master.create(directory, b"f%d" % serial, 0, 0o644, 0, 0)[0]

    def finish(node: int) -> None:
        """Close a file, which logs it; the kernel forgets it at once or never."""
        master.write(node, 0, memoryview(b"x"))
        master.release(node)
        if rng.randrange(2):
            master.forget(node, 1)

    for number in range(100):
        directory = master.mkdir(ROOT, b"listed%d" % number, 0o755, 0, 0)
        new = [make(directory) for _ in range(rng.randrange(8))]
        before = {name for _, _, name in master.entries(directory, 0)}
        changes = rng.randrange(10)
        seen: list[bytes] = []
        cookie = 0
        while part := list(islice(master.entries(directory, cookie), rng.randrange(1, 4))):
            seen += [name for _, _, name in part]
            cookie = part[-1][0]
            for _ in range(min(changes, rng.randrange(4))):
                changes -= 1
                if new and rng.randrange(2):
                    finish(new.pop(rng.randrange(len(new))))
                else:
                    new.append(make(directory))
        assert len(seen) == len(set(seen))
        assert before <= set(seen)
        for node in new:
            finish(node)


def test_a_batch_of_another_host_is_one_notification_for_each_directory_that_is_known(
    master: FileSystem, client: FileSystem
) -> None:
    directory = client.lookup(ROOT, b"dir")
    told: list[bytes] = []
    client.notify = master.notify = told.append
    client.tell_of_gains()
    assert told == []
    files = [NewFile(b"dir/f%d" % number, 1, 0o644, 0, 0) for number in range(1500)]
    master.volume.create_many(files)
    # What requests find is told by the next poll, and once.
    assert client.lookup(directory, b"f700")
    assert told == []
    client.tell_of_gains()
    assert told == [abi.inval_inode(directory, 0, 0)]
    master.volume.mkdir(b"new", 0o755, 0, 0)
    master.volume.create_many([NewFile(b"new/f", 1, 0o644, 0, 0), NewFile(b"dir/g", 1, 0o644, 0, 0)])
    client.follow()
    client.tell_of_gains()
    client.tell_of_gains()
    assert told[1:] == [abi.inval_inode(ROOT, 0, 0), abi.inval_inode(directory, 0, 0)]
    # The master has made them itself.
    master.tell_of_gains()
    assert len(told) == 3


def test_what_another_host_has_made_is_found(master: FileSystem, client: FileSystem) -> None:
    assert client.lookup(ROOT, b"new") == 0
    made = master.mkdir(ROOT, b"new", 0o700, 5, 6)
    assert client.lookup(ROOT, b"new") == made
    assert client.attr(made)[9:13] == master.attr(made)[9:13]
    master.mkdir(made, b"deeper", 0o700, 5, 6)
    assert b"deeper" in names(client, made)


# -- listings -----------------------------------------------------------------------------------


def test_listing_goes_on_behind_every_cookie(master: FileSystem) -> None:
    for number in range(5):
        master.create(ROOT, b"new%d" % number, 0, 0o644, 0, 0)
    whole = list(master.entries(ROOT, 0))
    assert [name for _, _, name in whole[:2]] == [b".", b".."]
    assert [cookie for cookie, _, _ in whole[:2]] == [DOT, DOTDOT]
    assert [cookie for cookie, _, _ in whole] == sorted({cookie for cookie, _, _ in whole})
    for number, (cookie, _, _) in enumerate(whole):
        assert list(master.entries(ROOT, cookie)) == whole[number + 1 :]


def test_cookie_of_another_directory_is_refused(master: FileSystem) -> None:
    directory = master.lookup(ROOT, b"dir")
    assert refused(lambda: list(master.entries(directory, master.lookup(ROOT, b"file")))) == "EINVAL"
    assert refused(lambda: list(master.entries(ROOT, 12345))) == "EINVAL"


def test_file_is_listed_once_however_far_it_is(master: FileSystem) -> None:
    node, _ = master.create(ROOT, b"new", 0, 0o644, 0, 0)
    assert names(master).count(b"new") == 1
    master.write(node, 0, memoryview(b"x"))
    assert names(master).count(b"new") == 1
    master.release(node)
    assert names(master).count(b"new") == 1
    assert {found for _, found, name in master.entries(ROOT, 0) if name == b"new"} == {node}
    master.forget(node, 1)
    (found,) = (found for _, found, name in master.entries(ROOT, 0) if name == b"new")
    assert found < FIRST_PROVISIONAL


# -- changing attributes ------------------------------------------------------------------------


def test_set_attributes_are_local(master: FileSystem, client: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    valid = SetattrValid.MODE | SetattrValid.UID | SetattrValid.GID | SetattrValid.MTIME
    master.setattr(node, Attributes(valid, mode=0o7777, uid=8, gid=9, mtime=5_000_000_007))
    assert master.attr(node)[9] == stat.S_IFREG | 0o7777
    assert master.attr(node)[11:13] == (8, 9)
    assert (master.attr(node)[4], master.attr(node)[7]) == (5, 7)
    assert client.attr(node)[9] == stat.S_IFREG | 0o640
    assert master.namespace.local_changes == 1
    master.setattr(node, Attributes(0))
    assert master.namespace.local_changes == 1


def test_who_may_set_attributes(master: FileSystem, client: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    for valid in (SetattrValid.MODE, SetattrValid.UID, SetattrValid.MTIME):
        assert refused(lambda valid=valid: client.setattr(node, Attributes(valid))) == "EROFS"
        assert refused(lambda valid=valid: master.setattr(ns.META_LOG, Attributes(valid))) == "EPERM"
    master.setattr(ROOT, Attributes(SetattrValid.MODE, mode=0o700))
    assert master.attr(ROOT)[9] == stat.S_IFDIR | 0o700


def test_size_is_for_ever(master: FileSystem, client: FileSystem, caplog: pytest.LogCaptureFixture) -> None:
    node = master.lookup(ROOT, b"file")
    for size in (0, 9_999, 10_001, (1 << 64) - 1):
        assert refused(lambda size=size: master.setattr(node, Attributes(SetattrValid.SIZE, size))) == "EPERM"
        assert refused(lambda size=size: client.setattr(node, Attributes(SetattrValid.SIZE, size))) == "EROFS"
    assert refused(lambda: master.open(node, os.O_WRONLY | os.O_TRUNC)) == "EPERM"
    assert len([message for message in caplog.messages if "never changes" in message]) == 1
    master.setattr(node, Attributes(SetattrValid.SIZE, 10_000))
    client.setattr(node, Attributes(SetattrValid.SIZE, 10_000))


# -- file data ----------------------------------------------------------------------------------


def test_opening(hosts: Hosts, master: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    assert master.open(node, os.O_RDWR) & OpenFlag.DIRECT_IO
    assert refused(lambda: master.open(ROOT, os.O_RDONLY)) == "EISDIR"
    assert refused(lambda: master.opendir(node)) == "ENOTDIR"
    for meta in (ns.META_LOG, ns.META_SUPERBLOCK):
        master.open(meta, os.O_RDONLY)
        assert refused(lambda meta=meta: master.open(meta, os.O_RDWR)) == "EPERM"
        assert refused(lambda meta=meta: master.write(meta, 0, memoryview(b"x"))) == "EPERM"
    cached = hosts.mount(HOST, replace(SETTINGS, direct_io=False, keep_cache=True))
    assert cached.open(node, os.O_RDONLY) == OpenFlag.KEEP_CACHE
    created, flags = cached.create(ROOT, b"new", os.O_RDWR, 0o644, 0, 0)
    assert flags & OpenFlag.DIRECT_IO
    assert cached.open(created, os.O_RDONLY) & OpenFlag.DIRECT_IO


def test_reading_and_writing(master: FileSystem, client: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")

    def read(fs: FileSystem, offset: int, length: int) -> bytes:
        return b"".join(fs.views(node, offset, length))

    assert read(master, 0, 5) == b"data\0"
    assert client.write(node, 9_998, memoryview(b"12345")) == 2
    assert read(master, 9_997, 100) == b"\x0012"
    assert read(master, 10_000, 100) == b""
    assert read(master, 1 << 62, 100) == b""
    for offset in (10_000, 10_001, 1 << 40, (1 << 63) - 1):
        assert refused(lambda offset=offset: master.write(node, offset, memoryview(b"x"))) == "EFBIG"
    assert master.write(node, 10_000, memoryview(b"")) == 0
    assert refused(lambda: master.views(ROOT, 0, 1)) == "EISDIR"


def test_seeking(master: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    assert master.lseek(node, 17, os.SEEK_DATA) == 17
    assert master.lseek(node, 17, os.SEEK_HOLE) == 10_000
    assert refused(lambda: master.lseek(node, 10_000, os.SEEK_DATA)) == "ENXIO"
    assert refused(lambda: master.lseek(node, 0, os.SEEK_END)) == "EINVAL"


def test_allocating(master: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    master.allocate(node, 0, 10_000, 0)
    assert refused(lambda: master.allocate(node, 1, 10_000, 0)) == "EFBIG"
    for mode in (1, 2, 3, 0x10, 0x20):
        assert refused(lambda mode=mode: master.allocate(node, 0, 1, mode)) == "ENOTSUP"
    new, _ = master.create(ROOT, b"new", 0, 0o644, 0, 0)
    assert refused(lambda: master.allocate(new, 0, 1, 1)) == "ENOTSUP"
    master.allocate(new, 100, 23, 0)
    assert master.attr(new)[1] == 123
    assert refused(lambda: master.allocate(new, 0, 124, 0)) == "EFBIG"
    other, _ = master.create(ROOT, b"other", 0, 0o644, 0, 0)
    assert refused(lambda: master.allocate(other, 0, 1 << 62, 0)) == "ENOSPC"
    assert refused(lambda: master.setattr(other, Attributes(SetattrValid.SIZE, (1 << 63) - 1))) == "ENOSPC"
    assert refused(lambda: master.write(other, (1 << 63) - 10, memoryview(b"x"))) == "ENOSPC"


# -- creating -----------------------------------------------------------------------------------


def test_only_the_master_creates(hosts: Hosts, client: FileSystem) -> None:
    directory = client.lookup(ROOT, b"dir")
    assert refused(lambda: client.mkdir(directory, b"new", 0o755, 0, 0)) == "EROFS"
    assert refused(lambda: client.create(directory, b"new", 0, 0o644, 0, 0)) == "EROFS"
    assert client.change_errno == errno.EROFS
    assert hosts.master.change_errno == errno.EPERM
    forbidding = hosts.mount(HOST, replace(SETTINGS, create=False))
    assert refused(lambda: forbidding.mkdir(directory, b"new", 0o755, 0, 0)) == "EPERM"
    assert refused(lambda: forbidding.create(directory, b"new", 0, 0o644, 0, 0)) == "EPERM"


def test_where_nothing_can_be_made(master: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    for make in (
        lambda parent, name: master.mkdir(parent, name, 0o755, 0, 0),
        lambda parent, name: master.create(parent, name, os.O_EXCL, 0o644, 0, 0),
    ):
        assert refused(lambda make=make: make(node, b"new")) == "ENOTDIR"
        assert refused(lambda make=make: make(ns.META, b"new")) == "EPERM"
        assert refused(lambda make=make: make(999, b"new")) == "ESTALE"
        assert refused(lambda make=make: make(ROOT, b"file")) == "EEXIST"
        assert refused(lambda make=make: make(ROOT, b".meta")) in ("EEXIST", "EINVAL")


def test_file_that_somebody_made_meanwhile_is_opened(master: FileSystem) -> None:
    node = master.lookup(ROOT, b"file")
    assert master.create(ROOT, b"file", os.O_RDWR, 0o644, 0, 0)[0] == node
    assert refused(lambda: master.create(ROOT, b"file", os.O_RDWR | os.O_TRUNC, 0o644, 0, 0)) == "EPERM"
    new, _ = master.create(ROOT, b"new", os.O_RDWR, 0o644, 0, 0)
    assert master.create(ROOT, b"new", os.O_RDWR, 0o644, 0, 0)[0] == new
    assert master.made.opens(new) == 2
    master.release(new)
    assert master.lookup(ROOT, b"new") == new
    master.release(new)
    assert master.lookup(ROOT, b"new") == 0


def test_set_group_id_of_directories(master: FileSystem) -> None:
    parent = master.lookup(ROOT, b"dir")
    master.setattr(parent, Attributes(SetattrValid.MODE | SetattrValid.GID, mode=0o2775, gid=77))
    directory = master.mkdir(parent, b"sub", 0o755, 5, 6)
    assert master.attr(directory)[9:13] == (stat.S_IFDIR | 0o2755, 1, 5, 77)
    node, _ = master.create(directory, b"new", 0, 0o644, 5, 6)
    assert master.attr(node)[9:13] == (stat.S_IFREG | 0o644, 1, 5, 77)


def test_kernel_is_told_when_a_name_leads_elsewhere(master: FileSystem) -> None:
    told: list[bytes] = []
    master.notify = told.append
    node, _ = master.create(ROOT, b"new", 0, 0o644, 0, 0)
    master.open(node, os.O_RDONLY)
    master.write(node, 0, memoryview(b"x"))
    master.release(node)
    assert told == []
    master.release(node)
    assert told == [abi.inval_entry(ROOT, b"new")]
    empty, _ = master.create(ROOT, b"empty", 0, 0o644, 0, 0)
    master.release(empty)
    assert len(told) == 1


# -- extended attributes, figures, and the end --------------------------------------------------


def test_extended_attributes(master: FileSystem) -> None:
    for node in (ROOT, master.lookup(ROOT, b"file"), ns.META_LOG):
        assert master.getxattr(node, SHADOW_XATTR) == b"/run/famfs/here"
        assert refused(lambda node=node: master.getxattr(node, b"security.selinux")) == "ENODATA"


def test_figures(master: FileSystem) -> None:
    blocks, free, available, files, files_free, block, longest, fragment = master.statfs()
    assert blocks * block == 4 << 30
    assert free == available == master.volume.space.free // block
    assert files - files_free == 2
    assert (longest, fragment) == (79, block)
    master.mkdir(ROOT, b"new", 0o755, 0, 0)
    assert master.statfs()[4] == files_free - 1


@pytest.mark.parametrize("which", [HOST, OTHER], ids=["master", "client"])
def test_another_file_system_in_the_memory(hosts: Hosts, which: UUID, caplog: pytest.LogCaptureFixture) -> None:
    fs = hosts.master if which == HOST else hosts.client
    node = fs.lookup(ROOT, b"file")
    make_filesystem(hosts.memory, "memory", OTHER, log_length=8 << 20, uuid=UUID(int=5), device_uuid=UUID(int=6))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert refused(lambda: fs.lookup(ROOT, b"absent")) == "EIO"
            assert refused(lambda: names(fs)) == "EIO"
            for act in (lambda: fs.attr(node), lambda: fs.open(node, 0), lambda: fs.views(node, 0, 1)):
                assert refused(act) == "EIO"
    assert len(caplog.messages) == 1
    assert "made anew" in caplog.messages[0]
    assert fs.getxattr(ROOT, SHADOW_XATTR) == b"/run/famfs/here"


def test_half_visible_entry_is_waited_for_and_not_reported(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    entry = log.build_mkdir(2, b"new", mode=0o755, uid=0, gid=0)
    hosts.memory.write(layout.entry_offset(2), entry[:200])
    hosts.memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, (3).to_bytes(8, "little") * 2)
    with caplog.at_level(logging.WARNING):
        assert hosts.client.lookup(ROOT, b"new") == 0
        assert hosts.client.volume.lagging
        hosts.memory.write(layout.entry_offset(2), entry)
        assert hosts.client.lookup(ROOT, b"new") == ns.nodeid_of(2)
        assert not hosts.client.volume.lagging
        # Another one, which is taken back, as fsck does.
        for count, lagging in ((4, True), (3, False)):
            hosts.memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, count.to_bytes(8, "little") * 2)
            assert hosts.client.lookup(ROOT, b"absent") == 0
            assert hosts.client.volume.lagging == lagging
    assert hosts.client.volume.stop is None
    assert caplog.messages == []


def test_errors_that_nobody_foresaw(caplog: pytest.LogCaptureFixture) -> None:
    assert errno_of(KeyError("what")) == errno.EIO
    assert "nobody foresaw" in caplog.messages[0]
    assert errno_of(OSError(100_000, "odd")) == 511
    assert errno_of(OSError("without a number")) == errno.EIO


# -- found by fuzzing ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/"])
def test_names_that_no_entry_can_bear_are_refused(master: FileSystem, name: bytes) -> None:
    before = master.volume.space.allocated
    for parent in (ROOT, master.lookup(ROOT, b"dir")):
        assert refused(lambda parent=parent: master.create(parent, name, os.O_RDWR, 0o644, 1, 2)) == "EINVAL"
        assert refused(lambda parent=parent: master.mkdir(parent, name, 0o755, 1, 2)) == "EINVAL"
    assert not master.has_provisional
    assert master.volume.space.allocated == before


@pytest.mark.parametrize("when", [-1, -(1 << 63), -(10**9) * (1 << 40), (1 << 64) + 5, 1 << 90])
def test_times_that_cannot_be_kept_are_the_nearest_ones_that_can(master: FileSystem, when: int) -> None:
    node = master.lookup(ROOT, b"file")
    master.setattr(node, Attributes(SetattrValid.MTIME, mtime=when))
    _, _, _, _, mtime, _, _, nanoseconds, *_ = master.attr(node)
    assert mtime * 10**9 + nanoseconds == (1 if when < 0 else (1 << 64) - 1)


# -- work that takes long -----------------------------------------------------------------------


def in_the_middle(master: FileSystem, check: Callable[[], None]) -> list[str]:
    """Have another thread do things when long work is in its midst: `check`, a lookup, and a file that is made, filled
    and logged. The result says what was done, once the work has come so far."""
    done: list[str] = []

    def act() -> None:
        check()
        assert master.lookup(ROOT, b"file")
        node, _ = master.create(ROOT, b"meanwhile", 0, 0o644, 0, 0)
        master.write(node, 0, memoryview(b"made"))
        master.release(node)
        assert master.made.is_logged(node)
        done.append("made")

    def progress() -> None:
        if not done:
            done.append("begun")
            with ThreadPoolExecutor(1) as pool:
                pool.submit(act).result(timeout=20)

    master.volume.progress = progress
    return done


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famfs_server.volume.volume._LONG", 1 << 20)
    monkeypatch.setattr("famfs_server.fuse.filesystem.LONG", 1 << 20)


@pytest.mark.usefixtures("small_steps")
def test_others_go_on_while_space_is_zeroed(master: FileSystem) -> None:
    node, _ = master.create(ROOT, b"large", 0, 0o644, 0, 0)
    assert master.takes_long(node, 8 * MIB)

    def not_there_yet() -> None:
        assert not master.made.is_logged(node)
        assert b"large" not in set(map(master.namespace.path, master.namespace.walk()))

    done = in_the_middle(master, not_there_yet)
    master.allocate(node, 0, 8 * MIB, 0)
    assert done == ["begun", "made"]
    assert master.made.is_logged(node)
    assert not any(master.volume.read(master.row(node), 0, 8 * MIB))


@pytest.mark.usefixtures("small_steps")
def test_others_go_on_while_a_tool_makes_a_large_file(master: FileSystem) -> None:
    done = in_the_middle(master, lambda: None)
    master.volume.create(NewFile(b"large", 8 * MIB, 0o644, 0, 0))
    assert done == ["begun", "made"]


@pytest.mark.usefixtures("small_steps")
def test_others_go_on_while_a_file_moves(master: FileSystem, rng: random.Random) -> None:
    node, _ = master.create(ROOT, b"grows", 0, 0o644, 0, 0)
    data = rng.randbytes(2 * MIB)
    master.write(node, 0, memoryview(data))
    master.volume.create(NewFile(b"in the way", 1, 0o644, 0, 0))
    place = master.volume.namespace.fmap(master.row(node)).extents
    assert not master.takes_long(node, len(data), 0)
    assert master.takes_long(node, len(data) + 1, len(data))

    def where_it_was() -> None:
        assert master.volume.namespace.fmap(master.row(node)).extents == place
        # What is written now has to wait for the move.
        assert master.takes_long(node, 5, 0)
        assert bytes(master.views(node, 0, 100)[0]) == data[:100]

    done = in_the_middle(master, where_it_was)
    late = []

    def later() -> None:
        with master.made.changing(node):
            late.append(master.write(node, 5, memoryview(b"late")))

    master.made.begin_change(node)
    with master.made.changing(node):
        master.made.begin_change(node)
        thread = threading.Thread(target=later)
        thread.start()
        master.write(node, len(data), memoryview(b"more"))
        assert late == []
    thread.join(20)
    assert (done, late) == (["begun", "made"], [4])
    assert master.volume.namespace.fmap(master.row(node)).extents != place
    whole = bytearray(data + b"more")
    whole[5:9] = b"late"
    assert master.volume.read(master.row(node), 0, 1 << 30) == whole
    assert not master.takes_long(node, 5, 0)


def test_what_takes_long(master: FileSystem) -> None:
    logged = master.lookup(ROOT, b"file")
    node, _ = master.create(ROOT, b"new", 0, 0o644, 0, 0)
    assert not master.takes_long(logged, 1 << 40)
    assert not master.takes_long(node, LONG)
    assert master.takes_long(node, LONG + 1)
    # Written from the end on there is nothing to zero; a gap is zeroed.
    assert not master.takes_long(node, LONG + 1, 0)
    assert master.takes_long(node, 1 << 30, (1 << 30) - 5)
    assert not master.flushes_long(logged)
    assert master.flushes_long(master.volume.create(NewFile(b"large", LONG + 1, 0o644, 0, 0)))


def test_memory_that_runs_short_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    assert errno_of(MemoryError()) == errno.ENOMEM
    assert caplog.messages == ["there is no memory left for a request"]
