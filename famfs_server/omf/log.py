# SPDX-License-Identifier: Apache-2.0
"""The metadata log: its header and its entries, decoded, checked and built (docs/format.md 1.3, 1.4, 5)."""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple
from uuid import UUID

import numpy as np

from famfs_server.errors import MediaError, NameTooLongError, PathError
from famfs_server.omf import layout
from famfs_server.omf.layout import EntryType, ExtentType

# The hot structures once more, for one record at a time, where numpy's fixed cost is most of the work. What readers
# decode by columns (layout.LOG_ENTRY) is what these build: the golden images hold both to the same bytes.
_HEADER = Struct("<6Q")
_FILE = Struct(f"<QI4xQIIII{layout.PATH_FIELD}sI4xI4x")
_STRIPES = Struct("<QQ")
_EXTENT = Struct("<QQQ")
_CRC = Struct("<Q")
_CRC_AT = layout.LOG_ENTRY_CRC_SPAN
_IS_FILE, _FLAGS = int(EntryType.FILE), layout.FILE_FLAG_ALL_HOSTS_RW
_SIMPLE, _INTERLEAVED = int(ExtentType.SIMPLE), int(ExtentType.INTERLEAVED)


class LogHeader(NamedTuple):
    """The decoded log header. The two counters are not covered by the checksum."""

    length: int
    last_index: int
    next_seqnum: int
    next_index: int
    crc: int

    @property
    def full(self) -> bool:
        """Whether there is no room for another entry (format 5.2)."""
        return self.next_index > self.last_index


class Extent(NamedTuple):
    """A run of bytes on one device (format 1.4.1)."""

    device: int
    offset: int
    length: int


class Fmap(NamedTuple):
    """Where a file's bytes are. `chunk_size` 0 means simple extents one behind the other; otherwise the extents are
    strips that take turns in chunks of that many bytes (format 6.4)."""

    extents: tuple[Extent, ...]
    chunk_size: int = 0


def decode_header(data: bytes, log_length: int) -> LogHeader:
    """The log header in the 48 bytes of `data`, checked against a log of `log_length` bytes.

    Raises MediaError when the header is invalid, when its counters leave the log, or when its last index is the one
    that another entry size would have (format 5.3, 10.9; a smaller one than the natural one is accepted).
    """
    magic, length, last_index, crc, next_seqnum, next_index = _HEADER.unpack(data[: layout.LOG_HEADER_SIZE])
    if magic != layout.LOG_MAGIC:
        raise MediaError("the log header has no famfs magic number; the file system must be made anew")
    if layout.crc(data[: layout.LOG_HEADER_CRC_SPAN]) != crc:
        raise MediaError("the log header's checksum is wrong; the file system must be made anew")
    if length != log_length:
        raise MediaError(f"the log header says {length} bytes of log, the superblock {log_length}")
    check_last_index(length, last_index)
    if next_index > last_index + 1:
        raise MediaError(f"the log claims {next_index} entries but has room for {last_index + 1}")
    return LogHeader(length, last_index, next_seqnum, next_index, crc)


def check_last_index(log_length: int, last_index: int) -> None:
    """Raise MediaError when `last_index` cannot be right for entries of 544 bytes (format 10.9)."""
    natural = layout.natural_last_index(log_length)
    if last_index == natural:
        return
    for size in layout.FOREIGN_ENTRY_SIZES:
        if last_index == layout.natural_last_index(log_length, size):
            raise MediaError(f"the log has entries of {size} bytes, an older format that cannot be read")
    if last_index > natural:
        raise MediaError(f"the log's last index {last_index} lies beyond its end ({natural})")


def build_header(log_length: int, last_index: int | None = None) -> bytes:
    """The 48 bytes of an empty log's header."""
    record = np.zeros(1, layout.LOG_HEADER)
    row = record[0]
    row["famfs_log_magic"] = layout.LOG_MAGIC
    row["famfs_log_len"] = log_length
    row["famfs_log_last_index"] = layout.natural_last_index(log_length) if last_index is None else last_index
    row["famfs_log_crc"] = layout.crc(record.tobytes()[: layout.LOG_HEADER_CRC_SPAN])
    return record.tobytes()


def entry_is_valid(data: bytes, index: int) -> bool:
    """Whether the 544 bytes of `data` are the entry that belongs at `index` (format 5.3)."""
    stored = int.from_bytes(data[layout.LOG_ENTRY_CRC_SPAN : layout.LOG_ENTRY_SIZE], "little")
    return int.from_bytes(data[:8], "little") == index and layout.crc(data[: layout.LOG_ENTRY_CRC_SPAN]) == stored


def encode_path(path: str | bytes) -> bytes:
    """A normalised relative path as stored. Raises NameTooLongError beyond 79 bytes, never truncates."""
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    if not raw or b"\0" in raw:
        raise PathError("a path must not be empty or contain a NUL byte")
    if len(raw) > layout.MAX_PATH:
        raise NameTooLongError(
            f"the path has {len(raw)} bytes; famfs stores at most {layout.MAX_PATH} below the mount point"
        )
    return raw


class FileRecord(NamedTuple):
    """What a FILE entry says. `size` in bytes, of `mode` the permission bits, `path` normalised and encoded."""

    path: bytes
    size: int
    mode: int
    uid: int
    gid: int
    fmap: Fmap


def build_files(first_index: int, files: Sequence[FileRecord]) -> bytes:
    """FILE entries for `files`, 544 bytes each, numbered from `first_index`."""
    parts: list[bytes] = []
    for index, (path, size, mode, uid, gid, (extents, chunk_size)) in enumerate(files, first_index):
        kind, count, stripes = _SIMPLE, len(extents), b""
        if chunk_size:
            kind, count, stripes = _INTERLEAVED, 1, _STRIPES.pack(count, chunk_size)
        head = _FILE.pack(index, _IS_FILE, size, _FLAGS, uid, gid, mode & 0o7777, path, kind, count)
        entry = b"".join([head, stripes, *[_EXTENT.pack(*extent) for extent in extents]]).ljust(_CRC_AT, b"\0")
        parts += entry, _CRC.pack(layout.crc(entry))
    return b"".join(parts)


def build_file(index: int, path: str | bytes, *, size: int, mode: int, uid: int, gid: int, fmap: Fmap) -> bytes:
    """The 544 bytes of one FILE entry."""
    return build_files(index, [FileRecord(encode_path(path), size, mode, uid, gid, fmap)])


def build_mkdir(index: int, path: str | bytes, *, mode: int, uid: int, gid: int) -> bytes:
    """The 544 bytes of a MKDIR entry."""
    record = _blank(index, EntryType.MKDIR)
    meta = record[0]["mkdir"]
    meta["md_uid"], meta["md_gid"], meta["md_mode"] = uid, gid, mode & 0o7777
    meta["md_relpath"] = np.void(encode_path(path).ljust(layout.PATH_FIELD, b"\0"))
    return _sealed(record)


def build_add_daxdev(index: int, *, device: int, size: int, uuid: UUID) -> bytes:
    """The 544 bytes of an ADD_DAXDEV entry for device number `device`."""
    record = _blank(index, EntryType.ADD_DAXDEV)
    meta = record[0]["add_daxdev"]
    meta["dd_size"], meta["dd_index"] = size, device
    meta["dd_uuid"] = np.void(uuid.bytes)
    return _sealed(record)


def _blank(index: int, kind: EntryType) -> np.ndarray:
    record = np.zeros(1, layout.LOG_ENTRY)
    record[0]["seqnum"] = index
    record[0]["type"] = kind
    return record


def _sealed(records: np.ndarray) -> bytes:
    view = memoryview(records.tobytes())
    starts = range(0, len(view), layout.LOG_ENTRY_SIZE)
    records["crc"] = [layout.crc(view[start : start + layout.LOG_ENTRY_CRC_SPAN]) for start in starts]
    return records.tobytes()


def decode_fmap(stored: np.void) -> Fmap:
    """The extents of one FILE entry's fmap. Counts beyond the arrays are cut; `volume.replay` refuses them before."""
    if int(stored["fmap_ext_type"]) == ExtentType.INTERLEAVED:
        striped = stored["ie"][0]
        count = min(int(striped["ie_nstrips"]), layout.MAX_STRIPS)
        return Fmap(_extents(striped["ie_strips"][:count].tolist()), int(striped["ie_chunk_size"]))
    count = min(int(stored["fmap_nextents"]), layout.MAX_SIMPLE_EXTENTS)
    return Fmap(_extents(stored["se"][:count].tolist()))


def _extents(triples: Sequence[tuple[int, int, int]]) -> tuple[Extent, ...]:
    return tuple(Extent(*triple) for triple in triples)
