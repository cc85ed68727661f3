# SPDX-License-Identifier: Apache-2.0
"""Warnings before log and space run out: each threshold once."""

import logging
from collections.abc import Iterator

import pytest

from famfs_server.daemon.fullness import Fullness
from famfs_server.omf import layout, log
from famfs_server.volume.volume import Volume
from memories import HOST, ScratchMemory, formatted

GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[ScratchMemory]:
    """A device with an empty file system whose log has room for 20 entries."""
    memory = ScratchMemory(4 * GIB)
    formatted(memory)
    memory.write(layout.LOG_OFFSET, log.build_header(8 << 20, 19))
    yield memory
    memory.close()


@pytest.fixture
def volume(memory: ScratchMemory) -> Iterator[Volume]:
    """The file system, opened by its master."""
    volume = Volume(memory, HOST, "memory")
    yield volume
    volume.close()


def test_the_log_fills(volume: Volume, caplog: pytest.LogCaptureFixture) -> None:
    fullness = Fullness()
    said = []
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            volume.mkdir(b"d%d" % number, 0o755, 0, 0)
            caplog.clear()
            for _ in range(3):
                fullness.look(volume)
            said += [(number + 1, record.getMessage()) for record in caplog.records]
    assert [entries for entries, _ in said] == [16, 19]
    assert "80% of the log is in use (16 of 20 entries)" in said[0][1]
    assert "95%" in said[1][1]


def test_space_runs_out(volume: Volume, caplog: pytest.LogCaptureFixture) -> None:
    fullness = Fullness()
    with caplog.at_level(logging.WARNING):
        for part in (2, 1.5, 0.3):
            volume.space.allocate(int(part * GIB), None)
            caplog.clear()
            fullness.look(volume)
            fullness.look(volume)
    (record,) = caplog.records
    assert "90% of the space is in use" in record.getMessage()
