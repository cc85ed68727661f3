# SPDX-License-Identifier: Apache-2.0
"""Free and used space of the devices, and the allocator (docs/format.md 6, 10.15 to 10.22).

Free space is kept as runs, not as a bitmap: memory grows with fragmentation, never with the device, and a volume with a
million files is one run. A run is keyed by its end, so that taking space from its front changes a value and no key.
"""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedDict

from famfs_server.errors import NoSpaceError, UsageError
from famfs_server.omf import layout
from famfs_server.omf.log import Extent, Fmap


class FreeRuns:
    """The free space between two offsets of one device, in bytes."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = max(start, end)
        self.free = self.end - start
        self._runs: SortedDict[int, int] = SortedDict()
        if self.free:
            self._runs[self.end] = start

    @classmethod
    def between(cls, start: int, end: int, used: NDArray[np.uint64]) -> "FreeRuns":
        """What `used`, a sorted array of disjoint (start, end) rows inside [start, end), leaves free."""
        runs = cls(start, end)
        if len(used):
            starts = np.concatenate((np.array([start], np.uint64), used[:, 1]))
            ends = np.concatenate((used[:, 0], np.array([runs.end], np.uint64)))
            gaps = ends > starts
            runs._runs = SortedDict(zip(ends[gaps].tolist(), starts[gaps].tolist(), strict=True))
            runs.free = int((ends[gaps] - starts[gaps]).sum())
        return runs

    def copy(self) -> "FreeRuns":
        """An independent copy."""
        twin = FreeRuns(self.start, self.start)
        twin.end, twin.free, twin._runs = self.end, self.free, SortedDict(self._runs)
        return twin

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The free runs as (start, end), ascending."""
        return ((start, end) for end, start in self._runs.items())

    def claim(self, start: int, length: int) -> bool:
        """Take [start, start + length) if all of it is free, and say whether it was."""
        end = start + length
        at = self._runs.bisect_right(start)
        if at == len(self._runs):
            return False
        run_end, run_start = self._runs.peekitem(at)
        if run_start > start or end > run_end:
            return False
        self._carve(run_start, run_end, start, end)
        return True

    def occupy(self, start: int, length: int) -> None:
        """Take whatever is still free of [start, start + length)."""
        end = start + length
        while True:
            at = self._runs.bisect_right(start)
            if at == len(self._runs):
                return
            run_end, run_start = self._runs.peekitem(at)
            if run_start >= end:
                return
            self._carve(run_start, run_end, max(start, run_start), min(end, run_end))

    def within(self, start: int, length: int) -> list[tuple[int, int]]:
        """What is free of [start, start + length), as (start, length), ascending."""
        end = start + length
        found = []
        for run_end in self._runs.irange(start + 1):
            first = max(self._runs[run_end], start)
            if first >= end:
                break
            found.append((first, min(run_end, end) - first))
        return found

    def release(self, start: int, length: int) -> None:
        """Give back a range that was claimed."""
        end = start + length
        at = self._runs.bisect_right(end)
        if at < len(self._runs):
            next_end, next_start = self._runs.peekitem(at)
            if next_start == end:
                del self._runs[next_end]
                end = next_end
        if start in self._runs:
            start = self._runs.pop(start)
        self._runs[end] = start
        self.free += length

    def first_fit(self, length: int, start: int, end: int) -> int | None:
        """The lowest offset in [start, end) at which `length` bytes are free, or nothing."""
        found = self._fitting(length, start, end)
        return None if found is None else found[0]

    def take_first(self, length: int, start: int) -> int | None:
        """Take `length` bytes at the lowest offset from `start` on at which they are free; the offset, or nothing."""
        found = self._fitting(length, start, self.end)
        if found is None:
            return None
        at, run_start, run_end = found
        self._carve(run_start, run_end, at, at + length)
        return at

    def _fitting(self, length: int, start: int, end: int) -> tuple[int, int, int] | None:
        """The lowest offset in [start, end) at which `length` bytes are free, and the start and end of their run."""
        for run_end in self._runs.irange(start + 1):
            run_start: int = self._runs[run_end]
            at = max(run_start, start)
            if at + length > end:
                return None
            if at + length <= run_end:
                return at, run_start, run_end
        return None

    @property
    def largest(self) -> int:
        """The length of the longest free run."""
        return max((end - start for start, end in self), default=0)

    def _carve(self, run_start: int, run_end: int, start: int, end: int) -> None:
        if end == run_end:
            del self._runs[run_end]
        else:
            self._runs[run_end] = end
        if start > run_start:
            self._runs[start] = run_start
        self.free -= end - start


@dataclass(frozen=True, slots=True)
class Interleave:
    """How to stripe a file: buckets of the device to choose from, strips to use, bytes of a chunk (format 6.3)."""

    buckets: int
    strips: int
    chunk_size: int = layout.ALLOC_UNIT

    def check(self, device_size: int, alloc_unit: int) -> None:
        """Raise UsageError for what the format's rules or a sane allocation refuse (format 6.3, 10.18)."""
        if not 1 <= self.buckets <= layout.MAX_BUCKETS:
            raise UsageError(f"the number of buckets must be 1 to {layout.MAX_BUCKETS}, not {self.buckets}")
        if not 1 <= self.strips <= layout.MAX_STRIPS:
            raise UsageError(f"the number of strips must be 1 to {layout.MAX_STRIPS}, not {self.strips}")
        if self.strips > self.buckets:
            raise UsageError(f"{self.strips} strips need as many buckets, not {self.buckets}")
        if not is_chunk_size(self.chunk_size, alloc_unit):
            raise UsageError(f"the chunk size {self.chunk_size} is not a power of two and a multiple of {alloc_unit}")
        if device_size // self.buckets < layout.MIN_BUCKET_SIZE:
            raise UsageError(f"{self.buckets} buckets on a device of {device_size} bytes are smaller than 1 GiB each")


def whole_units(size: int) -> int:
    """The bytes that a contiguous file of `size` bytes takes: rounded up to 2 MiB even where the unit is 4096, as every
    writer does (format 6.2)."""
    return -(-size // layout.ALLOC_UNIT) * layout.ALLOC_UNIT


def is_chunk_size(chunk_size: int, alloc_unit: int) -> bool:
    """Whether files may be striped in chunks of that many bytes (format 1.6)."""
    return chunk_size > 0 and chunk_size & (chunk_size - 1) == 0 and chunk_size % alloc_unit == 0


class Space:
    """The space of all devices of a volume.

    Two views are kept: what visible files own decides whether a later entry overlaps; what any entry in bounds names,
    visible or skipped, is never handed out again, so that data behind a damaged entry survives.
    """

    def __init__(
        self,
        log_end: int,
        device_size: int,
        alloc_unit: int,
        *,
        available: AbstractSet[int] = frozenset({0}),
        seed: int | None = None,
    ) -> None:
        """`available` are the numbers of the devices that new files may lie on; it may change at any time."""
        self.alloc_unit = alloc_unit
        self.available = available
        self.sizes = [device_size]
        self.log_end = log_end
        self._owned = [self._blank(0)]
        self._usable = self._owned
        self._cursors = [0]
        self._ahead: dict[int, list[tuple[int, int]]] = {}
        """Ranges that skipped entries name on devices that are not known yet."""
        self._final = False
        self._random = Random(seed)

    def _blank(self, device: int) -> FreeRuns:
        # The last unit is left alone where it is not a whole one (format 10.17).
        whole = self.sizes[device] // self.alloc_unit * self.alloc_unit
        return FreeRuns(self.first_usable(device), whole)

    def first_usable(self, device: int) -> int:
        """Where on a device file data may begin: behind the log, or behind the superblock of a further device."""
        return self.log_end if device == 0 else layout.SUPERBLOCK_REGION

    def add_device(self, size: int) -> None:
        """A further device of `size` bytes, numbered in the order of calls."""
        self.sizes.append(size)
        self._cursors.append(0)
        separate = self._usable is not self._owned
        self._owned.append(self._blank(len(self.sizes) - 1))
        if separate:
            self._usable.append(self._blank(len(self.sizes) - 1))
        for offset, length in self._ahead.pop(len(self.sizes) - 1, ()):
            self.reserve(len(self.sizes) - 1, offset, length)

    def load(self, extents: NDArray[np.void]) -> bool:
        """Own all of `extents` (namespace rows) at once, if they are disjoint; otherwise change nothing, say False."""
        loaded = []
        for device in range(len(self.sizes)):
            rows = extents[extents["device"] == device]
            rows = rows[np.argsort(rows["offset"], kind="stable")]
            spans = np.stack((rows["offset"], rows["offset"] + rows["length"]), axis=1)
            if len(spans) > 1 and bool((spans[1:, 0] < spans[:-1, 1]).any()):
                return False
            blank = self._blank(device)
            loaded.append(FreeRuns.between(blank.start, blank.end, spans))
        self._owned = loaded
        self._usable = loaded
        return True

    def let_go_of_reserved(self, extents: NDArray[np.void]) -> None:
        """Have nothing owned but `extents` (namespace rows), which are disjoint. What was reserved can be taken by
        entries that come, and is never handed out or taken back any more."""
        usable = [runs.copy() for runs in self._usable]
        disjoint = self.load(extents)
        assert disjoint
        self._usable = usable
        self._final = True

    def own(self, extents: Iterable[Extent]) -> bool:
        """Give `extents` to a visible file unless one of them is owned already, and say whether it worked."""
        done: list[Extent] = []
        for extent in extents:
            if not self._owned[extent.device].claim(extent.offset, extent.length):
                for taken in done:
                    self._owned[taken.device].release(taken.offset, taken.length)
                return False
            done.append(extent)
        if self._usable is not self._owned:
            for extent in done:
                self._usable[extent.device].occupy(extent.offset, extent.length)
        return True

    def reserve(self, device: int, offset: int, length: int) -> None:
        """Never hand out a range that a skipped entry names; what lies within the devices counts."""
        if device >= len(self.sizes):
            self._ahead.setdefault(device, []).append((offset, length))
            return
        if self._usable is self._owned:
            self._usable = [runs.copy() for runs in self._owned]
        runs, unit = self._usable[device], self.alloc_unit
        # Whole units, wherever the entry says it begins: what is left must stay fit for allocation.
        start, end = max(offset // unit * unit, runs.start), min(-(-(offset + length) // unit) * unit, runs.end)
        if length and start < end:
            runs.occupy(start, end - start)

    @property
    def free(self) -> int:
        """Bytes that can still be allocated."""
        return sum(self._usable[device].free for device in self._candidates())

    @property
    def allocated(self) -> int:
        """Bytes in whole units that are not free, superblock and log included."""
        return sum(runs.end - runs.free for runs in self._usable)

    def free_runs(self, device: int) -> Iterator[tuple[int, int]]:
        """The allocatable (start, end) runs of one device."""
        return iter(self._usable[device])

    def allocate(self, size: int, interleave: Interleave | None = None) -> Fmap:
        """Space for a file of `size` bytes; it is owned at once.

        Files shorter than a chunk are not striped (format 6.4). Raises NoSpaceError, having changed nothing.
        """
        if interleave is not None:
            interleave.check(self.sizes[0], self.alloc_unit)
            if size >= interleave.chunk_size:
                return self._allocate_strips(size, interleave)
        return Fmap((self.allocate_run(size),))

    def allocate_many(self, wanted: Sequence[tuple[int, Interleave | None]]) -> list[Fmap]:
        """Space for many files, as sizes and stripings: one run for all that are not striped, if there is one.

        Raises NoSpaceError, having changed nothing.
        """
        maps: list[Fmap] = []
        if len(wanted) > 1 and not any(interleave for _, interleave in wanted):
            lengths = [whole_units(size) for size, _ in wanted]
            at = self._take(0, sum(lengths), self._cursors[0])
            if at is not None:
                for length in lengths:
                    maps.append(Fmap((Extent(0, at, length),)))
                    at += length
                return maps
        try:
            for size, interleave in wanted:
                maps.append(self.allocate(size, interleave))
        except BaseException:
            for fmap in maps:
                self.free_again(fmap)
            raise
        return maps

    def free_again(self, fmap: Fmap) -> None:
        """Give back what `allocate` gave, when the entry did not reach the log."""
        if self._final:
            return
        for extent in fmap.extents:
            self._owned[extent.device].release(extent.offset, extent.length)
            if self._usable is not self._owned:
                self._usable[extent.device].release(extent.offset, extent.length)
            # The next file goes where this one would have been, so that failures leave no holes.
            self._cursors[extent.device] = min(self._cursors[extent.device], extent.offset)

    def take_free(self, extent: Extent) -> list[Extent]:
        """Take whatever is free of an extent, to be given back by `free_again`."""
        taken = [Extent(extent.device, *piece) for piece in self._usable[extent.device].within(*extent[1:])]
        self.own(taken)
        return taken

    def extend(self, extent: Extent, length: int) -> bool:
        """Make an extent that is owned `length` bytes long in place, if what lies behind it is free."""
        start, more = extent.offset + extent.length, length - extent.length
        if not self._usable[extent.device].claim(start, more):
            return False
        if self._usable is not self._owned:
            self._owned[extent.device].occupy(start, more)
        return True

    def _candidates(self) -> list[int]:
        """The devices that new files may lie on, ascending."""
        return [device for device in range(len(self.sizes)) if device in self.available]

    def allocate_run(self, size: int) -> Extent:
        """One extent for a file of `size` bytes, on the first device that has room for it (format 6.2); it is owned at
        once. Raises NoSpaceError, having changed nothing."""
        length = whole_units(size)
        for device in self._candidates():
            cursor = self._cursors[device]
            at = self._take(device, length, cursor)
            if at is None and cursor:
                at = self._take(device, length, 0)
            if at is not None:
                return Extent(device, at, length)
        longest = max(self._usable[device].largest for device in self._candidates())
        raise NoSpaceError(
            f"no free run of {length} bytes: {self.free} bytes are free, the longest run has {longest}; "
            "famfs gets space back only by a new mkfs.famfs"
        )

    def _take(self, device: int, length: int, start: int) -> int | None:
        """Own the first `length` bytes that are free from `start` on, and go on behind them the next time; their
        offset, or nothing."""
        at = self._usable[device].take_first(length, start)
        if at is not None:
            if self._usable is not self._owned:
                self._owned[device].occupy(at, length)
            self._cursors[device] = at + length
        return at

    def _allocate_strips(self, size: int, interleave: Interleave) -> Fmap:
        """Strips on all devices in turn, each from a bucket of its own (format 6.4)."""
        chunks = -(-size // interleave.chunk_size)
        length = -(-chunks // interleave.strips) * interleave.chunk_size
        # Lazily, and a device at a time: a bucket is looked at only when a strip may come from it.
        sources = [self._strips_of(device, length, interleave) for device in self._candidates()]
        strips: list[Extent] = []
        while sources:
            source = sources.pop(0)
            strip = next(source, None)
            if strip is None:
                continue
            strips.append(strip)
            if len(strips) == interleave.strips:
                self.own(strips)
                return Fmap(tuple(strips), interleave.chunk_size)
            sources.append(source)
        raise NoSpaceError(
            f"only {len(strips)} of {interleave.buckets * len(self._candidates())} buckets have {length} bytes free, "
            f"{interleave.strips} are needed"
        )

    def _strips_of(self, device: int, length: int, interleave: Interleave) -> Iterator[Extent]:
        """Where strips may lie on one device: one place in each bucket that has room, in random order."""
        bucket = self.sizes[device] // self.alloc_unit // interleave.buckets * self.alloc_unit
        # A further device whose buckets would be too small is not striped over (format 6.3).
        if device and self.sizes[device] // interleave.buckets < layout.MIN_BUCKET_SIZE:
            return
        for number in self._random.sample(range(interleave.buckets), interleave.buckets):
            at = self._usable[device].first_fit(length, number * bucket, (number + 1) * bucket)
            if at is not None:
                yield Extent(device, at, length)
