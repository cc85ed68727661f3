# SPDX-License-Identifier: Apache-2.0
"""Processes that use a mount in every way at once and notice every failed call and wrong byte; what must be in the log
afterwards."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from famfs_server.volume import check
from harness import MIB, File, Mount, format_device, opened, populate, run, wait_for

MIXED = ("look", "write", "listing", "directories", "files", "files")
"""Kinds of load that together make every kind of request."""
NAMES = 3000
PATTERN = random.Random(7).randbytes(3 * MIB + 17)

# Repeats the calls of one kind until the time is up, or until it is told that it is enough, and prints how often each
# was made, what failed, and how long the longest took. `made` is what the log must hold afterwards.
LOAD = """
import errno, hashlib, json, os, random, sys, time
root, kind, seconds, number, enough = ".", sys.argv[2], float(sys.argv[3]), sys.argv[4], sys.argv[5]
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
    # Most of it is not mapped in a worker that has just begun.
    fd = call("open", os.open, root + "/wide", os.O_RDONLY)
    for _ in range(2):
        at = rng.randrange(64) << 20
        expect("zeroes", call("read", os.pread, fd, 1 << 20, at), bytes(1 << 20))
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
open(enough + number, "w").close()
act = {"look": look, "write": write, "listing": listing, "directories": directories, "files": files}[kind]
while time.monotonic() < deadline and not os.path.exists(enough):
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

    def __init__(self, mount: Mount, kinds: Sequence[str], seconds: float) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._outputs = [mount.site.directory / f"load{number}" for number in range(len(kinds))]
        folder = mount.site.directory / f"load-{time.monotonic_ns()}"
        folder.mkdir()
        self._enough = folder / "enough"
        for number, (kind, path) in enumerate(zip(kinds, self._outputs, strict=True)):
            words = [sys.executable, "-I", "-S", "-c", LOAD, str(mount.path), kind, str(seconds), str(number)]
            words.append(str(self._enough))
            # Not a pipe: that would hold up who has much to say, and nobody would use the mount any more.
            with path.open("wb") as output:
                self._processes.append(subprocess.Popen(words, stdout=output))
        if not wait_for(lambda: len(list(folder.iterdir())) == len(kinds), 20):
            self.kill()
            raise AssertionError("the load does not begin")

    @property
    def running(self) -> bool:
        """Whether any of them has not finished."""
        return any(process.poll() is None for process in self._processes)

    def enough(self) -> None:
        """Have them finish what they are at."""
        self._enough.touch()

    def reports(self) -> list[dict[str, Any]]:
        """What they have to say at the end."""
        assert [process.wait(30) for process in self._processes] == [0] * len(self._processes)
        return [json.loads(path.read_text()) for path in self._outputs]

    def kill(self) -> None:
        """End those that are left, which would be a failure."""
        for process in self._processes:
            process.kill()


def device_for_load(folder: Path) -> Path:
    """A device with many names, a file to read, and some to write."""
    path = format_device(folder / "device", size=256 << 30, log_length=32 * MIB)
    names = ("many", *(f"many/f{number:04}" for number in range(NAMES)))
    scratch = [File(f"scratch{number}", size=2 * MIB) for number in range(6)]
    populate(path, names, (File("pattern", PATTERN), File("wide", size=64 * MIB), *scratch))
    return path


def next_worker(mount: Mount, before: int) -> int:
    """The pid of the worker that has taken the place of `before`."""
    found = [0]

    def there() -> bool:
        found[0] = next(
            (pid for pid, comm in mount.host_processes().items() if comm == "famfs-worker" and pid != before), 0
        )
        return found[0] != 0

    assert wait_for(there), f"nobody takes over from {before}: {mount.attached=} {mount.host_processes()}"
    return found[0]


def kill_worker(mount: Mount, worker: int) -> int:
    """Kill a worker, and wait until the next one has answered something; its pid.

    What was in hand comes before that: a request that is in hand at two deaths in a row ends with EIO (decisions 16).
    """
    os.kill(worker, signal.SIGKILL)
    worker = next_worker(mount, worker)
    done = run("stat", mount / "what nobody makes")
    assert "No such file" in done.stderr, done
    return worker


def kill_while(mount: Mount, load: Load, rng: random.Random, *, pause: tuple[float, float] = (0.1, 0.3)) -> int:
    """Kill the worker again and again until the load has ended; how often."""
    kills = 0
    worker = mount.process("worker")
    while load.running:
        time.sleep(rng.uniform(*pause))
        worker = kill_worker(mount, worker)
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
        known = {"many", "pattern", "wide"}
        made = {path for path in paths if path not in known and not path.startswith(("many/", "scratch"))}
        assert made == expected.keys()
        for path, wanted in expected.items():
            node = tree.resolve(path.encode())
            assert tree.is_directory(node) == (wanted is None), path
            if wanted is not None:
                data = volume.read(node, 0, tree.size[node])
                assert [len(data), hashlib.sha256(data).hexdigest()] == wanted, path


def made_by(reports: list[dict[str, Any]]) -> dict[str, list[Any] | None]:
    """What `require_clean` is to find."""
    made: dict[str, list[Any] | None] = {}
    for report in reports:
        made |= report["made"]
    return made
