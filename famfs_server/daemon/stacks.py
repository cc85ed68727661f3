# SPDX-License-Identifier: Apache-2.0
"""SIGUSR1 makes a process of the daemon write down what all its threads are doing, even one that hangs."""

import faulthandler
import os
import signal
from pathlib import Path

FILE_NAME = "stacks"
"""In the mount's run-time directory."""


def dump_on_signal(directory: Path, *, background: bool) -> None:
    """From now on, in this process and its children: in the background into a file, else to standard error.

    Only SIGUSR1 is taken: `faulthandler.enable` would disarm the guard of device memory (dax/cacheline.py).
    """
    descriptor = 2
    if background:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / FILE_NAME, flags, 0o600)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)
