# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal, for work that takes long enough to be looked at."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG_WORK = 256 << 20
"""Bytes from which on a bar is worth its lines."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with each number of bytes done, from any thread."""
    if total < LONG_WORK or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
