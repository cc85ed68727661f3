# SPDX-License-Identifier: Apache-2.0
"""mount(8), umount(8), fstab, findmnt, df and fsck(8): the real programs, with the helpers where scripts/install puts
them, in a mount namespace of the test's own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import DEVICE_SIZE, File, Host, Site, populate, process_state, run, succeed, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(120)


class Machine:
    """A mount namespace with the helpers in /sbin, and a host in it."""

    def __init__(self, keeper: int, host: Host) -> None:
        self._enter = ("nsenter", f"--mount=/proc/{keeper}/ns/mnt", "--")
        self.host = host

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        return run(*self._enter, *command, env=self.host.environment, timeout=60)

    def succeed(self, *command: str | Path) -> str:
        """Run a program that has to succeed there; what it prints."""
        return succeed(*self._enter, *command, env=self.host.environment, timeout=60)

    def start(self, *command: str | Path) -> "subprocess.Popen[str]":
        """Start a program there."""
        return subprocess.Popen([*self._enter, *map(str, command)], env=self.host.environment, text=True)


@pytest.fixture(scope="module")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the helpers, as scripts/install makes it."""
    root = tmp_path_factory.mktemp("root")
    succeed(ROOT / "scripts/install", "--root", root, "--venv", Path(sys.executable).parent.parent, timeout=120)
    return root / "sbin"


@pytest.fixture
def machine(site: Site, helpers: Path) -> Iterator[Machine]:
    keeper = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "600"])
    comm = Path(f"/proc/{keeper.pid}/comm")
    try:
        assert wait_for(lambda: comm.read_text() == "sleep\n")
        found = Machine(keeper.pid, site.host())
        layers = f"lowerdir={helpers}:{os.path.realpath('/sbin')}"
        found.succeed("mount", "-t", "overlay", "-o", layers, "sbin", "/usr/sbin")
        # What libmount remembers of mounts is the machine's, and this namespace is not.
        found.succeed("mkdir", "-p", "/run/mount")
        found.succeed("mount", "-t", "tmpfs", "tmpfs", "/run/mount")
        yield found
    finally:
        keeper.kill()
        keeper.wait()


def test_by_the_standard(site: Site, machine: Machine, tmp_path: Path) -> None:
    device, place = site.format(), site.place("mnt")
    populate(device, [], [File("file", b"data")])
    fstab = tmp_path / "fstab"
    options = "loglevel=error,noauto,nofail,x-systemd.requires=dev-dax0.0.device,x-systemd.mount-timeout=60"
    fstab.write_text(f"{device} {place} famfs {options} 0 0\n")

    machine.succeed("findmnt", "--verify", "--tab-file", fstab)
    # With an option that libmount remembers, umount(8) asks the helper, which waits (docs/service.md).
    for words, waits in (
        (["--fstab", fstab, place], True),
        (["-t", "famfs", "-o", "helper=famfs", device, place], True),
        (["-t", "fuse.famfs", device, place], False),
    ):
        machine.succeed("mount", *words)
        found = json.loads(machine.succeed("findmnt", "--json", "--mountpoint", place, "-o", "SOURCE,FSTYPE,OPTIONS"))
        [row] = found["filesystems"]
        assert (row["source"], row["fstype"]) == (str(device), "fuse.famfs")
        assert {"nosuid", "nodev"} <= set(row["options"].split(","))
        assert machine.succeed("cat", place / "file") == "data"
        figures = machine.succeed("df", "-B1", "--output=source,fstype,size,used,target", place).splitlines()[1].split()
        assert figures[:2] == [str(device), "fuse.famfs"]
        assert int(figures[2]) <= DEVICE_SIZE
        assert int(figures[3]) >= 8 << 20
        assert figures[4] == str(place)
        # fsck(8) does not ask its helpers about what is mounted; the helper, asked itself, refuses.
        assert machine.run("fsck.famfs", device).returncode == 8
        machine.succeed("umount", place)
        if not waits:
            assert wait_for(lambda: not site.processes(machine.host))
        assert not site.processes(machine.host)
        assert machine.run("findmnt", "--mountpoint", place).returncode == 1
        assert machine.run("fsck", "-t", "famfs", "-n", device).returncode == 0
    # What fsck(8) says of a file system with errors is what the helper said.
    with device.open("r+b") as image:
        image.seek((2 << 20) + 48 + 8)
        image.write(b"\xff")
    assert machine.run("fsck", "-t", "famfs", "-n", device).returncode == 4
    assert machine.run("umount", place).returncode == 32
    assert machine.run("mount", "-t", "famfs", "-o", "nonsense", device, place).returncode == 1


def test_umount_returns_when_the_server_has_gone(site: Site, machine: Machine) -> None:
    device, place = site.format(), site.place("mnt")
    machine.succeed("mount", "-t", "famfs", "-o", "x-systemd.automount", device, place)
    [supervisor] = [pid for pid, name in site.processes(machine.host).items() if name == "famfs-supervisor"[:15]]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        assert wait_for(lambda: process_state(supervisor) == "T")
        umount = machine.start("umount", place)
        assert wait_for(lambda: machine.run("findmnt", "--mountpoint", place).returncode == 1)
        assert umount.poll() is None
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert umount.wait(30) == 0
    assert not site.processes(machine.host)
