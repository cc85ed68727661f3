# SPDX-License-Identifier: Apache-2.0
"""OPEN requests for a new file that somebody still has open, on a connection with extent maps.

They are refused, because the inode never gets a map. But the kernel sends RELEASE in the background, so that a program
which closes a file and opens it again can overtake its own close. So each waits for a moment: after the last close the
answer is ESTALE, upon which the kernel looks the name up again and finds the file under the nodeid of the log.
"""

import errno
import threading
import time
from collections.abc import Callable

SECONDS = 0.1
"""How long an OPEN waits for a RELEASE that is on its way; then it ends with EBUSY."""


class DelayedOpens:
    """The requests that wait, by nodeid. `answer(unique, errno)` ends one; it is called from two threads."""

    def __init__(self, answer: Callable[[int, int], None]) -> None:
        self._answer = answer
        self._waiting: dict[int, list[tuple[int, float]]] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def wait(self, nodeid: int, unique: int) -> None:
        """Answer a request later: when the file is closed, or with EBUSY."""
        with self._lock:
            self._waiting.setdefault(nodeid, []).append((unique, time.monotonic() + SECONDS))
            self._start_timer()

    def closed(self, nodeid: int) -> None:
        """Nobody has the file open any more: whoever waits for it is to look its name up again."""
        with self._lock:
            waiting = self._waiting.pop(nodeid, [])
        for unique, _ in waiting:
            self._answer(unique, errno.ESTALE)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(SECONDS, self._end_waits)
            self._timer.daemon = True
            self._timer.start()

    def _end_waits(self) -> None:
        overdue: list[int] = []
        with self._lock:
            now = time.monotonic()
            for nodeid, waiting in list(self._waiting.items()):
                overdue += [unique for unique, until in waiting if until <= now]
                left = [(unique, until) for unique, until in waiting if until > now]
                if left:
                    self._waiting[nodeid] = left
                else:
                    del self._waiting[nodeid]
            self._timer = None
            if self._waiting:
                self._start_timer()
        for unique in overdue:
            self._answer(unique, errno.EBUSY)
