# SPDX-License-Identifier: Apache-2.0
"""Where the installed programs begin. Nothing is imported here that takes time: whoever is interrupted before the
program has begun ends silently, as it does later."""

import importlib
import os
import signal
import sys
from functools import partial
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130


def _run(module: str) -> NoReturn:
    """Import a program and run it."""
    # One that was started with the signal ignored, as a shell does in the background, goes on ignoring it.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _end)
    main = importlib.import_module(f"famfs_server.cli.{module}").main
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # No exception: whatever is being imported may catch one.
    os._exit(_INTERRUPTED)


famfs = partial(_run, "famfs")
fsck = partial(_run, "fsck")
fused = partial(_run, "fused")
mkfs = partial(_run, "mkfs")
mount = partial(_run, "mount")
pcq = partial(_run, "pcq")
server = partial(_run, "server")
umount = partial(_run, "umount")
unit = partial(_run, "unit")
