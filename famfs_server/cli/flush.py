# SPDX-License-Identifier: Apache-2.0
"""`famfs flush`: write cached data of files back to memory, where other hosts see them."""

import click

from famfs_server.cli import program
from famfs_server.cli.target import Targets, Unmounted, daxdev_option
from famfs_server.errors import FamfsError


@program.tool("flush")
@click.option("-v", "--verbose", count=True, help="Name each file.")
@daxdev_option
@click.argument("file", nargs=-1, required=True)
def command(*, file: tuple[str, ...], verbose: int, daxdev: Unmounted | None) -> int:
    """Write back the cache lines of each FILE, and drop them. The exit status is the number of files that failed."""
    failed = 0
    with Targets(daxdev, write=False) as targets:
        for name in file:
            try:
                place = targets.find(name)
                place.require_file()
                opened = place.target.open(place.path)
                try:
                    opened.flush()
                finally:
                    opened.close()
            except (FamfsError, OSError) as error:
                program.warn(program.describe(error) if isinstance(error, OSError) else str(error))
                failed += 1
            else:
                if verbose:
                    click.echo(f"{name}: flushed")
    return failed
