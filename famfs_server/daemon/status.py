# SPDX-License-Identifier: Apache-2.0
"""What a mount tells about itself: the object that the control socket gives for `/status`."""

import os
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from famfs_server import __version__
from famfs_server.daemon.logs import RECENT, lines_lost
from famfs_server.daemon.options import MountOptions
from famfs_server.errors import DeviceFaultError
from famfs_server.fuse import counters, kernels
from famfs_server.fuse.channel import Channel
from famfs_server.fuse.counters import OpcodeFigures
from famfs_server.fuse.dialects import Decision
from famfs_server.fuse.filesystem import FileSystem
from famfs_server.volume.devices import describe
from famfs_server.volume.volume import Volume

_SHOWN_PATHS = 10


def status(options: MountOptions, filesystem: FileSystem, channel: Channel, decision: Decision) -> dict[str, Any]:
    """The state of a mount, as JSON knows it. Sizes are in bytes, times in seconds."""
    volume = filesystem.volume
    figures = volume.statistics()
    record = channel.session.record
    plane = channel.plane
    damage = volume.damage
    return {
        "taken_at": time.time(),
        "version": __version__,
        "kernel": os.uname().release,
        "device": options.device,
        "mount_point": options.mount_point,
        "uuid": str(volume.superblock.uuid),
        "role": volume.role.value,
        "data_path": decision.data_path,
        "reason": decision.explanation,
        "fuse": kernels.of_descriptor(channel.fuse).name,
        "dialects": [dialect.name for dialect in decision.candidates],
        "fastpath": options.fastpath,
        "no_open": filesystem.no_open,
        "watchdog": options.watchdog,
        "mounted_since": filesystem.started / 1e9,
        "log": {"entries": figures.log_entries, "capacity": figures.log_capacity, "behind": _behind(volume)},
        "files": figures.files,
        "directories": figures.directories,
        "space": {"capacity": figures.capacity, "allocated": figures.allocated, "free": figures.free},
        "devices": [
            {
                "index": device.index,
                "uuid": str(device.uuid),
                "path": None if device.found is None else device.found.path,
                "size": device.size,
                "state": device.state.value,
                "problem": "" if device.complete else describe(device),
            }
            for device in volume.table.entries
        ],
        "skipped": {fault.name.lower(): count for fault, count in figures.skipped.items()},
        "damage": None if damage is None else {"index": damage.index, "what": damage.damage.value},
        "lagging": volume.lagging,
        "foreign_writer": volume.foreign_writer,
        "not_logged_yet": len(volume.promised),
        "faulty": {
            "files": len(filesystem.faulty),
            "paths": [os.fsdecode(volume.namespace.path(row)) for row in sorted(filesystem.faulty)[:_SHOWN_PATHS]],
        },
        "local_changes": filesystem.namespace.local_changes,
        "requests": {
            "answered": record.answered,
            "at_libfuse": record.at_libfuse,
            "unmapped": plane.unmapped,
            "bounds": counters.bounds(),
            "opcodes": {
                plane.opcode_names.get(opcode) or counters.name(opcode): _opcode(found)
                for opcode, found in counters.figures(record.counters, plane.counts).items()
            },
        },
        "takeovers": record.takeovers,
        "failed_at_takeover": record.failed_at_takeover,
        "log_lines_lost": lines_lost(),
        "recent": [asdict(line) for line in RECENT.lines()],
        "processes": {"worker": os.getpid(), "supervisor": os.getppid(), "worker_bytes": _resident()},
    }


def _behind(volume: Volume) -> int | None:
    """Entries of the log that are not replayed yet; nothing where it cannot be read."""
    try:
        return volume.behind()
    except DeviceFaultError:
        return None


def _opcode(found: OpcodeFigures) -> dict[str, Any]:
    return {
        "count": found.count,
        "errors": found.errors,
        "samples": found.samples,
        "sampled_seconds": found.sampled_seconds,
        "p50": found.quantile(0.5),
        "p99": found.quantile(0.99),
        "histogram": list(found.histogram),
    }


def _resident() -> int:
    """Bytes of memory of this process, the device's pages that it has touched among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
