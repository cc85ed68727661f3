# SPDX-License-Identifier: Apache-2.0
"""The first user of a mount: opens a file through it before anybody else can see it (findings 1.1).

It is a process of its own without /dev/fuse. Should the worker fail now, its request fails with the connection, where a
process that holds the descriptor would wait for itself for ever.
"""

import os
from collections.abc import Callable

from famfs_server.daemon.processes import Processes
from famfs_server.errors import MountError
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.omf import layout

PROBE_SECONDS = 60.0


def probe(processes: Processes, mount: DetachedMount, let_go: Callable[[], None]) -> None:
    """Read the superblock's file through a detached mount. Raises MountError when that fails, or the worker ends.

    `let_go` is called in the new process, which then has neither the connection nor a device.
    """

    def open_superblock() -> int:
        let_go()
        descriptor = os.open(".meta/.superblock", os.O_RDONLY, dir_fd=mount.fd)
        magic = os.read(descriptor, 8)
        os.close(descriptor)
        return 0 if int.from_bytes(magic, "little") == layout.SUPERBLOCK_MAGIC else 3

    pid = processes.fork("probe", open_superblock)
    for happened in processes.during(PROBE_SECONDS):
        # The worker's death first: it may come with the probe's, and nobody hears of it again.
        if happened.ended.keys() - {pid}:
            raise MountError("the serving process ended during the self-test")
        if pid in happened.ended:
            if happened.ended[pid] == 0:
                return
            raise MountError("the first file opened on the new mount could not be read; see the log")
        if happened.stop:
            raise MountError("interrupted before the mount was complete")
    raise MountError(f"the self-test got no answer in {PROBE_SECONDS:.0f} seconds")
