# SPDX-License-Identifier: Apache-2.0
"""The owner of /dev/fuse: reads requests, answers the hot ones, passes the others to libfuse through a socket pair.

libfuse is told that its session descriptor is /dev/fd/N, one end of a SOCK_SEQPACKET pair. So INIT can be masked before
libfuse sees it and completed before the kernel does, and requests that libfuse does not know never reach it (design 4).
"""

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from time import perf_counter_ns

from famfs_server.errors import NegotiationError
from famfs_server.fuse import abi, negotiation
from famfs_server.fuse.abi import InitFlag
from famfs_server.fuse.dialects import Decision, InitRequest
from famfs_server.fuse.filesystem import FileSystem
from famfs_server.fuse.fmap_replies import FmapReplies
from famfs_server.fuse.requests import REQUEST, RequestPlane
from famfs_server.fuse.session import BUFFER, Session

log = logging.getLogger(__name__)


GIVE_WAY_SECONDS = 0.002
"""Long computations go in steps of about a millisecond, and two of them may go on at once."""


FEW_LOOKS, MANY_LOOKS = 60, 500
"""How often the request plane looks for another request before it sleeps: about 0.4 µs each.

A program that makes one call after the other sends its next request soon. To wake a thread on a processor that has gone
idle takes longer than most requests, above all in a virtual machine, where it costs an exit to the host; and there the
program, which has to be woken too, takes long to send the next one. Many looks are for requests of which the last one
came as soon as that, so that those that come now and then cost few.
"""
SOON = 200_000
"""Nanoseconds of sleep that many looks would have saved; hypervisors look about as long before a processor halts."""


class Channel:
    """One worker's hold of a session: INIT, then requests and replies in two threads."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.fuse = session.fuse
        self.libfuse_end, self._our_end = session.libfuse_end, session.our_end
        self._initialised = threading.Event()
        self._failure: NegotiationError | None = None
        self._taken_over = False
        self._request_thread = self._answered = 0
        self.init = b""
        """The INIT request as the kernel sent it, for a successor."""

    def read_init(self) -> InitRequest:
        """Read INIT, which is queued as soon as the mount exists. Raises NegotiationError."""
        buffer = self.session.record.buffer
        length = os.readv(self.fuse, [buffer])
        self.init = bytes(buffer[:length])
        return negotiation.parse_init_request(self.init)

    def resume(self, init: bytes) -> None:
        """Take the connection over from a worker that has answered `init`."""
        self.init = init
        self._taken_over = True

    def start(
        self,
        filesystem: FileSystem,
        decision: Decision,
        *,
        fast: bool,
        serve_unmapped: bool,
        devices: tuple[str, ...],
        finished: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        """Hand INIT to libfuse, and begin to serve in two threads once it is answered.

        `fast` and `serve_unmapped` are for the request plane. `devices` are the paths of the devices by
        number, for kernels that ask. `finished` is called from a thread when the connection has ended: unmounted or
        aborted; `failed` when a thread cannot go on though it has not, so that another process has to. Whoever calls
        this runs pyfuse3's main loop meanwhile, which makes libfuse answer.
        """
        request = negotiation.parse_init_request(self.init)
        pushed = self.session.record.pushed
        maps = FmapReplies(filesystem, decision.candidates, devices, pushed=pushed) if decision.candidates else None
        self.plane = RequestPlane(filesystem, self.session, fast=fast, maps=maps, serve_unmapped=serve_unmapped)
        if self._taken_over:
            self.plane.finish()
        self._our_end.send(negotiation.mask_for_libfuse(self.init))
        threading.Thread(target=self._replies, args=(request, decision, failed), name="replies", daemon=True).start()
        threading.Thread(target=self._requests, args=(finished, failed), name="requests", daemon=True).start()

    def wait_initialised(self) -> None:
        """Wait until INIT is answered. Raises NegotiationError if that failed."""
        self._initialised.wait()
        if self._failure is not None:
            raise self._failure

    def is_idle(self) -> bool:
        """Whether no request waits to be read, and none that was read last waits for its answer."""
        waiting = select.poll()
        waiting.register(self.fuse, select.POLLIN)
        return not waiting.poll(0) and not self.session.record.in_hand

    def give_way(self) -> None:
        """To be called between the steps of long computations: if requests have come meanwhile, more of them go first.

        The interpreter runs one thread at a time, and one that computes without a pause gets nearly all of it, because
        requests give it up at every system call (decisions 6).
        """
        answered = self.session.record.answered
        if answered != self._answered and threading.get_ident() != self._request_thread:
            time.sleep(GIVE_WAY_SECONDS)
        self._answered = answered

    def _requests(self, finished: Callable[[], None], failed: Callable[[], None]) -> None:
        self._initialised.wait()
        try:
            if self._failure is None:
                self._read_requests()
                self.plane.end()
            finished()
        except Exception:
            # With an end of this thread alone, nobody would answer, and nobody would miss it.
            log.exception("the request plane cannot go on; another worker takes over")
            failed()

    def _read_requests(self) -> None:
        """Read and answer requests until the connection has ended. Raises OSError when it cannot go on."""
        self._request_thread = threading.get_ident()
        record = self.session.record
        readv, fuse, buffers, answer = os.readv, self.fuse, [record.buffer], self.plane.answer
        waiting = select.poll()
        waiting.register(fuse, select.POLLIN)
        few, many = range(FEW_LOOKS), range(MANY_LOOKS)
        look, looks = waiting.poll, few
        while True:
            asleep = 0
            for _ in looks:
                if look(0):
                    break
            else:
                asleep = perf_counter_ns()
            try:
                length = readv(fuse, buffers)
            except OSError as error:
                # ENOENT: the request was interrupted before we had it; EINTR and EAGAIN: nothing was read.
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                raise
            if not length:
                return
            if asleep:
                looks = many if perf_counter_ns() - asleep < SOON else few
            if not answer(length):
                _, _, unique, _ = REQUEST.unpack_from(record.buffer)
                record.relayed(unique)
                self._our_end.send(record.buffer[:length])
                record.done(unique)

    def _replies(self, request: InitRequest, decision: Decision, failed: Callable[[], None]) -> None:
        try:
            self._write_replies(request, decision)
        except Exception:
            log.exception("replies of libfuse cannot be passed on; another worker takes over")
            failed()

    def _write_replies(self, request: InitRequest, decision: Decision) -> None:
        buffer = bytearray(BUFFER)
        view = memoryview(buffer)
        length = self._our_end.recv_into(buffer)
        if self._taken_over:
            # The kernel had its answer from the worker before; this one's libfuse must not give it another.
            self._recover(request)
        else:
            try:
                os.write(self.fuse, self._init_reply(bytes(view[:length]), request, decision))
            except OSError as error:
                self._failure = NegotiationError(f"the kernel did not take the answer to INIT: {error}")
        record = self.session.record
        if not self._taken_over:
            # It lies in the buffer, and would look as if somebody waited for it until the next request comes.
            record.done(request.unique)
        record.recovered()
        self._initialised.set()
        while length := self._our_end.recv_into(buffer):
            self._pass_on(view[:length])
            record.returned(abi.OUT_HEADER.unpack_from(buffer)[2])

    def _recover(self, request: InitRequest) -> None:
        """See to what the worker before had in hand: the kernel sends it again, or it ends with EIO (decisions 15)."""
        record = self.session.record
        if request.flags & InitFlag.HAS_RESEND:
            try:
                os.write(self.fuse, abi.resend())
            except OSError as error:
                log.warning("the kernel does not send again what was in hand: %s", error)
            else:
                record.forget_held()
                return
        failed = 0
        for unique in record.abandon():
            # ENOENT: it was answered, and nobody had noted that yet.
            with contextlib.suppress(OSError):
                os.write(self.fuse, abi.error_reply(unique, errno.EIO))
                failed += 1
        if failed:
            record.failed(failed)
            log.error("%d requests have ended with EIO: their worker died, and this kernel cannot repeat them", failed)

    def _init_reply(self, reply: bytes, request: InitRequest, decision: Decision) -> bytes:
        try:
            return negotiation.complete_reply(reply, request, decision, max_write=self.session.max_write)
        except NegotiationError as error:
            self._failure = error
            return negotiation.refuse_reply(request.unique, errno.EPROTO)

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
