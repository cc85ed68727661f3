# SPDX-License-Identifier: Apache-2.0
"""The record that outlives a worker, seen by one process and by the next."""

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.session import BUFFER, Session, SessionRecord


@pytest.fixture
def record() -> Iterator[SessionRecord]:
    record = SessionRecord.create()
    yield record
    os.close(record.fd)


def read(record: SessionRecord, unique: int, opcode: int = Opcode.GETATTR) -> None:
    """A request comes into the buffer, as the kernel puts it there."""
    request = abi.IN_HEADER.pack(abi.IN_HEADER.size, opcode, unique, 1, 0, 0, 1, 0)
    record.buffer[: len(request)] = request


def test_nothing_has_happened_yet(record: SessionRecord) -> None:
    assert (record.answered, record.beats, record.at_libfuse, record.in_hand) == (0, 0, 0, 0)
    assert (record.poison, record.takeovers) == (0, 0)
    assert len(record.buffer) == BUFFER
    assert record.noted_change(2) is None


def test_request_is_in_hand_until_it_is_answered(record: SessionRecord) -> None:
    read(record, 10)
    assert record.in_hand == 10
    record.done(10)
    assert (record.in_hand, record.answered) == (0, 1)
    read(record, 12)
    assert record.in_hand == 12


def test_request_that_is_sent_again_is_the_same_request(record: SessionRecord) -> None:
    read(record, 10 | abi.UNIQUE_RESEND)
    assert record.in_hand == 10
    record.done(10 | abi.UNIQUE_RESEND)
    assert record.in_hand == 0
    record.note_change(10, 7)
    assert record.noted_change(10 | abi.UNIQUE_RESEND) == 7
    record.note_change(12 | abi.UNIQUE_RESEND, 8)
    assert record.noted_change(12) == 8


def test_request_that_was_answered_before_it_was_sent_again(record: SessionRecord) -> None:
    read(record, 10)
    record.done(10)
    read(record, 10 | abi.UNIQUE_RESEND)
    assert record.in_hand == 10


def test_changes_are_noted_for_the_last_requests(record: SessionRecord) -> None:
    uniques = list(range(2, 2 + 2 * 500, 2))
    for number, unique in enumerate(uniques):
        record.note_change(unique, number)
    assert [record.noted_change(unique) for unique in uniques[-64:]] == list(range(436, 500))
    assert {record.noted_change(unique) for unique in uniques[:-64]} == {None}


def test_what_libfuse_has(record: SessionRecord) -> None:
    for unique in (2, 4, 6):
        record.relayed(unique)
    record.returned(4)
    assert record.at_libfuse == 2
    assert record.held == {2, 6}
    record.forget_libfuse()
    assert record.at_libfuse == 0
    record.relayed(8)
    assert record.at_libfuse == 1


def test_another_process_sees_everything(record: SessionRecord) -> None:
    record.poison = 77
    pid = os.fork()
    if pid == 0:
        other = SessionRecord(record.fd)
        other.taken_over()
        read(other, 20)
        other.done(18)
        other.note_change(20, 5)
        other.beat()
        os._exit(0 if other.poison == 77 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (record.in_hand, record.answered, record.beats, record.takeovers) == (20, 1, 1, 1)
    assert record.noted_change(20) == 5


def test_draining_throws_away_what_a_dead_worker_left() -> None:
    fuse = os.open(os.devnull, os.O_RDWR)
    session = Session.create(fuse)
    try:
        for end in (session.libfuse_end, session.our_end):
            for _ in range(5):
                end.send(b"left behind")
        session.record.relayed(2)
        session.drain()
        assert session.record.at_libfuse == 0
        for end in (session.libfuse_end, session.our_end):
            with pytest.raises(BlockingIOError):
                end.recv(1, socket.MSG_DONTWAIT)
    finally:
        for descriptor in (fuse, session.record.fd, session.namespace):
            os.close(descriptor)
        session.libfuse_end.close()
        session.our_end.close()


def test_everything_that_a_dead_worker_had_is_known(record: SessionRecord) -> None:
    read(record, 10)
    record.hold(10)
    record.done(10)
    record.relayed(12 | abi.UNIQUE_RESEND)
    record.hold(14)
    record.let_go(14)
    read(record, 16 | abi.UNIQUE_RESEND)
    record.taken_over()
    assert record.in_hand == 0
    successor = SessionRecord(record.fd)
    assert successor.recovering
    assert successor.held == {10, 12 | abi.UNIQUE_RESEND, 16 | abi.UNIQUE_RESEND}
    # The uniques are those that the kernel waits for, bit 63 included.
    assert successor.abandon() == {10, 12 | abi.UNIQUE_RESEND, 16 | abi.UNIQUE_RESEND}
    assert (successor.held, successor.in_hand) == (set(), 0)
    assert successor.abandon() == set()
    successor.failed(2)
    assert record.failed_at_takeover == 2


def test_successor_does_not_have_in_hand_what_the_dead_worker_had(record: SessionRecord) -> None:
    """Another death would otherwise make a request a poison that only one worker has ever seen, and one that was
    answered just before the death would look for ever as if somebody waited for it."""
    read(record, 10)
    record.taken_over()
    assert (record.in_hand, record.held, record.recovering) == (0, {10}, True)
    # The next one dies before it has asked for anything.
    record.taken_over()
    assert (record.in_hand, record.held) == (0, {10})
    record.forget_held()
    record.recovered()
    assert (record.in_hand, record.held, record.recovering) == (0, set(), False)
    # Sent again, and passed to libfuse; and the same once more.
    for _ in range(2):
        read(record, 10 | abi.UNIQUE_RESEND)
        assert record.in_hand == 10
        record.done(10 | abi.UNIQUE_RESEND)
        assert record.in_hand == 0
        record.taken_over()


def test_buffer_is_mapped_before_a_request_is_read(record: SessionRecord) -> None:
    """The kernel ends a request with EIO if its reader is killed while a page for it is mapped."""
    read(record, 10)
    successor = SessionRecord(record.fd)
    successor.map_buffer()
    assert successor.in_hand == 10
    address = ctypes.addressof(ctypes.c_char.from_buffer(successor.buffer))
    pages = -(-BUFFER // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(8 * (address // mmap.PAGESIZE))
        assert all(entry >> 63 for entry in struct.unpack(f"{pages}Q", pagemap.read(8 * pages)))


def test_more_requests_than_there_are_places(record: SessionRecord) -> None:
    uniques = range(2, 20002, 2)
    for unique in uniques:
        record.hold(unique)
    known = record.held
    assert len(known) == 4096
    for unique in uniques:
        record.let_go(unique)
    assert record.held == set()
    record.hold(4)
    assert record.held == {4}
