# SPDX-License-Identifier: Apache-2.0
"""famfs map: regions, totals and pictures say what the log says."""

import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from commands import Device, run
from famfs_server.cli import drawing
from famfs_server.cli.regions import KINDS, Kind, Map, Region
from golden import GoldenImages
from schemas import conform

MIB, GIB = 1 << 20, 1 << 30


def test_coverage_counts_bytes(rng: random.Random) -> None:
    size = 1 << 20
    edges = sorted(rng.sample(range(size), 40))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    kinds = [rng.choice(KINDS[:6]) for _ in spans]
    regions = tuple(Region(0, start, end, kind, "x") for (start, end), kind in zip(spans, kinds, strict=True))
    found = Map("t", (size,), regions).coverage(0, 64)
    owner: list[Kind] = [Kind.FREE] * size
    for (start, end), kind in zip(spans, kinds, strict=True):
        owner[start:end] = [kind] * (end - start)
    for cell in range(64):
        part = owner[cell * size // 64 : (cell + 1) * size // 64]
        assert found[cell].tolist() == pytest.approx([part.count(kind) for kind in KINDS])


def test_totals_are_those_of_fsck(vectors: GoldenImages, golden_name: str, tmp_path: Path) -> None:
    path = vectors.build(golden_name, tmp_path)
    outcome = run("famfs", "map", "--json", path)
    facts = vectors.facts(golden_name)
    if facts["superblock"]["expect_check_super_rc"] or facts["log_header"]["expect_validate_rc"]:
        assert outcome.status == 1
        return
    found = conform(outcome.out, "map")
    with Device(path).volume() as volume:
        problems = bool(volume.statistics().skipped) or volume.stop is not None
    report = conform(run("famfs", "fsck", "--json", path).out, "fsck")
    assert sum(found["totals"].values()) >= report["device_size"]
    if not problems:
        # The end of a file's last allocation unit is part of its region, as it is of its allocation.
        assert found["totals"]["free"] == report["free"] + report["device_size"] % report["alloc_unit"]
        assert found["totals"]["problem"] == 0


def test_small_and_bad_things_are_seen_on_large_devices() -> None:
    regions = (
        Region(0, 0, 2 * MIB, Kind.SUPERBLOCK, "superblock"),
        Region(0, 2 * MIB, 10 * MIB, Kind.LOG, "log"),
        Region(0, 600 * GIB, 900 * GIB, Kind.LARGE, "large"),
        Region(0, 700 * GIB, 700 * GIB + 2 * MIB, Kind.PROBLEM, "bad"),
    )
    shown = Map("t", (1 << 40,), regions).dominant(0, 100)
    assert shown[0] is Kind.LOG
    assert shown.count(Kind.PROBLEM) == 1
    assert shown.count(Kind.LARGE) == 28
    assert shown.count(Kind.FREE) == 70


def test_pictures(vectors: GoldenImages, tmp_path: Path) -> None:
    path = vectors.build("11-bad-entries", tmp_path)
    text = run("famfs", "map", path).out
    assert "!" in text
    assert "superblock" in text
    for name in ("map.svg", "map.png"):
        assert run("famfs", "map", path, "-o", tmp_path / name).status == 0
    root = ElementTree.parse(tmp_path / "map.svg").getroot()
    fills = {element.get("fill") for element in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert {Kind.LOG.colour, Kind.FREE.colour, Kind.PROBLEM.colour} <= fills
    width, height = int(root.get("width", "0")), int(root.get("height", "0"))
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(element.get("x", "0")) + float(element.get("width", "0")) <= width
        assert float(element.get("y", "0")) + float(element.get("height", "0")) <= height
    data = (tmp_path / "map.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (2 * width, 2 * height)


def test_names_from_the_media_are_plain_text_in_pictures() -> None:
    name = "a<b>&\x1b[2J\u202e"
    picture = drawing.svg(Map("<t>", (4 * GIB,), (Region(0, 0, GIB, Kind.LARGE, name),)))
    root = ElementTree.fromstring(picture)
    (title,) = root.iter("{http://www.w3.org/2000/svg}title")
    assert title.text is not None
    assert title.text.startswith("a<b>&\\x1b[2J\\x202e: ")


def test_one_file(device: Device) -> None:
    run("famfs", "creat", "--daxdev", device.path, "-s", "5000", "plain")
    run("famfs", "creat", "--daxdev", device.path, "-s", "21m", "-B", "4", "-N", "3", "-C", "2m", "striped")
    out = run("famfs", "map", "--daxdev", device.path, "striped").out
    assert "striped: 21.00M in 11 chunks of 2.00M over 3 strips" in out
    assert "other files, or free" in out
    assert "chunks 1 4 7 10" in out
    assert "bytes 0x0 to 0x1388: device 0 at 0xa00000" in run("famfs", "map", "--daxdev", device.path, "plain").out
    found = conform(run("famfs", "map", "--json", "--daxdev", device.path, "striped").out, "map")
    assert {row["name"] for row in found["regions"]} == {"superblock", "log", "strip 0", "strip 1", "strip 2"}


def test_bad_calls(device: Device, tmp_path: Path) -> None:
    for arguments, status in (
        ((device.path, "-o", "picture.gif"), 2),
        ((tmp_path / "nope",), 1),
        ((tmp_path,), 1),
        (("--daxdev", device.path, "nope"), 1),
    ):
        outcome = run("famfs", "map", *arguments)
        assert outcome.status == status
        assert outcome.error


def test_a_picture_needs_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cairosvg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(drawing.PictureError, match="write an SVG file"):
        drawing.png("<svg/>")
