# SPDX-License-Identifier: Apache-2.0
"""The table of planes: complete, and what the request plane does."""

import os
import socket
from collections.abc import Iterator

import pytest

from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.planes import ALWAYS, FAST, PLANES, Plane
from famfs_server.fuse.requests import RequestPlane
from famfs_server.fuse.session import Session
from famfs_server.volume.volume import Volume
from memories import HOST, ScratchMemory, formatted


@pytest.fixture
def session() -> Iterator[Session]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session.create(theirs.fileno())
    with ours, theirs:
        yield session
    os.close(session.record.fd)
    os.close(session.namespace)
    session.libfuse_end.close()
    session.our_end.close()


def test_every_opcode_has_a_plane() -> None:
    assert PLANES.keys() == {*Opcode}
    assert {opcode for opcode, plane in PLANES.items() if plane in (Plane.ALWAYS_FAST, Plane.FAST)} == ALWAYS | FAST
    assert not ALWAYS & FAST


@pytest.mark.parametrize("fast", [True, False])
def test_request_plane_has_what_the_table_says(fast: bool, session: Session) -> None:
    memory = ScratchMemory()
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    plane = RequestPlane(FileSystem(volume, Settings(b"")), session, fast=fast)
    for opcode, where in PLANES.items():
        answered = plane._handlers[opcode] is not None
        assert answered == (where is Plane.ALWAYS_FAST or (fast and where is Plane.FAST)), opcode.name
    volume.close()
