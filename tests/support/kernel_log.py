# SPDX-License-Identifier: Apache-2.0
"""What the kernel says while a test runs: lines of /dev/kmsg that tell of a fault in it."""

import os
import re

ALARM = re.compile(
    r"WARNING:|BUG:|Oops|general protection|blocked for more than|Call Trace|rcu.*stall|refcount_t|Kernel panic|"
    r"stack-protector|list_(add|del) corruption|use-after-free|soft lockup"
)
_RECORD = 8192


class KernelLog:
    """A place in the kernel's log, which goes on from where it was last read."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> list[str]:
        """What has come since the last call."""
        found: list[str] = []
        while True:
            try:
                record = os.read(self._fd, _RECORD)
            except BlockingIOError:
                return found
            except BrokenPipeError:
                # Records were overwritten before they were read.
                continue
            found.append(record.decode(errors="replace").partition(";")[2].partition("\n")[0])

    def alarms(self) -> list[str]:
        """Those of `lines` from the first one on that tells of a fault."""
        lines = self.lines()
        for number, line in enumerate(lines):
            if ALARM.search(line):
                return lines[number : number + 40]
        return []

    def close(self) -> None:
        """Give it back."""
        os.close(self._fd)
