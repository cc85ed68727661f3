# SPDX-License-Identifier: Apache-2.0
"""The file that says how new files are striped: what it may hold, and that a bad one is not ignored."""

import os
from pathlib import Path

import pytest

from famfs_server.errors import UsageError
from famfs_server.volume.alloc_config import AllocConfig, parse
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, ScratchMemory, formatted

MIB = 1 << 20
GIB = 1 << 30
GOOD = "interleaved_alloc:\n  nbuckets: 8\n  nstrips: 4\n  chunk_size: 2M\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, Interleave(8, 4, 2 * MIB)),
        ("interleaved_alloc: {nbuckets: 16, nstrips: 16, chunk_size: 67108864}", Interleave(16, 16, 64 * MIB)),
        ("interleaved_alloc: {nbuckets: 8, nstrips: 4, chunk_size: 4096k}", Interleave(8, 4, 4 * MIB)),
        ("interleaved_alloc: {nbuckets: 8, nstrips: 4}", Interleave(8, 4, 2 * MIB)),
        ("interleaved_alloc: {nbuckets: 0, nstrips: 0, chunk_size: 0}", None),
        ("interleaved_alloc: {}", None),
    ],
)
def test_good(text: str, expected: Interleave | None) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "one mapping"),
        ("a: [", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("interleaved_alloc:", "one mapping"),
        ("[interleaved_alloc]", "one mapping"),
        (GOOD + "more: 1\n", "one mapping"),
        ("interleaved_alloc: {buckets: 8}", "unknown key buckets"),
        ("interleaved_alloc: {7: 8}", "unknown key 7"),
        ("interleaved_alloc: {nbuckets: 8k}", "nbuckets must be a whole number, not '8k'"),
        ("interleaved_alloc: {nbuckets: true}", "nbuckets must be"),
        ("interleaved_alloc: {nstrips: -1}", "nstrips must be"),
        ("interleaved_alloc: {nbuckets: 8, nstrips: 4, chunk_size: 2MB}", "chunk_size must be a whole number such as"),
        ("interleaved_alloc: {nbuckets: 8, nstrips: 4, chunk_size: 1.5}", "chunk_size must be"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_bad(text: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        parse(text)


@pytest.mark.parametrize(
    ("buckets", "strips", "chunk", "error"),
    [
        (8, 4, "3M", "power of two"),
        (8, 4, "1M", "multiple"),
        (8, 9, "2M", "9 strips need as many buckets"),
        (0, 4, "2M", "number of buckets"),
        (8, 0, "2M", "number of strips"),
        (64, 4, "2M", "smaller than 1 GiB"),
        (65, 4, "2M", "number of buckets"),
        (16, 17, "2M", "number of strips"),
        (0, 0, "2M", "number of buckets"),
    ],
)
def test_values_are_held_against_the_device(buckets: int, strips: int, chunk: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "alloc.cfg"
    path.write_text(f"interleaved_alloc: {{nbuckets: {buckets}, nstrips: {strips}, chunk_size: {chunk}}}")
    with pytest.raises(UsageError, match=f"{path}: .*{error}"):
        AllocConfig(path, 16 * GIB, 2 * MIB)()


def test_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "alloc.cfg"
    config = AllocConfig(path, 16 * GIB, 2 * MIB)
    assert config() is None
    path.write_text(GOOD)
    assert config() == Interleave(8, 4)
    path.write_text("nonsense")
    for _ in range(2):
        with pytest.raises(UsageError, match="one mapping"):
            config()
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not a text"):
        config()
    path.write_text("#" * (1 << 17))
    with pytest.raises(UsageError, match="more than"):
        config()
    path.unlink()
    assert config() is None
    os.mkdir(path)
    with pytest.raises(UsageError, match="cannot be read"):
        config()


def test_files_without_a_striping_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "alloc.cfg"
    path.write_text("interleaved_alloc: {nbuckets: 4, nstrips: 2}")
    memory = ScratchMemory()
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    volume.default_interleave = AllocConfig(path, volume.superblock.device_size, volume.superblock.alloc_unit)

    def strips(name: bytes, interleave: Interleave | None = None) -> int:
        nodeid = volume.create(NewFile(name, 8 * MIB, 0o644, 0, 0, interleave))
        return len(volume.namespace.fmap(nodeid).extents)

    assert strips(b"default") == 2
    assert strips(b"other", Interleave(4, 3)) == 3
    path.write_text("interleaved_alloc: {nbuckets: 4, nstrips: 9}")
    before = volume.namespace.replayed
    with pytest.raises(UsageError, match="9 strips"):
        strips(b"bad")
    assert volume.namespace.replayed == before
    assert strips(b"explicit", Interleave(4, 4)) == 4
    path.unlink()
    assert strips(b"none") == 1
    volume.close()
    memory.close()
