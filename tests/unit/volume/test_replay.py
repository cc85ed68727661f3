# SPDX-License-Identifier: Apache-2.0
"""Replay against a plain reading of the rules: random logs, golden images, and hostile ones by the thousand."""

import itertools
import os
import random
import resource
import struct
import time
import zlib
from collections.abc import Iterator
from stat import S_ISDIR
from uuid import UUID

import pytest

from famfs_server.errors import DeviceFaultError, FamfsError
from famfs_server.omf import layout, log, superblock
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume import namespace as ns
from famfs_server.volume.faults import Fault
from famfs_server.volume.replay import Damage, normalise
from famfs_server.volume.volume import NewFile, Volume
from golden import GoldenImages
from memories import HOST, LOG_LENGTH, ScratchMemory, formatted
from reference import Node, Outcome, clean_path, replay

MIB = 1 << 20
UNIT = layout.ALLOC_UNIT
FIRST = layout.LOG_OFFSET + LOG_LENGTH
HOSTILE_CASES = 100_000 if os.environ.get("FAMFS_TEST_LONG") else 10_000
HOSTILE_BASES = ("11-bad-entries", "02-tree", "03-interleaved", "09-add-daxdev")
SLOW_SECONDS = 2.0
"""Far more than any log of a few entries may take."""
MEMORY_KIB = 300 << 10
"""How much more the process may hold after all hostile images than before, in KiB."""


@pytest.fixture(scope="module")
def memory() -> Iterator[ScratchMemory]:
    memory = ScratchMemory(16 << 30)
    yield memory
    memory.close()


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
    check_space(volume, expected)


def is_node_or_hidden(volume: Volume, index: int) -> bool:
    """Whether an entry is a name or a fault: all are, but devices that were accepted."""
    nodeid = ns.nodeid_of(index)
    return bool(volume.namespace.mode[nodeid] or volume.namespace.fault[nodeid])


def check_space(volume: Volume, expected: Outcome) -> None:
    """Free runs are whole units within the devices that no entry names; everything else of the device is free."""
    space, unit = volume.space, volume.superblock.alloc_unit
    end = layout.LOG_OFFSET + volume.superblock.log_length
    for device, size in enumerate(expected.devices):
        lowest = end if device == 0 else 0
        runs = list(space.free_runs(device))
        for start, stop in runs:
            assert lowest <= start < stop <= size
            assert start % unit == 0
            assert stop % unit == 0
        assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))
        named = [(o, min(o + n, size)) for d, o, n in expected.named if d == device and o < size and n]
        for first, last in named:
            # Nothing is ever allocated elsewhere than on the first device.
            if device == 0 and first >= lowest:
                assert not any(start < last and first < stop for start, stop in runs), (first, last, runs)
        # Nothing is lost: a gap between free runs is named by somebody.
        at = lowest
        for start, stop in [*runs, (size // unit * unit, 0)]:
            for place in range(at, start, max(unit, (start - at) // unit // 64 * unit)) if start > at else ():
                assert any(first // unit * unit <= place < last + unit for first, last in named), hex(place)
            at = stop


# -- random logs --------------------------------------------------------------------------------

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


def test_random_logs(memory: ScratchMemory, rng: random.Random) -> None:
    seen: set[Fault] = set()
    for _ in range(400):
        entries = random_log(rng, rng.choice((3, 20, 80)))
        store_log(memory, entries)
        volume = Volume(memory, HOST, "memory")
        seen |= set(volume.namespace.faults())
        check_agreement(volume, memory)
        volume.close()
    every = set(Fault) - {
        Fault.NONE,
        Fault.UNKNOWN_TYPE,
        Fault.UNTERMINATED_PATH,
        Fault.UNKNOWN_EXTENT_TYPE,
        Fault.EXTENT_COUNT,
    }
    assert seen >= every


def test_following_the_log_shows_the_same_as_starting_anew(memory: ScratchMemory, rng: random.Random) -> None:
    for _ in range(150):
        entries = random_log(rng, 60)
        store_log(memory, [])
        volume = Volume(memory, None, "memory")
        at = 0
        while at < len(entries):
            step = rng.choice((1, 2, 7, 30))
            memory.write(layout.entry_offset(at), b"".join(entries[at : at + step]))
            at = min(at + step, len(entries))
            memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, struct.pack("<QQ", at, at))
            volume.refresh()
        check_agreement(volume, memory)
        volume.close()


def test_what_is_created_is_what_is_replayed(memory: ScratchMemory, rng: random.Random) -> None:
    for _ in range(60):
        # Upon a log that holds all kinds of damage.
        entries = random_log(rng, 40)
        store_log(memory, entries)
        volume = Volume(memory, HOST, "memory")
        before = set(shown(volume))
        made = []
        for number in range(10):
            path = b"new%d" % number
            made.append(path)
            if rng.random() < 0.3:
                volume.mkdir(path, 0o700, 5, 6)
            else:
                volume.create(NewFile(path, rng.choice((1, UNIT, 5 * UNIT + 1)), 0o600, 5, 6))
        now = shown(volume)
        assert set(now) == before | set(made)
        volume.close()
        again = Volume(memory, HOST, "memory")
        assert shown(again) == now
        check_agreement(again, memory)
        again.close()


@pytest.mark.parametrize(
    "case", [b"a", b"a/b", b"./a", b"a/./b", b"a/../b", b"a/b/../../c", b"a//b", b"a/", b"..a", b"a..", b".metax"]
)
def test_paths_inside(case: bytes) -> None:
    path, fault = normalise(case)
    assert fault is Fault.NONE
    assert path == clean_path(case.ljust(80, b"\0"))


@pytest.mark.parametrize(
    "case",
    [
        b"",
        b".",
        b"/",
        b"/a",
        b"..",
        b"../a",
        b"a/../..",
        b"a/../../b",
        b".meta",
        b".meta/a",
        b"./.meta",
        b"a/../.meta/b",
    ],
)
def test_paths_that_cannot_be_shown(case: bytes) -> None:
    assert normalise(case)[1] is not Fault.NONE
    assert clean_path(case.ljust(80, b"\0")) is None


# -- golden images ------------------------------------------------------------------------------


def load(memory: ScratchMemory, vectors: GoldenImages, name: str) -> None:
    memory.view[: FIRST + MIB] = bytes(FIRST + MIB)
    memory.write(0, vectors.piece(name, "sb"))
    memory.write(layout.LOG_OFFSET, vectors.piece(name, "log"))


def test_golden_images(memory: ScratchMemory, vectors: GoldenImages, golden_name: str) -> None:
    load(memory, vectors, golden_name)
    facts = vectors.facts(golden_name)
    if facts["superblock"]["expect_check_super_rc"] or facts["log_header"]["expect_validate_rc"]:
        with pytest.raises(FamfsError):
            Volume(memory, HOST, "memory")
        return
    volume = Volume(memory, HOST, "memory")
    check_agreement(volume, memory)
    bad = [entry["index"] for entry in facts["entries"] if entry["expect_validate_errors"]]
    if bad:
        assert volume.stop is not None
        last = bad[0] == len(facts["entries"]) - 1
        assert (volume.stop.index, volume.stop.damage) == (bad[0], Damage.TORN if last else Damage.CORRUPT)
    volume.close()


def test_bad_entries_image_shows_four_names(memory: ScratchMemory, vectors: GoldenImages) -> None:
    load(memory, vectors, "11-bad-entries")
    volume = Volume(memory, HOST, "memory")
    assert list(shown(volume)) == [b"okdir", b"okfile", b"dotdot_inside", b"last_good"]
    assert sum(map(len, volume.namespace.faults().values())) == 16
    volume.close()


# -- hostile images -----------------------------------------------------------------------------

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


@pytest.mark.timeout(900 if os.environ.get("FAMFS_TEST_LONG") else 120)
def test_hostile_images(memory: ScratchMemory, vectors: GoldenImages, rng: random.Random) -> None:
    mutators = []
    for name in HOSTILE_BASES:
        entries = len(vectors.facts(name)["entries"])
        mutators.append(Mutator(rng, vectors.piece(name, "sb"), vectors.piece(name, "log"), entries))
    memory.view[: FIRST + MIB] = bytes(FIRST + MIB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = refused = 0
    for number in range(HOSTILE_CASES):
        sb, data = rng.choice(mutators).next()
        memory.view[: len(sb)] = sb
        memory.view[layout.LOG_OFFSET : layout.LOG_OFFSET + len(data)] = data
        # What a longer image left behind would make the case impossible to repeat.
        memory.view[layout.LOG_OFFSET + len(data) : layout.LOG_OFFSET + 32 * 1024] = bytes(32 * 1024 - len(data))
        started = time.monotonic()
        try:
            volume = Volume(memory, HOST, "memory")
        except FamfsError:
            refused += 1
        else:
            opened += 1
            check_hostile(volume, memory)
            volume.close()
        assert time.monotonic() - started < SLOW_SECONDS, f"case {number}"
    print(f"{HOSTILE_CASES} cases, {opened} of them could be opened")
    assert opened > HOSTILE_CASES // 3
    assert refused > HOSTILE_CASES // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


def check_hostile(volume: Volume, memory: ScratchMemory) -> None:
    """Every file that is shown lies in its extents, they lie in the devices, and no two of them meet."""
    check_agreement(volume, memory)
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
