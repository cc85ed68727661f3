# SPDX-License-Identifier: Apache-2.0
"""The process that holds a mount: it makes it, watches the worker that serves it, and takes it away.

It has one thread, maps nothing and never touches the mount itself, so that it can always act (decisions 14). Two small
children share its fate: a probe that opens a file before anybody else can, and a reaper that detaches the mount when
the supervisor is killed (decisions 17).
"""

import errno
import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from uuid import UUID

import prctl

from famfs_server import privileges
from famfs_server.daemon import bootstrap, worker
from famfs_server.daemon.bootstrap import MountWatch, OwnFiles
from famfs_server.daemon.detaching import detach, remove_run_directory, unmount
from famfs_server.daemon.liveness import HUNG_SECONDS, MAX_DEATHS, Deaths, Pulse
from famfs_server.daemon.options import MountOptions
from famfs_server.daemon.processes import STOP, Processes
from famfs_server.daemon.worker import Negotiated
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.errors import MountError
from famfs_server.fuse.abi import BACKING_MAP
from famfs_server.fuse.dialects import settle
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.fuse.session import Session
from famfs_server.omf import layout

log = logging.getLogger(__name__)

PROBE_SECONDS = 60.0
PULSE_SECONDS = 1.0


@dataclass(slots=True)
class Supervisor:
    """Makes and holds one mount. `run` does everything."""

    options: MountOptions
    device: DaxDevice
    host: UUID | None
    run_directory: Path
    ready: Callable[[], None]
    """Called once the mount is usable."""
    background: bool = False
    """Whether the caller's terminal and pipes are given back, by every process of the mount."""
    _processes: Processes = field(default_factory=Processes)
    _meta: OwnFiles | None = None
    """Superblock and log, where the device is in famfs mode."""

    def run(self) -> None:
        """Mount, serve, and return when the file system is unmounted.

        Raises FamfsError when it could not be mounted, and nothing is left of it then, or when the service failed.
        """
        prctl.set_name("famfs-supervisor")
        privileges.prefer_survival()
        self._processes.catch_signals()
        fuse = _open_fuse()
        session = Session.create(fuse)
        try:
            mount = DetachedMount.create(
                fuse,
                self.device.path,
                attributes=self.options.attributes,
                allow_other=self.options.allow_other,
                default_permissions=self.options.default_permissions,
            )
            try:
                before = self._bootstrap(session, mount) if self.device.mode is Mode.FSDEV else None
                served, agreed = self._start_worker(session, mount, before)
                if before is None:
                    self._register(fuse, agreed)
                self._probe(fuse, mount)
                device_number = mount.device
                keepalive = self._start_reaper(fuse, mount, device_number)
                mount.attach(self.options.mount_point)
            finally:
                mount.close()
            try:
                self.ready()
                privileges.keep_only((privileges.CAP_SYS_ADMIN,))
                self._watch(session, served, agreed, device_number)
            finally:
                detach(self.options.mount_point, device_number)
                os.write(keepalive, b"done")
                os.close(keepalive)
        finally:
            self._let_go()
            os.close(fuse)
            self._processes.end()

    # -- the steps of mounting ------------------------------------------------------------------

    def _fork_worker(self, session: Session, messages: int, takeover: Negotiated | None, *unwanted: int) -> int:
        """Start a worker without the `unwanted` descriptors; its pid."""
        assignment = worker.Assignment(
            self.options,
            self.device,
            self.host,
            session,
            self.run_directory,
            messages,
            takeover,
            self.background,
            self._meta.files if self._meta else None,
        )

        def serve() -> int:
            for descriptor in unwanted:
                os.close(descriptor)
            return worker.run(assignment)

        return self._processes.fork("worker", serve)

    def _start_worker(
        self, session: Session, mount: DetachedMount, before: Negotiated | None
    ) -> tuple[int, Negotiated]:
        """Start the first worker and wait until it serves; its pid, and what it has agreed, or others `before`."""
        hear, speak = os.pipe()
        pid = self._fork_worker(session, speak, before, hear, mount.fd)
        os.close(speak)
        try:
            return pid, bootstrap.await_service(self._processes, pid, hear)
        finally:
            os.close(hear)

    def _bootstrap(self, session: Session, mount: DetachedMount) -> Negotiated:
        """Open superblock and log through the mount, and keep them (decisions 20); what was agreed meanwhile."""

        def serve(messages: int, lengths: int) -> int:
            os.close(mount.fd)
            return self._serve_meta(session, messages, lengths)

        def ask(directory: int, channel: socket.socket, announce: Callable[[int], None]) -> int:
            os.close(session.fuse)
            return bootstrap.ask_meta(
                directory, self.device, self.host, channel, read_only=self.options.read_only, announce=announce
            )

        steps = bootstrap.Bootstrap(self._processes, serve, ask, lambda agreed: self._register(session.fuse, agreed))
        agreed, self._meta = steps.run(mount)
        return agreed

    def _serve_meta(self, session: Session, messages: int, lengths: int) -> int:
        return bootstrap.serve_meta(session, self.options, self.device, messages, lengths)

    def _let_go(self) -> None:
        """Close the mount's own files, which keep the connection, and have the worker do the same."""
        if self._meta is not None:
            self._meta.close(self._processes)
            self._meta = None

    def _register(self, fuse: int, agreed: Negotiated) -> None:
        """Hand the device to a kernel that wants it pushed, before any file can be opened (protocol 2.1).

        A refusal spoils the slot for the whole connection, so it fails the mount (protocol 3.3).
        """
        dialect = agreed.decision.dialect
        if dialect is None or dialect.push_ioctl is None:
            return
        try:
            result = fcntl.ioctl(fuse, dialect.push_ioctl, BACKING_MAP.pack(self.device.fd, 0, 0))
        except OSError as error:
            settle((dialect,), -(error.errno or errno.EIO))
        else:
            log.debug("the kernel took %s as device 0: %r", self.device.path, result)

    def _probe(self, fuse: int, mount: DetachedMount) -> None:
        """Open a file through the detached mount, as the first user will (findings 1.1).

        In a process of its own without /dev/fuse: should the worker fail now, the probe's request fails with the
        connection, where a process that holds the descriptor would wait for itself for ever.
        """

        def open_superblock() -> int:
            os.close(fuse)
            self.device.close()
            if self._meta:
                self._meta.files.close()
            descriptor = os.open(".meta/.superblock", os.O_RDONLY, dir_fd=mount.fd)
            magic = os.read(descriptor, 8)
            os.close(descriptor)
            return 0 if int.from_bytes(magic, "little") == layout.SUPERBLOCK_MAGIC else 3

        pid = self._processes.fork("probe", open_superblock)
        deadline = time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            happened = self._processes.wait(timeout=deadline - time.monotonic())
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

    def _start_reaper(self, fuse: int, mount: DetachedMount, device_number: int) -> int:
        """Start the reaper; the pipe that keeps it waiting. Closing it without a word makes it detach the mount."""
        wait, keepalive = os.pipe()

        def reap() -> int:
            os.close(fuse)
            os.close(keepalive)
            mount.close()
            self.device.close()
            if self._meta:
                self._meta.files.close()
            os.setsid()
            if self.background:
                worker.leave_terminal()
            prctl.set_name("famfs-reaper")
            for number in STOP:
                signal.signal(number, signal.SIG_IGN)
            privileges.keep_only((privileges.CAP_SYS_ADMIN,))
            if os.read(wait, 16):
                return 0
            detach(self.options.mount_point, device_number)
            remove_run_directory(self.run_directory)
            return 0

        self._processes.fork("reaper", reap, stays=True)
        os.close(wait)
        self._processes.close_in_children.append(keepalive)
        return keepalive

    # -- while mounted --------------------------------------------------------------------------

    def _watch(self, session: Session, served: int, agreed: Negotiated, device_number: int) -> None:
        """Wait for the end, which is an unmount; a signal to us unmounts, a worker that dies gets a successor."""
        record = session.record
        deaths = Deaths(record)
        pulse = Pulse(session)
        watch = MountWatch(device_number) if self._meta else None
        while True:
            if watch and watch.gone():
                self._let_go()
            happened = self._processes.wait(*(watch.descriptors if watch else ()), timeout=PULSE_SECONDS)
            if served in happened.ended:
                status = happened.ended[served]
                # Without the mount's own files nobody can take over.
                if status == 0 or (watch and not self._meta):
                    return
                if deaths.another():
                    raise MountError(
                        f"{MAX_DEATHS} workers in a row have ended without having served anything, the last one with "
                        f"status {status}; unmounted"
                    )
                log.warning("worker %d has ended with status %d; another one takes over", served, status)
                session.drain()
                record.taken_over()
                served = self._fork_worker(session, -1, agreed)
                deaths.begin()
                pulse.begin()
            elif pulse.lost():
                log.error("worker %d has not answered for %.0f seconds; it is replaced", served, HUNG_SECONDS)
                os.kill(served, signal.SIGKILL)
                pulse.begin()
            if happened.stop and not unmount(self.options.mount_point, device_number):
                # Detached already, and somebody still has a file open: the second request to stop means it.
                return


def _open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"cannot open /dev/fuse: {os.strerror(error.errno or 0)}; is the module fuse loaded?"
        ) from error


def exit_process(status: int) -> NoReturn:
    """End a daemon without the interpreter's clean-up, which waits for threads that block in system calls."""
    logging.shutdown()
    os._exit(status)
