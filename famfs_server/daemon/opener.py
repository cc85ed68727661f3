# SPDX-License-Identifier: Apache-2.0
"""Opens files that stand for new space, for a worker that must not ask itself (design 6, `volume/spacefiles.py`).

To open a file of the own mount is to wait for the server's answers. So a process without /dev/fuse does it, through the
private copy of the mount, one for each worker; it ends with it. What it hands over has no name any more: the kernel
forgets the inode as soon as the worker has let go of it, whether that is alive or not.
"""

import errno
import os
import socket
import threading
from struct import Struct

import prctl

from famfs_server import privileges
from famfs_server.errors import DeviceError
from famfs_server.fuse.notifier import other_end_gone

SECONDS = 30.0
"""How long a worker waits for a file to be opened."""

_ANSWER = Struct("<i")
_LONGEST = 256


def serve(directory: int, worker: socket.socket) -> int:
    """Open what the worker asks for by name, in the `directory` that is `.meta`, until it is gone; exit status 0.

    An answer is an errno, or 0 and a descriptor.
    """
    prctl.set_name("famfs-opener")
    privileges.drop_all()
    while name := worker.recv(_LONGEST):
        path = os.fsdecode(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            worker.send(_ANSWER.pack(error.errno or errno.EIO))
            continue
        try:
            os.unlink(path, dir_fd=directory)
            socket.send_fds(worker, [_ANSWER.pack(0)], [descriptor])
        except OSError as error:
            worker.send(_ANSWER.pack(error.errno or errno.EIO))
        finally:
            os.close(descriptor)
    return 0


class OpenerLink:
    """A worker's end: asks for one file at a time, from any thread but the one that answers the kernel."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(SECONDS)
        self._asking = threading.Lock()

    def open(self, name: bytes) -> int:
        """The descriptor of an open file without a name. Raises DeviceError."""
        try:
            with self._asking:
                self._connection.send(name)
                answer, descriptors, _, _ = socket.recv_fds(self._connection, _LONGEST, 1)
        except TimeoutError as error:
            # What comes later would be taken for the answer to another question; the next worker has another opener.
            self._connection.shutdown(socket.SHUT_RDWR)
            raise DeviceError(f"new space was not opened through the own mount in {SECONDS:.0f} seconds") from error
        except OSError as error:
            raise DeviceError(f"new space cannot be reached through the own mount: {error}") from error
        if not answer:
            raise DeviceError("new space cannot be reached: the process that opens it through the own mount has gone")
        (number,) = _ANSWER.unpack(answer)
        if number:
            raise DeviceError(f"new space cannot be opened through the own mount: {os.strerror(number)}")
        return int(descriptors[0])

    @property
    def gone(self) -> bool:
        """Whether the opener has ended, and not because it was let go."""
        return self._connection.fileno() >= 0 and other_end_gone(self._connection.fileno())

    def close(self) -> None:
        """Let the opener end."""
        self._connection.close()
