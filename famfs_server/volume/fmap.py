# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on extent maps: from a place in a file to places on devices (docs/format.md 6.4, docs/protocol.md 6.4)."""

from collections.abc import Iterator

from famfs_server.omf.log import Extent, Fmap


def runs(fmap: Fmap, offset: int, length: int) -> Iterator[Extent]:
    """The device ranges that hold file bytes [offset, offset + length), in file order, neighbours joined.

    The caller has cut the range to the file's size. Bytes that no extent holds end the sequence early.
    """
    pending: Extent | None = None
    for piece in _pieces(fmap, offset, length):
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


def unroll(fmap: Fmap, size: int) -> tuple[Extent, ...]:
    """Simple extents that mean the same as an interleaved map, every one a whole chunk long.

    The last one stays whole too: kernels that accept only simple extents want aligned lengths (protocol 6.4).
    """
    if not fmap.chunk_size:
        return fmap.extents
    chunk_size, strips = fmap.chunk_size, len(fmap.extents)
    return tuple(
        Extent(
            fmap.extents[chunk % strips].device,
            fmap.extents[chunk % strips].offset + (chunk // strips) * chunk_size,
            chunk_size,
        )
        for chunk in range(-(-size // chunk_size))
    )
