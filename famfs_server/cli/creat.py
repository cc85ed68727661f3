# SPDX-License-Identifier: Apache-2.0
"""`famfs creat`: make files of a size, one or many at once, and fill them from a seed."""

import secrets
from collections.abc import Sequence
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
from famfs_server.cli.progress import progress, workers
from famfs_server.cli.target import Place, Targets, Unmounted, daxdev_option
from famfs_server.cli.values import LARGEST_SEED, SEED, SIZE, parse_size, umask
from famfs_server.daemon.control_client import FileRequest
from famfs_server.errors import ExistsError, FamfsError, PathError, UsageError

_DEFAULT_MODE = 0o644
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file as the command line asks for it. `size` nothing: as large as the file is already; `seed` nothing: no
    data."""

    name: str
    size: int | None
    seed: int | None


@program.tool("creat")
@click.option(
    "-s", "--size", type=SIZE, help="Size of the file, such as 4096, 0x1000, 100m or 3g; with -r default: as it is."
)
@click.option("-r", "--randomize", is_flag=True, help="Fill the file with the data of a seed.")
@click.option("-S", "--seed", type=SEED, help="The seed for -r; default: a random one.")
@click.option(
    "-M", "--multi", multiple=True, metavar="FILE,SIZE[,SEED]", help="A file; may be repeated. With SEED: filled."
)
@ownership_options
@striping_options
@thread_option
@click.option("-v", "--verbose", count=True, help="Say more.")
@daxdev_option
@click.argument("file", required=False)
def command(
    *,
    file: str | None,
    size: int | None,
    randomize: bool,
    seed: int | None,
    multi: tuple[str, ...],
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
    """Create FILE, or many files with -M.

    A file that exists is left alone if it has the size asked for (with -r its data are made anew); another size is an
    error. With -M the exit status is the number of files that could not be made. The mode is 644 unless -m says another
    one, less the umask.
    """
    program.set_verbosity(verbose)
    if seed is not None and not randomize:
        raise UsageError("--seed needs --randomize")
    if multi:
        if file is not None or size is not None or randomize:
            raise UsageError("--multi goes with neither FILE nor --size, --randomize and --seed")
        wanted = [parse_multi(text) for text in multi]
    elif file is None:
        raise UsageError("name the file to create, or use --multi")
    else:
        data_seed = seed if seed is not None or not randomize else 1 + secrets.randbelow(LARGEST_SEED)
        wanted = [Wanted(file, size, data_seed)]
    stripes = striping(chunksize, nstrips, nbuckets)
    permissions = (_DEFAULT_MODE if mode is None else mode) & ~umask()
    owner = Ownership.of(uid, gid)
    failed = 0
    with Targets(daxdev, write=True) as targets:
        ready: list[tuple[Place, Wanted]] = []
        new: list[tuple[Place, Wanted, FileRequest]] = []
        for entry in wanted:
            try:
                place = targets.find(entry.name)
                missing = _missing_size(place, entry)
            except (FamfsError, OSError) as error:
                failed += _failure(error, alone=not multi)
                continue
            if missing is None:
                ready.append((place, entry))
            else:
                request = FileRequest(place.path, missing, permissions, owner.uid, owner.gid, stripes)
                new.append((place, entry, request))
        for target in {id(place.target): place.target for place, _, _ in new}.values():
            batch = [row for row in new if row[0].target is target]
            with progress("creating", unit=""):
                outcome = create_each(target, [request for _, _, request in batch])
            for (place, entry, _), obstacle in zip(batch, outcome, strict=True):
                if obstacle is None:
                    ready.append((place, entry))
                else:
                    failed += _failure(obstacle, alone=not multi)
        failed += _fill_all([(place, entry.seed) for place, entry in ready if entry.seed], threadct, alone=not multi)
    if verbose:
        click.echo(f"{len(wanted) - failed} files created or already there, {failed} failed")
    return failed


def parse_multi(text: str) -> Wanted:
    """FILE,SIZE[,SEED]. Raises UsageError."""
    parts = text.split(",")
    if not 2 <= len(parts) <= 3 or not parts[0]:
        raise UsageError(f"--multi {text}: write FILE,SIZE or FILE,SIZE,SEED")
    try:
        return Wanted(parts[0], parse_size(parts[1]), SEED.parse(parts[2]) if len(parts) == 3 else None)
    except ValueError as error:
        raise UsageError(f"--multi {text}: {error}") from None


def _missing_size(place: Place, wanted: Wanted) -> int | None:
    """The size to create the file with; nothing if it is there. Raises PathError where neither can be."""
    if wanted.size == 0:
        raise PathError(f"{place.name}: a famfs file cannot be empty")
    found = place.status()
    if found is None:
        if wanted.size is None:
            raise UsageError(f"{place.name}: a new file needs --size")
        return wanted.size
    if not found.is_file:
        raise ExistsError(f"{place.name}: exists and is not a regular file")
    if wanted.size is None and wanted.seed is None:
        raise UsageError(f"{place.name}: say --size; the file exists and has {found.size} bytes")
    if wanted.size not in (None, found.size):
        raise ExistsError(f"{place.name}: exists with {found.size} bytes instead of {wanted.size}; sizes never change")
    return None


def _failure(error: FamfsError | OSError, *, alone: bool) -> int:
    """Report a file that failed among others; a single one ends the command with the error's own status."""
    if alone:
        raise error
    program.warn(program.describe(error) if isinstance(error, OSError) else str(error))
    return 1


def _fill_all(files: Sequence[tuple[Place, int]], threads: int, *, alone: bool) -> int:
    """Fill files with the data of their seeds; how many failed."""
    if not files:
        return 0
    total = sum(found.size for place, _ in files if (found := place.status()))
    failed = 0
    with progress("filling", total) as bar, workers(threads, bar) as pool:

        def fill(row: tuple[Place, int]) -> None:
            from famfs_server.seeded import SeededStream

            place, seed = row
            stream = SeededStream(seed)
            opened = place.target.open(place.path, writable=True)
            try:
                buffer = memoryview(bytearray(min(_PIECE, opened.size)))
                for offset in range(0, opened.size, _PIECE):
                    piece = buffer[: min(_PIECE, opened.size - offset)]
                    stream.fill(piece, offset)
                    opened.write(offset, piece)
                    bar.advance(len(piece))
                opened.flush()
            finally:
                opened.close()

        for job in [pool.submit(fill, row) for row in files]:
            try:
                job.result()
            except (FamfsError, OSError) as error:
                failed += _failure(error, alone=alone)
    return failed
