# SPDX-License-Identifier: Apache-2.0
"""What one host makes, another finds at once; and what nobody should ever find in a log does no harm."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax.device import DaxDevice
from famfs_server.omf import layout, log
from famfs_server.volume.format import make_filesystem
from harness import (
    BIN,
    CLIENT_UUID,
    FAST,
    MASTER_UUID,
    THIRD_UUID,
    File,
    Mount,
    Site,
    client,
    format_device,
    populate,
    succeed,
    wait_for,
)

pytestmark = pytest.mark.timeout(90)

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
COUNT = 10_000 if LONG else 1_000

LOOK = "result = os.path.lexists(arguments[0])"
STAT = "result = os.stat(arguments[0]).st_size"
LIST = "result = sorted(os.listdir(arguments[0]))"


@pytest.fixture(params=FAST, ids=lambda fast: f"fastpath={fast}")
def fast(request: pytest.FixtureRequest) -> str:
    return f"fastpath={request.param}"


@pytest.fixture
def device(memory_folder: Path) -> Path:
    """A device with a file and a directory."""
    path = format_device(memory_folder / "device", size=24 << 30)
    populate(path, ("dir",), (File("known", b"known bytes"),))
    return path


# -- what the master makes ----------------------------------------------------------------------


def test_every_name_is_found_at_the_first_lookup(site: Site, device: Path, fast: str, rng: random.Random) -> None:
    # Each name is made by another way of making it, and looked up on both clients before the next one is made.
    code = """
import random
master, clients, rng = arguments[0], arguments[1:3], random.Random(arguments[3])
count = int(arguments[4])
order = list(range(count))
rng.shuffle(order)
problems = []
for number in order:
    name = "dir/n%d" % number
    path = os.path.join(master, name)
    kind = number % 3
    if kind == 0:
        os.mkdir(path)
    else:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if kind == 1:
            os.ftruncate(fd, number + 1)
        else:
            os.write(fd, b"x" * (number + 1))
            os.fsync(fd)
        os.close(fd)
    for other in clients:
        try:
            found = os.stat(os.path.join(other, name))
            if kind and found.st_size != number + 1:
                problems.append("size of " + name)
        except OSError as error:
            problems.append(repr(error))
        if number % 100 == 0 and "n%d" % number not in os.listdir(os.path.join(other, "dir")):
            problems.append(name + " is not listed")
listed = [sorted(os.listdir(os.path.join(place, "dir"))) for place in (master, *clients)]
if not listed[0] == listed[1] == listed[2] or len(listed[0]) != count:
    problems.append([len(names) for names in listed])
result = problems[:10]
"""
    with (
        site.mounted(device, fast, "poll=0") as master,
        site.mounted(device, fast, "poll=0", host=CLIENT_UUID) as one,
        site.mounted(device, fast, "poll=0", host=THIRD_UUID) as two,
    ):
        # The control plane takes several times as long.
        count = COUNT if LONG or fast.endswith("on") else COUNT // 3
        words = (master.path, one.path, two.path, str(rng.randrange(1 << 30)), str(count))
        assert client(code, *words, timeout=80) == []


def test_batches_are_found_in_random_order(site: Site, device: Path, fast: str, rng: random.Random) -> None:
    batch = """
import sys
from famfs_server.daemon.control_client import ControlClient, FileRequest
files = [FileRequest(b"dir/b%d" % number, number + 1, 0o640, 1, 2, None) for number in range(int(sys.argv[2]))]
ControlClient.of_mount(sys.argv[1]).create(files)
"""
    look = """
import random
order = list(range(int(arguments[1])))
random.Random(arguments[2]).shuffle(order)
sizes = [os.stat(arguments[0] + "/dir/b%d" % number).st_size for number in order]
result = sizes == [number + 1 for number in order]
"""
    with (
        site.mounted(device, fast, "poll=0") as master,
        site.mounted(device, fast, "poll=0", host=CLIENT_UUID) as other,
    ):
        assert client(LIST, other / "dir") == []
        done = master.host.run(sys.executable, "-c", batch, master.path, "1000")
        assert done.returncode == 0, done.stderr
        assert client(look, other.path, "1000", str(rng.randrange(1 << 30))) is True
        assert client("result = len(os.listdir(arguments[0]))", other / "dir") == 1000


# Makes files one by one and in batches, and says after each call how many there are.
MAKER = """
import mmap, os, sys
from famfs_server.daemon.control_client import ControlClient, FileRequest
place, counter, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(counter, "r+b") as file:
    made = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
control = ControlClient.of_mount(place)
number = 0
while number < count:
    if number % 200 < 100:
        fd = os.open("%s/dir/n%d" % (place, number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(fd, number + 1)
        os.close(fd)
        number += 1
    else:
        last = min(number + 100, count)
        control.create([FileRequest(b"dir/n%d" % n, n + 1, 0o644, 0, 0) for n in range(number, last)])
        number = last
    made[0] = number
"""

# Looks up, in random order, each name that is there for sure; the result is what was wrong.
LOOKER = """
import random, time
place, counter, count, seed = arguments[0], arguments[1], int(arguments[2]), arguments[3]
rng = random.Random(seed)
with open(counter, "r+b") as file:
    made = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
problems, waiting, known, listings = [], [], 0, 0
while (known < count or waiting) and not problems:
    now = made[0]
    waiting += range(known, now)
    known = now
    if not waiting:
        time.sleep(0.0005)
        continue
    at = rng.randrange(len(waiting))
    waiting[at], waiting[-1] = waiting[-1], waiting[at]
    number = waiting.pop()
    try:
        if os.stat("%s/dir/n%d" % (place, number)).st_size != number + 1:
            problems.append(["size", number])
    except OSError as error:
        problems.append([error.errno, number, known])
    if number % 50 == 0:
        sure = made[0]
        names = set(os.listdir(place + "/dir"))
        missing = [n for n in range(sure) if "n%d" % n not in names]
        listings += 1
        if missing:
            problems.append(["listing", sure, missing[:5]])
result = [problems, listings]
"""


@pytest.mark.parametrize("fast", FAST if LONG else FAST[:1])
def test_whatever_is_made_is_found_by_lookups_that_begin_afterwards(
    site: Site, device: Path, fast: str, tmp_path: Path, rng: random.Random
) -> None:
    counter = tmp_path / "counter"
    counter.write_bytes(bytes(8))
    count = str(COUNT)
    options = (f"fastpath={fast}", "poll=0")
    with (
        site.mounted(device, *options) as master,
        site.mounted(device, *options, host=CLIENT_UUID) as one,
        site.mounted(device, *options, host=THIRD_UUID) as two,
        ThreadPoolExecutor(3) as pool,
    ):
        began = time.monotonic()
        lookers = [
            pool.submit(client, LOOKER, place.path, counter, count, str(rng.random()), timeout=80)
            for place in (one, two)
        ]
        done = master.host.run(sys.executable, "-c", MAKER, master.path, counter, count, timeout=80)
        assert done.returncode == 0, done.stderr
        found = [looker.result() for looker in lookers]
        print(f"{count} files, two clients, {found[0][1] + found[1][1]} listings: {time.monotonic() - began:.1f} s")
        assert [problems for problems, _ in found] == [[], []]
        assert all(listings for _, listings in found)


def test_missing_names_are_not_remembered(site: Site, device: Path, fast: str) -> None:
    with (
        site.mounted(device, fast, "poll=0") as master,
        site.mounted(device, fast, "poll=0", host=CLIENT_UUID) as other,
    ):
        for number in range(20):
            assert client(LOOK, other / f"late{number}") is False
            succeed("mkdir", master / f"late{number}")
            assert client(LOOK, other / f"late{number}") is True


def test_poll_brings_figures_up_to_date(site: Site, device: Path) -> None:
    def entries(mount: Mount) -> int:
        found = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)
        count: int = found["log"]["entries"]
        return count

    with (
        site.mounted(device) as master,
        site.mounted(device, "poll=0.2", host=CLIENT_UUID) as polling,
        site.mounted(device, "poll=0", host=THIRD_UUID) as idle,
    ):
        succeed("mkdir", master / "new")
        assert wait_for(lambda: entries(polling) == 3)
        assert entries(idle) == 2


# -- logs that nobody should write --------------------------------------------------------------


class Writer:
    """Another host's hand in the log: it stores where and what it likes."""

    def __init__(self, device: Path) -> None:
        self._device = device

    def store(self, offset: int, data: bytes) -> None:
        """Put bytes somewhere."""
        with self._device.open("r+b", buffering=0) as image:
            image.seek(offset)
            image.write(data)

    def counters(self, count: int) -> None:
        """Say that the log has so many entries."""
        self.store(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, count.to_bytes(8, "little") * 2)

    def entry(self, index: int, data: bytes) -> None:
        """Put an entry, or the beginning of one, into its place."""
        self.store(layout.entry_offset(index), data)


def mkdir_entry(index: int, name: bytes) -> bytes:
    """A whole entry that makes a directory."""
    return log.build_mkdir(index, name, mode=0o755, uid=0, gid=0)


@dataclass(frozen=True)
class Foreground:
    """A mount whose server stays in the foreground, so that what it logs can be read."""

    path: Path
    log: Path
    site: Site
    host: str

    def status(self) -> dict[str, object]:
        """What `famfs status` says."""
        done = self.site.host(self.host).run(BIN / "famfs", "status", "--json", self.path)
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def messages(self) -> list[str]:
        """Lines of the server's log that tell of errors."""
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if "serving reads and writes" not in line]

    def __truediv__(self, name: str) -> Path:
        return self.path / name


@contextmanager
def foreground(site: Site, device: Path, *options: str, host: str = MASTER_UUID) -> Iterator[Foreground]:
    path, messages = site.place("foreground"), site.directory / "foreground.log"
    words = [word for option in options for word in ("-o", option)]
    with messages.open("wb") as output:
        server = subprocess.Popen(
            [BIN / "famfs-server", device, path, *words],
            env=site.host(host).environment,
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        assert wait_for(lambda: any(record.mount_point == str(path) for record in site.mounts())), messages.read_text()
        yield Foreground(path, messages, site, host)
        succeed("umount", path)
        assert server.wait(20) == 0, messages.read_text()
    finally:
        site.abandon(path)
        server.terminate()
        server.wait(20)


def test_half_visible_entry(site: Site, device: Path, fast: str) -> None:
    writer = Writer(device)
    with foreground(site, device, fast, "poll=0", host=CLIENT_UUID) as mount:
        assert client(LIST, mount.path) == [".meta", "dir", "known"]
        entry = mkdir_entry(2, b"half")
        writer.entry(2, entry[: layout.LOG_ENTRY_CRC_SPAN] + bytes(len(entry) - layout.LOG_ENTRY_CRC_SPAN))
        writer.counters(3)
        for _ in range(3):
            assert client("os.stat(arguments[0])", mount / "half") == "ENOENT"
            assert client(LIST, mount.path) == [".meta", "dir", "known"]
            assert client(STAT, mount / "known") == 11
        writer.entry(2, entry)
        assert client(LOOK, mount / "half") is True
        assert client(LIST, mount.path) == [".meta", "dir", "half", "known"]
        # And once more, with a whole entry behind the half one: what was half is torn no more.
        later = mkdir_entry(3, b"later")
        writer.entry(3, later[:100])
        writer.counters(4)
        assert client(LOOK, mount / "later") is False
        writer.entry(3, later)
        assert client(LOOK, mount / "later") is True
        assert mount.status()["damage"] is None


def test_invalid_entry_in_the_middle(site: Site, device: Path, fast: str) -> None:
    writer = Writer(device)
    with foreground(site, device, fast, "poll=0", host=CLIENT_UUID) as mount:
        writer.entry(2, b"garbage" * 50)
        writer.entry(3, mkdir_entry(3, b"behind"))
        writer.counters(4)
        for _ in range(3):
            assert client(LOOK, mount / "behind") is False
            assert client(LIST, mount.path) == [".meta", "dir", "known"]
            assert client("result = open(arguments[0]).read()", mount / "known") == "known bytes"
        assert mount.status()["damage"]["index"] == 2  # type: ignore[index]
        assert len(mount.messages()) == 1, mount.messages()
        assert "entry 2" in mount.messages()[0]


def require_ended(mount: Foreground, message: str) -> None:
    """Nothing of the mount can be used, and one line says why."""
    for _ in range(3):
        assert client(LOOK.replace("lexists", "getsize"), mount / "absent") == "EIO"
        assert client("os.listdir(arguments[0])", mount.path) == "EIO"
        assert client("os.open(arguments[0], os.O_RDONLY)", mount / "known") == "EIO"
        assert client("os.mkdir(arguments[0])", mount / "new") in ("EIO", "EROFS")
    assert len(mount.messages()) == 1, mount.messages()
    assert message in mount.messages()[0]
    assert message in str(mount.status()["damage"])


HOSTS = pytest.mark.parametrize(
    ("host", "fast"), [(MASTER_UUID, "fastpath=on"), (CLIENT_UUID, "fastpath=off")], ids=["master", "client"]
)


@HOSTS
def test_counters_that_jump_back(site: Site, device: Path, fast: str, host: str) -> None:
    with foreground(site, device, fast, "poll=0", host=host) as mount:
        assert client(STAT, mount / "known") == 11
        Writer(device).counters(1)
        assert client("result = os.path.getsize(arguments[0])", mount / "absent") == "EIO"
        require_ended(mount, "made anew, or its log was cut")


@HOSTS
def test_device_that_is_formatted_under_a_mount(site: Site, device: Path, fast: str, host: str) -> None:
    with foreground(site, device, fast, "poll=0", host=host) as mount:
        assert client(STAT, mount / "known") == 11
        code = "fd = os.open(arguments[0], os.O_RDONLY)"
        client(code, mount / "known")
        with DaxDevice.open(str(device)) as held:
            memory = held.memory()
            make_filesystem(memory, str(device), UUID(THIRD_UUID), log_length=8 << 20)
            memory.close()
        require_ended(mount, "made anew, or its log was cut")
    with site.mounted(format_device(device), host=host) as again:
        assert client(LIST, again.path) == [".meta"]


def test_successor_does_not_serve_another_file_system(site: Site, device: Path) -> None:
    mount = site.attach(device, "poll=0")
    assert client(STAT, mount / "known") == 11
    other = format_device(device.with_name("other"))
    populate(other, ("a", "b", "c", "d"))
    device.write_bytes(other.open("rb").read(layout.LOG_OFFSET + (8 << 20)))
    os.truncate(device, other.stat().st_size)
    os.kill(mount.process("worker"), signal.SIGKILL)
    assert mount.gone()


def test_counters_that_run_ahead(site: Site, device: Path, fast: str) -> None:
    with foreground(site, device, fast, "poll=0", host=CLIENT_UUID) as mount:
        Writer(device).counters(1 << 40)
        client("result = os.path.lexists(arguments[0])", mount / "absent")
        assert mount.status()["damage"] is not None
        assert len(mount.messages()) == 1, mount.messages()


def test_master_that_sees_a_foreign_entry_stops_writing(site: Site, device: Path, fast: str) -> None:
    writer = Writer(device)
    with site.mounted(device, fast, "poll=0") as mount:
        succeed("mkdir", mount / "mine")
        writer.entry(3, mkdir_entry(3, b"theirs"))
        writer.counters(4)
        make = "fd = os.open(arguments[0], os.O_CREAT | os.O_WRONLY); os.write(fd, b'1')"
        assert client("os.mkdir(arguments[0])", mount / "more") == "EROFS"
        assert client(make, mount / "more") == "EROFS"
        assert client(LOOK, mount / "theirs") is True
        assert client("os.mkdir(arguments[0])", mount / "more") == "EROFS"
        done = mount.host.run(BIN / "famfs", "creat", "-s", "4096", mount / "more")
        assert done.returncode != 0
        assert "second master" in done.stderr
        assert client("result = open(arguments[0]).read()", mount / "known") == "known bytes"
        assert client(LIST, mount.path) == [".meta", "dir", "known", "mine", "theirs"]
    with site.mounted(device, fast) as again:
        succeed("mkdir", again / "more")
