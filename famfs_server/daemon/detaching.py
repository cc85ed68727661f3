# SPDX-License-Identifier: Apache-2.0
"""What has to be taken away when a mount ends: the mount itself, and what lies in its run-time directory."""

import logging
from pathlib import Path

from famfs_server.daemon import stacks
from famfs_server.daemon.control_client import SOCKET_NAME
from famfs_server.daemon.upgrade_client import SUPERVISOR_SOCKET
from famfs_server.errors import MountError
from famfs_server.fuse import mountapi

log = logging.getLogger(__name__)


def is_mounted(mount_point: str, device_number: int) -> bool:
    """Whether the file system with this device number is visible at the place."""
    return any(record.device == device_number for record in mountapi.find_mounts(mount_point=mount_point))


def unmount(mount_point: str, device_number: int) -> bool:
    """Unmount, or detach while files are open; False if that has been done before. Raises MountError."""
    if not is_mounted(mount_point, device_number):
        return False
    try:
        mountapi.unmount(mount_point)
    except MountError as error:
        log.warning("%s; detaching it, files that are open stay usable until they are closed", error)
        mountapi.unmount(mount_point, lazy=True)
    return True


def detach(mount_point: str, device_number: int) -> None:
    """Take the mount away if it is still there, and no other one that came to the same place.

    Nobody serves it any more. Its requests are ended first: a notification that waits for one of them keeps
    /dev/fuse open, and with it the connection.
    """
    try:
        if is_mounted(mount_point, device_number):
            mountapi.unmount(mount_point, lazy=True, force=True)
    except (OSError, MountError) as error:
        log.error("cannot detach %s: %s", mount_point, error)


def remove_run_directory(directory: Path) -> None:
    """Take away what a mount has left in its run-time directory, and the directory."""
    for name in (SOCKET_NAME, SUPERVISOR_SOCKET, stacks.FILE_NAME):
        (directory / name).unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError as error:
        log.debug("%s stays: %s", directory, error)
