# SPDX-License-Identifier: Apache-2.0
"""Runs a fuzzer: numbered cases in several processes, each case from a seed of its own, until a time or count is up.

A case that raises, hangs or kills its process is told by its number, and `python -m tests.fuzz NAME --seed S --case N`
runs it alone. So nothing needs to be kept of the cases that went well.
"""

import json
import mmap
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

CASE_SECONDS = 20
"""Far more than any case takes on a busy machine; one that is not done then hangs."""
_GRACE = 60


class Fuzzer(Protocol):
    """What is fuzzed."""

    def case(self, rng: random.Random) -> Mapping[str, int]:
        """Try one random input and check what came of it; what was done, as counts."""

    def close(self) -> None:
        """Check what can only be seen at the end, and clean up."""


class HungError(Exception):
    """A case did not end."""


@dataclass
class Summary:
    """What a run came to."""

    name: str
    seed: int
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items()))
        return f"{self.name}: seed {self.seed}, {self.seconds:.0f} s: {done}; {len(self.findings)} findings"


def case_rng(name: str, seed: int, number: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{name} {seed} {number}")


def run(
    name: str,
    make: Callable[[], Fuzzer],
    seed: int,
    *,
    seconds: float = 0.0,
    cases: int = 0,
    processes: int = 1,
) -> Summary:
    """Run cases for so many seconds, or so many of them; each process makes a fuzzer of its own and stops at its first
    finding."""
    summary = Summary(name, seed)
    start = time.monotonic()
    running = [_Child(name, make, seed, seconds, cases, first, processes) for first in range(processes)]
    for child in running:
        counts, finding = child.outcome()
        summary.counts.update(counts)
        if finding:
            summary.findings.append(finding)
    summary.seconds = time.monotonic() - start
    return summary


class _Child:
    """A process that runs every n-th case."""

    def __init__(
        self, name: str, make: Callable[[], Fuzzer], seed: int, seconds: float, cases: int, first: int, step: int
    ) -> None:
        self._name, self._seed = name, seed
        # The number of the case at hand, for when the process dies of it.
        self._at = mmap.mmap(-1, mmap.PAGESIZE)
        hear, speak = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(hear)
            outcome = self._work(make, seconds, cases, first, step)
            with os.fdopen(speak, "w") as pipe:
                json.dump(outcome, pipe)
            os._exit(0)
        os.close(speak)
        self._hear = hear

    def _work(
        self, make: Callable[[], Fuzzer], seconds: float, cases: int, first: int, step: int
    ) -> tuple[dict[str, int], str]:
        counts: Counter[str] = Counter()
        signal.signal(signal.SIGALRM, _hung)
        number = first
        try:
            fuzzer = make()
            deadline = time.monotonic() + seconds
            while number < cases if cases else time.monotonic() < deadline:
                self._at[:8] = number.to_bytes(8, "little")
                signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
                counts.update(fuzzer.case(case_rng(self._name, self._seed, number)))
                signal.setitimer(signal.ITIMER_REAL, 0)
                counts["cases"] += 1
                number += step
            signal.setitimer(signal.ITIMER_REAL, _GRACE)
            fuzzer.close()
        except BaseException:
            return dict(counts), self._finding(number, traceback.format_exc())
        return dict(counts), ""

    def _finding(self, number: int, what: str) -> str:
        again = f"python -m tests.fuzz {self._name} --seed {self._seed} --case {number}"
        return f"case {number} (alone: {again})\n{what}"

    def outcome(self) -> tuple[dict[str, int], str]:
        """Wait for the end: what was counted, and what was found."""
        with os.fdopen(self._hear) as pipe:
            text = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        if text:
            counts, finding = json.loads(text)
            return counts, finding
        number = int.from_bytes(self._at[:8], "little")
        return {}, self._finding(number, f"the process ended with {os.waitstatus_to_exitcode(status)}")


def _hung(number: int, frame: FrameType | None) -> None:
    raise HungError(f"no end after {CASE_SECONDS} s")
