# SPDX-License-Identifier: Apache-2.0
"""What watchers are told: every entry once and in order, and what happens to the volume as a whole."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from famfs_server.daemon.watch import SOME, Event, Watcher, lines
from famfs_server.errors import UsageError
from famfs_server.omf import append, layout, log
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, ScratchMemory, formatted

OTHER = UUID(int=99)


class Hosts:
    """A master and a client on one memory, and a watcher on the client."""

    def __init__(self) -> None:
        self.memory = ScratchMemory()
        formatted(self.memory)
        self.master = Volume(self.memory, HOST, "memory")
        self.client = Volume(self.memory, OTHER, "memory")
        self.watcher = Watcher(self.client)

    def told(self) -> list[Event]:
        """What there is to tell after a look at the log."""
        self.client.refresh()
        found: list[Event] = []
        while self.watcher.is_behind:
            found += self.watcher.take()
        return found

    def entry(self, data: bytes) -> None:
        """Append an entry that this package would not write."""
        append.append(self.memory, self.client.namespace.replayed, data)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.master.close()
    hosts.client.close()


def test_entries(hosts: Hosts) -> None:
    assert hosts.watcher.begin() == {"event": "begin", "uuid": str(UUID(int=1)), "role": "client", "index": 0}
    assert hosts.told() == []
    hosts.master.mkdir(b"d", 0o1750, 1, 2)
    hosts.master.create(NewFile(b"d/\xff", 5000, 0o640, 3, 4))
    directory, file = hosts.told()
    assert directory == {
        "event": "directory",
        "index": 0,
        "nodeid": 16,
        "path": "d",
        "mode": 0o1750,
        "uid": 1,
        "gid": 2,
    }
    assert file == {
        "event": "file",
        "index": 1,
        "nodeid": 17,
        "path": "d/\udcff",
        "mode": 0o640,
        "uid": 3,
        "gid": 4,
        "size": 5000,
    }
    assert hosts.told() == []
    assert json.loads(lines(iter([file]))) == file


def test_many_entries_come_in_steps_and_from_any_place(hosts: Hosts) -> None:
    count = 2 * SOME + 10
    hosts.master.create_many([NewFile(b"f%d" % number, 1, 0o644, 0, 0) for number in range(count)])
    hosts.client.refresh()
    assert len(list(hosts.watcher.take())) == SOME
    assert [event["index"] for event in hosts.told()] == list(range(SOME, count))
    late = Watcher(hosts.client, count - 2)
    assert [event["path"] for event in late.take()] == [f"f{count - 2}", f"f{count - 1}"]
    with pytest.raises(UsageError, match=f"has {count} entries"):
        Watcher(hosts.client, count + 1)


def test_skipped_entries_and_devices(hosts: Hosts) -> None:
    extent = Fmap((Extent(0, 0, layout.ALLOC_UNIT),))
    hosts.entry(log.build_files(0, [log.FileRecord(b"bad", 1, 0o644, 0, 0, extent)]))
    assert hosts.told() == [{"event": "skipped", "index": 0, "why": "in_metadata"}]
    hosts.entry(log.build_add_daxdev(1, device=1, size=1 << 30, uuid=UUID(int=7)))
    assert hosts.told() == [{"event": "device", "index": 1, "uuid": str(UUID(int=7)), "size": 1 << 30}]


def damaged(hosts: Hosts, index: int) -> bytes:
    """Break an entry; what it was."""
    place = layout.entry_offset(index)
    before = bytes(hosts.memory.view[place : place + layout.LOG_ENTRY_SIZE])
    hosts.memory.view[place : place + 4] = bytes(4)
    return before


def test_damage_is_told_once_and_lagging_is_none(hosts: Hosts) -> None:
    def summary(events: list[Event]) -> list[tuple[Any, ...]]:
        return [(event["event"], event["index"], event.get("what")) for event in events]

    hosts.master.mkdir(b"a", 0o755, 0, 0)
    hosts.master.mkdir(b"b", 0o755, 0, 0)
    whole = damaged(hosts, 1)
    assert summary(hosts.told()) == [("directory", 0, None)]
    assert hosts.client.lagging
    place = layout.entry_offset(1)
    hosts.memory.view[place : place + layout.LOG_ENTRY_SIZE] = whole
    assert summary(hosts.told()) == [("directory", 1, None)]
    hosts.master.mkdir(b"c", 0o755, 0, 0)
    hosts.master.mkdir(b"d", 0o755, 0, 0)
    damaged(hosts, 2)
    assert summary(hosts.told()) == [("damage", 2, "corrupt")]
    assert hosts.told() == []


def test_another_look_at_a_half_visible_entry_is_no_damage(hosts: Hosts) -> None:
    hosts.master.mkdir(b"a", 0o755, 0, 0)
    assert len(hosts.told()) == 1
    hosts.master.mkdir(b"b", 0o755, 0, 0)
    damaged(hosts, 1)
    assert hosts.told() == []
    seen: list[bool] = []
    hosts.client.give_way = lambda: seen.append(hosts.watcher.is_behind)
    hosts.client.refresh()
    assert seen
    assert not any(seen)
    assert hosts.client.lagging


def test_a_file_system_made_anew_ends_it(hosts: Hosts) -> None:
    hosts.master.mkdir(b"a", 0o755, 0, 0)
    assert len(hosts.told()) == 1
    hosts.memory.view[8:16] = bytes(8)
    formatted(hosts.memory)
    (event,) = hosts.told()
    assert event["event"] == "replaced"
    assert "unmount" in event["message"]
    assert hosts.watcher.ended


def test_a_second_master_is_told(hosts: Hosts) -> None:
    first = Watcher(hosts.master)
    second = Volume(hosts.memory, HOST, "memory")
    second.mkdir(b"a", 0o755, 0, 0)
    hosts.master.refresh()
    assert [event["event"] for event in first.take()] == ["directory", "foreign_writer"]
    assert not first.is_behind
    second.close()
