# SPDX-License-Identifier: Apache-2.0
"""fsck finds every kind of fault wherever it is put, raises no alarm over healthy volumes, and mends without loss.

The faults are put into all golden images that are healthy, and into volumes that a random user has filled.
"""

import os
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from uuid import UUID

import pytest

from famfs_server.dax.device import DaxDevice
from famfs_server.errors import LogFullError, MediaError, NoSpaceError, PathError, RoleError
from famfs_server.omf import layout, log
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume import check, repair
from famfs_server.volume.check import Report
from famfs_server.volume.faults import Fault
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.replay import Damage
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import DeviceMemory, NewFile, Volume
from golden import GoldenImages
from memories import HOST, ScratchMemory

GIB, MIB = 1 << 30, 1 << 20
UNIT = layout.ALLOC_UNIT
HEALTHY = 1000 if os.environ.get("FAMFS_TEST_LONG") else 25
DAMAGED = 100 if os.environ.get("FAMFS_TEST_LONG") else 5
GOLDEN = ("01-empty", "02-tree", "03-interleaved", "04-many", "06d-foreign-owner", "08-log-full-synthetic")


@pytest.fixture(scope="module")
def memory() -> Iterator[ScratchMemory]:
    """A device that all random volumes are made on, one after the other."""
    memory = ScratchMemory(4 * GIB)
    yield memory
    memory.close()


def fill(memory: ScratchMemory, rng: random.Random, host: UUID = HOST) -> None:
    """A new file system, with what a random user puts there."""
    make_filesystem(memory, "memory", host, log_length=rng.choice((8, 8, 16, 64)) * MIB)
    volume = Volume(memory, host, "memory")
    folders = [b""]
    for number in range(rng.choice((0, 1, 5, 40))):
        parent = rng.choice(folders)
        name = (parent + b"/" if parent else b"") + b"%s%d" % (rng.choice((b"n", b"\xff", "ü".encode(), b" ")), number)
        try:
            if rng.random() < 0.3:
                volume.mkdir(name, rng.randrange(0o10000), rng.randrange(3), rng.randrange(3))
                folders.append(name)
            else:
                striping = None
                if rng.random() < 0.3:
                    buckets = rng.randint(2, 4)
                    striping = Interleave(buckets, rng.randint(1, buckets), rng.choice((2, 4)) * MIB)
                size = rng.choice((1, 4096, 70_000, rng.randint(1, 9 * MIB)))
                volume.create(NewFile(name, size, rng.randrange(0o10000), 0, 0, striping))
        except (PathError, NoSpaceError, LogFullError):
            continue
    volume.close()


def shown(memory: DeviceMemory) -> dict[bytes, tuple[int, Fmap]]:
    """Every path that the volume shows, with size and place."""
    volume = Volume(memory, HOST, "memory")
    tree = volume.namespace
    found = {
        tree.path(node): (tree.size[node], Fmap(()) if S_ISDIR(tree.mode[node]) else tree.fmap(node))
        for node in tree.walk()
    }
    volume.close()
    return found


def test_no_false_alarm(memory: ScratchMemory, rng: random.Random) -> None:
    for _ in range(HEALTHY):
        fill(memory, rng)
        report = check.examine(memory, "memory", HOST)
        assert report.clean, list(check.render(report))
        assert (report.notes, report.usage.unreachable) == ((), 0)
        assert repair.plan(memory, report, torn=True) is None
        volume = Volume(memory, HOST, "memory")
        figures = volume.statistics()
        volume.close()
        assert (report.free, report.usage.allocated) == (figures.free, figures.allocated)
        assert (report.shown_files, report.shown_directories) == (figures.files, figures.directories)


# -- the faults ---------------------------------------------------------------------------------


@dataclass
class Victim:
    """A healthy file system that something is to happen to."""

    memory: DeviceMemory
    header: log.LogHeader
    rng: random.Random

    @property
    def entries(self) -> int:
        """How many entries the log has."""
        return self.header.next_index

    @property
    def first_free(self) -> int:
        """A unit of the device behind everything that is in use."""
        used = check.examine(self.memory, "victim", HOST).usage.used
        return used[-1][1] * UNIT

    def word(self, offset: int, value: int) -> None:
        """Overwrite a counter."""
        self.memory.store_u64(layout.LOG_OFFSET + offset, value)

    def flip(self, start: int, length: int) -> None:
        """Turn one bit of a range."""
        place, bit = start + self.rng.randrange(length), 1 << self.rng.randrange(8)
        self.memory.write(place, bytes([self.memory.read(place, 1)[0] ^ bit]))

    def append(self, *build: Callable[[int], bytes]) -> None:
        """Put entries with right checksums at the end of the log, in place of its last ones where it is full."""
        first = min(self.entries, self.header.last_index + 1 - len(build))
        for index, make in enumerate(build, first):
            self.memory.write(layout.entry_offset(index), make(index))
        self.word(layout.NEXT_SEQNUM_OFFSET, first + len(build))
        self.word(layout.NEXT_INDEX_OFFSET, first + len(build))

    def file(self, name: bytes = b"zz", size: int = 1, *extents: Extent) -> Callable[[int], bytes]:
        """A FILE entry, in free space unless told otherwise."""
        fmap = Fmap(extents or (Extent(0, self.first_free, UNIT),))
        return lambda index: log.build_file(index, name, size=size, mode=0o644, uid=0, gid=0, fmap=fmap)


def patched(make: Callable[[int], bytes], *patches: tuple[int, bytes]) -> Callable[[int], bytes]:
    """An entry with other bytes at some places, and the checksum that belongs to them."""

    def build(index: int) -> bytes:
        data = bytearray(make(index))
        for offset, new in patches:
            data[offset : offset + len(new)] = new
        data[layout.LOG_ENTRY_CRC_SPAN :] = zlib.crc32(data[: layout.LOG_ENTRY_CRC_SPAN]).to_bytes(8, "little")
        return bytes(data)

    return build


def folder(name: bytes) -> Callable[[int], bytes]:
    return lambda index: log.build_mkdir(index, name, mode=0o755, uid=0, gid=0)


def device(number: int, uuid: int) -> Callable[[int], bytes]:
    return lambda index: log.build_add_daxdev(index, device=number, size=4 * GIB, uuid=UUID(int=uuid))


def striped(chunk: int) -> Callable[[Victim], Callable[[int], bytes]]:
    def make(victim: Victim) -> Callable[[int], bytes]:
        at = victim.first_free
        fmap = Fmap((Extent(0, at, UNIT), Extent(0, at + UNIT, UNIT)), chunk)
        return lambda index: log.build_file(index, b"zz", size=1, mode=0o644, uid=0, gid=0, fmap=fmap)

    return make


KIND, EXTENTS = 120, 128
"""Where a FILE entry keeps the kind of its extents and their number."""


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


ENTRY_FAULTS: dict[Fault, Callable[[Victim], list[Callable[[int], bytes]]]] = {
    Fault.UNKNOWN_TYPE: lambda v: [patched(v.file(), (8, number(9)))],
    Fault.UNTERMINATED_PATH: lambda v: [patched(v.file(), (40, b"x" * 80))],
    Fault.EMPTY_PATH: lambda v: [patched(v.file(), (40, b"./" + bytes(78)))],
    Fault.ABSOLUTE_PATH: lambda v: [v.file(b"/zz")],
    Fault.ESCAPING_PATH: lambda v: [folder(b"../zz")],
    Fault.RESERVED_PATH: lambda v: [v.file(b".meta/zz")],
    Fault.MISSING_PARENT: lambda v: [v.file(b"no such/zz")],
    Fault.PARENT_IS_FILE: lambda v: [v.file(b"zz"), folder(b"zz/a")],
    Fault.DUPLICATE: lambda v: [folder(b"zz"), v.file(b"zz")],
    Fault.ZERO_SIZE: lambda v: [v.file(b"zz", 0)],
    Fault.UNKNOWN_EXTENT_TYPE: lambda v: [patched(v.file(), (KIND, number(2)))],
    Fault.EXTENT_COUNT: lambda v: [patched(v.file(), (EXTENTS, number(17)))],
    Fault.CHUNK_SIZE: lambda v: [striped(3 * UNIT)(v)],
    Fault.UNKNOWN_DEVICE: lambda v: [v.file(b"zz", 1, Extent(7, 0, UNIT))],
    Fault.MISALIGNED: lambda v: [v.file(b"zz", 1, Extent(0, v.first_free + 4096, UNIT))],
    Fault.IN_METADATA: lambda v: [v.file(b"zz", 1, Extent(0, UNIT, UNIT))],
    Fault.BEYOND_DEVICE: lambda v: [v.file(b"zz", 1, Extent(0, v.memory.size - UNIT, 2 * UNIT))],
    Fault.TOO_SHORT: lambda v: [v.file(b"zz", UNIT + 1)],
    Fault.OVERLAP: lambda v: [v.file(b"zy"), v.file(b"zz")],
    Fault.DEVICE_INDEX: lambda v: [device(5, 77)],
    Fault.DEVICE_DUPLICATE: lambda v: [device(1, 77), device(2, 77)],
}
"""For each reason to skip an entry, entries of which the last one is skipped for it."""


def hide(kind: Fault) -> Callable[[Victim], None]:
    return lambda victim: victim.append(*ENTRY_FAULTS[kind](victim))


def spoil_entry(victim: Victim, index: int) -> None:
    victim.flip(layout.entry_offset(index), layout.LOG_ENTRY_SIZE)


def renumber(victim: Victim) -> None:
    index = victim.rng.randrange(victim.entries)
    entry = victim.memory.read(layout.entry_offset(index), layout.LOG_ENTRY_SIZE)
    victim.memory.write(layout.entry_offset(index), patched(lambda _: entry, (0, (index + 1).to_bytes(8, "little")))(0))


@dataclass(frozen=True)
class Injury:
    """A kind of fault: how to put it there, and how fsck says it."""

    inflict: Callable[[Victim], None]
    found: Callable[[Report], bool] | None
    """None: there is no file system to report on any more."""
    entries: int = 0
    """How many entries it needs."""
    repaired: bool = False


INJURIES = {
    "superblock": Injury(lambda v: v.flip(0, layout.SUPERBLOCK_CRC_SPAN), None),
    "log header": Injury(lambda v: v.flip(layout.LOG_OFFSET, layout.LOG_HEADER_CRC_SPAN), None),
    "log header's checksum": Injury(lambda v: v.flip(layout.LOG_OFFSET + layout.LOG_HEADER_CRC_SPAN, 4), None),
    "more entries than the log holds": Injury(
        lambda v: v.word(layout.NEXT_INDEX_OFFSET, v.header.last_index + 2), None
    ),
    "next_seqnum too large": Injury(
        lambda v: v.word(layout.NEXT_SEQNUM_OFFSET, v.entries + 1), lambda r: bool(r.problems), repaired=True
    ),
    "next_seqnum too small": Injury(
        lambda v: v.word(layout.NEXT_SEQNUM_OFFSET, 0), lambda r: bool(r.problems), entries=1, repaired=True
    ),
    "next_index too small": Injury(
        lambda v: v.word(layout.NEXT_INDEX_OFFSET, v.entries - 1), lambda r: bool(r.problems), entries=1, repaired=True
    ),
    "last entry": Injury(
        lambda v: spoil_entry(v, v.entries - 1),
        lambda r: r.stop is not None and r.stop.damage is Damage.TORN and r.usage.bad_entries == 1,
        entries=1, repaired=True,
    ),
    "entry in the middle": Injury(
        lambda v: spoil_entry(v, v.rng.randrange(v.entries - 1)),
        lambda r: r.stop is not None and r.stop.damage is Damage.CORRUPT and r.usage.bad_entries == 1,
        entries=2,
    ),
    "sequence number": Injury(renumber, lambda r: r.stop is not None and r.usage.bad_entries == 1, entries=1),
    **{
        kind.name.lower().replace("_", " "): Injury(
            hide(kind), lambda r, kind=kind: r.skipped[-1].fault is kind and r.skipped_count == 1  # type: ignore[misc]
        )
        for kind in ENTRY_FAULTS
    },
}  # fmt: skip


def test_there_is_an_injury_for_every_reason_to_skip_an_entry() -> None:
    assert set(ENTRY_FAULTS) == set(Fault) - {Fault.NONE}


def hurt(memory: DeviceMemory, injury: Injury, rng: random.Random) -> bool:
    """Inflict an injury and see that fsck finds it; False where the file system has too few entries for it."""
    header = log.decode_header(
        memory.read(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), check.examine(memory, "x", HOST).superblock.log_length
    )
    if header.next_index < injury.entries:
        return False
    injury.inflict(Victim(memory, header, rng))
    if injury.found is None:
        with pytest.raises(MediaError):
            check.examine(memory, "victim", HOST)
        return True
    report = check.examine(memory, "victim", HOST)
    assert not report.clean
    assert report.fsck_bits == 4
    assert injury.found(report), list(check.render(report))
    return True


@pytest.mark.parametrize("kind", INJURIES)
def test_every_fault_is_found_in_random_volumes(memory: ScratchMemory, rng: random.Random, kind: str) -> None:
    done = 0
    while done < DAMAGED:
        fill(memory, rng)
        before = shown(memory)
        if not hurt(memory, INJURIES[kind], rng):
            continue
        done += 1
        if INJURIES[kind].found is not None:
            mend(memory, before, INJURIES[kind])


@pytest.mark.parametrize("kind", INJURIES)
def test_every_fault_is_found_in_golden_images(
    vectors: GoldenImages, tmp_path: Path, rng: random.Random, kind: str
) -> None:
    for name in GOLDEN:
        path = vectors.build(name, tmp_path)
        with DaxDevice.open(str(path)) as opened:
            memory = opened.memory()
            assert check.examine(memory, name, HOST).clean
            hurt(memory, INJURIES[kind], rng)
            memory.close()
        path.unlink()


# -- mending ------------------------------------------------------------------------------------


def mend(memory: ScratchMemory, before: dict[bytes, tuple[int, Fmap]], injury: Injury) -> None:
    """Repair, and see that what was shown still is, that nothing is left to do, and that it can be undone."""
    visible = shown(memory)
    report = check.examine(memory, "memory", HOST)
    size = layout.LOG_OFFSET + report.superblock.log_length
    hurt_bytes = memory.read(0, size)
    planned = repair.plan(memory, report, torn=True)
    assert (planned is not None) is injury.repaired or report.stop is not None
    if planned is None:
        return
    repair.carry_out(memory, planned)
    after = check.examine(memory, "memory", HOST)
    assert after.clean or not injury.repaired
    assert shown(memory) == visible
    assert visible.items() <= before.items()
    assert repair.plan(memory, after, torn=True) is None
    for offset, data in planned.saved:
        memory.write(offset, data)
    assert memory.read(0, size) == hurt_bytes


def test_a_log_that_changed_meanwhile_is_left_alone(memory: ScratchMemory, rng: random.Random) -> None:
    fill(memory, rng)
    victim = Victim(memory, log.LogHeader(0, 0, 0, 0, 0), rng)
    victim.word(layout.NEXT_SEQNUM_OFFSET, 5000)
    planned = repair.plan(memory, check.examine(memory, "memory", HOST), torn=False)
    assert planned is not None
    victim.word(layout.NEXT_SEQNUM_OFFSET, 5001)
    with pytest.raises(MediaError, match="has changed"):
        repair.carry_out(memory, planned)


def test_only_the_owner_repairs(memory: ScratchMemory, rng: random.Random) -> None:
    fill(memory, rng)
    Victim(memory, log.LogHeader(0, 0, 0, 0, 0), rng).word(layout.NEXT_SEQNUM_OFFSET, 5000)
    with pytest.raises(RoleError):
        repair.plan(memory, check.examine(memory, "memory", UUID(int=4)), torn=True)


def test_memory_that_cannot_be_read_is_found(vectors: GoldenImages, tmp_path: Path) -> None:
    path = vectors.build("04-many", tmp_path)
    with DaxDevice.open(str(path)) as opened:
        memory = opened.memory()
        # The page that entry 20 lies in, and all behind it, are gone from under the mapping.
        os.truncate(path, layout.entry_offset(20) // 4096 * 4096)
        report = check.examine(memory, "04-many", HOST)
        assert not report.clean
        assert report.stop is not None
        assert report.stop.damage is Damage.UNREADABLE
        assert repair.plan(memory, report, torn=True) is None
        memory.close()


def test_a_device_that_is_too_small_is_found(vectors: GoldenImages, tmp_path: Path) -> None:
    path = vectors.build("04-many", tmp_path)
    os.truncate(path, 4 * GIB)
    with DaxDevice.open(str(path)) as opened:
        memory = opened.memory()
        (problem,) = check.examine(memory, "04-many", HOST).problems
        assert "has only 4294967296" in problem
        memory.close()
