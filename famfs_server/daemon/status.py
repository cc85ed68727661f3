# SPDX-License-Identifier: Apache-2.0
"""What a mount tells about itself: the object that the control socket gives for `/status`."""

import os
from typing import Any

from famfs_server import __version__
from famfs_server.daemon.options import MountOptions
from famfs_server.fuse.channel import Channel
from famfs_server.fuse.dialects import Decision
from famfs_server.fuse.filesystem import FileSystem


def status(options: MountOptions, filesystem: FileSystem, channel: Channel, decision: Decision) -> dict[str, Any]:
    """The state of a mount, as JSON knows it. Sizes are in bytes, times in seconds."""
    volume = filesystem.volume
    figures = volume.statistics()
    record = channel.session.record
    plane = channel.plane
    # What another host's caches still hold of an entry is no damage (decisions 7).
    damage = None if volume.lagging else figures.stop
    return {
        "version": __version__,
        "kernel": os.uname().release,
        "device": options.device,
        "mount_point": options.mount_point,
        "uuid": str(volume.superblock.uuid),
        "role": volume.role.value,
        "data_path": decision.data_path,
        "reason": decision.reason,
        "dialects": [dialect.name for dialect in decision.candidates],
        "fastpath": options.fastpath,
        "no_open": options.no_open,
        "watchdog": options.watchdog,
        "mounted_since": filesystem.started / 1e9,
        "log": {"entries": figures.log_entries, "capacity": figures.log_capacity},
        "files": figures.files,
        "directories": figures.directories,
        "space": {"capacity": figures.capacity, "allocated": figures.allocated, "free": figures.free},
        "skipped": {fault.name.lower(): count for fault, count in figures.skipped.items()},
        "damage": None if damage is None else {"index": damage.index, "what": damage.damage.value},
        "lagging": volume.lagging,
        "foreign_writer": volume.foreign_writer,
        "not_logged_yet": len(volume.promised),
        "local_changes": filesystem.namespace.local_changes,
        "requests": {"answered": record.answered, "at_libfuse": record.at_libfuse, "unmapped": plane.unmapped},
        "takeovers": record.takeovers,
    }
