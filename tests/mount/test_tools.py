# SPDX-License-Identifier: Apache-2.0
"""The tools that need a mount, as users run them: check, mkmeta, pcq, umount.famfs, and the reference's server name."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import BIN, MIB, File, Mount, Site, populate, run, succeed, wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def mount(shared_site: Site) -> Iterator[Mount]:
    """A file system with a few files, mounted on the master."""
    device = shared_site.format()
    populate(device, ["d", "d/e"], [File("f", b"x" * 5000), File("d/e/g", size=3 * MIB)])
    with shared_site.mounted(device) as mount:
        yield mount


def test_check_agrees_with_the_log(mount: Mount) -> None:
    for path, counts in ((mount.path, "2 files and 2 directories"), (mount / "d", "1 files and 2 directories"),
                         (mount / "f", "1 files and 0 directories")):  # fmt: skip
        done = mount.host.run(BIN / "famfs", "check", path)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{path}: {counts} checked, 0 not logged yet, 0 wrong" in done.stdout
    found = json.loads(mount.host.run(BIN / "famfs", "check", "--json", mount.path).stdout)
    assert found == {
        "path": str(mount.path), "files": 2, "directories": 2, "not_logged_yet": 0, "problems": [],
    }  # fmt: skip


def test_check_sees_what_differs(mount: Mount, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    succeed("mount", "--bind", empty, mount / "d")
    try:
        done = mount.host.run(BIN / "famfs", "check", mount.path)
    finally:
        succeed("umount", mount / "d")
    assert done.returncode == 1
    assert "famfs check: d/e/g: is in the log, but not in the mount" in done.stderr


def test_mkmeta(mount: Mount) -> None:
    for _ in range(2):
        done = mount.host.run(BIN / "famfs", "mkmeta", "-v", mount.device)
        assert done.returncode == 0
        assert f"{mount.path}/.meta/.log: {8 * MIB} bytes" in done.stdout


def test_a_queue_between_processes(mount: Mount, tmp_path: Path) -> None:
    queue, told = mount / "queue", tmp_path / "status"
    for option in ("-C", "-C", "-i"):
        succeed(BIN / "pcq", option, *(("-b", "4k", "-n", "64") if option == "-C" else ()), queue)
    succeed(BIN / "pcq", "-p", "-N", "50", "-S", "9", "-f", told, queue)
    assert told.read_text() == "50\n"
    succeed(BIN / "pcq", "-c", "-N", "20", "-S", "9", "-f", told, queue)
    assert told.read_text() == "20\n"
    succeed(BIN / "pcq", "-d", "-S", "9", "-f", told, queue)
    assert told.read_text() == "30\n"
    succeed(BIN / "pcq", "-pc", "-N", "1000", "-f", told, queue)
    assert told.read_text() == "2000\n"
    assert "1050 messages put, 1050 taken" in succeed(BIN / "famfs", "pcq", "-i", queue)


def test_the_helper_of_umount_waits_for_the_server(site: Site) -> None:
    device = site.format()
    for argument in ("directory", "device"):
        mount = site.attach(device)
        target = mount.path if argument == "directory" else device
        done = mount.host.run(BIN / "umount.famfs", target, "-n", "-t", "fuse.famfs")
        assert (done.returncode, done.stderr) == (0, "")
        assert not mount.host_processes()
    assert mount.host.run(BIN / "umount.famfs", device).returncode == 32


def test_umount_says_who_still_has_the_mount(site: Site) -> None:
    mount = site.attach(site.format())
    # Another mount namespace keeps a copy of the mount, and with it the server.
    keeper = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "60"])
    comm = Path(f"/proc/{keeper.pid}/comm")
    try:
        assert wait_for(lambda: comm.read_text() == "sleep\n")
        done = mount.host.run(BIN / "umount.famfs", mount.path)
        assert done.returncode == 32
        assert f"process {keeper.pid} (" in done.stderr
        assert "another mount namespace" in done.stderr
    finally:
        keeper.kill()
        keeper.wait()
    assert mount.gone()


def test_the_server_by_the_name_of_the_reference(site: Site) -> None:
    device, place, shadow = site.format(), site.place("mnt"), site.place("shadow")
    populate(device, [], [File("f", b"hello")])
    host = site.host()
    done = host.run(BIN / "famfs_fused", "-o", f"source={shadow},daxdev={device},allow_other,timeout=1", place)
    assert done.returncode == 0, done.stderr
    assert (place / "f").read_bytes() == b"hello"
    file, new = place / "f", place / "g"
    refused = (
        ["touch", new],
        ["mkdir", new],
        ["mknod", new, "p"],
        ["cp", file, new],
        ["ln", file, new],
        ["ln", "-s", "f", new],
        ["mv", file, new],
        ["rm", file],
        ["truncate", "-s1", file],
    )
    for command in refused:
        assert run(*command).returncode != 0, command
    assert sorted(os.listdir(place)) == [".meta", "f"]
    assert host.run(BIN / "umount.famfs", place).returncode == 0
