# SPDX-License-Identifier: Apache-2.0
"""What a successor's request plane does about what a dead worker had in hand: what counts how often the kernel has a
nodeid counts once, and a request that has killed two workers is not carried out again."""

import errno
import os
import random
import socket
import threading
from collections.abc import Callable
from struct import Struct

import pytest

from deaths import dies
from famfs_server.dax.partial import PartialMemory
from famfs_server.fuse import abi
from famfs_server.fuse.abi import UNIQUE_RESEND, Opcode
from famfs_server.fuse.filesystem import LONG, FileSystem, Settings
from famfs_server.fuse.requests import RequestPlane
from famfs_server.fuse.session import Session
from famfs_server.omf import layout
from famfs_server.volume import namespace as ns
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, ScratchMemory, formatted, meta_files

SIZE = 4 << 30
HEADER = Struct("<IIQQIIIHH")
STEP = 1 if os.environ.get("FAMFS_TEST_LONG") else 5
"""Of how many lines of code one is the place of a death."""


def one(node: int) -> tuple[int, int, bytes]:
    return Opcode.FORGET, node, Struct("<Q").pack(2)


def batch(node: int) -> tuple[int, int, bytes]:
    return Opcode.BATCH_FORGET, 0, Struct("<II").pack(2, 0) + Struct("<QQQQ").pack(17, 1, node, 2)


@pytest.mark.parametrize("message", [one, batch])
@pytest.mark.parametrize("answered", [False, True])
def test_forget_of_new_space_in_hand(message: Callable[[int], tuple[int, int, bytes]], answered: bool) -> None:
    files = meta_files(SIZE)
    parts = [(files[0], layout.SUPERBLOCK_REGION), (files[1], LOG_LENGTH)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session.create(ours.fileno())

    def worker() -> Volume:
        memory = PartialMemory(parts, SIZE, writable=[False, True])
        return Volume(memory, HOST, "/dev/dax7.7", state=session.namespace)

    spaces = worker().spaces
    assert spaces is not None

    def opening(name: bytes) -> int:
        node = spaces.find(name)
        spaces.remember(node)
        spaces.remember(node)
        spaces.give_to_kernel(node)
        descriptor = os.memfd_create("space")
        os.ftruncate(descriptor, layout.ALLOC_UNIT)
        return descriptor

    spaces.open = opening
    spaces._volume.create(NewFile(b"new", 5, 0o644, 0, 0))
    (node,) = spaces.live
    opcode, nodeid, body = message(node)
    request = HEADER.pack(HEADER.size + len(body), opcode, 88, nodeid, 0, 0, 0, 0, 0) + body
    session.record.buffer[: len(request)] = request
    if answered:
        session.record.done(88)
    session.record.taken_over()
    successor = worker()
    assert successor.spaces is not None
    plane = RequestPlane(FileSystem(successor, Settings(b"/run/here")), session, fast=True)
    plane.finish()
    assert set(successor.spaces.live) == ({node} if answered else set())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("logged", [False, True])
def test_request_that_has_killed_two_workers(logged: bool) -> None:
    """Also one for a file that is new, whose requests this plane answers whatever the table of planes says."""
    workers = Workers()
    node, _ = workers.fs.create(ns.ROOT, b"new", os.O_RDWR, 0o644, 0, 0)
    workers.fs.write(node, 0, memoryview(b"before"))
    if logged:
        node = workers.fs.volume.create(NewFile(b"logged", 6, 0o644, 0, 0))
        workers.fs.write(node, 0, memoryview(b"before"))
    body = abi.WRITE_IN.pack(0, 0, 6, 0, 0, 0) + b"poison"
    for unique, expected in ((88, -errno.EIO), (88 | abi.UNIQUE_RESEND, -errno.EIO), (90, 0)):
        workers.session.record.poison = 88
        workers.start()
        assert workers.plane.answer(workers.read(Opcode.WRITE, node, body, unique))
        assert abi.OUT_HEADER.unpack_from(workers.kernel.recv(64))[1:] == (expected, unique)
        assert bytes(workers.fs.views(node, 0, 6)[0]) == (b"before" if expected else b"poison")
    workers.close()


def test_long_change_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    node, _ = workers.fs.create(ns.ROOT, b"new", os.O_RDWR, 0o644, 0, 0)
    offset = LONG + 1
    assert workers.fs.takes_long(node, offset + 4, offset)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    body = abi.WRITE_IN.pack(0, offset, 4, 0, 0, 0) + b"data"
    assert workers.plane.answer(workers.read(Opcode.WRITE, node, body, 88))
    assert abi.OUT_HEADER.unpack_from(workers.kernel.recv(64))[1:] == (0, 88)
    assert bytes(workers.fs.views(node, offset, 4)[0]) == b"data"
    assert not workers.fs.made.is_changing(node)
    assert list(workers.session.record.abandon()) == []
    workers.close()


class Workers:
    """A connection to a volume, and workers that serve it one after the other."""

    def __init__(self) -> None:
        self.memory = ScratchMemory()
        formatted(self.memory)
        self.kernel, self._fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.session = Session.create(self._fuse.fileno())
        self.start()

    def start(self) -> None:
        volume = Volume(self.memory, HOST, "memory", state=self.session.namespace)
        self.fs = FileSystem(volume, Settings(b"/run/here"))
        self.plane = RequestPlane(self.fs, self.session, fast=True)

    def succeed(self, rng: random.Random) -> None:
        """Another worker takes over; it may die of its own before one has finished what was left."""
        self.session.record.taken_over()
        self.start()
        if dies(self.plane.finish, rng.randrange(200)):
            self.session.record.taken_over()
            self.start()
        self.plane.finish()

    def file(self, name: bytes, given: int) -> int:
        """A logged file that the kernel has been given so many times under its provisional nodeid."""
        node = self.fs.made.create(ns.ROOT, name, 0o644, 0, 0)
        self.fs.made.grow(node, 5)
        self.fs.made.released(node)
        for _ in range(given - 1):
            self.fs.made.remember(node)
        return node

    def read(self, opcode: int, nodeid: int, body: bytes, unique: int) -> int:
        """A request comes; its length."""
        request = HEADER.pack(HEADER.size + len(body), opcode, unique, nodeid, 0, 0, 0, 0, 0) + body
        self.session.record.buffer[: len(request)] = request
        return len(request)

    def replies(self) -> list[bytes]:
        """What has been answered."""
        found = []
        while True:
            try:
                found.append(self.kernel.recv(4096, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self.kernel.close()
        self._fuse.close()
        self.session.libfuse_end.close()
        self.session.our_end.close()
        for descriptor in (self.session.record.fd, self.session.namespace):
            os.close(descriptor)
        self.memory.close()


@pytest.mark.parametrize("opcode", [Opcode.FORGET, Opcode.BATCH_FORGET], ids=["one", "batch"])
def test_death_at_any_line_of_a_forget(opcode: Opcode, rng: random.Random) -> None:
    """What was given back is given back once: not lost, since the row would be taken for ever, and not twice, since the
    kernel would go on with a nodeid that is nobody's."""
    for place in range(rng.randrange(STEP), 1000, STEP):
        workers = Workers()
        gone, left = workers.file(b"gone", 3), workers.file(b"left", 5)
        if opcode is Opcode.FORGET:
            length = workers.read(opcode, left, Struct("<Q").pack(2), 90)
        else:
            rows = [(left, 1), (16, 1), (gone, 3), (left, 1), (1 << 62 | 77, 1)]
            body = Struct("<II").pack(len(rows), 0) + b"".join(Struct("<QQ").pack(*row) for row in rows)
            length = workers.read(opcode, 0, body, 90)
        died = dies(lambda workers=workers, length=length: workers.plane.answer(length), place)
        workers.succeed(rng)
        assert workers.fs.given(left) == 3
        assert workers.fs.made.row(left) == ns.nodeid_of(1)
        assert (workers.fs.made.row(gone) == 0) == (opcode is Opcode.BATCH_FORGET)
        assert workers.replies() == []
        workers.close()
        if not died:
            assert place > 20
            return


def test_death_at_any_line_of_a_lookup(rng: random.Random) -> None:
    for place in range(rng.randrange(STEP), 1000, STEP):
        workers = Workers()
        node = workers.file(b"new", 1)
        length = workers.read(Opcode.LOOKUP, ns.ROOT, b"new\0", 90)
        died = dies(lambda workers=workers, length=length: workers.plane.answer(length), place)
        workers.succeed(rng)
        replies = workers.replies()
        if not replies:
            # The kernel waits for an answer still, and asks again.
            assert workers.plane.answer(workers.read(Opcode.LOOKUP, ns.ROOT, b"new\0", 90 | UNIQUE_RESEND))
            replies = workers.replies()
        # It takes the first answer; any other is ENOENT.
        assert {reply[16:24] for reply in replies} == {node.to_bytes(8, "little")}
        assert workers.fs.given(node) == 2
        workers.close()
        if not died:
            assert place > 20
            return
