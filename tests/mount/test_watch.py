# SPDX-License-Identifier: Apache-2.0
"""`famfs watch`: what another host makes is told once, also when the worker dies meanwhile; who may ask for it."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import BIN, CLIENT_UUID, FAST, Mount, Site, client, populate, run
from schemas import conform

pytestmark = pytest.mark.timeout(120)

NOBODY = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--")


class Watch:
    """A running `famfs watch`."""

    def __init__(self, mount: Mount, *words: str) -> None:
        command = [BIN / "famfs", "watch", *words[:-1], mount.path, *words[-1:]]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=mount.host.environment, text=True
        )

    def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(conform(self.process.stdout.readline(), "watch"))

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@contextmanager
def watching(mount: Mount, *words: str) -> Iterator[Watch]:
    watch = Watch(mount, *words)
    try:
        yield watch
    finally:
        watch.process.kill()
        watch.process.communicate()


@pytest.fixture
def device(memory_folder: Path, site: Site) -> Path:
    path = site.format(str(memory_folder / "device"))
    populate(path, ("dir",))
    return path


@pytest.mark.parametrize("fast", FAST)
def test_what_another_host_makes_is_told_once(site: Site, device: Path, fast: str) -> None:
    make = """
for number in range(int(arguments[1]), int(arguments[2])):
    os.mkdir(arguments[0] + "/n%d" % number)
"""
    with (
        site.mounted(device, f"fastpath={fast}") as master,
        site.mounted(device, f"fastpath={fast}", "poll=0.1", "control_uid=1000", host=CLIENT_UUID) as other,
        watching(other, "dir") as below,
        watching(other, "--from", "0", "-n", "3", ".") as three,
    ):
        assert below.next()["event"] == "begin"
        assert [three.next()["event"] for _ in range(2)] == ["begin", "directory"]
        client(make, master.path / "dir", "0", "20")
        client(make, master.path, "0", "1")
        assert [below.next()["path"] for _ in range(20)] == [f"dir/n{number}" for number in range(20)]
        assert three.next()["path"] == "dir/n0"
        assert three.end() == (0, "", "")
        # The next worker goes on where the dead one was, and keeps the log level.
        socket = json.loads(other.host.run(BIN / "python", "-c", LEVEL, other.path, "7").stdout)
        assert socket == 7
        worker = other.process("worker")
        os.kill(worker, signal.SIGKILL)
        client(make, master.path / "dir", "20", "40")
        assert [below.next()["path"] for _ in range(20)] == [f"dir/n{number}" for number in range(20, 40)]
        assert other.process("worker") != worker
        assert json.loads(other.host.run(BIN / "python", "-c", LEVEL, other.path).stdout) == 7
        # The user whom the mount trusts may watch, others may not.
        if run(*NOBODY, BIN / "python", "-c", "").returncode == 0:
            for parent in (site.directory, *site.directory.parents[:-2], other.path.parent):
                parent.chmod(0o755)
            words = ("watch", "--from", "0", "-n", "2", other.path)
            done = run(*NOBODY, BIN / "famfs", *words, env=other.host.environment)
            assert done.returncode == 0, done.stderr
            assert len(done.stdout.splitlines()) == 2
            done = run(*NOBODY, BIN / "famfs", "watch", master.path, env=master.host.environment)
            assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
            assert "only root" in done.stderr
        other.unmount()
        assert below.end() == (0, "", "")


LEVEL = """
import sys
from famfs_server.daemon.control_client import ControlClient
client = ControlClient.of_mount(sys.argv[1])
if sys.argv[2:]:
    client.request("PUT", "/log_level", sys.argv[2].encode())
print(client.request("GET", "/log_level").decode())
"""


def test_where_nothing_can_be_watched(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        for words, status, line in (
            ([str(site.directory)], 1, "not in a mounted famfs file system"),
            ([str(mount.path), "/"], 1, "/: not in a mounted famfs file system"),
            (["--from", "99", str(mount.path)], 2, "the log has 1 entries; it cannot be watched from entry 99"),
        ):
            done = mount.host.run(BIN / "famfs", "watch", *words)
            assert (done.returncode, len(done.stderr.splitlines())) == (status, 1)
            assert line in done.stderr
