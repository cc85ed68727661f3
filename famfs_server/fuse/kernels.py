# SPDX-License-Identifier: Apache-2.0
"""The FUSE implementations that a kernel can have, and the choice of one for a mount.

Every kernel has its own FUSE (`/dev/fuse`). Beside it the module famfs.ko (`kernel/`) can be loaded: a second FUSE with
extent maps, which has other names for the device, the file system type and the control file system.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from famfs_server.errors import MountError

Choice = Literal["auto", "fuse", "famfs"]
"""What the mount option `kernel=` says."""


@dataclass(frozen=True)
class KernelFuse:
    """One implementation of FUSE in a kernel."""

    name: Literal["fuse", "famfs"]
    device: str
    """The character device that a server reads requests from."""
    fstype: str
    """The file system type for fsopen(2)."""
    subtype: str | None
    """The subtype that a mount gets, if the type alone does not name famfs."""
    connections: Path
    """Where its control file system is mounted: a directory for each connection, named by the minor device number."""

    @property
    def shown_type(self) -> str:
        """The type of its mounts in mountinfo."""
        return self.fstype if self.subtype is None else f"{self.fstype}.{self.subtype}"


SYSTEM = KernelFuse("fuse", "/dev/fuse", "fuse", "famfs", Path("/sys/fs/fuse/connections"))
MODULE = KernelFuse("famfs", "/dev/famfs", "famfs", None, Path("/sys/fs/famfs/connections"))

ALL = (SYSTEM, MODULE)

SHOWN_TYPES = frozenset(kernel.shown_type for kernel in ALL)
"""The types of this server's mounts in mountinfo."""


def is_loaded(device: str | os.PathLike[str] = MODULE.device) -> bool:
    """Whether the module is loaded: its device is there."""
    try:
        return stat.S_ISCHR(os.stat(device).st_mode)
    except OSError:
        return False


def choose(choice: Choice, *, famfs_mode: bool, loaded: bool) -> KernelFuse:
    """The implementation for a mount.

    `auto` takes the module where it is `loaded` and the device is in famfs mode, which only a kernel with extent maps
    can use; the system's FUSE serves everything else as well. Raises MountError for `famfs` where it is not loaded.
    """
    if choice == "famfs" and not loaded:
        raise MountError("kernel=famfs: there is no /dev/famfs; load the module: modprobe famfs")
    if choice == "famfs" or (choice == "auto" and famfs_mode and loaded):
        return MODULE
    return SYSTEM


def of_descriptor(fuse: int) -> KernelFuse:
    """The implementation that a descriptor of its device belongs to. Sends no request."""
    try:
        number = os.stat(MODULE.device).st_rdev
    except OSError:
        return SYSTEM
    status = os.fstat(fuse)
    return MODULE if stat.S_ISCHR(status.st_mode) and status.st_rdev == number else SYSTEM
