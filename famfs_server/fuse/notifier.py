# SPDX-License-Identifier: Apache-2.0
"""Notifications to the kernel, written by one thread of their own (decisions 10).

The kernel may make the writer of a notification wait for a lock that is held by a request, so no plane that answers
requests may ever write one itself.
"""

import errno
import logging
import os
import queue
import threading

log = logging.getLogger(__name__)

_ROOM = 4096


class Notifier:
    """Sends notifications on the descriptor `fuse`, in order, some time later."""

    def __init__(self, fuse: int) -> None:
        self._fuse = fuse
        self._queue: queue.Queue[bytes] = queue.Queue(_ROOM)
        self.dropped = 0
        """Notifications that found no room; each is a hint that the kernel can do without."""
        threading.Thread(target=self._send, name="notifier", daemon=True).start()

    def put(self, notification: bytes) -> None:
        """Queue a notification (`abi.inval_entry` and its like); never waits."""
        try:
            self._queue.put_nowait(notification)
        except queue.Full:
            self.dropped += 1

    def _send(self) -> None:
        while True:
            notification = self._queue.get()
            try:
                os.write(self._fuse, notification)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                # ENOENT: the kernel does not know the name or inode, so there is nothing to forget.
                if error.errno != errno.ENOENT:
                    log.warning("the kernel refused a notification: %s", error)
