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
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from famfs_server.volume import check
from harness import (
    BIN,
    FAST,
    MIB,
    File,
    Mount,
    Site,
    client,
    format_device,
    hidden_connections,
    opened,
    populate,
    run,
    succeed,
    wait_for,
)

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
LOAD_SECONDS = 30 if LONG else 5
LONGEST_CALL = 1.0

pytestmark = pytest.mark.timeout(240 if LONG else 90)

NAMES = 3000
PATTERN = random.Random(7).randbytes(3 * MIB + 17)

# Repeats the calls of one kind until the time is up, and prints how often each was made, what failed, and how long the
# longest took. `made` is what the log must hold afterwards.
LOAD = """
import errno, hashlib, json, os, random, sys, time
root, kind, seconds, number = ".", sys.argv[2], float(sys.argv[3]), sys.argv[4]
os.chdir(sys.argv[1])
rng = random.Random(number)
calls, failures, made, longest = {}, [], {}, [0.0, ""]
deadline = time.monotonic() + seconds

def call(name, function, *arguments):
    start = time.monotonic()
    try:
        result = function(*arguments)
    except OSError as error:
        failures.append([name, [str(a)[:60] for a in arguments], repr(error)])
        result = None
    took = time.monotonic() - start
    if took > longest[0]:
        longest[:] = [took, name]
    calls[name] = calls.get(name, 0) + 1
    return result

def expect(what, found, wanted):
    if found != wanted:
        failures.append([what, str(found)[:80], str(wanted)[:80]])

def look():
    name = "f%04d" % rng.randrange(3000)
    found = call("stat", os.stat, root + "/many/" + name)
    expect("mode of " + name, found and found.st_mode, 0o040755)
    expect("nothing", call("stat nothing", os.path.exists, root + "/many/absent%d" % rng.randrange(1 << 30)), False)
    fd = call("open", os.open, root + "/pattern", os.O_RDONLY)
    for _ in range(4):
        at, count = rng.randrange(len(pattern)), rng.choice((1, 4096, 100000, 1 << 20))
        expect("bytes", call("read", os.pread, fd, count, at), pattern[at : at + count])
    call("close", os.close, fd)

def write():
    fd = call("open", os.open, root + "/scratch" + number, os.O_RDWR)
    for _ in range(4):
        at, data = rng.randrange(1 << 20), rng.randbytes(rng.choice((1, 4096, 70000)))
        expect("written", call("write", os.pwrite, fd, data, at), len(data))
        expect("bytes", call("read", os.pread, fd, len(data), at), data)
    call("fsync", os.fsync, fd)
    call("close", os.close, fd)

def listing():
    expect("names", sorted(call("readdir", os.listdir, root + "/many") or []), ["f%04d" % n for n in range(3000)])

def directories():
    name = "dir%s.%d" % (number, len(made))
    call("mkdir", os.mkdir, root + "/" + name)
    made[name] = None
    expect("mode", os.stat(root + "/" + name).st_mode & 0o040700, 0o040700)

def files():
    name = "file%s.%d" % (number, len(made))
    data = rng.randbytes(rng.choice((1, 5000, 70000, 200000)))
    fd = call("creat", os.open, root + "/" + name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    if len(made) % 2:
        call("ftruncate", os.ftruncate, fd, len(data))
    for at in range(0, len(data), 50000):
        piece = data[at : at + 50000]
        expect("written", call("write", os.pwrite, fd, piece, at), len(piece))
    expect("bytes", call("read", os.pread, fd, len(data) + 1, 0), data)
    call("close", os.close, fd)
    made[name] = [len(data), hashlib.sha256(data).hexdigest()]
    expect("size", call("stat", os.stat, root + "/" + name).st_size, len(data))

with open(root + "/pattern", "rb") as source:
    pattern = source.read()
act = {"look": look, "write": write, "listing": listing, "directories": directories, "files": files}[kind]
while time.monotonic() < deadline:
    try:
        act()
    except Exception as error:
        failures.append([kind, repr(error)])
    if len(failures) > 20:
        break
print(json.dumps({"calls": calls, "failures": failures, "longest": longest, "made": made}))
"""


class Load:
    """Processes that use a mount, each in its own way."""

    def __init__(self, mount: Mount, kinds: list[str], seconds: float) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._outputs = [mount.site.directory / f"load{number}" for number in range(len(kinds))]
        for number, (kind, path) in enumerate(zip(kinds, self._outputs, strict=True)):
            words = [sys.executable, "-I", "-S", "-c", LOAD, str(mount.path), kind, str(seconds), str(number)]
            # Not a pipe: that would hold up who has much to say, and nobody would use the mount any more.
            with path.open("wb") as output:
                self._processes.append(subprocess.Popen(words, stdout=output))

    @property
    def running(self) -> bool:
        """Whether any of them has not finished."""
        return any(process.poll() is None for process in self._processes)

    def reports(self) -> list[dict[str, Any]]:
        """What they have to say at the end."""
        assert [process.wait(30) for process in self._processes] == [0] * len(self._processes)
        return [json.loads(path.read_text()) for path in self._outputs]

    def kill(self) -> None:
        """End those that are left, which would be a failure."""
        for process in self._processes:
            process.kill()


@pytest.fixture
def device(memory_folder: Path) -> Path:
    """A device with many names, a file to read, and two to write."""
    path = format_device(memory_folder / "device", size=256 << 30, log_length=32 * MIB)
    names = ("many", *(f"many/f{number:04}" for number in range(NAMES)))
    scratch = [File(f"scratch{number}", size=2 * MIB) for number in range(6)]
    populate(path, names, (File("pattern", PATTERN), *scratch))
    return path


def next_worker(mount: Mount, before: int) -> int:
    """The pid of the worker that has taken the place of `before`."""
    found = [0]

    def there() -> bool:
        found[0] = next(
            (pid for pid, comm in mount.host_processes().items() if comm == "famfs-worker" and pid != before), 0
        )
        return found[0] != 0

    assert wait_for(there, 5), f"nobody takes over from {before}: {mount.attached=} {mount.host_processes()}"
    return found[0]


def kill_while(mount: Mount, load: Load, rng: random.Random, *, pause: tuple[float, float] = (0.1, 0.3)) -> int:
    """Kill the worker again and again until the load has ended; how often."""
    kills = 0
    worker = mount.process("worker")
    while load.running:
        time.sleep(rng.uniform(*pause))
        os.kill(worker, signal.SIGKILL)
        worker = next_worker(mount, worker)
        kills += 1
    return kills


def require_clean(device: Path, expected: dict[str, list[Any] | None]) -> None:
    """The log holds what was made, whole and once, and nothing else."""
    with opened(device) as volume:
        report = check.examine(volume.memories[0], str(device), None)
        assert report.clean, list(check.render(report))
        tree = volume.namespace
        paths = [os.fsdecode(tree.path(node)) for node in tree.walk()]
        assert [path for path, count in Counter(paths).items() if count > 1] == []
        known = {"many", "pattern"}
        made = {path for path in paths if path not in known and not path.startswith(("many/", "scratch"))}
        assert made == expected.keys()
        for path, wanted in expected.items():
            node = tree.resolve(path.encode())
            assert tree.is_directory(node) == (wanted is None), path
            if wanted is not None:
                data = volume.read(node, 0, tree.size[node])
                assert [len(data), hashlib.sha256(data).hexdigest()] == wanted, path


# -- under load ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", FAST)
def test_killed_under_mixed_load(site: Site, device: Path, fast: str, rng: random.Random) -> None:
    kinds = ["look", "write", "listing", "directories", "files", "files"]
    with site.mounted(device, f"fastpath={fast}") as mount:
        load = Load(mount, kinds, LOAD_SECONDS)
        try:
            kills = kill_while(mount, load, rng)
            reports = load.reports()
        finally:
            load.kill()
        status = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)
    calls = sum((Counter(report["calls"]) for report in reports), Counter())
    longest = max(report["longest"] for report in reports)
    print(f"fastpath={fast}: {kills} kills, {sum(calls.values())} calls, longest {longest}: {dict(calls)}")
    assert [failure for report in reports for failure in report["failures"]] == []
    assert status["takeovers"] == kills
    assert status["damage"] is None
    assert status["not_logged_yet"] == 0
    assert longest[0] < LONGEST_CALL
    made: dict[str, list[Any] | None] = {}
    for report in reports:
        made |= report["made"]
    require_clean(device, made)


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
            os.kill(worker, signal.SIGKILL)
            worker = next_worker(mount, worker)
        problems, size, digests = writer.result()
    assert problems == []
    assert size > 0
    require_clean(device, {f"growing{number}": [size, digest] for number, digest in enumerate(digests)})


# -- one death at a time ------------------------------------------------------------------------


@pytest.mark.parametrize("fast", FAST)
def test_time_from_death_to_first_answer(site: Site, device: Path, fast: str) -> None:
    code = """
import signal, time
os.path.exists(arguments[0] + "/warm")
start = time.monotonic()
os.kill(int(arguments[1]), signal.SIGKILL)
result = [os.path.exists(arguments[0] + "/absent"), time.monotonic() - start]
"""
    times = []
    with site.mounted(device, f"fastpath={fast}") as mount:
        worker = mount.process("worker")
        for _ in range(7):
            found, seconds = client(code, mount.path, str(worker))
            assert not found
            times.append(1000 * seconds)
            worker = next_worker(mount, worker)
    print(f"fastpath={fast}: death to first answer, median {statistics.median(times):.0f} ms, of {sorted(times)}")


@pytest.mark.parametrize("fast", FAST)
def test_stopped_worker_is_replaced(site: Site, device: Path, fast: str) -> None:
    with site.mounted(device, f"fastpath={fast}") as mount:
        worker = mount.process("worker")
        os.kill(worker, signal.SIGSTOP)
        start = time.monotonic()
        assert client("result = os.path.exists(arguments[0])", mount / "absent", timeout=20) is False
        took = time.monotonic() - start
        print(f"fastpath={fast}: a stopped worker was replaced after {took:.1f} s")
        assert 4 < took < 9
        assert mount.process("worker") != worker
        succeed("cmp", "-n", "5", mount / "pattern", mount / "pattern")


def test_idle_worker_that_is_stopped_is_left_alone(site: Site, device: Path) -> None:
    with site.mounted(device, "poll=0") as mount:
        worker = mount.process("worker")
        os.kill(worker, signal.SIGSTOP)
        time.sleep(8)
        assert mount.process("worker") == worker
        os.kill(worker, signal.SIGCONT)
        assert client("result = os.path.exists(arguments[0])", mount / "absent") is False


@pytest.mark.parametrize("fast", FAST)
def test_killed_supervisor_under_load(site: Site, device: Path, fast: str) -> None:
    before = hidden_connections(site.connections)
    mount = site.attach(device, f"fastpath={fast}")
    load = Load(mount, ["look", "write", "listing", "files"], 20)
    try:
        time.sleep(1)
        os.kill(mount.process("supervisor"), signal.SIGKILL)
        assert wait_for(lambda: not mount.attached, 5), "still mounted"
        assert wait_for(lambda: not mount.host_processes(), 5), mount.host_processes()
        # Every client gets an answer, which is an error, and gives up by itself.
        assert wait_for(lambda: not load.running, 15), "a client hangs"
        assert all(report["failures"] for report in load.reports())
    finally:
        load.kill()
    assert wait_for(lambda: hidden_connections(site.connections) <= before, 5)
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
        assert wait_for(lambda: run("stat", place / "absent", timeout=5).returncode == 1)
        os.truncate(device, 0)
        assert client("os.stat(arguments[0])", place / "absent") == "EIO"
        assert client("open(arguments[0], 'rb').read(100)", place / "pattern") == "EIO"
        (worker,) = (pid for pid, comm in site.processes().items() if comm == "famfs-worker")
        os.kill(worker, signal.SIGKILL)
        assert wait_for(lambda: server.poll() is not None, 10)
    finally:
        server.kill()
        server.wait()
    assert site.mounts() == []
    assert server.returncode == 32
    assert "5 workers in a row" in messages.read_text().splitlines()[-1]
    assert "has become shorter" in messages.read_text()
    assert "Traceback" not in messages.read_text()
