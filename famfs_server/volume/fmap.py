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


def unroll(strips: NDArray[np.void], chunk_size: int, size: int) -> NDArray[np.void]:
    """Simple extents that mean the same as `strips` (rows of EXTENT) do for a file of `size` bytes.

    Every extent is a whole chunk, the last one too: kernels that accept only simple extents want aligned lengths
    (protocol 6.4). A file of 1 TiB has half a million of them, so they are made as columns.
    """
    chunks = -(-size // chunk_size)
    extents = np.zeros((-(-chunks // len(strips)), len(strips)), EXTENT)
    stripe = np.arange(len(extents), dtype=np.uint64)[:, None]
    extents["device"] = strips["device"]
    extents["offset"] = strips["offset"] + stripe * np.uint64(chunk_size)
    extents["length"] = chunk_size
    return extents.reshape(-1)[:chunks]
