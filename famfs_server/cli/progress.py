# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal, for work that turns out to take longer than a second."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

SHOWN_AFTER = 1.0
"""Seconds that work may take without a word."""
BYTES = "bytes"
"""The unit whose numbers are shown with suffixes; any other word is a name for things that are counted."""


class StoppedError(Exception):
    """Somebody has given up waiting for the work."""


class Bar:
    """How much of some work is done. All may be called from any thread; nothing is drawn before it takes long."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        """`total` nothing: nobody knows how much there is to do."""
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._lock = threading.Lock()
        self._ended = self._stopped = False
        self._shown: Progress | None = None

    def advance(self, done: int) -> None:
        """So much more is done. Raises StoppedError when nobody waits for it any more."""
        with self._lock:
            if self._stopped:
                raise StoppedError
            self._done += done
            self._update()

    def stop(self) -> None:
        """Have the threads that advance it end with the piece that they are at."""
        with self._lock:
            self._stopped = True

    def set(self, done: int, total: int) -> None:
        """So much is done of so much: for work that finds out itself how much there is."""
        with self._lock:
            self._done, self._total = done, total
            self._update()

    def _update(self) -> None:
        if self._shown is not None:
            self._shown.update(self._shown.task_ids[0], completed=self._done, total=self._total)

    def show(self) -> None:
        """Draw it from now on, unless the work has ended meanwhile."""
        from rich.console import Console
        from rich.progress import Progress

        with self._lock:
            if self._ended:
                return
            # What goes to a file must not go through the terminal.
            shown = Progress(
                *_columns(self._unit, known=self._total is not None),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            shown.add_task(self._title, total=self._total, completed=self._done)
            shown.start()
            self._shown = shown

    def end(self) -> None:
        """Take it off the terminal."""
        with self._lock:
            self._ended = True
            if self._shown is not None:
                self._shown.stop()


def _columns(unit: str, *, known: bool) -> list[Any]:
    from rich import progress as rich

    done: list[Any] = []
    if unit == BYTES:
        done = [rich.DownloadColumn(), rich.TransferSpeedColumn()] if known else [rich.FileSizeColumn()]
    elif unit:
        done = [rich.MofNCompleteColumn() if known else rich.TextColumn("{task.completed}"), rich.TextColumn(unit)]
    time = rich.TimeRemainingColumn() if known else rich.TimeElapsedColumn()
    return [rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), *done, time]


@contextmanager
def progress(title: str, total: int | None = None, unit: str = BYTES) -> Iterator[Bar]:
    """A bar for the work in the block. Never around a fork: it may have a thread."""
    bar = Bar(title, total, unit)
    if not sys.stderr.isatty():
        yield bar
        return
    timer = threading.Timer(SHOWN_AFTER, bar.show)
    timer.daemon = True
    timer.start()
    try:
        yield bar
    finally:
        timer.cancel()
        bar.end()


@contextmanager
def reading_log(device: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for the replay of a log: a function to tell how many entries are read, and how many there are."""
    with progress(f"reading the log of {device}", 0, "entries") as bar:
        yield bar.set


@contextmanager
def workers(count: int, bar: Bar) -> Iterator[ThreadPoolExecutor]:
    """Threads for work that advances `bar`. What ends the block early, Ctrl-C above all, ends them at their next piece,
    and what has not begun is left undone."""
    with ThreadPoolExecutor(max(count, 1)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            bar.stop()
            raise
