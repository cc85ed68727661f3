# SPDX-License-Identifier: Apache-2.0
"""New files on a device in famfs mode: their space is reached through files that the kernel maps for the server alone,
and no two inodes ever stand for one page (findings 1.7, 1.8)."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import pytest

from famfs_server.daemon.control_client import ControlClient, FileRequest
from famfs_server.omf import layout
from tests.twin import trees
from tests.twin.connection import Op
from tests.twin.kernel import Inode, OpenFile
from tests.twin.maps import PAGE, PMD, Dialect
from tests.twin.server import Twin

END = layout.LOG_OFFSET + trees.LOG_LENGTH
SIZE = END + 24 * PMD
OLD = b"a former owner's bytes "


class Site:
    """A small device full of old bytes, in famfs mode, and what its kernel was asked."""

    def __init__(self, path: Path, dialect: Dialect, *words: str) -> None:
        image = path / "dax.img"
        trees.empty(image, SIZE).close()
        with image.open("r+b") as file:
            file.seek(END)
            file.write((OLD * (PMD // len(OLD) + 1))[:PMD] * 24)
        self.opcodes: list[int] = []
        self.twin = Twin(
            image,
            dialect,
            words=(f"dialect={dialect.value}", *words),
            host=trees.MASTER,
            metadata_end=END,
            famfs_mode=True,
            watch=lambda exchange: self.opcodes.append(exchange.opcode),
        )
        self.kernel = self.twin.mount()
        self.run_directory = str(image.with_suffix(".run"))

    def create(self, name: bytes) -> OpenFile:
        return self.kernel.openat(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def on_device(self, inode: Inode) -> bytes:
        """The bytes that other hosts find where the map says that the file is."""
        assert inode.map is not None
        memory = self.twin.devices[0].memory
        return b"".join(bytes(memory[e.offset : e.offset + e.length]) for e in inode.map.ranges())

    def reopen(self, name: bytes) -> OpenFile:
        """Open a file as the next program does, and check that the kernel maps it."""
        opened = self.kernel.openat(name, os.O_RDWR)
        assert opened.inode.map is not None
        assert not self.kernel.spaces, "nobody holds what the map shows"
        return opened

    def beside(self, call: Callable[[], object]) -> object:
        """The result of a call that waits for the server, while the kernel does its part."""
        results: list[object] = []

        def act() -> None:
            try:
                results.append(call())
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=act)
        thread.start()
        while thread.is_alive():
            self.kernel.pump(0.01)
        return results[0]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, Dialect.PULL)
    yield site
    site.kernel.require_silence()
    assert site.twin.end() == 0, site.twin.log()


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.value)
def every_site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, request.param)
    yield site
    site.kernel.require_silence()
    assert site.twin.end() == 0, site.twin.log()


def new_file(path: bytes, size: int) -> FileRequest:
    return FileRequest(path, size, 0o644, 0, 0)


def test_every_way_to_make_a_file(every_site: Site) -> None:
    """ftruncate, fallocate, writing, and the tools: no old byte is ever seen, and what was written is on the device."""
    site, kernel = every_site, every_site.kernel
    sized = site.create(b"sized")
    kernel.truncate(sized, PMD + 5)
    # It is logged, and its creator goes on writing and reading through the descriptor that has no map.
    assert kernel.read(sized, PMD, 100) == bytes(5)
    assert kernel.write(sized, 3, b"late") == 4
    assert kernel.read(sized, 0, 8) == b"\0\0\0late\0"
    kernel.close_file(sized)
    allocated = site.create(b"allocated")
    kernel.allocate(allocated, 0, 70_000)
    kernel.close_file(allocated)
    written = site.create(b"written")
    for step in range(5):
        assert kernel.write(written, step * 700_000, bytes([step + 1]) * 700_000) == 700_000
    kernel.close_file(written)
    with_hole = site.create(b"hole")
    kernel.write(with_hole, 5000, b"behind")
    kernel.close_file(with_hole)
    client = ControlClient(site.run_directory)
    data = b"copied in" * 1000
    put = [new_file(b"copied", len(data)), new_file(b"copied too", 5)]
    assert isinstance(site.beside(lambda: client.put(put, [memoryview(data), memoryview(b"hello")])), list)
    assert isinstance(site.beside(lambda: client.create([new_file(b"made", 3 * PMD)])), list)
    expected = {
        b"sized": b"\0\0\0late" + bytes(PMD - 2),
        b"allocated": bytes(70_000),
        b"written": b"".join(bytes([step + 1]) * 700_000 for step in range(5)),
        b"hole": bytes(5000) + b"behind",
        b"copied": data,
        b"copied too": b"hello",
        b"made": bytes(3 * PMD),
    }
    for name, content in expected.items():
        opened = site.reopen(name)
        assert opened.inode.size == len(content)
        assert kernel.read(opened, 0, 4 * PMD) == content
        shown = -(-len(content) // PAGE) * PAGE
        assert site.on_device(opened.inode)[:shown] == content.ljust(shown, b"\0"), name
    assert Op.UNLINK in site.opcodes
    # The files of space are not to be seen, and nothing else can be removed there.
    names = {name for name, _ in kernel.names(kernel.resolve(b".meta"))}
    assert names == {b".", b"..", b".superblock", b".log"}
    with pytest.raises(PermissionError):
        kernel.call(Op.UNLINK, 3, b".log\0")


def test_map_waits_until_the_space_is_forgotten(site: Site) -> None:
    kernel = site.kernel
    kernel.keep_spaces = True
    created = site.create(b"new")
    kernel.write(created, 0, b"data")
    kernel.close_file(created)
    held = kernel.send(Op.GET_FMAP, kernel.lookup(kernel.root(), b"new").nodeid, b"")
    # Nobody else waits for that.
    kernel.mkdir(kernel.root(), b"directory")
    other = site.create(b"other")
    kernel.write(other, 0, b"other data")
    kernel.close_file(other)
    kernel.require_silence(0.05)
    assert not kernel.answered(held)
    (space, *_) = kernel.kept
    kernel.close_file(space)
    error, _ = kernel.receive(held)
    assert error == 0
    for space in kernel.kept[1:]:
        kernel.close_file(space)
    kernel.keep_spaces = False
    assert kernel.read(site.reopen(b"other"), 0, 20) == b"other data"


def test_killed_worker(site: Site) -> None:
    """It loses its mappings, and its successor reaches the same space again when the kernel has forgotten it."""
    kernel = site.kernel
    created = site.create(b"new")
    kernel.write(created, 0, b"before ")
    logged = site.create(b"logged")
    kernel.truncate(logged, PMD)
    site.twin.succeed()
    assert kernel.read(created, 0, 100) == b"before "
    assert kernel.write(created, 7, b"after") == 5
    assert kernel.write(created, 3 * PMD, b"end") == 3
    assert kernel.write(logged, PMD - 3, b"end") == 3
    site.twin.succeed()
    kernel.close_file(created)
    kernel.close_file(logged)
    assert kernel.read(site.reopen(b"new"), 0, 4 * PMD) == (b"before after").ljust(3 * PMD, b"\0") + b"end"
    assert kernel.read(site.reopen(b"logged"), 0, PMD) == bytes(PMD - 3) + b"end"


def test_killed_while_the_space_is_opened(site: Site) -> None:
    """Whatever the dead worker had in hand is done once, by another file of space."""
    kernel = site.kernel
    created = site.create(b"new")
    body = Struct("<QQIIQII").pack(created.handle, 0, 4, 0, 0, 0, 0) + b"data"
    unique = kernel.send(Op.WRITE, created.inode.nodeid, body)
    kernel.lose(unique)
    site.twin.succeed()
    error, payload = kernel.receive(unique)
    assert (error, payload[:4]) == (0, b"\4\0\0\0")
    created.inode.size = 4
    kernel.close_file(created)
    assert kernel.read(site.reopen(b"new"), 0, 10) == b"data"


def test_space_that_is_used_up(site: Site) -> None:
    kernel = site.kernel
    first = site.create(b"first")
    with pytest.raises(OSError, match="No space left"):
        kernel.truncate(first, 25 * PMD)
    kernel.write(first, 0, b"x" * 5000)
    kernel.close_file(first)
    client = ControlClient(site.run_directory)
    files = [{"path": "cut", "size": 23 * PMD, "mode": 0o644, "uid": 0, "gid": 0}]
    unsealed = json.dumps({"files": files}).encode() + b"\n" + bytes(23 * PMD) + b"?"
    for _ in range(2):
        # What is given up comes back, and not before the kernel has forgotten it.
        error = site.beside(lambda: client.request("PUT", "/files", unsealed))
        assert "does not end with a newline" in str(error)
    last = site.create(b"last")
    kernel.truncate(last, 23 * PMD)
    kernel.close_file(last)
    assert kernel.read(site.reopen(b"last"), 0, 23 * PMD) == bytes(23 * PMD)
    with pytest.raises(OSError, match="No space left"):
        kernel.write(site.create(b"none"), 0, b"x")
