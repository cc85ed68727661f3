# SPDX-License-Identifier: Apache-2.0
"""What outlives a worker: the buffer that requests are read into, a record of what has been answered, and counters.

It lies in a memfd that the supervisor made and every worker maps. A request is read into the buffer by the kernel, so
at any moment the record shows which one was in hand, and a successor or the supervisor can tell without the dead one's
help (decisions 15, 16).
"""

import fcntl
import logging
import mmap
import os
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Self

from famfs_server.fuse import abi, counters

log = logging.getLogger(__name__)

MAX_WRITE = 1 << 20
"""Bytes of one READ or WRITE: 256 pages, what kernels allow unless their administrator raised it."""
BUFFER = MAX_WRITE + 4096
"""A read of /dev/fuse needs room for the largest WRITE and its headers."""

_SOCKET_BUFFER = 8 << 20
_SMALL_MAX_WRITE = 1 << 17
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

_RING = 64
_ANSWERED, _LAST, _RELAYED, _RETURNED, _BEAT, _POISON, _TAKEOVERS, _WORK, _LOG_LEVEL, _FAILED, _RING_AT = range(11)
RECORD_LAYOUT = 3
"""To be raised when the words of the record, or the buffer behind them, change their places or meanings."""
_FLOCK = struct.Struct("hhqqi4x")
_CLAIM_RETRY_SECONDS = 0.002
_HELD_AT = _RING_AT + 2 * _RING
_HELD = 4096
"""Requests that threads can have at once, of which a successor knows each."""
_PUSHED = _HELD_AT + _HELD
_RECOVERING = _PUSHED + 1
_LEFT, _COUNTED, _COUNTING, _LET_GO = range(_RECOVERING + 1, _RECOVERING + 5)
_LOW = (1 << 32) - 1
_HEAD = 1 << 16
"""Bytes before the buffer: whole pages on every machine."""
_UNIQUE_OFFSET = 8


class SessionRecord:
    """The shared record of one connection. Words are written by one worker at a time and read by anybody."""

    def __init__(self, fd: int) -> None:
        """Map the record in the memfd `fd`, which `create` made."""
        self.fd = fd
        self._map = mmap.mmap(fd, _HEAD + BUFFER + counters.SIZE)
        whole = memoryview(self._map)
        self._words = whole[:_HEAD].cast("Q")
        self.buffer = whole[_HEAD : _HEAD + BUFFER]
        self.counters = whole[_HEAD + BUFFER :].cast("Q")
        """What `fuse/counters.py` counts: written by the request plane, read by anybody."""
        self._free = deque(range(_HELD_AT, _HELD_AT + _HELD))
        self._places: dict[int, int] = {}

    @classmethod
    def create(cls) -> "SessionRecord":
        """A record of a connection on which nothing has happened yet."""
        fd = os.memfd_create("famfs-session", os.MFD_CLOEXEC)
        os.ftruncate(fd, _HEAD + BUFFER + counters.SIZE)
        return cls(fd)

    def claim(self, seconds: float) -> int | None:
        """Become the one process that reads requests, as soon as the one before is gone; at most `seconds` from now.

        The result is a descriptor: the claim lasts until it is closed, by this process and those that it forks. Nothing
        when another process lives on. A request that it reads now would be lost with it.
        """
        descriptor = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    return None
                time.sleep(_CLAIM_RETRY_SECONDS)
            else:
                return descriptor

    def map_buffer(self) -> None:
        """Have every page of the buffer mapped in this process, the one that reads requests.

        Otherwise the read maps them, and a process that is killed meanwhile costs the caller an EIO: the kernel ends a
        request that it could not copy.
        """
        buffer = self.buffer
        for at in range(0, BUFFER, mmap.PAGESIZE):
            buffer[at] = buffer[at]

    # -- written by the request plane -----------------------------------------------------------

    def done(self, unique: int) -> None:
        """The request `unique` has been answered, or passed on."""
        words = self._words
        words[_LAST] = unique
        words[_ANSWERED] += 1

    def relayed(self, unique: int) -> None:
        """A request is about to be passed to libfuse, which will answer it."""
        self.hold(unique)
        self._words[_RELAYED] += 1

    def returned(self, unique: int) -> None:
        """libfuse has answered a request."""
        self.let_go(unique)
        self._words[_RETURNED] += 1

    def hold(self, unique: int) -> None:
        """The request plane goes on, and another thread is to answer the request. What finds no place is not known to a
        successor."""
        if self._free:
            place = self._free.popleft()
            self._places[unique] = place
            self._words[place] = unique

    def let_go(self, unique: int) -> None:
        """A request that was held has been answered."""
        place = self._places.pop(unique, 0)
        if place:
            self._words[place] = 0
            self._free.append(place)

    def beat(self) -> None:
        """The control plane is alive."""
        self._words[_BEAT] += 1

    def working(self) -> None:
        """A request that takes long has made some progress."""
        self._words[_WORK] += 1

    def keep_log_level(self, level: int) -> None:
        """A log level that somebody has set holds for the next workers too."""
        self._words[_LOG_LEVEL] = level + 1

    def note_change(self, unique: int, before: int) -> None:
        """Before a request that changes something is served: how it was before, as a number that tells whether it has
        been served: where the log ended, or how often a file was open (decisions 15)."""
        unique &= ~abi.UNIQUE_RESEND
        slot = _RING_AT + 2 * (unique // 2 % _RING)
        self._words[slot + 1] = before
        self._words[slot] = unique

    def noted_change(self, unique: int) -> int | None:
        """What was noted when the request was served first, if it was."""
        unique &= ~abi.UNIQUE_RESEND
        slot = _RING_AT + 2 * (unique // 2 % _RING)
        return self._words[slot + 1] if self._words[slot] == unique else None

    def note_count(self, unique: int, item: int, before: int) -> None:
        """The `item`-th nodeid that a request counts had been given `before` times, and is about to be counted."""
        words = self._words
        if words[_COUNTED] != unique:
            words[_COUNTING] = 0
            words[_COUNTED] = unique
        # One word, so that a death leaves both or neither.
        words[_COUNTING] = (item + 1) << 32 | before & _LOW

    def noted_count(self, unique: int) -> tuple[int, int]:
        """The last item that was noted of a request, and how it was before; item -1 if there is none."""
        counting = self._words[_COUNTING] if self._words[_COUNTED] == unique else 0
        return (counting >> 32) - 1, counting & _LOW

    # -- read by the supervisor and by successors -----------------------------------------------

    @property
    def answered(self) -> int:
        """Requests that the request plane has dealt with since the mount."""
        return self._words[_ANSWERED]

    @property
    def work(self) -> int:
        """Steps of long work so far."""
        return self._words[_WORK]

    @property
    def beats(self) -> int:
        """Signs of life of the control plane so far."""
        return self._words[_BEAT]

    @property
    def at_libfuse(self) -> int:
        """Requests that libfuse has and has not answered; a successor starts from nothing."""
        return self._words[_RELAYED] - self._words[_RETURNED]

    @property
    def in_hand(self) -> int:
        """The unique of the request that was read last and is not answered yet, or 0."""
        unique = self._unique
        return 0 if unique == self._words[_LAST] else unique & ~abi.UNIQUE_RESEND

    @property
    def _unique(self) -> int:
        return int.from_bytes(self.buffer[_UNIQUE_OFFSET : _UNIQUE_OFFSET + 8], "little")

    @property
    def log_level(self) -> int | None:
        """The log level, as a syslog priority, that was set while mounted; nothing if none was."""
        kept = self._words[_LOG_LEVEL]
        return kept - 1 if kept else None

    @property
    def poison(self) -> int:
        """A unique that has killed two workers and is to be answered with EIO; 0: none."""
        return self._words[_POISON]

    @poison.setter
    def poison(self, unique: int) -> None:
        self._words[_POISON] = unique

    @property
    def takeovers(self) -> int:
        """How often a successor has taken the place of a worker."""
        return self._words[_TAKEOVERS]

    def taken_over(self) -> None:
        """One more worker is being replaced. The request that it had in hand is now one of those that are held: the
        next worker has not read it yet, and if it dies before it does, that was not the request's doing."""
        words = self._words
        words[_TAKEOVERS] += 1
        words[_RECOVERING] = 1
        if self.in_hand:
            words[_LEFT] = unique = self._unique
            place = next((place for place in range(_HELD_AT, _HELD_AT + _HELD) if words[place] in (0, unique)), 0)
            if place:
                words[place] = unique
        self.buffer[_UNIQUE_OFFSET : _UNIQUE_OFFSET + 8] = bytes(8)
        words[_LAST] = 0

    @property
    def left(self) -> int:
        """The unique of the request in the buffer, as the kernel wrote it, if a dead worker had it in hand; or 0."""
        return self._words[_LEFT]

    def finished(self) -> None:
        """What can be done about that request before others are read is done."""
        self._words[_LEFT] = 0

    def recovered(self) -> None:
        """What the worker before had in hand has been asked for again, or has been answered."""
        self._words[_RECOVERING] = 0

    @property
    def recovering(self) -> bool:
        """Whether a worker that takes over has not come so far as to see to what the dead one had in hand."""
        return bool(self._words[_RECOVERING])

    @property
    def held(self) -> set[int]:
        """The uniques of the requests that others than the request plane have and have not answered: libfuse, threads,
        and workers that are dead."""
        return {unique for unique in self._words[_HELD_AT : _HELD_AT + _HELD] if unique}

    def forget_held(self) -> None:
        """The kernel sends again what a dead worker had, so nobody needs to know of it. Before requests are served."""
        for place in range(_HELD_AT, _HELD_AT + _HELD):
            self._words[place] = 0

    def abandon(self) -> set[int]:
        """What dead workers had in hand, all of it, which nobody will finish: the uniques as the kernel wrote them."""
        lost = self.held
        self.forget_held()
        return lost

    def failed(self, count: int) -> None:
        """So many requests of a dead worker have ended with EIO."""
        self._words[_FAILED] += count

    @property
    def failed_at_takeover(self) -> int:
        """Requests that ended with EIO because their worker died, on a kernel that cannot send them again."""
        return self._words[_FAILED]

    def let_go_of_metadata(self) -> None:
        """No worker needs the mount's own files any more: nobody can make a file on the mount, or will."""
        self._words[_LET_GO] = 1

    @property
    def metadata_let_go(self) -> bool:
        """Whether the worker has let go of the mount's own files."""
        return bool(self._words[_LET_GO])

    def note_pushed(self, slot: int) -> None:
        """The kernel has taken a further device in this slot."""
        self._words[_PUSHED] |= 1 << slot

    def pushed(self, slot: int) -> bool:
        """Whether the kernel has a further device in this slot; at most 64 there are (protocol 1.2)."""
        return bool(self._words[_PUSHED] >> slot & 1)

    def forget_libfuse(self) -> None:
        """A new session of libfuse has nothing in hand."""
        self._words[_RETURNED] = self._words[_RELAYED]


@dataclass(frozen=True, slots=True)
class Session:
    """One connection to the kernel as the supervisor holds it and every worker inherits it."""

    fuse: int
    """The descriptor of /dev/fuse."""
    libfuse_end: socket.socket
    our_end: socket.socket
    max_write: int
    """The most bytes of a READ or WRITE: what one message to libfuse has room for (decisions 17)."""
    record: SessionRecord
    namespace: int
    """The memfd that the namespace lies in."""

    @classmethod
    def create(cls, fuse: int) -> Self:
        """A new session on `fuse`. To be made while CAP_NET_ADMIN is there, which large socket buffers need."""
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        max_write = MAX_WRITE
        for end in pair:
            try:
                for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
                    end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
            except PermissionError:
                max_write = _SMALL_MAX_WRITE
                log.debug("CAP_NET_ADMIN is missing: requests are limited to %d bytes", max_write)
        namespace = os.memfd_create("famfs-namespace", os.MFD_CLOEXEC)
        return cls(fuse, *pair, max_write, SessionRecord.create(), namespace)

    def drain(self) -> None:
        """Throw away what a dead worker left between itself and libfuse; the kernel sends it again."""
        for end in (self.libfuse_end, self.our_end):
            try:
                while end.recv(1, socket.MSG_DONTWAIT):
                    pass
            except BlockingIOError:
                continue
        self.record.forget_libfuse()
