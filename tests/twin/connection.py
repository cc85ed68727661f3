# SPDX-License-Identifier: Apache-2.0
"""The kernel's end of a FUSE connection: requests go out, answers and notifications come in, by the framing rules of
/dev/fuse (docs/protocol.md 2.2, 4.2). INIT belongs to it; what the other requests mean does not.
"""

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from tests.twin.maps import PAGE, TwinViolation

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
RELEASE_IN = Struct("<QIIQ")

STOCK = 0x5FD << 32 | 0x73FFFFFB
"""What 6.18 offers in INIT."""
LONGEST_REPLY = (16 << 20) + PAGE
UNIQUE_RESEND = 1 << 63
NOTIFY_INVAL_ENTRY = 3
_NOTIFY_STORE = 4
_NOTIFY_RESEND = 7
_NOTIFY_SIZES = {2: 24, 7: 0}
_INVAL_ENTRY = Struct("<QII")


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
    GETXATTR = 22
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


class Exchange(NamedTuple):
    """A request and what came of it, for whoever watches."""

    opcode: int
    nodeid: int
    body: bytes
    error: int
    payload: bytes | None
    """None: no reply is due."""
    from_server: bool = False
    """One of the server's own processes has asked for it, by a system call on the mount."""


class Connection:
    """One connection. `offered` are the bits of INIT. A subclass gives a meaning to notifications and ioctls."""

    def __init__(
        self,
        fuse: socket.socket,
        *,
        minor: int,
        offered: int,
        timeout: float,
        watch: Callable[[Exchange], None] | None,
    ) -> None:
        self.minor = minor
        self.offered = Bit(offered)
        self.timeout = timeout
        self.negotiated = Bit(0)
        self.max_write = PAGE
        self.notifications: list[tuple[int, bytes]] = []
        self.in_hand: list[int] = []
        """The requests that the server has read and not answered, in order: what it gets again if it asks for that."""
        self.one_by_one: list[int] = []
        """Requests of which the server reads one when it has answered the one before."""
        self.from_server = False
        """Requests are sent for one of the server's own processes now."""
        self._fuse = fuse
        self._watch = watch
        self._unique = 0
        self._outstanding: dict[int, bytes | None] = {}
        self._sent: dict[int, bytes] = {}
        self._repeated: dict[int, int] = {}
        self._answered_before = 0
        self._buffer = bytearray(LONGEST_REPLY)

    # -- requests -------------------------------------------------------------------------------

    def send(self, opcode: int, nodeid: int, body: bytes, *, claim: int | None = None, no_reply: bool = False) -> int:
        """Send a request and do not wait; its unique. `claim` is put into the header in place of the true length."""
        self._unique += 2
        length = IN_HEADER.size + len(body) if claim is None else claim
        request = IN_HEADER.pack(length, opcode, self._unique, nodeid, 0, 0, 4711, 0, 0) + body
        if not no_reply:
            self._outstanding[self._unique] = None
            self._sent[self._unique] = request
        self._fuse.send(request)
        if no_reply:
            self._tell(opcode, nodeid, body, 0, None)
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

    def call(self, opcode: int, nodeid: int = 0, body: bytes = b"", *, exact: int = 0, most: int = 0) -> bytes:
        """One request: the payload, which must have `exact` bytes, or `most` at most. OSError as the server says."""
        self.require_silence()
        error, payload = self.receive(self.send(opcode, nodeid, body))
        self._tell(opcode, nodeid, body, error, payload)
        if error == errno.EINTR:
            raise TwinViolation(f"request {opcode} is answered EINTR: programs repeat it for ever")
        if error:
            raise OSError(error, f"{os.strerror(error)} (the server's answer to request {opcode})")
        if len(payload) > most if most else len(payload) != exact:
            raise TwinViolation(
                f"{len(payload)} bytes answer request {opcode}, {most or exact} are due: write is EINVAL"
            )
        return payload

    def interrupt(self, unique: int) -> None:
        """Ask the server to end a request early; it may say nothing to that."""
        self._fuse.send(IN_HEADER.pack(48, Op.INTERRUPT, unique | 1, 0, 0, 0, 4711, 0, 0) + Struct("<Q").pack(unique))

    def close(self) -> None:
        """Unmount: the server reads the end of its connection."""
        self._fuse.close()

    def _tell(self, opcode: int, nodeid: int, body: bytes, error: int, payload: bytes | None) -> None:
        if self._watch:
            self._watch(Exchange(opcode, nodeid, body, error, payload, self.from_server))

    # -- a server that dies ---------------------------------------------------------------------

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

    # -- what comes -----------------------------------------------------------------------------

    def pump(self, seconds: float, also: int | None = None) -> bool:
        """Wait for whatever comes next from the server: False if nothing did, or if `also` became readable."""
        others = self._other_ends()
        watched: list[socket.socket | int] = [self._fuse, *others, *([] if also is None else [also])]
        ready: list[socket.socket | int] = []
        deadline = time.monotonic() + seconds
        while not ready:
            most = self._look_around()
            if most is None:
                return True
            left = max(deadline - time.monotonic(), 0)
            ready = select.select(watched, [], [], min(left, most))[0]
            if not left:
                break
        if also in ready:
            return False
        # Replies first: what an ioctl may do depends on how INIT was answered.
        if self._fuse in ready:
            self._take(self._next())
        elif ready:
            others[next(end for end in others if end in ready)]()
        return bool(ready)

    def require_silence(self, seconds: float = 0) -> None:
        """Take in notifications; anything else that comes without having been asked for is a violation."""
        deadline = time.monotonic() + seconds
        while self.pump(max(deadline - time.monotonic(), 0)):
            pass

    def _other_ends(self) -> dict[socket.socket, Callable[[], None]]:
        """What else the server's processes ask by, and who answers."""
        return {}

    def _look_around(self) -> float | None:
        """Do what is due and no message tells of. None if it has done anything, and else the seconds until it is to be
        called again."""
        return self.timeout

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
        self.notifications.append((code, body))
        if code == _NOTIFY_STORE:
            raise TwinViolation("NOTIFY_STORE: a kernel oopses where the file is mapped")
        if code == _NOTIFY_RESEND:
            if Bit.HAS_RESEND not in self.offered:
                raise TwinViolation("RESEND to a kernel that knows nothing of it")
            self._send_again()
        if code == NOTIFY_INVAL_ENTRY:
            parent, namelen, _ = _INVAL_ENTRY.unpack_from(body)
            if len(body) != _INVAL_ENTRY.size + namelen + 1 or body[-1]:
                raise TwinViolation("INVAL_ENTRY with a name of another length")
            self._name_is_invalid(parent, body[_INVAL_ENTRY.size : -1])
        elif len(body) != _NOTIFY_SIZES.get(code, -1):
            raise TwinViolation(f"notification {code} with {len(body)} bytes")

    def _name_is_invalid(self, parent: int, name: bytes) -> None:
        """The server wants a name to be dropped."""

    # -- INIT -----------------------------------------------------------------------------------

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
        body = self._sent[unique][IN_HEADER.size :]
        error, payload = self.receive(unique)
        self._tell(Op.INIT, 0, body, error, payload)
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
