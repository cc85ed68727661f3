# SPDX-License-Identifier: Apache-2.0
"""Whether a worker lives, and when there is no point in starting another one (decisions 16)."""

import select
import time

from famfs_server.fuse import abi
from famfs_server.fuse.session import Session, SessionRecord

HUNG_SECONDS = 5.0
"""A worker that has requests and moves none of them for so long is killed and replaced (decisions 16)."""
MAX_DEATHS = 5
DOUBTFUL_DEATHS = 4
"""At so many deaths in a row a request must have been there before it is blamed for them, where there is doubt: one of
several that libfuse or threads had, or workers that somebody has killed."""
SOON_SECONDS = 10.0
"""A worker that has lived longer than this did not die of what it began with, though it has not served yet."""


class Deaths:
    """Decides when to give up: after deaths in a row that show no progress (decisions 16).

    A crash loop is told from somebody who kills: in the one, workers die before they have begun to serve, or each with
    the same request in hand; a worker that had begun well and dies with nothing in hand says nothing about the next.
    """

    def __init__(self, record: SessionRecord) -> None:
        self._record = record
        self._in_hand = 0
        self._in_a_row = 0
        self._there: dict[int, int] = {}
        self.begin()

    def begin(self) -> None:
        """A worker starts."""
        self._started = time.monotonic()
        self._answered, self._beats = self._record.answered, self._record.beats

    def another(self, *, from_outside: bool = False) -> bool:
        """A worker has died; whether that was one too many.

        A request that was in hand at this death and the one before becomes the poison that the next worker answers
        with EIO. Where somebody else has killed the worker, or libfuse or a thread had the request, it takes more.
        To be called before the record is told of the takeover.
        """
        record = self._record
        in_hand = record.in_hand
        same = in_hand != 0 and in_hand == self._in_hand
        # A worker that had not come so far as to ask for what its predecessor left did not die of it.
        if not record.recovering:
            self._in_hand = in_hand
            there = {in_hand, *(unique & ~abi.UNIQUE_RESEND for unique in record.held)} - {0}
            self._there = {unique: self._there.get(unique, 0) + 1 for unique in sorted(there)}
        if same and not from_outside:
            record.poison = in_hand
        elif fatal := [unique for unique, deaths in self._there.items() if deaths >= DOUBTFUL_DEATHS]:
            record.poison = fatal[0]
        began = record.answered != self._answered or record.beats != self._beats
        failed = not began and time.monotonic() - self._started < SOON_SECONDS
        self._in_a_row = self._in_a_row + 1 if same or failed else 0
        return self._in_a_row >= MAX_DEATHS


class Pulse:
    """Notices a worker that lives and does not work: requests wait, and nothing has moved for a while."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending = select.poll()
        self._pending.register(session.fuse, select.POLLIN)
        self.begin()

    def begin(self) -> None:
        """A worker starts, or has just moved."""
        self._moved = time.monotonic()
        self._seen = self._progress()

    def lost(self) -> bool:
        """Whether the worker must be replaced."""
        progress = self._progress()
        if progress != self._seen or not self._waiting():
            self._moved = time.monotonic()
            self._seen = progress
        return time.monotonic() - self._moved > HUNG_SECONDS

    def _progress(self) -> tuple[int, ...]:
        record = self._session.record
        if record.at_libfuse:
            return record.answered, record.work, record.at_libfuse, record.beats
        return record.answered, record.work

    def _waiting(self) -> bool:
        record = self._session.record
        readable = any(event & select.POLLIN for _, event in self._pending.poll(0))
        return readable or record.in_hand != 0 or record.at_libfuse > 0 or bool(record.recovering and record.held)


class Beat:
    """Notices a control plane that gives no sign of life any more."""

    def __init__(self, record: SessionRecord) -> None:
        self._record = record
        self._seen = -1
        self._changed = 0.0

    @property
    def steady(self) -> bool:
        """Whether there was one lately."""
        if (beats := self._record.beats) != self._seen:
            self._seen, self._changed = beats, time.monotonic()
        return time.monotonic() - self._changed < HUNG_SECONDS
