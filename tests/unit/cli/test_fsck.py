# SPDX-License-Identifier: Apache-2.0
"""famfs fsck, fsck.famfs, logplay and chkread on devices and golden images."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from commands import Device, host_file, json_of, run
from famfs_server.cli import fsck
from famfs_server.dax.device import Lock
from golden import GoldenImages
from schemas import conform

Build = Callable[[str, Path], Path]


def test_statuses_on_every_golden_image(vectors: GoldenImages, golden_name: str, tmp_path: Path) -> None:
    facts = vectors.facts(golden_name)
    path = vectors.build(golden_name, tmp_path)
    before = Device(path).head()
    valid = facts["superblock"]["expect_check_super_rc"] == 0 and facts["log_header"]["expect_validate_rc"] == 0
    outcome = run("famfs", "fsck", "-v", path)
    assert outcome.status == (facts["expect_fsck_rc"] if valid else 1)
    bits = run("fsck.famfs", "-n", path).status
    if not valid:
        assert outcome.error.startswith(f"famfs fsck: {path}: ")
        assert bits == 4
    else:
        assert outcome.err == ""
        assert "Free space:" in outcome.out
        damaged = {"05-bad-entry-crc", "07-torn-last", "07c-counters-disagree", "09-add-daxdev", "11-bad-entries"}
        assert bits == (4 if golden_name in damaged else 0)
        assert json_of(run("famfs", "fsck", "--json", path))["clean"] is (bits == 0)
    assert Device(path).head() == before


def test_options(device: Device) -> None:
    for options in (["-h"], ["-m"], ["-r"], ["-vv"], ["-hv"], ["-f"], ["-L"], ["-F"], ["--fuse"], ["-D"], []):
        assert run("famfs", "fsck", *options, device.path).status == 0
    out = run("famfs", "fsck", "-B", "4", device.path).out
    assert out.count("bucket ") == 4
    assert run("famfs", "fsck", "-B", "65", device.path).status == 2
    assert "daxctl reconfigure-device" in run("famfs", "fsck", "-M", device.path).error
    for options in (["-a"], ["-p"], ["-y"], ["-n"], ["-f"], ["-C0"], ["-V"], ["-C"]):
        assert run("fsck.famfs", *options, device.path).status == 0


@pytest.fixture
def saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where fsck keeps the bytes that it changes."""
    folder = tmp_path / "saved"
    monkeypatch.setattr(fsck, "SAVE_DIRECTORY", str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "option", "bits", "afterwards"),
    [
        ("02-tree", "-y", 0, 0),
        ("07c-counters-disagree", "-a", 1, 0),
        ("07c-counters-disagree", "-p", 1, 0),
        ("07-torn-last", "-a", 4, 4),
        ("07-torn-last", "-y", 1, 0),
        ("05-bad-entry-crc", "-y", 4, 4),
        ("11-bad-entries", "-y", 4, 4),
    ],
)
def test_the_helper_mends_what_is_safe(
    vectors: GoldenImages, tmp_path: Path, saves: Path, name: str, option: str, bits: int, afterwards: int
) -> None:
    path = vectors.build(name, tmp_path)
    outcome = run("fsck.famfs", option, path)
    assert outcome.status == bits, outcome
    assert ("REPAIRED: " in outcome.out) is bool(bits & 1)
    assert len(list(saves.glob("*.json"))) == bits & 1
    assert run("fsck.famfs", path).status == afterwards
    assert run("fsck.famfs", option, path).status == afterwards


def test_a_repair_can_be_undone_by_what_it_saved(vectors: GoldenImages, tmp_path: Path) -> None:
    device = Device(vectors.build("07-torn-last", tmp_path))
    before, copy = device.head(), tmp_path / "copy"
    found = json_of(run("famfs", "fsck", "--repair", "--save", copy, "--json", device.path))
    assert found["clean"] is True
    assert found["saved_in"] == str(copy)
    assert device.head() != before
    saved = json.loads(copy.read_text())
    assert saved["actions"] == found["repaired"]
    with device.path.open("r+b") as image:
        for row in saved["saved"]:
            image.seek(row["offset"])
            image.write(bytes.fromhex(row["bytes"]))
    assert device.head() == before


def test_what_is_not_repaired(vectors: GoldenImages, tmp_path: Path, saves: Path) -> None:
    device = Device(vectors.build("07-torn-last", tmp_path))
    before = device.head()
    taken = tmp_path / "taken"
    taken.touch()
    for arguments, status, cause in (
        (["--repair", "--force"], 2, "exclude each other"),
        (["--save", "x"], 2, "--save needs --repair"),
        (["--repair", "--save", taken], 1, "File exists"),
        (["--repair", "--save", tmp_path / "no" / "where"], 1, "No such file"),
    ):
        outcome = run("famfs", "fsck", *arguments, device.path)
        assert outcome.status == status
        assert cause in outcome.error
    elsewhere = host_file(tmp_path, UUID(int=9))
    assert "only the owner" in run("famfs", "fsck", "--repair", device.path, env=elsewhere).error
    assert run("fsck.famfs", "-y", device.path, env=elsewhere).status == 8
    assert run("fsck.famfs", "-n", "-y", device.path).status == 16
    with device.locked(Lock.MOUNTED, exclusive=False):
        assert run("fsck.famfs", "-y", device.path).status == 8
    assert device.head() == before


def test_a_device_in_use_is_busy(device: Device) -> None:
    with device.locked(Lock.MOUNTED, exclusive=False):
        outcome = run("famfs", "fsck", device.path)
        assert outcome.status == 16
        assert "mounted" in outcome.error
        assert run("fsck.famfs", device.path).status == 8
        assert run("famfs", "fsck", "--force", device.path).status == 0


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    blank = Device(tmp_path / "blank")
    for path, status, bits in ((tmp_path / "nope", 2, 8), (Path("/dev/null"), 1, 8), (blank.path, 1, 4)):
        outcome = run("famfs", "fsck", path)
        assert outcome.status == status
        assert outcome.error.startswith("famfs fsck: ")
        helper = run("fsck.famfs", path)
        assert helper.status == bits
        assert helper.error.startswith("fsck.famfs: ")


def test_the_role_follows_the_host(vectors: GoldenImages, tmp_path: Path) -> None:
    path = vectors.build("02-tree", tmp_path)
    assert "Owner" in run("famfs", "fsck", path).out
    other = tmp_path / "other"
    other.write_text("11111111-2222-4333-8444-555555555555")
    assert "Client" in run("famfs", "fsck", path, env={"FAMFS_SYSTEM_UUID_FILE": str(other)}).out


@pytest.mark.parametrize(
    ("name", "status"), [("02-tree", 0), ("03-interleaved", 0), ("09-add-daxdev", 0), ("11-bad-entries", 14)]
)
def test_logplay_into_a_shadow_tree(vectors: GoldenImages, tmp_path: Path, name: str, status: int) -> None:
    path = vectors.build(name, tmp_path)
    shadow = tmp_path / "shadow"
    facts = vectors.facts(name)
    for _ in range(2):
        outcome = run("famfs", "logplay", "--shadow", shadow, "--daxdev", path, "-vv")
        assert outcome.status == status, outcome
    assert run("famfs", "logplay", "-Ss", shadow, "--daxdev", path).status == status
    with Device(path).volume() as volume:
        visible = {
            os.fsdecode(volume.namespace.path(nodeid))
            for nodeid in volume.namespace.walk()
            if not volume.namespace.is_directory(nodeid)
        }
    found = {str(file.relative_to(shadow / "root")) for file in shadow.rglob("*") if file.is_file()}
    assert found == visible
    entries: dict[str, Any] = {}
    for entry in facts["entries"]:
        if entry["type"] == 0:
            entries.setdefault(entry["file"]["fm_relpath"], entry["file"])
    for relative in visible & set(entries):
        stored = yaml.safe_load((shadow / "root" / relative).read_text())
        expected = entries[relative]
        assert stored["path"] == relative
        assert stored["size"] == expected["fm_size"]
        assert stored["mode"] == int(expected["fm_mode"], 8)
        if expected["fmap_ext_type"] == 0:
            assert [extent["offset"] for extent in stored["simple_ext_list"]] == [
                extent["offset"] for extent in expected["simple"]
            ]
        else:
            [striped] = stored["striped_ext_list"]
            assert striped["nstrips"] == expected["interleaved"][0]["ie_nstrips"]
            assert striped["chunk_size"] == expected["interleaved"][0]["ie_chunk_size"]


def test_shadow_files_read_as_the_reference_writes_them(device: Device, tmp_path: Path) -> None:
    run("famfs", "creat", "--daxdev", device.path, "-s", "5000", "-u", "1", "-g", "2", "gr\u00fc\u00df.dat")
    run("famfs", "logplay", "--shadow", tmp_path / "s", "--daxdev", device.path)
    assert (tmp_path / "s" / "root" / "gr\u00fc\u00df.dat").read_text() == (
        '---\npath: "gr\\xFC\\xDF.dat"\nsize: 5000\nflags: 2\nmode: 0644\nuid: 1\ngid: 2\nnextents: 1\n'
        "simple_ext_list:\n- devindex: 0\n  offset: 0xa00000\n  length: 0x200000\n...\n"
    )


def test_a_shadow_that_says_something_else_is_found(device: Device, tmp_path: Path) -> None:
    run("famfs", "creat", "--daxdev", device.path, "-s", "5000", "file")
    run("famfs", "logplay", "--shadow", tmp_path / "s", "--daxdev", device.path)
    stored = tmp_path / "s" / "root" / "file"
    stored.write_text(stored.read_text().replace("5000", "6000"))
    assert run("famfs", "logplay", "--shadow", tmp_path / "s", "--daxdev", device.path).status == 0
    outcome = run("famfs", "logplay", "--shadow", tmp_path / "s", "--shadowtest", "--daxdev", device.path)
    assert outcome.status == 1
    assert "does not say what the log says" in outcome.error


def test_the_shadow_tree_is_not_left_through_links(device: Device, tmp_path: Path) -> None:
    run("famfs", "mkdir", "--daxdev", device.path, "d")
    run("famfs", "creat", "--daxdev", device.path, "-s", "1", "d/f")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "s" / "root").mkdir(parents=True)
    (tmp_path / "s" / "root" / "d").symlink_to(outside)
    assert run("famfs", "logplay", "--shadow", tmp_path / "s", "--daxdev", device.path).status == 1
    assert list(outside.iterdir()) == []


def test_logplay_dry_run_writes_nothing(device: Device, tmp_path: Path) -> None:
    run("famfs", "creat", "--daxdev", device.path, "-s", "1", "f")
    outcome = run("famfs", "logplay", "-n", "--shadow", tmp_path / "s", "--daxdev", device.path)
    assert outcome.status == 0
    assert not (tmp_path / "s").exists()


def test_bad_logplay(device: Device, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, status in (
        (["--shadow", tmp_path / "s", "--daxdev", tmp_path / "nope"], 1),
        (["--shadow", tmp_path / "a" / "b", "--daxdev", device.path], 1),
        (["--shadow", tmp_path / "file", "--daxdev", device.path], 1),
        (["--shadow", tmp_path / "s", "--shadow", tmp_path / "s", "--daxdev", device.path], 2),
        (["--daxdev", device.path], 2),
        (["--daxdev", device.path, "--shadow", tmp_path / "s", tmp_path], 2),
        (["--shadow"], 2),
        (["-rm", tmp_path], 2),
        (["-M", tmp_path], 1),
    ):
        outcome = run("famfs", "logplay", *arguments)
        assert outcome.status == status, outcome
        assert outcome.error.startswith("famfs logplay: ")
    assert not (tmp_path / "s").exists()


def test_a_damaged_log_ends_logplay(golden_image: Build, tmp_path: Path) -> None:
    for name in ("05-bad-entry-crc", "07-torn-last", "06-bad-sb-crc"):
        outcome = run("famfs", "logplay", "--shadow", tmp_path / name, "--daxdev", golden_image(name, tmp_path))
        assert outcome.status == 1
        assert outcome.error


def test_chkread(vectors: GoldenImages, tmp_path: Path) -> None:
    superblock, log = tmp_path / "superblock", tmp_path / "log"
    superblock.write_bytes(vectors.piece("02-tree", "sb").ljust(2 << 20, b"\0"))
    log.write_bytes(vectors.piece("02-tree", "log").ljust(8 << 20, b"\0"))
    assert run("famfs", "chkread", "-s", superblock).status == 0
    assert run("famfs", "chkread", "-l", log).status == 0
    for arguments, status in (
        (["-l", superblock], 1),
        (["-s", log], 1),
        (["-s", tmp_path / "nope"], 1),
        (["-s", "-l", log], 2),
        ([log], 2),
        (["-s", "/dev/null"], 1),
    ):
        outcome = run("famfs", "chkread", *arguments)
        assert outcome.status == status
        assert outcome.error.startswith("famfs chkread: ")
    for option, file in (("-s", superblock), ("-l", log)):
        found = conform(run("famfs", "chkread", option, "--json", file).out, "chkread")
        assert found["size"] == file.stat().st_size


@pytest.mark.parametrize("name", ["02-tree", "05-bad-entry-crc", "11-bad-entries"])
def test_logplay_as_json(vectors: GoldenImages, tmp_path: Path, name: str) -> None:
    outcome = run("famfs", "logplay", "--json", "--shadow", tmp_path / "s", "--daxdev", vectors.build(name, tmp_path))
    found = conform(outcome.out, "logplay")
    assert found["new_shadow_files"] == found["files"]
    if found["stop"] is None:
        assert outcome.status == found["errors"]
    else:
        assert outcome.status == 1
        assert name == "05-bad-entry-crc"
