# SPDX-License-Identifier: Apache-2.0
"""Where a daemon's log lines go: the journal with fields, syslog, or standard error; and the last ones, for status.

None of them may hold up a file system: what the reader of the log does not take at once is lost, and counted.
"""

import logging
import os
import queue
import select
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

PROGRAM = "famfs-server"
JOURNAL = "/run/systemd/journal/socket"
SYSLOG = "/dev/log"
_KEPT = 20
_DAEMON = 3 << 3
"""The syslog facility."""
_LONGEST = 1 << 16
"""Bytes of a message: a datagram has room for more, but nobody reads it."""

_PATIENCE_SECONDS = 0.05
"""How long a line may keep its thread where a disk is slow; those that come meanwhile are lost."""

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the log. `time` in seconds since 1970."""

    time: float
    level: str
    message: str


class Recent(logging.Handler):
    """Keeps the last warnings and errors of this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[Line] = deque(maxlen=_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self._lines.append(Line(record.created, record.levelname.lower(), record.getMessage()))

    def lines(self) -> list[Line]:
        """What is kept, oldest first."""
        return list(self._lines)


RECENT = Recent()
"""The process's own; workers inherit what the supervisor had to say when they were started."""


class _Sender(logging.Handler):
    """Hands lines to somebody who may not keep up."""

    lost = 0
    """Lines that nobody took, in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(f"{PROGRAM}[%(process)d]: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send one; a line that is not taken at once is lost."""
        try:
            self.send(record)
        except OSError:
            _Sender.lost += 1

    def send(self, record: logging.LogRecord) -> None:
        """Send one. Raises OSError rather than wait."""
        raise NotImplementedError


class _Scribe:
    """A thread that writes to standard error, so that a slow disk holds up nobody else."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._free = threading.Event()
        self._free.set()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def write(self, data: bytes) -> None:
        """Write a line, and wait for that, but not for long. Raises BlockingIOError while another one takes longer."""
        if not self._free.is_set():
            raise BlockingIOError
        self._free.clear()
        self._lines.put(data)
        self._free.wait(_PATIENCE_SECONDS)

    def _work(self) -> None:
        while True:
            data = self._lines.get()
            try:
                os.write(2, data)
            except OSError:
                _Sender.lost += 1
            self._free.set()


class StderrHandler(_Sender):
    """Writes to standard error, which may be a pipe that nobody reads, a terminal that is held, or on a slow disk."""

    scribe: _Scribe | None = None
    """Writes to files, in processes that may have threads."""

    def send(self, record: logging.LogRecord) -> None:
        """Write a line."""
        data = (self.format(record) + "\n").encode("utf-8", "surrogateescape")
        if stat.S_ISREG(os.fstat(2).st_mode):
            # Never waits for a reader, and has one position for all who write to it.
            if self.scribe is None:
                os.write(2, data)
            else:
                self.scribe.write(data)
            return
        # By an open file of our own: whether writing waits is a property of the open file, which we share with the
        # caller. Opened each time, because a daemon exchanges its standard error.
        try:
            descriptor = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            # A socket, or there are no descriptors left.
            _write_if_taken(2, data)
            return
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


class SyslogHandler(_Sender):
    """Sends to the system's log."""

    def __init__(self, path: str = SYSLOG) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def send(self, record: logging.LogRecord) -> None:
        """Send a datagram: to the path, so that a log that was started again gets it too."""
        line = self.format(record).encode("utf-8", "surrogateescape")[:_LONGEST]
        header = f"<{_DAEMON | _priority(record.levelno)}>".encode()
        self._socket.sendto(header + line, socket.MSG_DONTWAIT, self._path)


class JournalHandler(_Sender):
    """Sends records to the journal by its own protocol, with fields of ours beside the usual ones."""

    def __init__(self, fields: dict[str, str], path: str = JOURNAL) -> None:
        """`fields` go with every line."""
        super().__init__()
        self.setFormatter(None)
        self.fields = fields
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def send(self, record: logging.LogRecord) -> None:
        """Send a datagram."""
        self._socket.sendto(b"".join(self._encode(record)), socket.MSG_DONTWAIT, self._path)

    def _encode(self, record: logging.LogRecord) -> Iterator[bytes]:
        message = self.format(record).encode("utf-8", "surrogateescape")[:_LONGEST]
        values = {
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": PROGRAM,
            "SYSLOG_FACILITY": "3",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            **self.fields,
        }
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno:
            values["ERRNO"] = str(error.errno)
        yield b"MESSAGE\n" + struct.pack("<Q", len(message)) + message + b"\n"
        for name, value in values.items():
            data = value.encode("utf-8", "surrogateescape")
            yield name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _write_if_taken(descriptor: int, data: bytes) -> None:
    """Write, or raise BlockingIOError where that would wait."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    if [event for _, event in waiting.poll(0)] != [select.POLLOUT]:
        raise BlockingIOError
    os.write(descriptor, data)


def lines_lost() -> int:
    """How many lines of this process nobody took."""
    return _Sender.lost


def _priority(level: int) -> int:
    """The syslog priority of a level of the module `logging`."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


def set_up(level: int, fields: dict[str, str], *, background: bool) -> None:
    """Send the daemon's lines to where they are looked for, from `level` on as the module `logging` counts.

    From the background to the journal, else to syslog, else to standard error; in the foreground to standard error,
    unless that is the journal anyway. `fields` say in the journal which mount is meant.
    """
    root = logging.getLogger("famfs_server")
    journal = os.path.exists(JOURNAL) and (background or _stderr_is_journal())
    # A command that has set up logging of its own says it once more: wanted on a terminal beside the system's log only.
    root.propagate = background and (journal or os.path.exists(SYSLOG))
    handler: logging.Handler
    if journal:
        handler = JournalHandler(fields)
    elif root.propagate:
        handler = SyslogHandler()
    else:
        handler = StderrHandler()
    root.handlers[:] = [handler, RECENT]
    root.setLevel(level)
    # trio says when it can accept nobody for want of descriptors.
    library = logging.getLogger("trio")
    library.handlers[:] = [handler, RECENT]
    library.propagate = False


def wait_for_no_disk() -> None:
    """From now on this process waits for no disk where its log is a file. It starts a thread, and must not fork."""
    for handler in logging.getLogger("famfs_server").handlers:
        if isinstance(handler, StderrHandler):
            handler.scribe = _Scribe()


def add_field(name: str, value: str) -> None:
    """Have the journal show one more field on each line from now on."""
    for handler in logging.getLogger("famfs_server").handlers:
        if isinstance(handler, JournalHandler):
            handler.fields[name] = value


def _stderr_is_journal() -> bool:
    """Whether a service manager has connected standard error to the journal; it says so in the environment."""
    found = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
