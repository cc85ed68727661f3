# SPDX-License-Identifier: Apache-2.0
"""`famfs verify`: compare files with the data that seeds stand for."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import click

from famfs_server.cli import program
from famfs_server.cli.attributes import thread_option
from famfs_server.cli.progress import progress, workers
from famfs_server.cli.target import Advance, Place, Targets, Unmounted, daxdev_option
from famfs_server.cli.values import SEED
from famfs_server.errors import FamfsError, UsageError

_PIECE = 8 << 20


@program.tool("verify")
@click.option("-f", "--filename", metavar="FILE", help="The file to compare.")
@click.option("-S", "--seed", type=SEED, help="The seed of the file's data.")
@click.option("-m", "--multi", multiple=True, metavar="FILE,SEED", help="A file and its seed; may be repeated.")
@thread_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing of files that agree.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@daxdev_option
def command(
    *,
    filename: str | None,
    seed: int | None,
    multi: tuple[str, ...],
    threadct: int,
    quiet: bool,
    as_json: bool,
    daxdev: Unmounted | None,
) -> int:
    """Compare files with the data that `creat -r` gave them. The exit status is the number of files that differ."""
    if multi:
        if filename is not None or seed is not None:
            raise UsageError("--multi goes with neither --filename nor --seed")
        wanted = [parse_multi(text) for text in multi]
    elif filename is None or seed is None:
        raise UsageError("say --filename and --seed, or --multi")
    else:
        wanted = [(filename, seed)]
    with Targets(daxdev, write=False) as targets:
        rows = []
        for row in _verify_all([(targets.find(name), number) for name, number in wanted], threadct):
            if not as_json:
                row.tell(quiet=quiet)
            rows.append(row)
    if as_json:
        click.echo(json.dumps([{**asdict(row), "agrees": row.agrees} for row in rows], indent=2))
    return sum(not row.agrees for row in rows)


def parse_multi(text: str) -> tuple[str, int]:
    """FILE,SEED. Raises UsageError."""
    parts = text.split(",")
    if len(parts) != 2 or not parts[0]:
        raise UsageError(f"--multi {text}: write FILE,SEED")
    try:
        return parts[0], SEED.parse(parts[1])
    except ValueError as error:
        raise UsageError(f"--multi {text}: {error}") from None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One file and its seed: where it differs first, or why it could not be read; neither: it agrees."""

    file: str
    seed: int
    differs_at: int | None = None
    error: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether every byte is what the seed says."""
        return self.differs_at is None and self.error is None

    def tell(self, *, quiet: bool) -> None:
        """For people."""
        if self.error is not None:
            program.warn(self.error)
        elif self.differs_at is not None:
            program.warn(f"{self.file}: differs from seed {self.seed} at offset {self.differs_at}")
        elif not quiet:
            click.echo(f"{self.file}: agrees with seed {self.seed}")


def _verify_all(files: Sequence[tuple[Place, int]], threads: int) -> Iterator[Comparison]:
    total = sum(found.size for place, _ in files if (found := place.status()))
    with progress("verifying", total) as bar, workers(threads, bar) as pool:
        jobs = [(row, pool.submit(_difference, *row, bar.advance)) for row in files]
        for (place, seed), job in jobs:
            try:
                yield Comparison(place.name, seed, job.result())
            except (FamfsError, OSError) as error:
                cause = program.describe(error) if isinstance(error, OSError) else str(error)
                yield Comparison(place.name, seed, error=cause)


def _difference(place: Place, seed: int, advance: Advance) -> int | None:
    """The first byte that is not what the seed says."""
    from famfs_server.seeded import SeededStream

    place.require_file()
    stream = SeededStream(seed)
    opened = place.target.open(place.path)
    try:
        for offset in range(0, opened.size, _PIECE):
            length = min(_PIECE, opened.size - offset)
            data = opened.read(offset, length)
            found = stream.first_difference(data, offset)
            if found is not None or len(data) < length:
                return offset + (len(data) if found is None else found)
            advance(len(data))
    finally:
        opened.close()
    return None
