# SPDX-License-Identifier: Apache-2.0
"""The installed units under a real systemd, which is process 1 of a process namespace and has mounts of its own.

Nothing of the machine's own units is loaded: systemd sees the folder of this test alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import BIN, File, Site, format_device, populate, run, succeed, wait_for

SYSTEMD = "/lib/systemd/systemd"
ROOT = Path(__file__).parents[2]
TARGETS = ("test", "sysinit", "basic", "shutdown", "local-fs")
"""What units of their own depend on; the machine's would start everything that it has."""

START = """
set -e
echo 0 >"$2/cgroup.procs"
exec unshare --cgroup sh -c "$3" sh "$1"
"""
INSIDE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system
mount -t proc proc /proc
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
export container=famfs-test SYSTEMD_UNIT_PATH=$1
exec /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=0 --crash-reboot=no
"""
READER = """
import os, sys
place, enough = sys.argv[1:]
rounds = 0
with open(place + "/hello", "rb") as file:
    print("begun", flush=True)
    while not os.path.exists(enough):
        assert os.pread(file.fileno(), 100, 0) == b"hello, world\\n"
        assert sorted(os.listdir(place)) == [".meta", "hello"]
        assert open(place + "/hello", "rb").read() == b"hello, world\\n"
        rounds += 1
print(rounds)
"""

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(not os.path.exists(SYSTEMD) or shutil.which("systemctl") is None, reason="needs systemd"),
]


def cgroups() -> Path:
    """Where the machine's second version of control groups is mounted."""
    lines = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    found = next((place for _, place, kind, *_ in lines if kind == "cgroup2"), None)
    if found is None:
        pytest.skip("needs cgroup2")
    return Path(found)


def removed(folder: Path) -> bool:
    """Whether a control group is gone; it may be busy for a moment after its last process."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


class System:
    """A running systemd, with the units of famfs installed for one device."""

    def __init__(self, site: Site, device: Path, place: Path) -> None:
        self.place = place
        self._log = site.directory / "systemd.log"
        units = site.directory / "units"
        units.mkdir()
        for name in TARGETS:
            (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        root = site.directory / "root"
        succeed(ROOT / "scripts/install", "--root", root, "--venv", BIN.parent, timeout=60)
        for path in (root / "usr/local/lib/systemd/system").iterdir():
            (units / path.name).write_text(path.read_text().replace("/etc/famfs/", f"{site.directory}/"))
        dropin = units / "famfs@.service.d"
        dropin.mkdir()
        host = site.host()
        variables = [f"{name}={host.environment[name]}" for name in ("FAMFS_RUN_DIR", "FAMFS_SYSTEM_UUID_FILE")]
        (dropin / "host.conf").write_text(f"[Service]\nEnvironment={' '.join(variables)}\n")
        instance = succeed("systemd-escape", "-p", device).strip()
        escaped = "\\" in instance
        self.configuration = site.directory / f"{os.fspath(device).lstrip('/') if escaped else instance}.conf"
        self.configuration.parent.mkdir(parents=True, exist_ok=True)
        self.configuration.write_text(f"MOUNT_POINT={place}\nOPTIONS=fmap=never\n")
        self.unit = f"famfs@{instance}.service"
        # The root of what systemd sees of control groups: those of the machine are not its own.
        self._cgroup = cgroups() / f"famfs-test-{os.getpid()}-{time.monotonic_ns()}"
        self._cgroup.mkdir()
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(
                [*unshare, "sh", "-c", START, "sh", str(units), str(self._cgroup), INSIDE],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        assert wait_for(lambda: bool(children.read_text().split()))
        self._pid = children.read_text().split()[0]
        running = wait_for(lambda: self.run("systemctl", "is-active", "test.target").stdout == "active\n", 20)
        assert running, self.log

    @property
    def log(self) -> str:
        """What systemd and the service have said."""
        return self._log.read_text()

    def inside(self, *command: str | os.PathLike[str]) -> list[str]:
        """A command that runs where the mount is."""
        return ["nsenter", "-t", self._pid, "-m", "-p", "--", *(os.fspath(word) for word in command)]

    def run(self, *command: str | os.PathLike[str]) -> "subprocess.CompletedProcess[str]":
        return run(*self.inside(*command), timeout=60)

    def systemctl(self, verb: str) -> None:
        """Have systemd do something with the service, and wait for it."""
        done = self.run("systemctl", verb, self.unit)
        assert done.returncode == 0, (
            f"{done.stderr}\n{self.log}{self.run('systemctl', 'status', '--full', self.unit).stdout}"
        )

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.run("systemctl", "show", "-P", name, self.unit).stdout.strip()

    @property
    def mounted(self) -> bool:
        """Whether the mount is there, dead or alive."""
        return f" {self.place} fuse.famfs " in self.run("cat", "/proc/mounts").stdout

    def close(self) -> None:
        """End systemd, and everything in its namespaces with it."""
        self._outer.kill()
        self._outer.wait(20)
        assert wait_for(lambda: not (self._cgroup / "cgroup.procs").read_text())
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            assert wait_for(lambda folder=folder: removed(Path(folder)))


@pytest.fixture
def system(site: Site, name: str) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="famfs", dir="/dev/shm") as folder:
        device = format_device(Path(folder) / name)
        populate(device, files=[File("hello", b"hello, world\n")])
        system = System(site, device, site.place("mnt"))
        yield system
        system.close()
        site.clear_run_directories()


# A name that systemd need not escape, like those of devices; below, one that it must.
@pytest.mark.parametrize("name", ["device"])
def test_killed_restarted_upgraded_stopped(site: Site, system: System) -> None:
    system.systemctl("start")
    assert system.mounted
    assert "serving" in system.show("StatusText")
    enough = site.directory / "enough"
    words = system.inside(sys.executable, "-I", "-S", "-c", READER, system.place, enough)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "begun\n"
            first = system.show("MainPID")
            assert system.run("kill", f"-{int(signal.SIGKILL)}", first).returncode == 0
            assert wait_for(lambda: system.show("MainPID") not in ("0", first), 20), system.log
            assert wait_for(lambda: system.show("ActiveState") == "active", 20), system.log
            second = system.show("MainPID")
            system.systemctl("restart")
            third = system.show("MainPID")
            assert third not in (first, second)
            done = system.run(BIN / "famfs", "upgrade", system.place)
            assert done.returncode == 0, f"{done.stderr}\n{system.log}"
            assert system.show("MainPID") == third
            assert system.show("ActiveState") == "active"
            assert reader.poll() is None
        finally:
            enough.touch()
            rounds, errors = reader.communicate(timeout=30)
    assert errors == ""
    assert int(rounds) > 0
    assert json.loads(system.run(BIN / "famfs", "status", "--json", system.place).stdout)["takeovers"] == 3
    system.systemctl("stop")
    assert not system.mounted
    assert (system.show("ActiveState"), system.show("Result")) == ("inactive", "success")
    assert wait_for(lambda: "famfs-worker" not in site.processes().values())
    system.systemctl("start")
    assert succeed(*system.inside("cat", system.place / "hello")) == "hello, world\n"
    system.systemctl("stop")
    assert not system.mounted


@pytest.mark.parametrize("name", ["a-file for.dax"])
def test_service_that_is_given_up(site: Site, system: System) -> None:
    system.systemctl("start")
    # Every start from now on fails.
    configuration = system.configuration
    configuration.write_text(configuration.read_text().replace("fmap=never", "nonsense"))
    system.run("kill", f"-{int(signal.SIGKILL)}", system.show("MainPID"))
    assert wait_for(lambda: system.show("ActiveState") == "failed", 60), system.log
    assert wait_for(lambda: not system.mounted, 20), system.log
