# SPDX-License-Identifier: Apache-2.0
"""`famfs-server`: mount and stay in the foreground until the file system is unmounted, for service managers."""

from typing import NoReturn

import click

from famfs_server.cli import mount, program


@program.tool("famfs-server")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, separated by commas.")
@click.option("-d", "--debug", is_flag=True, help="Log everything.")
@click.option("-f", "foreground", is_flag=True, help="Stay in the foreground, as always.")
@click.option("-s", "single", is_flag=True, hidden=True)
@click.argument("device")
@click.argument("directory")
def command(
    *, device: str, directory: str, options: tuple[str, ...], debug: bool, foreground: bool, single: bool
) -> None:
    """Serve the file system on DEVICE at DIRECTORY until it is unmounted."""
    mount.start(device, directory, [*options, *(["debug"] if debug else [])], foreground=True)


def main() -> NoReturn:
    """The program `famfs-server`."""
    program.main(command, "famfs-server", mount.STATUSES)
