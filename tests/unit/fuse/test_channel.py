# SPDX-License-Identifier: Apache-2.0
"""The channel's part that needs no kernel: who gives way to whom."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from famfs_server.fuse.channel import GIVE_WAY_SECONDS, Channel
from famfs_server.fuse.session import Session


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
