# SPDX-License-Identifier: Apache-2.0
"""Compares two kernels call by call: what programs get, and what the server is asked (`test_agreement`)."""

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence

from famfs_server.volume.namespace import META
from tests.fmap.request_trace import FORGET, INVAL_ENTRY, Request, Traced
from tests.fmap.sides import Played, Real, Side

SECONDS = 10.0
"""How long is waited for what the kernel does in the background."""

ATTRIBUTES = "GETATTR"
"""Left out on both sides. The running kernel asks when attributes have expired, which those of new files do after a
second, or when a call of its own has changed them; the fake one caches none, and asks once more to check sizes."""

BACKGROUND = frozenset({"RELEASE", FORGET, INVAL_ENTRY})
"""Counted, and not compared in their order, since no caller waits for them. RELEASE of new space comes when the worker
has let go of it, FORGET when the last user of an inode is gone, whichever process that is, and the notifications of the
server come through a process of its own. FORGET is counted by nodeid and number of lookups."""


CHANCE = Request(INVAL_ENTRY, (META,))
"""Left out on both sides: a worker that takes over tells of the files of new space that its predecessor has left, among
them those of which that one had not yet read the FORGET when it was killed."""


class Asked:
    """Requests: those made for the program, whose pid is given, those for the server's processes, and the rest."""

    def __init__(self, traced: Sequence[Traced], program: int) -> None:
        self.background = Counter(request for _, request in traced if request.name in BACKGROUND)
        del self.background[CHANCE]
        ordered = [row for row in traced if row.request.name not in (ATTRIBUTES, *BACKGROUND)]
        self.all = [request for _, request in ordered]
        self.program = [request for pid, request in ordered if pid == program]
        self.server = [request for pid, request in ordered if pid != program]


class Agreement:
    """Two sides, and by how much the running kernel is ahead in the background."""

    def __init__(self, real: Real, played: Played) -> None:
        self.real, self.played = real, played
        self.calls: list[str] = []
        self._ahead: Counter[Request] = Counter()

    def mounted(self) -> None:
        """Compare what was asked until both were mounted. The order tells who asks: there are no programs yet."""
        self.calls.append("mount")
        wanted, seen = self._take()
        self._compare("requests", seen.all, wanted.all)
        self._await_background()

    def call(self, what: str, act: Callable[[Side], object]) -> object:
        """Make a call on both sides. What comes of it: a result, or the name of an errno."""
        self.calls.append(what)
        try:
            # The fake kernel first: it knows when the server owes it a notification, and waits for that.
            expected = outcome(lambda: act(self.played))
        except AssertionError as error:
            error.add_note(self._report(f"on the twin, whose server says:\n{self.played.twin.log()}"))
            raise
        self.calls[-1] += f" -> {str(expected)[:60]}"
        found = outcome(lambda: act(self.real))
        wanted, seen = self._take()
        assert found == expected, self._report(f"{str(found)[:200]}, and on the twin {str(expected)[:200]}")
        self._compare("requests", seen.program, wanted.program)
        self._compare("requests of the server itself", seen.server, wanted.server)
        self._await_background()
        return expected

    def last_call(self, what: str, act: Callable[[Side], object]) -> None:
        """The call upon which the file system ends. What the kernel forgets then is not the twin's matter: nobody
        unmounts that."""
        self.calls.append(what)
        act(self.played)
        act(self.real)
        wanted, seen = self._take()
        self._compare("requests", seen.program, wanted.program)

    def _take(self) -> tuple[Asked, Asked]:
        """What the twin and the running kernel have asked since the last call."""
        wanted, seen = Asked(self.played.requests(), 0), Asked(self.real.requests(), os.getpid())
        self._ahead.update(seen.background)
        self._ahead.subtract(wanted.background)
        return wanted, seen

    def _await_background(self) -> None:
        deadline = time.monotonic() + SECONDS
        while any(self._ahead.values()):
            assert time.monotonic() < deadline, self._report(
                "in the background the kernel is ahead of the twin by\n  "
                + " ".join(f"{count} {shown(request)}" for request, count in self._ahead.items() if count)
            )
            time.sleep(0.001)
            late = Asked(self.real.requests(), os.getpid())
            self._compare("late requests", late.all, [])
            self._ahead.update(late.background)

    def _compare(self, what: str, seen: Sequence[Request], wanted: Sequence[Request]) -> None:
        assert seen == wanted, self._report(
            f"{what}:\n  kernel {' '.join(map(shown, seen))}\n  twin   {' '.join(map(shown, wanted))}"
        )

    def _report(self, difference: str) -> str:
        return "\n".join([difference, f"after {len(self.calls)} calls, the last of which are:", *self.calls[-40:]])


def outcome(act: Callable[[], object]) -> object:
    """The result, or the name of the errno."""
    try:
        return act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def shown(request: Request) -> str:
    """A request in short."""
    return f"{request.name}{request.detail}"
