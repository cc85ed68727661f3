# SPDX-License-Identifier: Apache-2.0
"""Why a log entry with a right checksum is still not shown: one list for replay, fsck, status and documentation."""

from enum import IntEnum


class Fault(IntEnum):
    """The reason for which an entry is skipped (docs/design.md, "Which entries are visible"). NONE: it is shown."""

    NONE = 0
    UNKNOWN_TYPE = 1
    UNTERMINATED_PATH = 2
    EMPTY_PATH = 3
    ABSOLUTE_PATH = 4
    ESCAPING_PATH = 5
    RESERVED_PATH = 6
    MISSING_PARENT = 7
    PARENT_IS_FILE = 8
    DUPLICATE = 9
    ZERO_SIZE = 10
    UNKNOWN_EXTENT_TYPE = 11
    EXTENT_COUNT = 12
    CHUNK_SIZE = 13
    UNKNOWN_DEVICE = 14
    MISALIGNED = 15
    IN_METADATA = 16
    BEYOND_DEVICE = 17
    TOO_SHORT = 18
    OVERLAP = 19
    DEVICE_INDEX = 20
    DEVICE_DUPLICATE = 21

    @property
    def meaning(self) -> str:
        """The reason in words."""
        return _MEANINGS[self]


_MEANINGS = {
    Fault.NONE: "shown",
    Fault.UNKNOWN_TYPE: "the entry's type is unknown",
    Fault.UNTERMINATED_PATH: "the path has no end or holds bytes behind its end",
    Fault.EMPTY_PATH: "the path is empty",
    Fault.ABSOLUTE_PATH: "the path is not relative",
    Fault.ESCAPING_PATH: "the path leads out of the file system",
    Fault.RESERVED_PATH: "the path lies in .meta, which no entry may name",
    Fault.MISSING_PARENT: "the parent directory does not exist",
    Fault.PARENT_IS_FILE: "the parent is a file",
    Fault.DUPLICATE: "an earlier entry has the same path",
    Fault.ZERO_SIZE: "the file has no size",
    Fault.UNKNOWN_EXTENT_TYPE: "the kind of extents is unknown",
    Fault.EXTENT_COUNT: "the number of extents or strips is out of range",
    Fault.CHUNK_SIZE: "the chunk size is not a power of two and a multiple of the allocation unit",
    Fault.UNKNOWN_DEVICE: "an extent lies on a device that the log has not named",
    Fault.MISALIGNED: "an extent is not aligned to the allocation unit",
    Fault.IN_METADATA: "an extent lies in the superblock or the log",
    Fault.BEYOND_DEVICE: "an extent reaches beyond its device",
    Fault.TOO_SHORT: "the extents are shorter than the file",
    Fault.OVERLAP: "an extent overlaps another extent",
    Fault.DEVICE_INDEX: "the device number is not the next one",
    Fault.DEVICE_DUPLICATE: "the device is in the table already",
}
