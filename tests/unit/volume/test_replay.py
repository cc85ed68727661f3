# SPDX-License-Identifier: Apache-2.0
"""Replay against a plain reading of the rules: random logs, golden images, and hostile ones by the thousand."""

import random
import resource
import struct
import time
from collections.abc import Iterator

import pytest

from agreement import check_agreement, check_hostile, shown
from famfs_server.errors import FamfsError
from famfs_server.omf import layout
from famfs_server.volume.faults import Fault
from famfs_server.volume.replay import Damage, normalise
from famfs_server.volume.volume import NewFile, Volume
from golden import GoldenImages
from hostile import FIRST, MIB, UNIT, Mutator, random_log, store_log
from memories import HOST, ScratchMemory
from reference import clean_path

HOSTILE_CASES = 2_000
"""The fuzz tier tries many more."""
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


# -- random logs --------------------------------------------------------------------------------


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
        started = time.process_time()
        try:
            volume = Volume(memory, HOST, "memory")
        except FamfsError:
            refused += 1
        else:
            opened += 1
            check_hostile(volume, memory)
            volume.close()
        assert time.process_time() - started < SLOW_SECONDS, f"case {number}"
    print(f"{HOSTILE_CASES} cases, {opened} of them could be opened")
    assert opened > HOSTILE_CASES // 3
    assert refused > HOSTILE_CASES // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB
