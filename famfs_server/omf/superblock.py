# SPDX-License-Identifier: Apache-2.0
"""The superblock: reading, checking and building it (docs/format.md 1.1, 1.2, 3)."""

from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

import numpy as np

from famfs_server.errors import MediaError
from famfs_server.omf import layout


class SuperblockState(Enum):
    """What the first 200 bytes of a device are."""

    VALID = "valid"
    SECONDARY = "the superblock of a further device of a famfs file system"
    ABSENT = "no famfs superblock"
    OTHER_VERSION = "a famfs superblock of another version"
    BAD_CRC = "a famfs superblock with a wrong checksum"
    INVALID = "a famfs superblock with impossible contents"


@dataclass(frozen=True, slots=True)
class Superblock:
    """The decoded superblock. Sizes and offsets are in bytes."""

    version: int
    omf_version: tuple[int, int]
    log_offset: int
    log_length: int
    alloc_unit: int
    uuid: UUID
    device_uuid: UUID
    system_uuid: UUID
    device_size: int
    device_path: str
    device_uuid_slot: UUID
    flags: int
    crc: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The outcome of looking at a superblock: its state, its fields unless absent, and one line on what is wrong."""

    state: SuperblockState
    superblock: Superblock | None
    problem: str

    def require(self, device: str) -> Superblock:
        """The superblock, or MediaError with the cause and the way out."""
        if self.state is SuperblockState.VALID and self.superblock is not None:
            return self.superblock
        raise MediaError(f"{device}: {self.problem}")


def _uuid(field: Any) -> UUID:
    """A UUID as stored: 16 bytes in the order of its printed text (format 1.5)."""
    return UUID(bytes=field.tobytes())


def decode(data: bytes) -> Superblock:
    """The fields of the 200 bytes of `data`, whatever they say."""
    record = np.frombuffer(data, layout.SUPERBLOCK, count=1)[0]
    daxdev = record["ts_daxdev"]
    return Superblock(
        version=int(record["ts_version"]),
        omf_version=(int(record["ts_omf_ver_major"]), int(record["ts_omf_ver_minor"])),
        log_offset=int(record["ts_log_offset"]),
        log_length=int(record["ts_log_len"]),
        alloc_unit=int(record["ts_alloc_unit"]),
        uuid=_uuid(record["ts_uuid"]),
        device_uuid=_uuid(record["ts_dev_uuid"]),
        system_uuid=_uuid(record["ts_system_uuid"]),
        device_size=int(daxdev["dd_size"]),
        device_path=daxdev["dd_daxdev"].tobytes().split(b"\0", 1)[0].decode("utf-8", "replace"),
        device_uuid_slot=_uuid(daxdev["dd_uuid"]),
        flags=int(record["ts_sb_flags"]),
        crc=int(record["ts_crc"]),
    )


def inspect(data: bytes) -> Inspection:
    """Judge the 200 bytes of `data` in the order of format 3, and more strictly where that is silent.

    The reference checks neither the log's place and length nor the OMF version; a reader that trusts them
    leaves the device, so they are checked here. Bounds against the device's real size are the caller's.
    """
    if int.from_bytes(data[:8], "little") != layout.SUPERBLOCK_MAGIC:
        return Inspection(SuperblockState.ABSENT, None, "no famfs superblock found; format the device with mkfs.famfs")
    found = decode(data)
    readable = layout.READABLE_VERSIONS.get(found.version)
    if readable is None:
        return Inspection(
            SuperblockState.OTHER_VERSION,
            found,
            f"superblock version {found.version} is not one of {sorted(layout.READABLE_VERSIONS)}; "
            "use the tools that made it, or format it anew with mkfs.famfs -f",
        )
    if layout.crc(data[: layout.SUPERBLOCK_CRC_SPAN]) != found.crc:
        return Inspection(
            SuperblockState.BAD_CRC,
            found,
            "the superblock's checksum is wrong: the device is damaged or was being formatted; "
            "mkfs.famfs -f makes a new file system",
        )
    if found.log_length == found.log_offset == 0:
        return Inspection(
            SuperblockState.SECONDARY,
            found,
            f"this is a further device of the file system {found.uuid}; name the device that holds its log",
        )
    problem = _impossible(found, readable)
    if problem:
        return Inspection(SuperblockState.INVALID, found, problem)
    return Inspection(SuperblockState.VALID, found, "")


def _impossible(found: Superblock, omf_version: tuple[int, int]) -> str:
    """Why a superblock with a right checksum still cannot be used, or nothing."""
    if found.alloc_unit not in layout.READABLE_ALLOC_UNITS:
        return f"allocation unit {found.alloc_unit} is neither 4096 nor 2097152"
    if found.omf_version != omf_version:
        major, minor = found.omf_version
        return (
            f"version {found.version} with on-media format {major}.{minor} is unknown "
            f"(expected {omf_version[0]}.{omf_version[1]})"
        )
    if found.log_offset != layout.LOG_OFFSET:
        return f"the log is said to lie at {found.log_offset:#x} instead of {layout.LOG_OFFSET:#x}"
    if not is_log_length(found.log_length):
        return f"log length {found.log_length} is not a power of two of at least 8 MiB"
    if layout.LOG_OFFSET + found.log_length > found.device_size:
        return f"a log of {found.log_length} bytes does not fit a device of {found.device_size} bytes"
    return ""


def is_log_length(length: int) -> bool:
    """Whether `length` bytes is a length that a log may have (format 1.6)."""
    return length >= layout.MIN_LOG_LENGTH and length & (length - 1) == 0


def build(
    *,
    uuid: UUID,
    device_uuid: UUID,
    system_uuid: UUID,
    log_length: int,
    device_size: int,
    device_path: str,
) -> list[tuple[int, bytes]]:
    """The bytes of a new superblock as (offset, data) pieces, in no particular order.

    What format 4.3 says mkfs leaves alone (flags, padding, the device's uuid slot) is in no piece. `log_length` 0 makes
    the superblock of a further device, which has no log (format 7.5); its flags are written.
    """
    record = np.zeros(1, layout.SUPERBLOCK)
    row = record[0]
    row["ts_magic"] = layout.SUPERBLOCK_MAGIC
    row["ts_version"] = layout.VERSION
    row["ts_log_offset"] = layout.LOG_OFFSET if log_length else 0
    row["ts_log_len"] = log_length
    row["ts_alloc_unit"] = layout.ALLOC_UNIT
    row["ts_omf_ver_major"], row["ts_omf_ver_minor"] = layout.OMF_VERSION
    row["ts_uuid"] = np.void(uuid.bytes)
    row["ts_dev_uuid"] = np.void(device_uuid.bytes)
    row["ts_system_uuid"] = np.void(system_uuid.bytes)
    row["ts_crc"] = layout.crc(record.tobytes()[: layout.SUPERBLOCK_CRC_SPAN])
    row["ts_sb_flags"] = 0 if log_length else layout.FLAG_SECONDARY
    daxdev = row["ts_daxdev"]
    daxdev["dd_size"] = device_size
    path = device_path.encode("utf-8", "surrogateescape")[: layout.DAXDEV_FIELD]
    daxdev["dd_daxdev"] = np.void(path.ljust(layout.DAXDEV_FIELD, b"\0"))
    data = record.tobytes()
    head = layout.SUPERBLOCK_FLAGS_OFFSET + (0 if log_length else 8)
    return [(0, data[:head]), (112, data[112:120]), (136, data[136:200])]
