# SPDX-License-Identifier: Apache-2.0
"""A famfs kernel in user space: the client side of /dev/fuse, for one server at the other end of a socket.

It asks in the order in which a kernel asks, takes and refuses what a kernel takes and refuses (docs/protocol.md 2, 6),
and reaches file bytes as a kernel does: by its own arithmetic in the device's memory. System calls end in OSError as
they would for a program. TwinViolation is for what no server may do: break the framing, or lead a real kernel into one
of the hangs and crashes that running ones have shown.
"""

import errno
import fcntl
import json
import mmap
import os
import select
import socket
import stat
import struct
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from tests.twin import maps
from tests.twin.maps import PAGE, Dialect, Map, TwinViolation

IN_HEADER = Struct("<IIQQIIIHH")
OUT_HEADER = Struct("<IiQ")
INIT_OUT = Struct("<4I2H2I2H2IH22x")
ATTR = Struct("<6Q10I")
ENTRY_HEAD = Struct("<4Q2I")
ATTR_HEAD = Struct("<QII")
OPEN_OUT = Struct("<QIi")
DIRENT = Struct("<QQII")
IO_IN = Struct("<QQIIQII")
SETATTR_IN = Struct("<IIQQQQQQIIIIIIII")
PUSH_ARGUMENT = Struct("<iIQ")

PUSH_IOCTL = 0x4010E504
ROOT = 1
STOCK = 0x5FD << 32 | 0x73FFFFFB
"""What 6.18 offers in INIT."""
FMAP_LIMIT = 16 << 20
LONGEST_NAME = 1024


class Op(IntEnum):
    """The requests that this kernel sends."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    GET_FMAP = 54
    GET_DAXDEV = 55


class Bit(IntFlag):
    """Bits of INIT that matter here."""

    ATOMIC_O_TRUNC = 1 << 3
    SPLICE = 7 << 7
    AUTO_INVAL_DATA = 1 << 12
    WRITEBACK_CACHE = 1 << 16
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    HAS_RESEND = 1 << 39
    OVER_IO_URING = 1 << 41
    RFC_DAX_FMAP = 1 << 42
    DAX_FMAP = 1 << 43


_HARMFUL = Bit.ATOMIC_O_TRUNC | Bit.SPLICE | Bit.AUTO_INVAL_DATA | Bit.WRITEBACK_CACHE | Bit.OVER_IO_URING
_FLOCK = Struct("hhqqi4x")
_SPACE_LOCKS = 1 << 60
"""Where the bytes are that stand for files of new space: beyond what the server locks."""
_LOOK_SECONDS = 0.005
"""How often it is looked whether space is still open."""
_NOTIFY_INVAL_ENTRY = 3
_NOTIFY_STORE = 4
_NOTIFY_RESEND = 7
UNIQUE_RESEND = 1 << 63
_NOTIFY_SIZES = {2: 24, 7: 0}
_FOPEN_DIRECT_IO = 1
_SETATTR_SIZE, _SETATTR_FH, _SETATTR_LOCKOWNER = 8, 64, 512


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


class Exchange(NamedTuple):
    """A request and what came of it, for whoever watches."""

    opcode: int
    nodeid: int
    body: bytes
    error: int
    payload: bytes | None
    """None: no reply is due."""


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
        return struct.unpack_from("h", found)[0] == fcntl.F_UNLCK

    def close(self) -> None:
        """Unmap."""
        self.memory.close()


@dataclass
class Inode:
    """What the kernel remembers of a file until it forgets it."""

    nodeid: int
    attr: Attr
    path: bytes
    lookups: int = 0
    size: int = 0
    map: Map | None = None
    failed: bool = False
    """Every access is EIO until the inode is evicted."""
    fresh: bool = False
    """Made by CREATE and not yet mapped: its size may still change."""
    named: bool = True
    """A name leads to it; without one, and not open, it is evicted."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attr.mode)


@dataclass(frozen=True)
class OpenFile:
    """An open file or directory. Without a handle the server was not asked."""

    inode: Inode
    handle: int
    asked: bool
    flags: int


class FakeKernel:
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
        self.dialect = dialect
        self.minor = minor
        self.offered = Bit(offered | (Bit.DAX_FMAP if dialect and rawio else 0))
        self.devices = list(devices)
        self.metadata_end = metadata_end
        """Where on device 0 file data may begin."""
        self.timeout = timeout
        self.negotiated = Bit(0)
        self.inodes: dict[int, Inode] = {}
        self.slots: dict[int, Device | None] = {}
        """Registered devices by index; None is a slot that is lost for this connection."""
        self.notifications: list[tuple[int, bytes]] = []
        self.no_open = self.no_flush = False
        self.private: list[OpenFile] = []
        """What the server itself has open."""
        self.spaces: list[OpenFile] = []
        """New space that it has open or mapped."""
        self.keep_spaces = False
        """Do not forget them, as if somebody else had them open."""
        self.kept: list[Inode] = []
        self.max_write = PAGE
        self._fuse = fuse
        self._ioctls = ioctls
        self._opens = opens
        self._watch = watch
        self._unique = 0
        self._outstanding: dict[int, bytes | None] = {}
        self._sent: dict[int, bytes] = {}
        self._repeated: dict[int, int] = {}
        self.in_hand: list[int] = []
        """The requests that the server has read and not answered, in order: what it gets again if it asks for that."""
        self.one_by_one: list[int] = []
        """Requests of which the server reads one when it has answered the one before."""
        self._answered_before = 0
        self._buffer = bytearray(FMAP_LIMIT + PAGE)
        self._nodeids: dict[bytes, int] = {}
        self._live: dict[int, list[tuple[int, int, int]]] = {}

    # -- messages -------------------------------------------------------------------------------

    def send(self, opcode: int, nodeid: int, body: bytes, *, claim: int | None = None, no_reply: bool = False) -> int:
        """Send a request and do not wait; its unique. `claim` is put into the header in place of the true length."""
        self._unique += 2
        length = IN_HEADER.size + len(body) if claim is None else claim
        if not no_reply:
            self._outstanding[self._unique] = None
        request = IN_HEADER.pack(length, opcode, self._unique, nodeid, 0, 0, 4711, 0, 0) + body
        if not no_reply:
            self._sent[self._unique] = request
        self._fuse.send(request)
        if no_reply and self._watch:
            self._watch(Exchange(opcode, nodeid, body, 0, None))
        return self._unique

    def receive(self, unique: int) -> tuple[int, bytes]:
        """Wait for the answer to one request: errno or 0, and the payload. The framing rules of protocol 2.2."""
        deadline = time.monotonic() + self.timeout
        while (answer := self._outstanding[self._repeated.get(unique, unique)]) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not self.pump(left):
                raise TwinViolation(f"no answer to request {unique}: its caller hangs")
        del self._outstanding[self._repeated.pop(unique, unique)]
        self._sent.pop(unique, None)
        _, error, _ = OUT_HEADER.unpack_from(answer)
        return -error, answer[OUT_HEADER.size :]

    def answered(self, unique: int) -> bool:
        """Whether the answer to a request has come, and waits for `receive`."""
        return self._outstanding[self._repeated.get(unique, unique)] is not None

    def lose(self, unique: int) -> None:
        """Wait for the answer to a request and have it not come, as when the server died before it could write it."""
        while not self.answered(unique):
            if not self.pump(self.timeout):
                raise TwinViolation(f"no answer to request {unique}: its caller hangs")
        self._outstanding[self._repeated.get(unique, unique)] = None
        self.in_hand.append(unique)

    def server_died(self) -> None:
        """Whoever served is dead. It may have answered what its successor thinks that it had in hand: a write of that
        answer is ENOENT, and nothing else."""
        self._answered_before = self._unique

    def _send_again(self) -> None:
        """What the server has asked for: all that it had in hand, marked by bit 63 of the unique."""
        again, self.in_hand[:] = self.in_hand[:], []
        again += [unique for unique in self.one_by_one if self._outstanding.get(unique, b"") is None][:1]
        for unique in again:
            repeated = unique | UNIQUE_RESEND
            if self._outstanding.get(self._repeated.get(unique, unique), b"") is not None:
                # The server has seen to it before it asked.
                continue
            del self._outstanding[self._repeated.get(unique, unique)]
            self._repeated[unique] = repeated
            self._outstanding[repeated] = None
            request = bytearray(self._sent[unique])
            request[8:16] = repeated.to_bytes(8, "little")
            self._fuse.send(request)

    def call(self, opcode: int, nodeid: int = 0, body: bytes = b"", *, exact: int = 0, most: int = 0) -> bytes:
        """One request: the payload, which must have `exact` bytes, or `most` at most. OSError as the server says."""
        self.require_silence()
        error, payload = self.receive(self.send(opcode, nodeid, body))
        if self._watch:
            self._watch(Exchange(opcode, nodeid, body, error, payload))
        if error == errno.EINTR:
            raise TwinViolation(f"request {opcode} is answered EINTR: programs repeat it for ever")
        if error:
            raise OSError(error, f"{os.strerror(error)} (the server's answer to request {opcode})")
        if len(payload) > most if most else len(payload) != exact:
            raise TwinViolation(
                f"{len(payload)} bytes answer request {opcode}, {most or exact} are due: write is EINVAL"
            )
        return payload

    def pump(self, seconds: float, also: int | None = None) -> bool:
        """Wait for whatever comes next from the server: False if nothing did, or if `also` became readable."""
        watched: list[socket.socket | int] = [self._fuse]
        watched += [end for end in (self._ioctls, self._opens) if end]
        if also is not None:
            watched.append(also)
        ready: list[socket.socket | int] = []
        deadline = time.monotonic() + seconds
        while not ready:
            self._evict_spaces()
            left = max(deadline - time.monotonic(), 0)
            ready = select.select(watched, [], [], min(left, _LOOK_SECONDS) if self.spaces else left)[0]
            if not left:
                break
        if also in ready:
            return False
        # Replies first: what an ioctl may do depends on how INIT was answered.
        if self._fuse in ready:
            self._take(self._next())
        elif self._ioctls in ready:
            self._answer_ioctl()
        elif self._opens in ready:
            self._answer_open()
        return bool(ready)

    def _next(self) -> bytes:
        """The next message: a datagram, or as many bytes of a stream as its header says."""
        whole = memoryview(self._buffer)
        if self._fuse.type != socket.SOCK_STREAM:
            return bytes(whole[: self._fuse.recv_into(whole)])
        have, want = 0, OUT_HEADER.size
        while have < want:
            count = self._fuse.recv_into(whole[have:want])
            if not count:
                raise TwinViolation("the server is gone in the middle of a reply" if have else "the server is gone")
            have += count
            if have == OUT_HEADER.size:
                want = max(OUT_HEADER.unpack_from(whole)[0], have)
        return bytes(whole[:have])

    def require_silence(self, seconds: float = 0) -> None:
        """Take in notifications; anything else that comes without having been asked for is a violation."""
        deadline = time.monotonic() + seconds
        while self.pump(max(deadline - time.monotonic(), 0)):
            pass

    def _take(self, data: bytes) -> None:
        if not data:
            raise TwinViolation("the server is gone")
        if len(data) < OUT_HEADER.size:
            raise TwinViolation(f"a reply of {len(data)} bytes")
        length, error, unique = OUT_HEADER.unpack_from(data)
        if length != len(data):
            raise TwinViolation(f"a reply of {len(data)} bytes that claims {length}: the request stays pending")
        if unique == 0:
            self._notified(error, data[OUT_HEADER.size :])
            return
        if unique & 1:
            if length != OUT_HEADER.size:
                raise TwinViolation("a payload in the answer to INTERRUPT")
            return
        if error and unique <= self._answered_before and self._outstanding.get(unique, b"") is not None:
            return
        if unique not in self._outstanding or self._outstanding[unique] is not None:
            raise TwinViolation(f"a reply to request {unique}, which nobody waits for")
        if not -512 < error <= 0:
            raise TwinViolation(f"error {error} in a reply: the request stays pending")
        if error and length != OUT_HEADER.size:
            raise TwinViolation(f"{length - OUT_HEADER.size} bytes behind error {error}")
        self._outstanding[unique] = data

    def _notified(self, code: int, body: bytes) -> None:
        if code == _NOTIFY_STORE:
            raise TwinViolation("NOTIFY_STORE: a kernel oopses where the file is mapped")
        if code == _NOTIFY_RESEND:
            if Bit.HAS_RESEND not in self.offered:
                raise TwinViolation("RESEND to a kernel that knows nothing of it")
            self._send_again()
        if code == _NOTIFY_INVAL_ENTRY:
            parent, namelen, _ = Struct("<QII").unpack_from(body)
            if len(body) != 16 + namelen + 1 or body[-1]:
                raise TwinViolation("INVAL_ENTRY with a name of another length")
            for inode in self.inodes.values():
                above, _, name = inode.path.rpartition(b"/")
                if parent in self.inodes and (self.inodes[parent].path, body[16:-1]) == (above, name):
                    inode.named = False
        elif len(body) != _NOTIFY_SIZES.get(code, -1):
            raise TwinViolation(f"notification {code} with {len(body)} bytes")
        self.notifications.append((code, body))

    def interrupt(self, unique: int) -> None:
        """Ask the server to end a request early; it may say nothing to that."""
        self._fuse.send(IN_HEADER.pack(48, Op.INTERRUPT, unique | 1, 0, 0, 0, 4711, 0, 0) + Struct("<Q").pack(unique))

    def close(self) -> None:
        """Unmount: the server reads the end of its connection."""
        self._fuse.close()

    # -- INIT -----------------------------------------------------------------------------------

    @property
    def famfs(self) -> bool:
        """Whether files of this mount are mapped."""
        return self.dialect is not None and Bit.DAX_FMAP in self.negotiated

    def init(self) -> None:
        """The first request. OSError ECONNREFUSED where the server refuses, as every later call on such a mount."""
        unique = self.start_init()
        self.finish_init(unique)

    def start_init(self) -> int:
        """Send INIT, as creating the mount does; its unique."""
        extended = self.minor >= 36 and Bit.INIT_EXT in self.offered
        offered = self.offered if extended else self.offered & (Bit.INIT_EXT - 1)
        self.offered = Bit(offered)
        body = Struct("<4I").pack(7, self.minor, 0x20000, offered & 0xFFFFFFFF)
        return self.send(Op.INIT, 0, body + Struct("<I44x").pack(offered >> 32) if self.minor >= 36 else body)

    def finish_init(self, unique: int) -> None:
        """Wait for the answer to INIT and take it as a kernel does (protocol 4.2)."""
        error, payload = self.receive(unique)
        if self._watch:
            self._watch(Exchange(Op.INIT, 0, b"", error, payload))
        if error or not payload:
            raise OSError(errno.ECONNREFUSED, "INIT was refused")
        if not 24 <= len(payload) <= INIT_OUT.size:
            raise TwinViolation(f"{len(payload)} bytes answer INIT")
        major, _, _, low, _, _, self.max_write, _, _, _, high, *_ = INIT_OUT.unpack(payload.ljust(INIT_OUT.size, b"\0"))
        if major != 7:
            raise OSError(errno.ECONNREFUSED, f"FUSE {major}")
        if high and not low & Bit.INIT_EXT:
            raise TwinViolation("flags2 without INIT_EXT: the kernel reads none of it")
        answered = Bit(low | high << 32)
        if unasked := answered & ~self.offered:
            raise TwinViolation(f"bits {unasked:#x} were not offered")
        if Bit.DAX_FMAP in answered and Bit.DIRECT_IO_ALLOW_MMAP in answered:
            raise TwinViolation("a new file can be mapped before it has a map: the next fault hangs for ever")
        if harmful := answered & _HARMFUL:
            raise TwinViolation(
                f"bits {harmful:#x} were negotiated: they truncate, tear mappings down or need a device"
            )
        if self.max_write < PAGE:
            raise TwinViolation(f"writes of {self.max_write} bytes")
        self.negotiated = answered

    # -- devices --------------------------------------------------------------------------------

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

    def _answer_open(self) -> None:
        """openat(2) and unlinkat(2) below a private copy of the mount: a file to be mapped, or the errno."""
        assert self._opens is not None
        data, ends, _, _ = socket.recv_fds(self._opens, 4096, 1)
        if not data:
            self._opens = None
            return
        asked = json.loads(data)
        path = os.fsencode(asked["path"])
        path = path if path.startswith(b".meta/") else b".meta/" + path
        with socket.socket(fileno=ends[0]) as end:
            descriptors: list[int] = []
            try:
                if asked["call"] == "unlink":
                    self.unlink(path)
                else:
                    descriptors = [self.open_to_map(path, asked["flags"])]
            except OSError as error:
                answer = Struct("<i").pack(error.errno or errno.EIO)
            else:
                answer = Struct("<i").pack(0)
            # Who asked may be dead.
            with suppress(BrokenPipeError):
                socket.send_fds(end, [answer], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    def unlink(self, path: bytes) -> None:
        """unlink(2). An inode without a name is evicted when nobody has it open any more."""
        parent, _, name = path.rpartition(b"/")
        directory = self.resolve(parent)
        inode = self.lookup(directory, name)
        self.call(Op.UNLINK, directory.nodeid, name + b"\0")
        inode.named = False

    def open_to_map(self, path: bytes, flags: int) -> int:
        """A descriptor whose mappings show the file.

        For the files of `.meta` they stand for the device's memory, and what is stored there does not come to the
        device. Space is the device itself, and the kernel knows when the last mapping of it has gone.
        """
        opened = self.open(self.resolve(path), flags)
        found = opened.inode.map
        if found is None:
            raise maps.refuse(errno.ENODEV, "no map")
        if path.rpartition(b"/")[2].startswith(b".space-"):
            (extent,) = found.ranges()
            if opened.inode.attr.mode & 0o77 or opened.inode.attr.uid != os.geteuid():
                raise TwinViolation(f"others may open {path!r}")
            descriptor = self.hold_space(self.slots[extent.device], opened.inode.nodeid)
            self.spaces.append(opened)
            return descriptor
        descriptor = os.memfd_create(os.fsdecode(path))
        os.ftruncate(descriptor, opened.inode.size)
        at = 0
        for piece in self._pieces(opened.inode, 0, opened.inode.size):
            # Mostly zeroes: the copy stays sparse like the original.
            for start in range(0, len(piece), PAGE):
                page = bytes(piece[start : start + PAGE])
                if page.strip(b"\0"):
                    os.pwrite(descriptor, page, at + start)
            at += len(piece)
        self.private.append(opened)
        return descriptor

    @staticmethod
    def hold_space(device: Device | None, nodeid: int) -> int:
        """The device, opened once more, with a lock that lasts as long as this open file: while anybody has a
        descriptor or a mapping of it."""
        assert device is not None
        descriptor = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _space_lock(nodeid))
        return descriptor

    def _evict_spaces(self) -> None:
        """Files of space that have no name and that nobody has open or mapped any more are forgotten."""
        for opened in list(self.spaces):
            inode = opened.inode
            device = self.slots[0]
            assert device is not None
            if inode.named or not device.is_free(_space_lock(inode.nodeid)):
                continue
            self.spaces.remove(opened)
            if opened.asked:
                # Nobody waits for the answer to this one.
                self.send(Op.RELEASE, inode.nodeid, Struct("<QIIQ").pack(opened.handle, opened.flags, 0, 0))
            if self.keep_spaces:
                self.kept.append(inode)
            else:
                self.forget(inode)

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
            self.inodes[ROOT] = Inode(ROOT, self._getattr(ROOT), b"", 1)
        return self.inodes[ROOT]

    def lookup(self, parent: Inode, name: bytes) -> Inode:
        """One component of a path. OSError ENOENT."""
        payload = self.call(Op.LOOKUP, parent.nodeid, name + b"\0", exact=128)
        return self._entered(payload, parent, name)

    def resolve(self, path: bytes) -> Inode:
        """A path, component by component."""
        inode = self.root()
        for name in filter(None, path.split(b"/")):
            inode = self.lookup(inode, name)
        return inode

    def _entered(self, payload: bytes, parent: Inode, name: bytes) -> Inode:
        nodeid, generation, entry_valid, *_ = ENTRY_HEAD.unpack_from(payload)
        if nodeid == 0:
            if entry_valid:
                raise TwinViolation(f"{name!r} is missing for {entry_valid} s, whatever other hosts make meanwhile")
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if nodeid == ROOT or generation:
            raise TwinViolation(f"{name!r} is nodeid {nodeid}, generation {generation}")
        path = parent.path + b"/" + name if parent.path else name
        attr = Attr(*ATTR.unpack_from(payload, ENTRY_HEAD.size))
        inode = self.inodes.get(nodeid)
        known = self._nodeids.setdefault(path, nodeid)
        if known != nodeid or (inode and inode.path != path):
            raise TwinViolation(f"{path!r} is nodeid {nodeid}, was {known} and is not forgotten: {inode}")
        if inode is None:
            inode = self.inodes[nodeid] = Inode(nodeid, attr, path, size=attr.size)
        inode.named = True
        inode.lookups += 1
        self._took(inode, attr)
        return inode

    def _took(self, inode: Inode, attr: Attr) -> None:
        """Attributes have come from the server."""
        if attr.kind not in (stat.S_IFREG, stat.S_IFDIR) or attr.kind != inode.attr.kind or attr.size >> 63:
            raise TwinViolation(f"{inode.path!r} has mode {attr.mode:o} and size {attr.size}")
        if attr.size != inode.size and not inode.is_directory and not (inode.fresh and inode.map is None):
            raise TwinViolation(f"the size of {inode.path!r} goes from {inode.size} to {attr.size}: EIO for ever")
        inode.attr, inode.size = attr, attr.size

    def _getattr(self, nodeid: int) -> Attr:
        payload = self.call(Op.GETATTR, nodeid, bytes(16), exact=104)
        return Attr(*ATTR.unpack_from(payload, ATTR_HEAD.size))

    def getattr(self, inode: Inode) -> Attr:
        """stat(2) with nothing cached."""
        self._took(inode, self._getattr(inode.nodeid))
        return inode.attr

    def setattr(self, inode: Inode, valid: int, *, size: int = 0, mode: int = 0, handle: int = 0) -> Attr:
        """chmod, truncate and the like, as `valid` says."""
        body = SETATTR_IN.pack(valid, 0, handle, size, 0, 0, 0, 0, 0, 0, 0, mode, 0, 0, 0, 0)
        payload = self.call(Op.SETATTR, inode.nodeid, body, exact=104)
        self._took(inode, Attr(*ATTR.unpack_from(payload, ATTR_HEAD.size)))
        return inode.attr

    def forget(self, inode: Inode) -> None:
        """Evict an inode; nothing may answer that."""
        self.send(Op.FORGET, inode.nodeid, Struct("<Q").pack(inode.lookups), no_reply=True)
        self._evict(inode)

    def forget_all(self, inodes: Sequence[Inode]) -> None:
        """Evict several at once."""
        rows = b"".join(Struct("<QQ").pack(inode.nodeid, inode.lookups) for inode in inodes)
        self.send(Op.BATCH_FORGET, 0, Struct("<II").pack(len(inodes), 0) + rows, no_reply=True)
        for inode in inodes:
            self._evict(inode)

    def _evict(self, inode: Inode) -> None:
        del self.inodes[inode.nodeid], self._nodeids[inode.path]
        for spans in self._live.values():
            spans[:] = [span for span in spans if span[2] != inode.nodeid]

    def mkdir(self, parent: Inode, name: bytes, mode: int = 0o755) -> Inode:
        """mkdir(2)."""
        payload = self.call(Op.MKDIR, parent.nodeid, Struct("<II").pack(mode, 0o22) + name + b"\0", exact=128)
        return self._entered(payload, parent, name)

    def listing(self, directory: Inode, size: int = PAGE, cookie: int = 0) -> Iterator[tuple[bytes, Inode | None]]:
        """A directory's entries behind `cookie` by READDIRPLUS, in reads of `size` bytes; no inode with `.`, `..`, and
        names alone."""
        handle, *_ = OPEN_OUT.unpack(self.call(Op.OPENDIR, directory.nodeid, bytes(8), exact=16))
        while payload := self._list(Op.READDIRPLUS, directory, handle, cookie, size):
            at = 0
            while at < len(payload):
                ino, cookie, namelen, kind = DIRENT.unpack_from(payload, at + 128)
                name = self._dirent_name(payload, at + 152, namelen)
                nodeid, *_ = ENTRY_HEAD.unpack_from(payload, at)
                # A kernel takes no reference on these two, whatever the server says of them.
                plain = nodeid and name not in (b".", b"..")
                inode = self._entered(payload[at : at + 128], directory, name) if plain else None
                if inode and (inode.attr.ino, inode.attr.kind >> 12) != (ino, kind):
                    raise TwinViolation(f"{name!r} is listed as inode {ino} of type {kind}")
                yield name, inode
                at += (152 + namelen + 7) & ~7
        self.call(Op.RELEASEDIR, directory.nodeid, Struct("<QIIQ").pack(handle, 0, 0, 0))

    def names(self, directory: Inode, size: int = PAGE, cookie: int = 0) -> Iterator[tuple[bytes, int]]:
        """A directory's entries behind `cookie` by READDIR, as names and inode numbers."""
        handle, *_ = OPEN_OUT.unpack(self.call(Op.OPENDIR, directory.nodeid, bytes(8), exact=16))
        while payload := self._list(Op.READDIR, directory, handle, cookie, size):
            at = 0
            while at < len(payload):
                ino, cookie, namelen, _ = DIRENT.unpack_from(payload, at)
                yield self._dirent_name(payload, at + DIRENT.size, namelen), ino
                at += (DIRENT.size + namelen + 7) & ~7
        self.call(Op.RELEASEDIR, directory.nodeid, Struct("<QIIQ").pack(handle, 0, 0, 0))

    def _list(self, opcode: Op, directory: Inode, handle: int, cookie: int, size: int) -> bytes:
        return self.call(opcode, directory.nodeid, IO_IN.pack(handle, cookie, size, 0, 0, 0, 0), most=size)

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

    # -- opening --------------------------------------------------------------------------------

    def open(self, inode: Inode, flags: int = os.O_RDONLY) -> OpenFile:
        """open(2) of a regular file, with the map that belongs to it (protocol 2.1, 2.2)."""
        truncate, handle, asked = flags & os.O_TRUNC, 0, not self.no_open
        if asked:
            try:
                body = Struct("<II").pack(flags & ~(os.O_TRUNC | os.O_CREAT) | 0x8000, 0)
                handle, _, _ = OPEN_OUT.unpack(self.call(Op.OPEN, inode.nodeid, body, exact=16))
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self.no_open, asked = True, False
        file = OpenFile(inode, handle, asked, flags)
        try:
            if self.famfs and inode.map is None:
                self._fetch(inode)
            if truncate:
                self.setattr(inode, _SETATTR_SIZE | _SETATTR_LOCKOWNER, size=0)
        except OSError:
            self._release(file)
            raise
        return file

    def close_file(self, file: OpenFile) -> None:
        """close(2) of the last descriptor."""
        if not self.no_flush:
            try:
                self.call(Op.FLUSH, file.inode.nodeid, Struct("<Q8xQ").pack(file.handle, 0))
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self.no_flush = True
            else:
                raise TwinViolation("FLUSH succeeds: a server that is killed may never be reaped")
        self._release(file)

    def _release(self, file: OpenFile) -> None:
        if file.asked:
            body = Struct("<QIIQ").pack(file.handle, file.flags, 0, 0)
            with suppress(OSError):
                self.call(Op.RELEASE, file.inode.nodeid, body)

    def create(self, parent: Inode, name: bytes, mode: int = 0o644) -> OpenFile:
        """open(2) with O_CREAT of a name that does not exist."""
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
        inode.fresh = True
        return OpenFile(inode, handle, True, os.O_RDWR)

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
        inode.map, inode.fresh = found, False

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
        done = b""
        while (count := min(length - len(done), self.max_write)) > 0:
            body = IO_IN.pack(file.handle, offset + len(done), count, 0, 0, 0, 0)
            done += (piece := self.call(Op.READ, file.inode.nodeid, body, most=count))
            if len(piece) < count:
                break
        return done

    def write(self, file: OpenFile, offset: int, data: bytes) -> int:
        """pwrite(2), likewise; the number of bytes written, 0 at the end of a mapped file."""
        if file.inode.map:
            done = 0
            for piece in self._pieces(file.inode, offset, len(data)):
                piece[:] = data[done : done + len(piece)]
                done += len(piece)
            return done
        body = IO_IN.pack(file.handle, offset, len(data), 0, 0, 0, 0) + data
        count, _ = Struct("<II").unpack(self.call(Op.WRITE, file.inode.nodeid, body, exact=8))
        if file.inode.fresh:
            file.inode.size = max(file.inode.size, offset + count)
        return int(count)

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
