# SPDX-License-Identifier: Apache-2.0
"""Device memory for tests that need no device: plain, and with a cache that loses what was not settled."""

import mmap
import os
import random
from collections.abc import Iterator
from uuid import UUID

from famfs_server.dax.memory import Memory
from famfs_server.omf import layout
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.volume import NewFile, Volume

HOST = UUID("f00dcafe-0102-4304-8506-0708090a0b0c")
LINE = 64
LOG_LENGTH = 8 << 20


def lines_of(offset: int, length: int) -> range:
    """The numbers of the cache lines that a range touches."""
    return range(offset // LINE, -(-(offset + length) // LINE))


class ScratchMemory(Memory):
    """A device of zeroes. Pages that nobody touches cost nothing."""

    def __init__(self, size: int = 4 << 30) -> None:
        fd = os.memfd_create("scratch")
        os.ftruncate(fd, size)
        self._pages = mmap.mmap(fd, size)
        os.close(fd)
        super().__init__(memoryview(self._pages), flush=False)

    def close(self) -> None:
        """Free the memory."""
        super().close()
        self._pages.close()


class PowerCutError(Exception):
    """The host has stopped in the middle of what it did."""


class CrashMemory(ScratchMemory):
    """Memory behind a cache: what was stored since the last fence may or may not be there after a crash.

    For every cache line all contents are kept that the memory may hold: the settled one and every later one, since a
    line may be evicted at any time. A fence settles the lines that were written back before it.
    """

    def __init__(self, size: int = 4 << 30) -> None:
        super().__init__(size)
        self.steps_left: int | None = None
        """How many steps the host may still do; None: as many as it likes."""
        self._unsettled: dict[int, list[bytes]] = {}
        self._written_back: dict[int, int] = {}

    def _step(self) -> None:
        if self.steps_left is not None:
            if self.steps_left == 0:
                raise PowerCutError
            self.steps_left -= 1

    def _line(self, number: int) -> bytes:
        return bytes(self.view[number * LINE : (number + 1) * LINE])

    def write(self, offset: int, data: "bytes | memoryview") -> None:  # type: ignore[override]
        self._step()
        # As bytes: comparing views goes byte by byte.
        if bytes(self.view[offset : offset + len(data)]) == bytes(data):
            return
        lines = lines_of(offset, len(data))
        before = bytes(self.view[lines.start * LINE : lines.stop * LINE])
        super().write(offset, data)
        after = bytes(self.view[lines.start * LINE : lines.stop * LINE])
        for number in lines:
            at = (number - lines.start) * LINE
            old, new = before[at : at + LINE], after[at : at + LINE]
            if old != new:
                self._unsettled.setdefault(number, [old]).append(new)

    def store_u64(self, offset: int, value: int) -> None:
        assert offset % 8 == 0
        self.write(offset, value.to_bytes(8, "little"))

    def zero(self, offset: int, length: int) -> None:
        """Settled at once, as the real one is when it returns; nothing that was stored there before comes back."""
        self._step()
        self.view[offset : offset + length] = bytes(length)
        lines = lines_of(offset, length)
        for unsettled in (self._unsettled, self._written_back):
            for number in [number for number in unsettled if number in lines]:
                del unsettled[number]

    def write_back(self, offset: int, length: int) -> None:
        self._step()
        lines = lines_of(offset, length)
        for number, contents in self._unsettled.items():
            if number in lines:
                self._written_back[number] = len(contents) - 1

    def fence(self) -> None:
        self._step()
        for number, settled in self._written_back.items():
            del self._unsettled[number][:settled]
            if len(self._unsettled[number]) == 1:
                del self._unsettled[number]
        self._written_back.clear()

    def crash(self, rng: random.Random, variants: int = 1) -> Iterator[None]:
        """Be what a host finds after a power cut, in so many ways: each line as the memory may hold it.

        The caller may look at the memory each time, and use it as it likes after the last one.
        """
        unsettled = list(self._unsettled.items())
        self._unsettled.clear()
        self._written_back.clear()
        self.steps_left = None
        for _ in range(variants):
            # Lines are lost and kept as they like, or mostly lost, or mostly kept.
            kept = rng.choice((0.5, 0.2, 0.8))
            for number, contents in unsettled:
                chosen = contents[-1] if rng.random() < kept else rng.choice(contents[:-1])
                self.view[number * LINE : (number + 1) * LINE] = chosen
            yield


class IncoherentMemory(ScratchMemory):
    """One host's sight of a memory that hosts share, through a cache that knows nothing of theirs.

    The cache never drops a line by itself, and never writes one back: what another host has stored is seen once the
    line was invalidated, and what this one stores reaches the memory by a write-back and a fence, or not at all.
    """

    def __init__(self, shared: ScratchMemory) -> None:
        super().__init__(shared.size)
        self._shared = shared
        self._cached: set[int] = set()
        self._dirty: set[int] = set()
        self._on_its_way: dict[int, bytes] = {}

    def _load(self, offset: int, length: int) -> None:
        for number in lines_of(offset, length):
            if number not in self._cached:
                place = slice(number * LINE, (number + 1) * LINE)
                self.view[place] = self._shared.view[place]
                self._cached.add(number)

    def read(self, offset: int, length: int) -> bytes:
        self._load(offset, length)
        return super().read(offset, length)

    def write(self, offset: int, data: "bytes | memoryview") -> None:  # type: ignore[override]
        self._load(offset, len(data))
        super().write(offset, data)
        self._dirty.update(lines_of(offset, len(data)))

    def store_u64(self, offset: int, value: int) -> None:
        self.write(offset, value.to_bytes(8, "little"))

    def write_back(self, offset: int, length: int) -> None:
        for number in self._dirty.intersection(lines_of(offset, length)):
            self._on_its_way[number] = bytes(self.view[number * LINE : (number + 1) * LINE])
            self._dirty.remove(number)

    def fence(self) -> None:
        for number, data in self._on_its_way.items():
            self._shared.view[number * LINE : (number + 1) * LINE] = data
        self._on_its_way.clear()

    def invalidate(self, offset: int, length: int) -> None:
        self.write_back(offset, length)
        self.fence()
        self._cached.difference_update(lines_of(offset, length))

    def present(self, offset: int, length: int) -> None:
        # Whoever reads through the view has the lines loaded by that.
        self.invalidate(offset, length)
        self._load(offset, length)


def formatted(memory: Memory) -> None:
    """Put an empty file system of HOST there."""
    make_filesystem(memory, "memory", HOST, log_length=LOG_LENGTH, uuid=UUID(int=1), device_uuid=UUID(int=2))


def meta_files(size: int, *files: NewFile) -> tuple[int, int]:
    """Superblock and log of a volume with `files`, on a device of `size` bytes in famfs mode: two open files."""
    whole = ScratchMemory(size)
    formatted(whole)
    volume = Volume(whole, HOST, "memory")
    for new in files:
        volume.create(new)
    volume.close()
    pair = []
    for start, length in ((layout.SUPERBLOCK_OFFSET, layout.SUPERBLOCK_REGION), (layout.LOG_OFFSET, LOG_LENGTH)):
        descriptor = os.memfd_create("meta")
        os.ftruncate(descriptor, length)
        os.pwrite(descriptor, whole.read(start, 64 << 10), 0)
        pair.append(descriptor)
    whole.close()
    return pair[0], pair[1]
