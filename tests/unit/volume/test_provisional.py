# SPDX-License-Identifier: Apache-2.0
"""Files that are not logged yet: against a simple model, and with a worker that dies at any line of the code."""

import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deaths import dies
from famfs_server.errors import DeviceFaultError, ExistsError, FamfsError, LogFullError, NoSpaceError
from famfs_server.volume import check, provisional
from famfs_server.volume import namespace as ns
from famfs_server.volume.namespace import PROVISIONAL_ROWS
from famfs_server.volume.provisional import FIRST_PROVISIONAL, Provisional
from famfs_server.volume.volume import NewFile, Volume, whole_pages
from memories import HOST, ScratchMemory, formatted

MIB = 1 << 20
PLACES = 37 if not os.environ.get("FAMFS_TEST_LONG") else 1
"""Of how many lines of code one is the place of a death."""


class World:
    """A device, and the memory that workers hand on to one another."""

    def __init__(self) -> None:
        self.memory = ScratchMemory()
        formatted(self.memory)
        self.state = os.memfd_create("state")
        self.start()

    def start(self) -> None:
        """A worker begins; there may have been another."""
        self.volume = Volume(self.memory, HOST, "memory", state=os.dup(self.state))
        self.made = Provisional(self.volume)

    def close(self) -> None:
        os.close(self.state)

    def make(self, name: bytes) -> int:
        """A new file in the root."""
        return self.made.create(ns.ROOT, name, 0o640, 3, 4)

    def write(self, nodeid: int, offset: int, data: bytes) -> None:
        """Write to a file that grows."""
        if self.made.is_logged(nodeid):
            assert self.volume.write(self.made.row(nodeid), offset, memoryview(data)) == len(data)
        else:
            self.made.grow(nodeid, offset + len(data), memoryview(data))

    def read(self, nodeid: int) -> bytes:
        """All bytes of a file."""
        row = self.made.row(nodeid)
        return self.volume.read(row, 0, self.volume.namespace.size[row])

    def logged(self) -> dict[bytes, bytes]:
        """The files in the log, with their data, as a host sees them that has never been here; it must be clean."""
        assert self.memory.size
        report = check.examine(self.memory, "memory", HOST)
        assert report.clean, list(check.render(report))
        volume = Volume(self.memory, HOST, "memory")
        tree = volume.namespace
        found = {tree.path(node): volume.read(node, 0, tree.size[node]) for node in tree.walk()}
        assert len(found) == tree.replayed
        volume.close()
        return found


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


# -- one thing at a time ------------------------------------------------------------------------


def test_new_file(world: World) -> None:
    node = world.make(b"new")
    tree, row = world.volume.namespace, world.made.row(node)
    assert node >= FIRST_PROVISIONAL
    assert world.made.find(ns.ROOT, b"new") == node
    assert world.made.within(ns.ROOT, tree.published, -1) == [(0, node, b"new")]
    assert (tree.mode[row], tree.uid[row], tree.gid[row], tree.size[row]) == (stat.S_IFREG | 0o640, 3, 4, 0)
    assert tree.path(row) == b"new"
    assert world.logged() == {}


def test_released_file_is_logged_and_keeps_its_nodeid(world: World) -> None:
    node = world.make(b"new")
    world.write(node, 10, b"data")
    world.made.released(node)
    assert world.made.is_logged(node)
    logged = world.volume.namespace.lookup(ns.ROOT, b"new")
    assert world.made.row(node) == logged
    assert world.made.aliases == {logged: node}
    assert world.made.find(ns.ROOT, b"new") == 0
    assert world.logged() == {b"new": bytes(10) + b"data"}
    world.made.forget(node, 1)
    assert world.made.aliases == {}
    assert world.made.row(node) == 0


def test_empty_file_is_dropped(world: World) -> None:
    node = world.make(b"new")
    world.made.released(node)
    assert world.made.find(ns.ROOT, b"new") == 0
    assert world.logged() == {}
    again = world.make(b"new")
    assert again != node
    world.made.forget(node, 1)
    assert world.made.find(ns.ROOT, b"new") == again


def test_space_of_what_is_dropped_and_trimmed_comes_back(world: World) -> None:
    free = world.volume.space.free
    node = world.make(b"new")
    world.write(node, 9 * MIB, b"x")
    world.made.resize(node, 0)
    world.made.released(node)
    assert world.volume.space.free == free
    node = world.make(b"new")
    for at in range(10):
        world.write(node, at * MIB, b"x" * MIB)
    world.made.released(node)
    assert world.volume.space.free == free - 10 * MIB


def test_end_of_the_connection_logs_what_holds_anything(world: World) -> None:
    for name, data in ((b"one", b"1"), (b"none", b""), (b"two", b"22")):
        node = world.make(name)
        if data:
            world.write(node, 0, data)
    world.made.opened(node)
    world.made.end()
    assert world.logged() == {b"one": b"1", b"two": b"22"}
    assert world.volume.promised == {}
    world.made.end()
    assert world.volume.namespace.replayed == 2


@pytest.mark.parametrize("ends", [True, False])
def test_end_of_the_connection_while_a_file_is_changed(
    world: World, ends: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (b"changed", b"other"):
        world.write(world.make(name), 0, b"data")
    node = world.made.find(ns.ROOT, b"changed")
    go_on, begun = threading.Event(), threading.Event()

    def change() -> None:
        with world.made.changing(node):
            begun.set()
            go_on.wait(60)
            world.made.grow(node, 5 * MIB)

    world.made.begin_change(node)
    thread = threading.Thread(target=change)
    thread.start()
    begun.wait(60)
    if ends:
        threading.Timer(0.2, go_on.set).start()
    else:
        monkeypatch.setattr(provisional, "BROKEN_OFF_SECONDS", 0.1)
    world.made.end()
    expected = {b"other": b"data"}
    if ends:
        expected[b"changed"] = b"data" + bytes(5 * MIB - 4)
    else:
        assert caplog.messages == ["changed is lost: the mount has ended while it was changed"]
    assert world.logged() == expected
    go_on.set()
    thread.join()


def test_names_of_files_that_come_and_go_take_no_room(world: World) -> None:
    # Far more bytes of names than the namespace has room for.
    for number in range(40_000):
        node = world.make(b"%060d" % number)
        world.made.released(node)
        world.made.forget(node, 1)
    assert world.make(b"last")


def test_nodeids_are_not_used_twice(world: World) -> None:
    seen = set()
    for number in range(50):
        node = world.make(b"f%d" % number)
        world.write(node, 0, b"x")
        world.made.released(node)
        world.made.forget(node, 1)
        assert node not in seen
        seen.add(node)
        if number % 7 == 0:
            world.start()


def test_too_many_new_files(world: World) -> None:
    tree = world.volume.namespace
    tree.serial[:] = memoryview(bytes(range(1, 256)) * 8 * (PROVISIONAL_ROWS // 255 + 1))[: 8 * PROVISIONAL_ROWS].cast(
        "Q"
    )
    with pytest.raises(NoSpaceError, match="new files are open"):
        world.make(b"new")
    tree.serial[5] = 0
    assert world.make(b"new") % PROVISIONAL_ROWS == 5


def test_names_are_taken(world: World) -> None:
    world.make(b"new")
    world.volume.mkdir(b"dir", 0o755, 0, 0)
    for name in (b"new", b"dir"):
        with pytest.raises(ExistsError):
            world.make(name)
        with pytest.raises(ExistsError):
            world.volume.mkdir(name, 0o755, 0, 0)
        with pytest.raises(ExistsError):
            world.volume.create(NewFile(name, 1, 0o644, 0, 0))


def test_room_in_the_log_is_kept_for_new_files(world: World) -> None:
    world.volume.last_index = 1
    world.memory.write(0x200000, b"")
    header = world.volume._header()
    world.volume._header = lambda: type(header)(header.length, 1, header.next_seqnum, header.next_index, header.crc)  # type: ignore[method-assign]
    node = world.make(b"one")
    world.make(b"two")
    for act in (
        lambda: world.make(b"three"),
        lambda: world.volume.mkdir(b"three", 0o755, 0, 0),
        lambda: world.volume.create(NewFile(b"three", 1, 0o644, 0, 0)),
    ):
        with pytest.raises(LogFullError):
            act()
    world.write(node, 0, b"1")
    world.made.log(node)
    assert world.logged() == {b"one": b"1"}


# -- against a model ----------------------------------------------------------------------------


class Model:
    """A file as it should be."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.opens = 1
        self.lookups = 1
        self.data = bytearray()
        self.logged = False


class Machine(RuleBasedStateMachine):
    """Files that are made, grow, and are closed, in any order, with takeovers in between."""

    NAMES = tuple(b"f%d" % number for number in range(6))

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.files: dict[bytes, Model] = {}
        self.known: list[Model] = []
        self.step = 0

    def _new(self) -> list[Model]:
        return [file for file in self.files.values() if not file.logged]

    @rule(name=st.sampled_from(NAMES))
    def create(self, name: bytes) -> None:
        if name in self.files:
            with pytest.raises(ExistsError):
                self.world.make(name)
        else:
            self.files[name] = Model(self.world.make(name))
            self.known.append(self.files[name])

    @rule(name=st.sampled_from(NAMES), offset=st.integers(0, 5 * MIB), length=st.integers(1, 9000))
    def write(self, name: bytes, offset: int, length: int) -> None:
        file = self.files.get(name)
        if file is None or not file.opens:
            return
        self.step += 1
        data = bytes([self.step & 255 or 1]) * length
        if file.logged:
            data = data[: max(len(file.data) - offset, 0)]
        if data:
            self.world.write(file.node, offset, data)
            if len(file.data) < offset + len(data):
                file.data.extend(bytes(offset + len(data) - len(file.data)))
            file.data[offset : offset + len(data)] = data

    @rule(name=st.sampled_from(NAMES), size=st.one_of(st.just(0), st.integers(0, 5 * MIB)))
    def resize(self, name: bytes, size: int) -> None:
        file = self.files.get(name)
        if file is None or file.logged or not file.opens:
            return
        self.world.made.resize(file.node, size)
        del file.data[size:]
        file.data.extend(bytes(size - len(file.data)))
        file.logged = size > 0

    @rule(name=st.sampled_from(NAMES))
    def fsync(self, name: bytes) -> None:
        file = self.files.get(name)
        if file is not None and file.opens:
            self.world.made.log(file.node)
            file.logged = bool(file.data)

    @rule(name=st.sampled_from(NAMES))
    def open_once_more(self, name: bytes) -> None:
        file = self.files.get(name)
        if file is not None and file.lookups:
            self.world.made.opened(file.node)
            file.opens += 1

    @rule(name=st.sampled_from(NAMES))
    def look_up(self, name: bytes) -> None:
        file = self.files.get(name)
        if file is not None and file.lookups:
            self.world.made.remember(file.node)
            file.lookups += 1

    @rule(name=st.sampled_from(NAMES))
    def release(self, name: bytes) -> None:
        file = self.files.get(name)
        if file is None or not file.opens:
            return
        file.opens -= 1
        self.world.made.released(file.node)
        if not file.opens and not file.data:
            del self.files[name]
        elif not file.opens:
            file.logged = True

    @rule(pick=st.integers(0, 1 << 16), whole=st.booleans())
    def forget(self, pick: int, whole: bool) -> None:
        closed = [file for file in self.known if file.lookups and not file.opens]
        if closed:
            file = closed[pick % len(closed)]
            count = file.lookups if whole else 1
            file.lookups -= count
            self.world.made.forget(file.node, count)

    @rule(name=st.sampled_from(NAMES))
    def make_otherwise(self, name: bytes) -> None:
        if name in self.files:
            with pytest.raises(ExistsError):
                self.world.volume.create(NewFile(name, 5, 0o644, 0, 0))

    @rule()
    def take_over(self) -> None:
        self.world.start()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "world"):
            return
        made, tree = self.world.made, self.world.volume.namespace
        new = {node: name for _, node, name in made.within(ns.ROOT, self.world.volume.namespace.published, -1)}
        assert new == {f.node: name for name, f in self.files.items() if not f.logged}
        for name, file in self.files.items():
            assert made.find(ns.ROOT, name) == (0 if file.logged else file.node)
            assert bool(tree.lookup(ns.ROOT, name)) == file.logged
            if file.lookups or file.opens:
                assert made.is_logged(file.node) == file.logged
                assert made.opens(file.node) == file.opens
                assert tree.size[made.row(file.node)] == len(file.data)
        for file in self.known:
            if not file.lookups and not file.opens:
                assert made.row(file.node) == 0
        aliases = {tree.lookup(ns.ROOT, n): f.node for n, f in self.files.items() if f.logged and f.lookups + f.opens}
        assert made.aliases == aliases

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for name in list(self.files):
            if not self.files[name].logged:
                assert self.world.read(self.files[name].node) == self.files[name].data
        # Either each is closed, or the mount ends with all that are open.
        if len(self.files) % 2:
            self.world.made.end()
            self.files = {name: file for name, file in self.files.items() if file.data}
        for name in list(self.files):
            while name in self.files and self.files[name].opens:
                self.release(name)
        assert self.world.logged() == {name: bytes(file.data) for name, file in self.files.items()}
        self.world.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40 if PLACES > 1 else 1000, stateful_step_count=40)


# -- with a worker that dies --------------------------------------------------------------------


DATA = bytes(range(1, 251)) * 13000
"""More than one unit of allocation."""


def create(world: World, node: int) -> None:
    """As the kernel asks for it, the first time or again."""
    if not world.made.find(ns.ROOT, b"other"):
        world.make(b"other")


def write(world: World, node: int) -> None:
    world.write(node, len(DATA), b"x" * len(DATA))


def size(world: World, node: int) -> None:
    if not world.made.is_logged(node):
        world.made.resize(node, len(DATA) + 5)


def cut(world: World, node: int) -> None:
    if not world.made.is_logged(node):
        world.made.resize(node, 2 * MIB)


def fsync(world: World, node: int) -> None:
    if not world.made.is_logged(node):
        world.made.log(node)


OUTCOME: dict[Callable[[World, int], None], bytes] = {
    create: DATA,
    write: DATA + b"x" * len(DATA),
    size: DATA + bytes(5),
    cut: DATA[: 2 * MIB],
    fsync: DATA,
}


@contextmanager
def places(rng: random.Random) -> Iterator[Iterator[int]]:
    """Where to die: some of the lines, from the first to that behind the last."""
    yield iter(range(rng.randrange(PLACES), 100_000, PLACES))


def finish(world: World, node: int, expected: dict[bytes, bytes]) -> None:
    """Nothing is lost, nothing is shared, and nobody's space is given to anybody else."""
    world.volume.create(NewFile(b"later", 7 * MIB, 0o644, 0, 0))
    for name in (b"file", b"other", b"neighbour"):
        if found := world.made.find(ns.ROOT, name):
            world.made.released(found)
    world.made.settle(node)
    assert world.made.within(ns.ROOT, world.volume.namespace.published, -1) == []
    assert world.logged() == {**expected, b"neighbour": b"n" * 5000, b"later": bytes(7 * MIB)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("act", OUTCOME, ids=lambda act: act.__name__)
def test_death_at_any_line_loses_and_doubles_nothing(act: Callable[[World, int], None], rng: random.Random) -> None:
    with places(rng) as numbers:
        for place in numbers:
            world = World()
            node = world.make(b"file")
            world.write(node, 0, DATA)
            neighbour = world.make(b"neighbour")
            world.write(neighbour, 0, b"n" * 5000)
            died = dies(lambda world=world, node=node: act(world, node), place)
            world.start()
            act(world, node)
            finish(world, node, {b"file": OUTCOME[act]})
            world.close()
            if not died:
                return


@pytest.mark.timeout(600)
@pytest.mark.parametrize("data", [DATA, b""], ids=["full", "empty"])
def test_death_at_any_line_of_a_close(data: bytes, rng: random.Random) -> None:
    with places(rng) as numbers:
        for place in numbers:
            world = World()
            node = world.make(b"file")
            if data:
                world.write(node, 0, data)
            neighbour = world.make(b"neighbour")
            world.write(neighbour, 0, b"n" * 5000)
            died = dies(lambda world=world, node=node: world.made.released(node), place)
            world.start()
            # The request plane knows from the number of opens whether this one was counted.
            if world.made.opens(node):
                world.made.released(node)
            else:
                world.made.settle(node)
            assert world.made.find(ns.ROOT, b"file") == 0
            finish(world, node, {b"file": data} if data else {})
            world.made.forget(node, 1)
            assert world.made.row(node) == 0
            world.close()
            if not died:
                return


@pytest.mark.timeout(600)
def test_death_at_any_line_of_the_end(rng: random.Random) -> None:
    with places(rng) as numbers:
        for place in numbers:
            world = World()
            world.make(b"empty")
            world.write(world.make(b"one"), 0, b"1")
            world.write(two := world.make(b"two"), 0, b"22")
            world.made.opened(two)
            died = dies(world.made.end, place)
            world.start()
            world.made.end()
            assert world.logged() == {b"one": b"1", b"two": b"22"}
            assert world.volume.promised == {}
            world.close()
            if not died:
                return


@pytest.mark.timeout(600)
def test_death_at_any_line_of_an_append(rng: random.Random) -> None:
    with places(rng) as numbers:
        for place in numbers:
            world = World()
            node = world.make(b"file")
            world.write(node, 0, DATA)
            world.write(world.make(b"neighbour"), 0, b"n" * 5000)
            new = [NewFile(b"dir/a", 3 * MIB, 0o644, 0, 0), NewFile(b"dir/b", 5, 0o644, 0, 0)]

            def act(world: World = world, new: list[NewFile] = new) -> None:
                if not world.volume.namespace.lookup(ns.ROOT, b"dir"):
                    world.volume.mkdir(b"dir", 0o755, 1, 2)
                if not world.volume.namespace.resolve(b"dir/a"):
                    world.volume.create_many(new)

            died = dies(act, place)
            world.start()
            act()
            made = {b"file": DATA, b"dir": b"", b"dir/a": bytes(3 * MIB), b"dir/b": bytes(5)}
            finish(world, node, made)
            world.close()
            if not died:
                return


def test_nothing_of_what_lay_there_before_is_shown(world: World) -> None:
    """By a gap, behind the end on the last page (which a mapping shows), or after a truncate; wherever the file is."""
    world.memory.view[10 * MIB : 40 * MIB] = b"\xee" * (30 * MIB)
    tree = world.volume.namespace

    def pages(name: bytes) -> bytes:
        """The file, up to the end of its last page."""
        (extent,) = tree.fmap(tree.lookup(ns.ROOT, name)).extents
        length = whole_pages(tree.size[tree.lookup(ns.ROOT, name)])
        return bytes(world.memory.view[extent.offset : extent.offset + length])

    gap = world.make(b"gap")
    world.write(gap, 5000, b"a" * 100)
    world.write(gap, 9000, b"b" * 100)
    world.made.released(gap)
    assert pages(b"gap") == bytes(5000) + b"a" * 100 + bytes(3900) + b"b" * 100 + bytes(3188)
    sized = world.make(b"sized")
    world.made.resize(sized, 5000)
    assert pages(b"sized") == bytes(8192)
    cut = world.make(b"cut")
    world.write(cut, 0, b"c" * 9000)
    world.made.resize(cut, 4100)
    assert pages(b"cut") == b"c" * 4100 + bytes(4092)
    moved, other = world.make(b"moved"), world.make(b"other")
    world.write(moved, 0, b"d" * 10)
    world.write(other, 0, b"e")
    world.write(moved, 3 * MIB, b"f")
    world.made.released(moved)
    assert pages(b"moved") == b"d" * 10 + bytes(3 * MIB - 10) + b"f" + bytes(4095)


@pytest.mark.parametrize("offset", [0, 2500, 5000, 3 * MIB], ids=["again", "overlapping", "behind", "gap"])
def test_size_says_nothing_of_bytes_that_are_not_there_yet(
    world: World, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay there before would be shown to readers meanwhile, and for ever if the worker died just then."""
    world.memory.view[10 * MIB : 40 * MIB] = b"\xee" * (30 * MIB)
    node = world.make(b"file")
    world.write(node, 0, b"a" * 5000)
    tree, row = world.volume.namespace, world.made.row(node)
    looks = []
    store = world.memory.write

    def storing(at: int, data: memoryview) -> None:
        looks.append(tree.size[row])
        assert b"\xee" not in world.read(node)
        store(at, data)
        if bytes(data[:1]) == b"b":
            raise DeviceFaultError("the second half is poisoned")

    monkeypatch.setattr(world.memory, "write", storing)
    with pytest.raises(DeviceFaultError):
        world.write(node, offset, b"b" * 5000)
    monkeypatch.undo()
    assert set(looks) == {5000}
    assert b"\xee" not in world.read(node)
    world.made.released(node)
    ((name, data),) = world.logged().items()
    assert (name, len(data)) == (b"file", 5000)


def test_log_that_fails_leaves_the_file_as_it_was(world: World) -> None:
    node = world.make(b"file")
    world.write(node, 0, b"data")
    world.volume.namespace.foreign_writer = True
    with pytest.raises(FamfsError, match="somebody else"):
        world.made.log(node)
    assert world.made.find(ns.ROOT, b"file") == node
    world.volume.namespace.foreign_writer = False
    world.made.log(node)
    assert world.logged() == {b"file": b"data"}


def test_a_file_that_was_dropped_takes_no_name_away_when_its_close_is_told_again(world: World) -> None:
    """Found by fuzzing: a RELEASE that is sent again after a takeover may come when somebody else has the name."""
    dropped = world.make(b"name")
    world.made.released(dropped)
    again = world.make(b"name")
    assert again != dropped
    world.made.settle(dropped)
    assert world.made.find(ns.ROOT, b"name") == again
    world.write(again, 0, b"data")
    world.made.released(again)
    assert world.logged() == {b"name": b"data"}
