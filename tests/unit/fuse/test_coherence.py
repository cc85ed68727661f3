# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one memory whose caches know nothing of each other: what one has made the other sees, whatever it has in
its cache. On the devices of all other tests, which have one cache, a line that nobody writes back or invalidates is
never missed."""

import os
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest

from famfs_server.errors import FamfsError, RoleError
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.volume import check
from famfs_server.volume import namespace as ns
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.replay import Damage
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, IncoherentMemory, ScratchMemory, formatted

OTHER = UUID(int=99)
MANY = 40
"""Log entries: each second one begins in a line that holds the end of the one before."""


class Hosts:
    """A master and a client, each behind a cache of its own. Bytes are read in one of the planes' two ways."""

    def __init__(self, views: bool) -> None:
        self._views = views
        self.shared = ScratchMemory()
        formatted(self.shared)
        self.master, self.client = self.mount(HOST), self.mount(OTHER)

    def mount(self, host: UUID) -> FileSystem:
        """A file system as a worker of that host makes it."""
        return FileSystem(Volume(IncoherentMemory(self.shared), host, "memory"), Settings(b"/run/here"))

    def content(self, fs: FileSystem, name: bytes) -> bytes:
        """A file's bytes as a READ on that host gives them."""
        node = fs.lookup(ns.ROOT, name)
        size = fs.attr(node)[1]
        return b"".join(map(bytes, fs.views(node, 0, size))) if self._views else fs.read(node, 0, size)


@pytest.fixture(params=[True, False], ids=["views", "copies"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    hosts = Hosts(request.param)
    yield hosts
    hosts.master.volume.close()
    hosts.client.volume.close()


def by_tool(fs: FileSystem, name: bytes, data: bytes) -> None:
    """As `famfs creat` and a program that fills the file."""
    node = fs.volume.create(NewFile(name, len(data), 0o644, 0, 0))
    assert fs.write(node, 0, memoryview(data)) == len(data)


def by_copy(fs: FileSystem, name: bytes, data: bytes) -> None:
    """As `famfs cp`."""
    with fs.volume.reserve([NewFile(name, len(data), 0o644, 0, 0)]) as reservation:
        reservation.write(0, 0, memoryview(data))
        reservation.filled()
        reservation.log()


def by_calls(fs: FileSystem, name: bytes, data: bytes) -> None:
    """As `cp`, in two pieces with a gap that is filled later."""
    node, _ = fs.create(ns.ROOT, name, os.O_RDWR, 0o644, 0, 0)
    half = len(data) // 2
    fs.write(node, half, memoryview(data[half:]))
    fs.write(node, 0, memoryview(data[:half]))
    fs.release(node)
    fs.forget(node, 1)


@pytest.mark.parametrize("make", [by_tool, by_copy, by_calls])
def test_whatever_is_made_is_seen_with_its_bytes(
    hosts: Hosts, make: Callable[[FileSystem, bytes, bytes], None]
) -> None:
    for number in range(MANY):
        name, data = b"f%d" % number, bytes([number + 1]) * (200 + number)
        assert hosts.client.lookup(ns.ROOT, name) == 0
        make(hosts.master, name, data)
        assert hosts.content(hosts.client, name) == data
        assert hosts.content(hosts.master, name) == data
    assert [name for _, _, name in hosts.client.entries(ns.ROOT, 0)][3:] == [b"f%d" % number for number in range(MANY)]


def test_directories_and_a_mount_that_comes_later(hosts: Hosts) -> None:
    for number in range(MANY):
        node = hosts.master.mkdir(ns.ROOT, b"d%d" % number, 0o755, 0, 0)
        assert hosts.client.lookup(ns.ROOT, b"d%d" % number) == node
    late = hosts.mount(UUID(int=7))
    assert late.volume.namespace.replayed == MANY
    assert check.examine(IncoherentMemory(hosts.shared), "memory", None).clean
    late.volume.close()


def test_bytes_go_to_and_fro(hosts: Hosts) -> None:
    by_tool(hosts.master, b"file", bytes(5000))
    expected = bytearray(5000)
    for turn, writer in enumerate((hosts.client, hosts.master) * 5):
        piece = bytes([turn + 1]) * 1000
        assert hosts.content(writer, b"file") == expected
        writer.write(writer.lookup(ns.ROOT, b"file"), 700 + 300 * turn, memoryview(piece))
        expected[700 + 300 * turn : 700 + 300 * turn + 1000] = piece
        for reader in (hosts.client, hosts.master):
            assert hosts.content(reader, b"file") == expected


def test_stores_of_others_are_written_back_by_fsync(hosts: Hosts) -> None:
    by_tool(hosts.master, b"file", bytes(5000))
    assert hosts.content(hosts.client, b"file") == bytes(5000)
    node = hosts.master.lookup(ns.ROOT, b"file")
    # As a program does that has the file mapped on the same host.
    (memory, offset, _) = hosts.master.volume._ranges(node, 0, 5000)[0]
    memory.write(offset + 100, b"stored")
    assert b"stored" not in hosts.content(hosts.client, b"file")
    hosts.master.fsync(node)
    assert hosts.content(hosts.client, b"file")[100:106] == b"stored"


def test_new_space_shows_zeroes_on_the_other_host(hosts: Hosts) -> None:
    end = hosts.master.volume.log_end
    hosts.shared.view[end : end + 65536] = b"\xee" * 65536
    hosts.master.volume.create(NewFile(b"file", 5000, 0o644, 0, 0))
    assert hosts.content(hosts.client, b"file") == bytes(5000)
    assert bytes(hosts.shared.view[end : end + 8192]) == bytes(8192)


def test_a_second_master_is_noticed(hosts: Hosts) -> None:
    hosts.master.mkdir(ns.ROOT, b"mine", 0o755, 0, 0)
    second = hosts.mount(HOST)
    second.mkdir(ns.ROOT, b"theirs", 0o755, 0, 0)
    with pytest.raises(RoleError, match="somebody else"):
        hosts.master.mkdir(ns.ROOT, b"more", 0o755, 0, 0)
    assert hosts.master.lookup(ns.ROOT, b"theirs")
    second.volume.close()


@pytest.mark.parametrize("entries", [0, 1, 5])
@pytest.mark.parametrize("host", ["master", "client"])
def test_a_file_system_that_is_made_anew_is_noticed(hosts: Hosts, host: str, entries: int) -> None:
    hosts.master.mkdir(ns.ROOT, b"d", 0o755, 0, 0)
    fs = hosts.master if host == "master" else hosts.client
    assert fs.lookup(ns.ROOT, b"d")
    make_filesystem(IncoherentMemory(hosts.shared), "memory", UUID(int=3), log_length=LOG_LENGTH)
    other = hosts.mount(UUID(int=3))
    for number in range(entries):
        other.mkdir(ns.ROOT, b"d%d" % number, 0o755, 0, 0)
    other.volume.close()
    before = bytes(hosts.shared.view[: 3 << 20])
    with pytest.raises((FamfsError, OSError)):
        fs.mkdir(ns.ROOT, b"e", 0o755, 0, 0)
    if entries == 1 and host == "client":
        # The one word that a lookup looks at is as it was; the poll looks at more.
        assert not fs.follow()
        with pytest.raises(OSError, match="Input/output"):
            fs.follow(thorough=True)
    with pytest.raises(OSError, match="Input/output"):
        fs.lookup(ns.ROOT, b"e")
    assert fs.volume.stop is not None
    assert fs.volume.stop.damage is Damage.REPLACED
    assert bytes(hosts.shared.view[: 3 << 20]) == before
