# SPDX-License-Identifier: Apache-2.0
"""What mkfs decides and writes: the decisions of format 4.2 as a table, and the reference's own bytes."""

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax.device import DaxDevice
from famfs_server.dax.memory import Memory
from famfs_server.errors import DeviceError, ExistsError, FamfsError, RoleError, UsageError
from famfs_server.omf import layout, superblock
from famfs_server.omf.superblock import SuperblockState
from famfs_server.volume import format
from famfs_server.volume.volume import Volume
from golden import SYSTEM_UUID, GoldenImages

OWNER = UUID(SYSTEM_UUID)
OTHER = UUID(int=7)
GIB = 1 << 30


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    yield from mapped(tmp_path / "image", 4 * GIB)


def mapped(path: Path, size: int) -> Iterator[Memory]:
    with path.open("ab") as image:
        image.truncate(size)
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        yield memory
        memory.close()


def test_bytes_are_those_of_the_reference(vectors: GoldenImages, memory: Memory) -> None:
    facts = vectors.facts("01-empty")["superblock"]
    format.make_filesystem(
        memory,
        facts["ts_daxdev"]["dd_daxdev"],
        UUID(facts["ts_system_uuid"]),
        log_length=facts["ts_log_len"],
        uuid=UUID(facts["ts_uuid"]),
        device_uuid=UUID(facts["ts_dev_uuid"]),
    )
    for piece, offset, length in (("sb", 0, layout.SUPERBLOCK_REGION), ("log", layout.LOG_OFFSET, 8 << 20)):
        expected = vectors.piece("01-empty", piece)  # type: ignore[arg-type]
        assert memory.read(offset, length) == expected.ljust(length, b"\0")


def test_what_mkfs_leaves_alone(memory: Memory) -> None:
    data_at = layout.LOG_OFFSET + (8 << 20)
    memory.write(0, b"\xaa" * layout.SUPERBLOCK_REGION)
    memory.write(layout.LOG_OFFSET, b"\xbb" * (8 << 20))
    memory.write(data_at, b"\xcc" * 4096)
    format.make_filesystem(memory, "/dev/dax0.0", OWNER, log_length=8 << 20)
    for start, end in ((104, 112), (120, 136), (200, layout.SUPERBLOCK_REGION)):
        assert memory.read(start, end - start) == b"\xaa" * (end - start)
    assert memory.read(data_at, 4096) == b"\xcc" * 4096
    assert memory.read(layout.LOG_OFFSET + 48, (8 << 20) - 48) == bytes((8 << 20) - 48)
    volume = Volume(memory, OWNER, "device")
    assert volume.namespace.replayed == 0
    volume.close()


@pytest.mark.parametrize("path", ["/dev/" + "d" * 100, "/dev/gr\xfc\xdf", "\udcff"])
def test_a_device_path_is_cut_to_its_field(memory: Memory, path: str) -> None:
    format.make_filesystem(memory, path, OWNER, log_length=8 << 20)
    stored = path.encode("utf-8", "surrogateescape")[:64].ljust(64, b"\0")
    assert memory.read(136, 64) == stored


def test_random_uuids_differ_from_run_to_run(memory: Memory) -> None:
    made = [format.make_filesystem(memory, "d", OWNER, log_length=8 << 20) for _ in range(2)]
    assert len({found.uuid for found in made} | {found.device_uuid for found in made}) == 4


@pytest.mark.parametrize("length", [0, 1, -1, 1 << 20, 11 << 20, (8 << 20) - 1, (8 << 20) + 1, 3 << 30])
def test_log_lengths_that_are_refused(memory: Memory, length: int) -> None:
    with pytest.raises(UsageError, match="invalid log length"):
        format.check_log_length(length)
    with pytest.raises(UsageError):
        format.make_filesystem(memory, "d", OWNER, log_length=length)
    assert memory.read(0, 200) == bytes(200)


def test_a_log_as_large_as_the_device_is_refused(memory: Memory) -> None:
    with pytest.raises(UsageError, match="no room"):
        format.make_filesystem(memory, "d", OWNER, log_length=4 * GIB)
    assert memory.read(0, 200) == bytes(200)


@pytest.mark.parametrize("length", [8 << 20, 256 << 20])
def test_log_lengths_that_work(memory: Memory, length: int) -> None:
    format.check_log_length(length)
    found = format.make_filesystem(memory, "d", OWNER, log_length=length)
    assert found.log_length == length


@pytest.mark.parametrize(
    ("name", "host", "refusal"),
    [
        (None, OWNER, None),
        ("06c-killed-sb", OWNER, None),
        ("01-empty", OWNER, ExistsError),
        ("02-tree", OWNER, ExistsError),
        ("02-tree", OTHER, RoleError),
        ("02-tree", None, RoleError),
        ("06d-foreign-owner", OWNER, RoleError),
        # Stricter than the reference, on purpose.
        ("06-bad-sb-crc", OWNER, ExistsError),
        ("06-bad-sb-crc", OTHER, ExistsError),
        ("06b-bad-log-header-crc", OWNER, ExistsError),
    ],
)
def test_overwriting(
    vectors: GoldenImages, tmp_path: Path, name: str | None, host: UUID | None, refusal: type[FamfsError] | None
) -> None:
    path = vectors.build(name, tmp_path) if name else tmp_path / "blank"
    for memory in mapped(path, 4 * GIB):
        before = memory.read(0, 16 << 20)
        if refusal:
            with pytest.raises(refusal):
                format.check_overwrite(memory, "/dev/dax0.0", host, force=False)
        else:
            format.check_overwrite(memory, "/dev/dax0.0", host, force=False)
        format.check_overwrite(memory, "/dev/dax0.0", host, force=True)
        assert memory.read(0, 16 << 20) == before


def test_another_version_needs_force(vectors: GoldenImages, tmp_path: Path) -> None:
    for memory in mapped(vectors.build("01-empty", tmp_path), 4 * GIB):
        memory.store_u64(8, 49)
        with pytest.raises(ExistsError, match="version 49"):
            format.check_overwrite(memory, "d", OWNER, force=False)
        format.check_overwrite(memory, "d", OWNER, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_small_device_is_refused_also_with_force(tmp_path: Path, force: bool) -> None:
    for memory in mapped(tmp_path / "small", 4 * GIB - (2 << 20)):
        with pytest.raises(DeviceError, match="<4GiB"):
            format.check_overwrite(memory, "d", OWNER, force=force)


def test_an_owner_comes_before_the_size(vectors: GoldenImages, tmp_path: Path) -> None:
    path = vectors.build("06d-foreign-owner", tmp_path)
    with path.open("r+b") as image:
        image.truncate(2 * GIB)
    for memory in mapped(path, 2 * GIB):
        with pytest.raises(RoleError):
            format.check_overwrite(memory, "d", OWNER, force=False)


def test_kill_changes_the_magic_number_alone(vectors: GoldenImages, tmp_path: Path) -> None:
    for memory in mapped(vectors.build("02-tree", tmp_path), 4 * GIB):
        before = memory.read(0, 16 << 20)
        format.kill(memory)
        assert memory.read(0, 16 << 20) == bytes(8) + before[8:]
        assert superblock.inspect(memory.read(0, 200)).state is SuperblockState.ABSENT
        expected = vectors.piece("06c-killed-sb", "sb")
        assert memory.read(0, len(expected)) == expected
