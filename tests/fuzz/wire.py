# SPDX-License-Identifier: Apache-2.0
"""Requests as no kernel sends them, before the request plane: any order, any nodeid, bodies of any length and content.

One case is one connection. The plane is the real one over a real volume; /dev/fuse is a socket pair whose other end is
read after each request. A worker dies now and then, and the next one goes on with what it has left.
"""

import contextlib
import errno
import os
import random
import select
import socket
import stat
import struct
import tempfile
from collections import Counter
from pathlib import Path
from struct import Struct

from agreement import check_places, shown
from complaints import Complaints
from famfs_server.dax.device import DaxDevice
from famfs_server.dax.memory import Memory
from famfs_server.errors import FamfsError
from famfs_server.fuse import abi, dialects
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.fmap_replies import FmapReplies
from famfs_server.fuse.planes import ALWAYS, FAST
from famfs_server.fuse.requests import RequestPlane
from famfs_server.fuse.session import Session
from famfs_server.volume import check
from famfs_server.volume.provisional import FIRST_PROVISIONAL
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, formatted

MESSAGES = 2000
"""Requests of one connection."""
_DEVICE_SIZE = 8 << 30
_LATE_SECONDS = 10
GET_FMAP, GET_DAXDEV = 54, 55
_PAGE = 4096

SILENT = (Opcode.FORGET, Opcode.BATCH_FORGET)
_NOT_IN_MIDDLE = (Opcode.INIT, Opcode.DESTROY)
"""Only the beginning and the end of a connection have these, and libfuse alone sees them."""

_COMMON = (
    *(Opcode.LOOKUP, Opcode.GETATTR, Opcode.OPEN, Opcode.READ, Opcode.READDIRPLUS, Opcode.READDIR) * 3,
    *(Opcode.WRITE, Opcode.CREATE, Opcode.RELEASE, Opcode.SETATTR, Opcode.FALLOCATE, Opcode.FSYNC) * 4,
    *(Opcode.MKDIR, Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.OPENDIR, Opcode.LSEEK, Opcode.STATFS) * 2,
    *(Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.INTERRUPT, Opcode.IOCTL, Opcode.TMPFILE, Opcode.FLUSH),
    *(GET_FMAP, GET_DAXDEV),
)
_ANY = tuple(opcode for opcode in range(1, 70) if opcode not in _NOT_IN_MIDDLE)

_EXACT: dict[int, int] = {
    Opcode.LOOKUP: 128,
    Opcode.GETATTR: 104,
    Opcode.SETATTR: 104,
    Opcode.MKDIR: 128,
    Opcode.CREATE: 144,
    Opcode.OPEN: 16,
    Opcode.OPENDIR: 16,
    Opcode.WRITE: 8,
    Opcode.STATFS: 80,
    Opcode.LSEEK: 8,
    Opcode.RELEASE: 0,
    Opcode.RELEASEDIR: 0,
    Opcode.FSYNC: 0,
    Opcode.FALLOCATE: 0,
    GET_DAXDEV: 280,
}
"""Payloads of answers that succeed, in bytes."""

_NUMBERS = (
    0,
    1,
    2,
    7,
    511,
    4095,
    4096,
    4097,
    1 << 20,
    2 << 20,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
)
_PLACES = (
    0,
    0,
    1,
    100,
    4095,
    4096,
    4097,
    70000,
    (2 << 20) - 1,
    2 << 20,
    (4 << 20) + 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
)
"""Offsets and sizes: within the device's first bytes, or so large that it has no room. What lies between only takes
time, since new space is zeroed."""
_NAMES = (
    b"a",
    b"b",
    b"c",
    b"dir",
    b"file",
    b"striped",
    b".",
    b"..",
    b".meta",
    b".log",
    b"",
    b"\xff\xfe",
    b"a/b",
    b"a\0b",
)
_NOISE = random.Random(0).randbytes(1 << 18)


class Wire:
    """Connections to the request plane."""

    def __init__(self) -> None:
        shm = Path("/dev/shm")
        descriptor, self._image = tempfile.mkstemp(prefix="famfs-fuzz-", dir=shm if shm.is_dir() else None)
        os.truncate(descriptor, _DEVICE_SIZE)
        os.close(descriptor)
        self._device = DaxDevice.open(self._image)
        self._memory = self._device.memory()
        self._complaints = Complaints()

    def case(self, rng: random.Random) -> Counter[str]:
        """One connection; afterwards the log shows what the connection showed, and fsck has nothing to say."""
        self._memory.zero(0, _DEVICE_SIZE)
        formatted(self._memory)
        connection = Connection(self._memory, self._image, rng)
        try:
            connection.talk(MESSAGES)
            connection.check_end()
        finally:
            connection.close()
        assert not self._complaints.lines, self._complaints.lines
        return connection.counts

    def close(self) -> None:
        """Nothing is left."""
        self._memory.close()
        self._device.close()
        os.unlink(self._image)


class Requests:
    """Requests that one connection may be sent, and what a kernel makes of the answers."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.counts: Counter[str] = Counter()
        self._nodes = [1, 2, 3, 4, 5, 16, 17, 18]
        self._made: dict[int, int] = {}
        self._last: tuple[int, int, bytes, int] | None = None

    def opcode(self) -> int:
        """What to ask for next."""
        return self._rng.choice(_COMMON if self._rng.random() < 0.9 else _ANY)

    def claimed(self, length: int) -> int:
        """The length that a request of `length` bytes says it has."""
        return length if self._rng.random() < 0.99 else self._rng.choice(_NUMBERS) & 0xFFFFFFFF

    def _nodeid(self) -> int:
        rng = self._rng
        roll = rng.random()
        if roll < 0.85:
            return rng.choice(self._nodes[-12:] if roll < 0.4 else self._nodes)
        if roll < 0.9:
            return FIRST_PROVISIONAL + rng.randrange(40)
        return rng.choice((0, 6, 15, 19, 40, *_NUMBERS, (1 << 64) - 1, FIRST_PROVISIONAL * 3))

    def _judge(self, opcode: int, nodeid: int, body: bytes, unique: int, data: bytes) -> bytes | None:
        length, error, answered = abi.OUT_HEADER.unpack_from(data)
        what = opcode, nodeid, body[:200]
        assert (length, answered) == (len(data), unique), what
        assert -511 <= error <= 0, what
        assert error != -errno.EINTR, what
        payload = data[abi.OUT_HEADER.size :]
        if error:
            assert not payload, what
            self.counts["refused"] += 1
            return None
        if opcode in _EXACT:
            assert len(payload) == _EXACT[opcode], (*what, len(payload))
        elif opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
            assert len(payload) <= abi.READ_IN.unpack_from(body)[2], what
        elif opcode == GET_FMAP:
            assert len(payload) <= 16 << 20, what
        else:
            assert opcode in (Opcode.GETXATTR, Opcode.LISTXATTR), what
        self._take(opcode, body, payload)
        if opcode in (Opcode.MKDIR, Opcode.CREATE):
            self._last = opcode, nodeid, body, unique
            self._last_node = int.from_bytes(payload[:8], "little")
        return payload

    def _take(self, opcode: int, body: bytes, payload: bytes) -> None:
        """What a kernel would remember."""
        if opcode in (Opcode.LOOKUP, Opcode.MKDIR, Opcode.CREATE):
            self._entered(payload)
        elif opcode == Opcode.READDIRPLUS:
            at = 0
            while at < len(payload):
                namelen = int.from_bytes(payload[at + 144 : at + 148], "little")
                assert 0 < namelen <= 255
                if payload[at : at + 8] != bytes(8):
                    self._entered(payload[at : at + 128])
                at += (152 + namelen + 7) & ~7
            assert at == len(payload)
        elif opcode == Opcode.READDIR:
            at = 0
            while at < len(payload):
                namelen = int.from_bytes(payload[at + 16 : at + 20], "little")
                assert 0 < namelen <= 255
                at += (24 + namelen + 7) & ~7
            assert at == len(payload)

    def _entered(self, payload: bytes) -> None:
        node, generation = struct.unpack_from("<QQ", payload)
        mode, nlink = struct.unpack_from("<II", payload, 40 + 60)
        assert node > 0
        assert generation == 0
        assert stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR)
        assert nlink == 1
        if node not in self._nodes:
            self._nodes.append(node)
        if node >= FIRST_PROVISIONAL:
            self._made[node] = self._made.get(node, 0) + 1

    def _forgotten(self, opcode: int, nodeid: int, body: bytes) -> None:
        rows = [(nodeid, *abi.FORGET_IN.unpack_from(body))] if opcode == Opcode.FORGET and len(body) >= 8 else []
        if opcode == Opcode.BATCH_FORGET and len(body) >= 8:
            rows = list(abi.FORGET_ONE.iter_unpack(body[8 : len(body) - (len(body) - 8) % 16]))
        for node, count in rows:
            if node in self._made:
                self._made[node] = max(self._made[node] - count, 0)

    # -- bodies ---------------------------------------------------------------------------------

    def _body(self, opcode: int) -> bytes:
        rng = self._rng
        if rng.random() < 0.03:
            return rng.randbytes(rng.choice((0, 1, 7, 8, 16, 39, 40, 41, 100, 5000)))
        body = self._meant(opcode)
        roll = rng.random()
        if roll < 0.8:
            return body
        if roll < 0.86:
            return body[: rng.randrange(len(body) + 1)]
        if roll < 0.9:
            return body + rng.randbytes(rng.choice((1, 8, 300)))
        damaged = bytearray(body)
        for _ in range(rng.choice((1, 1, 4))):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 120))] ^= 1 << rng.randrange(8)
        return bytes(damaged)

    def _meant(self, opcode: int) -> bytes:
        """A body that a kernel might send, but for its values."""
        rng = self._rng
        place, size, flags = rng.choice(_PLACES), rng.choice(_NUMBERS) & 0xFFFFFFFF, rng.choice(_NUMBERS) & 0xFFFFFFFF
        match opcode:
            case Opcode.LOOKUP | Opcode.UNLINK | Opcode.RMDIR | Opcode.REMOVEXATTR:
                return self._name()
            case Opcode.MKDIR:
                return abi.MKDIR_IN.pack(rng.randrange(1 << 16), rng.choice((0, 0o22, flags))) + self._name()
            case Opcode.CREATE:
                flags = rng.choice((os.O_RDWR, os.O_RDWR | os.O_EXCL, os.O_RDONLY, os.O_RDWR | os.O_TRUNC, flags))
                return abi.CREATE_IN.pack(flags, rng.randrange(1 << 16), 0o22, 0) + self._name()
            case Opcode.OPEN | Opcode.OPENDIR:
                return abi.OPEN_IN.pack(rng.choice((os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, flags)), 0)
            case Opcode.READ | Opcode.READDIR | Opcode.READDIRPLUS:
                if opcode != Opcode.READ and rng.random() < 0.6:
                    place, size = rng.choice((0, 0, 1, 2, *self._nodes)), rng.choice((0, 100, 200, 4096, 65536))
                return abi.READ_IN.pack(0, place, size, flags, 0, 0)
            case Opcode.WRITE:
                data = _NOISE[: rng.choice((0, 1, 100, 4096, 70000))]
                return abi.WRITE_IN.pack(0, place, len(data), flags, 0, 0) + data
            case Opcode.SETATTR:
                valid = rng.choice((8, 8, 1, 6, 16, 32, 1 << 10, 0x1B0, flags))
                return abi.SETATTR_IN.pack(
                    valid, 0, place, 0, size, flags, place, flags, size, 5, rng.randrange(1 << 16), 1, flags
                )
            case Opcode.FALLOCATE:
                return abi.FALLOCATE_IN.pack(0, place, rng.choice(_PLACES), rng.choice((0, 0, 0, 1, 3, flags)))
            case Opcode.LSEEK:
                return abi.LSEEK_IN.pack(0, place, rng.choice((0, 1, 2, 3, 4, flags)))
            case Opcode.FORGET:
                return abi.FORGET_IN.pack(rng.choice((0, 1, 1, 2, 1 << 63)))
            case Opcode.BATCH_FORGET:
                rows = [(self._nodeid(), rng.choice((0, 1, 2, (1 << 64) - 1))) for _ in range(rng.randrange(5))]
                return abi.BATCH_FORGET_IN.pack(flags) + b"".join(abi.FORGET_ONE.pack(*row) for row in rows)
            case Opcode.GETXATTR:
                name = rng.choice((b"user.famfs.shadow\0", b"security.capability\0", self._name()))
                return abi.GETXATTR_IN.pack(rng.choice((0, 1, 4096, size))) + name
            case Opcode.GETATTR | Opcode.FSYNC | Opcode.BMAP:
                return bytes(16)
            case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.FLUSH | Opcode.POLL:
                return bytes(24)
            case _ if opcode == GET_FMAP:
                return rng.choice((b"", Struct("<II").pack(rng.choice((_PAGE, size)), 0)))
            case _:
                return rng.choice((b"", bytes(8), rng.randbytes(rng.randrange(80))))

    def _name(self) -> bytes:
        rng = self._rng
        roll = rng.random()
        if roll < 0.5:
            name = rng.choice(_NAMES)
        elif roll < 0.95:
            name = b"n%d" % rng.randrange(300)
        else:
            name = b"x" * rng.choice((70, 79, 80, 255, 256, 1024, 4000))
        return name + b"\0"


class Connection(Requests):
    """A request plane, and the kernel's end of its /dev/fuse."""

    def __init__(self, memory: Memory, path: str, rng: random.Random) -> None:
        super().__init__(rng)
        self._memory = memory
        self._path = path
        self._host = HOST if rng.random() < 0.85 else None
        self._fast = rng.random() < 0.8
        self._candidates = rng.choice(((), (), (dialects.PULL,), (dialects.PUSH, dialects.PUSH_INTERLEAVE)))
        self._master = Volume(memory, HOST, path)
        self._master.mkdir(b"dir", 0o2755, 0, 7)
        self._master.create(NewFile(b"file", 100_000, 0o644, 1, 2))
        self._master.create(NewFile(b"dir/striped", 5 << 20, 0o600, 3, 4, Interleave(2, 2, 2 << 20)))
        self._kernel, plane_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._kernel, plane_end):
            end.setsockopt(socket.SOL_SOCKET, 32 if os.geteuid() == 0 else socket.SO_SNDBUF, 16 << 20)
        self._plane_end = plane_end
        self._session = Session.create(plane_end.fileno())
        self._unique = 2
        self._notified: list[bytes] = []
        self._serve()

    def _serve(self) -> None:
        """A worker begins, the first one or a successor."""
        self.volume = Volume(self._memory, self._host, self._path, state=self._session.namespace)
        self._fs = FileSystem(self.volume, Settings(shadow=b"/run/famfs/x", maps=bool(self._candidates)))
        self._fs.notify = self._notified.append
        maps = FmapReplies(self._fs, self._candidates, (self._path,)) if self._candidates else None
        self._plane = RequestPlane(self._fs, self._session, fast=self._fast, maps=maps)

    # -- requests -------------------------------------------------------------------------------

    def talk(self, count: int) -> None:
        """So many requests."""
        rng = self._rng
        for _ in range(count):
            roll = rng.random()
            if roll < 0.002:
                self._session.drain()
                self._serve()
                self.counts["takeovers"] += 1
                self._send_again()
            elif roll < 0.01 and self._host is None:
                self._another_host_writes()
            opcode = self.opcode()
            self._request(opcode, self._nodeid(), self._body(opcode))

    def _request(self, opcode: int, nodeid: int, body: bytes, unique: int = 0) -> bytes | None:
        """Send one request, and judge what comes back: the payload, None for an error or for no answer."""
        rng = self._rng
        if not unique:
            self._unique += 2
            unique = self._unique
        length = abi.IN_HEADER.size + len(body)
        claimed = self.claimed(length)
        buffer = self._session.record.buffer
        buffer[:40] = abi.IN_HEADER.pack(claimed, opcode, unique, nodeid, rng.choice((0, 1000)), 0, 4711, 0)
        buffer[40:length] = body
        self.counts["messages"] += 1
        if not self._plane.answer(length):
            # libfuse has no part in this.
            assert opcode in iter(Opcode)
            assert opcode not in ALWAYS
            assert not (self._fast and opcode in FAST), opcode
            self._session.record.done(unique)
            self.counts["for libfuse"] += 1
            return None
        if opcode in SILENT:
            self._require_silence()
            if claimed == length:
                self._forgotten(opcode, nodeid, body)
            return None
        return self._judge(opcode, nodeid, body, unique, self._answer())

    def _answer(self) -> bytes:
        """The one answer to a request, which may come from a thread."""
        assert select.select([self._kernel], [], [], _LATE_SECONDS)[0], "no answer"
        data = self._kernel.recv(16 << 20)
        self._require_silence()
        return data

    def _require_silence(self) -> None:
        assert not select.select([self._kernel], [], [], 0)[0], "an answer that nobody waits for"

    def _send_again(self) -> None:
        """After a takeover the kernel may repeat what was answered last: it is not done twice."""
        if self._last is None:
            return
        opcode, nodeid, body, unique = self._last
        self._last = None
        if self._fast:
            payload = self._request(opcode, nodeid, body, unique | abi.UNIQUE_RESEND)
            assert payload is None or int.from_bytes(payload[:8], "little") == self._last_node
            self._last = None

    def _another_host_writes(self) -> None:
        rng = self._rng
        with contextlib.suppress(FamfsError):
            self._master.mkdir(b"other%d" % rng.randrange(1000), 0o755, 0, 0)

    # -- the end --------------------------------------------------------------------------------

    def check_end(self) -> None:
        """Everything is closed and forgotten: nothing is provisional, no space is lost, the log tells the same tree."""
        volume = self.volume
        self._rng = _Tidy()
        for node in self._made:
            for _ in range(self._fs.made.opens(node)):
                self._request(Opcode.RELEASE, node, bytes(24))
            self._request(Opcode.FORGET, node, abi.FORGET_IN.pack(1 << 40))
        assert not volume.promised
        assert not self._fs.made.aliases
        volume.refresh()
        if self._host is None:
            assert volume.stop is None
        again = Volume(self._memory, HOST, self._path)
        try:
            plain = [(path, node[0], *node[4:]) for path, node in shown(volume).items()]
            assert plain == [(path, node[0], *node[4:]) for path, node in shown(again).items()]
            assert volume.space.allocated == again.space.allocated
            check_places(again, self._memory)
        finally:
            again.close()
        assert check.examine(self._memory, self._path, HOST).clean
        self.counts["names"] = len(plain)

    def close(self) -> None:
        """Let go of everything."""
        # That of the session's namespace too, whichever worker it was.
        self.volume.close()
        self._master.close()
        session = self._session
        for end in (self._kernel, self._plane_end, session.libfuse_end, session.our_end):
            end.close()
        os.close(session.record.fd)


class _Tidy(random.Random):
    """Chance that leaves requests as they are meant."""

    def random(self) -> float:
        return 0.5
