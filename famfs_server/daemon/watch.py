# SPDX-License-Identifier: Apache-2.0
"""What has changed in a volume, told to watchers one event after the other (decisions 10).

The log is the queue: a watcher is a place in it, and what lies behind that place is read from the namespace when the
watcher can take it. So creating files does nothing for watchers, a slow one loses nothing and takes no memory, and one
whose connection breaks goes on where it was, with any worker.
"""

import json
from collections.abc import Iterator
from stat import S_IMODE, S_ISDIR
from typing import Any
from uuid import UUID

from famfs_server.errors import UsageError
from famfs_server.volume import namespace as ns
from famfs_server.volume.check import describe_stop
from famfs_server.volume.faults import Fault
from famfs_server.volume.replay import Damage, Stop
from famfs_server.volume.volume import Volume

SOME = 256
"""Entries told at a time: about a millisecond of work."""

Event = dict[str, Any]


class Watcher:
    """One watcher's place in the log of a volume, and what it has been told of the volume's state."""

    def __init__(self, volume: Volume, index: int | None = None) -> None:
        """Begin before log entry `index`; with None, behind the last one. Raises UsageError for one that is not there
        yet."""
        self._volume = volume
        self._tree = volume.namespace
        replayed = self._tree.replayed
        if index is not None and not 0 <= index <= replayed:
            raise UsageError(f"the log has {replayed} entries; it cannot be watched from entry {index}")
        self._index = replayed if index is None else index
        self._stop: Stop | None = None
        self._foreign = False
        self.ended = False
        """Whether there is nothing to come: the file system is another one now."""

    def begin(self) -> Event:
        """The first event: which file system is watched, and from which log entry on."""
        volume = self._volume
        return {
            "event": "begin",
            "uuid": str(volume.superblock.uuid),
            "role": volume.role.value,
            "index": self._index,
        }

    @property
    def is_behind(self) -> bool:
        """Whether there is something to tell; quick, to be asked often."""
        volume = self._volume
        return (
            self._tree.replayed > self._index
            or volume.damage != self._stop
            or volume.foreign_writer is not self._foreign
        )

    def take(self, count: int = SOME) -> Iterator[Event]:
        """Up to `count` entries that were not told yet, and then what has happened to the volume as a whole."""
        end = min(self._tree.replayed, self._index + count)
        for index in range(self._index, end):
            yield self._entry(index)
        self._index = end
        if end == self._tree.replayed:
            yield from self._state()

    def _entry(self, index: int) -> Event:
        tree, node = self._tree, ns.nodeid_of(index)
        mode = tree.mode[node]
        if fault := tree.fault[node]:
            return {"event": "skipped", "index": index, "why": Fault(fault).name.lower()}
        if not mode:
            # What an ADD_DAXDEV entry leaves behind: its UUID stands where files have their names.
            return {
                "event": "device",
                "index": index,
                "uuid": str(UUID(bytes=tree.name(node))),
                "size": tree.size[node],
            }
        event = {
            "event": "directory" if S_ISDIR(mode) else "file",
            "index": index,
            "nodeid": node,
            "path": tree.path(node).decode("utf-8", "surrogateescape"),
            "mode": S_IMODE(mode),
            "uid": tree.uid[node],
            "gid": tree.gid[node],
        }
        return event if S_ISDIR(mode) else event | {"size": tree.size[node]}

    def _state(self) -> Iterator[Event]:
        stop, foreign = self._volume.damage, self._volume.foreign_writer
        if stop != self._stop:
            self._stop = stop
            if stop is not None and stop.damage is Damage.REPLACED:
                self.ended = True
                yield {"event": "replaced", "message": describe_stop(stop)}
            elif stop is not None:
                what = stop.damage.name.lower()
                yield {"event": "damage", "index": stop.index, "what": what, "message": describe_stop(stop)}
            else:
                yield {"event": "recovered", "index": self._index}
        if foreign is not self._foreign:
            self._foreign = foreign
            yield {"event": "foreign_writer", "index": self._index}


def lines(events: Iterator[Event]) -> bytes:
    """Events as JSON, one a line."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)
