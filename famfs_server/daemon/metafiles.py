# SPDX-License-Identifier: Apache-2.0
"""The open superblock and log of a mount, as its processes pass them on (design 3, decisions 20)."""

import os
from dataclasses import dataclass

from famfs_server.dax.device import DaxDevice
from famfs_server.dax.partial import PartialMemory
from famfs_server.omf import layout


@dataclass(frozen=True, slots=True)
class MetaFiles:
    """The open `.meta` files of a mount, and the pipe that says when to let go of them. Descriptors are inherited."""

    superblock: int
    log: int
    directory: int
    """`.meta` itself, through the private copy of the mount."""
    log_length: int
    """In bytes; asking the file for it would be a request."""
    writable: bool
    """Whether the log can be stored to."""
    released: int = -1
    """Readable, being at its end, once no path leads to the mount any more."""

    def memory(self, device: DaxDevice) -> PartialMemory:
        """Map them: the memory of the device as far as this process may reach it."""
        files = ((self.superblock, layout.SUPERBLOCK_REGION), (self.log, self.log_length))
        return PartialMemory(files, device.size, writable=(False, self.writable))

    def close(self) -> None:
        """Close this process's copies of the descriptors."""
        for descriptor in (self.superblock, self.log, self.directory, self.released):
            if descriptor >= 0:
                os.close(descriptor)
