# SPDX-License-Identifier: Apache-2.0
"""The children of a process that has one thread: signals, starting, waiting, ending."""

import contextlib
import logging
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import prctl

log = logging.getLogger(__name__)

STOP = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""The signals that ask for the end."""
_CAUGHT = (*STOP, signal.SIGCHLD)
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Happened:
    """What has come while a process waited."""

    signals: frozenset[int]
    ended: dict[int, int]
    """The children that have ended, with their exit statuses; minus a signal's number."""
    readable: frozenset[int]
    """Those of the descriptors waited for that can be read."""

    @property
    def stop(self) -> bool:
        """Whether a signal asks for the end."""
        return bool(self.signals & STOP)


@dataclass(slots=True)
class Processes:
    """The children of this process, and the signals that it gets. One for a process, from its first thread."""

    close_in_children: list[int] = field(default_factory=list)
    """Descriptors that no child may keep."""
    _selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    _wakeup: socket.socket | None = None
    _children: dict[int, str] = field(default_factory=dict)
    _staying: set[int] = field(default_factory=set)

    def catch_signals(self) -> None:
        """From now on signals wake `wait` and do nothing else."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._wakeup = ours
        self.close_in_children += [ours.fileno(), theirs.fileno()]
        signal.set_wakeup_fd(theirs.detach())
        for number in _CAUGHT:
            signal.signal(number, lambda _number, _frame: None)
        self._selector.register(ours, selectors.EVENT_READ)
        self.let_signals_come()

    def hold_back_signals(self) -> None:
        """Leave signals, and ends of children, to the program that this process executes next."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
        assert self._wakeup is not None
        with contextlib.suppress(BlockingIOError):
            for number in STOP & set(self._wakeup.recv(4096)):
                os.kill(os.getpid(), number)

    def let_signals_come(self) -> None:
        """Take signals that were held back, and later ones."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _CAUGHT)

    def adopt(self, name: str, pid: int, *, stays: bool = False) -> None:
        """Take on a child of the program that was executed in this process before."""
        self._children[pid] = name
        if stays:
            self._staying.add(pid)

    def fork(self, name: str, child: Callable[[], int], *, stays: bool = False) -> int:
        """Start a child whose exit status is what `child` returns; its pid.

        It is killed when this process ends, unless it `stays`.
        """
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._children[pid] = name
            if stays:
                self._staying.add(pid)
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _CAUGHT:
                signal.signal(number, signal.SIG_DFL)
            for descriptor in self.close_in_children:
                os.close(descriptor)
            prctl.set_pdeathsig(0 if stays else signal.SIGKILL)
            if os.getppid() == parent or stays:
                status = child()
        except BaseException:
            log.exception("%s fails", name)
        finally:
            logging.shutdown()
            os._exit(status)

    def wait(self, *descriptors: int, timeout: float | None = None) -> Happened:
        """Wait for a signal, the end of a child, or one of `descriptors` to become readable; at most `timeout` seconds.

        The end of each child is told once.
        """
        for descriptor in descriptors:
            self._selector.register(descriptor, selectors.EVENT_READ)
        try:
            events = self._selector.select(timeout)
        finally:
            for descriptor in descriptors:
                self._selector.unregister(descriptor)
        signals: set[int] = set()
        readable: set[int] = set()
        for key, _ in events:
            if key.fileobj is self._wakeup and self._wakeup is not None:
                signals.update(self._wakeup.recv(4096))
            elif key.data is not None:
                if not key.data():
                    self._selector.unregister(key.fileobj)
            else:
                readable.add(key.fd)
        ended = self._collect()
        if ended and descriptors:
            # What a child said before it died may have come only while somebody who listens was busy.
            readable.update(select.select(descriptors, [], [], 0)[0])
        return Happened(frozenset(signals), ended, frozenset(readable))

    def during(self, seconds: float, *descriptors: int) -> Iterator[Happened]:
        """`wait` again and again, until so much time is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            yield self.wait(*descriptors, timeout=left)

    def listen(self, source: socket.socket, handle: Callable[[], bool]) -> None:
        """Have every `wait` call `handle` when `source` becomes readable, until it says False."""
        self._selector.register(source, selectors.EVENT_READ, handle)

    def ignore(self, source: socket.socket) -> None:
        """Listen to `source` no more, if anybody did."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def _collect(self) -> dict[int, int]:
        ended: dict[int, int] = {}
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in self._children:
                del self._children[pid]
                self._staying.discard(pid)
                ended[pid] = os.waitstatus_to_exitcode(status)
        return ended

    def kill(self, pid: int) -> None:
        """Kill a child that may have ended, but has not been told of."""
        if pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of the children, which can be nothing that still serves; those that stay end by
        themselves."""
        deadline = time.monotonic() + _END_SECONDS
        while self._children and time.monotonic() < deadline:
            self.wait(timeout=0.2)
            for pid in self._children.keys() - self._staying:
                os.kill(pid, signal.SIGKILL)
