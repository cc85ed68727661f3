# SPDX-License-Identifier: Apache-2.0
"""What lies where on the devices of a file system, as regions: the model behind the pictures of `famfs map`."""

import os
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from famfs_server.omf import layout
from famfs_server.volume import namespace as ns
from famfs_server.volume.volume import Volume


class Kind(Enum):
    """What a region holds: a letter for it, a colour, and words. The order is that of the legend."""

    SUPERBLOCK = ("S", "#1b2a49", "superblock")
    LOG = ("L", "#4a5f8a", "log")
    SMALL = ("f", "#9fd3a8", "files up to 16 MiB")
    MEDIUM = ("m", "#4daf6d", "files up to 1 GiB")
    LARGE = ("F", "#1f7a45", "larger files")
    STRIPED = ("s", "#e8a33d", "striped files")
    FREE = (".", "#e9ecef", "free")
    PROBLEM = ("!", "#d7263d", "claimed by entries that are not shown, or by two")

    def __init__(self, letter: str, colour: str, words: str) -> None:
        self.letter = letter
        self.colour = colour
        self.words = words


KINDS = list(Kind)
_SMALL, _MEDIUM = 16 << 20, 1 << 30
_SHOWN_FIRST = 1e12
"""How much more than its size metadata weighs, and a problem more than metadata."""


@dataclass(frozen=True, slots=True)
class Region:
    """A range of a device, in bytes. `name` is a path, or what metadata is called."""

    device: int
    start: int
    end: int
    kind: Kind
    name: str


@dataclass(frozen=True, slots=True)
class Map:
    """All that is known of the devices of a file system, or of one file."""

    title: str
    sizes: tuple[int, ...]
    regions: tuple[Region, ...]
    rest: str = Kind.FREE.words
    """What there is where no region is."""

    def words(self, kind: Kind) -> str:
        """What the legend says of a kind."""
        return self.rest if kind is Kind.FREE else kind.words

    def totals(self) -> dict[Kind, int]:
        """Bytes of each kind on all devices."""
        found = dict.fromkeys(KINDS, 0)
        for device in range(len(self.sizes)):
            for kind, number in zip(KINDS, self.coverage(device, 1)[0].tolist(), strict=True):
                found[kind] += round(number)
        return found

    def coverage(self, device: int, cells: int) -> NDArray[np.float64]:
        """A row for each of `cells` equal parts of the device: the bytes of each kind in it, in the order of KINDS."""
        size = self.sizes[device]
        width = size / cells
        found = np.zeros((cells, len(KINDS)))
        edges = np.linspace(0, size, cells + 1)
        mine = [region for region in self.regions if region.device == device]
        for kind_index, kind in enumerate(KINDS):
            chosen = [(region.start, min(region.end, size)) for region in mine if region.kind is kind]
            spans = np.array(chosen, np.float64).reshape(-1, 2)
            found[:, kind_index] = np.diff(_bytes_below(spans, edges))
        free = KINDS.index(Kind.FREE)
        found[:, free] = np.maximum(width - found.sum(axis=1), 0)
        return found

    def dominant(self, device: int, cells: int) -> list[Kind]:
        """The kind that each of `cells` equal parts shows: a problem or metadata if there is any, so that they are
        seen on large devices too, else what takes most of it."""
        covered = self.coverage(device, cells)
        covered[:, [KINDS.index(Kind.SUPERBLOCK), KINDS.index(Kind.LOG)]] *= _SHOWN_FIRST
        covered[:, KINDS.index(Kind.PROBLEM)] *= _SHOWN_FIRST**2
        return [KINDS[index] for index in covered.argmax(axis=1).tolist()]


def _bytes_below(spans: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many bytes of the spans lie below each of the ascending edges."""
    starts, ends = np.sort(spans[:, 0]), np.sort(spans[:, 1])
    starts_sum, ends_sum = np.concatenate(([0], starts.cumsum())), np.concatenate(([0], ends.cumsum()))
    begun, over = np.searchsorted(starts, edges), np.searchsorted(ends, edges)
    found: NDArray[np.float64] = edges * (begun - over) - starts_sum[begun] + ends_sum[over]
    return found


def of_volume(volume: Volume, title: str) -> Map:
    """The map of a file system."""
    tree, size = volume.namespace, volume.superblock.device_size
    regions = [
        Region(0, 0, layout.LOG_OFFSET, Kind.SUPERBLOCK, "superblock"),
        Region(0, layout.LOG_OFFSET, volume.log_end, Kind.LOG, "log"),
    ]
    for nodeid in tree.walk():
        if tree.is_directory(nodeid):
            continue
        fmap = tree.fmap(nodeid)
        kind = Kind.STRIPED if fmap.chunk_size else _by_size(tree.size[nodeid])
        name = os.fsdecode(tree.path(nodeid))
        regions += [
            Region(extent.device, extent.offset, extent.offset + extent.length, kind, name) for extent in fmap.extents
        ]
    sizes = tuple(volume.space.sizes)
    for fault, indexes in tree.faults().items():
        for index in indexes:
            for extent in tree.fmap(ns.nodeid_of(index)).extents:
                if extent.device < len(sizes) and extent.offset < sizes[extent.device] and extent.length:
                    end = min(extent.offset + extent.length, sizes[extent.device])
                    name = f"log entry {index}: {fault.meaning}"
                    regions.append(Region(extent.device, extent.offset, end, Kind.PROBLEM, name))
    return Map(title, (size, *sizes[1:]), tuple(sorted(regions, key=_by_place)))


def _by_size(size: int) -> Kind:
    return Kind.SMALL if size <= _SMALL else Kind.MEDIUM if size <= _MEDIUM else Kind.LARGE


def _by_place(region: Region) -> tuple[int, int]:
    return region.device, region.start
