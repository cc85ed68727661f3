# SPDX-License-Identifier: Apache-2.0
"""`famfs verify`: compare files with the data that seeds stand for."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import click

from famfs_server.cli import program
from famfs_server.cli.attributes import thread_option
from famfs_server.cli.progress import progress
from famfs_server.cli.target import Place, Targets, Unmounted, daxdev_option
from famfs_server.cli.values import SEED
from famfs_server.errors import FamfsError, UsageError

_PIECE = 8 << 20


@program.tool("verify")
@click.option("-f", "--filename", metavar="FILE", help="The file to compare.")
@click.option("-S", "--seed", type=SEED, help="The seed of the file's data.")
@click.option("-m", "--multi", multiple=True, metavar="FILE,SEED", help="A file and its seed; may be repeated.")
@thread_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing of files that agree.")
@daxdev_option
def command(
    *,
    filename: str | None,
    seed: int | None,
    multi: tuple[str, ...],
    threadct: int,
    quiet: bool,
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
        return _verify_all([(targets.find(name), number) for name, number in wanted], threadct, quiet=quiet)


def parse_multi(text: str) -> tuple[str, int]:
    """FILE,SEED. Raises UsageError."""
    parts = text.split(",")
    if len(parts) != 2 or not parts[0]:
        raise UsageError(f"--multi {text}: write FILE,SEED")
    try:
        return parts[0], SEED.parse(parts[1])
    except ValueError as error:
        raise UsageError(f"--multi {text}: {error}") from None


def _verify_all(files: Sequence[tuple[Place, int]], threads: int, *, quiet: bool) -> int:
    failed = 0
    total = sum(found.size for place, _ in files if (found := place.status()))
    with progress("verifying", total) as bar, ThreadPoolExecutor(max(threads, 1)) as pool:

        def difference(row: tuple[Place, int]) -> int | None:
            from famfs_server.seeded import SeededStream

            place, seed = row
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
                    bar.advance(len(data))
            finally:
                opened.close()
            return None

        for (place, seed), job in [(row, pool.submit(difference, row)) for row in files]:
            try:
                at = job.result()
            except (FamfsError, OSError) as error:
                program.warn(program.describe(error) if isinstance(error, OSError) else str(error))
                failed += 1
                continue
            if at is not None:
                program.warn(f"{place.name}: differs from seed {seed} at offset {at}")
                failed += 1
            elif not quiet:
                click.echo(f"{place.name}: agrees with seed {seed}")
    return failed
