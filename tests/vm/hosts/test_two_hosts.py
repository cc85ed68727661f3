# SPDX-License-Identifier: Apache-2.0
"""A master and a client on two kernels that share the memory of a device.

The tests go on from one another, with one file system and one mount on each host.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from programs import fork, here, run
from two_hosts import Meeting

FILES = 500
BOXES = 8
BOX_SIZE = 96 << 10
ROUNDS = 40  # of writing into the boxes
BEFORE_KILL = 60

pytestmark = pytest.mark.timeout(400)


def content(name: str) -> bytes:
    """What a file of that name holds: its size and its bytes are drawn from the name."""
    drawn = random.Random(name)
    return drawn.randbytes(drawn.randrange(1, 20_000))


def box_content(round_number: int) -> bytes:
    return random.Random(f"box {round_number}").randbytes(BOX_SIZE)


def create(path: Path) -> None:
    """A file by ordinary calls; in the log when this returns."""
    with path.open("xb") as file:
        file.write(content(path.name))
        file.flush()
        os.fsync(file.fileno())


def path_of(folder: Path, number: int) -> Path:
    return folder / f"d{number % 5}" / f"file-{number:04}"


class Volume:
    """The file system as this host has it mounted."""

    def __init__(self, device: Path, point: Path, host: Path) -> None:
        self.device = device
        self.point = point
        self.host = host

    def mount(self) -> None:
        fork("mount.famfs", self.device, self.point, "-o", "loglevel=error", host=self.host)

    def unmount(self) -> None:
        run("umount", self.point, host=self.host)


@pytest.fixture(scope="module")
def volume(meeting: Meeting, dax_names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    """Made by the master, mounted by both."""
    folder = tmp_path_factory.mktemp("host")
    point = folder / "mnt"
    point.mkdir()
    host = folder / "system_uuid"
    host.write_text(str(uuid4()))
    volume = Volume(Path("/dev", dax_names[-1]), point, host)
    if meeting.is_master:
        here("mkfs.famfs", volume.device, host=host)
        volume.mount()
        for number in range(BOXES):
            with (point / f"box-{number}").open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, BOX_SIZE)
        for number in range(5):
            (point / f"d{number}").mkdir()
        meeting.tell("made", host.read_text())
    else:
        assert meeting.hear("made") != host.read_text()
        volume.mount()
    meeting.meet("mounted")
    yield volume
    if os.path.ismount(point):
        volume.unmount()


def test_files_are_found_at_the_first_lookup_while_the_client_writes(meeting: Meeting, volume: Volume) -> None:
    """The master creates files and checks what the client has written; the client looks each file up as soon as it is
    told of it, once, and writes into files that the master has made before.
    """
    if meeting.is_master:
        seen = 0
        for number in range(FILES):
            create(path_of(volume.point, number))
            meeting.count(number + 1)
            written = meeting.others_count()
            if written > seen:
                # What the client has announced is in memory, and read(2) looks there.
                check_box(volume.point, written)
                seen = written
        meeting.wait_for_count(ROUNDS)
        check_box(volume.point, ROUNDS)
        assert seen > 0, "the client has written nothing while files were created"
    else:
        lost, wrong, round_number = [], [], 0
        for number in range(FILES):
            path = path_of(volume.point, number)
            # A look that comes too early must not spoil the one that counts.
            ahead = path_of(volume.point, min(number + 2, FILES - 1))
            ahead.exists()
            meeting.wait_for_count(number + 1)
            try:
                if path.read_bytes() != content(path.name):
                    wrong.append(path.name)
            except FileNotFoundError:
                lost.append(path.name)
            if number * ROUNDS // FILES >= round_number:
                round_number += 1
                write_box(volume.point, round_number)
                meeting.count(round_number)
        assert (lost, wrong) == ([], [])
        meeting.count(ROUNDS)
        for directory in range(5):
            names = {path_of(volume.point, number).name for number in range(directory, FILES, 5)}
            assert set(os.listdir(volume.point / f"d{directory}")) == names
    meeting.meet("first lookups done")


def write_box(point: Path, round_number: int) -> None:
    with (point / f"box-{round_number % BOXES}").open("r+b", buffering=0) as file:
        file.write(box_content(round_number))
        os.fsync(file.fileno())


def check_box(point: Path, round_number: int) -> None:
    assert (point / f"box-{round_number % BOXES}").read_bytes() == box_content(round_number), round_number


def test_only_the_master_creates(meeting: Meeting, volume: Volume) -> None:
    if meeting.is_master:
        meeting.hear("refused")
        assert not (volume.point / "by-the-client").exists()
    else:
        with pytest.raises(OSError, match=r"Read-only file system"):
            (volume.point / "by-the-client").mkdir()
        refused = here("famfs", "mkdir", volume.point / "by-the-client", host=volume.host, status=1)
        assert "master" in refused.error
        meeting.tell("refused")
    meeting.meet("refusal done")


def test_the_master_is_killed_while_it_creates(meeting: Meeting, volume: Volume) -> None:
    """What the master had announced is there and whole, the log is in order, and a host with its UUID goes on."""
    if meeting.is_master:
        meeting.tell("uuid", volume.host.read_text())
        number = 0
        while True:  # until this guest is killed, or its time is over
            create(volume.point / f"last-{number:05}")
            number += 1
            meeting.count(FILES + number)
    uuid = meeting.hear("uuid")
    meeting.wait_for_count(FILES + BEFORE_KILL)
    meeting.kill_other()
    announced = meeting.others_count() - FILES
    assert announced >= BEFORE_KILL

    def check() -> int:
        """Every file that is there is whole, without a gap, and no announced one is missing; how many there are."""
        names = sorted(name for name in os.listdir(volume.point) if name.startswith("last-"))
        assert names == [f"last-{number:05}" for number in range(len(names))]
        assert announced <= len(names) <= announced + 1
        for name in names:
            assert (volume.point / name).read_bytes() == content(name)
        return len(names)

    count = check()
    check_box(volume.point, ROUNDS)
    volume.unmount()
    print(here("fsck.famfs", volume.device, host=volume.host).out)

    # The same host again, as far as the file system can tell.
    volume.host.write_text(uuid)
    volume.mount()
    assert check() == count
    create(volume.point / f"last-{count:05}")
    volume.unmount()
    here("fsck.famfs", volume.device, host=volume.host)
