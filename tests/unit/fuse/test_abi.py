# SPDX-License-Identifier: Apache-2.0
"""The wire structures against recorded bytes and against the offsets of protocol 6.2, 1.3 and 4."""

import struct
from pathlib import Path

import pytest

from famfs_server.fuse import abi

DATA = Path(__file__).parents[2] / "data"


def offset_of(structure: struct.Struct, field: int) -> int:
    """Byte offset of a numeric field, found by packing a pattern into it alone."""
    count = len(structure.unpack(bytes(structure.size)))
    values: list[int | bytes] = [
        b"" if isinstance(value, bytes) else int(index == field)
        for index, value in enumerate(structure.unpack(bytes(structure.size)))
    ]
    assert field < count
    return structure.pack(*values).index(1)


def test_recorded_init_request() -> None:
    data = (DATA / "init-6.18.bin").read_bytes()
    assert len(data) == abi.IN_HEADER.size + abi.INIT_IN.size
    assert abi.IN_HEADER.unpack_from(data) == (104, abi.Opcode.INIT, 2, 0, 0, 0, 0, 0)
    assert abi.INIT_IN.unpack_from(data, 40) == (7, 45, 131072, 0x73FFFFFB, 0x5FD)


@pytest.mark.parametrize(
    ("structure", "offsets"),
    [
        (abi.IN_HEADER, [0, 4, 8, 16, 24, 28, 32, 36]),
        (abi.OUT_HEADER, [0, 4, 8]),
        (abi.INIT_OUT, [0, 4, 8, 12, 16, 18, 20, 24, 28, 30, 32, 36, 40]),
        (abi.ATTR, [0, 8, 16, 24, 32, 40, 48, 52, 56, 60, 64, 68, 72, 76, 80, 84]),
        (abi.ENTRY_OUT, [0, 8, 16, 24, 32, 36, 40]),
        (abi.ATTR_OUT, [0, 8, 16, 24]),
        (abi.GETATTR_IN, [0, 8]),
        (abi.SETATTR_IN, [0, 8, 16, 24, 32, 40, 48, 56, 60, 64, 68, 76, 80]),
        (abi.OPEN_OUT, [0, 8, 12]),
        (abi.RELEASE_IN, [0, 8, 12, 16]),
        (abi.FLUSH_IN, [0, 16]),
        (abi.READ_IN, [0, 8, 16, 20, 24, 32]),
        (abi.WRITE_IN, [0, 8, 16, 20, 24, 32]),
        (abi.DIRENT, [0, 8, 16, 20]),
        (abi.DIRENTPLUS, [0, 8, 16, 24, 32, 36, 40]),
        (abi.STATFS_OUT, [0, 8, 16, 24, 32, 40, 44, 48]),
        (abi.FALLOCATE_IN, [0, 8, 16, 24]),
        (abi.LSEEK_IN, [0, 8, 16]),
        (abi.LK_IN, [0, 8, 16, 24, 32, 36, 40]),
        (abi.IOCTL_IN, [0, 8, 12, 16, 24, 28]),
        (abi.STATX_OUT, [0, 8, 12, 32, 36, 40, 48, 52, 56, 60, 64, 72, 80, 88, 96, 104, 112, 120]),
        (abi.FMAP_HEADER, [0, 2, 4, 8, 12, 16]),
        (abi.FMAP_EXTENT, [0, 8, 16]),
        (abi.FMAP_INTERLEAVED, [0, 4, 8]),
        (abi.DAXDEV_OUT, [0]),
        (abi.BACKING_MAP, [0, 4, 8]),
    ],
)
def test_offsets(structure: struct.Struct, offsets: list[int]) -> None:
    assert [offset_of(structure, field) for field in range(len(offsets))] == offsets


def test_attributes_in_replies_lie_where_the_payload_has_them() -> None:
    attr = tuple(range(1, 17))
    payload = abi.ATTR.pack(*attr)
    assert abi.ENTRY_REPLY.pack(144, 0, 4, *range(6), *attr)[56:] == payload
    assert abi.ATTR_REPLY.pack(120, 0, 4, 1, 2, *attr)[32:] == payload
    assert abi.CREATE_REPLY.pack(160, 0, 4, *range(6), *attr, 7, 8, 9)[16:] == abi.CREATE_OUT.pack(
        *range(6), *attr, 7, 8, 9
    )
    assert abi.OPEN_REPLY.pack(32, 0, 4, 7, 8, 9)[16:] == abi.OPEN_OUT.pack(7, 8, 9)


def test_daxdev_name_is_at_24_and_ends_with_nul() -> None:
    reply = abi.DAXDEV_OUT.pack(3, b"/dev/dax0.0")
    assert reply[24:36] == b"/dev/dax0.0\0"
    assert len(reply) == 280


def test_opcodes_are_complete() -> None:
    assert {int(opcode) for opcode in abi.Opcode} == set(range(1, 54)) - {7, 19}


def test_init_flags_name_every_bit_but_a_reserved_one() -> None:
    assert {flag.value for flag in abi.InitFlag} == {1 << bit for bit in range(45)}
    assert abi.InitFlag["IO_URING_BUFPOOL"] is abi.InitFlag["DAX_FMAP"]


@pytest.mark.parametrize(("namelen", "plain", "plus"), [(1, 32, 160), (8, 32, 160), (9, 40, 168), (255, 280, 408)])
def test_directory_records_are_padded_to_8_bytes(namelen: int, plain: int, plus: int) -> None:
    assert abi.dirent_size(namelen) == plain
    assert abi.direntplus_size(namelen) == plus


def test_error_reply() -> None:
    assert abi.error_reply(6, 2) == struct.pack("<IiQ", 16, -2, 6)


@pytest.mark.parametrize("number", [-1, 512])
def test_errors_that_would_hang_the_caller_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        abi.error_reply(6, number)


def test_notifications_have_unique_0_and_true_lengths() -> None:
    messages = {
        abi.Notify.INVAL_INODE: abi.inval_inode(5, -1, 0),
        abi.Notify.INVAL_ENTRY: abi.inval_entry(1, b"name"),
        abi.Notify.RESEND: abi.resend(),
    }
    for code, message in messages.items():
        assert abi.OUT_HEADER.unpack_from(message) == (len(message), code, 0)
    assert messages[abi.Notify.INVAL_ENTRY][16:] == struct.pack("<QII", 1, 4, 0) + b"name\0"
    assert messages[abi.Notify.INVAL_INODE][16:] == struct.pack("<Qqq", 5, -1, 0)
