# SPDX-License-Identifier: Apache-2.0
"""The server as a service: the manager's descriptor store, its watchdog, and connections that others make."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import BIN, File, Site, client, populate, run, succeed, wait_for
from load import MIXED, Load, device_for_load, made_by, require_clean
from manager import Manager

pytestmark = pytest.mark.timeout(120)

LOAD_SECONDS = 60


@pytest.fixture
def manager(site: Site) -> Iterator[Manager]:
    """A service manager; what it keeps is gone before the site looks for what is left."""
    manager = Manager(site.directory, site.host().environment)
    yield manager
    manager.close()


@pytest.fixture
def device(site: Site) -> Path:
    path = site.format()
    populate(path, ["dir"], [File("hello", b"hello, world\n")])
    return path


def service(device: Path, place: Path, *options: str) -> list[str]:
    """The command that a unit starts."""
    return [str(BIN / "famfs-server"), "--fdstore", str(device), str(place), *options]


def started(manager: Manager, *command: str, **more: str) -> None:
    """Start the service and wait until it is ready."""
    process = manager.start(*command, **more)
    ready = wait_for(lambda: manager.heard("READY=1") or process.poll() is not None, 30)
    assert ready, manager.messages
    if process.poll() is not None:
        pytest.fail(manager.errors)


def killed(manager: Manager) -> None:
    """kill -9 of the service's main process."""
    assert manager.process is not None
    manager.process.kill()
    manager.process.wait(20)


def unmounted(manager: Manager, place: Path) -> None:
    """Unmount, and see the service end."""
    succeed("umount", place)
    assert manager.process is not None
    assert manager.process.wait(20) == 0


def status(site: Site, place: Path) -> dict[str, object]:
    """What the mount says of itself."""
    found: dict[str, object] = json.loads(site.host().run(BIN / "famfs", "status", "--json", place).stdout)
    return found


# -- the descriptor store -----------------------------------------------------------------------


def test_killed_and_started_again_under_load(site: Site, memory_folder: Path, manager: Manager) -> None:
    device, place = device_for_load(memory_folder), site.place("mnt")
    started(manager, *service(device, place))
    (record,) = site.mounts()
    mount = site.known(device, record)
    load = Load(mount, MIXED, LOAD_SECONDS)
    try:
        for _ in range(2):
            time.sleep(0.5)
            killed(manager)
            assert mount.attached
            started(manager, *service(device, place))
        # As `systemctl restart`: a signal, and the next start.
        assert manager.process is not None
        manager.process.terminate()
        assert manager.process.wait(20) == 0
        assert mount.attached
        started(manager, *service(device, place))
        assert load.running
        load.enough()
        reports = load.reports()
    finally:
        load.kill()
    assert status(site, place)["takeovers"] == 3
    assert [failure for report in reports for failure in report["failures"]] == []
    mount.unmount()
    require_clean(device, made_by(reports))


def test_unmounting_empties_the_store(site: Site, device: Path, manager: Manager) -> None:
    place = site.place("mnt")
    started(manager, *service(device, place))
    assert manager.store.keys() >= {"document", "fuse", "record", "namespace", "device"}
    assert "famfs-reaper" not in site.processes().values()
    assert manager.messages.index("FDSTORE=1") < manager.messages.index("READY=1")
    unmounted(manager, place)
    assert wait_for(lambda: not manager.store)
    assert wait_for(lambda: manager.heard("STOPPING=1"))
    started(manager, *service(device, place))
    assert succeed("cat", place / "hello") == "hello, world\n"
    unmounted(manager, place)


def test_mount_that_is_gone_is_made_anew(site: Site, device: Path, manager: Manager) -> None:
    place = site.place("mnt")
    started(manager, *service(device, place))
    killed(manager)
    run("umount", "-l", place)
    assert site.mounts() == []
    started(manager, *service(device, place))
    assert status(site, place)["takeovers"] == 0
    unmounted(manager, place)


def test_service_that_is_to_mount_something_else(site: Site, device: Path, manager: Manager) -> None:
    place = site.place("mnt")
    started(manager, *service(device, place))
    killed(manager)
    process = manager.start(*service(device, site.place("other")))
    assert process.wait(30) == 32
    assert "stop it before" in manager.errors
    started(manager, *service(device, place))
    assert succeed("cat", place / "hello") == "hello, world\n"
    unmounted(manager, place)


def test_upgrade_of_a_service(site: Site, device: Path, manager: Manager) -> None:
    place = site.place("mnt")
    started(manager, *service(device, place), WATCHDOG_USEC="30000000")
    manager.messages.clear()
    done = site.host().run(BIN / "famfs", "upgrade", place)
    assert done.returncode == 0, done.stderr
    assert manager.process is not None
    assert str(manager.process.pid) in done.stdout
    assert wait_for(lambda: manager.heard("READY=1"))
    # While the next program is imported nobody gives a sign of life.
    assert wait_for(lambda: manager.heard("WATCHDOG_USEC=30000000"))
    patience = [message for message in manager.messages if message.startswith("WATCHDOG_USEC=")]
    assert patience == ["WATCHDOG_USEC=120000000", "WATCHDOG_USEC=30000000"]
    killed(manager)
    started(manager, *service(device, place))
    assert succeed("cat", place / "hello") == "hello, world\n"
    unmounted(manager, place)


def test_store_without_a_manager(site: Site, device: Path) -> None:
    done = site.host().run(*service(device, site.place("mnt")))
    assert done.returncode == 1
    assert "NOTIFY_SOCKET is not set" in done.stderr


# -- what the manager is told --------------------------------------------------------------------


def test_watchdog_is_fed_while_both_planes_live(site: Site, device: Path, manager: Manager) -> None:
    place = site.place("mnt")
    started(manager, *service(device, place), WATCHDOG_USEC="30000000")
    assert wait_for(lambda: manager.heard("WATCHDOG=1"))
    (worker,) = (pid for pid, name in site.processes().items() if name == "famfs-worker")
    os.kill(worker, signal.SIGSTOP)

    def silent() -> bool:
        manager.messages.clear()
        time.sleep(2.5)
        return not manager.heard("WATCHDOG=1")

    # Nobody asks for anything, so the worker is not replaced; but its control plane gives no sign of life any more.
    assert wait_for(silent)
    assert site.processes().get(worker) == "famfs-worker"
    os.kill(worker, signal.SIGCONT)
    assert wait_for(lambda: manager.heard("WATCHDOG=1"))
    unmounted(manager, place)


def test_what_the_manager_is_told(site: Site, device: Path, manager: Manager) -> None:
    place = site.place("mnt")
    started(manager, *service(device, place))
    told = [line for line in manager.messages if line.startswith("STATUS=")]
    assert re.fullmatch("STATUS=(mounting|replaying the log: [0-2] of 2 entries)", told[0])
    assert told[-1] == f"STATUS=serving {device} at {place}"
    (worker,) = (pid for pid, name in site.processes().items() if name == "famfs-worker")
    os.kill(worker, signal.SIGKILL)
    assert wait_for(lambda: manager.heard(f"STATUS=serving {device} at {place}, 1 takeovers"))
    unmounted(manager, place)


# -- a connection that somebody else has made ----------------------------------------------------

MOUNTER = """
import os, subprocess, sys
from famfs_server.fuse.mountapi import DetachedMount
device, place, *command = sys.argv[1:]
fuse = os.open("/dev/fuse", os.O_RDWR)
with DetachedMount.create(fuse, device) as mount:
    mount.attach(place)
command = [str(fuse) if word == "FD" else word for word in command]
os.set_inheritable(fuse, True)
os.execvp(command[0], command)
"""


@contextmanager
def given(site: Site, device: Path, *prefix: str) -> Iterator[Path]:
    """A mount that another program makes, which then starts the server without capabilities."""
    place = site.place("mnt")
    words = [sys.executable, "-c", MOUNTER, str(device), str(place), *prefix]
    words += ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    words += [str(BIN / "famfs-server"), "--fuse-fd", "FD", "-o", "fmap=never", str(device), str(place)]
    process = subprocess.Popen(words, env=site.host().environment, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for(lambda: bool(site.mounts()))
        assert succeed("cat", place / "hello") == "hello, world\n"
        yield place
        succeed("umount", place)
        assert process.wait(20) == 0, process.communicate()[1]
    except BaseException:
        site.abandon(place)
        raise
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_confined(site: Site, device: Path) -> None:
    with given(site, device) as place:
        worker, supervisor = (
            next(pid for pid, name in site.processes().items() if name == wanted)
            for wanted in ("famfs-worker", "famfs-superviso")
        )
        os.kill(worker, signal.SIGKILL)
        assert client("os.mkdir(arguments[0])", place / "new") is None
        assert site.host().run(BIN / "famfs", "upgrade", place).returncode == 0
        assert succeed("cat", place / "hello") == "hello, world\n"
        assert "famfs-reaper" not in site.processes().values()
        for pid in (supervisor, *(pid for pid, name in site.processes().items() if name == "famfs-worker")):
            for task in Path(f"/proc/{pid}/task").iterdir():
                lines = (task / "status").read_text().splitlines()
                assert {line.split()[1] for line in lines if line.startswith("Cap")} == {"0" * 16}
                assert [line.split()[1] for line in lines if line.startswith("NoNewPrivs")] == ["1"]


def test_confined_server_is_told_to_stop(site: Site, device: Path) -> None:
    with given(site, device) as place:
        (supervisor,) = (pid for pid, name in site.processes().items() if name == "famfs-superviso")
        os.kill(supervisor, signal.SIGTERM)
        # Who made the mount takes it away; until then it says that nobody is there.
        assert wait_for(lambda: client("os.open(arguments[0], os.O_RDONLY)", place / "hello") == "ENOTCONN")
        assert [record.mount_point for record in site.mounts()] == [str(place)]


def test_mount_fuse3_drops_privileges(site: Site, device: Path) -> None:
    place = site.place("mnt")
    words = [
        "mount.fuse3",
        f"{BIN / 'mount.famfs'}#{device}",
        str(place),
        "-o",
        "drop_privileges,fmap=never,allow_other",
    ]
    succeed(*words, env=site.host().environment)
    assert succeed("cat", place / "hello") == "hello, world\n"
    (worker,) = (pid for pid, name in site.processes().items() if name == "famfs-worker")
    os.kill(worker, signal.SIGKILL)
    assert succeed("cat", place / "hello") == "hello, world\n"
    succeed("umount", place)
    assert wait_for(lambda: not site.processes())
