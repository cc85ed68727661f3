# SPDX-License-Identifier: Apache-2.0
"""Logs and images that nobody would write: random entries with right checksums, and images damaged on purpose."""

import random
import struct
import zlib
from uuid import UUID

from famfs_server.omf import layout, log
from famfs_server.omf.log import Extent, Fmap
from memories import LOG_LENGTH, ScratchMemory, formatted

MIB = 1 << 20
UNIT = layout.ALLOC_UNIT
FIRST = layout.LOG_OFFSET + LOG_LENGTH

NAMES = (
    b"a",
    b"b",
    b"c",
    b"a/a",
    b"a/b",
    b"b/a",
    b"a/a/a",
    b"./a",
    b"a/../b",
    b"a//c",
    b"b/",
    b"..",
    b"",
    b"/a",
    b".meta/x",
)


def random_fmap(rng: random.Random, devices: int) -> Fmap:
    """Extents that are right most of the time, in a small part of the device so that they meet."""

    def place() -> Extent:
        offset = FIRST + rng.randrange(60) * UNIT
        length = rng.choice((1, 1, 1, 2, 3)) * UNIT
        roll = rng.random()
        if roll < 0.02:
            offset += 4096
        elif roll < 0.03:
            offset = rng.randrange(FIRST // UNIT) * UNIT
        elif roll < 0.04:
            offset = (16 << 30) - UNIT
        elif roll < 0.05:
            length += 4096
        return Extent(rng.choice((0,) * 12 + tuple(range(devices + 1))), offset, length)

    if rng.random() < 0.3:
        strips = rng.choice((1, 2, 3, 4))
        return Fmap(tuple(place() for _ in range(strips)), rng.choice((UNIT, UNIT, 2 * UNIT, 3 * UNIT, 4096)))
    return Fmap(tuple(place() for _ in range(rng.choice((1, 1, 1, 2, 3)))))


def random_log(rng: random.Random, count: int) -> list[bytes]:
    entries = []
    devices = 1
    for index in range(count):
        path = rng.choice(NAMES) if rng.random() < 0.7 else b"%s/n%d" % (rng.choice(NAMES[:3]), index)
        stand_in = b"x" * max(len(path), 1)
        roll = rng.random()
        if roll < 0.4:
            entry = log.build_mkdir(index, stand_in, mode=rng.randrange(0o10000), uid=index, gid=7)
        elif roll < 0.45:
            size = rng.choice((1 << 30, 16 << 30))
            uuid = UUID(int=rng.randrange(4))
            entry = log.build_add_daxdev(index, device=rng.choice((devices, devices, 0, 9)), size=size, uuid=uuid)
            devices += 1
        else:
            fmap = random_fmap(rng, devices)
            size = rng.choice((1, UNIT - 1, UNIT, UNIT + 1, 3 * UNIT, 9 * UNIT, 0))
            entry = log.build_file(index, stand_in, size=size, mode=0o644, uid=1, gid=2, fmap=fmap)
        entries.append(resealed(entry.replace(stand_in + b"\0", path.ljust(len(stand_in), b"\0") + b"\0", 1)))
    return entries


def resealed(entry: bytes) -> bytes:
    """The entry with a right checksum."""
    return entry[:536] + zlib.crc32(entry[:536]).to_bytes(8, "little")


def store_log(memory: ScratchMemory, entries: list[bytes]) -> None:
    memory.view[: 3 * MIB] = bytes(3 * MIB)
    formatted(memory)
    memory.write(layout.entry_offset(0), b"".join(entries))
    memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, struct.pack("<QQ", len(entries), len(entries)))


INTERESTING = (
    0,
    1,
    2,
    15,
    16,
    17,
    63,
    64,
    4095,
    4096,
    UNIT - 1,
    UNIT,
    FIRST,
    (4 << 30) - UNIT,
    4 << 30,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    2**64 - UNIT,
    2**64 - 1,
)


class Mutator:
    """Damages an image: bits flipped anywhere, or fields set to values that invite mistakes; checksums made right again
    or not."""

    def __init__(self, rng: random.Random, superblock_bytes: bytes, log_bytes: bytes, entries: int) -> None:
        self._rng = rng
        self._superblock = superblock_bytes
        self._log = log_bytes[: layout.LOG_HEADER_SIZE + entries * layout.LOG_ENTRY_SIZE]
        self._entries = entries

    def next(self) -> tuple[bytes, bytes]:
        """Superblock and log of another case."""
        rng = self._rng
        sb, data = bytearray(self._superblock), bytearray(self._log)
        where = rng.random()
        if where < 0.15:
            self._damage(sb, 0, layout.SUPERBLOCK.itemsize)
            if rng.random() < 0.8:
                sb[96:104] = zlib.crc32(sb[:96]).to_bytes(8, "little")
        elif where < 0.3:
            self._damage(data, 0, layout.LOG_HEADER_SIZE)
            if rng.random() < 0.8:
                data[24:32] = zlib.crc32(data[:24]).to_bytes(8, "little")
        else:
            for _ in range(rng.choice((1, 1, 2, 5, 20))):
                at = layout.LOG_HEADER_SIZE + rng.randrange(self._entries) * layout.LOG_ENTRY_SIZE
                self._damage(data, at, layout.LOG_ENTRY_SIZE)
                if rng.random() < 0.9:
                    data[at + 536 : at + 544] = zlib.crc32(data[at : at + 536]).to_bytes(8, "little")
        return bytes(sb), bytes(data)

    def _damage(self, data: bytearray, start: int, length: int) -> None:
        rng = self._rng
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            if rng.random() < 0.4:
                data[start + rng.randrange(length)] ^= 1 << rng.randrange(8)
                continue
            width = rng.choice((4, 8))
            # Fields lie on 4 bytes; those of an entry's map are the most dangerous ones.
            near = rng.randrange(min(160, length) // 4) if rng.random() < 0.7 else rng.randrange(length // 4)
            at = start + min(near * 4, length - width)
            value = rng.choice(INTERESTING) + rng.choice((0, 0, 0, 1, -1))
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
