# SPDX-License-Identifier: Apache-2.0
"""Which file system a path belongs to, by mount tables that are written down here."""

import os
from pathlib import Path

import pytest

from commands import run
from famfs_server.cli.target import NotFamfsError, find_mount, names_device
from famfs_server.fuse import mountapi
from famfs_server.fuse.mountapi import MountRecord


def record(number: int, mount_point: str, fstype: str = "fuse.famfs", root: str = "/") -> MountRecord:
    return MountRecord(number, 0, 0, root, mount_point, (), fstype, "/dev/dax0.0", ())


@pytest.mark.parametrize(
    ("path", "number", "inside"),
    [
        ("/m/fam", 2, b""),
        ("/m/fam/", 2, b""),
        ("/m/fam/a", 2, b"a"),
        ("/m/fam/a//b/../c/.", 2, b"a/c"),
        ("/m/fam/new/../x", 2, b"x"),
        ("/m/fam/../fam/x", 2, b"x"),
        ("/m/bound/x", 3, b"sub/dir/x"),
        ("/m/bound", 3, b"sub/dir"),
        ("/m/twice/x", 6, b"x"),
        (os.fsdecode(b"/m/fam/\xff"), 2, b"\xff"),
        ("/m/fam", None, b""),
        ("/m/fam2/x", None, b""),
        ("/m/famfs", None, b""),
        ("/m/fam/..", None, b""),
        ("/m/fam/a/y/../../../..", None, b""),
        ("/m/fam/covered/x", None, b""),
        ("/", None, b""),
    ],
)
def test_paths_and_their_mounts(monkeypatch: pytest.MonkeyPatch, path: str, number: int | None, inside: bytes) -> None:
    table = [
        record(1, "/", "ext4"),
        record(2, "/m/fam"),
        record(3, "/m/bound", root="/sub/dir"),
        record(4, "/m/fam/covered", "tmpfs"),
        record(5, "/m/twice", "ext4"),
        record(6, "/m/twice"),
    ]
    if number is None and path == "/m/fam":
        table.append(record(7, "/m/fam", "tmpfs"))
    monkeypatch.setattr(mountapi, "parse_mountinfo", lambda: table)
    if number is None:
        with pytest.raises(NotFamfsError, match="not in a mounted famfs"):
            find_mount(path)
    else:
        found, relative = find_mount(path)
        assert (found.mount_id, relative) == (number, inside)


def test_links_outside_lead_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fs" / "d").mkdir(parents=True)
    (tmp_path / "link").symlink_to("fs/d")
    monkeypatch.setattr(mountapi, "parse_mountinfo", lambda: [record(1, str(tmp_path / "fs"))])
    assert find_mount(str(tmp_path / "link" / "new"))[1] == b"d/new"
    assert find_mount(str(tmp_path / "link" / ".." / "new"))[1] == b"new"
    monkeypatch.chdir(tmp_path / "fs" / "d")
    assert find_mount("new")[1] == b"d/new"
    assert find_mount("../new")[1] == b"new"
    with pytest.raises(NotFamfsError):
        find_mount("../../new")


def test_what_names_a_device(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    assert names_device(str(tmp_path / "image"))
    assert names_device("/dev/null")
    assert not names_device(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        names_device(str(tmp_path / "nope"))


@pytest.mark.parametrize("command", [("map",), ("devadd", "/dev/null")])
def test_commands_that_take_either_name_what_is_missing(command: tuple[str, ...], tmp_path: Path) -> None:
    outcome = run("famfs", *command, tmp_path / "nope")
    assert outcome.status == 1
    assert outcome.error == f"famfs {command[0]}: {tmp_path}/nope: No such file or directory"
