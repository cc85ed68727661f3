# SPDX-License-Identifier: Apache-2.0
"""fsck's figures against those that the reference computed, its findings, its words and its exit statuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from famfs_server.dax.device import DaxDevice
from famfs_server.errors import MediaError, UsageError
from famfs_server.omf import layout, log
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume import check, format
from famfs_server.volume.check import Report
from famfs_server.volume.faults import Fault
from famfs_server.volume.replay import Damage
from famfs_server.volume.volume import Role
from golden import SYSTEM_UUID, GoldenImages

OWNER = UUID(SYSTEM_UUID)
GIB = 1 << 30
Build = Callable[[str, Path], Path]


def examine(path: Path, host: UUID | None = OWNER) -> Report:
    with DaxDevice.open(str(path), writable=False) as device:
        memory = device.memory()
        try:
            return check.examine(memory, str(path), host)
        finally:
            memory.close()


def report_of(vectors: GoldenImages, name: str, tmp_path: Path) -> Report:
    return examine(vectors.build(name, tmp_path))


def test_figures_are_those_of_the_reference(vectors: GoldenImages, golden_name: str, tmp_path: Path) -> None:
    facts = vectors.facts(golden_name)
    path = vectors.build(golden_name, tmp_path)
    header_is_valid = facts["log_header"]["expect_validate_rc"] == 0
    if facts["superblock"]["expect_check_super_rc"] != 0 or not header_is_valid:
        with pytest.raises(MediaError):
            examine(path)
        return
    report = examine(path)
    expected: dict[str, Any] = facts["bitmap"]
    usage = report.usage
    assert report.capacity == expected["nbits"] * expected["alloc_unit"]
    assert usage.collisions == expected["alloc_errors"] == facts["expect_fsck_rc"] == report.exit_status
    assert usage.file_bytes == expected["fsize_sum"]
    assert usage.allocated == expected["alloc_sum"]
    assert usage.entries == expected["n_entries"]
    assert usage.bad_entries == expected["bad_entries"]
    assert (usage.files, usage.directories) == (expected["f_logged"], expected["d_logged"])
    assert usage.used == [tuple(run) for run in expected["inuse_au_ranges"]]
    assert report.role is (Role.MASTER if facts["superblock"]["expect_role"] == 1 else Role.CLIENT)


@pytest.mark.parametrize(
    ("name", "clean", "damage", "skipped"),
    [
        ("01-empty", True, None, 0),
        ("02-tree", True, None, 0),
        ("03-interleaved", True, None, 0),
        ("05-bad-entry-crc", False, Damage.CORRUPT, 0),
        ("06d-foreign-owner", True, None, 0),
        ("07-torn-last", False, Damage.TORN, 0),
        ("07b-entry-without-counters", True, None, 0),
        ("07c-counters-disagree", False, None, 0),
        ("08-log-full-synthetic", True, None, 0),
        ("09-add-daxdev", False, None, 2),
    ],
)
def test_findings(
    vectors: GoldenImages, tmp_path: Path, name: str, clean: bool, damage: Damage | None, skipped: int
) -> None:
    report = report_of(vectors, name, tmp_path)
    assert report.clean is clean
    assert report.fsck_bits == (0 if clean else 4)
    assert (report.stop.damage if report.stop else None) is damage
    assert report.skipped_count == len(report.skipped) == skipped


def test_every_skipped_entry_is_listed_with_its_reason(vectors: GoldenImages, tmp_path: Path) -> None:
    report = report_of(vectors, "11-bad-entries", tmp_path)
    paths = {entry.index: entry.path for entry in report.skipped}
    assert paths[2] == "/absolute"
    assert paths[4] == "../escaped_file"
    assert set(paths) == set(range(20)) - {0, 1, 8, 19}
    lines = [line for line in check.render(report) if line.startswith("skipped: log entry 2 ")]
    assert lines == ["skipped: log entry 2 (/absolute): the path is not relative"]


def test_disagreeing_counters_are_a_problem(vectors: GoldenImages, tmp_path: Path) -> None:
    (problem,) = report_of(vectors, "07c-counters-disagree", tmp_path).problems
    assert "next_seqnum 17, next_index 16" in problem


def test_an_append_that_was_never_completed_is_a_note(vectors: GoldenImages, tmp_path: Path) -> None:
    report = report_of(vectors, "07b-entry-without-counters", tmp_path)
    (note,) = report.notes
    assert "a whole entry stands behind the end of the log, at 16" in note


def test_space_of_entries_that_are_not_shown_is_unreachable(tmp_path: Path) -> None:
    unit = layout.ALLOC_UNIT
    path = volume_with(
        tmp_path,
        [
            entry(0, b"a", Extent(0, 10 * unit, 4 * unit)),
            entry(1, b"missing/b", Extent(0, 20 * unit, 3 * unit)),
            entry(2, b"c", Extent(0, 13 * unit, 2 * unit)),
        ],
    )
    report = examine(path)
    assert [skipped.fault for skipped in report.skipped] == [Fault.MISSING_PARENT, Fault.OVERLAP]
    assert report.usage.unreachable == (3 + 1) * unit
    assert f"  Unreachable space:    {4 * unit}" in list(check.render(report))


def test_each_device_has_its_figures(tmp_path: Path) -> None:
    unit = layout.ALLOC_UNIT
    path = volume_with(
        tmp_path,
        [
            log.build_add_daxdev(0, device=1, size=8 * GIB, uuid=UUID(int=5)),
            entry(1, b"a", Extent(1, 0, 4 * unit)),
            entry(2, b"b", Extent(1, 2 * unit, 4 * unit)),
        ],
    )
    first, second = examine(path).devices
    assert (first.number, first.size, first.allocated, first.collisions) == (0, 4 * GIB, 5 * unit, 0)
    assert (second.number, second.size, second.allocated, second.free) == (1, 8 * GIB, 6 * unit, 8 * GIB - 6 * unit)
    assert second.collisions == 2


def test_lines_that_scripts_read(vectors: GoldenImages, tmp_path: Path) -> None:
    report = report_of(vectors, "02-tree", tmp_path)
    lines = list(check.render(report, verbose=1))
    free = [line.split() for line in lines if "Free space:" in line]
    assert free == [["Free", "space:", str(report.free)]]
    assert [line.split()[2] for line in lines if "Device capacity:" in line] == [str(4 * GIB)]
    assert [line.split()[1] for line in lines if "log_len" in line] == ["8388608"]
    assert not any("log_len" in line for line in check.render(report))
    human = [line.split()[2] for line in check.render(report, human=True) if "Free space:" in line]
    assert human == ["2.92G"]


def test_report_is_json(vectors: GoldenImages, golden_name: str, tmp_path: Path) -> None:
    try:
        report = report_of(vectors, golden_name, tmp_path)
    except MediaError:
        return
    assert json.loads(json.dumps(report.as_dict()))["clean"] is report.clean


def test_nothing_in_the_media_reaches_the_terminal_raw(tmp_path: Path) -> None:
    path = volume_with(tmp_path, [entry(0, b"a/\x1b[2J\xff", Extent(0, 0xA00000, layout.ALLOC_UNIT))])
    text = "\n".join(check.render(examine(path)))
    assert "\x1b" not in text
    assert "a/\\x1b[2J\\xff" in text


def entry(index: int, name: bytes, *extents: Extent) -> bytes:
    return log.build_file(index, name, size=1, mode=0o644, uid=0, gid=0, fmap=Fmap(extents))


def volume_with(tmp_path: Path, entries: list[bytes], size: int = 4 * GIB) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as image:
        image.truncate(size)
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        format.make_filesystem(memory, "/dev/dax0.0", OWNER, log_length=layout.MIN_LOG_LENGTH)
        memory.write(layout.entry_offset(0), b"".join(entries))
        memory.store_u64(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, len(entries))
        memory.store_u64(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, len(entries))
        memory.close()
    return path


def test_collisions_are_counted_by_units(tmp_path: Path) -> None:
    unit = layout.ALLOC_UNIT
    path = volume_with(
        tmp_path,
        [
            entry(0, b"a", Extent(0, 10 * unit, 4 * unit)),
            entry(1, b"b", Extent(0, 11 * unit, 2 * unit)),
            entry(2, b"c", Extent(0, 13 * unit, 2 * unit)),
            entry(3, b"d", Extent(0, 11 * unit, unit)),
        ],
    )
    report = examine(path)
    assert report.usage.collisions == 2 + 1 + 1
    assert report.usage.used == [(0, 5), (10, 15)]
    assert "ERROR: 4 ALLOCATION COLLISIONS FOUND" in list(check.render(report))


def test_absurd_extents_are_counted_within_the_device(tmp_path: Path) -> None:
    path = volume_with(tmp_path, [entry(0, b"a", Extent(0, (1 << 64) - 4096, (1 << 64) - 1), Extent(5, 0, 1 << 63))])
    report = examine(path)
    assert report.usage.allocated == 5 * layout.ALLOC_UNIT
    assert report.usage.collisions == 0
    assert report.skipped_count == 1


def test_a_log_of_wrong_checksums_is_counted_whole(tmp_path: Path) -> None:
    path = volume_with(tmp_path, [bytes(544)] * 15420)
    assert examine(path).usage.bad_entries == 15420


def test_buckets_add_up(vectors: GoldenImages, tmp_path: Path) -> None:
    report = report_of(vectors, "03-interleaved", tmp_path)
    buckets = report.buckets(8)
    assert sum(bucket.used + bucket.free for bucket in buckets) == report.capacity
    assert sum(bucket.used for bucket in buckets) == report.usage.allocated
    assert all(0 < bucket.largest_free <= bucket.free for bucket in buckets)
    for count in (0, 65):
        with pytest.raises(UsageError):
            report.buckets(count)
