# SPDX-License-Identifier: Apache-2.0
"""Every structure on the media, as numpy structured types with asserted offsets (docs/format.md 1).

All integers are little-endian. Entries are built in zeroed memory because their checksum covers the padding.
"""

import zlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np

SUPERBLOCK_OFFSET = 0
SUPERBLOCK_REGION = 0x200000
"""Bytes at the start of the device that belong to the superblock; only the first 200 mean anything."""
LOG_OFFSET = 0x200000
MIN_LOG_LENGTH = 0x800000

SUPERBLOCK_MAGIC = 0x87B282FF
LOG_MAGIC = 0x0BADCAFEF00D
VERSION = 48
OMF_VERSION = (2, 2)
READABLE_VERSIONS = {48: (2, 2), 47: (2, 1)}
"""Superblock version to the OMF version it must come with; both have the same layout (format 11)."""

ALLOC_UNIT = 0x200000
"""Bytes; what this server writes. 4096 is accepted on reading (format 3)."""
READABLE_ALLOC_UNITS = (4096, ALLOC_UNIT)
MIN_DEVICE_SIZE = 4 << 30
MIN_BUCKET_SIZE = 1 << 30
PATH_FIELD = 80
MAX_PATH = PATH_FIELD - 1
"""Bytes of a relative path, without its NUL (format 1.6)."""
DAXDEV_FIELD = 64
MAX_SIMPLE_EXTENTS = 16
MAX_INTERLEAVED_EXTENTS = 1
MAX_STRIPS = 16
MAX_BUCKETS = 64

DAXDEV = np.dtype([("dd_size", "<u8"), ("dd_uuid", "V16"), ("dd_daxdev", f"V{DAXDEV_FIELD}")])

SUPERBLOCK = np.dtype(
    [
        ("ts_magic", "<u8"),
        ("ts_version", "<u8"),
        ("ts_log_offset", "<u8"),
        ("ts_log_len", "<u8"),
        ("ts_alloc_unit", "<u8"),
        ("ts_omf_ver_major", "<u4"),
        ("ts_omf_ver_minor", "<u4"),
        ("ts_uuid", "V16"),
        ("ts_dev_uuid", "V16"),
        ("ts_system_uuid", "V16"),
        ("ts_crc", "<u8"),
        ("ts_sb_flags", "<u4"),
        ("padding", "<u4"),
        ("ts_daxdev", DAXDEV),
    ]
)
SUPERBLOCK_CRC_SPAN = 96
SUPERBLOCK_FLAGS_OFFSET = 104
FLAG_SECONDARY = 2
"""Bit of `ts_sb_flags`: a device that an ADD_DAXDEV entry of another device's log has added."""

LOG_HEADER = np.dtype(
    [
        ("famfs_log_magic", "<u8"),
        ("famfs_log_len", "<u8"),
        ("famfs_log_last_index", "<u8"),
        ("famfs_log_crc", "<u8"),
        ("famfs_log_next_seqnum", "<u8"),
        ("famfs_log_next_index", "<u8"),
    ]
)
LOG_HEADER_CRC_SPAN = 24
NEXT_SEQNUM_OFFSET = 32
NEXT_INDEX_OFFSET = 40

SIMPLE_EXTENT = np.dtype([("se_devindex", "<u8"), ("se_offset", "<u8"), ("se_len", "<u8")])

INTERLEAVED_EXTENT = np.dtype(
    [("ie_nstrips", "<u8"), ("ie_chunk_size", "<u8"), ("ie_strips", SIMPLE_EXTENT, (MAX_STRIPS,))]
)

FMAP = np.dtype(
    {
        "names": ["fmap_ext_type", "fmap_nextents", "se", "ie"],
        "formats": [
            "<u4",
            "<u4",
            (SIMPLE_EXTENT, (MAX_SIMPLE_EXTENTS,)),
            (INTERLEAVED_EXTENT, (MAX_INTERLEAVED_EXTENTS,)),
        ],
        "offsets": [0, 8, 16, 16],
        "itemsize": 416,
    }
)
"""Simple and interleaved extents share their bytes; `fmap_ext_type` tells which they are (format 1.4.1)."""

FILE_META = np.dtype(
    [
        ("fm_size", "<u8"),
        ("fm_flags", "<u4"),
        ("fm_uid", "<u4"),
        ("fm_gid", "<u4"),
        ("fm_mode", "<u4"),
        ("fm_relpath", f"V{PATH_FIELD}"),
        ("fm_fmap", FMAP),
    ]
)

MKDIR = np.dtype([("md_uid", "<u4"), ("md_gid", "<u4"), ("md_mode", "<u4"), ("md_relpath", f"V{PATH_FIELD}")])

ADD_DAXDEV = np.dtype(
    {
        "names": ["dd_size", "dd_uuid", "dd_index"],
        "formats": ["<u8", "V16", "<u4"],
        "offsets": [0, 8, 24],
        "itemsize": 32,
    }
)

LOG_ENTRY = np.dtype(
    {
        "names": ["seqnum", "type", "file", "mkdir", "add_daxdev", "crc"],
        "formats": ["<u8", "<u4", FILE_META, MKDIR, ADD_DAXDEV, "<u8"],
        "offsets": [0, 8, 16, 16, 16, 536],
        "itemsize": 544,
    }
)
LOG_HEADER_SIZE = 48
LOG_ENTRY_SIZE = 544
LOG_ENTRY_CRC_SPAN = 536

FOREIGN_ENTRY_SIZES = (352, 360, 368, 928)
"""Entry sizes that other formats used under the same version number 47 (format 10.9)."""

FILE_FLAG_ALL_HOSTS_RW = 2
"""`fm_flags` of every file that the reference writes; nobody reads it."""


class EntryType(IntEnum):
    """What a log entry says (format 1.4)."""

    FILE = 0
    MKDIR = 1
    DELETE = 2
    ADD_DAXDEV = 3


class ExtentType(IntEnum):
    """How a file's bytes lie on the devices (format 1.4.1)."""

    SIMPLE = 0
    INTERLEAVED = 1


def entry_offset(index: int) -> int:
    """The byte offset of log entry `index` from the start of the device."""
    return LOG_OFFSET + LOG_HEADER_SIZE + LOG_ENTRY_SIZE * index


def natural_last_index(log_length: int, entry_size: int = LOG_ENTRY_SIZE) -> int:
    """The last usable index of a log of `log_length` bytes (format 1.3)."""
    return (log_length - LOG_HEADER_SIZE) // entry_size - 1


def crc(data: bytes | memoryview) -> int:
    """The checksum of the format: zlib's CRC-32, stored zero-extended in 64 bits (format 2)."""
    return zlib.crc32(data)


def _check_layout() -> None:
    sizes = {
        200: SUPERBLOCK,
        88: DAXDEV,
        48: LOG_HEADER,
        544: LOG_ENTRY,
        520: FILE_META,
        92: MKDIR,
        32: ADD_DAXDEV,
        416: FMAP,
        24: SIMPLE_EXTENT,
        400: INTERLEAVED_EXTENT,
    }
    for size, dtype in sizes.items():
        if dtype.itemsize != size:
            raise AssertionError(f"{dtype} has {dtype.itemsize} bytes, the format says {size}")
    offsets = (
        (SUPERBLOCK, {"ts_log_len": 24, "ts_uuid": 48, "ts_system_uuid": 80, "ts_crc": 96, "ts_daxdev": 112}),
        (DAXDEV, {"dd_size": 0, "dd_uuid": 8, "dd_daxdev": 24}),
        (LOG_HEADER, {"famfs_log_crc": 24, "famfs_log_next_seqnum": 32, "famfs_log_next_index": 40}),
        (LOG_ENTRY, {"seqnum": 0, "type": 8, "file": 16, "mkdir": 16, "add_daxdev": 16, "crc": 536}),
        (FILE_META, {"fm_size": 0, "fm_flags": 8, "fm_uid": 12, "fm_gid": 16, "fm_mode": 20}),
        (FILE_META, {"fm_relpath": 24, "fm_fmap": 104}),
        (MKDIR, {"md_uid": 0, "md_gid": 4, "md_mode": 8, "md_relpath": 12}),
        (INTERLEAVED_EXTENT, {"ie_nstrips": 0, "ie_chunk_size": 8, "ie_strips": 16}),
    )
    for dtype, expected in offsets:
        fields: Mapping[str, Any] = dtype.fields or {}
        for name, offset in expected.items():
            if fields[name][1] != offset:
                raise AssertionError(f"{name} lies at {fields[name][1]}, the format says {offset}")


_check_layout()
