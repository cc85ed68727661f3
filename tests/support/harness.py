# SPDX-License-Identifier: Apache-2.0
"""Devices, hosts and mounts for the tests of the mount tier.

Whoever touches a mount is another process with a time limit: a process that waits for its own mount, or for one whose
server died, must never be the one that runs the tests. A `Site` is one test's corner of the machine: everything lies
in its folder, so that what is left over can be told from what others do on the same machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from famfs_server.dax.device import DaxDevice
from famfs_server.fuse import mountapi
from famfs_server.fuse.mountapi import MountRecord
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume

BIN = Path(sys.executable).parent
MASTER_UUID = "f00dcafe-0102-4304-8506-0708090a0b0c"
"""The host that the golden images belong to."""
CLIENT_UUID = "0b0b0b0b-0102-4304-8506-0708090a0b0c"
THIRD_UUID = "cccccccc-0102-4304-8506-0708090a0b0c"
DEVICE_SIZE = 4 << 30
MIB = 1 << 20

FAST = ("on", "off")
"""Both settings of the option `fastpath`: every test of behaviour runs with each."""


def run(*command: str | os.PathLike[str], timeout: float = 30, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a program and catch what it prints."""
    words = [os.fspath(word) for word in command]
    more = {"capture_output": True, "stdin": subprocess.DEVNULL, **more}
    return subprocess.run(words, text=True, errors="surrogateescape", timeout=timeout, check=False, **more)


def succeed(*command: str | os.PathLike[str], timeout: float = 30, **more: Any) -> str:
    """Run a program that has to succeed; what it prints."""
    done = run(*command, timeout=timeout, **more)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr or done.stdout}"
    return done.stdout


def client(code: str, *arguments: str | os.PathLike[str], prefix: Sequence[str] = (), timeout: float = 30) -> Any:
    """Run Python `code` in another process, with `sys.argv[1:]` the arguments; the value that it leaves in `result`.

    An OSError comes back as the name of its errno. `prefix` is a program that starts another one, such as setpriv.
    """
    program = f"""
import errno, fcntl, json, mmap, os, sys
arguments = sys.argv[1:]
result = None
def act():
    global result
{"".join(f"    {line}{chr(10)}" for line in code.strip().splitlines())}
try:
    act()
except OSError as error:
    result = errno.errorcode.get(error.errno, repr(error))
sys.stdout.write(json.dumps(result))
"""
    words = [*prefix, sys.executable, "-I", "-S", "-c", program, *(os.fspath(word) for word in arguments)]
    return json.loads(succeed(*words, timeout=timeout))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether `condition` comes true within that time, which is for machines that are busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@dataclass(frozen=True)
class File:
    """A file that a test wants on a device: its bytes, or only its size."""

    path: str
    data: bytes = b""
    size: int = 0
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    interleave: Interleave | None = None


def format_device(path: Path, *, size: int = DEVICE_SIZE, log_length: int = 8 << 20) -> Path:
    """Make an emulated device with an empty file system that belongs to the host MASTER_UUID."""
    with path.open("wb") as image:
        image.truncate(size)
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        try:
            make_filesystem(memory, str(path), UUID(MASTER_UUID), log_length=log_length)
        finally:
            memory.close()
    return path


@contextmanager
def opened(path: Path, host: str = MASTER_UUID) -> Iterator[Volume]:
    """The volume on a device, in this process: for the time before it is mounted, and to look at its memory."""
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        volume = Volume(memory, UUID(host), str(path))
        try:
            yield volume
        finally:
            volume.close()
            memory.close()


def populate(path: Path, directories: Sequence[str] = (), files: Sequence[File] = ()) -> None:
    """Fill the file system on an unmounted device."""
    with opened(path) as volume:
        for name in directories:
            volume.mkdir(os.fsencode(name), 0o755, 0, 0)
        for file in files:
            size = len(file.data) or file.size
            new = NewFile(os.fsencode(file.path), size, file.mode, file.uid, file.gid, file.interleave)
            volume.write(volume.create(new), 0, memoryview(file.data))


class Host:
    """A host of its own: a system UUID and a folder for run-time files. Every mount of it is a process of its own."""

    def __init__(self, directory: Path, uuid: str) -> None:
        directory.mkdir(exist_ok=True)
        self.uuid_file = directory / "system_uuid"
        self.uuid_file.write_bytes(uuid.encode() + b"\0")
        self.run_directory = directory / "run"
        self.environment = {
            **os.environ,
            "FAMFS_SYSTEM_UUID_FILE": str(self.uuid_file),
            "FAMFS_RUN_DIR": str(self.run_directory),
        }

    def mount_command(self, device: Path, place: Path, *options: str) -> list[str]:
        """The command that mounts, with each option an `-o` list."""
        words = [word for option in options for word in ("-o", option)]
        return [str(BIN / "mount.famfs"), str(device), str(place), *words]

    def mount(
        self, device: Path, place: Path, *options: str, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Try to mount, whatever comes of it."""
        return run(*prefix, *self.mount_command(device, place, *options), env=self.environment, timeout=30)

    def run(self, *command: str | os.PathLike[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program as this host."""
        return run(*command, env=self.environment, timeout=timeout)


@dataclass(frozen=True)
class Mount:
    """A mounted file system."""

    site: "Site"
    host: Host
    device: Path
    path: Path
    device_number: int
    warnings: str
    """What the mount command wrote to standard error."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def process(self, name: str) -> int:
        """The pid of this mount's `supervisor`, `worker` or `reaper`; where one is taking another's place, when it
        has."""
        found: list[int] = []

        def one() -> bool:
            found[:] = [pid for pid, comm in self.host_processes().items() if comm == f"famfs-{name}"[:15]]
            return len(found) == 1

        assert wait_for(one), f"{name}: {found}"
        return found[0]

    def host_processes(self) -> dict[int, str]:
        """The daemon's processes, of all mounts of this host."""
        return self.site.processes(self.host)

    @property
    def attached(self) -> bool:
        """Whether the mount is visible."""
        return any(record.device == self.device_number for record in self.site.mounts())

    @property
    def connected(self) -> bool:
        """Whether the kernel still has the connection. Its number may have gone to somebody else's mount since."""
        used_again = any(record.device == self.device_number for record in mountapi.parse_mountinfo())
        number = str(os.minor(self.device_number))
        return (self.site.connections / number).exists() and (self.attached or not used_again)

    def gone(self, seconds: float = 20) -> bool:
        """Whether mount, connection and processes all end, each within that time.

        A mount namespace that somebody else has made meanwhile has a copy of the mount, and the connection goes on with
        it; the copy is taken out there.
        """

        def ended() -> bool:
            return not (self.attached or self.connected or self.host_processes())

        return wait_for(ended, seconds) or (not self.attached and self._let_go_elsewhere() and wait_for(ended, seconds))

    def _let_go_elsewhere(self) -> bool:
        """Take copies of this mount out of the namespaces of programs that are not this run's; whether there were."""
        seen: set[str] = set()

        def namespaces(pids: Iterable[int]) -> Iterator[int]:
            """One process of each namespace that has not been seen."""
            for pid in pids:
                with suppress(OSError):
                    namespace = os.readlink(f"/proc/{pid}/ns/mnt")
                    if namespace not in seen:
                        seen.add(namespace)
                        yield pid

        def has_copy(pid: int) -> bool:
            records = mountapi.parse_mountinfo(f"/proc/{pid}/mountinfo")
            return any(
                (record.device, record.mount_point) == (self.device_number, str(self.path)) for record in records
            )

        list(namespaces([os.getpid(), *marked_processes(os.environ[MARK])]))
        everybody = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        strangers = [pid for pid in namespaces(everybody) if has_copy(pid)]
        for pid in strangers:
            run("nsenter", "-m", "-t", str(pid), "umount", "-l", self.path)
        return bool(strangers)

    def unmount(self) -> None:
        """Unmount as a user does, and see the server end."""
        succeed("umount", self.path)
        assert self.gone(), f"still there: {self.attached=} {self.connected=} {self.host_processes()}"


class Site:
    """The corner of the machine that belongs to one test, or to the tests of one module."""

    def __init__(self, directory: Path, connections: Path) -> None:
        self.directory = directory
        self.connections = connections
        self.hosts: dict[str, Host] = {}

    def host(self, uuid: str = MASTER_UUID) -> Host:
        """The host with that system UUID."""
        if uuid not in self.hosts:
            self.hosts[uuid] = Host(self.directory / f"host{len(self.hosts)}", uuid)
        return self.hosts[uuid]

    def place(self, name: str) -> Path:
        """An empty directory to mount at."""
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def format(self, name: str = "device", **more: int) -> Path:
        """A new device with an empty file system."""
        return format_device(self.directory / name, **more)

    def attach(self, device: Path, *options: str, host: str = MASTER_UUID, name: str | None = None) -> Mount:
        """Mount; whoever calls this unmounts."""
        owner = self.host(host)
        place = self.place(name or f"mnt{len(list(self.directory.glob('mnt*')))}")
        done = owner.mount(device, place, *options)
        assert done.returncode == 0, f"mount ended with {done.returncode}: {done.stderr}"
        (record,) = (record for record in self.mounts() if record.mount_point == str(place))
        return Mount(self, owner, device, place, record.device, done.stderr)

    def known(self, device: Path, record: MountRecord, *, host: str = MASTER_UUID) -> Mount:
        """A mount that was made in another way."""
        return Mount(self, self.host(host), device, Path(record.mount_point), record.device, "")

    @contextmanager
    def mounted(self, device: Path, *options: str, host: str = MASTER_UUID) -> Iterator[Mount]:
        """A mount that is unmounted at the end, unless it is gone already."""
        mount = self.attach(device, *options, host=host)
        try:
            yield mount
        except BaseException:
            self.abandon(mount.path)
            raise
        if mount.attached:
            mount.unmount()

    def abandon(self, path: Path) -> None:
        """Take away what is mounted at a place, whatever state it is in."""
        for record in self.mounts():
            if record.mount_point == str(path) and record.fstype.startswith("fuse"):
                mountapi.abort_connection(os.minor(record.device), self.connections)
                run("umount", "-l", record.mount_point)

    def mounts(self) -> list[MountRecord]:
        """What is mounted below the site's folder."""
        inside = f"{self.directory}/"
        return [record for record in mountapi.parse_mountinfo() if record.mount_point.startswith(inside)]

    def processes(self, host: Host | None = None) -> dict[int, str]:
        """Processes that a host of this site started, by pid, with their names; those of the programs that tests run
        are among them. A worker's child is its notifier, though it bears the worker's name at first."""
        wanted = f"FAMFS_RUN_DIR={host.run_directory if host else self.directory}".encode()
        found: dict[int, str] = {}
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            pid = int(entry.name)
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                if any(word == wanted or word.startswith(wanted + b"/") for word in words):
                    found[pid] = (entry / "comm").read_text().rstrip("\n")
                    parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                found.pop(pid, None)
        workers = [pid for pid, name in found.items() if name == "famfs-worker"]
        return found | {pid: "famfs-notifier" for pid in workers if parents[pid] in workers}

    def clear_run_directories(self) -> None:
        """Remove what a killed supervisor could not remove; the next mount would use it again."""
        for path in self.directory.glob("host*/run/*/"):
            shutil.rmtree(path)

    def leftovers(self) -> list[str]:
        """What a test must not leave behind."""
        found = [f"process {pid} {name}" for pid, name in self.processes().items()]
        found += [f"mount {record.mount_point}" for record in self.mounts()]
        found += [f"run-time folder {path}" for path in self.directory.glob("host*/run/*/")]
        return found

    def clean(self) -> None:
        """Take away everything that is left, in an order in which nothing can wait for anything."""
        for record in self.mounts():
            self.abandon(Path(record.mount_point))
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def hidden_connections(connections: Path) -> set[str]:
    """The FUSE connections of the machine that no visible mount explains: half-made or detached ones."""
    visible = {str(os.minor(record.device)) for record in mountapi.parse_mountinfo() if "fuse" in record.fstype}
    return {entry.name for entry in connections.iterdir()} - visible


MARK = "FAMFS_TEST_SESSION"
"""A variable in the environment of all processes that one run of the tests has started, whoever their parent is now."""


def marked_processes(mark: str) -> dict[int, str]:
    """The processes of a run of the tests by pid, without its own, as their names and run-time folders: those of a
    shared mount, which may be replaced by others that are called the same."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() in words:
                folder = next((word.decode() for word in words if word.startswith(b"FAMFS_RUN_DIR=")), "")
                found[int(entry.name)] = f"{(entry / 'comm').read_text().rstrip()} {folder}"
        except OSError:
            continue
    return found


def process_state(pid: int) -> str:
    """The letter of a process's state, X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
