# SPDX-License-Identifier: Apache-2.0
"""`famfs cp`: copy files and directories into a file system, in batches, and never call a gap a success.

A new file is logged when all of its data are in memory, so that a copy that is interrupted, wherever it is, leaves
whole files and no others; the same command then completes it.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

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
from famfs_server.cli.progress import progress, workers
from famfs_server.cli.source import PIECE, Source, SourceError, gathered
from famfs_server.cli.target import Advance, Place, Status, Targets, Unmounted, daxdev_option, unseen
from famfs_server.cli.values import umask
from famfs_server.daemon.control_client import ControlError, DirectoryRequest, FileRequest, Striping
from famfs_server.errors import (
    ExistsError,
    FamfsError,
    LogFullError,
    NoSpaceError,
    NoSuchPathError,
    NotADirectoryPathError,
    PathError,
    UsageError,
)

_BATCH = 1000
"""Files or directories that are made together, at most."""
_BATCH_BYTES = 64 << 20
"""Bytes from which on files are not made together with others any more."""
_MOST_LINES = 20
"""Failures that are named: a full device fails all the rest."""
_TRIES = 20
_TRY_SECONDS = 0.3
"""How often, and after how long, a daemon whose connection has broken is asked again: another worker may take over.
Once none has, nobody waits for one any more."""


Failure = FamfsError | OSError | None
"""What stood in the way of a file."""


class CopyError(FamfsError):
    """A copy is not equal to its source."""


@dataclass(frozen=True, slots=True)
class Job:
    """A file to be copied: from where, to where, and its new mode."""

    source: Source
    place: Place
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
    log_first: bool
    verify: bool
    verbose: int


@program.tool("cp")
@click.option("-r", "--recursive", is_flag=True, help="Copy what is in directories too.")
@click.option("-c", "--compare", is_flag=True, help="Copy nothing, compare instead.")
@click.option("--log-first", is_flag=True, help="Let files appear before their data are copied, filled with zeroes.")
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
    log_first: bool,
    verify: bool,
    mode: int | None,
    uid: int | None,
    gid: int | None,
    chunksize: int | None,
    nstrips: int,
    nbuckets: int,
    threadct: int,
    verbose: int,
    daxdev: Unmounted | None,
) -> int:
    """Copy SRC to DEST in a famfs file system.

    New files appear whole, with all of their data. A file that exists is overwritten in place if its size is the same,
    so that an interrupted copy can be repeated; with another size it is an error. Empty files, links and special files
    cannot be stored: they are named and skipped, and the exit status is 1. With -r a directory's contents go into DEST
    if that exists. The mode is the source's unless -m says another one, which the umask applies to.
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
        log_first,
        verify,
        verbose,
    )
    *sources, destination = paths
    if recursive and daxdev is None:
        _refuse_nesting(sources, destination)
    with Targets(daxdev, write=not compare) as targets:
        copy = Copy(settings, _destination(targets, destination, sources, recursive=recursive))
        with progress("looking for files to copy", unit="files") as bar:
            for source in sources:
                copy.add(source, bar.advance)
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
    """One run of cp: collects files, and makes them in batches."""

    def __init__(self, settings: Settings, destination: Place) -> None:
        self._settings = settings
        self._destination = destination
        self._into = destination.status()
        self._jobs: list[Job] = []
        self._directories: list[DirectoryRequest] = []
        """New ones, each behind its parent."""
        self._tell: Advance = unseen
        self._tries = _TRIES
        self.skipped = 0

    def add(self, source: str, advance: Advance) -> None:
        """Take in one source of the command line; `advance` is told of each file."""
        self._tell = advance
        found = os.stat(source)
        if not stat.S_ISDIR(found.st_mode):
            name = os.fsencode(os.path.basename(source))
            place = self._destination.below(name) if self._into else self._destination
            if self._into and not self._into.is_directory:
                place = self._destination
            self._add_file(source, found, place)
        elif self._settings.recursive:
            self._add_tree(source, found.st_mode, self._destination, self._into)
        else:
            self._skip(source, "is a directory, and --recursive was not given")

    def finish(self) -> None:
        """Copy what has been collected. Raises the error of the first file that failed, after all others have run."""
        title = "comparing" if self._settings.compare else "copying"
        failures: dict[str, FamfsError | OSError] = {}
        for start in range(0, len(self._directories), _BATCH):
            self._destination.target.make_directories(self._directories[start : start + _BATCH])
        looks = 1 + self._settings.verify
        with (
            progress(title, looks * sum(job.source.size for job in self._jobs)) as bar,
            workers(self._settings.threads, bar) as pool,
        ):
            work = [(batch, pool.submit(self._run, batch, bar.advance)) for batch in _batches(self._jobs)]
            for batch, future in work:
                for job, failure in zip(batch, future.result(), strict=True):
                    if failure is not None:
                        failures.setdefault(_line(failure), failure)
                    elif self._settings.verbose:
                        click.echo(f"{job.source.name} -> {job.place.name}")
        self._jobs.clear()
        more = list(failures)[1:]
        for line in more[:_MOST_LINES]:
            program.warn(line)
        if more[_MOST_LINES:]:
            program.warn(f"{len(more) - _MOST_LINES} more files failed")
        for failure in failures.values():
            raise failure

    def _skip(self, source: str, why: str) -> None:
        program.warn(f"{source}: {why}; skipped")
        self.skipped += 1

    def _add_tree(self, source: str, mode: int, place: Place, found: Status | None) -> None:
        """A directory, of which `found` is there already: itself first, then what is in it."""
        if found is not None and not found.is_directory:
            raise NotADirectoryPathError(f"{place.name}: is not a directory")
        if found is None:
            if self._settings.compare:
                raise NoSuchPathError(f"{place.name}: no such directory")
            owner = self._settings.owner
            self._directories.append(DirectoryRequest(place.path, stat.S_IMODE(mode) & 0o777, owner.uid, owner.gid))
        for entry in _entries(source):
            inside = place.below(os.fsencode(entry.name))
            if entry.is_symlink():
                self._skip(entry.path, "is a symbolic link")
            elif entry.is_dir():
                # What lies in a new directory is new.
                self._add_tree(entry.path, entry.stat().st_mode, inside, inside.status() if found else None)
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
        self._jobs.append(Job(Source(source, found.st_size), place, mode))
        self._tell(1)

    def _run(self, jobs: Sequence[Job], advance: Advance) -> list[Failure]:
        """Copy or compare a batch; for each of its files, what stood in its way."""
        outcome: list[Failure] = [None] * len(jobs)
        if not self._settings.compare:
            outcome = self._copy(jobs, advance, self._tries)
        if self._settings.compare or self._settings.verify:
            return [
                failure or _attempt(partial(_compare, job, advance)) for job, failure in zip(jobs, outcome, strict=True)
            ]
        return outcome

    def _copy(self, jobs: Sequence[Job], advance: Advance, tries: int) -> list[Failure]:
        outcome: dict[Job, Failure] = {}
        missing: list[Job] = []
        for job in jobs:
            try:
                existing = job.place.status()
            except (FamfsError, OSError) as error:
                outcome[job] = error
                continue
            if existing is None:
                missing.append(job)
            elif existing.is_file and existing.size == job.source.size:
                outcome[job] = _attempt(partial(_overwrite, job, advance))
            else:
                cause = f"exists with {existing.size} bytes instead of {job.source.size}; sizes never change"
                outcome[job] = ExistsError(
                    f"{job.place.name}: {cause if existing.is_file else 'exists and is no file'}"
                )
        if missing:
            make = self._make_empty if self._settings.log_first else self._make
            outcome.update(zip(missing, make(missing, advance, tries), strict=True))
        return [outcome[job] for job in jobs]

    def _requests(self, jobs: Sequence[Job]) -> list[FileRequest]:
        owner, striping = self._settings.owner, self._settings.striping
        return [FileRequest(job.place.path, job.source.size, job.mode, owner.uid, owner.gid, striping) for job in jobs]

    def _make(self, jobs: Sequence[Job], advance: Advance, tries: int) -> list[Failure]:
        """Make files with their data, together if that is possible."""

        def data() -> Iterator[memoryview]:
            for piece in gathered([job.source for job in jobs]):
                yield piece
                advance(len(piece))

        try:
            self._destination.target.put(self._requests(jobs), data())
        except ControlError as error:
            # Perhaps a worker of the daemon has died, and another one takes over; it may have made the files before.
            if not tries:
                self._tries = 0
                return [error] * len(jobs)
            time.sleep(_TRY_SECONDS)
            return self._copy(jobs, advance, tries - 1)
        except (PathError, NoSpaceError, LogFullError, SourceError) as error:
            if len(jobs) > 1:
                # One file can be the cause, and must not keep the others from being made.
                return [failure for job in jobs for failure in self._make([job], advance, tries)]
            return [error if isinstance(error, SourceError) else _named(jobs[0], error)]
        except (FamfsError, OSError) as error:
            return [error] * len(jobs)
        return [None] * len(jobs)

    def _make_empty(self, jobs: Sequence[Job], advance: Advance, tries: int) -> list[Failure]:
        """Make files that are all zeroes, then fill them."""
        made = create_each(self._destination.target, self._requests(jobs))
        return [
            _attempt(partial(_overwrite, job, advance)) if error is None else _named(job, error)
            for job, error in zip(jobs, made, strict=True)
        ]


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Files that are made together: many small ones, or a single large one."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        if batch and (len(batch) == _BATCH or size + job.source.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.source.size
    if batch:
        yield batch


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def _line(failure: FamfsError | OSError) -> str:
    return program.describe(failure) if isinstance(failure, OSError) else str(failure)


def _named(job: Job, error: FamfsError) -> FamfsError:
    """The daemon's refusal of one file, with the name that the user called it."""
    return type(error)(f"{job.place.name}: {error}")


def _attempt(act: Callable[[], None]) -> Failure:
    try:
        act()
    except (FamfsError, OSError) as error:
        return error
    return None


def _overwrite(job: Job, advance: Advance) -> None:
    """Copy a file's bytes into one that exists. Raises SourceError unless all of them came."""
    opened = job.place.target.open(job.place.path, writable=True)
    try:
        offset = 0
        for piece in job.source.pieces(memoryview(bytearray(min(PIECE, job.source.size)))):
            opened.write(offset, piece)
            offset += len(piece)
            advance(len(piece))
        opened.flush()
    except SourceError as error:
        raise SourceError(f"{error}; {job.place.name} is incomplete") from error
    finally:
        opened.close()


def _compare(job: Job, advance: Advance) -> None:
    """Raises CopyError for a copy that is not equal to its source."""
    found = job.place.status()
    if found is None:
        raise NoSuchPathError(f"{job.place.name}: does not exist")
    if not found.is_file or found.size != job.source.size:
        raise CopyError(f"{job.place.name}: is no file of {job.source.size} bytes, as {job.source.name} is")
    opened = job.place.target.open(job.place.path)
    try:
        offset = 0
        for piece in job.source.pieces(memoryview(bytearray(min(PIECE, job.source.size)))):
            if opened.read(offset, len(piece)) != piece:
                raise CopyError(f"{job.place.name}: differs from {job.source.name} behind offset {offset}")
            offset += len(piece)
            advance(len(piece))
    finally:
        opened.close()
