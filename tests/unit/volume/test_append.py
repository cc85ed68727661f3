# SPDX-License-Identifier: Apache-2.0
"""Power cuts while appending and formatting: what is found afterwards is a state that was meant to be."""

import random
from collections.abc import Iterator
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famfs_server.errors import FamfsError, NotADirectoryPathError
from famfs_server.omf import layout, log, superblock
from famfs_server.omf.superblock import SuperblockState
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.provisional import Provisional
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, CrashMemory, PowerCutError, formatted
from reference import replay

MIB = 1 << 20

paths = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"a/a", b"a/b", b"b/a", b"a/a/a"])
operations = st.one_of(
    st.tuples(st.just("mkdir"), st.lists(paths, min_size=1, max_size=1)),
    st.tuples(st.just("create"), st.lists(paths, min_size=1, max_size=1)),
    st.tuples(st.just("create"), st.lists(paths, min_size=2, max_size=4, unique=True)),
    st.tuples(st.sampled_from(["famfs cp --log-first", "cp"]), st.lists(paths, min_size=1, max_size=1)),
    st.tuples(st.just("famfs cp"), st.lists(paths, min_size=1, max_size=3, unique=True)),
)
DATA = memoryview(b"copied" * 1000)
STEPS = 9
"""About as many steps as an operation has."""
VARIANTS = 8
"""Ways in which each power cut is looked at."""


@pytest.fixture(scope="module")
def memory() -> Iterator[CrashMemory]:
    memory = CrashMemory()
    yield memory
    memory.close()


def shown(volume: Volume) -> list[bytes]:
    """What is visible, in log order."""
    tree = volume.namespace
    return [tree.path(nodeid) for nodeid in tree.walk()]


def in_reference(memory: CrashMemory) -> list[bytes]:
    """The same by the plain reading of the rules."""
    log_bytes = bytes(memory.view[layout.LOG_OFFSET : layout.LOG_OFFSET + MIB])
    outcome = replay(log_bytes, device_size=memory.size, log_length=LOG_LENGTH, unit=layout.ALLOC_UNIT)
    assert outcome.entries == int.from_bytes(log_bytes[40:48], "little")
    return list(outcome.nodes)


def perform(volume: Volume, kind: str, wanted: list[bytes]) -> None:
    if kind == "mkdir":
        volume.mkdir(wanted[0], 0o755, 1, 2)
    elif kind == "create":
        volume.create_many([NewFile(path, 3 * MIB + 7, 0o640, 3, 4) for path in wanted])
    elif kind == "famfs cp --log-first":
        volume.write(volume.create(NewFile(wanted[0], len(DATA), 0o640, 3, 4)), 0, DATA)
    elif kind == "famfs cp":
        # Nobody may see a name before its data are in memory.
        with volume.reserve([NewFile(path, len(DATA), 0o644, 3, 4) for path in wanted]) as reservation:
            for number in range(len(wanted)):
                reservation.write(number, 0, DATA)
            reservation.filled()
            reservation.log()
    else:
        # By system calls: filled first, logged when it is closed.
        made = Provisional(volume)
        head, _, name = wanted[0].rpartition(b"/")
        parent = volume.namespace.resolve(head)
        if not volume.namespace.is_directory(parent):
            raise NotADirectoryPathError("no such directory")
        nodeid = made.create(parent, name, 0o644, 3, 4)
        made.grow(nodeid, len(DATA), DATA)
        made.released(nodeid)


@settings(max_examples=200)
@given(st.lists(operations, min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 2**32))
def test_power_cut_leaves_a_prefix(
    memory: CrashMemory, plan: list[tuple[str, list[bytes]]], when: float, seed: int
) -> None:
    memory.view[: 3 * MIB] = bytes(3 * MIB)
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    done: list[bytes] = []
    begun: list[bytes] = []
    rest = iter(plan)
    memory.steps_left = int(when * STEPS * len(plan))
    try:
        for kind, wanted in rest:
            begun = wanted
            try:
                perform(volume, kind, wanted)
            except FamfsError:
                begun = []
            done, begun = done + begun, []
    except PowerCutError:
        pass
    volume.close()

    for _ in memory.crash(random.Random(seed), VARIANTS):
        volume = Volume(memory, HOST, "memory")
        found = shown(volume)
        assert volume.stop is None
        assert not volume.namespace.faults()
        # All that was acknowledged, and of what was under way either all or nothing.
        assert found in (done, done + begun)
        assert in_reference(memory) == found
        tree = volume.namespace
        for node in tree.walk():
            if tree.mode[node] & 0o7777 == 0o644:
                assert volume.read(node, 0, len(DATA)) == DATA
        volume.close()

    # Whatever the power cut left of the counters, the next host to start goes on from there.
    volume = Volume(memory, HOST, "memory")
    for kind, wanted in rest:
        try:
            perform(volume, kind, wanted)
        except FamfsError:
            continue
        found += wanted
    assert shown(volume) == found
    volume.close()
    volume = Volume(memory, HOST, "memory")
    assert shown(volume) == found == in_reference(memory)
    assert volume.stop is None
    volume.close()


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_counters_that_disagree_are_repaired_before_an_append(memory: CrashMemory, seed: int) -> None:
    rng = random.Random(seed)
    memory.view[: 3 * MIB] = bytes(3 * MIB)
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    count = rng.randrange(5)
    for number in range(count):
        volume.mkdir(b"%d" % number, 0o755, 0, 0)
    volume.close()
    memory.store_u64(
        layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, rng.choice((0, count + 1, count - 1, 2**64 - 1)) % 2**64
    )
    volume = Volume(memory, HOST, "memory")
    volume.mkdir(b"more", 0o755, 0, 0)
    header = log.decode_header(memory.read(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), LOG_LENGTH)
    assert (header.next_seqnum, header.next_index) == (count + 1, count + 1)
    assert len(in_reference(memory)) == count + 1
    volume.close()


def old_filesystem(memory: CrashMemory) -> None:
    """A file system with contents, for another one to be made over it."""
    memory.view[: 12 * MIB] = bytes(12 * MIB)
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    volume.mkdir(b"old", 0o755, 0, 0)
    volume.create_many([NewFile(b"old/%d" % number, MIB, 0o644, 0, 0) for number in range(20)])
    volume.close()


@pytest.mark.parametrize("before", ["blank", "file system"])
def test_power_cut_while_formatting(memory: CrashMemory, before: str, rng: random.Random) -> None:
    new = UUID(int=77)
    empty = log.build_header(LOG_LENGTH) + bytes(LOG_LENGTH - layout.LOG_HEADER_SIZE)
    outcomes = set()
    steps = 0
    finished = False
    while not finished:
        if before == "blank":
            memory.view[: 12 * MIB] = bytes(12 * MIB)
        else:
            old_filesystem(memory)
        old = bytes(memory.view[: layout.LOG_OFFSET + LOG_LENGTH])
        memory.steps_left = steps
        try:
            make_filesystem(memory, "memory", HOST, log_length=LOG_LENGTH, uuid=new)
            finished = True
        except PowerCutError:
            pass
        for _ in memory.crash(rng, VARIANTS):
            found = superblock.inspect(memory.read(0, layout.SUPERBLOCK.itemsize))
            assert (found.state is SuperblockState.VALID) or not finished
            if found.state is not SuperblockState.VALID or found.superblock is None:
                outcomes.add("none")
            elif found.superblock.uuid == new:
                outcomes.add("new")
                assert memory.view[layout.LOG_OFFSET : layout.LOG_OFFSET + LOG_LENGTH] == empty
            else:
                outcomes.add("old")
                assert memory.view[: layout.LOG_OFFSET + LOG_LENGTH] == old
        steps += 1
    assert outcomes == ({"none", "new"} if before == "blank" else {"old", "none", "new"})
