# SPDX-License-Identifier: Apache-2.0
"""The order of stores: appending to the log and making a file system, as calls on memory.

Each call is a store, a write-back of cache lines, or a fence. A test stands in for the memory: it stops at each call,
and drops or reorders what no fence has settled (docs/format.md 5.2, 10.1, 10.7).
"""

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from famfs_server.omf import layout, log, superblock

_ZEROES = bytes(1 << 20)


class Target(Protocol):
    """Memory to store into; `dax.memory.Memory` is the real one."""

    def write(self, offset: int, data: bytes) -> None: ...
    def store_u64(self, offset: int, value: int) -> None: ...
    def write_back(self, offset: int, length: int) -> None: ...
    def fence(self) -> None: ...


def append(target: Target, first_index: int, entries: bytes) -> None:
    """Append `entries` (544 bytes each, one behind the other, numbered from `first_index`) to the log.

    The entries are settled in memory before the counters say that they exist, so another host sees either
    nothing or whole entries.
    """
    offset = layout.entry_offset(first_index)
    target.write(offset, entries)
    target.write_back(offset, len(entries))
    target.fence()
    set_counters(target, first_index + len(entries) // layout.LOG_ENTRY_SIZE)


def set_counters(target: Target, next_index: int) -> None:
    """Set both counters to `next_index`: the end of an append, and the repair of counters that disagree.

    `next_seqnum` goes first because readers trust `next_index` alone.
    """
    target.store_u64(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, next_index)
    target.store_u64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, next_index)
    target.write_back(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE)
    target.fence()


def make(
    target: Target,
    *,
    uuid: UUID,
    device_uuid: UUID,
    system_uuid: UUID,
    log_length: int,
    device_size: int,
    device_path: str,
) -> None:
    """Make a file system: forget the old superblock, write the log, then the superblock, its magic number last.

    At no point is there a valid superblock over a log that is not the new, empty one (format 10.7).
    """
    kill(target)
    end = layout.LOG_OFFSET + log_length
    for start in range(layout.LOG_OFFSET, end, len(_ZEROES)):
        target.write(start, _ZEROES[: end - start])
    target.write(layout.LOG_OFFSET, log.build_header(log_length))
    target.write_back(layout.LOG_OFFSET, log_length)
    target.fence()
    _write_superblock(
        target,
        superblock.build(
            uuid=uuid,
            device_uuid=device_uuid,
            system_uuid=system_uuid,
            log_length=log_length,
            device_size=device_size,
            device_path=device_path,
        ),
    )


def make_secondary(
    target: Target, *, uuid: UUID, device_uuid: UUID, system_uuid: UUID, device_size: int, device_path: str
) -> None:
    """Make a further device of the file system `uuid`: forget what superblock is there, write the new one."""
    kill(target)
    _write_superblock(
        target,
        superblock.build(
            uuid=uuid,
            device_uuid=device_uuid,
            system_uuid=system_uuid,
            log_length=0,
            device_size=device_size,
            device_path=device_path,
        ),
    )


def kill(target: Target) -> None:
    """Make the superblock invalid by its magic number, and nothing else (format 4.2)."""
    _set_magic(target, 0)


def _write_superblock(target: Target, pieces: Sequence[tuple[int, bytes]]) -> None:
    """Store a superblock, its magic number last."""
    for offset, data in pieces:
        if offset == 0:
            target.write(8, data[8:])
        else:
            target.write(offset, data)
    target.write_back(layout.SUPERBLOCK_OFFSET, layout.SUPERBLOCK.itemsize)
    target.fence()
    _set_magic(target, layout.SUPERBLOCK_MAGIC)


def _set_magic(target: Target, magic: int) -> None:
    target.store_u64(layout.SUPERBLOCK_OFFSET, magic)
    target.write_back(layout.SUPERBLOCK_OFFSET, 8)
    target.fence()
