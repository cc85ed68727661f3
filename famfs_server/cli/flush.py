# SPDX-License-Identifier: Apache-2.0
"""`famfs flush`: write cached data of files back to memory, where other hosts see them."""

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.cli.target import Place, Targets, Unmounted, daxdev_option
from famfs_server.errors import FamfsError


@program.tool("flush")
@click.option("-v", "--verbose", count=True, help="Name each file.")
@daxdev_option
@click.argument("file", nargs=-1, required=True)
def command(*, file: tuple[str, ...], verbose: int, daxdev: Unmounted | None) -> int:
    """Write back the cache lines of each FILE, and drop them. The exit status is the number of files that failed."""
    found: list[tuple[Place, int]] = []
    failed = 0
    with Targets(daxdev, write=False) as targets:
        for name in file:
            try:
                place = targets.find(name)
                found.append((place, place.require_file().size))
            except (FamfsError, OSError) as error:
                failed += _failure(error)
        with progress("flushing", sum(size for _, size in found)) as bar:
            for place, _ in found:
                try:
                    opened = place.target.open(place.path)
                    try:
                        opened.flush(bar.advance)
                    finally:
                        opened.close()
                except (FamfsError, OSError) as error:
                    failed += _failure(error)
                else:
                    if verbose:
                        click.echo(f"{place.name}: flushed")
    return failed


def _failure(error: FamfsError | OSError) -> int:
    program.warn(program.describe(error) if isinstance(error, OSError) else str(error))
    return 1
