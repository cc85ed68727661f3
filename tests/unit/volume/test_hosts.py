# SPDX-License-Identifier: Apache-2.0
"""Several hosts on one memory against a plain dictionary: whatever happens, all show the same tree and bytes."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from stat import S_ISDIR
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from famfs_server.errors import ExistsError, FamfsError, MediaError, NoSuchPathError, RoleError
from famfs_server.omf import layout
from famfs_server.volume import check
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.provisional import Provisional
from famfs_server.volume.replay import Damage
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, CrashMemory, PowerCutError

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
pytestmark = pytest.mark.timeout(900 if LONG else 120)

CLIENTS = (UUID(int=7), UUID(int=8))
NAMES = (b"a", b"b", b"c", b"d/a", b"d/b", b"d/e/a", b"e", b"d", b"d/e", b"f\xff")
APPEND_STEPS = 14
"""A power cut comes before one of so many steps; batches with data have more, which the cut then does not reach."""


@dataclass(frozen=True)
class Entry:
    """What the model knows of a file or directory: data are None for a directory."""

    mode: int
    uid: int
    gid: int
    data: bytes | None = None


Tree = dict[bytes, Entry]


def tree_of(volume: Volume) -> Tree:
    """Everything that a host shows."""
    names = volume.namespace
    found: Tree = {}
    for node in names.walk():
        mode = names.mode[node]
        data = None if S_ISDIR(mode) else volume.read(node, 0, names.size[node])
        found[names.path(node)] = Entry(mode & 0o7777, names.uid[node], names.gid[node], data)
    return found


class Hosts(RuleBasedStateMachine):
    """A master and two clients. `tree` is what the log holds; every host must show it after a look at the log."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.memory = CrashMemory(1 << 30)
        self.generation = 1
        self.make()
        self.states = [os.memfd_create("state") for _ in range(3)]
        self.tree: Tree = {}
        self.start()

    def make(self) -> None:
        """A new file system."""
        uuid = UUID(int=self.generation << 100)
        make_filesystem(self.memory, "memory", HOST, log_length=LOG_LENGTH, uuid=uuid, device_uuid=UUID(int=2))

    def start(self) -> None:
        """All hosts mount."""
        self.master = self.mounted(HOST, self.states[0])
        self.clients = [self.mounted(host, state) for host, state in zip(CLIENTS, self.states[1:], strict=True)]

    def mounted(self, host: UUID, state: int, *, anew: bool = True) -> Volume:
        """A host's volume: mounted `anew`, or taken over from a worker that has died."""
        if anew:
            os.ftruncate(state, 0)
        return Volume(self.memory, host, "memory", state=os.dup(state))

    def hosts(self) -> list[Volume]:
        return [self.master, *self.clients]

    @contextmanager
    def expected(self, paths: list[bytes]) -> Iterator[None]:
        """The refusal that the model foresees for new paths, if any."""
        refusal: type[FamfsError] | None = None
        seen: set[bytes] = set()
        for path in paths:
            head = path.rpartition(b"/")[0]
            if head and head not in self.tree:
                refusal = NoSuchPathError
            elif head and self.tree[head].data is not None:
                refusal = FamfsError
            elif path in self.tree or path in seen:
                refusal = ExistsError
            if refusal:
                break
            seen.add(path)
        if refusal is None:
            yield
            return
        before = dict(self.tree)
        with pytest.raises(refusal):
            yield
        self.tree = before

    def new_files(self, names: list[bytes], sizes: list[int]) -> tuple[list[NewFile], Tree]:
        files, entries = [], {}
        for name, size in zip(names, sizes, strict=False):
            mode, uid, gid = self.rng.randrange(0o10000), self.rng.randrange(9), self.rng.randrange(9)
            files.append(NewFile(name, size, mode, uid, gid))
            entries[name] = Entry(mode, uid, gid, bytes(size))
        return files, entries

    # -- what the master does -------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES))
    def mkdir(self, name: bytes) -> None:
        with self.expected([name]):
            self.master.mkdir(name, 0o750, 1, 2)
            self.tree[name] = Entry(0o750, 1, 2)

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
        sizes=st.lists(st.integers(1, 9000), min_size=4, max_size=4),
    )
    def create(self, names: list[bytes], sizes: list[int]) -> None:
        files, entries = self.new_files(names, sizes)
        with self.expected(names):
            self.master.create_many(files)
            self.tree |= entries

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
        sizes=st.lists(st.integers(1, 9000), min_size=4, max_size=4),
        completed=st.booleans(),
    )
    def copy_in(self, names: list[bytes], sizes: list[int], completed: bool) -> None:
        files, entries = self.new_files(names, sizes)
        with self.expected(names), self.master.reserve(files) as reservation:
            for number, new in enumerate(files):
                data = self.rng.randbytes(new.size)
                reservation.write(number, 0, memoryview(data))
                entries[new.path] = replace(entries[new.path], data=data)
            # Nobody sees any of it yet.
            self.all_agree()
            if completed:
                reservation.filled()
                reservation.log()
                self.tree |= entries

    @rule(name=st.sampled_from(NAMES), size=st.integers(0, 9000))
    def system_calls(self, name: bytes, size: int) -> None:
        head, _, last = name.rpartition(b"/")
        parent = self.master.namespace.resolve(head)
        if not parent or not self.master.namespace.is_directory(parent):
            return
        made = Provisional(self.master)
        with self.expected([name]):
            node = made.create(parent, last, 0o640, 3, 4)
            data = self.rng.randbytes(size)
            if size:
                made.grow(node, size, memoryview(data))
            self.all_agree()
            made.released(node)
            made.forget(node, 1)
            if size:
                self.tree[name] = Entry(0o640, 3, 4, data)

    # -- what every host does -------------------------------------------------------------------

    @rule(which=st.integers(0, 2), name=st.sampled_from(NAMES), offset=st.integers(0, 9000))
    def write(self, which: int, name: bytes, offset: int) -> None:
        host = self.hosts()[which]
        host.refresh()
        entry = self.tree.get(name)
        if entry is None or entry.data is None:
            return
        node = host.namespace.resolve(name)
        data = self.rng.randbytes(self.rng.randrange(1, 300))
        kept = data[: max(len(entry.data) - offset, 0)]
        assert host.write(node, offset, memoryview(data)) == len(kept)
        whole = entry.data[:offset] + kept + entry.data[offset + len(kept) :]
        self.tree[name] = replace(entry, data=whole[: len(entry.data)])

    @rule(which=st.integers(0, 1), name=st.sampled_from(NAMES))
    def client_creates(self, which: int, name: bytes) -> None:
        with pytest.raises(RoleError):
            self.clients[which].mkdir(name, 0o755, 0, 0)

    @rule(which=st.integers(0, 2), anew=st.booleans())
    def restart(self, which: int, anew: bool) -> None:
        volume = self.hosts()[which]
        volume.close()
        fresh = self.mounted((HOST, *CLIENTS)[which], self.states[which], anew=anew)
        if which:
            self.clients[which - 1] = fresh
        else:
            self.master = fresh

    # -- what should not happen -----------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        kind=st.sampled_from(("mkdir", "create", "copy")),
        steps=st.integers(0, APPEND_STEPS),
    )
    def power_cut(self, name: bytes, kind: str, steps: int) -> None:
        """The master stops before one of the steps, and what no fence had settled is lost or not."""
        data = self.rng.randbytes(100)
        entry = Entry(0o700, 5, 6, None if kind == "mkdir" else bytes(100) if kind == "create" else data)
        new = NewFile(name, 100, 0o700, 5, 6)

        def act() -> None:
            if kind == "mkdir":
                self.master.mkdir(name, 0o700, 5, 6)
            elif kind == "create":
                self.master.create(new)
            else:
                with self.master.reserve([new]) as reservation:
                    reservation.write(0, 0, memoryview(data))
                    reservation.filled()
                    reservation.log()

        self.memory.steps_left = steps
        try:
            act()
        except PowerCutError:
            pass
        except FamfsError:
            entry = self.tree.get(name)  # type: ignore[assignment]
        for _ in self.memory.crash(self.rng):
            pass
        self.master.close()
        self.master = self.mounted(HOST, self.states[0])
        if self.master.namespace.resolve(name) and name not in self.tree:
            self.tree[name] = entry

    @rule(value=st.sampled_from((0, 1, 2**64 - 1)))
    def other_counter_is_wrong(self, value: int) -> None:
        """Readers trust next_index alone, and the next append mends the other counter."""
        self.memory.store_u64(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, value)
        self.settle()

    @rule(name=st.sampled_from(NAMES), byte=st.integers(0, layout.LOG_ENTRY_SIZE - 1))
    def half_visible(self, name: bytes, byte: int) -> None:
        """A client looks while the last entry is not whole yet: it shows the rest, and the entry when it is."""
        if name in self.tree:
            return
        parent = name.rpartition(b"/")[0]
        if parent and (parent not in self.tree or self.tree[parent].data is not None):
            return
        for client in self.clients:
            client.refresh()
        node = self.master.mkdir(name, 0o755, 0, 0)
        place = layout.entry_offset(node - 16) + byte
        whole = self.memory.view[place]
        self.memory.view[place] = whole ^ 0x55
        client = self.clients[self.rng.randrange(2)]
        client.refresh()
        assert client.lagging
        assert tree_of(client) == self.tree
        self.memory.view[place] = whole
        self.tree[name] = Entry(0o755, 0, 0)

    @rule(name=st.sampled_from(NAMES))
    def second_master(self, name: bytes) -> None:
        """Another host with the master's UUID writes: the first one writes no more until it is mounted again."""
        second = Volume(self.memory, HOST, "memory")
        try:
            with self.expected([name]):
                second.mkdir(name, 0o711, 8, 9)
                self.tree[name] = Entry(0o711, 8, 9)
        finally:
            second.close()
        if self.tree.get(name) == Entry(0o711, 8, 9) and self.master.stale():
            with pytest.raises(RoleError):
                self.master.mkdir(b"never", 0o755, 0, 0)
            self.restart(0, anew=True)

    @rule()
    def made_anew(self) -> None:
        """mkfs on the device under all of them: nobody mixes the two file systems."""
        self.generation += 1
        self.make()
        self.settle()
        for host in self.hosts():
            host.refresh()
            assert host.stop is not None
            assert host.stop.damage is Damage.REPLACED
            with pytest.raises((MediaError, RoleError)):
                host.mkdir(b"never", 0o755, 0, 0)
        for host, state in zip((HOST, *CLIENTS), self.states, strict=True):
            with pytest.raises(MediaError, match="another file system"):
                self.mounted(host, state, anew=False)
        for volume in self.hosts():
            volume.close()
        self.tree = {}
        self.start()

    # -- what must always hold ------------------------------------------------------------------

    def settle(self) -> None:
        """Changes by others are in memory."""
        self.memory.write_back(0, layout.LOG_OFFSET + LOG_LENGTH)
        self.memory.fence()

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "memory"):
            return
        for host in self.hosts():
            host.refresh()
            assert host.stop is None
            assert not host.lagging
            assert tree_of(host) == self.tree

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        # An append mends the counter that readers do not trust.
        self.master.mkdir(b"last", 0o755, 0, 0)
        report = check.examine(self.memory, "memory", HOST)
        assert report.clean, list(check.render(report))
        for host in self.hosts():
            host.close()
        for state in self.states:
            os.close(state)
        self.memory.close()


TestHosts = Hosts.TestCase
TestHosts.settings = settings(max_examples=40 if not LONG else 600, stateful_step_count=30)
