# SPDX-License-Identifier: Apache-2.0
"""The worker is killed again and again, and nobody notices: no failed call, no wrong byte, nothing logged twice."""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from famfs_server.fuse import mountapi
from famfs_server.volume.volume import NewFile
from harness import (
    BIN,
    FAST,
    Mount,
    Site,
    client,
    format_device,
    hidden_connections,
    opened,
    run,
    succeed,
    wait_for,
)
from load import MIXED, Load, device_for_load, kill_while, kill_worker, made_by, next_worker, require_clean

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
LOAD_SECONDS = 30 if LONG else 5
LONGEST_CALL = 4.0
"""Seconds; below the five after which a worker that hangs is replaced, and far above what a takeover takes."""

pytestmark = pytest.mark.timeout(240 if LONG else 90)


@pytest.fixture
def device(memory_folder: Path) -> Path:
    """A device with many names, a file to read, and two to write."""
    return device_for_load(memory_folder)


# -- under load ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", FAST)
def test_killed_under_mixed_load(site: Site, device: Path, fast: str, rng: random.Random) -> None:
    with site.mounted(device, f"fastpath={fast}") as mount:
        load = Load(mount, MIXED, LOAD_SECONDS)
        try:
            kills = kill_while(mount, load, rng)
            reports = load.reports()
        finally:
            load.kill()
        status: dict[str, Any] = {}

        def settled() -> bool:
            """The kernel tells of the last closes when it likes."""
            status.update(json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout))
            return status["not_logged_yet"] == 0

        assert wait_for(settled), status["not_logged_yet"]
    calls = sum((Counter(report["calls"]) for report in reports), Counter())
    longest = max(report["longest"] for report in reports)
    print(f"fastpath={fast}: {kills} kills, {sum(calls.values())} calls, longest {longest}: {dict(calls)}")
    assert [failure for report in reports for failure in report["failures"]] == []
    assert status["takeovers"] == kills
    assert status["damage"] is None
    assert longest[0] < LONGEST_CALL
    require_clean(device, made_by(reports))


@pytest.mark.parametrize("fast", FAST)
def test_killed_while_files_are_not_logged_yet(site: Site, device: Path, fast: str) -> None:
    code = """
import hashlib, time
root, count = arguments[0], 8
files = [os.open(root + "/growing%d" % number, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o604) for number in range(count)]
inodes = [os.fstat(fd).st_ino for fd in files]
digests = [hashlib.sha256() for _ in files]
deadline, step, problems = time.monotonic() + 3, 0, []
while time.monotonic() < deadline:
    for number, fd in enumerate(files):
        piece = bytes([step * 8 + number & 255]) * 30011
        if os.pwrite(fd, piece, step * 30011) != 30011:
            problems.append("a short write")
        digests[number].update(piece)
        if os.fstat(fd).st_size != (step + 1) * 30011 or os.fstat(fd).st_ino != inodes[number]:
            problems.append("%d: %s" % (number, os.fstat(fd)))
        if os.pread(fd, 30011, step * 30011) != piece:
            problems.append("%d: wrong bytes at step %d" % (number, step))
    names = os.listdir(root)
    if [name for name in names if name.startswith("growing")] != ["growing%d" % number for number in range(count)]:
        problems.append(sorted(names))
    step += 1
    time.sleep(0.005)
for fd in files:
    os.close(fd)
result = [problems[:5], step * 30011, [digest.hexdigest() for digest in digests]]
"""
    with site.mounted(device, f"fastpath={fast}") as mount, ThreadPoolExecutor(1) as thread:
        writer = thread.submit(client, code, mount.path)
        worker = mount.process("worker")
        while not writer.done():
            time.sleep(0.2)
            worker = kill_worker(mount, worker)
        problems, size, digests = writer.result()
    assert problems == []
    assert size > 0
    require_clean(device, {f"growing{number}": [size, digest] for number, digest in enumerate(digests)})


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL], ids=["late", "killed"])
@pytest.mark.parametrize("fast", FAST)
def test_what_is_closed_just_before_an_unmount_is_not_lost(
    site: Site, device: Path, fast: str, number: signal.Signals
) -> None:
    """The kernel does not wait for its RELEASE, and an unmount takes away what nobody has read."""
    code = """
import signal
files = [os.open(arguments[0] + name, os.O_RDWR | os.O_CREAT | os.O_EXCL) for name in ("/late", "/empty")]
os.write(files[0], b"written")
os.kill(int(arguments[1]), signal.SIGSTOP)
for fd in files:
    os.close(fd)
result = True
"""
    with site.mounted(device, f"fastpath={fast}") as mount:
        worker = mount.process("worker")
        client(code, mount.path, str(worker))
        mountapi.unmount(mount.path)
        os.kill(worker, number)
        assert mount.gone()
    require_clean(device, {"late": [7, hashlib.sha256(b"written").hexdigest()]})
    with opened(device) as volume:
        assert not volume.namespace.resolve(b"empty")


# -- one death at a time ------------------------------------------------------------------------


def answers_after_deaths(mount: Mount, name: str) -> list[float]:
    """Kill seven workers, one after the other; the milliseconds until a name was found not to be there, and `name` to
    be there."""
    code = """
import signal, time
root, name, worker = arguments
os.path.exists(root + "/warm")
start = time.monotonic()
os.kill(int(worker), signal.SIGKILL)
result = [os.path.exists(root + "/absent"), time.monotonic() - start, os.path.exists(root + "/" + name)]
"""
    times = []
    worker = mount.process("worker")
    for _ in range(7):
        absent, seconds, there = client(code, mount.path, name, str(worker))
        assert (absent, there) == (False, True)
        times.append(1000 * seconds)
        worker = next_worker(mount, worker)
    print(f"{mount.path}: death to first answer, median {statistics.median(times):.0f} ms, of {sorted(times)}")
    return times


@pytest.mark.parametrize("fast", FAST)
def test_time_from_death_to_first_answer(site: Site, device: Path, fast: str) -> None:
    with site.mounted(device, f"fastpath={fast}") as mount:
        answers_after_deaths(mount, "many/f0123")


@pytest.mark.skipif(not LONG, reason="a log of a million entries is made; --long")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fast", FAST)
def test_takeover_with_a_million_entries(site: Site, memory_folder: Path, fast: str) -> None:
    """A successor begins with the tree that the dead worker has left, however long the log is. `scripts/bench takeover`
    measures it."""
    batch, batches = 10_000, 100
    path = format_device(memory_folder / "device", size=3 << 40, log_length=1 << 30)
    with opened(path) as volume:
        for number in range(batches):
            volume.mkdir(b"d%d" % number, 0o755, 0, 0)
            volume.create_many([NewFile(b"d%d/f%d" % (number, each), 4096, 0o644, 0, 0) for each in range(batch)])
    with site.mounted(path, f"fastpath={fast}") as mount:
        times = answers_after_deaths(mount, "d57/f4321")
        # A replay of the log would take seconds.
        assert statistics.median(times) < 1000 * LONGEST_CALL
        assert client("open(arguments[0], 'x').write('new')", mount / "new") is None
        status = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)
        assert (status["takeovers"], status["damage"]) == (7, None)


def test_stopped_worker_is_replaced(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        worker = mount.process("worker")
        os.kill(worker, signal.SIGSTOP)
        start = time.monotonic()
        assert client("result = os.path.exists(arguments[0])", mount / "absent", timeout=50) is False
        took = time.monotonic() - start
        print(f"a stopped worker was replaced after {took:.1f} s")
        assert took > 4
        assert mount.process("worker") != worker
        succeed("cmp", "-n", "5", mount / "pattern", mount / "pattern")


@pytest.mark.parametrize("fast", FAST)
def test_killed_supervisor_under_load(site: Site, device: Path, fast: str) -> None:
    before = hidden_connections(site.connections)
    mount = site.attach(device, f"fastpath={fast}")
    load = Load(mount, ["look", "write", "listing", "files"], 20)
    try:
        time.sleep(1)
        os.kill(mount.process("supervisor"), signal.SIGKILL)
        assert wait_for(lambda: not mount.attached), "still mounted"
        assert wait_for(lambda: not mount.host_processes()), mount.host_processes()
        # Every client gets an answer, which is an error, and gives up by itself.
        assert wait_for(lambda: not load.running, 30), "a client hangs"
        assert all(report["failures"] for report in load.reports())
    finally:
        load.kill()
    assert wait_for(lambda: hidden_connections(site.connections) <= before)
    for path in mount.host.run_directory.iterdir():
        shutil.rmtree(path)
    with site.mounted(device) as again:
        succeed("cmp", again / "pattern", again / "pattern")


def test_device_that_cannot_be_read_any_more_ends_the_mount(site: Site, device: Path) -> None:
    place = site.place("mnt")
    messages = site.directory / "messages"
    with messages.open("wb") as output:
        server = subprocess.Popen(
            [BIN / "famfs-server", device, place, "-o", "fmap=never"],
            env=site.host().environment,
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        assert wait_for(lambda: bool(site.mounts()))
        assert wait_for(lambda: run("stat", place / "absent").returncode == 1)
        os.truncate(device, 0)
        assert client("os.stat(arguments[0])", place / "absent") == "EIO"
        assert client("open(arguments[0], 'rb').read(100)", place / "pattern") == "EIO"
        (worker,) = (pid for pid, comm in site.processes().items() if comm == "famfs-worker")
        os.kill(worker, signal.SIGKILL)
        assert wait_for(lambda: server.poll() is not None)
    finally:
        server.kill()
        server.wait()
    assert site.mounts() == []
    assert server.returncode == 32
    assert "5 workers in a row" in messages.read_text().splitlines()[-1]
    assert "has become shorter" in messages.read_text()
    assert "Traceback" not in messages.read_text()
