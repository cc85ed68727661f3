# SPDX-License-Identifier: Apache-2.0
"""The locks that a mount takes on its device, and what is said when somebody else has them (docs/design.md 10)."""

from uuid import UUID

from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import DeviceBusyError, FamfsError

DYING_MOUNT_SECONDS = 5.0
"""How long a new mount waits for one that is going away (decisions 21)."""
_MOUNT_FAILED = 32


def lock_for_mount(device: DaxDevice, host: UUID | None) -> None:
    """Keep others from making the file system anew, and this host from mounting it twice.

    In famfs mode no other host of this kernel can have the device either. Raises DeviceBusyError.
    """
    busy = "its file system is being made or repaired"
    device.require_lock(Lock.MOUNTED, exclusive=False, wait=DYING_MOUNT_SECONDS, why=busy)
    if not device.lock_host(host or UUID(int=0), wait=DYING_MOUNT_SECONDS):
        raise _mount_busy(f"{device.path} is already mounted by this host")
    if device.mode is Mode.FSDEV and not device.lock(Lock.KERNEL, exclusive=True, wait=DYING_MOUNT_SECONDS):
        raise _mount_busy(f"{device.path} is already mounted; in famfs mode one mount has the whole device")


def lock_for_writing(device: DaxDevice, host: UUID | None, owner: UUID) -> None:
    """Be the log's only writer if `host` is the master of a file system that belongs to `owner`.

    Raises DeviceBusyError.
    """
    if host == owner and not device.lock(Lock.WRITER, exclusive=True, wait=DYING_MOUNT_SECONDS):
        raise _mount_busy(f"{device.path} is being written to by another famfs command")


def _mount_busy(line: str) -> FamfsError:
    error = DeviceBusyError(line)
    error.exit_status = _MOUNT_FAILED
    return error
