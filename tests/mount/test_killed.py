# SPDX-License-Identifier: Apache-2.0
"""Supervisor and worker, killed at every system call from the opening of /dev/fuse to the attach (decisions 26).

A recorded run tells which calls there are. Then strace kills one process at one of them, run after run, and each time
nothing may be left: no mount at any path, no connection, no process. FAMFS_TEST_LONG takes all calls, otherwise a
sample.
"""

import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from harness import File, Site, hidden_connections, populate, run, succeed, wait_for

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
SAMPLE = 25
"""Calls of each process that are tried unless all are."""
POLLS = 20
"""Of a thread's waits only the first ones: how many there are depends on how busy the machine is."""
IN_SUPERVISOR_ONLY = [("fsopen", 1), ("fsconfig", 1), ("fsconfig", 7), ("fsmount", 1), ("move_mount", 1)]

pytestmark = pytest.mark.timeout(1200 if LONG else 120)

Role = Literal["supervisor", "worker"]

# Imports everything once, then forks a process that mounts in the foreground, and so is the supervisor, for every line.
# The one that is to be traced stops itself first.
ZYGOTE = """
import os, signal, sys
from famfs_server.daemon import worker
from famfs_server.daemon.lifecycle import mount
from famfs_server.daemon.options import parse_options
from famfs_server.errors import FamfsError

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def serve(assignment, serve=worker.run):
    # Not a successor: it is to serve.
    if assignment.takeover is None:
        stop()
    return serve(assignment)

for line in sys.stdin:
    role, device, place, messages = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        if role == "worker":
            worker.run = serve
        else:
            stop()
        try:
            mount(parse_options(device, place, ["fmap=never"]), foreground=True)
        except FamfsError as error:
            os.write(2, str(error).encode())
            os._exit(error.exit_status)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Stage:
    """A device, a place to mount it at, and the process that starts mounts of it."""

    site: Site
    device: Path
    place: Path
    zygote: "subprocess.Popen[bytes]"

    def readline(self, seconds: float) -> int | None:
        """The next number from the zygote, or None when the time is over."""
        assert self.zygote.stdout is not None
        if not select.select([self.zygote.stdout], [], [], seconds)[0]:
            return None
        return int(self.zygote.stdout.readline())

    def start(self, role: Role) -> int:
        """Start a mount; the pid of its process of that role, which has stopped itself."""
        assert self.zygote.stdin is not None
        messages = self.site.directory / "messages"
        self.zygote.stdin.write(f"{role}\t{self.device}\t{self.place}\t{messages}\n".encode())
        self.zygote.stdin.flush()
        supervisor = self.readline(20)
        assert supervisor is not None
        stopped: list[int] = []

        def find() -> bool:
            family = [supervisor, *map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split())]
            stopped[:] = [pid for pid in family if state(pid) == "T"]
            return bool(stopped)

        assert wait_for(find)
        return stopped[0]

    @property
    def mounted(self) -> bool:
        return bool(self.site.mounts())

    def processes(self) -> dict[int, str]:
        """What is running of the mounts."""
        return {pid: name for pid, name in self.site.processes().items() if pid != self.zygote.pid}


def state(pid: int) -> str:
    """The state of a process as in ps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


@pytest.fixture
def stage(site: Site) -> Iterator[Stage]:
    device = site.format()
    populate(device, files=[File("hello", b"hello, world\n")])
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=site.host().environment,
        start_new_session=True,
    )
    try:
        yield Stage(site, device, site.place("mnt"), zygote)
    finally:
        zygote.kill()
        zygote.communicate(timeout=10)


@contextmanager
def tracing(target: int, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Trace a stopped process and let it go on; at the end it is on its own again."""
    strace = subprocess.Popen(["strace", "-qq", "-p", str(target), *options], stderr=subprocess.DEVNULL)
    try:
        traced = Path(f"/proc/{target}/status")
        assert wait_for(lambda: "TracerPid:\t0\n" not in traced.read_text())
        os.kill(target, signal.SIGCONT)
        yield strace
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(20)


def record(stage: Stage, role: Role) -> list[tuple[str, int]]:
    """The calls of a process between the opening of /dev/fuse and the attach: the name of each, and the how many-th of
    that name it is in its thread since it was stopped."""
    trace = stage.site.directory / "trace"
    follow = ["-f"] if role == "worker" else []
    target = stage.start(role)
    with tracing(target, *follow, "-o", str(trace)):
        assert wait_for(lambda: stage.mounted, 20)
        time.sleep(0.1)
    succeed("umount", stage.place)
    assert stage.readline(20) == 0
    # The worker exists only after the opening.
    inside = role == "worker"
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, int], None] = {}
    for line in trace.read_text().splitlines():
        match = re.match(r"(\d+ +)?(\w+)\(", line)
        if match is None:
            continue
        thread, name = match[1] or "", match[2]
        counts[thread, name] += 1
        inside = inside or '"/dev/fuse"' in line
        if inside and (name != "poll" or counts[thread, name] <= POLLS):
            found[name, counts[thread, name]] = None
    return list(found)


def kill_at(stage: Stage, role: Role, call: str, when: int) -> bool:
    """Kill a process at that call, and check what is left; False if the call was not reached."""
    before = hidden_connections(stage.site.connections)
    follow = ["-f"] if role == "worker" else []
    target = stage.start(role)
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}", "-o", os.devnull]
    with tracing(target, *follow, *inject) as strace:
        status = None
        deadline = time.monotonic() + 20
        while status is None and not stage.mounted:
            status = stage.readline(0.02)
            if state(target) == "Z":
                # strace waits for ever for a killed process whose other threads it has stopped: they never end.
                strace.kill()
            assert time.monotonic() < deadline, f"{role} {call} {when}: neither mounted nor over"
        if status is None:
            status = stage.readline(0.1)
        reached = state(target) in ("gone", "Z")
    if status is None and role == "supervisor" and (reached or run("cat", stage.place / "hello").returncode):
        # Killed when the mount could be seen already; on a busy machine its end takes a moment.
        status = stage.readline(20)
        reached = True
    if status is None:
        # Not reached, or the worker was killed when the mount was complete: another one serves it.
        assert succeed("cat", stage.place / "hello") == "hello, world\n"
        assert role == "worker" or not reached
        succeed("umount", stage.place)
        assert stage.readline(20) == 0
        clean(stage, before)
        return reached
    assert reached
    assert status == (-signal.SIGKILL if role == "supervisor" else 32), (stage.site.directory / "messages").read_text()
    clean(stage, before)
    return True


def clean(stage: Stage, before: set[str]) -> None:
    """Check that nothing is left of a mount."""
    assert wait_for(lambda: not stage.mounted), "a mount is left"
    assert wait_for(lambda: not stage.processes()), f"left: {stage.processes()}"
    assert wait_for(lambda: hidden_connections(stage.site.connections) <= before), "a connection is left"
    stage.site.clear_run_directories()


@pytest.mark.parametrize("role", ["supervisor", "worker"])
def test_killed_at_every_system_call(stage: Stage, role: Role, rng: random.Random) -> None:
    calls = record(stage, role)
    names = {name for name, _ in calls}
    assert names >= ({"openat", "fsopen", "fsconfig", "fsmount", "move_mount"} if role == "supervisor" else {"readv"})
    chosen = calls if LONG else rng.sample(calls, min(SAMPLE, len(calls)))
    reached = 0
    for call, when in chosen:
        print(f"{role}: {call} {when}", flush=True)
        reached += kill_at(stage, role, call, when)
    print(f"{role}: {len(calls)} calls, {len(chosen)} tried, {reached} reached")
    assert reached > len(chosen) // 2


@pytest.mark.parametrize(("call", "when"), IN_SUPERVISOR_ONLY)
def test_the_command_says_so_when_the_server_is_killed(site: Site, call: str, when: int) -> None:
    device = site.format()
    place, host = site.place("mnt"), site.host()
    before = hidden_connections(site.connections)
    inject = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}"]
    inject += ["-e", f"inject={call}:signal=KILL:when={when}"]
    done = run(*inject, *host.mount_command(device, place, "fmap=never"), env=host.environment)
    assert done.returncode == 32
    assert "nothing is mounted" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert wait_for(lambda: not site.mounts() and not site.processes())
    assert wait_for(lambda: hidden_connections(site.connections) <= before)
    site.clear_run_directories()
