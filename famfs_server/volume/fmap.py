# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on extent maps: from a place in a file to places on devices (docs/format.md 6.4, docs/protocol.md 6.4)."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume.namespace import EXTENT


def runs(fmap: Fmap, offset: int, length: int) -> Iterator[Extent]:
    """The device ranges that hold file bytes [offset, offset + length), in file order, neighbours joined.

    The caller has cut the range to the file's size. Bytes that no extent holds end the sequence early.
    """
    return joined(_pieces(fmap, offset, length))


def joined(pieces: Iterable[Extent]) -> Iterator[Extent]:
    """Device ranges in their order, those that follow one another on one device as one."""
    pending: Extent | None = None
    for piece in pieces:
        if pending and (piece.device, piece.offset) == (pending.device, pending.offset + pending.length):
            pending = Extent(pending.device, pending.offset, pending.length + piece.length)
            continue
        if pending:
            yield pending
        pending = piece
    if pending:
        yield pending


def _pieces(fmap: Fmap, offset: int, length: int) -> Iterator[Extent]:
    end = offset + length
    if fmap.chunk_size:
        chunk_size, strips = fmap.chunk_size, len(fmap.extents)
        while offset < end:
            chunk, inside = divmod(offset, chunk_size)
            stripe, number = divmod(chunk, strips)
            strip = fmap.extents[number]
            start = stripe * chunk_size + inside
            count = min(end - offset, chunk_size - inside, strip.length - start)
            if count <= 0:
                return
            yield Extent(strip.device, strip.offset + start, count)
            offset += count
        return
    base = 0
    for extent in fmap.extents:
        if base <= offset < base + extent.length and offset < end:
            count = min(end, base + extent.length) - offset
            yield Extent(extent.device, extent.offset + offset - base, count)
            offset += count
        base += extent.length


def unroll(strips: NDArray[np.void], chunk_size: int, size: int, *, lead: int = 0) -> memoryview:
    """Simple extents that mean the same as `strips` (rows of EXTENT) do for a file of `size` bytes, as rows of EXTENT
    behind `lead` bytes of room.

    Every extent is a whole chunk, the last one too: kernels that accept only simple extents want aligned lengths
    (protocol 6.4). A file of 1 TiB has half a million of them, 12 MiB: they are made where they stay, the first stripe
    repeated and then moved on.
    """
    chunks = -(-size // chunk_size)
    stripes = -(-chunks // len(strips))
    room = np.empty(lead + stripes * strips.nbytes, np.uint8)
    # As plain numbers: numpy copies structures field by field.
    rows = room[lead:].view(np.uint64).reshape(stripes, -1)
    stripe = strips.copy()
    stripe["length"] = chunk_size
    rows[:] = stripe.view(np.uint64)
    offsets = rows.view(EXTENT)["offset"]
    offsets += np.arange(0, stripes * chunk_size, chunk_size, dtype=np.uint64)[:, None]
    return room.data[: lead + chunks * EXTENT.itemsize]
