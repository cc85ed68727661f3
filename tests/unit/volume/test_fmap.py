# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on extent maps against a walk of every byte."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume.fmap import runs, unroll
from famfs_server.volume.namespace import EXTENT

Place = tuple[int, int]


def places(fmap: Fmap, size: int) -> list[Place]:
    """Where each byte of a file is, one at a time, as (device, offset), by the words of format 6.4."""
    found = []
    for position in range(size):
        if fmap.chunk_size:
            chunk = position // fmap.chunk_size
            strip = fmap.extents[chunk % len(fmap.extents)]
            stripe = chunk // len(fmap.extents)
            inside = stripe * fmap.chunk_size + position % fmap.chunk_size
            if inside >= strip.length:
                break
            found.append((strip.device, strip.offset + inside))
        else:
            rest = position
            for extent in fmap.extents:
                if rest < extent.length:
                    found.append((extent.device, extent.offset + rest))
                    break
                rest -= extent.length
            else:
                break
    return found


extents = st.lists(
    st.builds(
        Extent, st.integers(0, 1), st.integers(0, 5).map(lambda n: n * 16), st.integers(1, 4).map(lambda n: n * 8)
    ),
    min_size=1,
    max_size=5,
)
maps = st.one_of(
    extents.map(lambda found: Fmap(tuple(found))),
    st.tuples(extents, st.sampled_from([1, 2, 4, 8, 16])).map(lambda found: Fmap(tuple(found[0]), found[1])),
)


@settings(max_examples=500)
@given(maps, st.integers(0, 170), st.integers(0, 170))
def test_runs(fmap: Fmap, first: int, second: int) -> None:
    # Callers cut ranges to the file's size, which replay has compared with the extents.
    size = len(places(fmap, 170))
    offset, end = sorted((min(first, size), min(second, size)))
    found = list(runs(fmap, offset, end - offset))
    assert [(r.device, r.offset + i) for r in found for i in range(r.length)] == places(fmap, size)[offset:end]
    assert all(run.length > 0 for run in found)
    # Neighbours are joined: a run ends only where the next byte is somewhere else.
    assert all((a.device, a.offset + a.length) != (b.device, b.offset) for a, b in pairwise(found))


@settings(max_examples=500)
@given(extents, st.sampled_from([1, 2, 4, 8]), st.integers(1, 160))
def test_unrolled_maps_mean_the_same(strips: list[Extent], chunk: int, size: int) -> None:
    fmap = Fmap(tuple(strips), chunk)
    size = len(places(fmap, size))
    rows = np.array([(strip.device, 0, strip.offset, strip.length) for strip in strips], EXTENT)
    unrolled = np.frombuffer(unroll(rows, chunk, size, lead=32)[32:], EXTENT).tolist()
    assert not any(reserved for _, reserved, _, _ in unrolled)
    simple = Fmap(tuple(Extent(device, offset, length) for device, _, offset, length in unrolled))
    assert {extent.length for extent in simple.extents} == {chunk}
    assert len(simple.extents) == -(-size // chunk)
    assert places(simple, size) == places(fmap, size)


@pytest.mark.parametrize("offset", [0, (1 << 40) - 1])
def test_large_offsets(offset: int) -> None:
    fmap = Fmap(tuple(Extent(0, number << 50, 1 << 44) for number in range(4)), 1 << 21)
    (run,) = runs(fmap, offset, 1)
    chunk = offset >> 21
    assert run == Extent(0, ((chunk % 4) << 50) + ((chunk // 4) << 21) + offset % (1 << 21), 1)
    assert sum(run.length for run in runs(fmap, offset, 9 << 21)) == 9 << 21
