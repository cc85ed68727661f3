# SPDX-License-Identifier: Apache-2.0
"""The process that detaches a mount whose supervisor has been killed (decisions 17).

It holds neither /dev/fuse, which would make it wait for itself, nor the device.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import prctl

from famfs_server import privileges
from famfs_server.daemon.detaching import detach, remove_run_directory
from famfs_server.daemon.processes import STOP, Processes
from famfs_server.daemon.worker import leave_terminal


def start_reaper(
    processes: Processes,
    device_number: int,
    mount_point: str,
    run_directory: Path,
    let_go: Callable[[], None],
    *,
    background: bool,
) -> tuple[int, int]:
    """Start it; its pid, and the end of the pipe that it waits at.

    What is written there ends it; if the pipe ends without a word, it takes the mount and `run_directory` away.
    `device_number` is that of the mount's file system. `let_go` is called in the new process, which then has neither
    the connection nor the mount nor a device.
    """
    wait, keepalive = os.pipe()

    def reap() -> int:
        let_go()
        os.close(keepalive)
        os.setsid()
        if background:
            leave_terminal()
        prctl.set_name("famfs-reaper")
        for number in STOP:
            signal.signal(number, signal.SIG_IGN)
        privileges.keep_only((privileges.CAP_SYS_ADMIN,))
        if os.read(wait, 16):
            return 0
        detach(mount_point, device_number)
        remove_run_directory(run_directory)
        return 0

    pid = processes.fork("reaper", reap, stays=True)
    os.close(wait)
    processes.close_in_children.append(keepalive)
    return pid, keepalive
