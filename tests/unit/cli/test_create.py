# SPDX-License-Identifier: Apache-2.0
"""creat, mkdir, verify, getmap and flush on a device that is not mounted (format 8, smoke tests test0 and test1)."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Device, Outcome, json_of, run
from famfs_server.cli.target import Targets, Unmounted
from famfs_server.dax.device import Lock
from famfs_server.seeded import SeededStream
from schemas import conform

Build = Callable[[str, Path], Path]


def on(device: Device, command: str, *arguments: str | Path) -> Outcome:
    return run("famfs", command, "--daxdev", device.path, *arguments)


def stream(seed: int, length: int) -> bytes:
    data = bytearray(length)
    SeededStream(seed).fill(data)
    return bytes(data)


def test_a_seeded_file_holds_the_stream_and_verifies(device: Device) -> None:
    assert on(device, "creat", "-r", "-s", "0x100001", "-S", "7", "file").status == 0
    assert device.read("file") == stream(7, 0x100001)
    assert on(device, "verify", "-f", "file", "-S", "7").status == 0
    outcome = on(device, "verify", "-f", "file", "-S", "99")
    assert outcome.status == 1
    assert "differs from seed 99" in outcome.error


def test_large_files_are_filled_piece_by_piece(device: Device) -> None:
    size = (20 << 20) + 13
    assert on(device, "creat", "-r", "-S", "3", "-s", str(size), "big").status == 0
    assert device.read("big") == stream(3, size)


def test_one_wrong_byte_is_found(device: Device) -> None:
    on(device, "creat", "-r", "-s", "20m", "-S", "7", "file")
    with device.volume() as volume:
        nodeid = volume.namespace.resolve(b"file")
        at = (20 << 20) - 1
        volume.write(nodeid, at, memoryview(bytes([volume.read(nodeid, at, 1)[0] ^ 1])))
    assert f"at offset {at}" in on(device, "verify", "-f", "file", "-S", "7").error


def test_without_a_seed_the_data_are_random(device: Device) -> None:
    assert on(device, "creat", "-r", "-s", "4096", "a").status == 0
    assert on(device, "creat", "-r", "-s", "4096", "b").status == 0
    assert device.read("a") != device.read("b")


def test_the_same_size_again_is_no_change(device: Device) -> None:
    on(device, "creat", "-r", "-s", "4096", "-S", "1", "file")
    before = device.head()
    assert on(device, "creat", "-s", "4096", "file").status == 0
    assert device.head() == before
    assert device.read("file") == stream(1, 4096)
    assert on(device, "creat", "-r", "-S", "2", "file").status == 0
    assert device.read("file") == stream(2, 4096)


def test_attributes_and_defaults(device: Device) -> None:
    os.umask(0o027)
    on(device, "creat", "-s", "1", "plain")
    on(device, "creat", "-s", "1", "-m", "0666", "-u", "12", "-g", "34", "given")
    on(device, "mkdir", "plain.d")
    on(device, "mkdir", "-m", "0700", "-u", "56", "-g", "78", "given.d")
    assert device.tree() == {
        "plain": ("640", 1),
        "given": ("640", 1),
        "plain.d": ("755", 0),
        "given.d": ("700", 0),
    }
    assert device.owner("plain") == (os.geteuid(), os.getegid())
    assert device.owner("given") == (12, 34)
    assert device.owner("given.d") == (56, 78)


def test_multi_makes_the_good_and_counts_the_bad(device: Device) -> None:
    outcome = on(device, "creat", "-M", "good,4k", "-M", "no/parent,4k", "-M", "seeded,2m,42", "-M", "huge,1000g")
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 2
    assert set(device.tree()) == {"good", "seeded"}
    assert device.read("seeded") == stream(42, 2 << 20)


def test_multi_is_one_append(device: Device) -> None:
    names = [f"-Mfile{number},1" for number in range(500)]
    assert on(device, "creat", *names).status == 0
    assert len(device.tree()) == 500


def test_multi_verify(device: Device) -> None:
    on(device, "creat", "-M", "a,4k,1", "-M", "b,4k,2")
    assert on(device, "verify", "-m", "a,1", "-m", "b,2").out.count("agrees") == 2
    assert on(device, "verify", "-q", "-m", "a,1").out == ""
    outcome = on(device, "verify", "-m", "a,9", "-m", "b,9", "-m", "c,1")
    assert outcome.status == 3


def test_striped_files(device: Device) -> None:
    assert on(device, "creat", "-s", "64m", "-B", "4", "-N", "3", "-C", "4m", "striped").status == 0
    [found] = json_of(on(device, "getmap", "--json", "striped"))
    assert found["size"] == 64 << 20
    assert found["chunk_size"] == 4 << 20
    assert [extent["length"] for extent in found["extents"]] == [24 << 20] * 3
    assert "3 strips in chunks of 4194304" in on(device, "getmap", "striped").out


def test_getmap_shows_what_the_log_says(device: Device) -> None:
    on(device, "creat", "-s", "3m", "file")
    [found] = json_of(on(device, "getmap", "--json", "file"))
    assert found["extents"] == [{"device": 0, "offset": 0xA00000, "length": 4 << 20}]
    assert "offset 0xa00000 length 0x400000" in on(device, "getmap", "file").out
    assert on(device, "getmap", "-q", "file").out == ""
    [log] = json_of(on(device, "getmap", "--json", ".meta/.log"))
    assert log["extents"] == [{"device": 0, "offset": 0x200000, "length": 8 << 20}]


def test_paths_are_normalised(device: Device) -> None:
    assert on(device, "mkdir", "/a").status == 0
    assert on(device, "mkdir", "./a//./b/").status == 0
    assert on(device, "creat", "-s", "1", "a/b/../c").status == 0
    assert on(device, "creat", "-s", "1", os.fsdecode(b"a/\xff")).status == 0
    assert set(device.tree()) == {"a", "a/b", "a/c", os.fsdecode(b"a/\xff")}


def test_mkdir_parents(device: Device) -> None:
    assert on(device, "mkdir", "-p", "x/y/z").status == 0
    assert on(device, "mkdir", "-p", "x/y/z").status == 0
    assert on(device, "mkdir", "-p", "/").status == 0
    assert on(device, "mkdir", "-pv", "x/w").out == "created directory x/w\n"
    assert list(device.tree()) == ["x", "x/y", "x/y/z", "x/w"]


def test_flush(device: Device) -> None:
    on(device, "creat", "-s", "1m", "file")
    on(device, "mkdir", "d")
    assert on(device, "flush", "file", ".meta/.log", ".meta/.superblock").status == 0
    assert on(device, "flush", "file", "d", "absent").status == 2


def test_a_flush_tells_how_far_it_is(device: Device) -> None:
    on(device, "creat", "-s", "150m", "file")
    done: list[int] = []
    with Targets(Unmounted(str(device.path)), write=False) as targets:
        place = targets.find("file")
        place.target.open(place.path).flush(done.append)
    assert done == [64 << 20, 64 << 20, 22 << 20]


def test_names_at_the_limit(device: Device) -> None:
    longest = "n" * 79
    assert on(device, "creat", "-s", "1", longest).status == 0
    assert longest in device.tree()


@pytest.fixture
def furnished(device: Device) -> Device:
    """A file of 4096 bytes and a directory."""
    on(device, "creat", "-s", "4096", "file")
    on(device, "mkdir", "d")
    return device


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["creat", "file2"], 2, "--size"),
        (["creat", "-s", "0", "file2"], 1, "cannot be empty"),
        (["creat", "-s", "0", "file"], 1, "cannot be empty"),
        (["creat", "-s", "-1", "file2"], 2, "not a size"),
        (["creat", "-s", "-s", "file2"], 2, ""),
        (["creat", "-s", "1e3", "file2"], 2, "not a size"),
        (["creat", "-s", "99999999999g", "file2"], 2, "larger"),
        (["creat", "-s", "1000g", "file2"], 1, "bytes are free"),
        (["creat", "-s", "8192", "file"], 1, "instead of 8192"),
        (["creat", "-r", "-S", "1", "file2"], 2, "--size"),
        (["creat", "-S", "1", "-s", "10", "file2"], 2, "--randomize"),
        (["creat", "-r", "-S", "0", "-s", "10", "file2"], 2, "within"),
        (["creat", "-s", "10", "d"], 1, "not a regular file"),
        (["creat", ".meta"], 1, "not a regular file"),
        (["creat", "-s", "10", ".meta/x"], 1, ""),
        (["creat", "-s", "10", "d/"], 1, "not a regular file"),
        (["creat", "-s", "10", "nope/x"], 1, "no such directory"),
        (["creat", "-s", "10", "file/x"], 1, "not a directory"),
        (["creat", "-s", "10", "../x"], 1, "leads out"),
        (["creat", "-s", "10", "d/../../x"], 1, "leads out"),
        (["creat", "-s", "10", "/"], 1, "not a regular file"),
        (["creat", "-s", "10", ""], 1, "empty"),
        (["creat", "-s", "10", "n" * 80], 1, "79"),
        (["creat", "-s", "10", "d/" + "n" * 78], 1, "79"),
        (["creat", "-s", "10", "-m", "999", "x"], 2, "not a mode"),
        (["creat", "-s", "10", "-u", "-1", "x"], 2, "not a number"),
        (["creat", "-s", "10", "--gid=4294967295", "x"], 2, "within"),
        (["creat", "-s", "10", "-t", "257", "x"], 2, "within"),
        (["creat", "-s", "10", "-t", "-1", "x"], 2, "not a number"),
        (["creat", "-s", "4m", "-N", "2", "x"], 2, "both"),
        (["creat", "-s", "4m", "-B", "4", "-N", "0", "x"], 2, "both"),
        (["creat", "-s", "4m", "-B", "100", "-N", "4", "x"], 2, "64"),
        (["creat", "-s", "4m", "-B", "8", "-N", "4", "x"], 2, "1 GiB"),
        (["creat", "-s", "4m", "-B", "4", "-N", "17", "x"], 2, "16"),
        (["creat", "-s", "4m", "-B", "2", "-N", "3", "x"], 2, "buckets"),
        (["creat", "-s", "4m", "-B", "4", "-N", "2", "-C", "3m", "x"], 2, "power of two"),
        (["creat", "-s", "4m", "-B", "4", "-N", "2", "-C", "0", "x"], 2, "power of two"),
        (["creat", "-M", "x"], 2, "FILE,SIZE"),
        (["creat", "-M", "x,"], 2, "not a size"),
        (["creat", "-M", "x,1,2,3"], 2, "FILE,SIZE"),
        (["creat", "-M", "x,1,"], 2, "not a number"),
        (["creat", "-M", ",1"], 2, "FILE,SIZE"),
        (["creat", "-S", "1", "-r", "-M", "x,1"], 2, "--multi"),
        (["creat", "-M", "x,1", "y"], 2, "--multi"),
        (["creat", "-M", "../x,1"], 1, "leads out"),
        (["mkdir", "d"], 1, "exists"),
        (["mkdir", "file"], 1, "exists"),
        (["mkdir", "/"], 1, "exists"),
        (["mkdir", "nope/x"], 1, "no such directory"),
        (["mkdir", "-p", "file/x/y"], 1, "not a directory"),
        (["mkdir", "-p", "d/../../.."], 1, "leads out"),
        (["mkdir", "-p", ".meta/x"], 1, ""),
        (["mkdir", "-m", "rwx", "x"], 2, "not a mode"),
        (["verify", "-f", "file"], 2, "--seed"),
        (["verify", "-S", "1"], 2, "--filename"),
        (["verify", "-f", "nope", "-S", "1"], 1, "No such file"),
        (["verify", "-f", "d", "-S", "1"], 1, "not a regular file"),
        (["verify", "-m", "file"], 2, "FILE,SEED"),
        (["verify", "-m", "file,1,x"], 2, "FILE,SEED"),
        (["verify", "-m", "file,one"], 2, "not a number"),
        (["verify", "-m", "file,1", "-S", "1"], 2, "--multi"),
        (["verify", "-t", "257", "-m", "file,1"], 2, "within"),
        (["getmap", "d"], 1, "not a regular file"),
        (["getmap", "nope"], 1, "No such file"),
        (["flush", "nope"], 1, "No such file"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    furnished: Device, arguments: list[str], status: int, words: str
) -> None:
    before = furnished.head()
    outcome = on(furnished, *arguments)
    assert outcome.status == status
    assert words in outcome.error
    assert outcome.out == ""
    assert furnished.head() == before


def test_outside_of_any_file_system(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for arguments in (
        ["creat", "-s", "1", path],
        ["mkdir", path],
        ["verify", "-f", path, "-S", "1"],
        ["getmap", path],
        ["flush", path],
        ["cp", "/etc/passwd", path],
        ["logplay", path],
        ["fsck", tmp_path],
    ):
        outcome = run("famfs", *arguments)
        assert outcome.status == 1
        assert "not in a mounted famfs file system" in outcome.error
    assert not path.exists()


def test_a_full_log_changes_nothing(golden_image: Build, tmp_path: Path) -> None:
    device = Device(golden_image("08-log-full-synthetic", tmp_path))
    before = device.head()
    for arguments in (["creat", "-s", "1", "new"], ["mkdir", "new"]):
        outcome = on(device, *arguments)
        assert outcome.status == 1
        assert "log is full" in outcome.error
        assert device.head() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [("05-bad-entry-crc", "entry 8"), ("07-torn-last", "entry 16"), ("06d-foreign-owner", "not the master")],
)
def test_volumes_that_must_not_be_appended_to(golden_image: Build, tmp_path: Path, name: str, words: str) -> None:
    device = Device(golden_image(name, tmp_path))
    before = device.head()
    outcome = on(device, "mkdir", "new")
    assert outcome.status == 1
    assert words in outcome.error
    assert device.head() == before


def test_a_device_that_somebody_writes_to(device: Device) -> None:
    with device.locked(Lock.WRITER, exclusive=True):
        outcome = on(device, "mkdir", "new")
        assert outcome.status == 16
        assert "another process" in outcome.error
        assert on(device, "getmap", ".meta/.log").status == 0
    with device.locked(Lock.MOUNTED, exclusive=True):
        assert on(device, "getmap", ".meta/.log").status == 16


def test_verify_as_json(device: Device) -> None:
    run("famfs", "creat", "--daxdev", device.path, "-M", "a,5000,1", "-M", "b,5000,2")
    words = ["-m", "a,1", "-m", "b,1", "-m", "c,1"]
    outcome = run("famfs", "verify", "--json", "--daxdev", device.path, *words)
    assert outcome.status == 2
    assert outcome.err == ""
    rows = conform(outcome.out, "verify")
    assert [row["agrees"] for row in rows] == [True, False, False]
    assert [row["differs_at"] is None for row in rows] == [True, False, True]
    assert [row["error"] is None for row in rows] == [True, True, False]
