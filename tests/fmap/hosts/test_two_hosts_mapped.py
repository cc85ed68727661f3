# SPDX-License-Identifier: Apache-2.0
"""A master and a client on two kernels that share one memory, both with extent maps."""

import mmap
import os
import random
from collections.abc import Iterator
from uuid import uuid4

import pytest

from guest_devices import SetMode
from tests.fmap.volumes import Volume, is_mapped, mapped_bytes
from two_hosts import Meeting

FILES = 60
SIZE = 3 << 20

pytestmark = pytest.mark.timeout(400)


def content(name: str) -> bytes:
    drawn = random.Random(name)
    return drawn.randbytes(drawn.randrange(1, 200_000))


@pytest.fixture(scope="module")
def volume(
    meeting: Meeting, dax_names: list[str], set_mode: SetMode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Volume]:
    """Made by the master, mounted by both with the device in famfs mode."""
    volume = Volume(dax_names[-1], set_mode, tmp_path_factory.mktemp("host"))
    volume.host.write_text(str(uuid4()))
    if meeting.is_master:
        volume.make()
        volume.mount("fmap=require")
        with (volume.point / "shared").open("wb") as file:
            file.truncate(SIZE)
    meeting.meet("made")
    if not meeting.is_master:
        volume.mount("fmap=require")
    yield volume
    volume.end()


def test_files_of_the_master_are_mapped_by_the_client(meeting: Meeting, volume: Volume) -> None:
    """Each is found at the first lookup after its close, and its bytes are those of the memory."""
    status = volume.status()
    assert status["role"] == ("master" if meeting.is_master else "client")
    assert status["no_open"] is not meeting.is_master
    for number in range(FILES):
        path = volume.point / f"file-{number}"
        if meeting.is_master:
            path.write_bytes(content(path.name))
            os.close(os.open(path, os.O_RDONLY))
            meeting.count(number + 1)
        else:
            meeting.wait_for_count(number + 1)
            assert path.read_bytes() == content(path.name), path
            assert mapped_bytes(path) == content(path.name), path
            assert is_mapped(path)
    meeting.meet("read")
    if not meeting.is_master:
        with pytest.raises(OSError, match="Read-only"):
            (volume.point / "not-here").touch()


def test_what_one_host_stores_the_other_reads(meeting: Meeting, volume: Volume) -> None:
    """Through mappings on both sides, without a request to either server."""
    path = volume.point / "shared"
    before = volume.requests("read", "write")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        for turn in range(20):
            mine = turn % 2 == (0 if meeting.is_master else 1)
            data = random.Random(turn).randbytes(4096)
            at = turn * 150_000
            if mine:
                mapping[at : at + 4096] = data
                meeting.count(100 + turn)
            else:
                meeting.wait_for_count(100 + turn)
                assert mapping[at : at + 4096] == data, turn
                assert os.pread(file.fileno(), 4096, at) == data, turn
    assert volume.requests("read", "write") == before
    meeting.meet("stored")


def test_the_master_remounts_while_the_client_goes_on(meeting: Meeting, volume: Volume) -> None:
    path = volume.point / "shared"
    if meeting.is_master:
        volume.unmount()
        meeting.tell("gone")
        volume.mount()
        (volume.point / "after").write_bytes(b"made after the remount")
        os.close(os.open(volume.point / "after", os.O_RDONLY))
        meeting.tell("back")
    else:
        meeting.hear("gone")
        assert len(path.read_bytes()) == SIZE
        meeting.hear("back")
        assert (volume.point / "after").read_bytes() == b"made after the remount"
    meeting.meet("end")
