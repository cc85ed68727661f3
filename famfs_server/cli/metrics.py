# SPDX-License-Identifier: Apache-2.0
"""`famfs metrics`: the figures of all mounts in the text format of Prometheus."""

import os
import sys
from contextlib import suppress

import click

from famfs_server.cli import program
from famfs_server.cli.status import ask, mount_points


@program.tool("metrics")
@click.option("-o", "--output", metavar="FILE", help="Replace FILE with the text, as a textfile collector wants it.")
@click.argument("mount", nargs=-1)
def command(*, mount: tuple[str, ...], output: str | None) -> int:
    """Print the figures of each MOUNT, or of all mounts, for Prometheus.

    The control socket gives the same for one mount: curl --unix-socket RUN_DIRECTORY/sock http://localhost/metrics
    Exit status 1: a mount did not answer.
    """
    from famfs_server.daemon.metrics import exposition

    points = mount_points(mount)
    found = ask(points, alone=len(points) == 1)
    text = exposition(found)
    if output is None:
        sys.stdout.write(text.decode())
        return 0 if len(found) == len(points) else 1
    # A device or a pipe, such as /dev/null, is written to: replaced it would be gone for everybody.
    replaced = os.path.isfile(output) or not os.path.lexists(output)
    temporary = f"{output}.{os.getpid()}" if replaced else output
    try:
        with open(temporary, "wb") as file:
            file.write(text)
        if replaced:
            os.replace(temporary, output)
    except OSError as error:
        if replaced:
            with suppress(OSError):
                os.unlink(temporary)
        raise OSError(error.errno, os.strerror(error.errno or 0), output) from error
    return 0 if len(found) == len(points) else 1
