# SPDX-License-Identifier: Apache-2.0
"""A famfs kernel in user space: the client side of /dev/fuse, for one server at the other end of a socket.

It asks in the order in which a kernel asks, takes and refuses what a kernel takes and refuses (docs/protocol.md 2, 6),
and reaches file bytes as a kernel does: by its own arithmetic in the device's memory. Methods that take an inode make
one request, or those of one call on an open file; methods that take a path do what the VFS does for a system call of a
program. Either ends in OSError as it would for a program. TwinViolation is for what no server may do: break the
framing, or lead a real kernel into one of the hangs and crashes that running ones have shown.

tests/fmap/test_agreement.py compares the requests of system calls with those of a running kernel.
"""

import errno
import fcntl
import json
import mmap
import os
import socket
import stat
import struct
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple, TypeVar

from tests.twin import maps
from tests.twin.connection import (
    ATTR,
    ATTR_HEAD,
    DIRENT,
    ENTRY_HEAD,
    IO_IN,
    OPEN_OUT,
    RELEASE_IN,
    SETATTR_IN,
    STOCK,
    Bit,
    Connection,
    Exchange,
    Op,
)
from tests.twin.maps import PAGE, Dialect, Map, TwinViolation

PUSH_ARGUMENT = Struct("<iIQ")
PUSH_IOCTL = 0x4010E504
ROOT = 1
FMAP_LIMIT = 16 << 20
LONGEST_NAME = 1024
NO_OWNER = (1 << 32) - 1
"""A user that no user namespace has: a kernel writes to none of his files."""
GETDENTS = 32 << 10
"""Bytes that the C library reads of a directory at a time."""

_FLOCK = Struct("hhqqi4x")
_SPACE_LOCKS = 1 << 60
"""Where the bytes are that stand for files of new space: beyond what the server locks."""
_LOOK_SECONDS = 0.005
"""How often it is looked whether space is still open."""
_FOPEN_DIRECT_IO = 1
_SETATTR_SIZE, _SETATTR_FH, _SETATTR_LOCKOWNER = 8, 64, 512

Result = TypeVar("Result")


def _space_lock(nodeid: int) -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _SPACE_LOCKS + nodeid % (1 << 40), 1, 0)


class Attr(NamedTuple):
    """struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @property
    def kind(self) -> int:
        """The type of the file, as in st_mode."""
        return stat.S_IFMT(self.mode)


@dataclass
class Device:
    """A dax device of this machine; a regular file stands for it."""

    path: str
    driver: str = "fsdev_dax"
    held: bool = False
    """Another mount has it."""

    def __post_init__(self) -> None:
        with open(self.path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
            status = os.fstat(file.fileno())
        self.size = len(self.memory)
        self.identity = status.st_dev, status.st_ino

    def hold(self) -> int:
        """fs_dax_get: 0, or the errno."""
        if self.driver != "fsdev_dax":
            return errno.EOPNOTSUPP if self.driver else errno.ENODEV
        return errno.EBUSY if self.held else 0

    def is_free(self, lock: bytes) -> bool:
        """Whether nobody holds a lock."""
        with open(self.path, "r+b") as file:
            found = fcntl.fcntl(file.fileno(), fcntl.F_OFD_GETLK, lock)
        return bool(struct.unpack_from("h", found)[0] == fcntl.F_UNLCK)

    def close(self) -> None:
        """Unmap."""
        self.memory.close()


@dataclass
class Inode:
    """What the kernel remembers of a file until it forgets it."""

    nodeid: int
    attr: Attr
    path: bytes
    size: int
    lookups: int = 0
    opens: int = 0
    """Who has it open; for them it stays though no name leads to it any more."""
    map: Map | None = None
    failed: bool = False
    """Every access is EIO until the inode is evicted."""
    created: bool = False
    """Made by CREATE: its size changes, and pages may be in its cache, so it must never get a map."""
    listed: bool = False
    """Found by READDIRPLUS, and not used since."""
    advised: bool = False
    """The next read of this directory is READDIRPLUS, since names of it were looked up."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attr.mode)


class Dentry(NamedTuple):
    """A name that is cached, and the inode that it leads to."""

    inode: Inode
    lasts: bool
    """Longer than any test; other names are looked up whenever they are used."""


@dataclass
class OpenFile:
    """An open file; with the flag O_PATH, something that merely holds an inode."""

    inode: Inode
    flags: int
    handle: int = 0
    users: int = 1
    """The descriptor, and mappings."""


class FakeKernel(Connection):
    """One mount. `dialect` None is a kernel without famfs; with famfs, bit 43 is offered if `rawio` says that the
    mounting process has CAP_SYS_RAWIO. `offered` replaces all other bits of INIT."""

    def __init__(
        self,
        fuse: socket.socket,
        dialect: Dialect | None = None,
        *,
        rawio: bool = True,
        minor: int = 45,
        offered: int = STOCK,
        devices: Sequence[Device] = (),
        metadata_end: int = 0,
        ioctls: socket.socket | None = None,
        opens: socket.socket | None = None,
        timeout: float = 20,
        watch: Callable[[Exchange], None] | None = None,
    ) -> None:
        offered |= Bit.DAX_FMAP if dialect and rawio else 0
        super().__init__(fuse, minor=minor, offered=offered, timeout=timeout, watch=watch)
        self.dialect = dialect
        self.devices = list(devices)
        self.metadata_end = metadata_end
        """Where on device 0 file data may begin."""
        self.inodes: dict[int, Inode] = {}
        self.dentries: dict[bytes, Dentry] = {}
        """By path; those that are known to be missing are not cached."""
        self.slots: dict[int, Device | None] = {}
        """Registered devices by index; None is a slot that is lost for this connection."""
        self.no_open = self.no_flush = False
        self.private: list[OpenFile] = []
        """The files of `.meta` that the server itself has open."""
        self.spaces: list[OpenFile] = []
        """New space that it has open or mapped."""
        self.keep_spaces = False
        """Have somebody else open them too, in `kept`."""
        self.kept: list[OpenFile] = []
        self._meta: Inode | None = None
        """What the server's descriptor of `.meta` stands for."""
        self._ioctls = ioctls
        self._opens = opens
        self._live: dict[int, list[tuple[int, int, int]]] = {}

    @property
    def famfs(self) -> bool:
        """Whether files of this mount are mapped."""
        return self.dialect is not None and Bit.DAX_FMAP in self.negotiated

    # -- what the server's own processes ask ----------------------------------------------------

    def _other_ends(self) -> dict[socket.socket, Callable[[], None]]:
        ends = ((self._ioctls, self._answer_ioctl), (self._opens, self._answer_call))
        return {end: answer for end, answer in ends if end is not None}

    @contextmanager
    def _for_server(self) -> Iterator[None]:
        before, self.from_server = self.from_server, True
        try:
            yield
        finally:
            self.from_server = before

    def _answer_ioctl(self) -> None:
        assert self._ioctls is not None
        data, descriptors, _, _ = socket.recv_fds(self._ioctls, 64, 1)
        if not data:
            self._ioctls = None
            return
        number, argument = Struct("<I").unpack_from(data)[0], data[4:]
        result = self.ioctl(number, argument, descriptors[0] if descriptors else None)
        for descriptor in descriptors:
            os.close(descriptor)
        self._ioctls.send(Struct("<i").pack(result))

    def _answer_call(self) -> None:
        """openat(2) and unlinkat(2) below a private copy of the mount: a descriptor, or the errno."""
        assert self._opens is not None
        data, ends, _, _ = socket.recv_fds(self._opens, 4096, 1)
        if not data:
            self._opens = None
            return
        asked = json.loads(data)
        path, number = os.fsencode(asked["path"]), 0
        descriptors: list[int] = []
        with socket.socket(fileno=ends[0]) as end:
            try:
                with self._for_server():
                    if asked["call"] == "unlink":
                        self.unlinkat(path, at=self._meta)
                    else:
                        descriptors = [self._open_for_server(path, asked["flags"])]
            except OSError as error:
                number = error.errno or errno.EIO
            # Who asked may be dead.
            with suppress(BrokenPipeError):
                socket.send_fds(end, [Struct("<i").pack(number)], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    def _open_for_server(self, path: bytes, flags: int) -> int:
        """A descriptor that stands for one of the mount. Those of files can be mapped, and show what the file holds.

        For the files of `.meta` they are a copy of the device's memory, and what is stored there does not come to the
        device. Space is the device itself, and the kernel knows when the last mapping of it has gone.
        """
        if path == b".meta":
            self._meta = self.openat(path, flags).inode
            for file in self.private:
                # The process that has opened them ends now; the supervisor's descriptors stay.
                self._flush(file)
            return os.open("/", os.O_PATH | os.O_DIRECTORY)
        opened = self.openat(path, flags, at=None if b"/" in path else self._meta)
        found = opened.inode.map
        if found is None:
            raise maps.refuse(errno.ENODEV, "no map")
        if not path.startswith(b".space-"):
            self.private.append(opened)
            return self._copy(opened.inode)
        (extent,) = found.ranges()
        if opened.inode.attr.mode & 0o77 or opened.inode.attr.uid != os.geteuid():
            raise TwinViolation(f"others may open {path!r}")
        self.spaces.append(opened)
        if self.keep_spaces:
            self.kept.append(self.hold(opened.inode))
        return self.hold_space(self.slots[extent.device], opened.inode.nodeid)

    def _copy(self, inode: Inode) -> int:
        descriptor = os.memfd_create(os.fsdecode(inode.path))
        os.ftruncate(descriptor, inode.size)
        at = 0
        for piece in self._pieces(inode, 0, inode.size):
            # Mostly zeroes: the copy stays sparse like the original.
            for start in range(0, len(piece), PAGE):
                page = bytes(piece[start : start + PAGE])
                if page.strip(b"\0"):
                    os.pwrite(descriptor, page, at + start)
            at += len(piece)
        return descriptor

    @staticmethod
    def hold_space(device: Device | None, nodeid: int) -> int:
        """The device, opened once more, with a lock that lasts as long as this open file: while anybody has a
        descriptor or a mapping of it."""
        assert device is not None
        descriptor = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _space_lock(nodeid))
        return descriptor

    def _look_around(self) -> float | None:
        """Close a file of new space that nobody has a descriptor or a mapping of any more."""
        for opened in self.spaces:
            device = self.slots[0]
            assert device is not None
            if device.is_free(_space_lock(opened.inode.nodeid)):
                self.spaces.remove(opened)
                with self._for_server():
                    self._release(opened)
                return None
        return _LOOK_SECONDS if self.spaces else self.timeout

    # -- devices --------------------------------------------------------------------------------

    def ioctl(self, number: int, argument: bytes, descriptor: int | None) -> int:
        """What an ioctl on the server's /dev/fuse returns: 0, or -errno."""
        if number != PUSH_IOCTL or self.dialect in (None, Dialect.PULL):
            return -errno.ENOTTY
        _, flags, index = PUSH_ARGUMENT.unpack(argument)
        return -self.register(index, descriptor, flags)

    def register(self, index: int, descriptor: int | None, flags: int = 0) -> int:
        """DAXDEV_OPEN: 0, or the errno (findings 3)."""
        if not self.famfs:
            return errno.EOPNOTSUPP
        if descriptor is None:
            return errno.EBADF
        if index >= 64 or flags:
            return errno.EINVAL
        status = os.fstat(descriptor)
        found = [device for device in self.devices if device.identity == (status.st_dev, status.st_ino)]
        if not found:
            # A character device that is no dax device damages the kernel's own tables.
            if stat.S_ISCHR(status.st_mode):
                raise TwinViolation("a character device that is not a dax device was pushed")
            return errno.EINVAL
        if index in self.slots:
            return 0 if self.slots[index] is found[0] else errno.EIO
        if found[0] in self.slots.values():
            return errno.EBUSY
        error = found[0].hold()
        self.slots[index] = None if error else found[0]
        return error

    def _pull(self, index: int) -> None:
        """GET_DAXDEV. Whatever comes of it, the open goes on (protocol 2.1)."""
        try:
            payload = self.call(Op.GET_DAXDEV, index, exact=280)
        except OSError:
            return
        name, end, _ = payload[24:].partition(b"\0")
        if not end or not name.startswith(b"/"):
            raise TwinViolation(f"device {index} is called {name!r}: not an absolute path with an end")
        for device in self.devices:
            if device.path == os.fsdecode(name):
                self.slots[index] = None if device.hold() else device

    # -- names and attributes -------------------------------------------------------------------

    def root(self) -> Inode:
        """The root directory."""
        if ROOT not in self.inodes:
            attr = self._getattr(ROOT)
            self.inodes[ROOT] = Inode(ROOT, attr, b"", attr.size, lookups=1)
        return self.inodes[ROOT]

    def lookup(self, parent: Inode, name: bytes) -> Inode:
        """LOOKUP of one name. Where it is cached and leads elsewhere now, it is dropped and looked up again. OSError
        ENOENT."""
        self.require_silence()
        path = _join(parent, name)
        if path in self.dentries:
            inode = self.dentries[path].inode
            with self._holding(inode):
                payload = b""
                with suppress(OSError):
                    payload = self._lookup(parent, name)
                nodeid = int.from_bytes(payload[:8], "little")
                if nodeid == inode.nodeid:
                    return self._entered(payload, parent, name)
                if nodeid:
                    self._send_forget((nodeid, 1))
                self._leads_elsewhere(path, nodeid)
        found = self._entered(self._lookup(parent, name), parent, name)
        parent.advised = True
        return found

    def _lookup(self, parent: Inode, name: bytes) -> bytes:
        return self.call(Op.LOOKUP, parent.nodeid, name + b"\0", exact=128)

    def resolve(self, path: bytes, *, again: bool = False, at: Inode | None = None) -> Inode:
        """The inode that a path leads to, from the directory `at` on. Names are looked up unless they are cached and
        last; `again`, after ESTALE, each of them."""
        self.require_silence()
        inode = at or self.root()
        for name in filter(None, path.split(b"/")):
            inode = self._step(inode, name, again)
        return inode

    def _step(self, parent: Inode, name: bytes, again: bool) -> Inode:
        cached = self.dentries.get(_join(parent, name))
        if cached is None or again or not cached.lasts:
            return self.lookup(parent, name)
        if cached.inode.listed:
            cached.inode.listed, parent.advised = False, True
        return cached.inode

    def _entered(self, payload: bytes, parent: Inode, name: bytes) -> Inode:
        """The server has told of a name: the inode is known once more."""
        nodeid, generation, entry_valid, *_ = ENTRY_HEAD.unpack_from(payload)
        if nodeid == 0:
            if entry_valid:
                raise TwinViolation(f"{name!r} is missing for {entry_valid} s, whatever other hosts make meanwhile")
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if nodeid == ROOT or generation:
            raise TwinViolation(f"{name!r} is nodeid {nodeid}, generation {generation}")
        path = _join(parent, name)
        if path in self.dentries and self.dentries[path].inode.nodeid != nodeid:
            self._leads_elsewhere(path, nodeid)
        attr = Attr(*ATTR.unpack_from(payload, ENTRY_HEAD.size))
        inode = self.inodes.get(nodeid)
        if inode is None:
            inode = self.inodes[nodeid] = Inode(nodeid, attr, path, attr.size)
        elif inode.path != path:
            raise TwinViolation(f"{path!r} is nodeid {nodeid}, which is not forgotten: {inode}")
        inode.lookups += 1
        self.dentries[path] = Dentry(inode, entry_valid > 0)
        self._took(inode, attr)
        return inode

    def _leads_elsewhere(self, path: bytes, nodeid: int) -> None:
        """A cached name has become that of another inode, or of none."""
        inode = self.dentries[path].inode if path in self.dentries else None
        if inode and inode.map and nodeid:
            raise TwinViolation(f"{path!r} is nodeid {nodeid} now, but was mapped as {inode.nodeid}")
        self._drop_name(path)

    def _took(self, inode: Inode, attr: Attr) -> None:
        """Attributes have come from the server."""
        if attr.kind not in (stat.S_IFREG, stat.S_IFDIR) or attr.kind != inode.attr.kind or attr.size >> 63:
            raise TwinViolation(f"{inode.path!r} has mode {attr.mode:o} and size {attr.size}")
        if attr.size != inode.size and not inode.is_directory and not inode.created:
            raise TwinViolation(f"the size of {inode.path!r} goes from {inode.size} to {attr.size}: EIO for ever")
        inode.attr, inode.size = attr, attr.size

    def _getattr(self, nodeid: int) -> Attr:
        payload = self.call(Op.GETATTR, nodeid, bytes(16), exact=104)
        return Attr(*ATTR.unpack_from(payload, ATTR_HEAD.size))

    def getattr(self, inode: Inode) -> Attr:
        """fstat(2) with nothing cached."""
        self._took(inode, self._getattr(inode.nodeid))
        return inode.attr

    def setattr(self, inode: Inode, valid: int, *, size: int = 0, mode: int = 0, handle: int = 0) -> Attr:
        """chmod, truncate and the like, as `valid` says."""
        body = SETATTR_IN.pack(valid, 0, handle, size, 0, 0, 0, 0, 0, 0, 0, mode, 0, 0, 0, 0)
        payload = self.call(Op.SETATTR, inode.nodeid, body, exact=104)
        self._took(inode, Attr(*ATTR.unpack_from(payload, ATTR_HEAD.size)))
        return inode.attr

    def mkdir(self, parent: Inode, name: bytes, mode: int = 0o755) -> Inode:
        """MKDIR."""
        payload = self.call(Op.MKDIR, parent.nodeid, Struct("<II").pack(mode, 0o22) + name + b"\0", exact=128)
        return self._entered(payload, parent, name)

    # -- forgetting -----------------------------------------------------------------------------

    def forget(self, *inodes: Inode) -> None:
        """Evict inodes that nobody has open, as when memory is short: FORGET, or BATCH_FORGET for several."""
        for inode in inodes:
            assert not inode.opens, f"{inode} is open"
            self.lose_inode(inode)
        self._send_forget(*((inode.nodeid, inode.lookups) for inode in inodes))

    def lose_inode(self, inode: Inode) -> None:
        """The inode is gone, and so is its name."""
        if self.is_named(inode):
            del self.dentries[inode.path]
        del self.inodes[inode.nodeid]
        for spans in self._live.values():
            spans[:] = [span for span in spans if span[2] != inode.nodeid]

    def _send_forget(self, *rows: tuple[int, int]) -> None:
        if len(rows) == 1:
            self.send(Op.FORGET, rows[0][0], Struct("<Q").pack(rows[0][1]), no_reply=True)
        else:
            body = b"".join(Struct("<QQ").pack(*row) for row in rows)
            self.send(Op.BATCH_FORGET, 0, Struct("<II").pack(len(rows), 0) + body, no_reply=True)

    def is_named(self, inode: Inode) -> bool:
        """Whether a cached name leads to it."""
        return inode.path in self.dentries and self.dentries[inode.path].inode is inode

    def _name_is_invalid(self, parent: int, name: bytes) -> None:
        if parent in self.inodes:
            self._drop_name(_join(self.inodes[parent], name))

    def _drop_name(self, path: bytes) -> None:
        """A name is not cached any more, nor are those below it."""
        for below in sorted((name for name in self.dentries if (name + b"/").startswith(path + b"/")), reverse=True):
            self._evict_unused(self.dentries.pop(below).inode)

    def _evict_unused(self, inode: Inode) -> None:
        """An inode that has no name, and that nobody has open, is forgotten at once."""
        if not inode.opens and not self.is_named(inode) and inode.nodeid != ROOT:
            self.forget(inode)

    @contextmanager
    def _holding(self, inode: Inode) -> Iterator[None]:
        inode.opens += 1
        try:
            yield
        finally:
            self._let_go(inode)

    def _let_go(self, inode: Inode) -> None:
        inode.opens -= 1
        self._evict_unused(inode)

    def drop_caches(self) -> None:
        """Forget all names and inodes that are not in use. An open file holds the directories above it, even if its own
        name is not cached any more."""
        self.require_silence()
        opened = [inode.path for inode in self.inodes.values() if inode.opens]
        for path in sorted(self.dentries, reverse=True):
            is_above = any(other.startswith(path + b"/") for other in opened)
            if not is_above and not self.dentries[path].inode.opens:
                self._drop_name(path)

    # -- listing --------------------------------------------------------------------------------

    def listing(self, directory: Inode, size: int = PAGE, cookie: int = 0) -> Iterator[tuple[bytes, Inode | None]]:
        """A directory's entries behind `cookie` by READDIRPLUS, in reads of `size` bytes; no inode with `.`, `..`, and
        names alone."""
        for name, _, inode in self._entries(directory, size, cookie, lambda _: Op.READDIRPLUS):
            yield name, inode

    def names(self, directory: Inode, size: int = PAGE, cookie: int = 0) -> Iterator[tuple[bytes, int]]:
        """A directory's entries behind `cookie` by READDIR, as names and inode numbers."""
        for name, ino, _ in self._entries(directory, size, cookie, lambda _: Op.READDIR):
            yield name, ino

    def _entries(
        self, directory: Inode, size: int, cookie: int, ask: Callable[[int], Op]
    ) -> Iterator[tuple[bytes, int, Inode | None]]:
        """Names, inode numbers, and the inodes that READDIRPLUS tells of; `ask` chooses the request by the cookie."""
        handle, *_ = OPEN_OUT.unpack(self.call(Op.OPENDIR, directory.nodeid, bytes(8), exact=16))
        with self._holding(directory):
            while True:
                opcode = ask(cookie)
                body = IO_IN.pack(handle, cookie, size, 0, 0, 0, 0)
                payload = self.call(opcode, directory.nodeid, body, most=size)
                if not payload:
                    break
                at, head = 0, 128 if opcode is Op.READDIRPLUS else 0
                while at < len(payload):
                    ino, cookie, namelen, kind = DIRENT.unpack_from(payload, at + head)
                    name = self._dirent_name(payload, at + head + DIRENT.size, namelen)
                    inode = self._described(payload[at : at + head], directory, name) if head else None
                    if inode and (inode.attr.ino, inode.attr.kind >> 12) != (ino, kind):
                        raise TwinViolation(f"{name!r} is listed as inode {ino} of type {kind}")
                    yield name, ino, inode
                    at += (head + DIRENT.size + namelen + 7) & ~7
            self.call(Op.RELEASEDIR, directory.nodeid, RELEASE_IN.pack(handle, 0, 0, 0))

    def _described(self, entry: bytes, directory: Inode, name: bytes) -> Inode | None:
        """What a record of READDIRPLUS tells of. A kernel takes no reference on `.` and `..`, whatever is said of
        them."""
        if entry[:8] == bytes(8) or name in (b".", b".."):
            return None
        inode = self._entered(entry, directory, name)
        inode.listed = True
        return inode

    def _dirent_name(self, payload: bytes, at: int, length: int) -> bytes:
        name = payload[at : at + length]
        padded = (at + length + 7) & ~7
        if not 0 < length <= LONGEST_NAME or len(payload) < padded or b"/" in name or b"\0" in name:
            raise TwinViolation(f"a listed name of {length} bytes: {name!r}")
        return name

    def walk(self) -> Iterator[Inode]:
        """Every file and directory below the root."""
        todo = [self.root()]
        while todo:
            directory = todo.pop()
            for name, listed in list(self.listing(directory)):
                if name not in (b".", b".."):
                    inode = listed or self.lookup(directory, name)
                    yield inode
                    if inode.is_directory:
                        todo.append(inode)

    # -- system calls by path -------------------------------------------------------------------

    def openat(self, path: bytes, flags: int = os.O_RDONLY, mode: int = 0o644, *, at: Inode | None = None) -> OpenFile:
        """open(2); paths begin at the root, or at the directory `at`."""
        exclusive = flags & os.O_CREAT != 0 and flags & os.O_EXCL != 0

        def attempt(again: bool) -> OpenFile:
            above, _, name = path.rpartition(b"/")
            parent = self.resolve(above, again=again, at=at)
            try:
                inode = self._step(parent, name, again or exclusive)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
                return self.create(parent, name, mode)
            if exclusive:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            return self.hold(inode) if flags & os.O_PATH else self.open(inode, flags)

        return self._twice(attempt)

    def statx(self, path: bytes) -> Attr:
        """stat(2) with no attributes cached."""
        return self._twice(lambda again: self.getattr(self.resolve(path, again=again)))

    def mkdirat(self, path: bytes, mode: int = 0o755) -> Inode:
        """mkdir(2)."""
        above, _, name = path.rpartition(b"/")
        parent = self.resolve(above)
        with suppress(FileNotFoundError):
            self.lookup(parent, name)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        return self.mkdir(parent, name, mode)

    def unlinkat(self, path: bytes, *, at: Inode | None = None) -> None:
        """unlink(2)."""
        above, _, name = path.rpartition(b"/")
        parent = self.resolve(above, at=at)
        self._step(parent, name, False)
        self.call(Op.UNLINK, parent.nodeid, name + b"\0")
        self._drop_name(_join(parent, name))

    def listdir(self, path: bytes) -> list[bytes]:
        """What readdir(3) gives: with attributes at first, and later on if names of the directory are in use."""
        directory = self.resolve(path)

        def ask(cookie: int) -> Op:
            plus, directory.advised = directory.advised or not cookie, False
            return Op.READDIRPLUS if plus else Op.READDIR

        return [name for name, _, _ in self._entries(directory, GETDENTS, 0, ask) if name not in (b".", b"..")]

    @staticmethod
    def _twice(attempt: Callable[[bool], Result]) -> Result:
        """Make a system call. After ESTALE it is made once more, and then each name is looked up, cached or not."""
        try:
            return attempt(False)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return attempt(True)

    # -- open files -----------------------------------------------------------------------------

    def open(self, inode: Inode, flags: int = os.O_RDONLY) -> OpenFile:
        """Open a regular file, with the map that belongs to it (protocol 2.1, 2.2)."""
        assert self.inodes.get(inode.nodeid) is inode, f"{inode} is not known any more"
        if inode.attr.uid == NO_OWNER and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        file = OpenFile(inode, flags)
        with self._holding(inode):
            if not self.no_open:
                self._ask_to_open(file)
            inode.opens += 1
            try:
                if self.famfs and inode.map is None:
                    self._fetch(inode)
                if flags & os.O_TRUNC:
                    self._ask_for_capability(inode)
                    self.setattr(inode, _SETATTR_SIZE | _SETATTR_LOCKOWNER, size=0)
            except OSError:
                self._release(file)
                raise
        return file

    def _ask_to_open(self, file: OpenFile) -> None:
        body = Struct("<II").pack(file.flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL) | 0x8000, 0)
        try:
            file.handle, _, _ = OPEN_OUT.unpack(self.call(Op.OPEN, file.inode.nodeid, body, exact=16))
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            self.no_open = True

    def create(self, parent: Inode, name: bytes, mode: int = 0o644) -> OpenFile:
        """CREATE, of a name that does not exist."""
        body = Struct("<4I").pack(os.O_RDWR | os.O_CREAT | 0x8000, mode, 0o22, 0) + name + b"\0"
        try:
            payload = self.call(Op.CREATE, parent.nodeid, body, exact=144)
        except OSError as error:
            if error.errno == errno.ENOSYS and self.famfs:
                raise TwinViolation(
                    "CREATE is ENOSYS: the kernel falls back to MKNOD and maps an empty file"
                ) from error
            raise
        handle, open_flags, _ = OPEN_OUT.unpack_from(payload, 128)
        if self.famfs and not open_flags & _FOPEN_DIRECT_IO:
            raise TwinViolation("a buffered CREATE: once the file is mapped, the next fault hangs for ever")
        inode = self._entered(payload[:128], parent, name)
        inode.created = True
        inode.opens += 1
        return OpenFile(inode, os.O_RDWR, handle)

    def hold(self, inode: Inode) -> OpenFile:
        """open(2) with O_PATH."""
        inode.opens += 1
        return OpenFile(inode, os.O_PATH)

    def open_held(self, file: OpenFile, flags: int = os.O_RDONLY) -> OpenFile:
        """open(2) of /proc/self/fd/N: the inode itself, whatever its name leads to."""
        return self._twice(lambda again: self.open(file.inode, flags))

    def close_file(self, file: OpenFile) -> None:
        """close(2) of the last descriptor."""
        self._flush(file)
        self._release(file)

    def _flush(self, file: OpenFile) -> None:
        if self.no_flush or file.flags & os.O_PATH:
            return
        try:
            self.call(Op.FLUSH, file.inode.nodeid, Struct("<Q8xQ").pack(file.handle, 0))
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            self.no_flush = True
        else:
            raise TwinViolation("FLUSH succeeds: a server that is killed may never be reaped")

    def _release(self, file: OpenFile) -> None:
        """The descriptor or a mapping goes, and with the last of them the open file: by a RELEASE, unless an OPEN has
        ever been ENOSYS, of whatever file."""
        file.users -= 1
        if file.users:
            return
        if not self.no_open and not file.flags & os.O_PATH:
            with suppress(OSError):
                self.call(Op.RELEASE, file.inode.nodeid, RELEASE_IN.pack(file.handle, file.flags, 0, 0))
        self._let_go(file.inode)

    def fetch_fmap(self, nodeid: int) -> bytes:
        """GET_FMAP as this kernel's dialect asks: the payload of the last reply."""
        if self.dialect is Dialect.PULL:
            return self.call(Op.GET_FMAP, nodeid, most=PAGE)
        payload = self.call(Op.GET_FMAP, nodeid, Struct("<II").pack(PAGE, 0), most=PAGE)
        need = self._announced(payload)
        if need <= PAGE:
            return payload
        if need > FMAP_LIMIT:
            raise maps.refuse(errno.EFBIG, f"a map of {need} bytes")
        payload = self.call(Op.GET_FMAP, nodeid, Struct("<II").pack(need, 0), most=need)
        if self._announced(payload) > need:
            raise maps.refuse(errno.EINVAL, "the map grew")
        return payload

    @staticmethod
    def _announced(payload: bytes) -> int:
        if len(payload) < maps.HEADER.size:
            raise maps.refuse(errno.EIO, "shorter than its header")
        return int(maps.HEADER.unpack_from(payload)[5])

    def _fetch(self, inode: Inode) -> None:
        assert self.dialect is not None
        payload = self.fetch_fmap(inode.nodeid)
        found = maps.parse(self.dialect, payload)
        maps.check_served(payload, found)
        if inode.created:
            raise TwinViolation(f"{inode.path!r} was made as this inode: its cached pages hang the next fault for ever")
        fresh = self._getattr(inode.nodeid).size
        if not found.size == inode.size == fresh:
            raise TwinViolation(f"{inode.path!r}: size {found.size} in the map, {inode.size} at LOOKUP, {fresh} now")
        indexes = sorted({extent.device for extent in found.ranges()})
        if self.dialect is Dialect.PULL:
            for index in indexes:
                if index not in self.slots:
                    self._pull(index)
        else:
            inode.failed = any(index not in self.slots for index in indexes)
        self._occupy(inode, found)
        inode.map = found

    def _occupy(self, inode: Inode, found: Map) -> None:
        """The kernel never checks this: no two live maps may share a page, and none may leave the data area."""
        for extent in found.ranges():
            start, end = extent.offset // PAGE, -(-(extent.offset + extent.length) // PAGE)
            device = self.slots.get(extent.device)
            if device and extent.offset + extent.length > device.size:
                raise TwinViolation(f"{inode.path!r} reaches behind the device of {device.size} bytes: {extent}")
            is_meta = inode.path.startswith(b".meta/")
            if extent.device == 0 and extent.offset < self.metadata_end and not is_meta:
                raise TwinViolation(f"{inode.path!r} lies in superblock or log: {extent}")
            spans = self._live.setdefault(extent.device, [])
            at = bisect_left(spans, (start, end, 0))
            for other in spans[max(at - 1, 0) : at + 1]:
                if other[0] < end and start < other[1]:
                    raise TwinViolation(f"{inode.path!r} and nodeid {other[2]} share pages of {extent}: umount hangs")
            insort(spans, (start, end, inode.nodeid))

    # -- file data ------------------------------------------------------------------------------

    def read(self, file: OpenFile, offset: int, length: int) -> bytes:
        """pread(2): from device memory where the file is mapped, by READ where it is not."""
        if file.inode.map:
            return b"".join(bytes(piece) for piece in self._pieces(file.inode, offset, length))

        def ask(start: int, count: int) -> bytes:
            body = IO_IN.pack(file.handle, offset + start, count, 0, 0, 0, 0)
            return self.call(Op.READ, file.inode.nodeid, body, most=count)

        return b"".join(self._in_parts(length, ask))

    def write(self, file: OpenFile, offset: int, data: bytes) -> int:
        """pwrite(2), likewise; the number of bytes written, 0 at the end of a mapped file."""
        if file.inode.map:
            done = 0
            for piece in self._pieces(file.inode, offset, len(data)):
                piece[:] = data[done : done + len(piece)]
                done += len(piece)
            return done

        def ask(start: int, count: int) -> bytes:
            body = IO_IN.pack(file.handle, offset + start, count, 0, 0, 0, 0) + data[start : start + count]
            written, _ = Struct("<II").unpack(self.call(Op.WRITE, file.inode.nodeid, body, exact=8))
            file.inode.size = max(file.inode.size, offset + start + written)
            return data[start : start + written]

        return sum(map(len, self._in_parts(len(data), ask)))

    def _in_parts(self, length: int, ask: Callable[[int, int], bytes]) -> Iterator[bytes]:
        """What was read or written, by as many requests as it takes. One that falls short ends it, and so does one that
        fails, which the caller hears of only if nothing was done before."""
        for start in range(0, length, self.max_write):
            count = min(length - start, self.max_write)
            try:
                part = ask(start, count)
            except OSError:
                if not start:
                    raise
                return
            yield part
            if len(part) < count:
                return

    def truncate(self, file: OpenFile, size: int) -> None:
        """ftruncate(2)."""
        self._ask_for_capability(file.inode)
        valid = _SETATTR_SIZE | _SETATTR_FH | _SETATTR_LOCKOWNER
        self.setattr(file.inode, valid, size=size, handle=file.handle)

    def allocate(self, file: OpenFile, offset: int, length: int) -> None:
        """fallocate(2)."""
        self._ask_for_capability(file.inode)
        self.call(Op.FALLOCATE, file.inode.nodeid, Struct("<QQQII").pack(file.handle, offset, length, 0, 0))
        file.inode.size = max(file.inode.size, offset + length)

    def _ask_for_capability(self, inode: Inode) -> None:
        """Whoever changes a file takes its capabilities away, if it has any."""
        with suppress(OSError):
            self.call(Op.GETXATTR, inode.nodeid, bytes(8) + b"security.capability\0", exact=8)

    def fsync(self, file: OpenFile) -> None:
        """fsync(2)."""
        self.call(Op.FSYNC, file.inode.nodeid, Struct("<QII").pack(file.handle, 0, 0))

    def map(self, file: OpenFile, *, private: bool = False) -> None:
        """mmap(2), which keeps the file open. Without a map there are private mappings alone, by the page cache."""
        if file.inode.map is None and not private:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        file.users += 1

    def touch(self, file: OpenFile, offset: int) -> int:
        """The byte that a mapping shows, touched for the first time."""
        if file.inode.map is None:
            body = IO_IN.pack(file.handle, offset // PAGE * PAGE, PAGE, 0, 0, 0, 0)
            return self.call(Op.READ, file.inode.nodeid, body, most=PAGE)[offset % PAGE]
        return self.read(file, offset, 1)[0]

    def unmap(self, file: OpenFile) -> None:
        """munmap(2)."""
        self._release(file)

    def _pieces(self, inode: Inode, offset: int, length: int) -> Iterator[memoryview]:
        """The device memory of a range, by the checks of protocol 2.3 and the arithmetic of 6.4."""
        found = inode.map
        assert found is not None
        if inode.failed:
            raise maps.refuse(errno.EIO, "the inode is marked bad")
        if inode.size != found.size:
            inode.failed = True
            raise maps.refuse(errno.ENXIO, "the size changed")
        end = min(offset + length, inode.size)
        while offset < end:
            extent = found.resolve(offset, end - offset)
            device = self.slots.get(extent.device)
            if device is None or device.driver != "fsdev_dax":
                raise maps.refuse(errno.EIO, f"device {extent.device} is not there")
            if extent.offset + extent.length > device.size:
                raise maps.refuse(errno.EFAULT, "behind the end of the device")
            yield memoryview(device.memory)[extent.offset : extent.offset + extent.length]
            offset += extent.length


def _join(parent: Inode, name: bytes) -> bytes:
    return parent.path + b"/" + name if parent.path else name
