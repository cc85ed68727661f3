# SPDX-License-Identifier: Apache-2.0
"""Where a daemon's log lines go: the journal with fields, syslog, or standard error; and the last ones, for status."""

import logging
import logging.handlers
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

PROGRAM = "famfs-server"
JOURNAL = "/run/systemd/journal/socket"
SYSLOG = "/dev/log"
_KEPT = 20
_LONGEST = 1 << 16
"""Bytes of a message: a datagram has room for more, but nobody reads it."""

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


class JournalHandler(logging.Handler):
    """Sends records to the journal by its own protocol, with fields of ours beside the usual ones."""

    def __init__(self, fields: dict[str, str], path: str = JOURNAL) -> None:
        """`fields` go with every line."""
        super().__init__()
        self.fields = fields
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # A journal that does not keep up must not hold up a file system.
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one; a line that the journal does not take is lost."""
        try:
            self._socket.sendto(b"".join(self._encode(record)), self._path)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        """Nothing: there is nobody to tell."""

    def _encode(self, record: logging.LogRecord) -> Iterator[bytes]:
        message = self.format(record).encode("utf-8", "surrogateescape")[:_LONGEST]
        values = {
            "PRIORITY": str(next((number for level, number in _PRIORITIES if record.levelno >= level), 7)),
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


def set_up(level: int, fields: dict[str, str], *, background: bool) -> None:
    """Send the daemon's lines to where they are looked for, from `level` on as the module `logging` counts.

    From the background to the journal, else to syslog, else to standard error; in the foreground to standard error,
    unless that is the journal anyway. `fields` say in the journal which mount is meant.
    """
    root = logging.getLogger("famfs_server")
    handler: logging.Handler = logging.StreamHandler()
    journal = os.path.exists(JOURNAL) and (background or _stderr_is_journal())
    # A command that has set up logging of its own says it once more: wanted on a terminal beside the system's log only.
    root.propagate = background and (journal or os.path.exists(SYSLOG))
    if journal:
        handler = JournalHandler(fields)
    else:
        if root.propagate:
            handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter(f"{PROGRAM}[%(process)d]: %(message)s"))
    root.handlers[:] = [handler, RECENT]
    root.setLevel(level)


def add_field(name: str, value: str) -> None:
    """Have the journal show one more field on each line from now on."""
    for handler in logging.getLogger("famfs_server").handlers:
        if isinstance(handler, JournalHandler):
            handler.fields[name] = value


def _stderr_is_journal() -> bool:
    """Whether a service manager has connected standard error to the journal; it says so in the environment."""
    found = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
