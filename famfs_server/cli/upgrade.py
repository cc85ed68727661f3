# SPDX-License-Identifier: Apache-2.0
"""`famfs upgrade`: a mount is served on by the program that is installed now, and nobody who uses it notices."""

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.daemon import upgrade_client
from famfs_server.daemon.control_client import ControlClient


@program.tool("upgrade")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing if it works.")
@click.argument("mount")
def command(*, mount: str, quiet: bool) -> None:
    """Hand the file system mounted at MOUNT over to the program that is installed now where its server was started
    from. Files stay open. If the installed program cannot take over, the running server goes on."""
    with progress(f"upgrading the server of {mount}", unit=""):
        outcome = upgrade_client.ask(ControlClient.of_mount(mount).directory)
    if not quiet:
        click.echo(f"{mount}: served by version {outcome['version']}, process {outcome['pid']}")
