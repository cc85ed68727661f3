# SPDX-License-Identifier: Apache-2.0
"""A thread that uses one file of a mount all the while, and what it may notice of the death of those who serve it."""

import errno
import os
import re
import threading
import time
from pathlib import Path
from typing import Self

from programs import SECONDS


def kernel_sends_again() -> bool:
    """Whether this kernel has FUSE_NOTIFY_RESEND (docs/reliability.md)."""
    series = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert series is not None
    return (int(series[1]), int(series[2])) >= (6, 9)


class FileLoad:
    """A thread that writes and reads a file until it is told to stop; `errors` are names of errno, and "wrong"."""

    BLOCK = 64 << 10

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.rounds = 0
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        with self._path.open("r+b", buffering=0) as file:
            while not self._stop.is_set():
                data = (self.rounds + 1).to_bytes(8, "little") * (self.BLOCK // 8)
                try:
                    os.pwrite(file.fileno(), data, self.BLOCK)
                    if os.pread(file.fileno(), self.BLOCK, self.BLOCK) != data:
                        self.errors.append("wrong")
                except OSError as error:
                    self.errors.append(errno.errorcode[error.errno or 0])
                    time.sleep(0.05)
                else:
                    self.rounds += 1

    def wait_for(self, rounds: int) -> None:
        """Wait until so many more rounds have gone well."""
        goal, deadline = self.rounds + rounds, time.monotonic() + SECONDS
        while self.rounds < goal:
            assert time.monotonic() < deadline, (self.rounds, self.errors[-3:])
            time.sleep(0.05)
