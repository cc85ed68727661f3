# SPDX-License-Identifier: Apache-2.0
"""The golden images, mounted: valid ones show exactly what they should, invalid ones are refused in one line."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golden import GoldenImages
from harness import CLIENT_UUID, MASTER_UUID, MIB, Site, client

INVALID = {
    "06-bad-sb-crc": "checksum",
    "06b-bad-log-header-crc": "checksum",
    "06c-killed-sb": "no famfs superblock",
}
VISIBLE_BAD_ENTRIES = {"okdir", "okfile", "dotdot_inside", "last_good"}
"""What 11-bad-entries shows; `okdir/../dotdot_inside` is a path inside, written in a roundabout way."""
APPENDS = {
    "05-bad-entry-crc": "EINVAL",
    "06d-foreign-owner": "EROFS",
    "07-torn-last": "EINVAL",
    "08-log-full-synthetic": "ENOSPC",
}
"""Images of which the host of all the others cannot make a directory, and why not. An entry that is not valid forbids
appends until fsck has dealt with it."""
PIECE = 4096


def nodes(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The directories and files that an image has to show, by path."""
    shown: dict[str, dict[str, Any]] = {}
    for entry in facts["entries"]:
        if entry["expect_validate_errors"]:
            break
        for kind, prefix in (("file", "fm"), ("mkdir", "md")):
            if kind in entry:
                fields = entry[kind]
                path = os.path.normpath(fields[f"{prefix}_relpath"])
                if facts["case"] == "11-bad-entries" and (path not in VISIBLE_BAD_ENTRIES or path in shown):
                    continue
                assert path not in shown
                shown[path] = {
                    "file": fields if kind == "file" else None,
                    "mode": (stat.S_IFREG if kind == "file" else stat.S_IFDIR) | int(fields[f"{prefix}_mode"], 8),
                    "uid": fields[f"{prefix}_uid"],
                    "gid": fields[f"{prefix}_gid"],
                    "size": fields["fm_size"] if kind == "file" else 0,
                }
    return shown


def device_offset(file: dict[str, Any], offset: int) -> int:
    """Where a byte of a file lies, reckoned from the decoded extents by the words of the format."""
    if file["fmap_ext_type"] == 1:
        (extent,) = file["interleaved"]
        chunk, inside = divmod(offset, extent["ie_chunk_size"])
        stripe, strip = divmod(chunk, extent["ie_nstrips"])
        return int(extent["ie_strips"][strip]["offset"] + stripe * extent["ie_chunk_size"] + inside)
    for extent in file["simple"]:
        if offset < extent["len"]:
            return int(extent["offset"] + offset)
        offset -= extent["len"]
    raise AssertionError("no extent holds that byte")


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Ranges of a file that meet every 2 MiB of it at both ends, and the file's end; small files whole."""
    if size <= 2 * MIB:
        yield 0, size
        return
    for start in range(0, size, 2 * MIB):
        yield start, min(PIECE, size - start)
        end = min(start + 2 * MIB, size)
        yield max(start, end - PIECE), end - max(start, end - PIECE)


def pattern(path: str, offset: int, length: int) -> bytes:
    """Bytes that no other place of any file has."""
    seed = hashlib.sha256(path.encode()).digest()
    first, last = offset // PIECE, -(-(offset + length) // PIECE)
    blocks = (hashlib.shake_128(seed + block.to_bytes(8, "little")).digest(PIECE) for block in range(first, last))
    return b"".join(blocks)[offset - first * PIECE :][:length]


def test_golden_image(golden_name: str, vectors: GoldenImages, site: Site, tmp_path: Path) -> None:
    image = vectors.build(golden_name, tmp_path)
    if golden_name in INVALID:
        refuse(golden_name, image, site)
        return
    facts = vectors.facts(golden_name)
    expected = nodes(facts)
    with image.open("r+b") as memory:
        for path, node in expected.items():
            for offset, length in pieces(node["size"]) if node["file"] else ():
                memory.seek(device_offset(node["file"], offset))
                memory.write(pattern(path, offset, length))
    with (
        site.mounted(image) as mount,
        site.mounted(image, "fastpath=off", host=CLIENT_UUID) as other,
    ):
        code = """
found = {}
for folder, directories, files in os.walk(arguments[0]):
    for name in directories + files:
        path = os.path.join(folder, name)
        s = os.lstat(path)
        found[os.path.relpath(path, arguments[0])] = [s.st_mode, s.st_uid, s.st_gid, s.st_size]
result = found
"""
        for host in (mount, other):
            listed = {
                path: shape
                for path, shape in client(code, host.path).items()
                if path != ".meta" and not path.startswith(".meta/")
            }
            assert listed == {path: [n["mode"], n["uid"], n["gid"], n["size"]] for path, n in expected.items()}
            places = {path: list(pieces(node["size"])) for path, node in expected.items() if node["file"]}
            code_data = """
import hashlib
result = {}
for path, places in json.load(open(arguments[1])).items():
    fd = os.open(os.path.join(arguments[0], path), os.O_RDONLY)
    digest = hashlib.sha256()
    for offset, length in places:
        digest.update(os.pread(fd, length, offset))
    result[path] = digest.hexdigest()
    os.close(fd)
"""
            assert read_pieces(code_data, host.path, places) == {
                path: hashlib.sha256(b"".join(pattern(path, *place) for place in where)).hexdigest()
                for path, where in places.items()
            }
        append(golden_name, site, mount.path)


def read_pieces(code: str, place: Path, places: dict[str, list[tuple[int, int]]]) -> Any:
    """Run `code` of a client that gets `places` as a file."""
    listing = place.parent / "places.json"
    listing.write_text(json.dumps(places))
    return client(code, place, listing)


def append(name: str, site: Site, place: Path) -> None:
    """Make a directory, or be refused for the image's own reason and change nothing."""
    image = site.directory / f"{name}.img"

    def log() -> bytes:
        with image.open("rb") as memory:
            memory.seek(2 * MIB)
            return memory.read(8 * MIB)

    before = log()
    outcome = client("os.mkdir(arguments[0])\nresult = 'made'", place / "appended")
    assert outcome == APPENDS.get(name, "made")
    after = log()
    if name in APPENDS:
        assert after == before
    else:
        # Both counters agree afterwards, whatever they were.
        assert after[32:40] == after[40:48]
        assert int.from_bytes(after[40:48], "little") == int.from_bytes(before[40:48], "little") + 1


def refuse(name: str, image: Path, site: Site) -> None:
    """An invalid image is not mounted, by whatever host."""
    for host in (MASTER_UUID, CLIENT_UUID):
        done = site.host(host).mount(image, site.place("mnt"))
        assert done.returncode == 32
        (line,) = done.stderr.splitlines()
        assert INVALID[name] in line
        assert str(site.directory) not in Path("/proc/mounts").read_text()
