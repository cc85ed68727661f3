# SPDX-License-Identifier: Apache-2.0
"""The owner of /dev/fuse: reads requests, answers the hot ones, passes the others to libfuse through a socket pair.

libfuse is told that its session descriptor is /dev/fd/N, one end of a SOCK_SEQPACKET pair. So INIT can be masked before
libfuse sees it and completed before the kernel does, and requests that libfuse does not know never reach it (design 4).
"""

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable

from famfs_server.errors import NegotiationError
from famfs_server.fuse import abi, negotiation
from famfs_server.fuse.dialects import Decision, InitRequest
from famfs_server.fuse.filesystem import FileSystem
from famfs_server.fuse.fmap_replies import FmapReplies
from famfs_server.fuse.requests import RequestPlane

log = logging.getLogger(__name__)

MAX_WRITE = 1 << 20
"""Bytes of one READ or WRITE: 256 pages, what kernels allow unless their administrator raised it."""
_BUFFER = MAX_WRITE + 4096
_SOCKET_BUFFER = 8 << 20
_SMALL_SOCKET_BUFFER = 1 << 17
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class Channel:
    """One FUSE connection: a descriptor of /dev/fuse whose mount exists, and the pair to libfuse."""

    def __init__(self, fuse: int) -> None:
        """Take over `fuse`. `max_write` is what one message to libfuse has room for (decisions 17)."""
        self.fuse = fuse
        self.libfuse_end, self._our_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.max_write = MAX_WRITE
        for end in (self.libfuse_end, self._our_end):
            try:
                for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
                    end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
            except PermissionError:
                self.max_write = _SMALL_SOCKET_BUFFER
                log.debug("CAP_NET_ADMIN is missing: requests are limited to %d bytes", self.max_write)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._initialised = threading.Event()
        self._failure: NegotiationError | None = None
        self.request: InitRequest | None = None
        self.relayed = 0
        """Requests passed to libfuse so far."""

    def read_init(self) -> InitRequest:
        """Read INIT, which is queued as soon as the mount exists. Raises NegotiationError."""
        length = os.readv(self.fuse, [self._buffer])
        self.request = negotiation.parse_init_request(bytes(self._view[:length]))
        self._init = bytes(self._view[:length])
        return self.request

    def start(
        self,
        filesystem: FileSystem,
        decision: Decision,
        *,
        fast: bool,
        devices: tuple[str, ...],
        finished: Callable[[], None],
    ) -> None:
        """Hand INIT to libfuse, and begin to serve in two threads once it is answered.

        `devices` are the paths of the devices by number, for kernels that ask. `finished` is called from a thread when
        the connection has ended: unmounted or aborted. Whoever calls this runs pyfuse3's main loop meanwhile, which
        makes libfuse answer.
        """
        if self.request is None:
            raise ValueError("INIT has not been read")
        maps = FmapReplies(filesystem, decision.candidates, devices) if decision.candidates else None
        self.plane = RequestPlane(filesystem, self.fuse, self._buffer, fast=fast, maps=maps)
        self._our_end.send(negotiation.mask_for_libfuse(self._init))
        threading.Thread(target=self._replies, args=(self.request, decision), name="replies", daemon=True).start()
        threading.Thread(target=self._requests, args=(finished,), name="requests", daemon=True).start()

    def wait_initialised(self) -> None:
        """Wait until INIT is answered. Raises NegotiationError if that failed."""
        self._initialised.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End libfuse's session; its main loop returns."""
        self._our_end.close()

    def _requests(self, finished: Callable[[], None]) -> None:
        self._initialised.wait()
        readv, fuse, buffers, answer = os.readv, self.fuse, [self._buffer], self.plane.answer
        try:
            while self._failure is None:
                try:
                    length = readv(fuse, buffers)
                except OSError as error:
                    # ENOENT: the request was interrupted before we had it; EINTR and EAGAIN: nothing was read.
                    if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        continue
                    if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                        log.error("cannot read requests: %s", error)
                    return
                if not length:
                    return
                if not answer(length):
                    self.relayed += 1
                    self._our_end.send(self._view[:length])
        except OSError as error:
            if self._failure is None:
                log.error("the request plane ends: %s", error)
        finally:
            finished()

    def _replies(self, request: InitRequest, decision: Decision) -> None:
        buffer = bytearray(_BUFFER)
        view = memoryview(buffer)
        length = self._our_end.recv_into(buffer)
        try:
            answer = negotiation.complete_reply(bytes(view[:length]), request, decision, max_write=self.max_write)
        except NegotiationError as error:
            self._failure = error
            answer = negotiation.refuse_reply(request.unique, errno.EPROTO)
        try:
            os.write(self.fuse, answer)
        except OSError as error:
            self._failure = NegotiationError(f"the kernel did not take the answer to INIT: {error}")
        self._initialised.set()
        while True:
            try:
                length = self._our_end.recv_into(buffer)
            except OSError:
                return
            if not length:
                return
            self._pass_on(view[:length])

    def _pass_on(self, data: memoryview) -> None:
        """Write a reply of libfuse's to the kernel; one that the kernel rejects must not leave its caller hanging."""
        try:
            os.write(self.fuse, data)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return
            _, _, unique = abi.OUT_HEADER.unpack_from(data)
            log.error("the kernel rejected a reply of %d bytes: %s", len(data), error)
            try:
                os.write(self.fuse, abi.error_reply(unique, errno.EIO))
            except OSError as again:
                log.debug("nor did it take the error: %s", again)
