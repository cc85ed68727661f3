# SPDX-License-Identifier: Apache-2.0
"""Notifications to the kernel, written by a process of their own (decisions 10).

The kernel may make the writer of a notification wait for a lock that a request holds, and nothing but the answer to
that request ends the wait, not even SIGKILL. A process with such a thread does not end when it is killed, so nobody
could take its place and answer. So the writer is neither a plane that answers requests nor in the same process.
"""

import errno
import fcntl
import logging
import os
import select
import threading
import time
from collections import deque

from famfs_server.fuse import abi

log = logging.getLogger(__name__)

_ROOM = 1 << 20
"""Bytes of notifications on their way: what a pipe may hold without privileges."""
_MOST = 1 << 15
"""Notifications that wait for room in the pipe: twice as many as there can be new files."""
_GATHER_SECONDS = 0.02
"""What is notified within this time goes out together: the kernel then gives many inodes back in one request, and the
worker is not disturbed between two requests. Nobody waits for a notification."""


class Notifier:
    """Hands notifications to the process at the other end of a pipe, which sends them in order, some time later."""

    def __init__(self, sink: int) -> None:
        """`sink` is the pipe's end to write to."""
        self._sink = sink
        os.set_blocking(sink, False)
        try:
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _ROOM)
        except PermissionError:
            log.debug("the pipe for notifications stays small: its owner has many")
        self._waiting: deque[bytes] = deque()
        self._retrying = threading.Lock()
        self.dropped = 0
        """Notifications that found no room at all; each is a hint that the kernel can do without."""

    def put(self, notification: bytes) -> None:
        """Queue a notification (`abi.inval_entry` and its like); never waits."""
        if len(self._waiting) >= _MOST:
            self.dropped += 1
        elif self._waiting or not self._write(notification):
            self._waiting.append(notification)

    def retry(self) -> None:
        """Hand over what found no room in the pipe; to be called from time to time.

        Without their INVAL_ENTRY new files would keep their provisional rows until memory is short.
        """
        with self._retrying:
            while self._waiting and self._write(self._waiting[0]):
                self._waiting.popleft()

    @property
    def gone(self) -> bool:
        """Whether the process at the other end has ended."""
        return other_end_gone(self._sink)

    def _write(self, notification: bytes) -> bool:
        try:
            os.write(self._sink, notification)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self.dropped += 1
        return True


def other_end_gone(descriptor: int) -> bool:
    """Whether nobody has the other end of a pipe or a socket any more."""
    watched = select.poll()
    watched.register(descriptor, 0)
    return bool(watched.poll(0))


def send_all(source: int, fuse: int) -> None:
    """Send what comes out of the pipe `source` to the kernel, until its other end is closed or the mount has ended."""
    data = b""
    while more := os.read(source, 1 << 16):
        data += more
        while len(data) >= abi.OUT_HEADER.size:
            length, _, _ = abi.OUT_HEADER.unpack_from(data)
            if len(data) < length:
                break
            notification, data = data[:length], data[length:]
            try:
                os.write(fuse, notification)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                # ENOENT: the kernel does not know the name or inode, so there is nothing to forget.
                if error.errno != errno.ENOENT:
                    log.warning("the kernel refused a notification: %s", error)
        time.sleep(_GATHER_SECONDS)
