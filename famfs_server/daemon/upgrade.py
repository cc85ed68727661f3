# SPDX-License-Identifier: Apache-2.0
"""Giving a mount to the program that is installed now, while it is used (design 8).

The supervisor is asked for it on a socket of its own in the run-time directory. It first runs the installed program
beside itself, which only says whether it understands the running server's state; if it does not, or cannot even be
imported, nothing has changed. Then the supervisor executes it in its own place, so that process number, children, locks
and descriptors stay; the worker goes on serving until its successor is ready to start.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from famfs_server import __version__
from famfs_server.daemon import handover, local_socket
from famfs_server.daemon.processes import Happened, Processes
from famfs_server.daemon.upgrade_client import SUPERVISOR_SOCKET

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0
_LARGEST = 1 << 16


def program(task: str, document: int) -> list[str]:
    """The command that runs the program which is installed now at the place this one was started from."""
    return [sys.executable, "-P", "-m", "famfs_server.daemon.successor", task, str(document)]


@dataclass(slots=True)
class Asker:
    """Who has asked for an upgrade and waits for the outcome. May have gone."""

    connection: socket.socket

    def tell(self, **outcome: Any) -> None:
        """The outcome, which is told once."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(outcome).encode())
        self.connection.close()


@dataclass(slots=True)
class Upgrades:
    """Takes requests for an upgrade, one at a time, and has the installed program checked first."""

    processes: Processes
    _listener: socket.socket | None
    """Nothing where there was no room for the socket: the mount is served all the same."""
    _asker: Asker | None = None
    _pid: int = 0
    _output: int = -1
    _said: bytearray = field(default_factory=bytearray)
    _deadline: float = 0.0

    @classmethod
    def listen(cls, processes: Processes, run_directory: Path) -> "Upgrades":
        """Listen in the run-time directory."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            (run_directory / SUPERVISOR_SOCKET).unlink(missing_ok=True)
            with local_socket.address(run_directory, SUPERVISOR_SOCKET) as address:
                listener.bind(address)
            (run_directory / SUPERVISOR_SOCKET).chmod(0o600)
            listener.listen(4)
        except OSError as error:
            listener.close()
            log.warning(
                "no socket for upgrades in %s: %s; a restart of the server makes one",
                run_directory,
                os.strerror(error.errno or errno.EIO),
            )
            return cls(processes, None)
        processes.close_in_children.append(listener.fileno())
        return cls(processes, listener)

    @property
    def descriptors(self) -> list[int]:
        """What to wait for."""
        waiting = [self._listener.fileno()] if self._listener else []
        if self._pid and self._output >= 0:
            waiting.append(self._output)
        return waiting

    def due(self, happened: Happened, held: handover.Held) -> Asker | None:
        """Go on with what has come; who is to be told when the mount is now to be given away."""
        if self._listener and self._listener.fileno() in happened.readable:
            self._accept(self._listener, held)
        if not self._pid:
            return None
        if self._output in happened.readable:
            self._hear()
        if self._pid in happened.ended:
            return self._checked(happened.ended[self._pid])
        if time.monotonic() > self._deadline:
            self.processes.kill(self._pid)
        return None

    def _accept(self, listener: socket.socket, held: handover.Held) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            log.debug("nobody asks: %s", error)
            return
        asker = Asker(connection)
        if local_socket.peer_uid(connection) not in (0, os.geteuid()):
            asker.tell(error="only root may have the server upgraded")
        elif self._pid:
            asker.tell(error="an upgrade is under way already")
        else:
            self._asker = asker
            self._start(held)

    def _start(self, held: handover.Held) -> None:
        """Run the installed program, for a judgement only."""
        document = handover.write(held.document(provisional=handover.provisional_files(held)))
        hear, speak = os.pipe()
        os.set_blocking(hear, False)

        def judge() -> NoReturn:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(speak, 1)
            os.dup2(speak, 2)
            os.set_inheritable(document, True)
            os.execv(sys.executable, program("check", document))

        self._pid = self.processes.fork("check", judge)
        os.close(speak)
        os.close(document)
        self._output, self._deadline = hear, time.monotonic() + CHECK_SECONDS
        self._said.clear()
        log.info("asked for an upgrade; the installed program is being checked")

    def _hear(self) -> None:
        try:
            data = os.read(self._output, _LARGEST)
        except BlockingIOError:
            return
        self._said += data[: _LARGEST - len(self._said)]
        if not data:
            os.close(self._output)
            self._output = -1

    def _checked(self, status: int) -> Asker | None:
        while self._output >= 0:
            before = len(self._said)
            self._hear()
            if len(self._said) == before and self._output >= 0:
                os.close(self._output)
                self._output = -1
        asker, self._asker, self._pid = self._asker, None, 0
        assert asker is not None
        if status == 0:
            return asker
        lines = self._said.decode("utf-8", "replace").strip().splitlines()
        cause = lines[-1] if lines else f"it ended with status {status}"
        line = f"the installed program cannot take over: {cause}; the running server {__version__} goes on"
        log.warning("%s", line)
        asker.tell(error=line)
        return None
