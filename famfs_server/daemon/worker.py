# SPDX-License-Identifier: Apache-2.0
"""The process that serves one mount: replays the log, negotiates, answers requests until the connection ends."""

import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import prctl
import pyfuse3
import trio

from famfs_server import privileges
from famfs_server.daemon import control, status
from famfs_server.daemon.control import ControlServer
from famfs_server.daemon.devices import DeviceKeeper, DeviceLink
from famfs_server.daemon.fullness import Fullness
from famfs_server.daemon.logs import add_field, wait_for_no_disk
from famfs_server.daemon.metafiles import MetaFiles
from famfs_server.daemon.opener import OpenerLink
from famfs_server.daemon.options import SYSLOG_LEVELS, MountOptions
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.dax.memory import Memory
from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import DeviceError, FamfsError, MountError, NegotiationError
from famfs_server.fuse import kernels
from famfs_server.fuse.abi import InitFlag
from famfs_server.fuse.channel import Channel
from famfs_server.fuse.dialects import (
    Decision,
    Evidence,
    InitRequest,
    by_name,
    decide,
    kallsyms_evidence,
    probe_push_ioctl,
)
from famfs_server.fuse.filesystem import DAY, FileSystem, Settings
from famfs_server.fuse.notifier import Notifier, send_all
from famfs_server.fuse.operations import FamfsOperations
from famfs_server.fuse.session import Session, SessionRecord
from famfs_server.volume.alloc_config import AllocConfig
from famfs_server.volume.check import describe_stop
from famfs_server.volume.devices import describe
from famfs_server.volume.volume import Volume

log = logging.getLogger(__name__)

Message = dict[str, str | int | list[str]]


SWITCH_SECONDS = 5e-5
GARBAGE_THRESHOLD = 20_000
"""New objects between two searches for garbage: a batch of files makes a hundred thousand of them, none in a cycle."""
CLAIM_SECONDS = 5.0
"""How long a worker waits for one that has been killed and is not gone yet."""
LAST_CLOSES_SECONDS = 2.0
"""How long a mount that nobody sees any more waits for the requests that were sent before."""
IN_USE_SECONDS = 0.1
"""How often it is looked whether anybody still has a new file of a detached mount open."""
IDLE_SECONDS = 0.01
"""How long after one look for such requests the next one comes."""
BEAT_SECONDS = 1.0
"""How often the control plane shows that it is alive."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What came of INIT, for the workers that come after the one that answered it."""

    init: bytes
    decision: Decision


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is given by the supervisor. Descriptors are inherited."""

    options: MountOptions
    device: DaxDevice
    host: UUID | None
    session: Session
    run_directory: Path
    messages: int
    """Where the supervisor hears of the outcome: one line of JSON."""
    takeover: Negotiated | None
    """What the predecessor negotiated; nothing for the first worker of a mount."""
    background: bool
    """Whether the caller's terminal and pipes are given back once the worker serves."""
    devices: DeviceKeeper
    """The further devices that are open already."""
    device_socket: socket.socket
    """Where the supervisor is asked for others."""
    meta: MetaFiles | None = None
    """Superblock and log of a device in famfs mode; without them the worker maps the device itself."""
    opener: socket.socket | None = None
    """Where files that stand for new space of such a device are asked for."""
    successor: bool = False
    """Whether another worker has served before."""


def run(assignment: Assignment) -> int:
    """Serve until the connection ends; the exit status of the process.

    The message to the supervisor is {"init", "data_path", "reason", "candidates"} when INIT has been answered, or
    {"error": line, "status": number}.
    """
    prctl.set_name("famfs-worker")
    # A control plane that computes must give the interpreter back soon: requests wait for it (decisions 6).
    sys.setswitchinterval(SWITCH_SECONDS)
    # What was imported stays; looking through it for garbage again and again would only hold requests up.
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
    # The supervisor unmounts; a signal meant for it, sent to the whole group, must not stop the service before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        return _serve(assignment)
    except FamfsError as error:
        if assignment.successor:
            log.error("cannot take over: %s", error)
        tell(assignment.messages, {"error": str(error), "status": error.exit_status})
    except Exception as error:
        log.exception("the worker fails")
        tell(assignment.messages, {"error": f"{type(error).__name__}: {error}", "status": 32})
    return 1


def tell(descriptor: int, message: Message) -> None:
    """Send one message; nobody listens any more when it is too late, which does not matter."""
    try:
        os.write(descriptor, json.dumps(message).encode() + b"\n")
    except OSError as error:
        log.debug("nobody hears %s: %s", message, error)


def ready_message(negotiated: Negotiated) -> Message:
    """What was negotiated, as JSON knows it."""
    decision = negotiated.decision
    return {
        "init": negotiated.init.hex(),
        "data_path": decision.data_path,
        "reason": decision.reason,
        "candidates": [dialect.name for dialect in decision.candidates],
    }


def failure(message: dict[str, Any]) -> FamfsError:
    """The error that another process has reported."""
    error = MountError(message["error"])
    error.exit_status = message["status"]
    return error


def negotiated(message: dict[str, Any]) -> Negotiated:
    """What `ready_message` wrote. Raises UsageError for a dialect that is not known here."""
    candidates = tuple(by_name(name) for name in message["candidates"])
    return Negotiated(bytes.fromhex(message["init"]), Decision(message["data_path"], message["reason"], candidates))


def leave_terminal() -> None:
    """Give the caller's terminal and pipes back; a program that reads our output must see its end."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _serve(assignment: Assignment) -> int:
    options, session, takeover = assignment.options, assignment.session, assignment.takeover
    claim = session.record.claim(CLAIM_SECONDS)
    if claim is None:
        raise MountError("another process still reads the requests of this mount")
    session.record.map_buffer()
    memory = assignment.meta.memory(assignment.device) if assignment.meta else assignment.device.memory()
    volume = Volume(memory, assignment.host, assignment.device.path, state=session.namespace)
    volume.progress = session.record.working
    add_field("FAMFS_UUID", str(volume.superblock.uuid))
    link = DeviceLink(assignment.devices, assignment.device_socket, volume.superblock.uuid)
    _attach_devices(volume, assignment, link)
    channel = Channel(session)
    volume.give_way = channel.give_way
    if not assignment.successor:
        _report_damage(volume)
    if takeover is None:
        decision = decide_data_path(channel.read_init(), channel.fuse, options, assignment.device)
        if options.fmap == "auto" and decision.data_path == "server":
            log.warning(
                "%s; serving reads and writes from the mapping instead: page cache and mappings of other hosts are not "
                "coherent with this one",
                decision.reason,
            )
    else:
        channel.resume(takeover.init)
        decision = takeover.decision
    _restrict_new_files(volume, decision)
    _default_striping(volume, assignment)
    opener = OpenerLink(assignment.opener) if assignment.opener else None
    # A kernel that does not map files would have this process ask itself for each page.
    if opener is not None and volume.spaces is not None and decision.candidates:
        volume.spaces.open = opener.open
    settings = Settings(
        shadow=os.fsencode(assignment.run_directory),
        timeout=DAY if options.timeout is None else int(options.timeout),
        direct_io=options.cache == "never",
        keep_cache=options.cache == "always",
        create=options.create,
        read_only=options.read_only,
        maps=bool(decision.candidates),
        no_open=options.no_open,
    )
    filesystem = FileSystem(volume, settings)
    privileges.drop_all()
    prctl.set_pdeathsig(signal.SIGKILL)
    notifier = _start_notifier(assignment, claim)
    filesystem.notify = notifier.put
    filesystem.drop_left_names()
    pyfuse3.init(FamfsOperations(filesystem), f"/dev/fd/{channel.libfuse_end.fileno()}", {"fsname=famfs"})
    trio.run(_main, assignment, filesystem, channel, decision, notifier, memory, link, opener)
    return 0


def _start_notifier(assignment: Assignment, claim: int) -> Notifier:
    """Fork the process that writes notifications, before there is any thread. It ends with the worker, unless it is
    waiting in the kernel just then; the next worker's answers release it."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            prctl.set_name("famfs-notifier")
            prctl.set_pdeathsig(signal.SIGKILL)
            os.close(sink)
            os.close(claim)
            if assignment.meta:
                assignment.meta.close()
            if assignment.opener:
                assignment.opener.close()
            assignment.device_socket.close()
            if assignment.background:
                leave_terminal()
            send_all(source, assignment.session.fuse)
        finally:
            os._exit(0)
    os.close(source)
    return Notifier(sink)


async def _main(
    assignment: Assignment,
    filesystem: FileSystem,
    channel: Channel,
    decision: Decision,
    notifier: Notifier,
    memory: Memory,
    link: DeviceLink,
    opener: OpenerLink | None,
) -> None:
    token = trio.lowlevel.current_trio_token()
    wait_for_no_disk()
    async with trio.open_nursery() as nursery:

        def finished() -> None:
            token.run_sync_soon(nursery.cancel_scope.cancel)

        channel.start(
            filesystem,
            decision,
            fast=assignment.options.fastpath,
            serve_unmapped=assignment.options.watchdog == "serve",
            devices=(os.path.realpath(assignment.device.path),),
            finished=finished,
            failed=_make_way,
        )
        nursery.start_soon(_answer_for_libfuse)
        await trio.to_thread.run_sync(channel.wait_initialised)
        try:
            _push_devices(filesystem.volume, assignment, decision, link)
        except NegotiationError as error:
            tell(assignment.messages, {"error": str(error), "status": error.exit_status})
            nursery.cancel_scope.cancel()
            return
        if assignment.background:
            leave_terminal()
        tell(assignment.messages, ready_message(Negotiated(channel.init, decision)))
        options, record = assignment.options, assignment.session.record
        if record.log_level is not None:
            logging.getLogger("famfs_server").setLevel(SYSLOG_LEVELS[record.log_level])
        server = ControlServer(
            filesystem.volume,
            lambda: status.status(options, filesystem, channel, decision),
            owner=options.control_uid,
            keep_log_level=record.keep_log_level,
        )
        nursery.start_soon(_serve_control, server, assignment.run_directory, options.control_uid != 0)
        if assignment.meta and isinstance(memory, PartialMemory):
            made = filesystem.made
            nursery.start_soon(_let_go, assignment.meta, memory, opener, lambda: made.in_use, channel.is_idle, record)
        if options.poll:
            nursery.start_soon(_poll, filesystem, options.poll)
        fullness = Fullness()
        alone = 0
        while True:
            record.beat()
            fullness.look(filesystem.volume)
            notifier.retry()
            # A process with threads cannot start another one, and new files need one (decisions 10). When the mount
            # ends it goes too, but then this worker does not see that twice.
            alone = alone + 1 if notifier.gone else 0
            if opener is not None and opener.gone:
                log.error("the process that opens new space has died; another worker takes over")
                os._exit(1)
            if alone > 1:
                log.error("the process that writes notifications has died; another worker takes over")
                _make_way()
            await trio.sleep(BEAT_SECONDS)


def _make_way() -> None:
    """End this process at once, from any thread: the supervisor has another one go on."""
    os._exit(1)


async def _answer_for_libfuse() -> None:
    """Run libfuse until this is cancelled. It has no other reason to end."""
    await pyfuse3.main()
    log.error("libfuse has ended its session; another worker takes over")
    _make_way()


async def _serve_control(server: ControlServer, directory: Path, public: bool) -> None:
    """Serve the control socket. Where it cannot be made, files are served without it until it can."""
    said = False
    while True:
        try:
            listener = await control.listen(directory, public=public)
        except OSError as error:
            if not said:
                log.error("there is no control socket in %s: %s; trying again", directory, error.strerror)
            said = True
            await trio.sleep(BEAT_SECONDS)
        else:
            await server.serve(listener)


async def _let_go(
    meta: MetaFiles,
    memory: PartialMemory,
    opener: OpenerLink | None,
    in_use: Callable[[], bool],
    is_idle: Callable[[], bool],
    record: SessionRecord,
) -> None:
    """Keep the mount's own files open no longer than somebody can see the mount, or has a new file open: they would
    keep the connection.

    But a file can be logged only while they are, and the kernel has nobody wait for that when it is closed.
    """
    await trio.lowlevel.wait_readable(meta.released)
    while in_use():
        await trio.sleep(IN_USE_SECONDS)
    idle = 0
    # Where the mount was detached in use, requests may come for ever.
    with trio.move_on_after(LAST_CLOSES_SECONDS):
        # A request that is just being read looks like none; not twice.
        while idle < 2:
            idle = idle + 1 if is_idle() else 0
            await trio.sleep(IDLE_SECONDS)
    memory.release()
    meta.close()
    if opener is not None:
        opener.close()
    record.let_go_of_metadata()


async def _poll(filesystem: FileSystem, seconds: float) -> None:
    """Look at the log from time to time, for figures, watchers and the kernel: lookups and listings look by
    themselves."""
    while True:
        await trio.sleep(seconds)
        try:
            await trio.to_thread.run_sync(partial(filesystem.follow, thorough=True))
            filesystem.tell_of_gains()
        except (FamfsError, OSError) as error:
            log.debug("looking at the log: %s", error)


def decide_data_path(request: InitRequest, fuse: int, options: MountOptions, device: DaxDevice) -> Decision:
    """The data path for a device, by what INIT says and what else is known of the kernel.

    Raises NegotiationError where the options ask for what the kernel has not.
    """
    offered = bool(request.flags & InitFlag.DAX_FMAP)
    evidence = Evidence(
        kallsyms=kallsyms_evidence(kernels.of_descriptor(fuse)) if offered else None,
        push_ioctl=probe_push_ioctl(fuse) if offered else None,
        rawio=privileges.holds(privileges.CAP_SYS_RAWIO),
    )
    decision = decide(request, policy=options.fmap, forced=options.dialect, evidence=evidence)
    if decision.data_path == "fmap" and device.mode is not Mode.FSDEV:
        mode = device.mode.value
        reason = f"{decision.explanation}, but takes maps only of devices in famfs mode, and this one is {mode}"
        decision = Decision("server", reason, failed=options.fmap == "require")
    if decision.failed:
        asked = "fmap=require cannot be met: " if options.fmap == "require" else ""
        raise NegotiationError(f"{asked}{decision.reason}")
    return decision


def _attach_devices(volume: Volume, assignment: Assignment, link: DeviceLink) -> None:
    """Find the devices that the log names. Raises DeviceError where all of them are wanted and one is missing."""
    volume.attach_devices(link.attach)
    incomplete = volume.table.incomplete
    if assignment.options.require_all_daxdevs and not assignment.successor and incomplete:
        raise DeviceError(f"require_all_daxdevs: {'; '.join(describe(device) for device in incomplete)}")
    for device in incomplete:
        log.warning("%s: %s; files on it are EIO", volume.device, describe(device))


def _push_devices(volume: Volume, assignment: Assignment, decision: Decision, link: DeviceLink) -> None:
    """Have further devices handed to a kernel that wants them pushed, before any file can be opened (protocol 2.1).

    Only those that it can take: a refusal costs the slot. One costs the mount where all devices are required. Slots
    stay with the connection, so a worker that takes over has nothing to do.
    """
    dialect = decision.dialect
    if dialect is None or dialect.push_ioctl is None or assignment.successor:
        return
    last = min(dialect.max_devindex, dialect.slots - 1)
    for device in volume.table.entries[1 : last + 1]:
        if device.found is None or not device.found.kernel_can_map:
            continue
        try:
            link.push(device.uuid, device.index, dialect)
        except NegotiationError as error:
            if assignment.options.require_all_daxdevs:
                raise NegotiationError(f"require_all_daxdevs: device {device.index} ({device.uuid}): {error}") from None
            log.warning("device %d (%s): %s; files on it cannot be opened", device.index, device.uuid, error)
        else:
            assignment.session.record.note_pushed(device.index)


def _default_striping(volume: Volume, assignment: Assignment) -> None:
    """Follow the file that says how new files are striped. Raises UsageError where the first mount finds it wrong."""
    path = assignment.options.alloc_cfg
    if path is None:
        return
    config = AllocConfig(Path(path), volume.superblock.device_size, volume.superblock.alloc_unit)
    if not assignment.successor:
        config()
    volume.default_interleave = config


def _restrict_new_files(volume: Volume, decision: Decision) -> None:
    """What is made on this mount must be expressible in this kernel's maps (decisions 13), and reached (design 6)."""
    if decision.candidates:
        last = 0 if volume.spaces is not None else min(dialect.max_devindex for dialect in decision.candidates)
        volume.table.restrict(
            lambda device: device.index <= last and device.found is not None and device.found.kernel_can_map
        )


def _report_damage(volume: Volume) -> None:
    statistics = volume.statistics()
    if volume.damage is not None:
        log.error("%s: %s", volume.device, describe_stop(volume.damage))
    elif volume.lagging:
        log.warning(
            "%s: log entry %d of another host is not whole yet; it is shown once it is",
            volume.device,
            statistics.log_entries,
        )
    for fault, count in statistics.skipped.items():
        log.warning("%s: %d log entries are not shown: %s", volume.device, count, fault.meaning)
