# SPDX-License-Identifier: Apache-2.0
"""`famfs watch`: what is created in a mounted file system, by whichever host, as lines of JSON."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import click

from famfs_server.cli import program
from famfs_server.cli.target import find_mount
from famfs_server.daemon.control_client import ControlClient, ControlError
from famfs_server.errors import PathError
from famfs_server.fuse import mountapi
from famfs_server.fuse.mountapi import MountRecord

_TAKEOVER_SECONDS = 10.0
"""How long to look for the successor of a daemon that does not answer."""
_AGAIN_SECONDS = 0.1


@program.tool("watch")
@click.option(
    "--from",
    "first",
    type=click.IntRange(min=0),
    metavar="INDEX",
    help="Begin before this log entry; 0: with the oldest.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="COUNT", help="End after so many lines.")
@click.argument("mount")
@click.argument("path", required=False)
def command(*, mount: str, path: str | None, first: int | None, count: int | None) -> None:
    """Print a line of JSON for each file and directory that appears in the file system mounted at MOUNT.

    With PATH, a directory in it, only what appears there and below. What happens to the file system as a whole is
    always told: damage, further devices, a second master, a new mkfs. Ends when it is unmounted, or made anew.
    """
    record, _ = find_mount(mount)
    inside, below = find_mount(os.path.join(mount, path)) if path is not None else (record, b"")
    if inside.mount_id != record.mount_id:
        raise PathError(f"{path}: is not in the file system mounted at {mount}")
    prefix = os.fsdecode(below) + "/" if below else ""
    left = count
    for event in _follow(record, first):
        if not event.get("path", prefix).startswith(prefix):
            continue
        click.echo(json.dumps(event))
        if left is not None:
            left -= 1
            if not left:
                return


def _follow(record: MountRecord, index: int | None) -> Iterator[dict[str, Any]]:
    """The events of a mount, also over the deaths of its daemon's workers, until it is unmounted."""
    began = False
    deadline: float | None = None
    while True:
        try:
            for event in ControlClient.of_mount(record.mount_point).watch(index):
                if event["event"] == "begin":
                    index, deadline = event["index"], None
                    if began:
                        continue
                    began = True
                elif event["event"] in ("file", "directory", "device", "skipped"):
                    index = event["index"] + 1
                deadline = None
                yield event
            return
        except ControlError:
            if not _is_mounted(record):
                return
            deadline = deadline or time.monotonic() + _TAKEOVER_SECONDS
            if time.monotonic() > deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


def _is_mounted(record: MountRecord) -> bool:
    return any(found.mount_id == record.mount_id for found in mountapi.parse_mountinfo())
