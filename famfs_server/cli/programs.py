# SPDX-License-Identifier: Apache-2.0
"""Where the installed programs begin. Nothing is imported here that takes time: whoever is interrupted before the
program has begun ends silently, as it does later."""

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130


def famfs() -> NoReturn:
    """The program `famfs`."""
    _run("famfs")


def fsck() -> NoReturn:
    """The program `fsck.famfs`."""
    _run("fsck")


def fused() -> NoReturn:
    """The program `famfs_fused`."""
    _run("fused")


def mkfs() -> NoReturn:
    """The program `mkfs.famfs`."""
    _run("mkfs")


def mount() -> NoReturn:
    """The program `mount.famfs`."""
    _run("mount")


def pcq() -> NoReturn:
    """The program `pcq`."""
    _run("pcq")


def server() -> NoReturn:
    """The program `famfs-server`."""
    _run("server")


def umount() -> NoReturn:
    """The program `umount.famfs`."""
    _run("umount")


def unit() -> NoReturn:
    """The program `famfs-unit`."""
    _run("unit")


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
