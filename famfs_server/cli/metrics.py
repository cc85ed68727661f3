# SPDX-License-Identifier: Apache-2.0
"""`famfs metrics`: the figures of all mounts in the text format of Prometheus."""

import os
import sys

import click

from famfs_server.cli import program
from famfs_server.cli.status import mount_points
from famfs_server.daemon.control_client import ControlClient


@program.tool("metrics")
@click.option("-o", "--output", metavar="FILE", help="Replace FILE with the text, as a textfile collector wants it.")
@click.argument("mount", nargs=-1)
def command(*, mount: tuple[str, ...], output: str | None) -> None:
    """Print the figures of each MOUNT, or of all mounts, for Prometheus.

    The control socket gives the same for one mount: curl --unix-socket RUN_DIRECTORY/sock http://localhost/metrics
    """
    from famfs_server.daemon.metrics import exposition

    text = exposition([ControlClient.of_mount(point).status() for point in mount or mount_points()])
    if output is None:
        sys.stdout.write(text.decode())
        return
    temporary = f"{output}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(text)
    os.replace(temporary, output)
