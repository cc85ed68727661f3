# SPDX-License-Identifier: Apache-2.0
"""Volumes to serve: random ones and golden ones, with a record of where each file's bytes are.

The record of a random volume is made before the volume and not read from it. Bytes are marked where maps have corners:
every mark is its own place on the device, so that a read from anywhere else cannot pass.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from uuid import UUID

import numpy as np

import golden
from famfs_server.dax.device import DaxDevice
from famfs_server.omf import append, layout, log
from famfs_server.omf.log import Fmap
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from tests.twin.maps import PMD, Dialect, Extent, Map, Striped

MASTER = UUID(golden.SYSTEM_UUID)
OTHER_DEVICE = UUID("ca8aca8a-0000-4000-8000-000000000001")
LOG_LENGTH = layout.MIN_LOG_LENGTH
MAX_READS = 40
MAX_CORNERS = 1000
MASK = (1 << 64) - 1
_MARK = Struct("<QQ")


@dataclass(frozen=True)
class File:
    """A file of a volume, by the record."""

    path: bytes
    map: Map

    @property
    def size(self) -> int:
        """In bytes."""
        return self.map.size

    @property
    def attached(self) -> bool:
        """Whether it lies on the one device that is there."""
        return all(extent.device == 0 for extent in self.map.ranges())

    def mappable(self, dialect: Dialect) -> bool:
        """Whether a kernel of that dialect can be told where the file is."""
        unit = layout.READABLE_ALLOC_UNITS[0] if dialect is Dialect.PUSH_INTERLEAVE else PMD
        pieces = [piece for extent in self.map.extents for piece in (extent.offset, extent.length)]
        pieces += [extent.offset for group in self.map.striped for extent in group.strips]
        pieces += [group.chunk for group in self.map.striped]
        return self.attached and not any(piece % unit for piece in pieces)

    def corners(self) -> list[int]:
        """The offsets at which the device offset jumps, the first and the last one; not all of a huge file's."""
        every = sorted(set(self.map.boundaries()))
        return [*every[: -1 : -(-len(every) // MAX_CORNERS)], every[-1]]

    def reads(self, rng: random.Random) -> list[tuple[int, int]]:
        """Ranges to read: across the corners of the map, at the end and behind it, and some at random."""
        corners = self.corners()
        chosen = [corners[0], corners[-1], *rng.sample(corners, min(len(corners), MAX_READS))]
        found = [(max(corner - 3, 0), 6) for corner in chosen]
        found += [(self.size, 10), (self.size + PMD, 10), (self.size - 1, 1), (0, min(self.size, 5000))]
        found += [(rng.randrange(self.size), rng.choice((1, 100, 70_000))) for _ in range(4)]
        return found


@dataclass(frozen=True)
class Tree:
    """A volume on an image, and its files by path. `host` is the UUID of its master."""

    image: Path
    files: dict[bytes, File]
    metadata_end: int
    host: UUID


def to_map(size: int, fmap: Fmap) -> Map:
    """What the log says of a file, as a kernel would see it."""
    extents = tuple(Extent(extent.device, extent.offset, extent.length) for extent in fmap.extents)
    if fmap.chunk_size:
        return Map(size, (), (Striped(fmap.chunk_size, size, extents),))
    return Map(size, extents, ())


def of_volume(image: Path, host: UUID = MASTER) -> Tree:
    """The tree of an image that somebody else made. Raises MediaError."""
    with DaxDevice.open(str(image)) as device:
        volume = Volume(device.memory(), host, str(image))
        tree = volume.namespace
        files = {
            tree.path(node): File(tree.path(node), to_map(tree.size[node], tree.fmap(node)))
            for node in tree.walk()
            if not tree.is_directory(node)
        }
        found = Tree(image, files, layout.LOG_OFFSET + volume.superblock.log_length, host)
        for file in files.values():
            mark(image, file)
        volume.close()
    return found


def mark(image: Path, file: File) -> None:
    """Write marks around the corners of a file's map; by write(2), which touches less than a fault does."""
    with image.open("r+b", buffering=0) as device:
        for corner in file.corners():
            for offset in (corner - _MARK.size, corner):
                if 0 <= offset < file.size:
                    place = file.map.resolve(offset, 1)
                    if place.device == 0:
                        os.pwrite(device.fileno(), _MARK.pack(place.offset, MASK - place.offset), place.offset)


def empty(image: Path, size: int, unit: int = PMD) -> DaxDevice:
    """A device of `size` bytes with a file system without files, allocated in units of `unit`."""
    with image.open("wb") as file:
        file.truncate(size)
    device = DaxDevice.open(str(image))
    memory = device.memory()
    make_filesystem(memory, str(image), MASTER, log_length=LOG_LENGTH)
    if unit != layout.ALLOC_UNIT:
        record = np.frombuffer(bytearray(memory.read(0, layout.SUPERBLOCK.itemsize)), layout.SUPERBLOCK, count=1)
        record[0]["ts_alloc_unit"] = unit
        record[0]["ts_crc"] = layout.crc(record.tobytes()[: layout.SUPERBLOCK_CRC_SPAN])
        memory.write(0, record.tobytes())
    return device


def random_tree(rng: random.Random, image: Path) -> Tree:
    """A volume with some 20 files, made by the allocator or, more wildly, entry by entry."""
    return _grown(rng, image) if rng.random() < 0.4 else _written(rng, image)


def _names(rng: random.Random) -> Iterator[bytes]:
    while True:
        yield rng.choice(("f", "a b", "ü", ".hid", "x" * 20)).encode() + str(rng.randrange(10**6)).encode()


def _size(rng: random.Random, unit: int, most: int) -> int:
    return max(1, rng.randrange(1, most + 1) * unit - rng.choice((0, 0, 1, unit - 1, rng.randrange(unit))))


def _grown(rng: random.Random, image: Path) -> Tree:
    """By Volume.create_many, with the allocator's own striping."""
    device = empty(image, rng.choice((8, 17, 32)) << 30)
    volume = Volume(device.memory(), MASTER, str(image))
    names = _names(rng)
    directories = [b""]
    for _ in range(rng.randrange(4)):
        parent = rng.choice(directories)
        if len(parent) < 20:
            directories.append((parent + b"/" + next(names)).strip(b"/"))
            volume.mkdir(directories[-1], 0o755, 0, 0)
    new = []
    for _ in range(rng.randrange(1, 25)):
        buckets = rng.randrange(1, min(volume.superblock.device_size >> 30, 16) + 1)
        striping = Interleave(buckets, rng.randrange(1, buckets + 1), PMD << rng.randrange(3))
        path = (rng.choice(directories) + b"/" + next(names)).strip(b"/")
        new.append(NewFile(path, _size(rng, PMD, 40), 0o644, 0, 0, striping if rng.random() < 0.5 else None))
    volume.create_many(list({file.path: file for file in new}.values()))
    volume.close()
    device.close()
    return of_volume(image)


def _written(rng: random.Random, image: Path) -> Tree:
    """Entry by entry, with maps that no allocator makes: many extents in any order, strips anywhere, tiny units."""
    unit = rng.choice((PMD, PMD, PMD, 4096))
    device = empty(image, 8 << 30, unit)
    memory = device.memory()
    names = _names(rng)
    entries = [log.build_mkdir(0, b"d", mode=0o755, uid=0, gid=0)]
    with_device = rng.random() < 0.3
    if with_device:
        entries.append(log.build_add_daxdev(1, device=1, size=8 << 30, uuid=OTHER_DEVICE))
    free = list(range(layout.LOG_OFFSET + LOG_LENGTH, 7 << 30, 16 * PMD))
    rng.shuffle(free)
    files: dict[bytes, File] = {}

    def extent(length: int, place: int) -> log.Extent:
        at = free.pop() + rng.randrange((16 * PMD - length) // unit + 1) * unit
        return log.Extent(place, at, length)

    for _ in range(rng.randrange(1, 12)):
        place = 1 if with_device and rng.random() < 0.2 else 0
        path = rng.choice((b"", b"d/")) + next(names)
        count = rng.choice((1, 2, 3, rng.randrange(1, layout.MAX_STRIPS + 1)))
        if rng.random() < 0.5:
            chunk = rng.choice((unit, PMD)) << rng.randrange(4)
            stripes = rng.randrange(1, 16 * PMD // chunk + 1) if chunk >= PMD else rng.randrange(1, 9)
            size = _size(rng, chunk, stripes * count)
            fmap = Fmap(tuple(extent(stripes * chunk, place) for _ in range(count)), chunk)
        else:
            fmap = Fmap(tuple(extent(rng.randrange(1, 5) * rng.choice((unit, PMD)), place) for _ in range(count)))
            total = sum(part.length for part in fmap.extents)
            # Extents behind the end of a file are legal, too.
            size = rng.choice((total, total - rng.randrange(unit), rng.randrange(1, total + 1)))
        if path not in files:
            entries.append(log.build_file(len(entries), path, size=size, mode=0o644, uid=0, gid=0, fmap=fmap))
            files[path] = File(path, to_map(size, fmap))
    append.append(memory, 0, b"".join(entries))
    for file in files.values():
        mark(image, file)
    device.close()
    return Tree(image, files, layout.LOG_OFFSET + LOG_LENGTH, MASTER)
