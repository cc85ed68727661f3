# SPDX-License-Identifier: Apache-2.0
"""The process that holds a mount: it makes it, watches the worker that serves it, and takes it away.

It has one thread, maps nothing and never touches the mount itself, so that it can always act (decisions 14). What has
to touch it, or to outlive this process, is done by small children (`daemon/probe.py`, `daemon/reaper.py`).
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn
from uuid import UUID

import prctl

from famfs_server import __version__, privileges
from famfs_server.daemon import bootstrap, handover, opener, worker
from famfs_server.daemon.bootstrap import MountWatch, OwnFiles
from famfs_server.daemon.detaching import detach, is_mounted, remove_run_directory, unmount
from famfs_server.daemon.devices import DeviceKeeper, push
from famfs_server.daemon.handover import Held
from famfs_server.daemon.liveness import HUNG_SECONDS, MAX_DEATHS, Beat, Deaths, Pulse
from famfs_server.daemon.notify import ServiceManager
from famfs_server.daemon.options import MountOptions
from famfs_server.daemon.probe import probe
from famfs_server.daemon.processes import Processes
from famfs_server.daemon.reaper import start_reaper
from famfs_server.daemon.stacks import dump_on_signal
from famfs_server.daemon.upgrade import Asker, Upgrades, program
from famfs_server.daemon.upgrade_client import ANSWER_SECONDS
from famfs_server.daemon.worker import Negotiated
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.errors import FamfsError, MountError
from famfs_server.fuse import kernels
from famfs_server.fuse.dialects import Decision, settle
from famfs_server.fuse.kernels import KernelFuse
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.fuse.session import Session
from famfs_server.volume.namespace import Namespace

log = logging.getLogger(__name__)

PULSE_SECONDS = 1.0
PATIENCE_MICROSECONDS = 60_000_000
"""How much longer a service manager shall wait for a start, whenever a replay has moved."""


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The program that ran in this process before it executed this one, and what it has left."""

    worker: int
    """Its worker, which serves; 0: none."""
    reaper: int
    keepalive: int
    """The end of the pipe that the reaper waits at; -1 where there is none."""
    asker: Asker
    """Who has asked for the upgrade."""


@dataclass(slots=True)
class Supervisor:
    """Makes and holds one mount, by `run`; or goes on with one, by `go_on`."""

    options: MountOptions
    device: DaxDevice
    host: UUID | None
    run_directory: Path
    ready: Callable[[], None]
    """Called once the mount is usable."""
    background: bool = False
    """Whether the caller's terminal and pipes are given back, by every process of the mount."""
    fuse: int | None = None
    """A descriptor of /dev/fuse whose mount somebody else makes and takes away; otherwise both is done here."""
    manager: ServiceManager = field(default_factory=lambda: ServiceManager(""))
    store: bool = False
    """Whether the service manager keeps the connection, and takes the mount away, when this process ends."""
    _processes: Processes = field(default_factory=Processes)
    _meta: OwnFiles | None = None
    """Superblock and log, where the device is in famfs mode."""
    _reaper: int = 0
    _keepalive: int = -1
    _asker: Asker | None = None
    _leaving: bool = False
    _replayed: int = 0
    devices: DeviceKeeper = field(init=False)
    """The devices beyond the first."""

    def __post_init__(self) -> None:
        self.devices = DeviceKeeper.create(self.options.daxdevs, self.options.mount_point, self.run_directory.parent)

    def run(self) -> None:
        """Mount, serve, and return when the file system is unmounted.

        Raises FamfsError when it could not be mounted, and nothing is left of it then, or when the service failed.
        """
        self._begin()
        kernel = kernels.choose(
            self.options.kernel, famfs_mode=self.device.mode is Mode.FSDEV, loaded=kernels.is_loaded()
        )
        fuse = _open_fuse(kernel) if self.fuse is None else self.fuse
        session = Session.create(fuse)
        try:
            if self.fuse is None:
                served, held = self._mount(session, kernel)
            else:
                if self.device.mode is Mode.FSDEV:
                    raise MountError(f"{self.device.path} is in famfs mode: its mount has to be made by this server")
                served, agreed = self._start_worker(session, None, None)
                self._register(fuse, agreed)
                held = self._hold(session, agreed, None)
            self.ready()
            self._hold_on(held, served)
        finally:
            self._end(fuse)

    @classmethod
    def go_on(cls, held: Held, manager: ServiceManager, predecessor: Predecessor | None, *, store: bool) -> None:
        """As `run`, with a mount that a predecessor has made: in this process, or in one that the service manager has
        kept it for."""
        self = cls(
            held.options,
            held.device,
            held.host,
            held.run_directory,
            lambda: None,
            held.background,
            None,
            manager,
            store,
        )
        self._begin()
        self._meta = held.meta
        self.devices.open.update(held.further)
        if held.meta is not None:
            self._processes.close_in_children.append(held.meta.release)
        served = 0
        if predecessor is not None:
            served, self._asker = predecessor.worker, predecessor.asker
            self._reaper, self._keepalive = predecessor.reaper, predecessor.keepalive
            for name, pid in (("worker", served), ("reaper", self._reaper)):
                if pid:
                    self._processes.adopt(name, pid, stays=name == "reaper")
            if self._keepalive >= 0:
                self._processes.close_in_children.append(self._keepalive)
        try:
            # One that still serves does so until this very moment.
            self._processes.kill(served)
            self._hold_on(held, served)
        finally:
            self._end(held.session.fuse)

    def _begin(self) -> None:
        prctl.set_name("famfs-supervisor")
        privileges.prefer_survival()
        dump_on_signal(self.run_directory, background=self.background)
        self._processes.catch_signals()

    def _end(self, fuse: int) -> None:
        """Give everything back: the connection, the children, the devices."""
        self._let_go()
        os.close(fuse)
        self._processes.end()
        self.devices.close()
        if not self._leaving:
            remove_run_directory(self.run_directory)

    def _mount(self, session: Session, kernel: KernelFuse) -> tuple[int, Held]:
        """Make the mount and attach it once it is known to work; the worker, and what is held now."""
        fuse = session.fuse
        with DetachedMount.create(
            fuse,
            self.device.path,
            kernel=kernel,
            attributes=self.options.attributes,
            allow_other=self.options.allow_other,
            default_permissions=self.options.default_permissions,
        ) as mount:
            before = self._bootstrap(session, mount) if self.device.mode is Mode.FSDEV else None
            served, agreed = self._start_worker(session, mount, before)
            if before is None:
                self._register(fuse, agreed)
            probe(self._processes, mount, lambda: self._close_in_child(fuse))
            held = self._hold(session, agreed, mount.device)
            if self.store:
                self._keep(held)
            else:
                self._start_reaper(fuse, mount.device, mount)
            mount.attach(self.options.mount_point)
        return served, held

    def _start_reaper(self, fuse: int, device_number: int, mount: DetachedMount | None = None) -> None:
        """Start the process that takes the mount away if this one dies. `mount` is its descriptor, if it is open."""

        def let_go() -> None:
            self._close_in_child(fuse)
            if mount is not None:
                mount.close()

        self._reaper, self._keepalive = start_reaper(
            self._processes,
            device_number,
            self.options.mount_point,
            self.run_directory,
            let_go,
            background=self.background,
        )

    def _replace_reaper(self, held: Held) -> None:
        """Somebody has killed the process that would take the mount away; the next one waits as it did."""
        log.warning("the process that guards the mount has died; another one takes its place")
        self._processes.close_in_children.remove(self._keepalive)
        os.close(self._keepalive)
        self._keepalive = -1
        assert held.device_number is not None
        self._start_reaper(held.session.fuse, held.device_number)

    def _hold(self, session: Session, agreed: Negotiated, device_number: int | None) -> Held:
        return Held(
            self.options,
            self.device,
            self.host,
            session,
            self.run_directory,
            agreed,
            device_number,
            self.background,
            self._meta,
            dict(self.devices.open),
        )

    def _keep(self, held: Held) -> None:
        """Give the service manager what a later start needs, before anybody can use the mount."""
        document = handover.write(held.document())
        kept = self.manager.store({**held.descriptors, handover.DOCUMENT: document})
        os.close(document)
        if not kept:
            raise MountError("the service manager does not say that it keeps descriptors; is NotifyAccess= set?")

    # -- the steps of mounting ------------------------------------------------------------------

    def _fork_worker(
        self, session: Session, messages: int, takeover: Negotiated | None, *unwanted: int, successor: bool = False
    ) -> int:
        """Start a worker without the `unwanted` descriptors; its pid."""
        if self.devices.asked_at is not None:
            self._processes.ignore(self.devices.asked_at)
        self.devices.fuse = session.fuse
        ours = self._start_opener(session, *unwanted, *([messages] if messages >= 0 else []))
        theirs = self.devices.connect()
        assignment = worker.Assignment(
            self.options,
            self.device,
            self.host,
            session,
            self.run_directory,
            messages,
            takeover,
            self.background,
            self.devices,
            theirs,
            self._meta.files if self._meta else None,
            ours,
            successor,
        )

        def serve() -> int:
            for descriptor in unwanted:
                os.close(descriptor)
            return worker.run(assignment)

        pid = self._processes.fork("worker", serve)
        theirs.close()
        if ours is not None:
            ours.close()
        assert self.devices.asked_at is not None
        self._processes.listen(self.devices.asked_at, self.devices.answer)
        return pid

    def _start_opener(self, session: Session, *unwanted: int) -> socket.socket | None:
        """Start the process that opens files of the mount for the next worker; the worker's end of the pair."""
        if self._meta is None:
            return None
        files = self._meta.files
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def serve() -> int:
            # It must hold neither the connection, on which it waits, nor what would keep that.
            for descriptor in (session.fuse, files.superblock, files.log, files.released, *unwanted):
                os.close(descriptor)
            session.libfuse_end.close()
            session.our_end.close()
            ours.close()
            self.device.close()
            self.devices.close()
            if self.background:
                worker.leave_terminal()
            return opener.serve(files.directory, theirs)

        self._processes.fork("opener", serve)
        theirs.close()
        return ours

    def _start_worker(
        self, session: Session, mount: DetachedMount | None, before: Negotiated | None
    ) -> tuple[int, Negotiated]:
        """Start the first worker and wait until it serves; its pid, and what it has agreed, or others `before`."""
        hear, speak = os.pipe()
        pid = self._fork_worker(session, speak, before, hear, *([] if mount is None else [mount.fd]))
        os.close(speak)
        try:
            return pid, bootstrap.await_service(self._processes, pid, hear, lambda: self._tell_progress(session))
        finally:
            os.close(hear)

    def _bootstrap(self, session: Session, mount: DetachedMount) -> Negotiated:
        """Open superblock and log through the mount, and keep them (decisions 20); what was agreed meanwhile."""

        def serve(messages: int, lengths: int) -> int:
            os.close(mount.fd)
            return self._serve_meta(session, messages, lengths)

        def ask(directory: int, decision: Decision, channel: socket.socket, announce: Callable[[int], None]) -> int:
            os.close(session.fuse)
            return bootstrap.ask_meta(
                directory, self.device, self.host, decision, channel,
                settled=self.options.dialect is not None, read_only=self.options.read_only, announce=announce,
            )  # fmt: skip

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
            if self.store and not self._leaving:
                self.manager.discard(handover.META_NAMES)

    def _register(self, fuse: int, agreed: Negotiated) -> None:
        """Hand the device to a kernel that wants it pushed, before any file can be opened (protocol 2.1).

        A refusal spoils the slot for the whole connection, so it fails the mount (protocol 3.3).
        """
        dialect = agreed.decision.dialect
        if dialect is None or dialect.push_ioctl is None:
            return
        settle((dialect,), -push(fuse, dialect.push_ioctl, self.device, 0))
        log.debug("the kernel took %s as device 0", self.device.path)

    def _close_in_child(self, fuse: int) -> None:
        """What a child closes that has nothing to do with the connection and the devices."""
        os.close(fuse)
        self.device.close()
        if self._meta:
            self._meta.files.close()
        self.devices.close()

    # -- while mounted --------------------------------------------------------------------------

    def _hold_on(self, held: Held, served: int) -> None:
        """Hold the mount to its end, which is an unmount, or until somebody else is to hold it.

        `served` is the worker, killed if it is a predecessor's; 0: there is none.
        """
        try:
            privileges.keep_only(_kept(held), for_successor=True)
            self._watch(held, served, Upgrades.listen(self._processes, self.run_directory))
        except FamfsError as error:
            if self._asker is not None:
                self._asker.tell(error=f"the new server cannot serve: {error}")
            raise
        finally:
            if not self._leaving:
                self.manager.send("STOPPING=1")
                if held.device_number is not None:
                    detach(held.options.mount_point, held.device_number)
                if self.store:
                    self.manager.discard([*held.descriptors, handover.DOCUMENT])
            if self._keepalive >= 0:
                # It may have been killed just now.
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._keepalive, b"done")
                os.close(self._keepalive)

    def _watch(self, held: Held, served: int, upgrades: Upgrades) -> None:
        """Wait for the end, which is an unmount; a signal to us unmounts, a worker that dies gets a successor."""
        record = held.session.record
        deaths = Deaths(record)
        pulse = Pulse(held.session)
        beat = Beat(record)
        watch = MountWatch(held.device_number) if self._meta and held.device_number is not None else None
        retiring = self._asker is not None
        hear = -1
        condemned = 0
        if served and not retiring:
            self._serving(held)
        elif not served:
            served, hear = self._start_successor(held)
        while True:
            if watch and self._meta and watch.gone():
                # A worker that dies before it has let go gets a successor: there may be files to be logged.
                self._meta.announce_end(self._processes)
                if record.metadata_let_go:
                    self._let_go()
            waiting = [*upgrades.descriptors, *([hear] if hear >= 0 else []), *(watch.descriptors if watch else ())]
            happened = self._processes.wait(*waiting, timeout=PULSE_SECONDS)
            if hear in happened.readable:
                hear = self._hear_successor(held, hear)
            if self._reaper in happened.ended:
                self._replace_reaper(held)
            if served in happened.ended:
                status = happened.ended[served]
                # Without the mount's own files nobody can take over.
                if status == 0 or (watch and not self._meta):
                    return
                if not retiring:
                    if deaths.another(from_outside=status == -signal.SIGKILL and served != condemned):
                        raise MountError(
                            f"{MAX_DEATHS} workers in a row have ended without having served anything, the last one "
                            f"with status {status}; unmounted"
                        )
                    log.warning("worker %d has ended with status %d; another one takes over", served, status)
                retiring = False
                if hear >= 0:
                    os.close(hear)
                served, hear = self._start_successor(held)
                deaths.begin()
                pulse.begin()
            elif pulse.lost():
                log.error("worker %d has not answered for %.0f seconds; it is replaced", served, HUNG_SECONDS)
                condemned = served
                os.kill(served, signal.SIGKILL)
                pulse.begin()
            elif beat.steady and self.manager.watchdog:
                self.manager.send("WATCHDOG=1")
            if happened.stop and self._told_to_stop(held):
                return
            if (asker := upgrades.due(happened, held)) is not None:
                now = replace(held, meta=self._meta, further=dict(self.devices.open))
                self._execute_successor(now, served, asker)

    def _start_successor(self, held: Held) -> tuple[int, int]:
        """Start a worker that goes on where the last one stopped; its pid, and where it says that it serves."""
        held.session.drain()
        held.session.record.taken_over()
        hear, speak = os.pipe()
        pid = self._fork_worker(held.session, speak, held.agreed, hear, successor=True)
        os.close(speak)
        return pid, hear

    def _hear_successor(self, held: Held, hear: int) -> int:
        """A worker that took over has something to say, or has died; the pipe is closed after that."""
        if os.read(hear, 65536).startswith(b"{") and held.session.record.takeovers:
            self._serving(held)
        os.close(hear)
        return -1

    def _serving(self, held: Held) -> None:
        """Tell those who wait for it that the mount is served."""
        takeovers = held.session.record.takeovers
        more = f", {takeovers} takeovers" if takeovers else ""
        self.manager.ready(f"serving {held.options.device} at {held.options.mount_point}{more}")
        if self._asker is not None:
            log.info("this is version %s now", __version__)
            self.manager.as_usual()
            self._asker.tell(version=__version__, pid=os.getpid())
            self._asker = None

    def _tell_progress(self, session: Session) -> None:
        """Say how far the replay is; as long as it moves, the service manager is not to lose patience."""
        done, expected = Namespace.progress_of(session.namespace)
        lines = [f"STATUS=replaying the log: {done} of {expected} entries" if expected else "STATUS=mounting"]
        if done > self._replayed:
            lines.append(f"EXTEND_TIMEOUT_USEC={PATIENCE_MICROSECONDS}")
            self._replayed = done
        self.manager.send(*lines)

    def _told_to_stop(self, held: Held) -> bool:
        """Unmount, and say whether there is nothing left to wait for."""
        if self.store:
            # Whoever stops the service for good unmounts first; with a mount, this is the way to the next start.
            assert held.device_number is not None
            self._leaving = is_mounted(held.options.mount_point, held.device_number)
            return True
        # Detached already, and somebody still has a file open: the second request to stop means it.
        return held.device_number is None or not unmount(held.options.mount_point, held.device_number)

    def _execute_successor(self, held: Held, served: int, asker: Asker) -> None:
        """Become the program that is installed now. Returns only if that fails."""
        self._processes.hold_back_signals()
        descriptors = {**held.descriptors, **held.release, "asker": asker.connection.fileno()}
        if self._keepalive >= 0:
            descriptors["keepalive"] = self._keepalive
        document = handover.write(
            held.document(
                descriptors=descriptors,
                worker=served,
                reaper=self._reaper,
                store=self.store,
            )
        )
        log.info("version %s gives the mount to the installed program", __version__)
        try:
            # The next program gives no sign of life before it has been imported, which takes long on a busy host.
            self.manager.be_patient(ANSWER_SECONDS)
            privileges.pass_on(_kept(held))
            for descriptor in (document, *descriptors.values()):
                os.set_inheritable(descriptor, True)
            os.execv(sys.executable, program("serve", document))
        except (OSError, FamfsError) as error:
            self.manager.as_usual()
            asker.tell(error=f"the installed program cannot be executed: {error}; the running server goes on")
            for descriptor in (document, *descriptors.values()):
                os.set_inheritable(descriptor, False)
            os.close(document)
            privileges.keep_only(_kept(held), for_successor=True)
            self._processes.let_signals_come()


def _kept(held: Held) -> tuple[int, ...]:
    """The capabilities that holding a mount takes: what unmounting needs, if that is done here."""
    return () if held.device_number is None else (privileges.CAP_SYS_ADMIN,)


def _open_fuse(kernel: KernelFuse) -> int:
    try:
        return os.open(kernel.device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"cannot open {kernel.device}: {os.strerror(error.errno or 0)}; is the module {kernel.name} loaded?"
        ) from error


def exit_process(status: int) -> NoReturn:
    """End a daemon without the interpreter's clean-up, which waits for threads that block in system calls."""
    logging.shutdown()
    os._exit(status)
