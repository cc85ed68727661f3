# SPDX-License-Identifier: Apache-2.0
"""famfs cp: whole trees, what cannot be stored, overwriting in place, and never a success with a gap."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from commands import Device, Outcome, run
from famfs_server.cli import cp
from famfs_server.cli.source import Source
from famfs_server.cli.unmounted import DeviceTarget
from famfs_server.daemon.control_client import ControlError, DirectoryRequest, FileRequest


def copy(device: Device, *arguments: str | Path) -> Outcome:
    return run("famfs", "cp", "--daxdev", device.path, *arguments)


@pytest.fixture
def source(tmp_path: Path, rng: random.Random) -> Path:
    """A tree with sizes around the interesting ones."""
    root = tmp_path / "source"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty.d").mkdir(mode=0o700)
    for name, size in {"one": 1, "page": 4096, "deep/odd": 5000, "deep/er/large": (2 << 20) + 1}.items():
        (root / name).write_bytes(rng.randbytes(size))
    (root / "one").chmod(0o600)
    (root / "deep").chmod(0o711)
    return root


def test_one_file(device: Device, source: Path) -> None:
    assert copy(device, source / "page", "copy").status == 0
    assert device.read("copy") == (source / "page").read_bytes()
    assert device.tree() == {"copy": ("644", 4096)}


def test_into_a_directory_under_its_own_name(device: Device, source: Path) -> None:
    run("famfs", "mkdir", "--daxdev", device.path, "d")
    for destination in ("d", "d/", "d/.", "/"):
        assert copy(device, source / "page", source / "one", destination).status == 0
    assert device.tree() == {
        "d": ("755", 0),
        "d/page": ("644", 4096),
        "d/one": ("600", 1),
        "page": ("644", 4096),
        "one": ("600", 1),
    }


def test_a_tree(device: Device, source: Path) -> None:
    outcome = copy(device, "-r", "--verify", source, "tree")
    assert outcome.status == 0
    assert outcome.err == ""
    assert device.tree() == {
        "tree": ("755", 0),
        "tree/deep": ("711", 0),
        "tree/deep/er": ("755", 0),
        "tree/deep/er/large": ("644", (2 << 20) + 1),
        "tree/deep/odd": ("644", 5000),
        "tree/empty.d": ("700", 0),
        "tree/one": ("600", 1),
        "tree/page": ("644", 4096),
    }
    for name in ("one", "page", "deep/odd", "deep/er/large"):
        assert device.read(f"tree/{name}") == (source / name).read_bytes()


def test_a_tree_into_a_directory_that_exists_gives_its_contents(device: Device, source: Path) -> None:
    run("famfs", "mkdir", "--daxdev", device.path, "d")
    assert copy(device, "-r", source, "d").status == 0
    assert "d/page" in device.tree()
    assert "d/source" not in device.tree()
    before = device.head()
    assert copy(device, "-r", source, "d").status == 0
    assert device.head() == before


def test_attributes(device: Device, source: Path) -> None:
    os.umask(0o022)
    copy(device, "-m", "0666", "-u", "5", "-g", "6", source / "one", "a")
    copy(device, "-m", "0022", source / "one", "b")
    assert device.tree() == {"a": ("644", 1), "b": ("600", 1)}
    assert device.owner("a") == (5, 6)


def test_what_cannot_be_stored_is_named_and_the_rest_copied(device: Device, source: Path) -> None:
    (source / "nothing").touch()
    (source / "link").symlink_to("page")
    (source / "dead").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    outcome = copy(device, "-r", source, "tree")
    assert outcome.status == 1
    skipped = sorted(line.split(": ")[1].rpartition("/")[2] for line in outcome.err.splitlines())
    assert skipped == ["dead", "fifo", "link", "nothing"]
    assert len(device.tree()) == 8


def test_a_directory_without_recursive_is_skipped(device: Device, source: Path) -> None:
    run("famfs", "mkdir", "--daxdev", device.path, "d")
    outcome = copy(device, source / "page", source / "deep", source / "one", "d")
    assert outcome.status == 1
    assert "recursive" in outcome.error
    assert set(device.tree()) == {"d", "d/page", "d/one"}


def test_an_explicit_link_is_followed(device: Device, source: Path) -> None:
    (source / "link").symlink_to("page")
    assert copy(device, source / "link", "copy").status == 0
    assert device.read("copy") == (source / "page").read_bytes()


def test_the_same_size_is_overwritten_in_place(device: Device, source: Path, rng: random.Random) -> None:
    copy(device, source / "page", "copy")
    (source / "page").write_bytes(rng.randbytes(4096))
    before = device.head()
    assert copy(device, source / "page", "copy").status == 0
    assert device.head() == before
    assert device.read("copy") == (source / "page").read_bytes()


def test_another_size_is_an_error(device: Device, source: Path) -> None:
    copy(device, source / "page", "copy")
    before = device.head()
    outcome = copy(device, source / "one", "copy")
    assert outcome.status == 1
    assert "sizes never change" in outcome.error
    assert device.head() == before


def test_striped(device: Device, source: Path) -> None:
    assert copy(device, "-B", "4", "-N", "2", "--verify", source / "deep/er/large", "copy").status == 0
    assert device.read("copy") == (source / "deep/er/large").read_bytes()
    with device.volume() as volume:
        fmap = volume.namespace.fmap(volume.namespace.resolve(b"copy"))
    assert len(fmap.extents) == 2


def test_compare(device: Device, source: Path) -> None:
    copy(device, "-r", source, "tree")
    before = device.head()
    assert copy(device, "-c", "-r", source, "tree").status == 0
    with device.volume() as volume:
        volume.write(volume.namespace.resolve(b"tree/page"), 100, memoryview(b"defaced"))
    outcome = copy(device, "-c", "-r", source, "tree")
    assert outcome.status == 1
    assert "tree/page: differs" in outcome.error
    (source / "more").write_text("more")
    assert copy(device, "-c", "-r", source, "tree").status == 1
    assert device.head() == before


def test_many_files_in_batches(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    monkeypatch.setattr(cp, "_BATCH", 7)
    root = tmp_path / "many"
    root.mkdir()
    contents = {f"f{number}": rng.randbytes(rng.randrange(1, 9000)) for number in range(50)}
    for name, data in contents.items():
        (root / name).write_bytes(data)
    assert copy(device, "-r", "-t", "3", root, "many").status == 0
    assert {name: device.read(f"many/{name}") for name in contents} == contents


def test_what_was_made_before_the_space_ran_out_is_whole(device: Device, tmp_path: Path, rng: random.Random) -> None:
    root = tmp_path / "large"
    root.mkdir()
    for number in range(4):
        with (root / f"f{number}").open("wb") as file:
            file.write(rng.randbytes(5000))
            file.truncate(3 << 30 if number == 2 else 1 << 20)
    run("famfs", "creat", "--daxdev", device.path, "-s", "2g", "filler")
    outcome = copy(device, "-r", root, "t")
    assert outcome.status == 1
    assert "t/f2" in outcome.error
    assert set(device.tree()) == {"filler", "t", "t/f0", "t/f1", "t/f3"}
    for name in ("f0", "f1", "f3"):
        assert device.read(f"t/{name}") == (root / name).read_bytes()


def test_a_thousand_failures_are_few_lines(device: Device, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(60):
        (root / f"f{number:02}").write_bytes(b"x")
    run("famfs", "creat", "--daxdev", device.path, "-s", "4070m", "filler")
    outcome = copy(device, "-r", root, "t")
    assert outcome.status == 1
    lines = outcome.err.splitlines()
    copied = len(device.tree()) - 2
    assert 0 < copied < 30
    assert len(lines) == 22
    assert lines[20] == f"famfs cp: {60 - copied - 21} more files failed"
    assert "t/f" in lines[21]


@pytest.mark.parametrize("log_first", [False, True])
@pytest.mark.parametrize("change", [b"", b"short", None])
def test_a_source_that_changes_meanwhile_is_no_success(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: bytes | None, log_first: bool
) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes(10_000))
    real = Source.pieces

    def changed(source: Source, buffer: memoryview) -> Iterator[memoryview]:
        path.write_bytes(bytes(20_000) if change is None else change)
        return real(source, buffer)

    monkeypatch.setattr(Source, "pieces", changed)
    outcome = copy(device, *(["--log-first"] if log_first else []), path, "copy")
    assert outcome.status == 1
    assert "while it was copied" in outcome.error
    assert ("incomplete" in outcome.error) is log_first
    assert list(device.tree()) == (["copy"] if log_first else [])


def test_a_source_that_gives_less_than_is_asked_for(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """As files of networks may do: a call that reads 10,000 bytes gives 3000."""
    tree = tmp_path / "source"
    tree.mkdir()
    sizes = (7, 3000, 10_000, 2_000_000, 40_000)
    expected = {f"t/{number}": rng.randbytes(size) for number, size in enumerate(sizes)}
    for name, data in expected.items():
        (tree / name[2:]).write_bytes(data)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3000]], offset))
    outcome = copy(device, "-r", tree, "t")
    assert outcome.status == 0, outcome.error
    assert {name: device.read(name) for name in expected} == expected


def test_a_source_that_cannot_be_read_is_no_success(
    device: Device, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Source.pieces

    def removed(found: Source, buffer: memoryview) -> Iterator[memoryview]:
        if found.name.endswith("page") and os.path.exists(found.name):
            os.unlink(found.name)
        return real(found, buffer)

    monkeypatch.setattr(Source, "pieces", removed)
    outcome = copy(device, "-r", source, "tree")
    assert outcome.status == 1
    assert "page: No such file" in outcome.error
    assert device.read("tree/deep/odd") == (source / "deep/odd").read_bytes()
    assert "tree/page" not in device.tree()


def test_a_daemon_that_does_not_come_back_is_waited_for_once(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of batches the command would not end otherwise."""
    tree = tmp_path / "source"
    tree.mkdir()
    for number in range(5):
        (tree / f"{number}").write_bytes(b"data")
    asked: list[int] = []

    def gone(target: DeviceTarget, files: list[FileRequest], data: object) -> None:
        asked.append(len(files))
        raise ControlError("cannot reach the daemon")

    monkeypatch.setattr(cp, "_BATCH", 1)
    monkeypatch.setattr(cp, "_TRY_SECONDS", 0)
    monkeypatch.setattr(DeviceTarget, "put", gone)
    outcome = copy(device, "-r", "-t", "1", tree, "t")
    assert outcome.status == 1
    assert outcome.error == "famfs cp: cannot reach the daemon"
    assert len(asked) == 5 + cp._TRIES


def test_logged_first_is_the_same_in_the_end(device: Device, source: Path) -> None:
    assert copy(device, "-r", source, "one").status == 0
    assert copy(device, "-r", "--log-first", "--verify", source, "two").status == 0
    tree = device.tree()
    assert {name[3:]: what for name, what in tree.items() if name[:3] == "one"} == {
        name[3:]: what for name, what in tree.items() if name[:3] == "two"
    }
    assert device.read("two/deep/er/large") == (source / "deep/er/large").read_bytes()


def test_new_space_shows_nothing_of_what_was_there(device: Device, source: Path) -> None:
    with device.path.open("r+b") as image:
        for offset in range(10 << 20, 26 << 20, 4096):
            image.seek(offset)
            image.write(b"old secret")
    for words in ((), ("--log-first",)):
        assert copy(device, *words, source / "one", "first" if words else "put").status == 0
    with device.volume() as volume:
        for name in (b"first", b"put"):
            extent = volume.namespace.fmap(volume.namespace.resolve(name)).extents[0]
            page = volume.memories[extent.device]
            assert page is not None
            assert page.read(extent.offset, 4096) == (source / "one").read_bytes().ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["{}/page"], 2),
        (["{}/nope", "x"], 1),
        (["/dev/zero", "x"], 1),
        (["{}/page", "{}/one", "x"], 1),
        (["{}/page", "nope/x"], 1),
        (["{}/page", "x/"], 1),
        (["{}/page", "../x"], 1),
        (["{}/page", "file/x"], 1),
        (["{}/page", "{}/one", "file"], 1),
        (["-r", "{}", "file"], 1),
        (["-r", "{}", "nope/x"], 1),
        (["{}/page", "n" * 80], 1),
        (["--uid=-1", "{}/page", "x"], 2),
        (["--gid=-1", "{}/page", "x"], 2),
        (["-t", "1000", "{}/page", "x"], 2),
        (["-N", "4", "{}/page", "x"], 2),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    device: Device, source: Path, arguments: list[str], status: int
) -> None:
    run("famfs", "creat", "--daxdev", device.path, "-s", "123", "file")
    before = device.head()
    outcome = copy(device, *(argument.format(source) for argument in arguments))
    assert outcome.status == status
    assert outcome.error.startswith("famfs cp: ")
    assert device.head() == before


def test_a_directory_is_not_copied_into_itself(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    outcome = run("famfs", "cp", "-r", tmp_path / "d", tmp_path / "d" / "sub")
    assert outcome.status == 2
    assert "into itself" in outcome.error


def test_directories_are_made_together(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (tmp_path / "wide" / f"d{number}" / "deep").mkdir(parents=True)
    requests: list[int] = []
    make = DeviceTarget.make_directories

    def counted(self: DeviceTarget, directories: Sequence[DirectoryRequest]) -> None:
        requests.append(len(directories))
        make(self, directories)

    monkeypatch.setattr(DeviceTarget, "make_directories", counted)
    assert copy(device, "-r", tmp_path / "wide", "wide").status == 0
    assert requests == [101]
    assert sum(path.endswith("/deep") for path in device.tree()) == 50
