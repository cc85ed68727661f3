# SPDX-License-Identifier: Apache-2.0
"""Superblock and log through the own mount (decisions 20), with the real /dev/fuse of a stock kernel.

No kernel here takes extent maps, so `tests/support/famfs_mode.py` has the pages of the two files read once; all that
comes after is the product's: who opens what, the private copy of the mount, what is inherited, and when it is let go.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import famfs_mode
from famfs_server.fuse import mountapi
from harness import (
    BIN,
    CLIENT_UUID,
    MASTER_UUID,
    File,
    Mount,
    Site,
    client,
    format_device,
    populate,
    run,
    succeed,
    wait_for,
)

PROGRAM = famfs_mode.__file__
NAMES = ("some", "some/directory")


@pytest.fixture(scope="module")
def device(shared_memory_folder: Path) -> Path:
    path = format_device(shared_memory_folder / "device")
    populate(path, NAMES, (File("some/file", b"0123456789"),))
    return path


class Served:
    """A server of `famfs_mode.py`, and what it prints."""

    def __init__(self, site: Site, device: Path, *words: str, host: str = CLIENT_UUID) -> None:
        owner = site.host(host)
        self.place = site.place("mnt")
        self.messages = site.directory / "messages"
        command = [sys.executable, PROGRAM, str(device), str(self.place), str(owner.run_directory / "m"), host, *words]
        with self.messages.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=owner.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode().strip()
        self.host = owner

    def mount(self, site: Site) -> Mount:
        """The mount, once it is there."""
        assert self.line == "ready", self.line + self.messages.read_text()
        (record,) = site.mounts()
        return Mount(site, self.host, Path(record.source), self.place, record.device, "")


@contextmanager
def served(site: Site, device: Path, *words: str, host: str = CLIENT_UUID) -> Iterator[tuple[Served, Mount]]:
    """A mount by `famfs_mode.py`."""
    server = Served(site, device, *words, host=host)
    try:
        yield server, server.mount(site)
    finally:
        site.abandon(server.place)
        server.process.kill()
        server.process.wait()


def test_volume_is_read_through_the_mount(site: Site, device: Path) -> None:
    with served(site, device) as (server, mount):
        assert sorted(os.path.relpath(line, mount.path) for line in succeed("find", mount.path).split()) == sorted(
            [".", ".meta", ".meta/.log", ".meta/.superblock", "some", "some/directory", "some/file"]
        )
        assert succeed("stat", "-c", "%s", mount / "some/file").strip() == "10"
        # The bytes of files are for the kernel alone.
        assert client("os.read(os.open(arguments[0], os.O_RDONLY), 10)", mount / "some/file") == "EIO"
        # Nothing but the files of `.meta` is mapped, and by the worker alone.
        for name in ("supervisor", "worker", "reaper"):
            maps = Path(f"/proc/{mount.process(name)}/maps").read_text()
            assert str(device) not in maps
            assert (".superblock" in maps, ".log" in maps) == (name == "worker",) * 2
        mount.unmount()
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.messages.read_text()


def test_successors_map_what_they_inherit(site: Site, device: Path) -> None:
    """A successor that asked for anything would ask itself, and never come up."""
    with served(site, device) as (server, mount):
        before = mount.process("worker")
        for _ in range(3):
            os.kill(before, signal.SIGKILL)
            assert run("stat", mount / "some/absent", timeout=10).returncode == 1
            assert mount.process("worker") != before
            before = mount.process("worker")
            assert ".log" in Path(f"/proc/{before}/maps").read_text()
        assert succeed("stat", "-c", "%s", mount / "some/file").strip() == "10"
        mount.unmount()
        assert server.process.wait(20) == 0


@pytest.mark.parametrize("how", ["signal", "lazily", "twice"])
def test_everything_is_let_go_when_no_path_leads_there(site: Site, device: Path, how: str) -> None:
    with served(site, device) as (server, mount):
        if how == "signal":
            server.process.terminate()
        elif how == "lazily":
            succeed("umount", "-l", mount.path)
        else:
            # A second path to it keeps it alive.
            other = site.place("other")
            succeed("mount", "--bind", mount.path, other)
            succeed("umount", mount.path)
            assert not wait_for(lambda: not mount.connected, 2)
            assert succeed("stat", "-c", "%s", other / "some/file").strip() == "10"
            succeed("umount", other)
        assert mount.gone()
        assert server.process.wait(20) == 0


def test_open_file_outlives_the_path(site: Site, device: Path) -> None:
    """Lazily unmounted with a directory open: names go on, the log is followed no more, and the end comes with it."""
    with served(site, device) as (server, mount):
        code = """
import subprocess, time
os.chdir(arguments[0] + "/some")
subprocess.run(["umount", "-l", arguments[0]], check=True)
result = [os.stat("file").st_size]
deadline = time.monotonic() + 20
while len(result) < 2 and time.monotonic() < deadline:
    try:
        os.stat("absent")
    except FileNotFoundError:
        # The server has not seen yet that the path is gone.
        time.sleep(0.05)
    except OSError as error:
        result.append(error.errno)
"""
        assert client(code, mount.path) == [10, 5]
        assert mount.gone()
        assert server.process.wait(20) == 0


def test_killed_supervisor(site: Site, device: Path) -> None:
    with served(site, device) as (server, mount):
        os.kill(server.process.pid, signal.SIGKILL)
        assert mount.gone()
    site.clear_run_directories()


def test_one_mount_has_the_device(site: Site, device: Path) -> None:
    """Two hosts on one machine can share a device that is mapped, but not one that a kernel has."""
    with served(site, device) as (_, mount):
        done = run(sys.executable, PROGRAM, device, site.place("other"), site.directory / "r", MASTER_UUID, timeout=30)
        assert done.returncode == 32
        assert "in famfs mode one mount has the whole device" in done.stdout
        mount.unmount()


def test_kernel_without_famfs_is_told_in_one_line(site: Site, device: Path) -> None:
    before = set(os.listdir(site.connections))
    server = Served(site, device, "--as-it-is")
    assert server.process.wait(20) == 32
    assert "is in famfs mode (driver fsdev_dax), which only a famfs kernel can use" in server.line
    assert "does not offer FUSE_DAX_FMAP" in server.line
    assert "-o daxmode=devdax" in server.line
    assert site.mounts() == []
    assert wait_for(lambda: set(os.listdir(site.connections)) <= before)
    assert "Traceback" not in server.messages.read_text()


def test_damaged_superblock_leaves_nothing(site: Site, memory_folder: Path) -> None:
    before = set(os.listdir(site.connections))
    path = format_device(memory_folder / "damaged")
    with path.open("r+b") as image:
        image.write(b"\xff" * 8)
    server = Served(site, path)
    assert server.process.wait(20) == 1
    assert str(path) in server.line
    assert site.mounts() == []
    assert wait_for(lambda: set(os.listdir(site.connections)) <= before)


def test_mode_of_an_emulated_device(site: Site, device: Path) -> None:
    """Nothing is switched, nothing is mounted, and the line says why."""
    for command in (["mount.famfs", "-o", "daxmode=devdax"], ["famfs", "mount", "--set-daxmode"]):
        done = site.host().run(BIN / command[0], *command[1:], device, site.place("mnt"))
        assert done.returncode != 0
        (line,) = done.stderr.splitlines()
        assert "is not a dax device and has no mode" in line
    assert site.mounts() == []


def test_mount_watch_tells_of_this_mount_alone(site: Site) -> None:
    from famfs_server.daemon.bootstrap import MountWatch

    place = site.place("tmp")
    succeed("mount", "-t", "tmpfs", "none", place)
    (record,) = (record for record in mountapi.parse_mountinfo() if record.mount_point == str(place))
    watch = MountWatch(record.device)
    try:
        assert not watch.gone()
        other = site.place("another")
        succeed("mount", "-t", "tmpfs", "none", other)
        assert not watch.gone()
        succeed("umount", other)
        assert not watch.gone()
        succeed("umount", place)
        assert watch.gone()
    finally:
        watch.close()
