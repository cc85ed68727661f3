# SPDX-License-Identifier: Apache-2.0
"""Superblock and log of a device in famfs mode, read through our own detached mount (design 3, decisions 20).

User space cannot map such a device; a famfs kernel can, for files that it has a map of. Three processes take part. One
serves the connection without a volume: it answers INIT and what concerns `.meta` alone (`serve_meta`). Another one,
which does not hold /dev/fuse, opens the two files through a private copy of the mount, checks what they hold and hands
their descriptors over (`open_meta`). The supervisor keeps these; workers map what they inherit and send no request.
"""

import errno
import json
import logging
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from typing import Protocol
from uuid import UUID

import prctl

from famfs_server import privileges
from famfs_server.daemon import worker
from famfs_server.daemon.locking import lock_for_writing
from famfs_server.daemon.metafiles import MetaFiles
from famfs_server.daemon.options import MountOptions
from famfs_server.daemon.processes import Processes
from famfs_server.daemon.worker import Negotiated
from famfs_server.dax.device import DaxDevice
from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import FamfsError, MediaError, MountError, NegotiationError
from famfs_server.fuse import dialects, metaplane, negotiation
from famfs_server.fuse.dialects import Decision, Dialect
from famfs_server.fuse.metaplane import MetaPlane
from famfs_server.fuse.mountapi import parse_mountinfo
from famfs_server.fuse.session import BUFFER, Session
from famfs_server.omf import layout, superblock
from famfs_server.omf import log as omf_log

log = logging.getLogger(__name__)

OPEN_SECONDS = 60.0
"""How long opening superblock and log may take."""

_WAITING_SECONDS = 1.0
_MOUNTINFO = Path("/proc/self/mountinfo")
_LENGTH = Struct("<Q")
_SERVER_FAILED = "the process that served superblock and log has failed; see the log"
_ASKER_FAILED = "the process that opens superblock and log has died; see the log"


# -- the process that answers ------------------------------------------------------------------------


def serve_meta(session: Session, options: MountOptions, device: DaxDevice, messages: int, lengths: int) -> int:
    """Answer INIT and then requests for `.meta`, until the other end of the pipe `lengths` is closed; the exit status.

    The message is that of `worker.run`. The length of the log comes through `lengths`, before anybody asks for it.
    """
    prctl.set_name("famfs-bootstrap")
    try:
        plane = _negotiate(session, options, device, messages, LogLength(lengths))
    except FamfsError as error:
        worker.tell(messages, {"error": str(error), "status": error.exit_status})
        return 1
    privileges.drop_all()
    return answer_until(lengths, session.fuse, plane)


class LogLength:
    """The length of the log, once it has come through a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._value = 0

    def __call__(self) -> int:
        if not self._value and _readable(self._pipe):
            data = os.read(self._pipe, _LENGTH.size)
            self._value = _LENGTH.unpack(data)[0] if data else 0
        return self._value


def _negotiate(
    session: Session, options: MountOptions, device: DaxDevice, messages: int, log_length: Callable[[], int]
) -> MetaPlane:
    data = os.read(session.fuse, BUFFER)
    request = negotiation.parse_init_request(data)
    decision = worker.decide_data_path(request, session.fuse, options, device)
    if decision.data_path == "server":
        raise NegotiationError(
            f"{device.path} is in famfs mode (driver fsdev_dax), which only a famfs kernel can use: {decision.reason}; "
            f"mount with -o daxmode=devdax, or run: daxctl reconfigure-device -m devdax {os.path.basename(device.path)}"
        )
    settled = options.dialect is not None
    plane = MetaPlane(decision, (os.path.realpath(device.path),), log_length, settled=settled)
    try:
        os.write(session.fuse, negotiation.own_reply(request, decision, max_write=session.max_write))
    except OSError as error:
        raise MountError(f"the kernel did not take the answer to INIT: {error}") from error
    worker.tell(messages, worker.ready_message(worker.Negotiated(data, decision)))
    return plane


def answer_until(stop: int, fuse: int, plane: MetaPlane) -> int:
    """Serve a connection until the pipe `stop` is at its end (0), or the connection is (1)."""
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    poll.register(stop, 0)
    while True:
        events = dict(poll.poll())
        if stop in events:
            return 0
        try:
            data = os.read(fuse, BUFFER)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                continue
            log.error("cannot read requests: %s", error)
            return 1
        if not data:
            return 1
        metaplane.serve(plane, fuse, data)


def _readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


# -- the process that asks ---------------------------------------------------------------------------


def open_meta(
    mount: int,
    device: DaxDevice,
    host: UUID | None,
    decision: Decision,
    *,
    settled: bool,
    read_only: bool,
    announce: Callable[[int], None],
) -> tuple[MetaFiles, Decision]:
    """Open the two files below the directory descriptor `mount`, and check superblock and log header in them. Gives
    `decision` back, with the dialect that opening them has shown, unless that is `settled`.

    `announce` is called with the length of the log, before the log is opened. The log can be stored to if `host` is the
    master and not `read_only`; then the writer's lock is taken. The caller must not be the one who serves the mount.
    Raises FamfsError.
    """
    first, decision = _open_superblock(mount, decision, settled=settled)
    _require_access(first, device)
    memory = PartialMemory([(first, layout.SUPERBLOCK_REGION)], device.size, writable=[False])
    found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize)).require(device.path)
    end = layout.LOG_OFFSET + found.log_length
    if end > device.size:
        raise MediaError(f"{device.path}: the log ends beyond the device of {device.size} bytes")
    lock_for_writing(device, host, found.system_uuid)
    writable = host == found.system_uuid and not read_only
    announce(found.log_length)
    second = _open(mount, ".meta/.log", os.O_RDWR if writable else os.O_RDONLY)
    files = MetaFiles(first, second, _open(mount, ".meta", os.O_PATH | os.O_DIRECTORY), found.log_length, writable)
    whole = files.memory(device)
    omf_log.decode_header(whole.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), found.log_length)
    return files, decision


def _open_superblock(mount: int, decision: Decision, *, settled: bool) -> tuple[int, Decision]:
    """The first open of a mapped file. Its map is interleaved where the kernel may take that (`MetaPlane`), and EINVAL
    is the answer of one that does not. Raises MountError, or NegotiationError where the dialect is the wrong one."""
    name = ".meta/.superblock"
    refused = False
    if not settled and metaplane.takes_test(decision):
        try:
            return _open(mount, name, os.O_RDONLY), dialects.with_interleave(decision)
        except MountError as error:
            if error.errno != errno.EINVAL:
                raise
            refused = True
    try:
        return _open(mount, name, os.O_RDONLY), decision
    except MountError as error:
        if error.errno != errno.EINVAL or refused:
            raise
        spoken = " or ".join(dialect.name for dialect in decision.candidates)
        other = dialects.PUSH if decision.candidates[0].push_ioctl else dialects.PULL
        raise NegotiationError(
            f"the kernel refuses a map in dialect {spoken}: it speaks another one; mount with dialect={other.name}"
        ) from error


def _require_access(superblock_file: int, device: DaxDevice) -> None:
    """Raises MountError if the kernel maps the file and has not got the device, or its memory has failed."""
    try:
        os.pread(superblock_file, 8, 0)
    except OSError as error:
        if error.errno == errno.EIO:
            raise MountError(
                f"the kernel did not get {device.path}: another file system on this host holds it (unmount that), or "
                "its driver is not fsdev_dax; the kernel log has the error"
            ) from error
        raise MountError(f"{device.path}: the superblock cannot be read: {error.strerror}") from error


def _open(mount: int, name: str, flags: int) -> int:
    try:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=mount)
    except OSError as error:
        failed = MountError(
            f"cannot open {name} through the new mount: {os.strerror(error.errno or errno.EIO)}; see the kernel log"
        )
        failed.errno = error.errno or errno.EIO
        raise failed from error


def ask_meta(
    mount: int,
    device: DaxDevice,
    host: UUID | None,
    decision: Decision,
    channel: socket.socket,
    *,
    settled: bool,
    read_only: bool,
    announce: Callable[[int], None],
) -> int:
    """`open_meta` in a process of its own, which hands over what came of it through `channel`; its exit status."""
    prctl.set_name("famfs-opener")
    try:
        files, decision = open_meta(
            mount, device, host, decision, settled=settled, read_only=read_only, announce=announce
        )
    except FamfsError as error:
        channel.send(json.dumps({"error": str(error), "status": error.exit_status}).encode())
        return 1
    candidates = [dialect.name for dialect in decision.candidates]
    facts = {"log_length": files.log_length, "writable": files.writable, "candidates": candidates}
    text = json.dumps(facts).encode()
    socket.send_fds(channel, [text], [files.superblock, files.log, files.directory])
    return 0


# -- the supervisor's part ---------------------------------------------------------------------------


class PrivateCopy(Protocol):
    """A mount of which private copies can be had; `DetachedMount` is one."""

    def clone(self) -> int: ...


@dataclass(slots=True)
class OwnFiles:
    """The mount's own files as the supervisor keeps them."""

    files: MetaFiles
    release: int
    """Closing this descriptor, which no child has, tells workers that no path leads to the mount any more; -1: done."""

    def announce_end(self, processes: Processes) -> None:
        """Have the worker let go of the files as soon as nobody has a new file open. May be repeated."""
        if self.release >= 0:
            processes.close_in_children.remove(self.release)
            os.close(self.release)
            self.release = -1

    def close(self, processes: Processes) -> None:
        """Let go, and have the worker do the same."""
        self.files.close()
        self.announce_end(processes)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The order of things: who is started when, and who hears of what."""

    processes: Processes
    serve: Callable[[int, int], int]
    """The process that answers; its descriptors for messages and for the length of the log."""
    ask: Callable[[int, Decision, socket.socket, Callable[[int], None]], int]
    """The process that asks; a directory, what was agreed, where to send the files to, and whom to tell the length of
    the log."""
    register: Callable[[Negotiated], None]
    """Hands the device to a kernel that wants it before it is asked for."""

    def run(self, mount: PrivateCopy) -> tuple[Negotiated, OwnFiles]:
        """What was agreed, and the open files. Raises FamfsError; nobody is left waiting for the mount then."""
        hear, speak = os.pipe()
        lengths, announce = os.pipe()

        def serve() -> int:
            os.close(hear)
            os.close(announce)
            return self.serve(speak, lengths)

        server = self.processes.fork("bootstrap", serve)
        os.close(speak)
        os.close(lengths)
        try:
            agreed = await_service(self.processes, server, hear)
            self.register(agreed)
            own, candidates = self._open(mount, agreed.decision, announce, server)
        finally:
            os.close(hear)
            os.close(announce)
        self._await_end(server)
        return replace(agreed, decision=replace(agreed.decision, candidates=candidates)), own

    def _open(
        self, mount: PrivateCopy, decision: Decision, announce: int, server: int
    ) -> tuple[OwnFiles, tuple[Dialect, ...]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            private = mount.clone()
            try:
                asker = self.processes.fork(
                    "opener", lambda: self.ask(private, decision, theirs, lambda length: _send_length(announce, length))
                )
            finally:
                os.close(private)
            theirs.close()
            for happened in self.processes.during(OPEN_SECONDS, ours.fileno()):
                if server in happened.ended:
                    raise MountError(_SERVER_FAILED)
                if happened.readable:
                    return self._take(ours)
                if asker in happened.ended:
                    raise MountError(_ASKER_FAILED)
                if happened.stop:
                    raise MountError("interrupted before the mount was complete")
        raise MountError(f"superblock and log could not be opened in {OPEN_SECONDS:.0f} seconds")

    def _take(self, channel: socket.socket) -> tuple[OwnFiles, tuple[Dialect, ...]]:
        """Receive what `ask_meta` has sent: the files, and the dialects that are possible still. Raises FamfsError
        where that is an error."""
        data, descriptors, _, _ = socket.recv_fds(channel, 65536, 3)
        if not data:
            raise MountError(_ASKER_FAILED)
        message = json.loads(data)
        if "error" in message:
            raise worker.failure(message)
        first, second, directory = descriptors
        released, release = os.pipe()
        self.processes.close_in_children.append(release)
        files = MetaFiles(first, second, directory, message["log_length"], message["writable"], released)
        return OwnFiles(files, release), tuple(map(dialects.by_name, message["candidates"]))

    def _await_end(self, server: int) -> None:
        """The process that answers ends by itself; only then may another one read the connection."""
        for happened in self.processes.during(OPEN_SECONDS):
            if server in happened.ended:
                if happened.ended[server]:
                    raise MountError(_SERVER_FAILED)
                return
        raise MountError(_SERVER_FAILED)


def await_service(processes: Processes, pid: int, hear: int, waiting: Callable[[], None] = lambda: None) -> Negotiated:
    """Wait until a child says that it serves; what was agreed. `waiting` is called about once a second meanwhile.

    Raises what it reports, or MountError.
    """
    while True:
        waiting()
        happened = processes.wait(hear, timeout=_WAITING_SECONDS)
        if happened.readable:
            line = os.read(hear, 65536)
            if line:
                message = json.loads(line)
                if "error" in message:
                    raise worker.failure(message)
                # It may have said so and died: nobody hears of its death again.
                if pid not in happened.ended:
                    return worker.negotiated(message)
        if pid in happened.ended:
            status = happened.ended[pid]
            raise MountError(f"the serving process ended with status {status} before it could serve")
        if happened.stop:
            raise MountError("interrupted before the mount was complete")


def _send_length(pipe: int, length: int) -> None:
    os.write(pipe, _LENGTH.pack(length))


# -- the end -----------------------------------------------------------------------------------------


class MountWatch:
    """Tells when no path of this mount namespace leads to a mount any more.

    To be asked when a descriptor of it can be read, which comes at once as a rule, and from time to time.
    """

    def __init__(self, device_number: int) -> None:
        self._device_number = device_number
        self._mounts = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        # An epoll of its own: mountinfo is always readable, and what tells of changes is POLLPRI, once for each.
        self._poll = select.epoll()
        self._poll.register(self._mounts, select.EPOLLPRI)
        self._seen = b""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to wait for."""
        return (self._poll.fileno(),)

    def gone(self) -> bool:
        """Whether the mount is nowhere to be seen. Cheap where no mount has changed."""
        self._poll.poll(0)
        mounts = _MOUNTINFO.read_bytes()
        if mounts == self._seen:
            return False
        if all(record.device != self._device_number for record in parse_mountinfo(_MOUNTINFO)):
            return True
        self._seen = mounts
        return False

    def close(self) -> None:
        """End the watch."""
        self._poll.close()
        os.close(self._mounts)
