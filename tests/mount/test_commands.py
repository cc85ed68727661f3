# SPDX-License-Identifier: Apache-2.0
"""The commands do the same through a mount and on a device that is not mounted."""

import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forked import Forked
from harness import BIN, CLIENT_UUID, DEVICE_SIZE, MIB, Host, Mount, Site, client, opened, run, succeed

pytestmark = pytest.mark.timeout(120)

UUID = "11111111-2222-4333-8444-555555555555"
NOBODY = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--")


@dataclass(frozen=True)
class Side:
    """One way to reach a file system: by its mount, or by its device."""

    host: Host
    device: Path
    mount: Mount | None
    source: Path
    famfs: Forked

    def run(self, command: str) -> tuple[int, str, str]:
        """Run a command line in which @name is a path in the file system and %name one outside; what came of it,
        without what differs for reasons of its own."""
        words = command.split()
        outside = [re.sub("^%", f"{self.source}/", word) for word in words[1:]]
        if self.mount:
            inside = [word.replace("@", f"{self.mount.path}/") for word in outside]
        else:
            inside = ["--daxdev", str(self.device), *(word.replace("@", "/") for word in outside)]
        status, out, err = self.famfs.run("famfs", words[0], *inside)
        return status, self._plain(out), self._plain(err)

    def _plain(self, text: str) -> str:
        if self.mount:
            text = text.replace(str(self.mount.path), "")
        return text.replace(str(self.device), "DEVICE")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files to copy: a tree, and what cannot be copied."""
    rng = random.Random(11)
    folder = tmp_path / "source"
    for number in range(12):
        path = folder / "tree" / f"d{number % 3}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice((1, 4096, 70_000, 2 * MIB + 1))))
        path.chmod(0o600 | rng.randrange(0o100))
    (folder / "tree/empty").touch()
    (folder / "tree/link").symlink_to("d0")
    (folder / "one").write_bytes(rng.randbytes(300_000))
    (folder / "other").write_bytes(rng.randbytes(300_001))
    return folder


@pytest.fixture
def sides(site: Site, memory_folder: Path, source: Path) -> Iterator[tuple[Side, Side]]:
    """Two devices that are alike, one of them mounted."""
    host = site.host()
    devices = []
    for name in ("mounted", "unmounted"):
        device = memory_folder / name
        with device.open("wb") as image:
            image.truncate(DEVICE_SIZE)
        done = host.run(BIN / "mkfs.famfs", "--uuid", UUID, device)
        assert done.returncode == 0, done.stderr
        devices.append(device)
    with site.mounted(devices[0]) as mount:
        famfs = Forked(host.environment)
        try:
            yield Side(host, devices[0], mount, source, famfs), Side(host, devices[1], None, source, famfs)
        finally:
            famfs.close()


def tree(device: Path) -> dict[str, tuple[Any, ...]]:
    """All that a file system holds: mode, owner, size, data, and where they lie unless that is random."""
    found = {}
    with opened(device) as volume:
        names = volume.namespace
        for node in names.walk():
            fmap = names.fmap(node)
            place = (fmap.chunk_size, len(fmap.extents)) if fmap.chunk_size else fmap.extents
            data = volume.read(node, 0, names.size[node])
            found[os.fsdecode(names.path(node))] = (names.mode[node], names.uid[node], names.gid[node], place, data)
    return found


# Every command line, and its exit status.
SCRIPT = (
    ("mkdir @d", 0),
    ("mkdir -v @d/one @d/two", 0),
    ("mkdir -p @d/e/f", 0),
    ("mkdir -p @d/e/f", 0),
    ("mkdir @d", 1),
    ("mkdir @absent/dir", 1),
    ("mkdir -m 700 -u 5 -g 6 @d/own", 0),
    ("mkdir @.meta/dir", 1),
    ("creat -s 1m @d/zero", 0),
    ("creat -s 1m @d/zero", 0),
    ("creat -s 2m @d/zero", 1),
    ("creat -r -S 42 -s 3000001 @d/random", 0),
    ("creat -s 0 @d/none", 1),
    ("creat @d/none", 2),
    ("creat -s 4096 @d", 1),
    ("creat -s 4096 @absent/file", 1),
    ("creat -s 64g @d/large", 1),
    ("creat -m 604 -u 7 -g 8 -s 5 @d/theirs", 0),
    # Two of two buckets: which are taken is chosen at random, and what follows must lie at one place on both sides.
    ("creat -s 7m -C 2m -N 2 -B 2 -r -S 3 @d/striped", 0),
    ("creat -s 7m -C 3m -N 2 -B 4 @d/oddly", 2),
    ("creat -M @d/m1,4096 -M @d/m2,1m,7 -M @absent/m3,5", 1),
    ("creat -s 4096 @d/" + "n" * 78, 1),
    ("verify -f @d/random -S 42", 0),
    ("verify -f @d/random -S 43", 1),
    ("verify -q -m @d/m2,7 -m @d/striped,3 -m @d/zero,1 -m @d/absent,1", 2),
    ("cp %one @d/copy", 0),
    ("cp %one @d/copy", 0),
    ("cp %other @d/copy", 1),
    ("cp %one %other @d/e", 0),
    ("cp %absent @d/nothing", 1),
    ("cp %tree @d/tree", 1),
    ("cp -r -v %tree @d/tree", 1),
    ("cp -r --verify %tree/d0 @d/again", 0),
    ("cp -m 640 -u 9 -g 10 %one @d/owned", 0),
    ("cp -C 2m -N 2 -B 4 %tree/d1/f1 @d/cut", 0),
    ("getmap @d/random @d/zero", 0),
    ("getmap --json @d/copy", 0),
    ("getmap -q @d/copy", 0),
    ("getmap @d", 1),
    ("getmap @absent", 1),
    ("flush -v @d/random @d/copy", 0),
    ("flush @absent", 1),
)


def test_the_same_on_both_sides(sides: tuple[Side, Side]) -> None:
    mounted, unmounted = sides
    for command, status in SCRIPT:
        left, right = mounted.run(command), unmounted.run(command)
        assert left[0] == right[0] == status, (command, left, right)
        assert left[1:] == right[1:], command
        if status and not left[2].startswith("famfs cp") and "-M" not in command and "-q" not in command:
            assert len(left[2].splitlines()) == 1, (command, left[2])
    assert tree(mounted.device) == tree(unmounted.device)


def test_what_commands_make_is_what_programs_see(sides: tuple[Side, Side], source: Path) -> None:
    mounted, _ = sides
    mount = mounted.mount
    assert mount is not None
    assert mounted.run("cp -r %tree/d2 @copy")[0] == 0
    succeed("diff", "-r", source / "tree/d2", mount / "copy")
    assert mounted.run("creat -r -S 1 -s 100000 @random")[0] == 0
    with mount.site.mounted(mounted.device, "poll=0", host=CLIENT_UUID) as other:
        succeed("diff", "-r", source / "tree/d2", other / "copy")
        succeed("cmp", mount / "random", other / "random")
        done = other.host.run(BIN / "famfs", "verify", "-f", other / "random", "-S", "1")
        assert done.returncode == 0
        for words in (
            ("mkdir", other / "no"),
            ("creat", "-s", "4096", other / "no"),
            ("cp", source / "one", other / "no"),
        ):
            done = other.host.run(BIN / "famfs", *words)
            assert done.returncode == 1, words
            assert "only the master can create" in done.stderr, done.stderr
        assert client("result = sorted(os.listdir(arguments[0]))", other.path) == [".meta", "copy", "random"]


def fsck_figures(text: str) -> list[str]:
    """The lines of fsck that tell of what is in the file system."""
    return [line for line in text.splitlines() if not re.search("superblock:|device when|device UUID", line)]


def test_fsck(sides: tuple[Side, Side]) -> None:
    for side in sides:
        for command in ("mkdir @d", "creat -s 5m @d/file", "creat -s 7m -C 2m -N 2 -B 4 @striped"):
            assert side.run(command)[0] == 0
    mounted, unmounted = sides
    assert mounted.mount is not None
    shown = []
    for place in (mounted.mount.path, unmounted.device):
        done = mounted.host.run(BIN / "famfs", "fsck", "-v", place)
        assert done.returncode == 0, done.stderr
        shown.append(fsck_figures(done.stdout))
    assert [line for line in shown[0] if "checksum" not in line] == [
        line for line in shown[1] if "checksum" not in line
    ]
    assert mounted.host.run(BIN / "fsck.famfs", unmounted.device).returncode == 0
    done = mounted.host.run(BIN / "famfs", "fsck", mounted.device)
    assert done.returncode == 16
    assert "mounted or in use" in done.stderr
    reports = [
        json.loads(mounted.host.run(BIN / "famfs", "fsck", "--json", *words).stdout)
        for words in ((mounted.mount.path,), ("--force", mounted.device))
    ]
    for report in reports:
        del report["device"]
    assert reports[0] == reports[1]


def test_logplay(sides: tuple[Side, Side], tmp_path: Path) -> None:
    for side in sides:
        for command in ("mkdir @d", "creat -s 5m @d/file"):
            assert side.run(command)[0] == 0
    mounted, unmounted = sides
    assert mounted.mount is not None
    done = mounted.host.run(BIN / "famfs", "logplay", mounted.mount.path)
    assert done.returncode == 0, done.stderr
    assert "2 log entries" in done.stdout
    shadows = []
    for number, words in enumerate(((mounted.mount.path,), ("--daxdev", unmounted.device))):
        folder = tmp_path / f"shadow{number}"
        folder.mkdir()
        done = mounted.host.run(BIN / "famfs", "logplay", "-S", folder, *words)
        assert done.returncode == 0, done.stderr
        shadows.append(
            {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
        )
    assert shadows[0] == shadows[1]
    assert len(shadows[0]) == 1


def test_commands_of_a_mount(site: Site, memory_folder: Path) -> None:
    host, device, place = site.host(), memory_folder / "device", site.place("mnt")
    with device.open("wb") as image:
        image.truncate(DEVICE_SIZE)

    def famfs(*words: str | Path, status: int = 0) -> "subprocess.CompletedProcess[str]":
        done = host.run(BIN / "famfs", *words)
        assert done.returncode == status, (words, done)
        return done

    assert host.run(BIN / "mkfs.famfs", device).returncode == 0
    famfs("mount", "-o", "fastpath=off", device, place)
    try:
        famfs("creat", "-r", "-S", "5", "-s", "1m", place / "file")
        done = host.run(BIN / "mkfs.famfs", "-f", device)
        assert done.returncode != 0
        assert str(place) in done.stderr
        status = json.loads(famfs("status", "--json", place).stdout)
        assert (status["role"], status["files"], status["log"]["entries"]) == ("master", 1, 1)
        assert status["fastpath"] is False
        text = famfs("status", place).stdout
        assert f"{device} on {place}: role master" in text
        for option, name in (("-s", ".superblock"), ("-l", ".log")):
            assert "agree" in famfs("chkread", option, place / ".meta" / name).stdout
        famfs("chkread", "-l", place / ".meta/.superblock", status=1)
        famfs("verify", "-f", place / "file", "-S", "5")
        holder = subprocess.Popen(["sleep", "60"], cwd=place)
        try:
            assert "working directory there" in famfs("umount", place, status=32).stderr
        finally:
            holder.kill()
            holder.wait()
    finally:
        done = host.run(BIN / "famfs", "umount", place)
    assert done.returncode == 0, done.stderr
    # It waits for the server, so the device is free at once.
    assert site.mounts() == []
    assert host.run(BIN / "mkfs.famfs", "-f", device).returncode == 0
    assert famfs("umount", place, status=32).stderr.count("\n") == 1
    for words in (("status", place), ("getmap", place), ("logplay", place)):
        assert famfs(*words, status=1).stderr.count("\n") == 1


def test_umount_by_device_and_by_force(site: Site, memory_folder: Path) -> None:
    device = memory_folder / "device"
    with device.open("wb") as image:
        image.truncate(DEVICE_SIZE)
    assert site.host().run(BIN / "mkfs.famfs", device).returncode == 0
    for words in ((device,), ("-l", None), ("-f", None)):
        mount = site.attach(device)
        done = mount.host.run(BIN / "famfs", "umount", *(word or mount.path for word in words))
        assert done.returncode == 0, done.stderr
        assert mount.gone()


def test_as_another_user(sides: tuple[Side, Side], memory_folder: Path) -> None:
    mounted, unmounted = sides
    if run(*NOBODY, BIN / "famfs", "--version").returncode:
        pytest.skip("other users cannot run this installation, which lies in a folder closed to them")
    assert mounted.mount is not None
    for command in ("creat -r -S 5 -s 100000 @open", "creat -m 600 -r -S 5 -s 100000 @closed"):
        assert mounted.run(command)[0] == 0
    # Paths below the test's folder are closed to others.
    memory_folder.chmod(0o711)
    path = memory_folder / "place"
    path.mkdir()
    succeed("mount", "--bind", mounted.mount.path, path)

    def famfs(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        return run(*NOBODY, BIN / "famfs", *words, env=mounted.host.environment)

    try:
        for words in (("verify", "-f", path / "open", "-S", "5"), ("getmap", path / "open"), ("fsck", path)):
            done = famfs(*words)
            assert done.returncode == 0, (words, done.stderr)
        assert famfs("fsck", path).returncode == 0
        for words in (
            ("verify", "-f", path / "closed", "-S", "5"),
            ("mkdir", path / "no"),
            ("creat", "-s", "5", path / "no"),
            ("status", path),
        ):
            done = famfs(*words)
            assert done.returncode == 1, words
            assert len(done.stderr.splitlines()) == 1
        assert run(*NOBODY, BIN / "mkfs.famfs", unmounted.device).returncode == 1
        assert client("result = sorted(os.listdir(arguments[0]))", path) == [".meta", "closed", "open"]
    finally:
        succeed("umount", path)
