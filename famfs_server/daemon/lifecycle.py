# SPDX-License-Identifier: Apache-2.0
"""From a mount command to a daemon: every check that needs no mount, then the supervisor, here or in the background."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import select
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn
from uuid import UUID

from famfs_server import privileges
from famfs_server.daemon import detaching, handover, logs, worker
from famfs_server.daemon.control_client import run_root
from famfs_server.daemon.handover import Held
from famfs_server.daemon.locking import lock_for_mount, lock_for_writing
from famfs_server.daemon.notify import ServiceManager, take_passed
from famfs_server.daemon.options import MountOptions
from famfs_server.daemon.supervisor import Predecessor, Supervisor, exit_process
from famfs_server.dax import drivers, hostid
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.errors import FamfsError, HandoverError, MountError, UsageError
from famfs_server.omf import layout, superblock
from famfs_server.omf import log as omf_log

log = logging.getLogger(__name__)


def mount(
    options: MountOptions,
    *,
    foreground: bool = False,
    fake: bool = False,
    fuse: int | None = None,
    store: bool = False,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Mount by `options`. In the background: return when the mount is usable. In the foreground: when it has ended.

    `fake` stops after the checks. `fuse` is a descriptor of /dev/fuse that somebody else makes and removes the mount
    for; no capability is needed then, and the mount point is not touched: it may be waiting for us already. `store`:
    the service manager keeps the connection; if it has kept one, that is gone on with. `waiting` is entered while the
    server in the background is waited for.
    Raises FamfsError, and then nothing is mounted. Nothing is opened before the capabilities have been checked.
    """
    manager = ServiceManager.of_process() if foreground else ServiceManager("")
    if store and not manager.present:
        raise UsageError("there is no service manager that could keep descriptors: NOTIFY_SOCKET is not set")
    if store and (held := _kept_by(manager, options)) is not None:
        logs.set_up(held.options.log_level, _fields(held.options), background=False)
        log.info("going on with the mount that the service manager has kept")
        Supervisor.go_on(held, manager, None, store=True)
        return
    if fuse is None:
        privileges.require_mount_capabilities()
        options = replace(options, mount_point=_check_mount_point(options.mount_point))
    start = partial(
        _mount, options, foreground=foreground, fake=fake, fuse=fuse, manager=manager, store=store, waiting=waiting
    )
    if options.daxmode is None or fake:
        start(lambda: None)
    else:
        with drivers.switched(options.device, drivers.MODES[options.daxmode]) as stay:
            start(stay)


def _mount(
    options: MountOptions,
    mounted: Callable[[], None],
    *,
    foreground: bool,
    fake: bool,
    fuse: int | None,
    manager: ServiceManager,
    store: bool,
    waiting: Callable[[], AbstractContextManager[object]],
) -> None:
    """`mounted` is called by a supervisor in the foreground, once the mount is usable."""
    device = DaxDevice.open(options.device)
    try:
        host = _host()
        identity = _take_locks(device, host)
        if fake:
            return
        run_directory = _make_run_directory(identity, options.mount_point, public=options.control_uid != 0)
        if foreground:
            logs.set_up(options.log_level, _fields(options), background=False)
            Supervisor(options, device, host, run_directory, mounted, fuse=fuse, manager=manager, store=store).run()
        else:
            _daemonise(options, device, host, run_directory, fuse, waiting)
    finally:
        device.close()


def go_on(held: Held, predecessor: Predecessor, *, store: bool) -> int:
    """Hold a mount that the program before this one has held in the same process, to its end; the exit status."""
    logs.set_up(held.options.log_level, _fields(held.options), background=held.background)
    try:
        Supervisor.go_on(held, ServiceManager.of_process(), predecessor, store=store)
    except FamfsError as error:
        log.error("%s: %s", held.options.mount_point, error)
        return error.exit_status
    except BaseException:
        log.exception("the server fails")
        return 1
    return 0


def _kept_by(manager: ServiceManager, options: MountOptions) -> Held | None:
    """The mount that the service manager has kept for this start, if it is still there.

    Raises HandoverError when there is one that this program cannot go on with, or not as it is asked to.
    """
    passed = take_passed()
    if not passed:
        return None
    if handover.DOCUMENT in passed:
        held = Held.restore(handover.read(passed.pop(handover.DOCUMENT)), passed)
        if _alive(held):
            there = os.path.join(
                os.path.realpath(os.path.dirname(options.mount_point)), os.path.basename(options.mount_point)
            )
            if (held.options.device, held.options.mount_point) != (options.device, there):
                raise HandoverError(
                    f"the service still has {held.options.device} mounted at {held.options.mount_point}; stop it "
                    "before it is to mount something else"
                )
            if held.options != replace(options, mount_point=there):
                log.warning("other mount options: they count from the next mount on, not after a restart")
            return held
    manager.discard([*passed, handover.DOCUMENT])
    for descriptor in passed.values():
        os.close(descriptor)
    return None


def _alive(held: Held) -> bool:
    """Whether the connection still has its mount."""
    poll = select.poll()
    poll.register(held.session.fuse, 0)
    if poll.poll(0):
        return False
    return held.device_number is not None and detaching.is_mounted(held.options.mount_point, held.device_number)


def _check_mount_point(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        raise MountError(f"mount point {path}: {os.strerror(error.errno or errno.EIO)}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"mount point {path} is not a directory")
    return os.path.realpath(path)


def _host() -> UUID | None:
    try:
        return hostid.system_uuid()
    except hostid.HostIdError as error:
        log.warning("%s; assuming the client role", error)
        return None


def _take_locks(device: DaxDevice, host: UUID | None) -> bytes:
    """Check superblock and log header, and lock the device for this mount; bytes that tell the file system from others.

    The mapping is gone again when this returns: the supervisor maps nothing.
    """
    # Before anything is read: while this waits, the file system may be made anew, for another owner.
    lock_for_mount(device, host)
    if device.mode is Mode.FSDEV:
        # Its superblock is read later, through the mount (decisions 20).
        return os.fsencode(os.path.realpath(device.path))
    memory = device.memory()
    try:
        found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize)).require(device.path)
        if layout.LOG_OFFSET + found.log_length <= memory.size:
            omf_log.decode_header(memory.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), found.log_length)
    finally:
        memory.close()
        device.unmap()
    lock_for_writing(device, host, found.system_uuid)
    return found.uuid.bytes


def _make_run_directory(identity: bytes, mount_point: str, *, public: bool) -> Path:
    """The mount's run-time directory; a `public` one lets every user through to the control socket in it."""
    name = hashlib.sha256(identity + os.fsencode(mount_point)).hexdigest()[:16]
    directory = run_root() / name
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o711 if public else 0o700)
        if public:
            directory.parent.chmod(0o711)
    except OSError as error:
        raise MountError(f"cannot make {directory}: {os.strerror(error.errno or errno.EIO)}") from error
    return directory


class _Parent:
    """The process that waits for the outcome of a mount in the background. It is told once."""

    def __init__(self, speak: int) -> None:
        self._speak = speak

    def tell(self, message: dict[str, str | int]) -> bool:
        """Send the outcome, and say whether it was the first one."""
        speak, self._speak = self._speak, -1
        if speak < 0:
            return False
        with contextlib.suppress(BrokenPipeError):
            os.write(speak, json.dumps(message).encode() + b"\n")
        os.close(speak)
        return True


def _daemonise(
    options: MountOptions,
    device: DaxDevice,
    host: UUID | None,
    run_directory: Path,
    fuse: int | None,
    waiting: Callable[[], AbstractContextManager[object]],
) -> None:
    """Leave a supervisor behind, and return or raise what became of the mount."""
    hear, speak = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(hear)
        _become_daemon(options, device, host, run_directory, fuse, _Parent(speak))
    os.close(speak)
    line = b""
    try:
        with waiting():
            while not line.endswith(b"\n") and (data := os.read(hear, 65536)):
                line += data
    except BaseException:
        # Ctrl-C reaches this process alone; who gives up waiting must not find a mount later.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    os.close(hear)
    if not line:
        os.waitpid(pid, 0)
        raise MountError("the server died before the mount was complete; nothing is mounted")
    message = json.loads(line)
    if "error" in message:
        os.waitpid(pid, 0)
        error = MountError(message["error"])
        error.exit_status = message["status"]
        raise error


def _become_daemon(
    options: MountOptions,
    device: DaxDevice,
    host: UUID | None,
    run_directory: Path,
    fuse: int | None,
    parent: _Parent,
) -> NoReturn:
    def ready() -> None:
        worker.leave_terminal()
        parent.tell({})

    status = 0
    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        logs.set_up(options.log_level, _fields(options), background=True)
        Supervisor(options, device, host, run_directory, ready, background=True, fuse=fuse).run()
    except FamfsError as error:
        status = error.exit_status
        # Whoever waits prints the line; it need not be there twice.
        if not parent.tell({"error": str(error), "status": status}):
            log.error("%s: %s", options.mount_point, error)
    except BaseException as error:
        status = 1
        log.exception("the server fails")
        parent.tell({"error": f"{type(error).__name__}: {error}", "status": 32})
    exit_process(status)


def _fields(options: MountOptions) -> dict[str, str]:
    """What each line of this mount carries in the journal."""
    return {"FAMFS_DEVICE": options.device, "FAMFS_MOUNT": options.mount_point}
