# SPDX-License-Identifier: Apache-2.0
"""A file system on a real dax device, and its mounts with extent maps."""

import ctypes
import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import commands
from famfs_server.cli.target import Unmounted
from famfs_server.cli.unmounted import DeviceTarget
from guest_devices import SetMode
from programs import fork, here, mounts, run

DIALECTS = ("pull", "push", "push-interleave")
STATX_ATTR_DAX = 0x200000
AT_EMPTY_PATH = 0x1000
END_SECONDS = 30


class Volume:
    """One file system, its host and its mount points. `device` is the node of its first device."""

    def __init__(self, name: str, set_mode: SetMode, folder: Path) -> None:
        self.name = name
        self.device = Path("/dev", name)
        self.folder = folder
        self.host = folder / "master.uuid"
        self.point = folder / "mnt"
        self.point.mkdir()
        self._set_mode = set_mode
        self._points = [self.point]

    def make(self, *words: str) -> None:
        """mkfs, in devdax mode."""
        self._set_mode(self.name, "devdax")
        here("mkfs.famfs", "-f", *words, self.device, host=self.host)

    def mount(
        self, *options: str, point: Path | None = None, host: Path | None = None, status: int = 0
    ) -> commands.Outcome:
        """Mount with the device in famfs mode."""
        words = ",".join(["loglevel=warning", *options])
        self._set_mode(self.name, "fsdev")
        point = point or self.point
        if point not in self._points:
            self._points.append(point)
        return fork("mount.famfs", self.device, point, "-o", words, host=host or self.host, status=status)

    def unmount(self, point: Path | None = None) -> None:
        """Unmount as a user does, and wait until the server is gone."""
        here("famfs", "umount", point or self.point, host=self.host)

    def status(self, point: Path | None = None) -> dict[str, Any]:
        """What `famfs status` says."""
        found: dict[str, Any] = json.loads(here("famfs", "status", "--json", point or self.point, host=self.host).out)
        return found

    def requests(self, *names: str) -> int:
        """How many requests of these opcodes there were."""
        opcodes = self.status()["requests"]["opcodes"]
        return sum(opcodes.get(name, {"count": 0})["count"] for name in names)

    def pids(self, name: str) -> list[int]:
        """The processes of the server of this name, such as famfs-worker."""
        found = subprocess.run(["pgrep", "-x", name[:15]], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]

    def kill(self, name: str) -> None:
        """kill -9 to all processes of the server of this name."""
        for pid in self.pids(name):
            os.kill(pid, signal.SIGKILL)

    @contextmanager
    def raw(self) -> Iterator[DeviceTarget]:
        """The file system as the device holds it: mapped by this process in devdax mode, replayed from the log."""
        self._set_mode(self.name, "devdax")
        target = DeviceTarget(Unmounted(str(self.device)), write=False)
        try:
            yield target
        finally:
            target.close()

    def end(self) -> None:
        """Take away whatever is mounted, kill whatever serves, and bring the device back."""
        for point in self._points:
            # A dead mount answers no stat(2), so what is mounted is asked of the kernel's list.
            while any(line.split()[1] == str(point) for line in mounts()):
                subprocess.run(["umount", "-l", str(point)], timeout=END_SECONDS, check=False)
        until = time.monotonic() + END_SECONDS
        while self.pids("famfs-supervisor") and time.monotonic() < until:
            time.sleep(0.1)
        left = self.pids("famfs-supervisor")
        if left:
            # Whoever has a file open is not to find the device gone: the kernel does not survive that.
            self._give_up(left)
        self._set_mode(self.name, "devdax")

    def _give_up(self, left: list[int]) -> NoReturn:
        for connection in Path("/sys/fs/famfs/connections").iterdir():
            (connection / "abort").write_text("1")
        for name in ("famfs-supervisor", "famfs-worker", "famfs-reaper"):
            self.kill(name)
        raise AssertionError(f"the server has not ended with its mount: {left}")


def is_mapped(path: Path) -> bool:
    """Whether the kernel maps the file, as statx(2) says it of an open one: it forgets the map with the inode."""
    buffer = ctypes.create_string_buffer(256)
    with path.open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).statx(file.fileno(), b"", AT_EMPTY_PATH, 0x7FF, buffer):
            raise OSError(ctypes.get_errno(), "statx", path)
    return bool(int.from_bytes(buffer.raw[8:16], "little") & STATX_ATTR_DAX)


def mapped_bytes(path: Path) -> bytes:
    """The file as a mapping shows it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        return bytes(mapping)


def run_in(folder: Path, *command: str | Path, host: Path) -> None:
    """Run a program in a folder."""
    run("env", "-C", str(folder), *command, host=host)
