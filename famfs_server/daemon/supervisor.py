# SPDX-License-Identifier: Apache-2.0
"""The process that holds a mount: it makes it, watches the worker that serves it, and takes it away.

It has one thread, maps nothing and never touches the mount itself, so that it can always act (decisions 14). Two small
children share its fate: a probe that opens a file before anybody else can, and a reaper that detaches the mount when
the supervisor is killed (decisions 17).
"""

import errno
import fcntl
import json
import logging
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from uuid import UUID

import prctl

from famfs_server import privileges
from famfs_server.daemon import worker
from famfs_server.daemon.options import MountOptions
from famfs_server.daemon.worker import Negotiated
from famfs_server.dax.device import DaxDevice
from famfs_server.errors import FamfsError, MountError
from famfs_server.fuse import mountapi
from famfs_server.fuse.abi import BACKING_MAP
from famfs_server.fuse.dialects import settle
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.fuse.session import Session, SessionRecord
from famfs_server.omf import layout

log = logging.getLogger(__name__)

PROBE_SECONDS = 60.0
PULSE_SECONDS = 1.0
HUNG_SECONDS = 5.0
"""A worker that has requests and moves none of them for so long is killed and replaced (decisions 16)."""
MAX_DEATHS = 5
SOON_SECONDS = 10.0
"""An idle worker that has lived longer than this did not die of what it began with."""
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
    _selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    _wakeup: socket.socket | None = None
    _children: dict[int, str] = field(default_factory=dict)
    _close_in_children: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Mount, serve, and return when the file system is unmounted.

        Raises FamfsError when it could not be mounted, and nothing is left of it then, or when the service failed.
        """
        prctl.set_name("famfs-supervisor")
        privileges.prefer_survival()
        self._catch_signals()
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
                served, agreed = self._start_worker(session, mount)
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
                _detach(self.options.mount_point, device_number)
                os.write(keepalive, b"done")
                os.close(keepalive)
        finally:
            os.close(fuse)
            self._end_children()

    # -- signals and children -------------------------------------------------------------------

    def _catch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._wakeup = ours
        self._close_in_children += [ours.fileno(), theirs.fileno()]
        signal.set_wakeup_fd(theirs.detach())
        for number in (*_STOP, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)
        self._selector.register(ours, selectors.EVENT_READ)

    def _fork(self, name: str, child: Callable[[], int]) -> int:
        """Start a child that ends with the supervisor; its pid."""
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._children[pid] = name
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*_STOP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in self._close_in_children:
                os.close(descriptor)
            prctl.set_pdeathsig(signal.SIGKILL if name != "reaper" else 0)
            if os.getppid() == parent or name == "reaper":
                status = child()
        except BaseException:
            log.exception("%s fails", name)
        finally:
            logging.shutdown()
            os._exit(status)

    def _wait(self, also: int | None = None, timeout: float | None = None) -> tuple[set[int], dict[int, int], bool]:
        """Wait for signals or for `also` to become readable: the signals, the children that ended with their statuses,
        and whether `also` is readable."""
        if also is not None:
            self._selector.register(also, selectors.EVENT_READ)
        try:
            events = self._selector.select(timeout)
        finally:
            if also is not None:
                self._selector.unregister(also)
        signals: set[int] = set()
        readable = False
        for key, _ in events:
            if key.fileobj is self._wakeup and self._wakeup is not None:
                signals.update(self._wakeup.recv(4096))
            else:
                readable = True
        ended: dict[int, int] = {}
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in self._children:
                del self._children[pid]
                ended[pid] = os.waitstatus_to_exitcode(status)
        return signals, ended, readable

    def _end_children(self) -> None:
        """Kill what is left of the children, which can be nothing that still serves."""
        deadline = time.monotonic() + 5
        while self._children and time.monotonic() < deadline:
            self._wait(timeout=0.2)
            for pid, name in self._children.items():
                if name != "reaper":
                    os.kill(pid, signal.SIGKILL)

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
        )

        def serve() -> int:
            for descriptor in unwanted:
                os.close(descriptor)
            return worker.run(assignment)

        return self._fork("worker", serve)

    def _start_worker(self, session: Session, mount: DetachedMount) -> tuple[int, Negotiated]:
        """Start the first worker and wait until it has answered INIT; its pid, and what was agreed."""
        hear, speak = os.pipe()
        pid = self._fork_worker(session, speak, None, hear, mount.fd)
        os.close(speak)
        try:
            while True:
                signals, ended, readable = self._wait(hear)
                if readable:
                    line = os.read(hear, 65536)
                    if line:
                        message = json.loads(line)
                        if "error" in message:
                            raise _failure(message["error"], message["status"])
                        # It may have said so and died: nobody hears of its death again.
                        if pid not in ended:
                            return pid, worker.negotiated(message)
                if pid in ended:
                    raise MountError(f"the serving process ended with status {ended[pid]} before it could serve")
                if signals & {*_STOP}:
                    raise MountError("interrupted before the mount was complete")
        finally:
            os.close(hear)

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
            descriptor = os.open(".meta/.superblock", os.O_RDONLY, dir_fd=mount.fd)
            magic = os.read(descriptor, 8)
            os.close(descriptor)
            return 0 if int.from_bytes(magic, "little") == layout.SUPERBLOCK_MAGIC else 3

        pid = self._fork("probe", open_superblock)
        deadline = time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            signals, ended, _ = self._wait(timeout=deadline - time.monotonic())
            # The worker's death first: it may come with the probe's, and nobody hears of it again.
            if ended.keys() - {pid}:
                raise MountError("the serving process ended during the self-test")
            if pid in ended:
                if ended[pid] == 0:
                    return
                raise MountError("the first file opened on the new mount could not be read; see the log")
            if signals & {*_STOP}:
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
            os.setsid()
            if self.background:
                worker.leave_terminal()
            prctl.set_name("famfs-reaper")
            for number in _STOP:
                signal.signal(number, signal.SIG_IGN)
            privileges.keep_only((privileges.CAP_SYS_ADMIN,))
            if os.read(wait, 16):
                return 0
            _detach(self.options.mount_point, device_number)
            remove_run_directory(self.run_directory)
            return 0

        self._fork("reaper", reap)
        os.close(wait)
        self._close_in_children.append(keepalive)
        return keepalive

    # -- while mounted --------------------------------------------------------------------------

    def _watch(self, session: Session, served: int, agreed: Negotiated, device_number: int) -> None:
        """Wait for the end, which is an unmount; a signal to us unmounts, a worker that dies gets a successor."""
        record = session.record
        deaths = Deaths(record)
        pulse = Pulse(session)
        while True:
            signals, ended, _ = self._wait(timeout=PULSE_SECONDS)
            if served in ended:
                status = ended[served]
                if status == 0:
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
            if signals & {*_STOP} and not self._unmount(device_number):
                # Detached already, and somebody still has a file open: the second request to stop means it.
                return

    def _unmount(self, device_number: int) -> bool:
        """Unmount, or detach while files are open; False if that has been done before."""
        if not _is_mounted(self.options.mount_point, device_number):
            return False
        try:
            mountapi.unmount(self.options.mount_point)
        except MountError as error:
            log.warning("%s; detaching it, files that are open stay usable until they are closed", error)
            mountapi.unmount(self.options.mount_point, lazy=True)
        return True


class Deaths:
    """Decides when to give up: after deaths in a row that show no progress (decisions 16)."""

    def __init__(self, record: SessionRecord) -> None:
        self._record = record
        self._in_hand = 0
        self._in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """A worker starts."""
        self._started = time.monotonic()
        self._answered = self._record.answered

    def another(self) -> bool:
        """A worker has died; whether that was one too many.

        A request that was in hand at this death and the one before becomes the poison that the next worker answers
        with EIO.
        """
        in_hand = self._record.in_hand
        same = in_hand != 0 and in_hand == self._in_hand
        if same:
            self._record.poison = in_hand
        idle = self._record.answered == self._answered and time.monotonic() - self._started < SOON_SECONDS
        self._in_a_row = self._in_a_row + 1 if same or idle else 0
        self._in_hand = in_hand
        return self._in_a_row >= MAX_DEATHS


class Pulse:
    """Notices a worker that lives and does not work: requests wait, and nothing has moved for a while."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending = select.poll()
        self._pending.register(session.fuse, select.POLLIN)
        self.begin()

    def begin(self) -> None:
        """A worker starts, or has just moved."""
        self._moved = time.monotonic()
        self._seen = self._progress()

    def lost(self) -> bool:
        """Whether the worker must be replaced."""
        progress = self._progress()
        if progress != self._seen or not self._waiting():
            self._moved = time.monotonic()
            self._seen = progress
        return time.monotonic() - self._moved > HUNG_SECONDS

    def _progress(self) -> tuple[int, ...]:
        record = self._session.record
        if record.at_libfuse:
            return record.answered, record.work, record.at_libfuse, record.beats
        return record.answered, record.work

    def _waiting(self) -> bool:
        record = self._session.record
        readable = any(event & select.POLLIN for _, event in self._pending.poll(0))
        return readable or record.in_hand != 0 or record.at_libfuse > 0


def _failure(line: str, status: int) -> FamfsError:
    error = MountError(line)
    error.exit_status = status
    return error


def _open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"cannot open /dev/fuse: {os.strerror(error.errno or 0)}; is the module fuse loaded?"
        ) from error


def _is_mounted(mount_point: str, device_number: int) -> bool:
    return any(record.device == device_number for record in mountapi.find_mounts(mount_point=mount_point))


def _detach(mount_point: str, device_number: int) -> None:
    """Take the mount away if it is still there, and no other one that came to the same place.

    Nobody serves it any more. Its requests are ended first: a notification that waits for one of them keeps
    /dev/fuse open, and with it the connection.
    """
    try:
        if _is_mounted(mount_point, device_number):
            mountapi.unmount(mount_point, lazy=True, force=True)
    except (OSError, MountError) as error:
        log.error("cannot detach %s: %s", mount_point, error)


def exit_process(status: int) -> NoReturn:
    """End a daemon without the interpreter's clean-up, which waits for threads that block in system calls."""
    logging.shutdown()
    os._exit(status)


def remove_run_directory(directory: Path) -> None:
    """Take away what a mount has left in its run-time directory, and the directory."""
    (directory / "sock").unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError as error:
        log.debug("%s stays: %s", directory, error)
