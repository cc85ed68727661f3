# SPDX-License-Identifier: Apache-2.0
"""The allocator: never twice, never outside, and none of the faults that the reference's has (docs/format.md 10)."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from famfs_server.errors import NoSpaceError, UsageError
from famfs_server.omf import layout
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume.namespace import EXTENT
from famfs_server.volume.space import FreeRuns, Interleave, Space

UNIT = layout.ALLOC_UNIT
GIB = 1 << 30
LOG_END = 5 * UNIT


def total(space: Space) -> int:
    return sum(stop - start for start, stop in space.free_runs(0))


@given(st.lists(st.tuples(st.sampled_from(["claim", "occupy", "release"]), st.integers(0, 40), st.integers(1, 12))))
def test_free_runs_against_a_set(operations: list[tuple[str, int, int]]) -> None:
    runs, free = FreeRuns(4, 44), set(range(4, 44))
    for operation, start, length in operations:
        units = set(range(start, start + length))
        if operation == "claim":
            assert runs.claim(start, length) is (units <= free)
            free -= units if units <= free else set()
        elif operation == "occupy" and start >= 4 and start + length <= 44:
            runs.occupy(start, length)
            free -= units
        elif operation == "release" and not units & free and units <= set(range(4, 44)):
            runs.release(start, length)
            free |= units
        assert {unit for first, last in runs for unit in range(first, last)} == free
        assert runs.free == len(free)
        listed = list(runs)
        assert all(before[1] < after[0] for before, after in pairwise(listed))
        assert runs.largest == max((last - first for first, last in listed), default=0)
        for wanted in (1, 3, 7):
            fits = [at for at in range(start, 44) if set(range(at, at + wanted)) <= free and at + wanted <= 40]
            assert runs.first_fit(wanted, start, 40) == (fits[0] if fits else None)


def test_allocation_never_overlaps_and_never_leaves(rng: random.Random) -> None:
    for _ in range(60):
        # A last partial unit, which must stay untouched (format 10.17).
        size = rng.choice((4 * GIB, 4 * GIB + UNIT // 2, 16 * GIB + 4096))
        space = Space(LOG_END, size, UNIT, seed=rng.randrange(1 << 32))
        before = total(space)
        taken: list[tuple[int, int]] = []
        kept: list[Fmap] = []
        for _ in range(60):
            wanted = rng.choice((1, UNIT, UNIT + 1, 100 * UNIT, GIB))
            buckets = rng.choice((1, 2, 3, 4, 8, 16))
            interleave = Interleave(buckets, rng.randint(1, buckets), rng.choice((UNIT, 4 * UNIT)))
            striped = rng.random() < 0.5 and size // buckets >= GIB
            try:
                fmap = space.allocate(wanted, interleave if striped else None)
            except NoSpaceError:
                continue
            kept.append(fmap)
            if fmap.chunk_size:
                check_strips(fmap, wanted, interleave, size)
            else:
                (extent,) = fmap.extents
                assert wanted <= extent.length < wanted + UNIT
                assert striped is False or wanted < interleave.chunk_size
            for extent in fmap.extents:
                assert extent.device == 0
                assert extent.offset % UNIT == extent.length % UNIT == 0
                assert extent.offset >= LOG_END
                assert extent.offset + extent.length <= size // UNIT * UNIT
                assert all(extent.offset + extent.length <= a or b <= extent.offset for a, b in taken)
                taken.append((extent.offset, extent.offset + extent.length))
            assert total(space) == space.free == before - sum(b - a for a, b in taken)
        for fmap in kept:
            space.free_again(fmap)
        assert list(space.free_runs(0)) == [(LOG_END, size // UNIT * UNIT)]


def check_strips(fmap: Fmap, wanted: int, interleave: Interleave, size: int) -> None:
    """Strips are as many as asked for, alike, long enough, and each lies in a bucket of its own (format 10.16)."""
    assert len(fmap.extents) == interleave.strips
    assert fmap.chunk_size == interleave.chunk_size <= wanted
    (length,) = {extent.length for extent in fmap.extents}
    assert length % interleave.chunk_size == 0
    assert 0 <= length * interleave.strips - wanted < interleave.strips * interleave.chunk_size
    bucket = size // UNIT // interleave.buckets * UNIT
    first = {extent.offset // bucket for extent in fmap.extents}
    last = {(extent.offset + extent.length - 1) // bucket for extent in fmap.extents}
    assert first == last
    assert len(first) == interleave.strips
    assert max(first) < interleave.buckets


def test_holes_are_used_again_and_requests_never_run_past_the_end() -> None:
    # The reference granted ten units where five were left, once its cursor had moved (format 10.15).
    space = Space(LOG_END, LOG_END + 12 * UNIT, UNIT)
    first = space.allocate(7 * UNIT)
    with pytest.raises(NoSpaceError):
        space.allocate(6 * UNIT)
    assert space.free == 5 * UNIT
    rest = space.allocate(5 * UNIT)
    assert (first.extents[0].offset, rest.extents[0].offset) == (LOG_END, LOG_END + 7 * UNIT)
    with pytest.raises(NoSpaceError):
        space.allocate(1)
    space.free_again(first)
    assert space.allocate(1).extents == (Extent(0, LOG_END, UNIT),)


@pytest.mark.parametrize("size", [4 * GIB, 4 * GIB + UNIT - 4096])
def test_the_whole_device_can_be_allocated_and_no_more(size: int) -> None:
    space = Space(LOG_END, size, UNIT)
    everything = space.free
    assert everything == size // UNIT * UNIT - LOG_END
    assert space.allocate(everything).extents[0].length == everything
    assert space.free == 0
    assert space.allocated == size // UNIT * UNIT


@pytest.mark.parametrize(
    ("device", "buckets", "strips", "chunk", "right"),
    [
        (16, 8, 4, UNIT, True),
        (16, 16, 16, 32 * UNIT, True),
        (16, 8, 4, 0, False),
        (16, 8, 4, 3 << 20, False),
        (16, 8, 4, 1 << 20, False),
        (16, 8, 9, UNIT, False),
        (16, 0, 4, UNIT, False),
        (16, 64, 4, UNIT, False),
        (16, 65, 4, UNIT, False),
        (16, 8, 0, UNIT, False),
        (32, 32, 20, UNIT, False),
        (32, 32, 17, UNIT, False),
        (16, -1, -1, UNIT, False),
        (16, 8, 4, -UNIT, False),
        (16, 8, 4, 1 << 70, True),
    ],
)
def test_striping_parameters(device: int, buckets: int, strips: int, chunk: int, right: bool) -> None:
    space = Space(LOG_END, device * GIB, UNIT)
    interleave = Interleave(buckets, strips, chunk)
    before = space.free
    if right:
        assert space.allocate(1, interleave).chunk_size == 0
    else:
        with pytest.raises(UsageError):
            space.allocate(4 * UNIT, interleave)
        assert space.free == before


def test_striping_fails_as_a_whole() -> None:
    # Two of four buckets are full: three strips are not to be had, and what was tried is free again (format 10.18).
    space = Space(LOG_END, 4 * GIB, UNIT, seed=1)
    assert space.own([Extent(0, GIB, GIB), Extent(0, 2 * GIB, GIB)])
    before = list(space.free_runs(0))
    with pytest.raises(NoSpaceError, match="buckets"):
        space.allocate(100 * UNIT, Interleave(4, 3))
    assert list(space.free_runs(0)) == before
    assert len(space.allocate(100 * UNIT, Interleave(4, 2)).extents) == 2


def test_loading_at_once_is_like_owning_one_by_one(rng: random.Random) -> None:
    for _ in range(200):
        count = rng.randrange(1, 12)
        extents = [Extent(0, LOG_END + rng.randrange(40) * UNIT, rng.randint(1, 3) * UNIT) for _ in range(count)]
        bulk, single = (Space(LOG_END, 4 * GIB, UNIT) for _ in range(2))
        rows = np.array([(e.device, 0, e.offset, e.length) for e in extents], EXTENT)
        accepted = [single.own([extent]) for extent in extents]
        assert bulk.load(rows) is all(accepted)
        if all(accepted):
            assert list(bulk.free_runs(0)) == list(single.free_runs(0))


def test_what_skipped_entries_name_is_reserved_in_whole_units() -> None:
    space = Space(LOG_END, 4 * GIB, UNIT)
    assert space.own([Extent(0, LOG_END, UNIT)])
    space.reserve(0, LOG_END + 3 * UNIT + 4096, UNIT)
    space.reserve(0, LOG_END, UNIT)
    space.reserve(0, LOG_END + 8 * UNIT, 0)
    space.reserve(0, 4 * GIB - UNIT, 1 << 63)
    space.reserve(0, 1 << 62, UNIT)
    space.reserve(7, LOG_END, UNIT)
    expected = [(LOG_END + UNIT, LOG_END + 3 * UNIT), (LOG_END + 5 * UNIT, 4 * GIB - UNIT)]
    assert list(space.free_runs(0)) == expected
    # Reserved is not owned: an entry further on in the log may still be shown there.
    assert space.own([Extent(0, LOG_END + 3 * UNIT, 2 * UNIT)])
    assert list(space.free_runs(0)) == expected


def test_what_skipped_entries_name_from_the_metadata_on_is_reserved() -> None:
    """An extent that begins in the log is refused; its other end may hold somebody's data."""
    space = Space(LOG_END, 4 * GIB, UNIT)
    space.reserve(0, LOG_END - 2 * UNIT, 2 * UNIT)
    assert list(space.free_runs(0)) == [(LOG_END, 4 * GIB)]
    space.reserve(0, LOG_END - UNIT, 3 * UNIT)
    assert list(space.free_runs(0)) == [(LOG_END + 2 * UNIT, 4 * GIB)]
    space.reserve(0, 0, LOG_END + 4 * UNIT)
    assert list(space.free_runs(0)) == [(LOG_END + 4 * UNIT, 4 * GIB)]


# -- several devices ----------------------------------------------------------------------------


def several(*sizes: int, available: set[int] | None = None, seed: int = 1) -> Space:
    space = Space(
        LOG_END, sizes[0], UNIT, available={*range(len(sizes))} if available is None else available, seed=seed
    )
    for size in sizes[1:]:
        space.add_device(size)
    return space


def test_one_device_is_filled_after_the_other() -> None:
    space = several(4 * GIB, 4 * GIB, 4 * GIB, available={0, 2})
    size = 3 * GIB // 2
    extents = [space.allocate(size).extents[0] for _ in range(4)]
    # What lies in front of a further device's data is its superblock.
    first = layout.SUPERBLOCK_REGION
    assert [(e.device, e.offset) for e in extents] == [(0, LOG_END), (0, LOG_END + size), (2, first), (2, first + size)]
    with pytest.raises(NoSpaceError, match="no free run"):
        space.allocate(size)
    assert space.free == 8 * GIB - LOG_END - first - 4 * size
    space.free_again(Fmap((extents[2],)))
    assert space.allocate(size) == Fmap((extents[2],))
    # A device that comes later is used at once.
    space.available.add(1)  # type: ignore[attr-defined]
    assert space.allocate(size).extents[0].device == 1


def test_strips_go_to_all_devices_in_turn(rng: random.Random) -> None:
    for _ in range(20):
        space = several(8 * GIB, 8 * GIB, 4 * GIB, 16 * GIB, available={0, 2, 3}, seed=rng.randrange(1 << 32))
        strips = space.allocate(24 * UNIT, Interleave(8, 6)).extents
        # Eighths of the third device are smaller than 1 GiB: it gets no strips.
        assert [strip.device for strip in strips] == [0, 3, 0, 3, 0, 3]
        for device, bucket in ((0, GIB), (3, 2 * GIB)):
            buckets = [strip.offset // bucket for strip in strips if strip.device == device]
            assert len(set(buckets)) == len(buckets)
        assert len({strip.length for strip in strips}) == 1


def test_strips_of_a_full_device_come_from_the_others() -> None:
    space = several(4 * GIB, 4 * GIB)
    assert space.own((Extent(1, layout.SUPERBLOCK_REGION, 4 * GIB - layout.SUPERBLOCK_REGION),))
    strips = space.allocate(8 * UNIT, Interleave(4, 4)).extents
    assert [strip.device for strip in strips] == [0, 0, 0, 0]
    before = space.free
    assert space.own((Extent(0, 3 * GIB + 100 * UNIT, GIB - 100 * UNIT),))
    with pytest.raises(NoSpaceError, match="only 3 of 8 buckets"):
        space.allocate(4 * 200 * UNIT, Interleave(4, 4))
    assert space.free == before - GIB + 100 * UNIT


def test_what_was_named_before_its_device_is_reserved() -> None:
    space = several(4 * GIB, available={0, 1})
    space.reserve(1, 4 * UNIT, 2 * UNIT)
    space.reserve(2, 4 * UNIT, 2 * UNIT)
    space.add_device(4 * GIB)
    assert list(space.free_runs(1)) == [(UNIT, 4 * UNIT), (6 * UNIT, 4 * GIB)]
