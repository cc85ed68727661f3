# SPDX-License-Identifier: Apache-2.0
"""The order of stores: appending to the log and making a file system, as generators of steps.

A step is a store, a write-back of cache lines, or a fence. Whoever runs the steps does them one by one in memory; a
test stops after each, and drops or reorders what no fence has settled (docs/format.md 5.2, 10.1, 10.7).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from famfs_server.omf import layout, log, superblock


class Target(Protocol):
    """Memory that steps can be run on."""

    def write(self, offset: int, data: bytes) -> None: ...
    def store_u64(self, offset: int, value: int) -> None: ...
    def write_back(self, offset: int, length: int) -> None: ...
    def fence(self) -> None: ...


class Store(NamedTuple):
    """Write `data` at byte `offset` of the device."""

    offset: int
    data: bytes

    def run(self, target: Target) -> None:
        """Do it."""
        target.write(self.offset, self.data)


class StoreU64(NamedTuple):
    """Write one aligned 64-bit word at byte `offset` in a single store."""

    offset: int
    value: int

    def run(self, target: Target) -> None:
        """Do it."""
        target.store_u64(self.offset, self.value)


class Zero(NamedTuple):
    """Fill `length` bytes at `offset` with zeroes."""

    offset: int
    length: int

    def run(self, target: Target) -> None:
        """Do it, a piece at a time."""
        end = self.offset + self.length
        for start in range(self.offset, end, len(_ZEROES)):
            target.write(start, _ZEROES[: end - start])


class WriteBack(NamedTuple):
    """Write the cache lines of the range back to memory; complete only behind the next fence."""

    offset: int
    length: int

    def run(self, target: Target) -> None:
        """Do it."""
        target.write_back(self.offset, self.length)


class Fence(NamedTuple):
    """Wait until all stores and write-backs so far are complete."""

    def run(self, target: Target) -> None:
        """Do it."""
        target.fence()


Step = Store | StoreU64 | Zero | WriteBack | Fence


_ZEROES = bytes(1 << 20)


def run(steps: Iterator[Step], target: Target) -> None:
    """Do every step on `target`, in order."""
    for step in steps:
        step.run(target)


def append_steps(first_index: int, entries: Sequence[bytes]) -> Iterator[Step]:
    """Append `entries` (544 bytes each or several in a row, already numbered from `first_index`) to the log.

    The entries are settled in memory before the counters say that they exist, so another host sees either
    nothing or whole entries; `next_seqnum` goes first because readers trust `next_index` alone.
    """
    offset = layout.entry_offset(first_index)
    data = b"".join(entries)
    yield Store(offset, data)
    yield WriteBack(offset, len(data))
    yield Fence()
    yield from counter_steps(first_index + len(data) // layout.LOG_ENTRY_SIZE)


def counter_steps(next_index: int) -> Iterator[Step]:
    """Set both counters to `next_index`: the end of an append, and the repair of counters that disagree."""
    yield StoreU64(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, next_index)
    yield StoreU64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, next_index)
    yield WriteBack(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE)
    yield Fence()


def format_steps(
    *,
    uuid: UUID,
    device_uuid: UUID,
    system_uuid: UUID,
    log_length: int,
    device_size: int,
    device_path: str,
) -> Iterator[Step]:
    """Make a file system: forget the old superblock, write the log, then the superblock, its magic number last.

    At no point is there a valid superblock over a log that is not the new, empty one (format 10.7).
    """
    yield from kill_steps()
    yield Zero(layout.LOG_OFFSET, log_length)
    yield Store(layout.LOG_OFFSET, log.build_header(log_length))
    yield WriteBack(layout.LOG_OFFSET, log_length)
    yield Fence()
    yield from _superblock_steps(
        superblock.build(
            uuid=uuid,
            device_uuid=device_uuid,
            system_uuid=system_uuid,
            log_length=log_length,
            device_size=device_size,
            device_path=device_path,
        )
    )


def secondary_steps(
    *, uuid: UUID, device_uuid: UUID, system_uuid: UUID, device_size: int, device_path: str
) -> Iterator[Step]:
    """Make a further device of the file system `uuid`: forget what superblock is there, write the new one."""
    yield from kill_steps()
    yield from _superblock_steps(
        superblock.build(
            uuid=uuid,
            device_uuid=device_uuid,
            system_uuid=system_uuid,
            log_length=0,
            device_size=device_size,
            device_path=device_path,
        )
    )


def _superblock_steps(pieces: Sequence[tuple[int, bytes]]) -> Iterator[Step]:
    """Store a superblock, its magic number last."""
    for offset, data in pieces:
        yield Store(offset + 8, data[8:]) if offset == 0 else Store(offset, data)
    yield WriteBack(layout.SUPERBLOCK_OFFSET, layout.SUPERBLOCK.itemsize)
    yield Fence()
    yield StoreU64(layout.SUPERBLOCK_OFFSET, layout.SUPERBLOCK_MAGIC)
    yield WriteBack(layout.SUPERBLOCK_OFFSET, 8)
    yield Fence()


def kill_steps() -> Iterator[Step]:
    """Make the superblock invalid by its magic number, and nothing else (format 4.2)."""
    yield StoreU64(layout.SUPERBLOCK_OFFSET, 0)
    yield WriteBack(layout.SUPERBLOCK_OFFSET, 8)
    yield Fence()
