# SPDX-License-Identifier: Apache-2.0
"""What a successor's request plane does before it reads: a FORGET that a dead worker had in hand is not sent again."""

import os
import socket
from collections.abc import Callable
from struct import Struct

import pytest

from famfs_server.dax.partial import PartialMemory
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.requests import RequestPlane
from famfs_server.fuse.session import Session
from famfs_server.omf import layout
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, LOG_LENGTH, meta_files

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
