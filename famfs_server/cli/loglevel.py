# SPDX-License-Identifier: Apache-2.0
"""`famfs loglevel`: show or set how much a daemon writes to its log."""

import click

from famfs_server.cli import program
from famfs_server.daemon.control_client import ControlClient


@program.tool("loglevel")
@click.argument("mount")
@click.argument("level", required=False)
def command(*, mount: str, level: str | None) -> None:
    """Show the log level of the daemon of MOUNT, or set it to LEVEL.

    LEVEL is a syslog priority, 0 to 7, or critical, error, warning, notice, info or debug. It stays until the unmount.
    """
    client = ControlClient.of_mount(mount)
    answer = (
        client.request("GET", "/log_level") if level is None else client.request("POST", "/log_level", level.encode())
    )
    click.echo(answer.decode().strip())
