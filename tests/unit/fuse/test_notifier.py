# SPDX-License-Identifier: Apache-2.0
"""Notifications: their order, what the kernel refuses, and a kernel that does not take them."""

import errno
import os
import threading
from collections.abc import Iterator
from unittest import mock

import pytest

from famfs_server.fuse import abi
from famfs_server.fuse.notifier import Notifier, send_all

MANY = [abi.inval_entry(1, b"n%05d" % number + b"x" * (number % 70)) for number in range(5000)]


class Pipe:
    """A notifier's pipe, and a thread in place of the process that reads it."""

    def __init__(self) -> None:
        self.source, sink = os.pipe()
        self.sink = sink
        self.notifier = Notifier(sink)
        self.sent: list[bytes] = []
        self.errors: dict[int, int] = {}
        """Errors of the kernel, by the number of the notification."""

    def write(self, fuse: int, data: bytes) -> int:
        """Stands for a write to /dev/fuse."""
        number = len(self.sent)
        self.sent.append(bytes(data))
        if number in self.errors:
            raise OSError(self.errors[number], os.strerror(self.errors[number]))
        return len(data)

    def send(self) -> None:
        """Everything that is in the pipe, to its end."""
        os.close(self.sink)
        with mock.patch("famfs_server.fuse.notifier.os.write", self.write):
            send_all(self.source, -1)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.source)


def test_everything_arrives_whole_and_in_order(pipe: Pipe) -> None:
    for notification in MANY:
        pipe.notifier.put(notification)
    assert pipe.notifier.dropped == 0
    pipe.send()
    assert pipe.sent == MANY


def test_what_the_kernel_does_not_know_is_no_error(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    pipe.errors = {0: errno.ENOENT, 2: errno.EINVAL}
    for notification in MANY[:5]:
        pipe.notifier.put(notification)
    pipe.send()
    assert pipe.sent == MANY[:5]
    assert len(caplog.messages) == 1
    assert "Invalid argument" in caplog.messages[0]


def test_it_ends_with_the_mount(pipe: Pipe) -> None:
    pipe.errors = {1: errno.ENODEV}
    for notification in MANY[:5]:
        pipe.notifier.put(notification)
    pipe.send()
    assert pipe.sent == MANY[:2]


def test_full_pipe_never_makes_anybody_wait_and_loses_nothing(pipe: Pipe) -> None:
    notifications = [MANY[number % len(MANY)] for number in range(30_000)]
    for notification in notifications:
        pipe.notifier.put(notification)
    # More than the pipe has room for.
    assert sum(map(len, notifications)) > 1 << 20
    received = b""
    while len(received) < sum(map(len, notifications)):
        received += os.read(pipe.source, 1 << 16)
        pipe.notifier.retry()
    assert received == b"".join(notifications)
    assert pipe.notifier.dropped == 0


def test_what_waits_is_bounded(pipe: Pipe) -> None:
    count = 0
    while pipe.notifier.dropped == 0:
        pipe.notifier.put(MANY[count % len(MANY)])
        count += 1
        assert count < 200_000
    pipe.send()
    # What was in the pipe has been sent; nobody has asked to try the rest again.
    assert 5000 < len(pipe.sent) < count
    assert pipe.sent == [MANY[number % len(MANY)] for number in range(len(pipe.sent))]


def test_process_that_is_gone_is_no_error() -> None:
    source, sink = os.pipe()
    notifier = Notifier(sink)
    os.close(source)
    notifier.put(MANY[0])
    assert notifier.dropped == 1
    os.close(sink)


def test_many_may_put_at_a_time(pipe: Pipe) -> None:
    threads = [
        threading.Thread(target=lambda part=part: [pipe.notifier.put(data) for data in MANY[part::4]])
        for part in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send()
    assert sorted(pipe.sent) == sorted(MANY)


def test_a_dead_reader_is_noticed() -> None:
    source, sink = os.pipe()
    notifier = Notifier(sink)
    assert not notifier.gone
    while not notifier._waiting:
        notifier.put(MANY[0])
    assert not notifier.gone
    os.close(source)
    assert notifier.gone
    os.close(sink)
