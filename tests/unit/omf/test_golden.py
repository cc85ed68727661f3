# SPDX-License-Identifier: Apache-2.0
"""The decoder agrees with every golden image field by field, and the encoder makes the same bytes again."""

from typing import Any
from uuid import UUID

import numpy as np
import pytest

from famfs_server.errors import MediaError
from famfs_server.omf import layout, log, superblock
from famfs_server.omf.log import Extent, Fmap
from famfs_server.omf.superblock import SuperblockState
from golden import GoldenImages

STATES = {0: {SuperblockState.VALID}, -1: {SuperblockState.ABSENT, SuperblockState.BAD_CRC}}


def text(field: Any) -> str:
    """A zero-padded name."""
    return str(field.tobytes().split(b"\0", 1)[0].decode())


def entries_of(data: bytes, count: int) -> Any:
    start = layout.LOG_HEADER_SIZE
    return np.frombuffer(data[start : start + count * layout.LOG_ENTRY_SIZE], layout.LOG_ENTRY)


def test_superblock_fields(golden_name: str, vectors: GoldenImages) -> None:
    expected = vectors.facts(golden_name)["superblock"]
    data = vectors.piece(golden_name, "sb")[: layout.SUPERBLOCK.itemsize]
    record = np.frombuffer(data, layout.SUPERBLOCK)[0]
    for name in ("magic", "version", "log_offset", "log_len", "alloc_unit", "omf_ver_major", "omf_ver_minor", "crc"):
        assert int(record[f"ts_{name}"]) == expected[f"ts_{name}"]
    assert int(record["ts_sb_flags"]) == expected["ts_sb_flags"]
    for name in ("uuid", "dev_uuid", "system_uuid"):
        assert str(UUID(bytes=record[f"ts_{name}"].tobytes())) == expected[f"ts_{name}"]
    daxdev = record["ts_daxdev"]
    assert int(daxdev["dd_size"]) == expected["ts_daxdev"]["dd_size"]
    assert str(UUID(bytes=daxdev["dd_uuid"].tobytes())) == expected["ts_daxdev"]["dd_uuid"]
    assert text(daxdev["dd_daxdev"]) == expected["ts_daxdev"]["dd_daxdev"]


def test_superblock_is_judged_as_by_the_reference(golden_name: str, vectors: GoldenImages) -> None:
    expected = vectors.facts(golden_name)["superblock"]
    found = superblock.inspect(vectors.piece(golden_name, "sb")[: layout.SUPERBLOCK.itemsize])
    assert found.state in STATES[expected["expect_check_super_rc"]]
    if found.state is SuperblockState.VALID:
        assert found.superblock is not None
        assert str(found.superblock.uuid) == expected["ts_uuid"]
        assert found.superblock.device_size == expected["ts_daxdev"]["dd_size"]


def test_superblock_is_built_byte_for_byte(golden_name: str, vectors: GoldenImages) -> None:
    data = vectors.piece(golden_name, "sb")
    found = superblock.inspect(data[: layout.SUPERBLOCK.itemsize])
    if found.state is not SuperblockState.VALID or found.superblock is None:
        pytest.skip("damaged on purpose")
    built = bytearray(len(data))
    for offset, piece in superblock.build(
        uuid=found.superblock.uuid,
        device_uuid=found.superblock.device_uuid,
        system_uuid=found.superblock.system_uuid,
        log_length=found.superblock.log_length,
        device_size=found.superblock.device_size,
        device_path=found.superblock.device_path,
    ):
        built[offset : offset + len(piece)] = piece
    assert bytes(built) == data


def test_log_header(golden_name: str, vectors: GoldenImages) -> None:
    facts = vectors.facts(golden_name)
    expected, data = facts["log_header"], vectors.piece(golden_name, "log")[: layout.LOG_HEADER_SIZE]
    record = np.frombuffer(data, layout.LOG_HEADER)[0]
    for name in layout.LOG_HEADER.names or ():
        assert int(record[name]) == expected[name]
    if expected["expect_validate_rc"]:
        with pytest.raises(MediaError):
            log.decode_header(data, facts["superblock"]["ts_log_len"])
        return
    header = log.decode_header(data, facts["superblock"]["ts_log_len"])
    assert header.full is bool(expected["expect_log_full"])
    built = bytearray(log.build_header(header.length, header.last_index))
    built[32:48] = header.next_seqnum.to_bytes(8, "little") + header.next_index.to_bytes(8, "little")
    assert bytes(built) == data


def test_entry_fields(golden_name: str, vectors: GoldenImages) -> None:
    facts = vectors.facts(golden_name)
    data = vectors.piece(golden_name, "log")
    records = entries_of(data, len(facts["entries"]))
    assert len(records) == len(facts["entries"])
    for index, (record, expected) in enumerate(zip(records, facts["entries"], strict=True)):
        raw = record.tobytes()
        assert (int(record["seqnum"]), int(record["type"])) == (expected["seqnum"], expected["type"])
        assert int(record["crc"]) == expected["crc"]
        assert log.entry_is_valid(raw, index) is (expected["expect_validate_errors"] == 0)
        if "file" in expected:
            fields, meta = expected["file"], record["file"]
            for name in ("size", "flags", "uid", "gid"):
                assert int(meta[f"fm_{name}"]) == fields[f"fm_{name}"]
            assert int(meta["fm_mode"]) == int(fields["fm_mode"], 8)
            assert text(meta["fm_relpath"]) == fields["fm_relpath"]
            assert int(meta["fm_fmap"]["fmap_ext_type"]) == fields["fmap_ext_type"]
            assert int(meta["fm_fmap"]["fmap_nextents"]) == fields["fmap_nextents"]
            assert log.decode_fmap(meta["fm_fmap"]) == fmap_of(fields)
        elif "mkdir" in expected:
            fields, meta = expected["mkdir"], record["mkdir"]
            assert (int(meta["md_uid"]), int(meta["md_gid"])) == (fields["md_uid"], fields["md_gid"])
            assert int(meta["md_mode"]) == int(fields["md_mode"], 8)
            assert text(meta["md_relpath"]) == fields["md_relpath"]
        elif "add_daxdev" in expected:
            fields, meta = expected["add_daxdev"], record["add_daxdev"]
            assert (int(meta["dd_size"]), int(meta["dd_index"])) == (fields["dd_size"], fields["dd_index"])
            assert str(UUID(bytes=meta["dd_uuid"].tobytes())) == fields["dd_uuid"]


def fmap_of(fields: dict[str, Any]) -> Fmap:
    """The extents that a JSON file says."""
    chunk, rows = 0, fields.get("simple", ())
    if fields["fmap_ext_type"] == 1:
        (striped,) = fields["interleaved"]
        chunk, rows = striped["ie_chunk_size"], striped["ie_strips"]
    return Fmap(tuple(Extent(row["devindex"], row["offset"], row["len"]) for row in rows), chunk)


def test_entries_are_built_byte_for_byte(golden_name: str, vectors: GoldenImages) -> None:
    facts = vectors.facts(golden_name)
    records = entries_of(vectors.piece(golden_name, "log"), len(facts["entries"]))
    built = 0
    for index, (record, expected) in enumerate(zip(records, facts["entries"], strict=True)):
        if expected["expect_validate_errors"]:
            continue
        if "file" in expected and expected["file"]["fm_relpath"]:
            fields = expected["file"]
            made = log.build_file(
                index,
                fields["fm_relpath"],
                size=fields["fm_size"],
                mode=int(fields["fm_mode"], 8),
                uid=fields["fm_uid"],
                gid=fields["fm_gid"],
                fmap=fmap_of(fields),
            )
        elif "mkdir" in expected:
            fields = expected["mkdir"]
            mode = int(fields["md_mode"], 8)
            made = log.build_mkdir(index, fields["md_relpath"], mode=mode, uid=fields["md_uid"], gid=fields["md_gid"])
        elif "add_daxdev" in expected:
            fields = expected["add_daxdev"]
            uuid = UUID(fields["dd_uuid"])
            made = log.build_add_daxdev(index, device=fields["dd_index"], size=fields["dd_size"], uuid=uuid)
        else:
            continue
        assert made == record.tobytes()
        built += 1
    assert built or not facts["entries"]
