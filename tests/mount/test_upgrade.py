# SPDX-License-Identifier: Apache-2.0
"""`famfs upgrade`: the program that is installed now takes a mount over, and nobody who uses it notices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import famfs_server
from famfs_server.fuse.session import RECORD_LAYOUT
from harness import BIN, FAST, File, Mount, Site, client, populate, run, succeed, wait_for
from load import MIXED, Load, device_for_load, made_by, require_clean

pytestmark = pytest.mark.timeout(120)

LOAD_SECONDS = 60
UPGRADES = 2
LONGEST_CALL = 4.0
"""Seconds; as in test_takeover.py."""


class Installed:
    """A copy of the program, in place of the one in this checkout, that is changed while it runs."""

    def __init__(self, directory: Path) -> None:
        self.package = directory / "famfs_server"
        (source,) = famfs_server.__path__
        shutil.copytree(source, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def change(self, module: str, old: str, new: str) -> None:
        """Replace text in a module."""
        path = self.package / module
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture
def installed(site: Site) -> Installed:
    """The program that this test's host runs."""
    directory = site.directory / "installed"
    host = site.host()
    host.environment |= {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    return Installed(directory)


@pytest.fixture
def device(site: Site) -> Path:
    path = site.format()
    populate(path, ["dir"], [File("hello", b"hello, world\n"), File("dir/other", b"other\n")])
    return path


def upgrade(mount: Mount) -> "subprocess.CompletedProcess[str]":
    return mount.host.run(BIN / "famfs", "upgrade", mount.path)


def refused(mount: Mount, cause: str) -> None:
    """An upgrade fails with one line, and the server that ran goes on, worker and all."""
    before = mount.process("supervisor"), mount.process("worker")
    done = upgrade(mount)
    assert done.returncode == 32
    assert cause in done.stderr
    assert "goes on" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (mount.process("supervisor"), mount.process("worker")) == before
    assert succeed("cat", mount / "hello") == "hello, world\n"


@contextmanager
def unlogged(path: Path) -> Iterator[None]:
    """A new file that is open, and so not in the log."""
    code = "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield


@pytest.mark.parametrize("fast", FAST)
def test_under_load(site: Site, memory_folder: Path, fast: str) -> None:
    device = device_for_load(memory_folder)
    with site.mounted(device, f"fastpath={fast}") as mount:
        supervisor, workers = mount.process("supervisor"), {mount.process("worker")}
        load = Load(mount, MIXED, LOAD_SECONDS)
        try:
            for _ in range(UPGRADES):
                time.sleep(0.5)
                assert str(supervisor) in mount.host.run(BIN / "famfs", "upgrade", mount.path).stdout
                workers.add(mount.process("worker"))
            assert load.running
            load.enough()
            reports = load.reports()
        finally:
            load.kill()
        assert mount.process("supervisor") == supervisor
        assert len(workers) == UPGRADES + 1
        status = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)
    assert [failure for report in reports for failure in report["failures"]] == []
    print(f"fastpath={fast}: longest call {max(report['longest'] for report in reports)}")
    assert status["takeovers"] == UPGRADES
    assert max(report["longest"] for report in reports)[0] < LONGEST_CALL
    require_clean(device, made_by(reports))


def test_another_version(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount, unlogged(mount / "new"):
        succeed("chmod", "604", mount / "hello")
        inode = os.stat(mount / "new").st_ino
        installed.change("__init__.py", famfs_server.__version__, "98.7")
        done = upgrade(mount)
        assert "version 98.7" in done.stdout, done.stderr
        status = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)
        assert status["version"] == "98.7"
        # Kept in memory alone: a mode, and a file that is not logged yet.
        assert client("result = os.stat(arguments[0]).st_mode & 0o777", mount / "hello") == 0o604
        assert client("result = os.stat(arguments[0]).st_ino", mount / "new") == inode
        os.kill(mount.process("worker"), signal.SIGKILL)
        assert succeed("cat", mount / "hello") == "hello, world\n"
        assert client("result = os.stat(arguments[0]).st_mode & 0o777", mount / "hello") == 0o604
        assert client("result = os.stat(arguments[0]).st_ino", mount / "new") == inode


def test_program_that_cannot_be_imported(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount:
        installed.change("daemon/worker.py", "import trio", "import trio_of_tomorrow")
        refused(mount, "No module named 'trio_of_tomorrow'")
        installed.change("daemon/worker.py", "import trio_of_tomorrow", "import trio")
        assert upgrade(mount).returncode == 0


def test_program_that_does_not_understand_the_state(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount:
        installed.change("daemon/handover.py", "VERSION = 1\n", "VERSION = 2\n")
        refused(mount, "state has version 1, this program understands 2")
        installed.change("daemon/handover.py", "VERSION = 2\n", "VERSION = 1\n")
        installed.change("fuse/session.py", f"RECORD_LAYOUT = {RECORD_LAYOUT}\n", "RECORD_LAYOUT = 99\n")
        refused(mount, f"session record has layout {RECORD_LAYOUT}, not 99")


def test_option_that_the_program_does_not_know(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount:
        path = installed.package / "daemon/options.py"
        path.write_text(path.read_text().replace("    debug: bool = False\n", "").replace("debug=", "create="))
        refused(mount, "'debug' is not known")


def test_program_that_keeps_the_tree_in_another_form(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount:
        installed.change("volume/namespace.py", "LAYOUT = 1\n", "LAYOUT = 2\n")
        code = """
with open(arguments[0] + "/hello", "rb") as file:
    rounds = 0
    while not rounds or not os.path.exists(arguments[1]):
        file.seek(0)
        assert file.read() == b"hello, world\\n"
        assert os.listdir(arguments[0] + "/dir") == ["other"]
        rounds += 1
result = rounds
"""
        enough = site.directory / "enough"
        with ThreadPoolExecutor(1) as thread:
            reader = thread.submit(client, code, mount.path, enough)
            try:
                done = upgrade(mount)
            finally:
                enough.touch()
            assert done.returncode == 0, done.stderr
            assert reader.result() > 0


def test_tree_in_another_form_would_lose_files(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount:
        installed.change("volume/namespace.py", "LAYOUT = 1\n", "LAYOUT = 2\n")
        with unlogged(mount / "new"):
            refused(mount, "1 files that system calls have made")


def test_worker_dies_while_the_program_is_executed(site: Site, device: Path, installed: Installed) -> None:
    with site.mounted(device) as mount, ThreadPoolExecutor(1) as thread:
        pause = "import os\nimport sys\nimport time\nif sys.argv[1] == 'serve':\n    time.sleep(1.5)\n"
        installed.change("daemon/successor.py", "import os\n", pause)
        worker = mount.process("worker")
        outcome = thread.submit(upgrade, mount)
        # The process has another name until the program's own code runs.
        assert wait_for(lambda: "famfs-superviso" not in mount.host_processes().values())
        os.kill(worker, signal.SIGKILL)
        assert succeed("cat", mount / "hello") == "hello, world\n"
        assert outcome.result().returncode == 0
        assert mount.process("worker") != worker


def test_told_to_stop_while_the_program_is_executed(site: Site, device: Path, installed: Installed) -> None:
    mount = site.attach(device)
    with ThreadPoolExecutor(1) as thread:
        pause = "import os\nimport sys\nimport time\nif sys.argv[1] == 'serve':\n    time.sleep(1.5)\n"
        installed.change("daemon/successor.py", "import os\n", pause)
        supervisor = mount.process("supervisor")
        outcome = thread.submit(upgrade, mount)
        assert wait_for(lambda: "famfs-superviso" not in mount.host_processes().values())
        os.kill(supervisor, signal.SIGTERM)
        outcome.result()
        assert mount.gone()


def test_nobody_else_may_ask(site: Site, device: Path) -> None:
    code = """
import socket
os.chdir(arguments[0])
os.setresuid(65534, 65534, 65534)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect("supervisor")
result = connection.recv(1000).decode()
"""
    with site.mounted(device) as mount:
        worker = mount.process("worker")
        (directory,) = site.host().run_directory.iterdir()
        assert client(code, directory) == "EACCES"
        succeed("chmod", "-R", "a+rwX", directory)
        assert "only root may" in client(code, directory)
        succeed("chmod", "700", directory)
        # Imported and opened beforehand: others may not even get at the checkout and the mount point.
        code = """
import os, sys
from famfs_server.cli import famfs, upgrade
os.chdir(sys.argv.pop())
os.setresuid(65534, 65534, 65534)
famfs.main()
"""
        done = run(sys.executable, "-c", code, "upgrade", ".", mount.path)
        assert done.returncode == 32
        assert done.stderr == "famfs upgrade: only root may have a mount served by another program: run this as root\n"
        assert mount.process("worker") == worker
