# SPDX-License-Identifier: Apache-2.0
"""The channel's part that needs no kernel: who gives way to whom, and how its threads end."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.channel import GIVE_WAY_SECONDS, Channel
from famfs_server.fuse.dialects import Decision
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.session import Session
from famfs_server.volume.volume import Volume
from memories import HOST, ScratchMemory, formatted

DATA = Path(__file__).parents[2] / "data"
INIT = (DATA / "init-6.18.bin").read_bytes()
LIBFUSE_REPLY = (DATA / "libfuse-3.14-init-reply.bin").read_bytes()


@pytest.fixture
def channel() -> Iterator[Channel]:
    fuse = os.open(os.devnull, os.O_RDWR)
    session = Session.create(fuse)
    yield Channel(session)
    os.close(fuse)
    session.our_end.close()
    session.libfuse_end.close()


def slept(channel: Channel) -> bool:
    start = time.monotonic()
    channel.give_way()
    return time.monotonic() - start >= GIVE_WAY_SECONDS


def test_gives_way_only_to_requests_that_came_meanwhile(channel: Channel) -> None:
    channel.give_way()
    channel.session.record.done(2)
    assert slept(channel)
    before = channel._answered
    channel.give_way()
    assert channel._answered == before == channel.session.record.answered


def test_requests_never_wait_for_themselves(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_request_thread", threading.get_ident())
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a request would have waited"))
    channel.session.record.done(2)
    channel.give_way()


def test_idle_is_who_has_no_request_to_read_or_to_answer() -> None:
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session.create(fuse.fileno())
    channel = Channel(session)
    assert channel.is_idle()
    request = abi.IN_HEADER.pack(abi.IN_HEADER.size, Opcode.RELEASE, 88, 1, 0, 0, 0, 0)
    kernel.send(request)
    assert not channel.is_idle()
    os.readv(fuse.fileno(), [session.record.buffer])
    assert not channel.is_idle()
    session.record.done(88)
    assert channel.is_idle()
    for end in (kernel, fuse, session.our_end, session.libfuse_end):
        end.close()


# -- threads ------------------------------------------------------------------------------------


class Outcome:
    """How the threads of a channel have ended."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._said = threading.Event()

    def say(self, word: str) -> None:
        """From any thread."""
        self.words.append(word)
        self._said.set()

    def wait(self) -> list[str]:
        """What the first one has said."""
        assert self._said.wait(10)
        return self.words


@dataclass
class Connection:
    """A channel between a kernel and a libfuse that the test plays."""

    kernel: socket.socket
    session: Session
    channel: Channel
    outcome: Outcome

    def start(self) -> bytes:
        """Have INIT answered by libfuse; what the kernel hears first."""
        memory = ScratchMemory()
        formatted(memory)
        self.channel.start(
            FileSystem(Volume(memory, HOST, "memory"), Settings(shadow=b"/")),
            Decision("server", "a test"),
            fast=False,
            serve_unmapped=True,
            devices=(),
            finished=lambda: self.outcome.say("finished"),
            failed=lambda: self.outcome.say("failed"),
        )
        assert self.session.libfuse_end.recv(1000)
        self.session.libfuse_end.send(LIBFUSE_REPLY)
        return self.kernel.recv(1000)


@pytest.fixture
def connection() -> Iterator[Connection]:
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session.create(fuse.fileno())
    with kernel, fuse, session.our_end, session.libfuse_end:
        kernel.settimeout(10)
        session.libfuse_end.settimeout(10)
        yield Connection(kernel, session, Channel(session), Outcome())
        # The threads end with it.
        kernel.close()
        session.libfuse_end.close()


def test_end_of_the_connection(connection: Connection) -> None:
    connection.channel.resume(INIT)
    assert connection.start() == abi.resend()
    connection.kernel.shutdown(socket.SHUT_WR)
    assert connection.outcome.wait() == ["finished"]


def test_plane_that_cannot_go_on_is_no_end_of_the_connection(connection: Connection) -> None:
    """A worker that ended as after an unmount would take the mount with it."""
    connection.channel.resume(INIT)
    assert connection.start() == abi.resend()
    connection.session.libfuse_end.close()
    names = b"link\0target\0"
    header = abi.IN_HEADER.pack(abi.IN_HEADER.size + len(names), Opcode.SYMLINK, 4, 1, 0, 0, 1, 0)
    connection.kernel.send(header + names)
    assert connection.outcome.wait() == ["failed"]


def test_init_is_not_in_hand_once_it_is_answered(connection: Connection) -> None:
    """If nobody asks for anything after a mount, its worker would be taken for one that hangs."""
    connection.kernel.send(INIT)
    connection.channel.read_init()
    assert connection.session.record.in_hand
    assert connection.start()
    connection.channel.wait_initialised()
    assert connection.session.record.in_hand == 0
