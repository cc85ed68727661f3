# SPDX-License-Identifier: Apache-2.0
"""Mending a log: only what takes nothing from anybody, as changes that can be looked at and saved before they are made.

Two things can be mended. Counters that disagree: readers trust `next_index` alone, so the other one is set to it. A
last entry that is not whole: it has hidden itself and keeps the log from growing; the log is made to end before it.
Everything else would mean to choose between somebody's files.
"""

from dataclasses import dataclass
from typing import Any

from famfs_server.errors import MediaError, RoleError
from famfs_server.omf import append, layout
from famfs_server.volume.check import Report
from famfs_server.volume.replay import Damage
from famfs_server.volume.volume import DeviceMemory, Role


@dataclass(frozen=True, slots=True)
class Repair:
    """What is to be done to a log, and the bytes that are lost by it.

    `next_index` is where the log will end. `saved` are ranges as (offset on the device, bytes), which put back make the
    repair undone.
    """

    next_index: int
    actions: tuple[str, ...]
    saved: tuple[tuple[int, bytes], ...]

    def as_dict(self, report: Report) -> dict[str, Any]:
        """The copy of what will be changed, for JSON. Bytes are in hexadecimal."""
        return {
            "device": report.device,
            "uuid": str(report.superblock.uuid),
            "actions": list(self.actions),
            "saved": [{"offset": offset, "bytes": data.hex()} for offset, data in self.saved],
        }


def plan(memory: DeviceMemory, report: Report, *, torn: bool) -> Repair | None:
    """What can be mended of what `report` found; nothing: None. `torn` False leaves a torn last entry alone.

    Raises RoleError on a host that does not own the file system: only the owner writes to the log.
    """
    header, stop = report.header, report.stop
    actions = []
    end = header.next_index
    if torn and stop is not None and stop.damage is Damage.TORN:
        end = stop.index
        actions.append(f"log entry {end}, which is not whole, is taken off the end of the log")
    if header.next_seqnum != header.next_index:
        actions.append(f"the log's counters are both set to {end}")
    if not actions:
        return None
    if report.role is not Role.MASTER:
        raise RoleError(f"{report.device}: only the owner of the file system can repair it, host {_owner(report)}")
    saved = [(layout.LOG_OFFSET, memory.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE))]
    if end < header.next_index:
        offset = layout.entry_offset(end)
        saved.append((offset, memory.read_fresh(offset, layout.LOG_ENTRY_SIZE)))
    return Repair(end, tuple(actions), tuple(saved))


def _owner(report: Report) -> str:
    return str(report.superblock.system_uuid)


def carry_out(memory: DeviceMemory, repair: Repair) -> None:
    """Make the changes. Raises MediaError if the log is not any more what was planned for."""
    header = memory.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE)
    if header != repair.saved[0][1]:
        raise MediaError("the log has changed since it was examined; nothing is repaired")
    append.set_counters(memory, repair.next_index)
