# SPDX-License-Identifier: Apache-2.0
"""Processes of a mount with extent maps that are killed under load: mapped files do not notice, new ones are not lost.

The load is made of processes, since a thread of this one would hold up the others. Each reads and writes mapped files,
opens and maps them anew, and makes new ones; each names every failed call and wrong byte.
"""

import contextlib
import errno
import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from programs import here, mounts, run
from tests.fmap.volumes import DIALECTS, Volume, mapped_bytes

FILES = 8
SIZE = 1 << 20
LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
FACTOR = 10 if LONG else 1
PAUSE = 0.05


def content(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


class Load:
    """Processes that work on a mount until they are told to stop; what went wrong is in `complaints`."""

    def __init__(self, work: Sequence[Callable[[int], None]]) -> None:
        """Each of `work` is called again and again, with the number of the call."""
        self._stop = mmap.mmap(-1, mmap.PAGESIZE)
        self._rounds = memoryview(self._stop).cast("Q")
        self._pids: list[int] = []
        hear, speak = os.pipe()
        for number, step in enumerate(work, 1):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(hear)
                    while not self._rounds[0]:
                        step(self._rounds[number])
                        self._rounds[number] += 1
                        # The processes under test get their share of one processor.
                        time.sleep(PAUSE)
                except BaseException:
                    os.write(speak, traceback.format_exc().encode()[-2000:])
                finally:
                    os._exit(0)
            self._pids.append(pid)
        os.close(speak)
        self._told = hear

    def go_on(self, rounds: int, seconds: float = 60) -> None:
        """Wait until each has done so many more rounds, or has ended with a complaint."""
        count = len(self._pids)
        goals = [self._rounds[number] + rounds for number in range(1, count + 1)]
        deadline = time.monotonic() + seconds
        while any(self._rounds[number] < goal for number, goal in enumerate(goals, 1)):
            assert all(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in self._pids), self.end()
            assert time.monotonic() < deadline, f"rounds {list(self._rounds[1 : count + 1])}, wanted {goals}"
            time.sleep(0.02)

    def end(self, seconds: float = 60) -> str:
        """Stop all; what they complained of."""
        self._rounds[0] = 1
        deadline = time.monotonic() + seconds
        for pid in self._pids:
            while True:
                with contextlib.suppress(ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        if time.monotonic() > deadline:
                            os.kill(pid, signal.SIGKILL)
                            return f"process {pid} hangs"
                        time.sleep(0.02)
                        continue
                break
        self._pids = []
        with os.fdopen(self._told) as told:
            return told.read()


@pytest.fixture(params=DIALECTS if LONG else ["push"])
def mounted(request: pytest.FixtureRequest, volume: Volume, speak: Callable[[str], None]) -> Volume:
    """The file system with some files."""
    speak(request.param)
    volume.mount()
    for number in range(FILES):
        (volume.point / f"file-{number}").write_bytes(content(f"file-{number}"))
    return volume


def readers_and_writers(volume: Volume) -> list[Callable[[int], None]]:
    """Work that must never fail, whoever dies."""
    path = volume.point / "written"
    path.write_bytes(bytes(SIZE))
    opened: list[tuple[int, mmap.mmap]] = []

    def read_again(count: int) -> None:
        name = f"file-{count % FILES}"
        assert (volume.point / name).read_bytes() == content(name), name

    def map_again(count: int) -> None:
        name = f"file-{count % FILES}"
        assert mapped_bytes(volume.point / name) == content(name), name

    def store(count: int) -> None:
        # Opened by the process that does it, and by no other.
        if not opened:
            fd = os.open(path, os.O_RDWR)
            opened.append((fd, mmap.mmap(fd, SIZE)))
        ((writing, mapping),) = opened
        page = count % (SIZE // 8192)
        mapping[page * 8192 : page * 8192 + 8] = count.to_bytes(8, "little")
        assert os.pread(writing, 8, page * 8192) == count.to_bytes(8, "little")
        os.pwrite(writing, count.to_bytes(8, "big"), page * 8192 + 4096)
        assert mapping[page * 8192 + 4096 : page * 8192 + 4104] == count.to_bytes(8, "big")

    return [read_again, map_again, store]


def making(volume: Volume, name: str) -> Callable[[int], None]:
    """Work that makes a file in each round, by one of several ways, and reads it again once it is closed."""

    def make(count: int) -> None:
        path = volume.point / f"{name}-{count}"
        data = content(path.name, 1 + count * 7919 % 300_000)
        with path.open("xb", buffering=0) as file:
            if count % 3 == 0:
                file.truncate(len(data))
            for start in range(0, len(data), 100_000):
                file.write(data[start : start + 100_000])
            if count % 4 == 0:
                os.fsync(file.fileno())
        assert path.read_bytes() == data, path

    return make


def check_made(volume: Volume, name: str, count: int) -> None:
    for number in range(count):
        path = volume.point / f"{name}-{number}"
        assert path.read_bytes() == content(path.name, 1 + number * 7919 % 300_000), path


def made(volume: Volume, name: str) -> int:
    return sum(entry.startswith(f"{name}-") for entry in os.listdir(volume.point))


@pytest.mark.timeout(400)
def test_killed_workers(mounted: Volume) -> None:
    """Killed again and again under load: no call fails, no byte is wrong, no file is lost, and space comes back."""
    load = Load([*readers_and_writers(mounted), making(mounted, "new")])
    load.go_on(2)
    for _ in range(4 * FACTOR):
        mounted.kill("famfs-worker")
        load.go_on(1)
    assert load.end() == ""
    assert mounted.status()["takeovers"] >= 4 * FACTOR
    count = made(mounted, "new")
    assert count > 4
    check_made(mounted, "new", count)
    mounted.unmount()
    mounted.mount()
    check_made(mounted, "new", count)
    run("fsck.famfs", "-n", device_of(mounted), host=mounted.host)


def device_of(volume: Volume) -> Path:
    volume.unmount()
    with volume.raw():
        return volume.device


@pytest.mark.timeout(400)
def test_upgrade_under_load(mounted: Volume) -> None:
    """The program is replaced while files are read, mapped and made."""
    load = Load([*readers_and_writers(mounted), making(mounted, "new")])
    load.go_on(2)
    for _ in range(FACTOR):
        here("famfs", "upgrade", mounted.point, host=mounted.host)
        load.go_on(2)
    assert load.end() == ""
    check_made(mounted, "new", made(mounted, "new"))


def test_killed_supervisor(mounted: Volume) -> None:
    """The mount is detached; mapped files go on as long as they are open, and nothing hangs."""
    path = mounted.point / "file-0"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mounted.kill("famfs-supervisor")
        wait_until(lambda: mounts() == [])
        assert mapping[:] == content("file-0")
        assert os.pread(file.fileno(), SIZE, 0) == content("file-0")
    wait_until(lambda: not any(mounted.pids(name) for name in ("famfs-supervisor", "famfs-worker", "famfs-reaper")))
    mounted.mount()
    assert path.read_bytes() == content("file-0")


def test_everything_killed_at_once(mounted: Volume) -> None:
    """Also the process that takes the mount away: the next mount is as good as any, once the dead one is detached."""
    with (mounted.point / "file-1").open("rb") as file:
        pids = [pid for name in ("famfs-reaper", "famfs-supervisor", "famfs-worker") for pid in mounted.pids(name)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not mounted.pids("famfs-worker"))
        # A mapped file that is open does not need its server.
        assert os.pread(file.fileno(), SIZE, 0) == content("file-1")
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says it
            os.listdir(mounted.point)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT)
    if mounts():
        run("umount", "-l", mounted.point, host=mounted.host)
    mounted.mount()
    assert (mounted.point / "file-1").read_bytes() == content("file-1")


def wait_until(what: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.02)
