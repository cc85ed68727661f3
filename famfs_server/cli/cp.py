# SPDX-License-Identifier: Apache-2.0
"""`famfs cp`: copy files and directories into a file system, in batches, and never call a gap a success."""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click

from famfs_server.cli import program
from famfs_server.cli.attributes import (
    Ownership,
    create_each,
    ownership_options,
    striping,
    striping_options,
    thread_option,
)
from famfs_server.cli.mkdir import make_directory
from famfs_server.cli.progress import progress
from famfs_server.cli.target import Place, Targets, daxdev_option
from famfs_server.cli.values import umask
from famfs_server.daemon.control_client import FileRequest, Striping
from famfs_server.errors import ExistsError, FamfsError, NoSuchPathError, NotADirectoryPathError, UsageError

_PIECE = 8 << 20
_BATCH = 1000
"""Files that are created together, then filled: what an interruption leaves without data is at most so many."""


class CopyError(FamfsError):
    """A file could not be copied whole."""


@dataclass(frozen=True, slots=True)
class Job:
    """A file to be copied: from where, to where, how large it was when it was found, and its new mode."""

    source: str
    place: Place
    size: int
    mode: int


@dataclass(slots=True)
class Settings:
    """What the options say, for every file alike."""

    mode: int | None
    owner: Ownership
    striping: Striping | None
    threads: int
    recursive: bool
    compare: bool
    verify: bool
    verbose: int


@program.tool("cp")
@click.option("-r", "--recursive", is_flag=True, help="Copy what is in directories too.")
@click.option("-c", "--compare", is_flag=True, help="Copy nothing, compare instead.")
@click.option("--verify", is_flag=True, help="Read everything back and compare.")
@ownership_options
@striping_options
@thread_option
@click.option("-v", "--verbose", count=True, help="Name each file.")
@daxdev_option
@click.argument("paths", nargs=-1, required=True, metavar="SRC... DEST")
def command(
    *,
    paths: tuple[str, ...],
    recursive: bool,
    compare: bool,
    verify: bool,
    mode: int | None,
    uid: int | None,
    gid: int | None,
    chunksize: int | None,
    nstrips: int,
    nbuckets: int,
    threadct: int,
    verbose: int,
    daxdev: str | None,
) -> int:
    """Copy SRC to DEST in a famfs file system.

    A file that exists is overwritten in place if its size is the same, so that an interrupted copy can be repeated;
    with another size it is an error. Empty files, links and special files cannot be stored: they are named and
    skipped, and the exit status is 1. With -r a directory's contents go into DEST if that exists.
    """
    if len(paths) < 2:
        raise UsageError("cp needs at least one source and a destination")
    settings = Settings(
        (mode & ~umask()) or None if mode is not None else None,
        Ownership.of(uid, gid),
        striping(chunksize, nstrips, nbuckets),
        threadct,
        recursive,
        compare,
        verify,
        verbose,
    )
    *sources, destination = paths
    if recursive and daxdev is None:
        _refuse_nesting(sources, destination)
    with Targets(daxdev, write=not compare) as targets:
        copy = Copy(settings, _destination(targets, destination, sources, recursive=recursive))
        for source in sources:
            copy.add(source)
        copy.finish()
        return 1 if copy.skipped else 0


def _refuse_nesting(sources: list[str], destination: str) -> None:
    """A directory copied into itself would never end."""
    real = os.path.realpath(destination)
    for source in sources:
        if os.path.isdir(source) and (real + "/").startswith(os.path.realpath(source).rstrip("/") + "/"):
            raise UsageError(f"{source}: cannot be copied into itself, {destination}")


def _destination(targets: Targets, name: str, sources: list[str], *, recursive: bool) -> Place:
    place = targets.find(name)
    found = place.status()
    directory_meant = len(sources) > 1 or name.endswith(("/", "/."))
    if found is None:
        if directory_meant and not (recursive and len(sources) == 1):
            raise NoSuchPathError(f"{name}: no such directory")
    elif not found.is_directory and (directory_meant or (recursive and os.path.isdir(sources[0]))):
        raise NotADirectoryPathError(f"{name}: is not a directory")
    return place


class Copy:
    """One run of cp: collects files, makes them in batches, and fills each batch before the next is made."""

    def __init__(self, settings: Settings, destination: Place) -> None:
        self._settings = settings
        self._destination = destination
        self._into = destination.status()
        self._jobs: list[Job] = []
        self.skipped = 0

    def add(self, source: str) -> None:
        """Take in one source of the command line."""
        found = os.stat(source)
        if not stat.S_ISDIR(found.st_mode):
            name = os.fsencode(os.path.basename(source))
            place = self._destination.below(name) if self._into else self._destination
            if self._into and not self._into.is_directory:
                place = self._destination
            self._add_file(source, found, place)
        elif self._settings.recursive:
            self._add_tree(source, found.st_mode, self._destination)
        else:
            self._skip(source, "is a directory, and --recursive was not given")

    def finish(self) -> None:
        """Copy what has been collected. Raises the error of the first file that failed, after all others have run."""
        for start in range(0, len(self._jobs), _BATCH):
            self._run(self._jobs[start : start + _BATCH])
        self._jobs.clear()

    def _skip(self, source: str, why: str) -> None:
        program.warn(f"{source}: {why}; skipped")
        self.skipped += 1

    def _add_tree(self, source: str, mode: int, place: Place) -> None:
        """A directory: itself first, then what is in it."""
        found = place.status()
        if found is not None and not found.is_directory:
            raise NotADirectoryPathError(f"{place.name}: is not a directory")
        if found is None:
            if self._settings.compare:
                raise NoSuchPathError(f"{place.name}: no such directory")
            make_directory(place, stat.S_IMODE(mode) & 0o777, self._settings.owner, parents=False)
        for entry in _entries(source):
            inside = place.below(os.fsencode(entry.name))
            if entry.is_symlink():
                self._skip(entry.path, "is a symbolic link")
            elif entry.is_dir():
                self._add_tree(entry.path, entry.stat().st_mode, inside)
            else:
                self._add_file(entry.path, entry.stat(), inside)

    def _add_file(self, source: str, found: os.stat_result, place: Place) -> None:
        if not stat.S_ISREG(found.st_mode):
            self._skip(source, "is not a regular file")
            return
        if found.st_size == 0:
            self._skip(source, "is empty, and famfs stores no empty files")
            return
        mode = stat.S_IMODE(found.st_mode) & 0o777 if self._settings.mode is None else self._settings.mode
        self._jobs.append(Job(source, place, found.st_size, mode))

    def _run(self, jobs: list[Job]) -> None:
        missing, ready = [], []
        failure: FamfsError | None = None
        for job in jobs:
            existing = job.place.status()
            if existing is None:
                missing.append(job)
            elif existing.is_file and existing.size == job.size:
                ready.append(job)
            else:
                cause = f"exists with {existing.size} bytes instead of {job.size}; sizes never change"
                failure = ExistsError(f"{job.place.name}: {cause if existing.is_file else 'exists and is no file'}")
                break
        if missing and self._settings.compare:
            raise NoSuchPathError(f"{missing[0].place.name}: does not exist")
        owner = self._settings.owner
        requests = [
            FileRequest(job.place.path, job.size, job.mode, owner.uid, owner.gid, self._settings.striping)
            for job in missing
        ]
        # What has been made is filled even where something else failed: no file stays behind without its data.
        for job, error in zip(missing, create_each(self._destination.target, requests), strict=True):
            if error is None:
                ready.append(job)
            else:
                failure = failure or type(error)(f"{job.place.name}: {error}")
        self._move(ready)
        if failure is not None:
            raise failure

    def _move(self, jobs: list[Job]) -> None:
        title = "comparing" if self._settings.compare else "copying"
        failure: FamfsError | OSError | None = None
        with (
            progress(title, sum(job.size for job in jobs)) as advance,
            ThreadPoolExecutor(max(self._settings.threads, 1)) as pool,
        ):

            def work(job: Job) -> None:
                if not self._settings.compare:
                    for done in _copy_data(job):
                        advance(done)
                if self._settings.compare or self._settings.verify:
                    _compare_data(job)

            for job, future in [(job, pool.submit(work, job)) for job in jobs]:
                try:
                    future.result()
                except (FamfsError, OSError) as error:
                    if failure is not None:
                        program.warn(program.describe(error) if isinstance(error, OSError) else str(error))
                    failure = failure or error
                else:
                    if self._settings.verbose:
                        click.echo(f"{job.source} -> {job.place.name}")
        if failure is not None:
            raise failure


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def _copy_data(job: Job) -> Iterator[int]:
    """Copy a file's bytes; yields how many at a time. Raises CopyError unless all of them came."""
    source = os.open(job.source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        opened = job.place.target.open(job.place.path, writable=True)
        try:
            buffer = bytearray(min(_PIECE, job.size))
            view = memoryview(buffer)
            offset = 0
            while offset < job.size:
                done = os.preadv(source, [view[: min(_PIECE, job.size - offset)]], offset)
                if done == 0:
                    raise CopyError(
                        f"{job.source}: has become shorter while it was copied; {job.place.name} is incomplete"
                    )
                opened.write(offset, view[:done])
                offset += done
                yield done
            if os.pread(source, 1, offset):
                raise CopyError(f"{job.source}: has grown while it was copied; {job.place.name} is incomplete")
            opened.flush()
        finally:
            opened.close()
    finally:
        os.close(source)


def _compare_data(job: Job) -> None:
    """Raises CopyError for a copy that is not equal to its source."""
    source = os.open(job.source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        opened = job.place.target.open(job.place.path)
        try:
            for offset in range(0, job.size, _PIECE):
                length = min(_PIECE, job.size - offset)
                if os.pread(source, length, offset) != opened.read(offset, length):
                    raise CopyError(f"{job.place.name}: differs from {job.source} behind offset {offset}")
        finally:
            opened.close()
    finally:
        os.close(source)
