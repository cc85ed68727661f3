# SPDX-License-Identifier: Apache-2.0
"""`famfs clone`: refused. In the reference it makes two files share their space, to test fsck."""

import click

from famfs_server.cli import program
from famfs_server.errors import UsageError


@program.tool("clone")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.argument("source")
@click.argument("target")
def command(*, source: str, target: str, verbose: int) -> None:
    """Not possible: two files that share their space damage a file system. Use cp to copy SOURCE to TARGET."""
    raise UsageError(
        f"{target} cannot be a clone of {source}: two files that share their space damage a file system; use famfs cp"
    )
