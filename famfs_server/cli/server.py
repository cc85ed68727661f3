# SPDX-License-Identifier: Apache-2.0
"""`famfs-server`: mount and stay in the foreground until the file system is unmounted, for service managers."""

from typing import NoReturn

import click

from famfs_server.cli import mount, program
from famfs_server.errors import UsageError


@program.tool("famfs-server")
@mount.comma_options
@click.option("-d", "--debug", is_flag=True, help="Log everything.")
@click.option("-f", "foreground", is_flag=True, help="Stay in the foreground, as always.")
@click.option("-s", "single", is_flag=True, hidden=True)
@click.option(
    "--fuse-fd",
    type=click.IntRange(min=3),
    metavar="N",
    help="Serve the connection of this inherited descriptor of /dev/fuse, whose mount the caller makes and removes.",
)
@click.option(
    "--fdstore",
    "store",
    is_flag=True,
    help="Have the service manager keep the connection, and go on with one that it has kept.",
)
@click.argument("device")
@click.argument("directory")
def command(
    *,
    device: str,
    directory: str,
    options: tuple[str, ...],
    debug: bool,
    foreground: bool,
    single: bool,
    fuse_fd: int | None,
    store: bool,
) -> None:
    """Serve the file system on DEVICE at DIRECTORY until it is unmounted."""
    if store and fuse_fd is not None:
        raise UsageError("--fuse-fd and --fdstore exclude each other: who made the mount keeps the descriptor")
    words = [*options, *(["debug"] if debug else [])]
    mount.start(device, directory, words, foreground=True, fuse=fuse_fd, store=store)


def main() -> NoReturn:
    """The program `famfs-server`."""
    program.main(command, "famfs-server", mount.STATUSES)
