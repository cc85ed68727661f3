# SPDX-License-Identifier: Apache-2.0
"""Extent maps as famfs kernels take them: parsed, refused and resolved by the kernel's own rules and arithmetic.

Written from docs/protocol.md 2.2 and 6.4 alone. Nothing here comes from the server, so that both can only be wrong
together if the document is.
"""

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from struct import Struct

MIB = 1 << 20
PMD = 2 * MIB
PAGE = 4096
MAX_LFS = (1 << 63) - 1
U64 = 1 << 64

HEADER = Struct("<BBHIIIQQ")
"""file_type, reserved, version, ext_type, nextents, fmap_size, file_size, reserved"""
EXTENT = Struct("<IIQQ")
"""devindex, reserved, offset, len"""
STRIPED = Struct("<IIQQ")
"""nstrips, chunk_size, nbytes, reserved"""
SIMPLE, INTERLEAVE = 0, 1


class Dialect(Enum):
    """The generations that a kernel may be; the value is what `-o dialect=` calls it."""

    PULL = "pull"
    PUSH = "push"
    PUSH_INTERLEAVE = "push-interleave"


class TwinViolation(AssertionError):  # noqa: N818 - it is the verdict, not an error of the twin's
    """The server broke a rule of the protocol, or did what hangs or crashes a real kernel."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes on the device with that index."""

    device: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Striped:
    """An interleaved extent: strips that take turns in chunks."""

    chunk: int
    nbytes: int
    strips: tuple[Extent, ...]


class Map:
    """A map that a kernel has accepted."""

    def __init__(self, size: int, extents: tuple[Extent, ...], striped: tuple[Striped, ...]) -> None:
        self.size = size
        self.extents = extents
        self.striped = striped
        self._starts = [0, *accumulate(extent.length for extent in extents)]

    def ranges(self) -> Iterator[Extent]:
        """Every device range that the map names."""
        yield from self.extents
        for group in self.striped:
            yield from group.strips

    def boundaries(self) -> Iterator[int]:
        """The file offsets at which the device offset jumps, 0 and the size included."""
        yield from (start for start in self._starts if start < self.size)
        for group in self.striped:
            yield from range(0, self.size, group.chunk)
        yield self.size

    def resolve(self, offset: int, length: int) -> Extent:
        """The longest device range from `offset` on, below the file's size; OSError EIO behind the last extent."""
        if not self.striped:
            return self._walk(offset, length)
        local = offset
        for group in self.striped:
            served = min(group.nbytes, self.size)
            if local >= served:
                local -= served
                continue
            chunk, inside = divmod(local, group.chunk)
            stripe, number = divmod(chunk, len(group.strips))
            strip = group.strips[number]
            start = stripe * group.chunk + inside
            count = min(length, group.chunk - inside)
            if start + count > strip.length:
                raise TwinViolation(f"offset {offset} lies {start} bytes into a strip of {strip.length}")
            return Extent(strip.device, strip.offset + start, count)
        raise OSError(errno.EIO, "behind the last extent")

    def _walk(self, offset: int, length: int) -> Extent:
        number = bisect_right(self._starts, offset) - 1
        if number == len(self.extents):
            raise OSError(errno.EIO, "behind the last extent")
        extent, local = self.extents[number], offset - self._starts[number]
        return Extent(extent.device, extent.offset + local, min(length, extent.length - local))


def refuse(number: int, reason: str) -> OSError:
    """The error that open(2) ends with."""
    return OSError(number, f"{os.strerror(number)} ({reason})")


def parse(dialect: Dialect, data: bytes) -> Map:
    """The map in the payload of a GET_FMAP reply; OSError as a kernel of that dialect refuses it (protocol 2.2)."""
    match dialect:
        case Dialect.PULL:
            return _parse_pull(data)
        case Dialect.PUSH:
            return _parse_push(data)
        case Dialect.PUSH_INTERLEAVE:
            return _parse_push_interleave(data)


def _extents(data: bytes, at: int, count: int) -> tuple[Extent, ...]:
    if at + count * EXTENT.size > len(data):
        raise refuse(errno.EINVAL, f"{count} extents at {at} leave the reply of {len(data)} bytes")
    rows = EXTENT.iter_unpack(data[at : at + count * EXTENT.size])
    return tuple(Extent(device, offset, length) for device, _, offset, length in rows)


def _groups(data: bytes, count: int) -> Iterator[tuple[int, int, int, int]]:
    """The headers of interleaved extents as (number of strips, chunk, nbytes, where the strips begin)."""
    at = HEADER.size
    for _ in range(count):
        if at + STRIPED.size > len(data):
            raise refuse(errno.EINVAL, "the header of an interleaved extent leaves the reply")
        strips, chunk, nbytes, _ = STRIPED.unpack_from(data, at)
        yield strips, chunk, nbytes, at + STRIPED.size
        at += STRIPED.size + strips * EXTENT.size


def _misplaced(extent: Extent, alignment: int, devices: int) -> bool:
    return extent.device >= devices or bool(extent.offset % alignment or extent.length % alignment)


def _parse_pull(data: bytes) -> Map:
    if len(data) < HEADER.size:
        raise refuse(errno.EINVAL, "shorter than its header")
    *_, kind, count, _, size, _ = HEADER.unpack_from(data)
    if not 1 <= count <= 32:
        raise refuse(errno.ERANGE, f"{count} extents")
    extents: tuple[Extent, ...] = ()
    groups: list[Striped] = []
    wrong = 0
    if kind == SIMPLE:
        extents = _extents(data, HEADER.size, count)
    elif kind == INTERLEAVE:
        for strips, chunk, nbytes, at in _groups(data, count):
            if chunk % PMD or not nbytes:
                raise refuse(errno.EINVAL, f"chunks of {chunk}, {nbytes} bytes")
            if chunk == 0:
                raise TwinViolation("a chunk size of 0, by which this kernel divides")
            groups.append(Striped(chunk, nbytes, _extents(data, at, strips)))
            wrong += not 1 <= strips <= 32
    else:
        raise refuse(errno.EINVAL, f"extents of kind {kind}")
    found = Map(size, extents, tuple(groups))
    wrong += sum(_misplaced(extent, PMD, 1) for extent in found.ranges())
    if wrong:
        raise refuse(errno.EINVAL, f"{wrong} bad extents")
    if sum(extent.length for extent in found.ranges()) < size:
        raise refuse(errno.EINVAL, "shorter than the file")
    return found


def _parse_push(data: bytes) -> Map:
    if len(data) < HEADER.size:
        raise refuse(errno.EIO, "shorter than its header")
    *_, kind, count, _, size, _ = HEADER.unpack_from(data)
    if not count:
        raise refuse(errno.ERANGE, "no extents")
    if kind != SIMPLE:
        raise refuse(errno.EINVAL, f"extents of kind {kind}")
    extents = _extents(data, HEADER.size, count)
    if any(_misplaced(extent, PMD, 1) for extent in extents):
        raise refuse(errno.EINVAL, "an extent is not aligned to 2 MiB, or not on device 0")
    if sum(extent.length for extent in extents) < size:
        raise refuse(errno.EINVAL, "shorter than the file")
    return Map(size, extents, ())


def _parse_push_interleave(data: bytes) -> Map:
    if len(data) < HEADER.size:
        raise refuse(errno.EIO, "shorter than its header")
    *_, kind, count, _, size, _ = HEADER.unpack_from(data)
    if not count:
        raise refuse(errno.ERANGE, "no extents")
    if size > MAX_LFS:
        raise refuse(errno.EINVAL, f"a file of {size} bytes")
    extents: tuple[Extent, ...] = ()
    groups: list[Striped] = []
    if kind == SIMPLE:
        extents = _extents(data, HEADER.size, count)
    elif kind == INTERLEAVE:
        for strips, chunk, nbytes, at in _groups(data, count):
            if chunk not in (PAGE, PMD) or not 0 < nbytes <= MAX_LFS or not 1 <= strips <= 32:
                raise refuse(errno.EINVAL, f"{strips} strips, chunks of {chunk}, {nbytes} bytes")
            group = Striped(chunk, nbytes, _extents(data, at, strips))
            _check_last_chunks(group)
            groups.append(group)
        if sum(group.nbytes for group in groups) < size:
            raise refuse(errno.EINVAL, "shorter than the file")
    else:
        raise refuse(errno.EINVAL, f"extents of kind {kind}")
    found = Map(size, extents, tuple(groups))
    total = 0
    for extent in found.ranges():
        total += extent.length
        if _misplaced(extent, PAGE, 64) or extent.offset + extent.length >= U64 or total >= U64:
            raise refuse(errno.EINVAL, f"{extent} is misaligned, on no device or too long")
    if total < size:
        raise refuse(errno.EINVAL, "shorter than the file")
    return found


def _check_last_chunks(group: Striped) -> None:
    """Refuse strips that end before the last byte that falls to them."""
    count = len(group.strips)
    chunks = -(-group.nbytes // group.chunk)
    for chunk in range(max(chunks - count, 0), chunks):
        used = min(group.chunk, group.nbytes - chunk * group.chunk)
        if chunk // count * group.chunk + used > group.strips[chunk % count].length:
            raise refuse(errno.EINVAL, f"strip {chunk % count} ends before chunk {chunk}")


def check_served(data: bytes, found: Map) -> None:
    """What no kernel checks and every map of the server's must hold: TwinViolation where it does not."""
    file_type, zero, version, kind, count, fmap_size, size, reserved = HEADER.unpack_from(data)
    if (file_type, zero, version, reserved) != (0, 0, 1, 0):
        raise TwinViolation(f"a map with type {file_type}, version {version}, reserved {zero} and {reserved}")
    if fmap_size != len(data):
        raise TwinViolation(f"fmap_size is {fmap_size}, the map has {len(data)} bytes")
    groups = list(_groups(data, count)) if kind == INTERLEAVE else []
    if any(STRIPED.unpack_from(data, at - STRIPED.size)[3] for *_, at in groups):
        raise TwinViolation("the reserved field of an interleaved extent is not 0")
    tables = [(at, strips) for strips, _, _, at in groups] if groups else [(HEADER.size, count)]
    if any(EXTENT.unpack_from(data, at + row * EXTENT.size)[1] for at, rows in tables for row in range(rows)):
        raise TwinViolation("the reserved field of an extent is not 0")
    if any(extent.length == 0 for extent in found.ranges()):
        raise TwinViolation("an extent of length 0")
    if found.striped and sum(group.nbytes for group in found.striped) != size:
        raise TwinViolation("the interleaved extents do not add up to the file, and the first one serves too much")
    for group in found.striped:
        _check_strips(group)


def _check_strips(group: Striped) -> None:
    try:
        _check_last_chunks(group)
    except OSError as error:
        raise TwinViolation(f"a pull kernel would read behind a strip: {error}") from error
