# SPDX-License-Identifier: Apache-2.0
"""Simulated hosts: each has its own system UUID, daemon and mount namespace, and all mount one device at one place.

Random work on all of them is compared with a dictionary. Workers are killed and hosts mount again meanwhile.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from famfs_server.volume import check
from harness import BIN, CLIENT_UUID, MASTER_UUID, THIRD_UUID, Host, Site, opened, wait_for

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
SECONDS = 240 if LONG else 8

pytestmark = pytest.mark.timeout(SECONDS + 120)

# A host: mounts in its own mount namespace, does what it is told line by line, unmounts.
HOST = """
import errno, hashlib, json, os, random, subprocess, sys
bin, device, place, fast = sys.argv[1:5]

def data(request):
    return random.Random(request["seed"]).randbytes(request["size"])

def mount(request=None):
    subprocess.run([bin + "/mount.famfs", device, place, "-o", "poll=0", "-o", "fastpath=" + fast], check=True,
        stderr=subprocess.DEVNULL)

def unmount(request=None):
    subprocess.run(["umount", place], check=True)

def again(request):
    unmount()
    mount()

def mkdir(request):
    os.mkdir(os.path.join(place, request["path"]))

def make(request):
    path = os.path.join(place, request["path"])
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if request["how"] == "sized":
            os.ftruncate(fd, request["size"])
        os.write(fd, data(request))
        os.fsync(fd)
    finally:
        os.close(fd)

def batch(request):
    words = [word for path in request["paths"]
        for word in ("-M", "%s,%d" % (os.path.join(place, path), request["size"]))]
    done = subprocess.run([bin + "/famfs", "creat", *words], capture_output=True, text=True)
    return done.returncode, done.stderr

def copy(request):
    source = request["source"]
    with open(source, "wb") as file:
        file.write(data(request))
    done = subprocess.run([bin + "/famfs", "cp", source, os.path.join(place, request["path"])], capture_output=True,
        text=True)
    return done.returncode, done.stderr

def write(request):
    fd = os.open(os.path.join(place, request["path"]), os.O_WRONLY)
    try:
        return os.pwrite(fd, data(request), request["offset"])
    finally:
        os.close(fd)

def look(request):
    found = os.lstat(os.path.join(place, request["path"]))
    return [found.st_ino, found.st_size]

def tree(request):
    found = {}
    for folder, directories, names in os.walk(place):
        if folder == place:
            directories.remove(".meta")
        for name in directories:
            found[os.path.relpath(os.path.join(folder, name), place)] = None
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, place)] = hashlib.sha256(file.read()).hexdigest()
    return found

mount()
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = globals()[request["act"]](request)
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(json.dumps(answer), flush=True)
unmount()
"""


class Simulated:
    """One simulated host, at work in a mount namespace of its own."""

    def __init__(self, host: Host, device: Path, place: Path, fast: str) -> None:
        self.host = host
        command = ["unshare", "--mount", "--propagation", "slave", sys.executable, "-c", HOST]
        self.process = subprocess.Popen(
            [*command, str(BIN), str(device), str(place), fast],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=host.environment,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def __call__(self, act: str, **request: Any) -> Any:
        """Have the host do something; its answer, or the name of an errno."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"act": act, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def end(self) -> None:
        """Unmount, and see it end well."""
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@contextmanager
def simulated(site: Site, uuid: str, device: Path, place: Path, fast: str) -> Iterator[Simulated]:
    host = Simulated(site.host(uuid), device, place, fast)
    try:
        yield host
        host.end()
    finally:
        if host.process.poll() is None:
            for pid in site.processes(host.host):
                os.kill(pid, signal.SIGKILL)
            host.process.communicate(timeout=30)


class Work:
    """Random work on all hosts, and what it must lead to."""

    def __init__(self, site: Site, hosts: list[Simulated], rng: random.Random) -> None:
        self.site, self.hosts, self.rng = site, hosts, rng
        self.directories = [""]
        self.files: dict[str, bytearray] = {}
        self.serial = 0
        self.counts: dict[str, int] = {}

    def new_path(self) -> str:
        self.serial += 1
        return os.path.join(self.rng.choice(self.directories), f"n{self.serial}")

    def data(self, largest: int) -> tuple[dict[str, int], bytes]:
        seed, size = self.rng.randrange(1 << 30), self.rng.randrange(1, largest)
        return {"seed": seed, "size": size}, random.Random(seed).randbytes(size)

    def found_at_once(self, path: str) -> None:
        """Every host finds what has just been made, at its first look, under one inode number."""
        looks = [host("look", path=path) for host in self.hosts[1:]]
        assert all(isinstance(look, list) for look in looks), (path, looks)
        assert len({tuple(look) for look in looks}) == 1
        if path in self.files:
            assert looks[0][1] == len(self.files[path])

    def step(self) -> None:
        act = self.rng.choice(
            ["mkdir", "make", "make", "make", "batch", "copy", "write", "write", "refused", "look", "again", "kill"]
        )
        self.counts[act] = self.counts.get(act, 0) + 1
        getattr(self, act)()

    def mkdir(self) -> None:
        path = self.new_path()
        assert self.hosts[0]("mkdir", path=path) is None
        self.directories.append(path)
        self.found_at_once(path)

    def make(self) -> None:
        path, (request, data) = self.new_path(), self.data(30_000)
        assert self.hosts[0]("make", path=path, how=self.rng.choice(["sized", "grown"]), **request) is None
        self.files[path] = bytearray(data)
        self.found_at_once(path)

    def batch(self) -> None:
        paths = [self.new_path() for _ in range(self.rng.randrange(1, 30))]
        assert self.hosts[0]("batch", paths=paths, size=1000) == [0, ""]
        for path in paths:
            self.files[path] = bytearray(1000)
        self.found_at_once(self.rng.choice(paths))

    def copy(self) -> None:
        path, (request, data) = self.new_path(), self.data(3 << 20)
        source = str(self.site.directory / "source")
        assert self.hosts[0]("copy", path=path, source=source, **request) == [0, ""]
        self.files[path] = bytearray(data)
        self.found_at_once(path)

    def write(self) -> None:
        if self.files:
            path, (request, data) = self.rng.choice(list(self.files)), self.data(5000)
            whole = self.files[path]
            offset = self.rng.randrange(len(whole))
            kept = data[: len(whole) - offset]
            assert self.rng.choice(self.hosts)("write", path=path, offset=offset, **request) == len(kept)
            whole[offset : offset + len(kept)] = kept

    def refused(self) -> None:
        client = self.rng.choice(self.hosts[1:])
        assert client("mkdir", path=self.new_path()) == "EROFS"
        assert client("make", path=self.new_path(), how="sized", seed=1, size=1) == "EROFS"

    def look(self) -> None:
        assert self.rng.choice(self.hosts)("look", path=f"nothing{self.serial}") == "ENOENT"

    def again(self) -> None:
        assert self.rng.choice(self.hosts)("again") is None

    def kill(self) -> None:
        host = self.rng.choice(self.hosts)
        for pid, name in self.site.processes(host.host).items():
            if name == "famfs-worker":
                os.kill(pid, signal.SIGKILL)
                assert wait_for(lambda pid=pid: pid not in self.site.processes(host.host))

    def compare(self) -> None:
        """All hosts show the same tree and the same bytes."""
        import hashlib

        wanted = {path: hashlib.sha256(data).hexdigest() for path, data in self.files.items()}
        wanted |= dict.fromkeys(self.directories[1:])
        for host in self.hosts:
            assert host("tree") == wanted


@pytest.mark.parametrize("fast", ["on", "off"] if LONG else ["on"])
def test_random_work_on_all_hosts(site: Site, memory_folder: Path, rng: random.Random, fast: str) -> None:
    # Each of some thousand files takes 2 MiB of it.
    device = site.format(str(memory_folder / "device"), size=16 << 30)
    place = site.place("mnt")
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(simulated(site, uuid, device, place, fast))
            for uuid in (MASTER_UUID, CLIENT_UUID, THIRD_UUID)
        ]
        # Nobody but themselves sees their mounts.
        assert site.mounts() == []
        work = Work(site, hosts, rng)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for _ in range(20):
                work.step()
                # On a busy machine a round takes a minute.
                if LONG and time.monotonic() > end:
                    break
            work.compare()
        print(work.counts)
    with opened(device) as volume:
        assert len(list(volume.namespace.walk())) == len(work.files) + len(work.directories) - 1
        report = check.examine(volume.memories[0], str(device), None)
        assert report.clean, list(check.render(report))
