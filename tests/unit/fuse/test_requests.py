# SPDX-License-Identifier: Apache-2.0
"""What a successor's request plane does about what a dead worker had in hand: a FORGET is not sent again, and a request
that has killed two workers is not carried out again."""

import errno
import os
import socket
from collections.abc import Callable
from struct import Struct

import pytest

from famfs_server.dax.partial import PartialMemory
from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.requests import RequestPlane
from famfs_server.fuse.session import Session
from famfs_server.omf import layout
from famfs_server.volume import namespace as ns
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, ScratchMemory, formatted, meta_files

SIZE = 4 << 30
HEADER = Struct("<IIQQIIIHH")


def one(node: int) -> tuple[int, int, bytes]:
    return Opcode.FORGET, node, Struct("<Q").pack(2)


def batch(node: int) -> tuple[int, int, bytes]:
    return Opcode.BATCH_FORGET, 0, Struct("<II").pack(2, 0) + Struct("<QQQQ").pack(17, 1, node, 2)


@pytest.mark.parametrize("message", [one, batch])
@pytest.mark.parametrize("answered", [False, True])
def test_forget_in_hand(message: Callable[[int], tuple[int, int, bytes]], answered: bool) -> None:
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
    successor = worker()
    assert successor.spaces is not None
    plane = RequestPlane(FileSystem(successor, Settings(b"/run/here")), session, fast=True)
    plane.finish_forget()
    assert set(successor.spaces.live) == ({node} if answered else set())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("logged", [False, True])
def test_request_that_has_killed_two_workers(logged: bool) -> None:
    """Also one for a file that is new, whose requests this plane answers whatever the table of planes says."""
    memory = ScratchMemory()
    formatted(memory)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session.create(ours.fileno())
    volume = Volume(memory, HOST, "memory", state=session.namespace)
    filesystem = FileSystem(volume, Settings(b"/run/here"))
    node, _ = filesystem.create(ns.ROOT, b"new", os.O_RDWR, 0o644, 0, 0)
    filesystem.write(node, 0, memoryview(b"before"))
    if logged:
        node = volume.create(NewFile(b"logged", 6, 0o644, 0, 0))
        filesystem.write(node, 0, memoryview(b"before"))
    body = abi.WRITE_IN.pack(0, 0, 6, 0, 0, 0) + b"poison"
    for unique, expected in ((88, -errno.EIO), (88 | abi.UNIQUE_RESEND, -errno.EIO), (90, 0)):
        session.record.poison = 88
        plane = RequestPlane(filesystem, session, fast=True)
        request = HEADER.pack(HEADER.size + len(body), Opcode.WRITE, unique, node, 0, 0, 0, 0, 0) + body
        session.record.buffer[: len(request)] = request
        assert plane.answer(len(request))
        assert abi.OUT_HEADER.unpack_from(theirs.recv(64))[1:] == (expected, unique)
        assert bytes(filesystem.views(node, 0, 6)[0]) == (b"before" if expected else b"poison")
    ours.close()
    theirs.close()
    volume.close()
