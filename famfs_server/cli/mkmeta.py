# SPDX-License-Identifier: Apache-2.0
"""`famfs mkmeta`: a step that mounting took over long ago; here it looks whether the meta files are there."""

import os

import click

from famfs_server.cli import program
from famfs_server.errors import DeviceError
from famfs_server.fuse import mountapi


@program.tool("mkmeta")
@click.option("-v", "--verbose", count=True, help="Name the files.")
@click.argument("device")
def command(*, device: str, verbose: int) -> None:
    """See that the file system mounted from DEVICE has its files .meta/.superblock and .meta/.log.

    Mounting makes them; there is nothing to do. It fails for a device that is not mounted.
    """
    if not os.path.exists(device):
        raise DeviceError(f"{device}: {os.strerror(2)}")
    real = os.path.realpath(device)
    points = [record.mount_point for record in mountapi.find_mounts() if os.path.realpath(record.source) == real]
    if not points:
        raise DeviceError(f"{device} is not mounted; famfs mount makes the meta files")
    for name in (".superblock", ".log"):
        path = os.path.join(points[0], ".meta", name)
        size = os.stat(path).st_size
        if verbose:
            click.echo(f"{path}: {size} bytes")
