# SPDX-License-Identifier: Apache-2.0
"""The corner of the machine that a run works in, and the certainty that nothing of it stays.

Everything lies in a tmpfs of the run's own. This process never touches a mount that is measured, since a server that
hangs would hang it too: clients do, each in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.images import MASTER
from famfs_server.fuse import kernels, mountapi
from famfs_server.fuse.mountapi import MountRecord

ROOT = Path(__file__).resolve().parents[1]
OTHER_HOST = "0b0b0b0b-0102-4304-8506-0708090a0b0c"
"""A host that owns no image, so that it is a client."""
CLIENT_SECONDS = 300.0
"""How long a client may take for its job."""


class BenchError(Exception):
    """The run cannot go on: something that it needs is missing, or a contender broke."""


def run(*command: str | os.PathLike[str], timeout: float = 120, **more: Any) -> str:
    """Run a program that has to succeed; what it prints."""
    done = subprocess.run(
        [os.fspath(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **more,
    )
    if done.returncode:
        raise BenchError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return str(done.stdout)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` comes true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class Client:
    """A client process that is ready for its job. See client.py for jobs and results."""

    def __init__(self, process: "subprocess.Popen[str]", job: dict[str, Any]) -> None:
        self._process = process
        self._job = job
        self._say(json.dumps(job))

    def wait_ready(self) -> Self:
        """Wait until the client is prepared and warm. Raises BenchError."""
        line = self._hear()
        if line != "ready\n":
            raise self._broken(line)
        return self

    def go(self) -> None:
        """Let it begin."""
        self._say("go")

    def stop(self) -> None:
        """End a job that goes on until it is told; `result` waits for the outcome."""
        self._process.send_signal(signal.SIGTERM)

    def result(self) -> dict[str, Any]:
        """Wait for the outcome. Raises BenchError when the client failed."""
        line = self._hear()
        self._process.wait(timeout=10)
        try:
            outcome = json.loads(line)
        except ValueError:
            raise self._broken(line) from None
        if not isinstance(outcome, dict) or "error" in outcome:
            raise self._broken(line)
        return outcome

    def _broken(self, line: str) -> BenchError:
        return BenchError(f"client {self._job['action']}: {line.strip() or 'ended without a word'}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        # A client that hangs on a broken server is killed, and its pipe then ends.
        previous = signal.signal(signal.SIGALRM, lambda _number, _frame: self._process.kill())
        signal.setitimer(signal.ITIMER_REAL, CLIENT_SECONDS)
        try:
            return self._process.stdout.readline()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


class Site:
    """The run's folder, hosts, mounts and processes. A context manager: leaving it takes all of it away."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="famfs-bench-", dir="/tmp"))
        self._children: list[subprocess.Popen[str]] = []
        self._connections = self.directory / "connections"
        self._run_directory = self.directory / "run"
        run("mount", "-t", "tmpfs", "-o", "mode=0700,size=80%", "famfs-bench", self.directory)
        self._connections.mkdir()
        run("mount", "-t", "fusectl", "none", self._connections)
        for name, uuid in (("master", str(MASTER)), ("other", OTHER_HOST)):
            (self.directory / name).write_bytes(uuid.encode() + b"\0")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def environment(self, *, master: bool = True) -> dict[str, str]:
        """The environment of a host's programs."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FAMFS_RUN_DIR": str(self._run_directory),
            "FAMFS_SYSTEM_UUID_FILE": str(self.directory / ("master" if master else "other")),
        }

    def start(self, *words: str | os.PathLike[str], **more: Any) -> "subprocess.Popen[str]":
        """Start a program that ends with the run; its standard input and output are pipes."""
        more = {"stdin": subprocess.PIPE, "env": self.environment(), **more}
        # Out of the terminal's process group: a ^C reaches this process, which then ends the others in order.
        process = subprocess.Popen(
            [os.fspath(word) for word in words], stdout=subprocess.PIPE, text=True, start_new_session=True, **more
        )
        self._children.append(process)
        return process

    def client(self, action: str, root: Path | None, **job: Any) -> Client:
        """Start a client; `Client.wait_ready` is next."""
        process = self.start(sys.executable, "-I", "-S", Path(__file__).with_name("client.py"))
        return Client(process, {"action": action, "root": None if root is None else str(root), **job})

    def measure(self, action: str, root: Path | None, **job: Any) -> dict[str, Any]:
        """The outcome of one client's job."""
        client = self.client(action, root, **job).wait_ready()
        client.go()
        return client.result()

    def place(self, name: str) -> Path:
        """An empty directory to mount at."""
        path = self.directory / "mounts" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mounts(self) -> list[MountRecord]:
        """What is mounted in the run's folder, the latest last."""
        inside = f"{self.directory}/"
        return [record for record in mountapi.parse_mountinfo() if record.mount_point.startswith(inside)]

    @contextmanager
    def unmounting(self, place: Path) -> Iterator[Path]:
        """Unmount what is at `place` in the end, and wait until its server is gone."""
        (record,) = (record for record in self.mounts() if record.mount_point == str(place))
        try:
            yield place
            mountapi.unmount(place)
            connection = self._connections / str(os.minor(record.device))
            # The device is free again when the server's run-time folder is gone; another one may be mounted meanwhile.
            idle = wait_for(lambda: not connection.exists() and self._idle(), 10)
            if record.fstype.startswith(("fuse", "famfs")) and not idle:
                raise BenchError(f"the server of {place} does not end after umount")
        finally:
            self._take_away(place)

    def _idle(self) -> bool:
        """Whether there are no more servers than mounts."""
        servers = len(list(self._run_directory.glob("*")))
        return servers <= sum(1 for record in self.mounts() if record.fstype in kernels.SHOWN_TYPES)

    def _take_away(self, place: Path) -> None:
        for record in reversed(self.mounts()):
            if Path(record.mount_point) == place:
                if record.fstype.startswith("fuse"):
                    mountapi.abort_connection(os.minor(record.device), self._connections)
                mountapi.unmount(place, lazy=True)

    def close(self) -> None:
        """End everything, in an order in which nothing can wait for anything."""
        for record in reversed(self.mounts()):
            if Path(record.mount_point) != self._connections:
                self._take_away(Path(record.mount_point))
        for child in self._children:
            if child.poll() is None:
                child.kill()
        for pid in self.servers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait(timeout=10)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        mountapi.unmount(self._connections, lazy=True)
        mountapi.unmount(self.directory, lazy=True)
        self.directory.rmdir()

    def servers(self) -> Sequence[int]:
        """Processes of the servers of this run that still live, told by their environment."""
        wanted = f"FAMFS_RUN_DIR={self._run_directory}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found
