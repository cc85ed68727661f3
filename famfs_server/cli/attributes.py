# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: owner and mode, striping, threads, and the making of batches."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from famfs_server.cli.target import Target
from famfs_server.cli.values import MODE, OWNER, SIZE, THREADS, NumberType
from famfs_server.daemon.control_client import CREATE_LIMIT, FileRequest, Striping
from famfs_server.errors import FamfsError, LogFullError, NoSpaceError, PathError, UsageError

DEFAULT_CHUNK = 2 << 20
_DEFAULT_THREADS = 4


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whom a new file belongs to."""

    uid: int
    gid: int

    @classmethod
    def of(cls, uid: int | None, gid: int | None) -> "Ownership":
        """What was asked for, else the ids of this process."""
        return cls(os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid)


def ownership_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds -m, -u and -g."""
    for option in (
        click.option("-g", "--gid", type=OWNER, help="Group of what is made; default: yours."),
        click.option("-u", "--uid", type=OWNER, help="Owner of what is made; default: you."),
        click.option("-m", "--mode", type=MODE, help="Permissions of what is made, in octal."),
    ):
        function = option(function)
    return function


def striping_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds -C, -N and -B."""
    for option in (
        click.option("-B", "--nbuckets", type=NumberType("count", 0, 1 << 32), default=0, help="Parts of the device."),
        click.option("-N", "--nstrips", type=NumberType("count", 0, 1 << 32), default=0, help="Parts a file is in."),
        click.option("-C", "--chunksize", type=SIZE, help="Bytes that go to one strip at a time; default: 2m."),
    ):
        function = option(function)
    return function


def thread_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds -t; 0 means one thread."""
    return click.option(
        "-t", "--threadct", type=THREADS, default=_DEFAULT_THREADS, show_default=True, help="Threads for data."
    )(function)


def striping(chunksize: int | None, nstrips: int, nbuckets: int) -> Striping | None:
    """What -C, -N and -B mean together; nothing: contiguous files. Raises UsageError where one is missing."""
    if not nstrips and not nbuckets and chunksize is None:
        return None
    if not nstrips or not nbuckets:
        raise UsageError("striping needs both --nbuckets and --nstrips, neither of them 0")
    return Striping(nbuckets, nstrips, DEFAULT_CHUNK if chunksize is None else chunksize)


def create_each(target: Target, files: Sequence[FileRequest]) -> list[FamfsError | None]:
    """Make `files` in as few batches as possible; for each of them, what stood in its way.

    A batch is made whole or not at all. Where one fails for what a single file can be the cause of, its files are made
    one by one, so that a bad one does not keep the good ones from being made.
    """
    outcome: list[FamfsError | None] = []
    for start in range(0, len(files), CREATE_LIMIT):
        batch = files[start : start + CREATE_LIMIT]
        error = _try(target, batch)
        if len(batch) == 1 or not isinstance(error, PathError | NoSpaceError | LogFullError):
            outcome += [error] * len(batch)
        else:
            outcome += [_try(target, [new]) for new in batch]
    return outcome


def _try(target: Target, files: Sequence[FileRequest]) -> FamfsError | None:
    try:
        target.create(files)
    except FamfsError as error:
        return error
    return None
