# SPDX-License-Identifier: Apache-2.0
"""famfs export and import: what was in a file system is in it again, on another device."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Device, json_of, run

Make = Callable[..., Device]


@pytest.fixture
def filled(device: Device, tmp_path: Path, rng: random.Random) -> Device:
    """A file system with directories, owners, modes, a striped file, a large one, and an odd name."""
    run("famfs", "mkdir", "--daxdev", device.path, "-p", "-m", "0750", "-u", "3", "-g", "4", "a/b")
    for name, size, more in (
        ("a/one", "5000", ["-m", "0604", "-u", "1", "-g", "2"]),
        ("a/b/striped", "9m", ["-B", "3", "-N", "3", "-C", "2m"]),
        ("large", "33m", []),
        ("n\u00e4me \udcff", "1", []),
    ):
        seed = str(rng.randint(1, 1 << 31))
        outcome = run("famfs", "creat", "--daxdev", device.path, "-s", size, "-r", "-S", seed, *more, name)
        assert outcome.status == 0, outcome
    return device


def same(first: Device, second: Device) -> None:
    """Both show the same, and their files have the same bytes."""
    tree = first.tree()
    assert second.tree() == tree
    for name, (_, size) in tree.items():
        assert second.owner(name) == first.owner(name)
        if size:
            assert second.read(name) == first.read(name)


def test_there_and_back(filled: Device, make_device: Make, tmp_path: Path) -> None:
    tar = tmp_path / "all.tar"
    assert run("famfs", "export", "--daxdev", filled.path, "-o", tar, "/").status == 0
    other = make_device("other").make()
    outcome = run("famfs", "import", "--daxdev", other.path, tar, "/")
    assert (outcome.status, outcome.out) == (0, "6 files and directories made, 0 there already, 0 failed\n")
    same(filled, other)
    (found,) = json_of(run("famfs", "getmap", "--json", "--daxdev", other.path, "a/b/striped"))
    assert (found["chunk_size"], len(found["extents"])) == (2 << 20, 3)
    again = run("famfs", "import", "--daxdev", other.path, tar, "/")
    assert again.out == "0 files and directories made, 6 there already, 0 failed\n"
    same(filled, other)


def test_a_part_goes_elsewhere(filled: Device, make_device: Make, tmp_path: Path) -> None:
    tar = tmp_path / "part.tar"
    assert run("famfs", "export", "--daxdev", filled.path, "-o", tar, "a").status == 0
    other = make_device("other").make()
    run("famfs", "mkdir", "--daxdev", other.path, "x")
    assert run("famfs", "import", "--contiguous", "--daxdev", other.path, tar, "x").status == 0
    assert set(other.tree()) >= {"x", "x/b", "x/b/striped", "x/one"}
    assert other.read("x/b/striped") == filled.read("a/b/striped")
    assert json_of(run("famfs", "getmap", "--json", "--daxdev", other.path, "x/b/striped"))[0]["chunk_size"] == 0


def archive(path: Path, *members: tuple[str, bytes, bytes], cut: int = 0) -> Path:
    """A tar archive of (name, type, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            info.linkname = "target" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) - cut])
    return path


def test_what_cannot_be_stored_is_named_and_the_rest_is_made(device: Device, tmp_path: Path) -> None:
    regular = tarfile.REGTYPE
    path = archive(
        tmp_path / "t.tar",
        ("good/deep/file", regular, b"hello"),
        ("../escape", regular, b"x"),
        ("/absolute", regular, b"y"),
        (".meta/log", regular, b"x"),
        ("empty", regular, b""),
        ("link", tarfile.SYMTYPE, b""),
        ("p" * 90, regular, b"x"),
        ("last", regular, b"z"),
    )
    outcome = run("famfs", "import", "--daxdev", device.path, path, "/")
    assert outcome.status == 5
    assert len(outcome.err.splitlines()) == 5
    assert set(device.tree()) == {"good", "good/deep", "good/deep/file", "absolute", "last"}
    assert device.read("good/deep/file") == b"hello"
    other = archive(tmp_path / "o.tar", ("last", regular, b"longer"))
    assert "exists, and not with 6 bytes" in run("famfs", "import", "--daxdev", device.path, other, "/").err


def test_a_cut_archive_leaves_whole_files_only(device: Device, tmp_path: Path) -> None:
    members = [(f"f{number}", tarfile.REGTYPE, bytes([number + 1]) * (3 << 20)) for number in range(4)]
    path = archive(tmp_path / "t.tar", *members, cut=2 << 20)
    outcome = run("famfs", "import", "--daxdev", device.path, path, "/")
    assert outcome.status != 0
    tree = device.tree()
    assert set(tree) == {"f0", "f1", "f2"}
    for name in tree:
        assert len(set(device.read(name))) == 1


def test_bad_calls(device: Device, tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"this is no archive" * 100)
    for arguments in (
        ("export", "--daxdev", device.path, "nope"),
        ("import", "--daxdev", device.path, tmp_path / "no.tar", "/"),
        ("import", "--daxdev", device.path, tmp_path / "absent.tar", "/"),
        ("import", "--daxdev", device.path, tmp_path / "no.tar", "nope"),
    ):
        outcome = run("famfs", *arguments)
        assert outcome.status == 1, outcome
        assert outcome.error
