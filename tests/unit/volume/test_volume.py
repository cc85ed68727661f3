# SPDX-License-Identifier: Apache-2.0
"""A file system in plain memory: who may write, what is refused and changes nothing, what is no file system."""

import mmap
import os
import random
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax.memory import Memory
from famfs_server.errors import (
    DeviceFaultError,
    ExistsError,
    FamfsError,
    LogFullError,
    MediaError,
    NameTooLongError,
    NoSpaceError,
    NoSuchPathError,
    NotADirectoryPathError,
    PathError,
    RoleError,
)
from famfs_server.omf import layout, log
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume import namespace as ns
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.provisional import Provisional
from famfs_server.volume.replay import Damage, Replay
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Role, Volume
from memories import HOST, LOG_LENGTH, PowerCutError, ScratchMemory, formatted

MIB = 1 << 20
OTHER = UUID(int=5)


@pytest.fixture
def memory() -> Iterator[ScratchMemory]:
    memory = ScratchMemory()
    formatted(memory)
    yield memory
    memory.close()


@pytest.fixture
def volume(memory: ScratchMemory) -> Iterator[Volume]:
    volume = Volume(memory, HOST, "memory")
    yield volume
    volume.close()


def file(path: bytes, size: int = MIB) -> NewFile:
    return NewFile(path, size, 0o644, 1, 2)


def media(memory: ScratchMemory) -> bytes:
    return bytes(memory.view[: layout.LOG_OFFSET + 64 * 1024])


def reseal(memory: ScratchMemory) -> None:
    """Make the superblock's checksum right again."""
    memory.write(96, zlib.crc32(bytes(memory.view[:96])).to_bytes(8, "little"))


# -- roles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [OTHER, None])
def test_a_client_creates_nothing(memory: ScratchMemory, host: UUID | None) -> None:
    volume = Volume(memory, host, "memory")
    assert volume.role is Role.CLIENT
    before = media(memory)
    with pytest.raises(RoleError):
        volume.create(file(b"a"))
    with pytest.raises(RoleError):
        volume.mkdir(b"a", 0o755, 0, 0)
    assert media(memory) == before
    volume.close()


def test_a_second_master_stops_the_first(memory: ScratchMemory, volume: Volume) -> None:
    second = Volume(memory, HOST, "memory")
    second.mkdir(b"theirs", 0o755, 0, 0)
    before = media(memory)
    with pytest.raises(RoleError, match="somebody else"):
        volume.mkdir(b"mine", 0o755, 0, 0)
    assert media(memory) == before
    volume.refresh()
    assert volume.namespace.resolve(b"theirs")
    with pytest.raises(RoleError, match="somebody else"):
        volume.create(file(b"mine"))
    second.close()


@pytest.mark.parametrize("way", ["look", "append", "takeover"])
def test_what_a_second_master_makes_is_shown_though_its_space_is_reserved(memory: ScratchMemory, way: str) -> None:
    """Visibility is decided by the media alone (decisions 3): what the first one has reserved is no entry."""
    state = os.memfd_create("state")
    volume = Volume(memory, HOST, "memory", state=os.dup(state))
    volume.create(file(b"before"))
    made = Provisional(volume)
    nodeid = made.create(ns.ROOT, b"growing", 0o644, 0, 0)
    made.grow(nodeid, 20 * MIB)
    far = made.create(ns.ROOT, b"far", 0o644, 0, 0)
    made.grow(far, 5000)
    reservation = volume.reserve([file(b"reserved")])
    second = Volume(memory, HOST, "memory")
    for name in (b"theirs", b"growing", b"reserved"):
        node = second.create(file(name, 3 * MIB))
        second.write(node, 0, memoryview(b"they"))
    if way == "takeover":
        volume.close()
        volume = Volume(memory, HOST, "memory", state=os.dup(state))
        made = Provisional(volume)
    elif way == "append":
        with pytest.raises(RoleError, match="somebody else"):
            volume.mkdir(b"mine", 0o755, 0, 0)
    volume.refresh()
    second.create(file(b"more", 24 * MIB))
    volume.refresh()
    assert volume.statistics().skipped == {}
    assert [volume.namespace.path(node) for node in volume.namespace.walk()] == [
        second.namespace.path(node) for node in second.namespace.walk()
    ]
    # Their place is not written to any more, and nothing that is given up is given to anybody.
    for act in (
        lambda: made.grow(nodeid, 4, memoryview(b"mine")),
        lambda: made.grow(nodeid, 10 * MIB),
        lambda: made.resize(nodeid, 1),
        lambda: volume.create(file(b"mine")),
    ):
        with pytest.raises(RoleError, match="somebody else"):
            act()
    if way != "takeover":
        reservation.__exit__(None, None, None)
    made.released(nodeid)
    theirs = volume.namespace.resolve(b"theirs")
    assert volume.read(theirs, 0, 4) == b"they"
    assert not volume.space.own(volume.namespace.fmap(theirs).extents)
    second.close()
    volume.close()
    os.close(state)


def test_a_second_master_is_not_forgotten_by_a_successor(memory: ScratchMemory) -> None:
    state = os.memfd_create("state")
    volume = Volume(memory, HOST, "memory", state=os.dup(state))
    second = Volume(memory, HOST, "memory")
    second.mkdir(b"theirs", 0o755, 0, 0)
    volume.refresh()
    for _ in range(2):
        volume.close()
        volume = Volume(memory, HOST, "memory", state=os.dup(state))
        assert volume.foreign_writer
        with pytest.raises(RoleError, match="somebody else"):
            volume.mkdir(b"mine", 0o755, 0, 0)
    volume.close()
    os.ftruncate(state, 0)
    volume = Volume(memory, HOST, "memory", state=os.dup(state))
    volume.mkdir(b"mine", 0o755, 0, 0)
    second.close()
    volume.close()
    os.close(state)


def test_a_client_follows(memory: ScratchMemory, volume: Volume) -> None:
    client = Volume(memory, OTHER, "memory")
    volume.mkdir(b"d", 0o755, 0, 0)
    volume.create_many([file(b"d/%d" % number) for number in range(600)])
    assert client.stale()
    free: list[bool] = []

    def look() -> None:
        def take() -> None:
            if client.lock.acquire(blocking=False):
                client.lock.release()
                free.append(True)

        taker = threading.Thread(target=take)
        taker.start()
        taker.join()

    client.give_way = look
    assert client.refresh() == 601
    # Between the steps of 256 entries others had their turn, and the lock.
    assert free == [True] * 3
    assert not client.stale()
    assert [client.namespace.path(n) for n in client.namespace.walk()] == [
        volume.namespace.path(n) for n in volume.namespace.walk()
    ]
    assert client.refresh() == 0
    client.close()


# -- refusals that change nothing ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (b"x" * 80, NameTooLongError),
        (b"d/" + b"x" * 78, NameTooLongError),
        (b"", PathError),
        (b"a\0b", PathError),
        (b"/a", PathError),
        (b"../a", PathError),
        (b"a/", PathError),
        (b"./a", PathError),
        (b"a//b", PathError),
        (b"d/..", PathError),
        (b".meta", PathError),
        (b".meta/new", PathError),
        (b"absent/a", NoSuchPathError),
        (b"f/a", NotADirectoryPathError),
        (b"d", ExistsError),
        (b"f", ExistsError),
    ],
)
def test_paths_that_cannot_be_made(memory: ScratchMemory, volume: Volume, path: bytes, error: type[FamfsError]) -> None:
    volume.mkdir(b"d", 0o755, 0, 0)
    volume.create(file(b"f"))
    before, free = media(memory), volume.space.free
    for attempt in (
        lambda: volume.create(file(path)),
        lambda: volume.mkdir(path, 0o755, 0, 0),
        lambda: volume.create_many([file(b"good"), file(path)]),
    ):
        with pytest.raises(error) as caught:
            attempt()
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
    assert (media(memory), volume.space.free) == (before, free)
    assert volume.namespace.resolve(b"good") == 0


def test_the_longest_path(memory: ScratchMemory, volume: Volume) -> None:
    volume.mkdir(b"x" * 79, 0o755, 0, 0)
    volume.create(file(b"y" * 79))
    again = Volume(memory, OTHER, "memory")
    assert again.namespace.resolve(b"x" * 79)
    assert again.namespace.resolve(b"y" * 79)
    again.close()


@pytest.mark.parametrize("size", [0, -1, -(1 << 63), 5 << 30, 1 << 63, 1 << 64, 1 << 70])
def test_absurd_sizes(memory: ScratchMemory, volume: Volume, size: int) -> None:
    before, free = media(memory), volume.space.free
    with pytest.raises((PathError, NoSpaceError)):
        volume.create(file(b"f", size))
    with pytest.raises((PathError, NoSpaceError)):
        volume.create_many([file(b"good"), file(b"f", size)])
    assert (media(memory), volume.space.free) == (before, free)


def test_twice_in_one_batch(memory: ScratchMemory, volume: Volume) -> None:
    before = media(memory)
    with pytest.raises(ExistsError):
        volume.create_many([file(b"a"), file(b"b"), file(b"a")])
    assert media(memory) == before


def test_full_log(memory: ScratchMemory) -> None:
    memory.write(layout.LOG_OFFSET, log.build_header(LOG_LENGTH, last_index=4))
    volume = Volume(memory, HOST, "memory")
    volume.create_many([file(b"%d" % number) for number in range(3)])
    before, free = media(memory), volume.space.free
    with pytest.raises(LogFullError):
        volume.create_many([file(b"a"), file(b"b"), file(b"c")])
    assert (media(memory), volume.space.free) == (before, free)
    volume.create_many([file(b"a"), file(b"b")])
    with pytest.raises(LogFullError):
        volume.mkdir(b"d", 0o755, 0, 0)
    volume.close()
    again = Volume(memory, HOST, "memory")
    assert again.namespace.replayed == 5
    again.close()


def test_natural_end_of_the_log(memory: ScratchMemory, volume: Volume) -> None:
    capacity = layout.natural_last_index(LOG_LENGTH) + 1
    assert capacity == 15420
    done = 0
    while done < capacity:
        count = min(1000, capacity - done)
        # Too many for the space: directories would be appended one by one, files of one unit fit 2043 times.
        entries = [log.build_mkdir(done + n, b"%d" % (done + n), mode=0o755, uid=0, gid=0) for n in range(count)]
        memory.write(layout.entry_offset(done), b"".join(entries))
        done += count
    memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, struct.pack("<QQ", capacity - 1, capacity - 1))
    last = Volume(memory, HOST, "memory")
    last.mkdir(b"last", 0o755, 0, 0)
    with pytest.raises(LogFullError):
        last.mkdir(b"one more", 0o755, 0, 0)
    last.close()
    again = Volume(memory, OTHER, "memory")
    assert again.namespace.replayed == capacity
    assert again.namespace.resolve(b"last")
    again.close()


@pytest.mark.parametrize("count", [1, 4])
def test_damaged_log_refuses_appends(memory: ScratchMemory, volume: Volume, count: int) -> None:
    for number in range(4):
        volume.mkdir(b"%d" % number, 0o755, 0, 0)
    at = layout.entry_offset(4 - count) + 100
    memory.write(at, bytes([memory.view[at] ^ 1]))
    damaged = Volume(memory, HOST, "memory")
    assert damaged.stop is not None
    assert damaged.stop.damage is (Damage.TORN if count == 1 else Damage.CORRUPT)
    before = media(memory)
    with pytest.raises(MediaError, match="fsck"):
        damaged.mkdir(b"new", 0o755, 0, 0)
    assert media(memory) == before
    assert [damaged.namespace.path(n) for n in damaged.namespace.walk()] == [b"%d" % n for n in range(4 - count)]
    damaged.close()


# -- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", [None, Interleave(4, 3)])
def test_reading_and_writing(volume: Volume, interleave: Interleave | None, rng: random.Random) -> None:
    size = 9 * MIB + 77
    nodeid = volume.create(NewFile(b"f", size, 0o644, 0, 0, interleave))
    model = bytearray(size)
    assert volume.read(nodeid, 0, size) == model
    for _ in range(40):
        offset, length = rng.randrange(size), rng.choice((1, 100, 4096, 3 * MIB))
        data = rng.randbytes(length)
        stored = volume.write(nodeid, offset, memoryview(data))
        assert stored == min(length, size - offset)
        model[offset : offset + stored] = data[:stored]
    volume.write_back(nodeid)
    assert volume.read(nodeid, 0, size + 1) == model
    assert b"".join(volume.views(nodeid, MIB, 5 * MIB)) == model[MIB : 6 * MIB]
    assert volume.read(nodeid, size, 1) == b""
    assert volume.read(nodeid, size - 1, 10) == model[-1:]


def test_new_files_hold_nothing_of_former_owners(memory: ScratchMemory, volume: Volume) -> None:
    first = layout.LOG_OFFSET + LOG_LENGTH
    memory.write(first, b"secret" * 1000)
    nodeid = volume.create(file(b"f", 5000))
    assert volume.read(nodeid, 0, 5000) == bytes(5000)
    # A mapping shows the last page to its end.
    assert bytes(memory.view[first : first + 8192]) == bytes(8192)


# -- what is no file system ---------------------------------------------------------------------


def test_versions(memory: ScratchMemory) -> None:
    for version, omf, readable in ((48, (2, 2), True), (47, (2, 1), True), (47, (1, 1), False), (48, (9, 9), False)):
        memory.write(8, version.to_bytes(8, "little"))
        memory.write(40, struct.pack("<II", *omf))
        reseal(memory)
        if readable:
            Volume(memory, HOST, "memory").close()
        else:
            with pytest.raises(MediaError):
                Volume(memory, HOST, "memory")
    memory.write(8, (49).to_bytes(8, "little"))
    reseal(memory)
    with pytest.raises(MediaError, match="version 49"):
        Volume(memory, HOST, "memory")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, 0),
        (16, 0x400000),
        (24, 0),
        (24, 9 << 20),
        (24, 4 << 20),
        (24, 1 << 62),
        (24, 8 << 30),
        (32, 0),
        (32, 8192),
        (96, 1),
        (112, 0),
    ],
)
def test_impossible_superblocks(memory: ScratchMemory, offset: int, value: int) -> None:
    memory.write(offset, value.to_bytes(8, "little"))
    if offset < 96:
        reseal(memory)
    with pytest.raises(MediaError) as caught:
        Volume(memory, HOST, "memory")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last_index", "readable"),
    [(15419, True), (7, True), (0, True), (15420, False), (23830, False), (9038, False), (2**64 - 1, False)],
)
def test_last_index(memory: ScratchMemory, last_index: int, readable: bool) -> None:
    memory.write(layout.LOG_OFFSET, log.build_header(LOG_LENGTH, last_index))
    if readable:
        Volume(memory, HOST, "memory").close()
    else:
        with pytest.raises(MediaError):
            Volume(memory, HOST, "memory")


@pytest.mark.parametrize("next_index", [15421, 20000, 1 << 40, 2**64 - 1])
def test_counter_beyond_the_log(memory: ScratchMemory, next_index: int) -> None:
    memory.store_u64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, next_index)
    with pytest.raises(MediaError):
        Volume(memory, HOST, "memory")


def test_memory_that_cannot_be_read(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("w+b") as backing:
        backing.truncate(4 << 30)
        pages = mmap.mmap(backing.fileno(), 4 << 30)
        memory = Memory(memoryview(pages), flush=False)
        formatted(memory)
        volume = Volume(memory, HOST, "memory")
        nodeid = volume.create(file(b"f"))
        # As if the pages behind the first entries were poisoned: touching them is a bus error.
        os.truncate(image, layout.LOG_OFFSET + 4096)
        with pytest.raises(DeviceFaultError):
            volume.read(nodeid, 0, 100)
        with pytest.raises(DeviceFaultError):
            volume.write(nodeid, 0, memoryview(b"data"))
        memory.store_u64(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, 5000)
        memory.store_u64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, 5000)
        volume.refresh()
        assert volume.stop is not None
        assert volume.stop.damage is Damage.UNREADABLE
        assert volume.namespace.resolve(b"f") == nodeid
        volume.close()
        memory.close()
        pages.close()


@pytest.mark.parametrize("host", [HOST, OTHER], ids=["master", "client"])
@pytest.mark.parametrize(
    ("next_index", "damage"),
    [
        (0, Damage.REPLACED),
        (4, Damage.REPLACED),
        (6, Damage.TORN),
        (7, Damage.CORRUPT),
        (15420, Damage.CORRUPT),
        (15421, Damage.REPLACED),
        (1 << 63, Damage.REPLACED),
        (2**64 - 1, Damage.REPLACED),
    ],
)
def test_counter_that_jumps_under_a_mount(
    memory: ScratchMemory, volume: Volume, host: UUID, next_index: int, damage: Damage
) -> None:
    """Nobody has stored entries for it: what was known stays, and nothing is stored over what somebody may mean."""
    names = [b"%d" % number for number in range(5)]
    for name in names:
        volume.mkdir(name, 0o755, 0, 0)
    here = volume if host == HOST else Volume(memory, host, "memory")
    memory.store_u64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, next_index)
    before = media(memory)
    here.refresh()
    assert here.stop is not None
    assert here.stop.damage is damage
    assert here.lagging == (damage is Damage.TORN and host == OTHER)
    assert [here.namespace.path(node) for node in here.namespace.walk()] == names
    for act in (lambda: here.mkdir(b"new", 0o755, 0, 0), lambda: here.create(file(b"new"))):
        with pytest.raises((MediaError, RoleError)):
            act()
    assert media(memory) == before
    # A counter that comes back mends nothing but what looked like an entry on its way.
    memory.store_u64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, 5)
    here.refresh()
    assert (here.stop is None) == (damage is Damage.TORN and host == OTHER)
    with pytest.raises((MediaError, RoleError)):
        here.mkdir(b"new", 0o755, 0, 0)
    if here is not volume:
        here.close()


def test_entry_that_becomes_whole_while_a_look_waits(memory: ScratchMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Volume(memory, OTHER, "memory")
    entry = log.build_mkdir(0, b"slow", mode=0o755, uid=0, gid=0)
    memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, struct.pack("<QQ", 1, 1))
    looks = []

    def wait() -> None:
        looks.append(client.namespace.replayed)
        if len(looks) == 5:
            memory.write(layout.entry_offset(0), entry)

    client.give_way = wait
    monkeypatch.setattr("famfs_server.volume.volume.PATIENCE_SECONDS", 60.0)
    assert client.refresh() == 1
    assert looks[:5] == [0] * 5
    assert client.namespace.resolve(b"slow")
    assert client.stop is None
    assert not client.lagging
    client.close()


def test_an_empty_file_system_is_made_anew(memory: ScratchMemory, volume: Volume) -> None:
    """With nothing replayed no counter goes backwards; only the superblock tells that the log is another one."""
    make_filesystem(memory, "memory", HOST, log_length=LOG_LENGTH)
    before = media(memory)
    with pytest.raises(MediaError, match="made anew"):
        volume.mkdir(b"dir", 0o755, 0, 0)
    assert media(memory) == before
    assert volume.stop is not None
    assert volume.stop.damage is Damage.REPLACED


def test_a_name_is_taken_while_its_space_is_zeroed(memory: ScratchMemory, volume: Volume) -> None:
    """Zeroing is done without the lock, and nothing may come between it and the log."""
    refused: list[type[BaseException]] = []
    zero = memory.zero

    def meddle(offset: int, length: int) -> None:
        memory.zero = zero  # type: ignore[method-assign]
        with pytest.raises(ExistsError) as error:
            volume.mkdir(b"file", 0o755, 0, 0)
        refused.append(error.type)
        volume.mkdir(b"another", 0o755, 0, 0)
        zero(offset, length)

    memory.zero = meddle  # type: ignore[method-assign]
    nodeid = volume.create(file(b"file"))
    assert refused == [ExistsError]
    assert volume.namespace.path(nodeid) == b"file"
    assert volume.namespace.resolve(b"another")
    assert volume.mkdir(b"file2", 0o755, 0, 0)


@pytest.mark.parametrize("host", [HOST, None])
def test_entries_that_a_dead_worker_had_linked_and_not_published_are_shown(host: UUID | None) -> None:
    """Found by the soak: a file that was linked already was taken for a duplicate of itself."""
    memory = ScratchMemory()
    formatted(memory)
    state = os.memfd_create("state")
    worker = Volume(memory, host, "memory", state=os.dup(state))
    before = worker.namespace.published
    writer = Volume(memory, HOST, "memory")
    writer.mkdir(b"dir", 0o755, 0, 0)
    writer.create_many([NewFile(b"dir/f%d" % number, 4096, 0o644, 0, 0) for number in range(5)])
    worker.refresh()
    # Dead between the last link and the word that says so.
    worker.namespace._header[1] = before
    successor = Volume(memory, host, "memory", state=os.dup(state))
    successor.refresh()
    tree = successor.namespace
    assert tree.faults() == {}
    assert [tree.path(node) for node in tree.walk()] == [b"dir", *(b"dir/f%d" % number for number in range(5))]
    assert successor.space.allocated == writer.space.allocated
    os.close(state)


def test_successor_of_a_worker_that_had_not_judged_overlaps_yet(
    memory: ScratchMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All entries were published, and which of two files owns what both name was not settled."""
    fmap = Fmap((Extent(0, layout.LOG_OFFSET + LOG_LENGTH, layout.ALLOC_UNIT),))
    for index, name in enumerate((b"first", b"second")):
        entry = log.build_file(index, name, size=5, mode=0o644, uid=0, gid=0, fmap=fmap)
        memory.write(layout.entry_offset(index), entry)
    memory.write(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, struct.pack("<QQ", 2, 2))
    state = os.memfd_create("state")

    def die(replay: Replay) -> bool:
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(Replay, "settle", die)
        with pytest.raises(PowerCutError):
            Volume(memory, HOST, "memory", state=os.dup(state))
    successor = Volume(memory, HOST, "memory", state=os.dup(state))
    tree = successor.namespace
    assert [tree.path(node) for node in tree.walk()] == [b"first"]
    assert successor.space.allocated == layout.LOG_OFFSET + LOG_LENGTH + layout.ALLOC_UNIT
    # Who serves holds on to it.
    assert successor.namespace is tree
    successor.close()
    os.close(state)
