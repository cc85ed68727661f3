# SPDX-License-Identifier: Apache-2.0
"""A sampling profiler for code that runs in the main thread.

A timer of the process's CPU time interrupts it; the interpreter notes function and line at the next bytecode, so the
time of a call into C, a system call above all, counts for the line that called. A thread that looks at the others from
time to time would see them only where they give up the interpreter lock, which is in their system calls.
"""

import linecache
import os
import signal
from collections import Counter
from types import CodeType, FrameType
from typing import Any

INTERVAL = 0.001
"""Seconds of CPU time between samples; kernels without high resolution timers take fewer."""


class Sampler:
    """Counts where the main thread is. `start` and `stop` from that thread."""

    def __init__(self) -> None:
        self._lines: Counter[tuple[CodeType, int]] = Counter()
        self._inclusive: Counter[CodeType] = Counter()
        self.samples = 0

    def start(self) -> None:
        """Begin to sample."""
        self._times = os.times()
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)

    def stop(self) -> None:
        """End."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        now = os.times()
        self._user, self._system = now.user - self._times.user, now.system - self._times.system

    def _sample(self, number: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self.samples += 1
        self._lines[frame.f_code, frame.f_lineno] += 1
        seen: set[CodeType] = set()
        while frame is not None:
            seen.add(frame.f_code)
            frame = frame.f_back
        self._inclusive.update(seen)

    def as_json(self) -> dict[str, Any]:
        """Shares of all samples: by function with what it calls and without, and by line."""
        alone: Counter[CodeType] = Counter()
        for (code, _), count in self._lines.items():
            alone[code] += count
        total = max(self.samples, 1)
        return {
            "samples": self.samples,
            "user": self._user,
            "system": self._system,
            "functions": [
                {
                    "name": f"{os.path.basename(code.co_filename)}:{code.co_qualname}",
                    "alone": alone[code] / total,
                    "inclusive": count / total,
                }
                for code, count in self._inclusive.most_common(25)
            ],
            "lines": [
                {
                    "place": f"{os.path.basename(code.co_filename)}:{line}",
                    "share": count / total,
                    "text": linecache.getline(code.co_filename, line).strip(),
                }
                for (code, line), count in self._lines.most_common(25)
            ],
        }
