# SPDX-License-Identifier: Apache-2.0
"""A small FUSE server that says to the kernel whatever a test wants, and has nothing of this package's server.

It serves a root directory with regular files on /dev/famfs, in a process of its own that touches no file of its mount.
The test's own process touches none either: a client is a child that is forked for it (`apart`) and has a time limit,
since a file system can keep its caller for ever.
"""

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import pickle
import select
import signal
import stat
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from famfs_server.errors import MountError
from famfs_server.fuse import abi, kernels
from famfs_server.fuse.abi import InitFlag, Opcode
from famfs_server.fuse.mountapi import DetachedMount, unmount

PARAMETERS = Path("/sys/module/famfs/parameters")
SYNC_INIT, DAXDEV_OPEN = 0xE503, 0x4010E504
GET_FMAP, GET_DAXDEV = 54, 55
FIRST_NODEID = 10
BUFFER = 2 << 20
LONG = 3600
CLIENT_SECONDS = 30
END_SECONDS = 20
_RAWIO = 17

UNIT = 2 << 20
"""Alignment of extents."""
PAGE = 4096

MAPPING = InitFlag.INIT_EXT | InitFlag.DAX_FMAP

Rawio = Literal["always", "mounting", "never"]

Answer = bytes | int | None
"""Payload of a reply; an error as the header says it (-errno); or no reply."""


# -- maps


def header(kind: int, count: int, size: int, *, version: int = 1, file_type: int = 0, length: int = 0) -> bytes:
    """The header of a map; `length` is that of the whole message, which kernels that pull ignore."""
    return abi.FMAP_HEADER.pack(file_type, version, kind, count, length, size)


def run(offset: int, length: int, slot: int = 0) -> bytes:
    """An extent of a simple map, or a strip."""
    return abi.FMAP_EXTENT.pack(slot, offset, length)


def simple(
    *runs: tuple[int, ...], size: int | None = None, count: int | None = None, kind: int = 0, version: int = 1,
    file_type: int = 0,
) -> bytes:  # fmt: skip
    """A simple map; runs are (offset, length) or (offset, length, slot). `size` is their sum unless given."""
    size = sum(one[1] for one in runs) if size is None else size
    count = len(runs) if count is None else count
    body = b"".join(run(*one) for one in runs)
    length = abi.FMAP_HEADER.size + len(body)
    return header(kind, count, size, version=version, file_type=file_type, length=length) + body


class Stripe(NamedTuple):
    """One interleaved extent: its strips are (offset, length) or (offset, length, slot)."""

    strips: Sequence[tuple[int, ...]]
    chunk: int
    nbytes: int

    def pack(self) -> bytes:
        """As it stands in a message."""
        head = abi.FMAP_INTERLEAVED.pack(len(self.strips), self.chunk, self.nbytes)
        return head + b"".join(run(*strip) for strip in self.strips)


def striped(*stripes: Stripe, size: int, count: int | None = None) -> bytes:
    """An interleaved map."""
    body = b"".join(stripe.pack() for stripe in stripes)
    length = abi.FMAP_HEADER.size + len(body)
    return header(abi.FMAP_INTERLEAVE, len(stripes) if count is None else count, size, length=length) + body


# -- clients


class HungError(Exception):
    """A client did not end in time."""


class Client:
    """A forked process that does some work and ends."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._name = getattr(work, "__name__", str(work))
        self._channel, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(work, arguments, theirs)
        theirs.close()

    @staticmethod
    def _be(work: Callable[..., Any], arguments: Sequence[Any], channel: Connection) -> NoReturn:
        try:
            faulthandler.disable()
            try:
                outcome: tuple[bool, Any] = (True, work(*arguments))
            except Exception as error:
                outcome = (False, error)
            channel.send_bytes(pickle.dumps(outcome))
        finally:
            os._exit(0)

    def result(self, seconds: float = CLIENT_SECONDS) -> Any:
        """What the work gave, or raises what it raised, when the process has ended.

        Raises HungError if that takes too long, and ChildProcessError with a negative number if a signal ended it.
        """
        try:
            ended = self._channel.poll(seconds)
            outcome = self._received() if ended else None
        finally:
            self._channel.close()
        where = "" if ended else self._where()
        if not ended:
            self.kill()
        status = reap(self.pid, END_SECONDS)
        if not ended or status is None:
            raise HungError(f"{self._name} has not ended within {seconds} s: {where}")
        if outcome is None:
            raise ChildProcessError(status, f"{self._name} ended with status {status}")
        done, value = outcome
        if done:
            return value
        raise value

    def _where(self) -> str:
        """What it waits for in the kernel."""
        try:
            return Path(f"/proc/{self.pid}/stack").read_text().replace("\n", " ")
        except OSError:
            return ""

    def ends(self, seconds: float) -> bool:
        """Whether it has something to say within this time."""
        return self._channel.poll(seconds)

    def kill(self) -> None:
        """SIGKILL, which need not end it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _received(self) -> tuple[bool, Any] | None:
        try:
            outcome: tuple[bool, Any] = pickle.loads(self._channel.recv_bytes())
        except EOFError:
            return None
        return outcome


def apart(work: Callable[..., Any], *arguments: Any, seconds: float = CLIENT_SECONDS) -> Any:
    """What `work` gives, or raises, in a process that has ended when this returns."""
    return Client(work, *arguments).result(seconds)


def reap(pid: int, seconds: float) -> int | None:
    """The exit status of a child, minus a signal; None if it does not end in time."""
    fd = os.pidfd_open(pid)
    try:
        if not select.select([fd], [], [], seconds)[0]:
            return None
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def failure(call: Callable[..., Any], *arguments: Any) -> int:
    """The errno with which a call fails, or 0."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.read.argtypes = _libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)


def called(name: str, *arguments: Any) -> int:
    """A function of the C library that fails with -1. Raises OSError."""
    result: int = getattr(_libc, name)(*arguments)
    if result in (-1, ctypes.c_size_t(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return result


class Mapped:
    """A mapping of a file that may be larger than it. What would be SIGBUS is an OSError with EFAULT."""

    def __init__(
        self, fd: int, length: int, *, offset: int = 0, flags: int = mmap.MAP_SHARED,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
    ) -> None:  # fmt: skip
        self.length = length
        self.address = called("mmap", None, length, prot, flags, fd, offset)
        self._out, self._in = os.pipe()

    def load(self, at: int, size: int = 8) -> bytes:
        """Bytes of the mapping. The kernel reads them, and finds the page as the program's own access would."""
        called("write", self._in, self.address + at, size)
        return os.read(self._out, size)

    def store(self, at: int, data: bytes) -> None:
        """Bytes into the mapping."""
        os.write(self._in, data)
        called("read", self._out, self.address + at, len(data))

    def advise(self, advice: int, at: int = 0, length: int | None = None) -> None:
        """madvise(2)."""
        called("madvise", self.address + at, self.length if length is None else length, advice)

    def close(self) -> None:
        """munmap(2)."""
        called("munmap", self.address, self.length)
        os.close(self._in)
        os.close(self._out)


# -- the module


@contextlib.contextmanager
def parameters(**values: object) -> Iterator[None]:
    """The module's parameters have these values meanwhile. They count for file systems that are mounted meanwhile."""
    before = {name: (PARAMETERS / name).read_text() for name in values}
    try:
        for name, value in values.items():
            (PARAMETERS / name).write_text(str(value))
        yield
    finally:
        for name, text in before.items():
            (PARAMETERS / name).write_text(text)


def drop_rawio() -> None:
    """This process has CAP_SYS_RAWIO no more."""
    head = struct.pack("<Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    called("capget", head, data)
    words = list(struct.unpack("<6I", data.raw))
    words[0] &= ~(1 << _RAWIO)
    called("capset", head, struct.pack("<6I", *words))


# -- the server


@dataclass
class File:
    """A regular file of the root directory, and what is answered about it."""

    fmap: Answer | list[Answer] = -errno.EOPNOTSUPP
    """The answer to GET_FMAP; of a list each item once, and the last one from then on. An answer that the kernel does
    not take is followed by the next one."""
    size: int = 0
    open: int = 0
    """Error of OPEN."""
    open_flags: int = 0
    truncate: int = -errno.EPERM
    """Error of SETATTR with a size."""
    mode: int = stat.S_IFREG | 0o666
    mtime: int = 0


class Request(NamedTuple):
    """A request as the kernel sent it, and what write(2) said of the reply."""

    opcode: int
    nodeid: int
    body: bytes
    uid: int
    gid: int
    pid: int
    unique: int
    refused: tuple[int, ...] = ()


@dataclass
class Script:
    """What a server says and does. All of it can be changed while it serves."""

    files: dict[str, File] = field(default_factory=dict)
    new_files: dict[str, File] = field(default_factory=dict)
    """What CREATE and MKNOD make of a name."""
    daxdevs: list[Answer] = field(default_factory=list)
    """The answers to GET_DAXDEV, as those to GET_FMAP."""
    bits: int = MAPPING
    """Flags of the reply to INIT."""
    reply_minor: int = 46
    sync_init: bool = False
    """The mount is made when INIT has been answered, and not before."""
    errors: dict[int, int] = field(default_factory=dict)
    """Errors by opcode, for what else would be done."""
    valid: int = LONG
    """How long entries and attributes are valid, in seconds."""


def device_name(path: str | Path) -> bytes:
    """A good answer to GET_DAXDEV."""
    return abi.DAXDEV_OUT.pack(0, os.fsencode(path))


class RawServer:
    """The server's side: one thread, one request after the other. Its methods are called by `RawMount.call`."""

    def __init__(self, script: Script, control: Connection) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.offered = 0
        self.minor = 0
        self._control = control
        self._names = list(script.files)
        self._daxdevs = 0
        self._fmaps: dict[int, int] = {}
        self.fuse = os.open(kernels.MODULE.device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.mount: DetachedMount | None = None

    # -- the loop

    idle_ms: int | None = None

    def idle(self) -> None:
        """Nothing has come for `idle_ms`."""

    def make_mount(self, point: Path | None, *, read_only: bool) -> int:
        """Mount, at `point` if there is one. Gives the minor device number, which is the connection's name."""
        if self.script.sync_init:
            fcntl.ioctl(self.fuse, SYNC_INIT)
            maker = threading.Thread(target=self._mount, args=(read_only,))
            maker.start()
            while maker.is_alive():
                select.select([self.fuse], [], [], 0.05)
                self.drain()
        else:
            self._mount(read_only)
        assert self.mount is not None
        minor = os.minor(self.mount.device)
        if point is not None:
            self.attach(point)
        return minor

    def _mount(self, read_only: bool) -> None:
        self.mount = DetachedMount.create(self.fuse, "raw", kernel=kernels.MODULE, read_only=read_only)

    def attach(self, point: Path) -> None:
        """Show the mount."""
        assert self.mount is not None
        self.mount.attach(point)
        self.mount.close()

    def serve(self) -> None:
        """Until killed; a connection that ends does not end it."""
        poll = select.poll()
        poll.register(self.fuse, select.POLLIN)
        poll.register(self._control.fileno(), select.POLLIN)
        while True:
            events = poll.poll(self.idle_ms)
            if not events:
                self.idle()
            for fd, event in events:
                if fd == self._control.fileno():
                    self._obey()
                elif event & select.POLLERR or not self.drain():
                    poll.unregister(self.fuse)

    def drain(self) -> bool:
        """Answer what waits. False if the connection has ended."""
        while True:
            try:
                message = os.read(self.fuse, BUFFER)
            except BlockingIOError:
                return True
            except OSError as error:
                # EINVAL: the buffer is too small for the max_write that the reply to INIT has named.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED, errno.EINVAL):
                    return False
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    raise
                continue
            self._take(message)

    def _obey(self) -> None:
        name, arguments, values = self._control.recv()
        self.drain()
        try:
            outcome: tuple[bool, Any] = (True, getattr(self, name)(*arguments, **values))
        except Exception as error:
            outcome = (False, error)
        self._control.send(outcome)

    def _take(self, message: bytes) -> None:
        _, opcode, unique, nodeid, uid, gid, pid, _ = abi.IN_HEADER.unpack_from(message)
        request = Request(opcode, nodeid, message[abi.IN_HEADER.size :], uid, gid, pid, unique)
        refused = []
        answers = self.answers(request)
        for answer in answers:
            if answer is None:
                break
            error = self.reply(unique, answer)
            if not error:
                break
            refused.append(error)
        self.requests.append(request._replace(refused=tuple(refused)))

    def reply(self, unique: int, answer: bytes | int) -> int:
        """Send a reply; the errno that write(2) gives, or 0."""
        payload, error = (answer, 0) if isinstance(answer, bytes) else (b"", answer)
        return self.write(abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(payload), error, unique) + payload)

    def write(self, message: bytes) -> int:
        """Any message to the kernel; the errno that write(2) gives, or 0."""
        return failure(os.write, self.fuse, message)

    # -- answers

    def answers(self, request: Request) -> Iterator[Answer]:
        """Replies to a request, to be sent until the kernel takes one."""
        if request.opcode == GET_FMAP and request.nodeid >= FIRST_NODEID:
            given = self._file(request.nodeid).fmap
            items = given if isinstance(given, list) else [given]
            while True:
                at = self._fmaps.get(request.nodeid, 0)
                self._fmaps[request.nodeid] = at + 1
                yield items[min(at, len(items) - 1)]
                if at >= len(items) - 1:
                    return
        elif request.opcode == GET_DAXDEV:
            given = self.script.daxdevs or [-errno.ENOENT]
            self._daxdevs += 1
            yield given[min(self._daxdevs, len(given)) - 1]
        elif request.opcode in self.script.errors:
            yield self.script.errors[request.opcode]
        else:
            yield self._usual(request)

    def _usual(self, request: Request) -> Answer:
        match request.opcode:
            case Opcode.FORGET | Opcode.BATCH_FORGET | Opcode.INTERRUPT:
                return None
            case Opcode.INIT:
                return self._init(request.body)
            case Opcode.LOOKUP:
                return self._lookup(request.body.rstrip(b"\0").decode())
            case Opcode.GETATTR:
                return abi.ATTR_OUT.pack(self.script.valid, 0, *self._attributes(request.nodeid))
            case Opcode.SETATTR:
                return self._setattr(request)
            case Opcode.OPEN:
                file = self._file(request.nodeid)
                return file.open or abi.OPEN_OUT.pack(request.nodeid, file.open_flags, 0)
            case Opcode.OPENDIR:
                return abi.OPEN_OUT.pack(0, 0, 0)
            case Opcode.READDIR:
                return self._listed(*abi.READ_IN.unpack_from(request.body)[1:3])
            case Opcode.CREATE:
                return self._create(request)
            case Opcode.MKNOD:
                name = request.body[abi.MKNOD_IN.size :].rstrip(b"\0").decode()
                return self._made(name) or self._lookup(name)
            case Opcode.READ:
                _, offset, size, *_ = abi.READ_IN.unpack_from(request.body)
                return bytes(max(min(size, self._file(request.nodeid).size - offset), 0))
            case Opcode.WRITE:
                return abi.WRITE_OUT.pack(abi.WRITE_IN.unpack_from(request.body)[2])
            case Opcode.STATFS:
                return abi.STATFS_OUT.pack(0, 0, 0, 0, 0, PAGE, 255, PAGE)
            case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.DESTROY:
                return b""
            case _:
                # FLUSH too: a server that held a file of its own could not be killed otherwise.
                return -errno.ENOSYS

    def _init(self, body: bytes) -> bytes:
        _, self.minor, readahead, flags, flags2 = abi.INIT_IN.unpack_from(body)
        self.offered = flags | flags2 << 32
        low, high = self.script.bits & 0xFFFFFFFF, self.script.bits >> 32
        return abi.INIT_OUT.pack(7, self.script.reply_minor, readahead, low, 64, 48, 1 << 20, 1, 256, 0, high, 0, 0)

    def _file(self, nodeid: int) -> File:
        return self.script.files[self._names[nodeid - FIRST_NODEID]]

    def nodeid(self, name: str) -> int:
        """The nodeid of a file."""
        return FIRST_NODEID + self._names.index(name)

    def _attributes(self, nodeid: int) -> tuple[int, ...]:
        if nodeid == abi.ROOT_ID:
            return (nodeid, *(0,) * 8, stat.S_IFDIR | 0o777, 2, 0, 0, 0, PAGE, 0)
        file = self._file(nodeid)
        return (nodeid, file.size, 0, 0, file.mtime, 0, 0, 0, 0, file.mode, 1, 0, 0, 0, PAGE, 0)

    def _entry(self, nodeid: int) -> bytes:
        valid = self.script.valid
        return abi.ENTRY_OUT.pack(nodeid, 0, valid, valid, 0, 0, *self._attributes(nodeid))

    def _lookup(self, name: str) -> Answer:
        return self._entry(self.nodeid(name)) if name in self.script.files else -errno.ENOENT

    def _setattr(self, request: Request) -> Answer:
        valid, _, size, *_ = abi.SETATTR_IN.unpack_from(request.body)
        file = self._file(request.nodeid)
        if valid & abi.SETS_SIZE:
            if file.truncate:
                return file.truncate
            file.size = size
        return abi.ATTR_OUT.pack(self.script.valid, 0, *self._attributes(request.nodeid))

    def _listed(self, offset: int, size: int) -> bytes:
        records = b""
        for number, name in list(enumerate(self._names, 1))[offset:]:
            data = name.encode()
            record = abi.DIRENT.pack(self.nodeid(name), number, len(data), stat.S_IFREG >> 12) + data
            record += bytes(-len(record) % 8)
            if len(records) + len(record) > size:
                break
            records += record
        return records

    def _create(self, request: Request) -> Answer:
        name = request.body[abi.CREATE_IN.size :].rstrip(b"\0").decode()
        error = self._made(name)
        if error:
            return error
        nodeid = self.nodeid(name)
        return self._entry(nodeid) + abi.OPEN_OUT.pack(nodeid, self._file(nodeid).open_flags, 0)

    def _made(self, name: str) -> int:
        if name not in self.script.new_files:
            return -errno.EROFS
        self.add(name, self.script.new_files[name])
        return 0

    # -- what tests ask for

    def add(self, name: str, file: File) -> int:
        """A new file; gives its nodeid."""
        self.script.files[name] = file
        self._names.append(name)
        return self.nodeid(name)

    def change(self, name: str, **values: Any) -> None:
        """Change what is said of a file."""
        self.script.files[name] = replace(self.script.files[name], **values)

    def alter(self, **values: Any) -> None:
        """Change the script."""
        self.script = replace(self.script, **values)

    def greeting(self) -> tuple[int, int]:
        """Minor version and flags of INIT."""
        return self.minor, self.offered

    def seen(self) -> list[Request]:
        """The requests since the last call."""
        found, self.requests = self.requests, []
        return found

    def push(self, target: str | int, slot: int = 0, flags: int = 0, how: int = os.O_RDWR) -> int:
        """The ioctl that hands over a device, by its path or a descriptor's number. Gives its errno, or 0."""
        fd = target if isinstance(target, int) else os.open(target, how)
        try:
            return failure(fcntl.ioctl, self.fuse, DAXDEV_OPEN, abi.BACKING_MAP.pack(fd, flags, slot))
        finally:
            if not isinstance(target, int):
                os.close(fd)

    def notify(self, code: int, body: bytes) -> int:
        """A notification. Gives the errno of write(2), or 0."""
        return self.write(abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(body), code, 0) + body)

    def forget_name(self, name: str) -> int:
        """NOTIFY_INVAL_ENTRY: the kernel looks the name up again, and evicts the inode when nobody uses it."""
        return self.write(abi.inval_entry(abi.ROOT_ID, name.encode()))

    def store(self, name: str, data: bytes, offset: int = 0) -> int:
        """NOTIFY_STORE: put pages into the cache of a file."""
        return self.notify(abi.Notify.STORE, struct.pack("<QQI4x", self.nodeid(name), offset, len(data)) + data)

    def unread(self) -> None:
        """Let nothing be read or answered until the process is killed."""
        time.sleep(LONG)

    def close_fuse(self) -> None:
        """Give the descriptor of /dev/famfs back: the connection is dead."""
        os.close(self.fuse)


def unmounted(point: Path) -> None:
    """Unmount lazily, if anything is mounted."""
    try:
        unmount(point, lazy=True)
    except MountError as error:
        if error.errno != errno.EINVAL:
            raise


class RawMount:
    """A mount that a `RawServer` serves, from the test's side: `with RawMount(folder, Script(...), ...) as mount`.

    `device` is pushed into slot 0 in dialects that push, and named in answer to GET_DAXDEV in the other one. `rawio`
    says when the server has CAP_SYS_RAWIO.
    """

    server_class: type[RawServer] = RawServer

    def __init__(
        self, folder: Path, script: Script | dict[str, File], *, dialect: str = "push", device: Path | None = None,
        attached: bool = True, rawio: Rawio = "always", read_only: bool = False, **module: object,
    ) -> None:  # fmt: skip
        self.script = Script(files=script) if isinstance(script, dict) else script
        self.point = folder / f"raw{len(list(folder.iterdir()))}"
        self.point.mkdir()
        self.dialect = dialect
        self.pid = -1
        self._device = device
        self._attached = attached
        self._rawio = rawio
        self._read_only = read_only
        self._module = {"dialect": dialect, **module}
        self._control: Connection | None = None
        self._connection: Path | None = None

    def __enter__(self) -> "RawMount":
        if self._device is not None and self.dialect == "pull" and not self.script.daxdevs:
            self.script.daxdevs = [device_name(self._device)]
        self._control, theirs = Pipe()
        with parameters(**self._module):
            self.pid = os.fork()
            if self.pid == 0:
                self._be_server(theirs)
            theirs.close()
            try:
                self._connection = kernels.MODULE.connections / str(self._outcome())
            except BaseException:
                self.end()
                raise
        try:
            # INIT is answered before this is.
            self.call("greeting")
            if self._device is not None and self.dialect.startswith("push"):
                error = self.call("push", str(self._device))
                assert not error, f"{self._device} is not taken: {os.strerror(error)}"
        except BaseException:
            self.end()
            raise
        return self

    def _be_server(self, control: Connection) -> NoReturn:
        try:
            if self._rawio == "never":
                drop_rawio()
            server = self.server_class(self.script, control)
            try:
                minor = server.make_mount(self.point if self._attached else None, read_only=self._read_only)
                control.send((True, minor))
            except Exception as error:
                control.send((False, error))
            if self._rawio == "mounting":
                drop_rawio()
            server.serve()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _outcome(self) -> Any:
        assert self._control is not None
        if not self._control.poll(CLIENT_SECONDS):
            raise HungError("the server says nothing")
        done, value = self._control.recv()
        if done:
            return value
        raise value

    def call(self, name: str, *arguments: Any, **values: Any) -> Any:
        """Call a method of the server. It has answered all requests that were there before."""
        assert self._control is not None
        self._control.send((name, arguments, values))
        return self._outcome()

    def path(self, name: str) -> Path:
        """A file of the mount, for clients."""
        return self.point / name

    def abort(self) -> None:
        """End the connection: nobody waits for the server any more."""
        assert self._connection is not None
        with contextlib.suppress(FileNotFoundError):
            (self._connection / "abort").write_text("1")

    def unmount(self) -> None:
        """Take the mount away, at once; it lives on for those who use it. Raises HungError if its end does not end."""
        apart(unmounted, self.point)

    def kill(self) -> None:
        """End the server, whatever it does."""
        if self.pid > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            assert reap(self.pid, END_SECONDS) is not None, "the server does not end"
            self.pid = -1

    def end(self) -> None:
        """Leave nothing behind."""
        if self._connection is not None:
            self.abort()
            self.unmount()
        self.kill()
        if self._control is not None:
            self._control.close()

    def __exit__(self, *_: object) -> None:
        self.end()
