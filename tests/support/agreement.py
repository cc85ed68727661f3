# SPDX-License-Identifier: Apache-2.0
"""What a volume must have in common with a plain reading of its log, whatever the log holds."""

import itertools
import struct
from stat import S_ISDIR

from famfs_server.errors import DeviceFaultError
from famfs_server.omf import layout, superblock
from famfs_server.volume import namespace as ns
from famfs_server.volume.volume import Volume
from memories import ScratchMemory
from reference import Node, Outcome, replay


def shown(volume: Volume) -> dict[bytes, Node]:
    """What a volume shows, in the words of the reference."""
    tree = volume.namespace
    found: dict[bytes, Node] = {}
    for nodeid in tree.walk():
        kind = "directory" if S_ISDIR(tree.mode[nodeid]) else "file"
        fmap = tree.fmap(nodeid)
        extents = tuple((extent.device, extent.offset, extent.length) for extent in fmap.extents)
        found[tree.path(nodeid)] = (
            kind,
            tree.mode[nodeid] & 0o7777,
            tree.uid[nodeid],
            tree.gid[nodeid],
            tree.size[nodeid],
            extents,
            fmap.chunk_size,
        )
    return found


def plainly(memory: ScratchMemory) -> Outcome:
    """What the log in memory shows by the plain reading."""
    found = superblock.decode(memory.read(0, layout.SUPERBLOCK.itemsize))
    (count,) = struct.unpack("<Q", memory.read(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, 8))
    data = memory.read(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE + count * layout.LOG_ENTRY_SIZE)
    return replay(data, device_size=found.device_size, log_length=found.log_length, unit=found.alloc_unit)


def check_agreement(volume: Volume, memory: ScratchMemory) -> None:
    """The volume shows what the plain reading shows, reaches each name, and never hands out what an entry names."""
    check_space(volume, check_names(volume, memory))


def check_names(volume: Volume, memory: ScratchMemory) -> Outcome:
    """The volume shows what the plain reading shows, and reaches each name; the reading."""
    expected = plainly(memory)
    assert shown(volume) == expected.nodes
    tree = volume.namespace
    assert tree.replayed == expected.entries
    for path in expected.nodes:
        assert tree.path(tree.resolve(path)) == path
    visible = {tree.parent[tree.resolve(path)] for path in expected.nodes} | {ns.ROOT}
    listed = [child for folder in visible for child in tree.children(folder) if child >= ns.FIRST_NODEID]
    assert sorted(listed) == sorted(tree.walk())
    hidden = [index for indexes in tree.faults().values() for index in indexes]
    assert sorted(hidden + [ns.index_of(n) for n in tree.walk()]) == [
        index for index in range(expected.entries) if is_node_or_hidden(volume, index)
    ]
    return expected


def is_node_or_hidden(volume: Volume, index: int) -> bool:
    """Whether an entry is a name or a fault: all are, but devices that were accepted."""
    nodeid = ns.nodeid_of(index)
    return bool(volume.namespace.mode[nodeid] or volume.namespace.fault[nodeid])


def check_space(volume: Volume, expected: Outcome) -> None:
    """Free runs are whole units within the devices that no entry names; everything else of the device is free."""
    space, unit = volume.space, volume.superblock.alloc_unit
    end = layout.LOG_OFFSET + volume.superblock.log_length
    for device, size in enumerate(expected.devices):
        lowest = end if device == 0 else layout.SUPERBLOCK_REGION
        runs = list(space.free_runs(device))
        for start, stop in runs:
            assert lowest <= start < stop <= size
            assert start % unit == 0
            assert stop % unit == 0
        assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))
        named = [(o, min(o + n, size)) for d, o, n in expected.named if d == device and o < size and n]
        for first, last in named:
            if first >= lowest:
                assert not any(start < last and first < stop for start, stop in runs), (first, last, runs)
        # Nothing is lost: a gap between free runs is named by somebody.
        at = lowest
        for start, stop in [*runs, (size // unit * unit, 0)]:
            for place in range(at, start, max(unit, (start - at) // unit // 64 * unit)) if start > at else ():
                assert any(first // unit * unit <= place < last + unit for first, last in named), hex(place)
            at = stop


def check_hostile(volume: Volume, memory: ScratchMemory) -> None:
    """What the volume shows is right, and safe to be served."""
    check_agreement(volume, memory)
    check_places(volume, memory)


def check_places(volume: Volume, memory: ScratchMemory) -> None:
    """Every file that is shown lies in its extents, they lie in the devices, and no two of them meet."""
    tree = volume.namespace
    end = layout.LOG_OFFSET + volume.superblock.log_length
    places: list[tuple[int, int, int]] = []
    for nodeid in tree.walk():
        fmap = tree.fmap(nodeid)
        if tree.is_directory(nodeid):
            assert not fmap.extents
            continue
        for extent in fmap.extents:
            assert extent.device < len(volume.space.sizes)
            assert extent.offset >= (end if extent.device == 0 else 0)
            assert extent.offset + extent.length <= volume.space.sizes[extent.device]
            places.append((extent.device, extent.offset, extent.offset + extent.length))
        size = tree.size[nodeid]
        for offset in (0, size // 2, size - 1):
            try:
                assert sum(map(len, volume.views(nodeid, offset, 4096))) == min(4096, size - offset)
            except DeviceFaultError:
                assert len(volume.space.sizes) > 1 or volume.superblock.device_size > memory.size
    places.sort()
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(places))
