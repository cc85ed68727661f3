# SPDX-License-Identifier: Apache-2.0
"""What a running supervisor executes when its mount is to be served by the program that is installed now.

`check FD` says whether this program understands the state described in the memory file FD, in one line, and by its exit
status; it changes nothing. `serve FD` goes on with the mount, in the process that held it before.
"""

import os
import socket
import sys

from famfs_server.daemon import handover, lifecycle
from famfs_server.daemon.handover import Held
from famfs_server.daemon.supervisor import Predecessor, exit_process
from famfs_server.daemon.upgrade import Asker
from famfs_server.errors import FamfsError


def main() -> None:
    """The task and the descriptor come as arguments."""
    task, number = sys.argv[1], int(sys.argv[2])
    try:
        document = handover.read(number)
        if task == "check":
            handover.check(document)
            return
        os.close(number)
        descriptors: dict[str, int] = document["descriptors"]
        for descriptor in descriptors.values():
            os.set_inheritable(descriptor, False)
        held = Held.restore(document, descriptors)
    except FamfsError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    predecessor = Predecessor(
        document["worker"],
        document["reaper"],
        descriptors.get("keepalive", -1),
        Asker(socket.socket(fileno=descriptors["asker"])),
    )
    exit_process(lifecycle.go_on(held, predecessor, store=document["store"]))


if __name__ == "__main__":
    main()
