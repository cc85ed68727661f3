# SPDX-License-Identifier: Apache-2.0
"""From log entries to the namespace: reading, judging and applying them, a block of entries at a time.

What lies in the log comes from another host. Each block is copied once by a guarded copy, judged as columns by numpy,
and applied by one loop that does only what depends on the entries before: paths and names. Which entries are visible
comes out the same on every host, because nothing but the media decides it (docs/design.md).
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from stat import S_IFDIR, S_IFREG
from struct import Struct
from typing import Any, Protocol
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from famfs_server.errors import DeviceFaultError
from famfs_server.omf import layout
from famfs_server.omf.layout import EntryType, ExtentType
from famfs_server.volume import namespace as ns
from famfs_server.volume.faults import Fault
from famfs_server.volume.namespace import META_NAME, ROOT, Namespace
from famfs_server.volume.space import Space

BLOCK = (1 << 18) // layout.LOG_ENTRY_SIZE
"""Entries in a block of 256 KiB: larger ones are no faster, and what they need for a moment stays with the process."""

_NUL, _DOT, _SLASH = 0, ord("."), ord("/")
_NO_DEVICE = 0xFFFFFFFF
_UUID_SIZE = 16


class Readable(Protocol):
    """Memory that other hosts write to, and that can be copied from safely."""

    def read_fresh(self, offset: int, length: int) -> bytes: ...


class Damage(Enum):
    """Why a replay stopped before the end of the log."""

    TORN = "the last entry is incomplete"
    CORRUPT = "an entry in the middle of the log is invalid"
    UNREADABLE = "the log's memory cannot be read"
    REPLACED = "the file system was made anew, or its log was cut, while it was mounted"


@dataclass(frozen=True, slots=True)
class Stop:
    """The entry at which a replay stopped, and why. Entries from there on stay hidden (decisions 3)."""

    index: int
    damage: Damage


class Replay:
    """Applies log entries to a namespace and a space map, in log order.

    `bulk` leaves overlaps of extents to `settle`, which checks all of them at once; without it each file's extents are
    claimed before the file becomes visible.
    """

    def __init__(self, namespace: Namespace, space: Space, *, bulk: bool = False) -> None:
        self._namespace = namespace
        self._space = space
        self._bulk = bulk
        self._directories: dict[bytes, int] = {b"": ROOT}
        self.devices: list[UUID | None] = [None]
        self._known: set[UUID | None] = set()
        self._restore_devices()

    def _restore_devices(self) -> None:
        """Take the device table from a namespace that a predecessor has filled."""
        tree = self._namespace
        rows = slice(ns.FIRST_NODEID, tree.published)
        named = np.frombuffer(tree.name_length, np.uint8)[rows] == _UUID_SIZE
        hidden = (np.frombuffer(tree.mode, np.uint32)[rows] == 0) & (np.frombuffer(tree.fault, np.uint8)[rows] == 0)
        for index in np.flatnonzero(named & hidden).tolist():
            nodeid = ns.nodeid_of(index)
            self.devices.append(UUID(bytes=tree.name(nodeid)))
            self._known.add(self.devices[-1])
            self._space.add_device(tree.size[nodeid])

    def run(self, memory: Readable, end: int, log_end: int | None = None, block: int = BLOCK) -> Iterator[Stop | None]:
        """Apply the entries up to index `end`; yields after each block, with a Stop where the log ends early.

        `log_end` is the number of entries in the log, if that is more than is asked for.
        """
        last = (end if log_end is None else log_end) - 1
        index = self._namespace.replayed
        while index < end:
            count = min(block, end - index)
            try:
                data = memory.read_fresh(layout.entry_offset(index), count * layout.LOG_ENTRY_SIZE)
            except DeviceFaultError:
                yield Stop(index, Damage.UNREADABLE)
                return
            valid = valid_prefix(data, index, count)
            self._apply(data, index, valid)
            index += valid
            if valid < count:
                yield Stop(index, Damage.TORN if index == last else Damage.CORRUPT)
                return
            yield None

    def settle(self) -> bool:
        """End a bulk replay: claim the space of every visible file. False where extents overlap; then the caller
        replays once more from the start, entry by entry."""
        extents, owned = self._named()
        if not self._space.load(extents[owned]):
            return False
        for device, _, offset, length in extents[~owned].tolist():
            self._space.reserve(device, offset, length)
        self._bulk = False
        return True

    def let_go_of_reserved(self) -> None:
        """Have nothing owned but by files that the log has made visible so far, for good: no space is handed out or
        taken back any more."""
        extents, owned = self._named()
        self._space.let_go_of_reserved(extents[owned])

    def _named(self) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """The extents of all entries so far, and which of them belong to visible files."""
        tree = self._namespace
        rows = slice(ns.FIRST_NODEID, tree.published)
        counts = np.frombuffer(tree.extent_count, np.uint8)[rows]
        visible = np.frombuffer(tree.mode, np.uint32)[rows] != 0
        starts = np.frombuffer(tree.extent_start, np.uint32)[rows].astype(np.int64)
        ends = np.cumsum(counts, dtype=np.int64)
        extents = tree.extents[np.repeat(starts - (ends - counts), counts) + np.arange(int(counts.sum()))]
        return extents, np.repeat(visible, counts)

    def _apply(self, data: bytes, index: int, count: int) -> None:
        entries = np.frombuffer(data, layout.LOG_ENTRY, count=count)
        start = 0
        # An ADD_DAXDEV entry changes what the entries behind it may name, so blocks are cut there.
        for cut in [*np.flatnonzero(entries["type"] == EntryType.ADD_DAXDEV).tolist(), count]:
            if cut > start:
                self._apply_nodes(entries[start:cut], index + start)
            if cut < count:
                self._apply_device(entries[cut], index + cut)
            start = cut + 1

    def _apply_device(self, entry: Any, index: int) -> None:
        """The table rules of format 7.5: numbers are dense, and no device comes twice."""
        record = entry["add_daxdev"]
        uuid = UUID(bytes=record["dd_uuid"].tobytes())
        nodeid = ns.nodeid_of(index)
        if int(record["dd_index"]) != len(self.devices):
            self._namespace.skip(nodeid, Fault.DEVICE_INDEX)
        elif uuid in self._known:
            self._namespace.skip(nodeid, Fault.DEVICE_DUPLICATE)
        else:
            # Kept in the namespace as a node without a mode, for a process that takes over.
            tree = self._namespace
            tree.name_offset[nodeid], tree.name_length[nodeid] = tree.store_names(uuid.bytes), _UUID_SIZE
            tree.size[nodeid] = int(record["dd_size"])
            self.devices.append(uuid)
            self._known.add(uuid)
            self._space.add_device(int(record["dd_size"]))
        self._namespace.publish(nodeid + 1)

    def _apply_nodes(self, entries: NDArray[Any], index: int) -> None:
        tree = self._namespace
        count = len(entries)
        first = ns.nodeid_of(index)
        rows = slice(first, first + count)
        is_file = entries["type"] == EntryType.FILE
        is_directory = entries["type"] == EntryType.MKDIR
        file, directory = entries["file"], entries["mkdir"]
        fault = np.where(is_file | is_directory, 0, Fault.UNKNOWN_TYPE).astype(np.uint8)

        stored = np.where(is_directory, directory["md_relpath"], file["fm_relpath"])
        matrix = np.frombuffer(stored.tobytes(), np.uint8).reshape(count, layout.PATH_FIELD)
        paths = np.frombuffer(stored.tobytes(), f"S{layout.PATH_FIELD}").tolist()
        for row in np.flatnonzero(_judge_paths(matrix, fault)).tolist():
            if not fault[row]:
                paths[row], fault[row] = normalise(paths[row])
        split = [path.rpartition(b"/") for path in paths]
        names = [part[2] for part in split]

        sizes = np.where(is_file, file["fm_size"], 0)
        extents = _Extents(file["fm_fmap"], is_file)
        extents.judge(sizes, fault, self._space)

        # Columns first: a node becomes reachable only when it is linked, below.
        mode = np.where(is_file, S_IFREG | (file["fm_mode"] & 0o7777), S_IFDIR | (directory["md_mode"] & 0o7777))
        np.frombuffer(tree.mode, np.uint32)[rows] = mode
        np.frombuffer(tree.uid, np.uint32)[rows] = np.where(is_file, file["fm_uid"], directory["md_uid"])
        np.frombuffer(tree.gid, np.uint32)[rows] = np.where(is_file, file["fm_gid"], directory["md_gid"])
        np.frombuffer(tree.size, np.uint64)[rows] = sizes
        extents.store(tree, rows)
        lengths = np.fromiter(map(len, names), np.uint8, count)
        ends = np.cumsum(lengths, dtype=np.uint64)
        names_at = tree.store_names(b"".join(names))
        np.frombuffer(tree.name_length, np.uint8)[rows] = lengths
        np.frombuffer(tree.name_offset, np.uint64)[rows] = ends - lengths + names_at

        directories, link, bulk = self._directories, tree.link, self._bulk
        for nodeid, (head, _, name), reason in zip(range(first, first + count), split, fault.tolist(), strict=True):
            parent = directories.get(head)
            if bulk and not reason and parent and link(nodeid, parent, name):
                continue
            problem = reason or self._link(nodeid, head, name)
            if problem:
                tree.skip(nodeid, Fault(problem))
                if not self._bulk:
                    for extent in tree.fmap(nodeid).extents:
                        self._space.reserve(extent.device, extent.offset, extent.length)
        tree.publish(first + count)

    def _link(self, nodeid: int, head: bytes, name: bytes) -> int:
        """Make a node reachable below directory `head`, or say which fault forbids it."""
        tree = self._namespace
        parent = self._directories.get(head)
        if parent is None:
            parent = tree.resolve(head)
            if not parent:
                return Fault.MISSING_PARENT
            if not tree.is_directory(parent):
                return Fault.PARENT_IS_FILE
            self._directories[head] = parent
        if not self._bulk and tree.extent_count[nodeid]:
            # A process that died may have linked it and not said so.
            if tree.lookup(parent, name) not in (0, nodeid):
                return Fault.DUPLICATE
            if not self._space.own(tree.fmap(nodeid).extents):
                return Fault.OVERLAP
        return Fault.NONE if tree.link(nodeid, parent, name) else Fault.DUPLICATE


def valid_prefix(data: bytes, index: int, count: int) -> int:
    """How many of the `count` entries in `data`, the first of which belongs at `index`, are valid without a gap."""
    entries = np.frombuffer(data, layout.LOG_ENTRY, count=count)
    crc32 = zlib.crc32
    covered = _COVERED.iter_unpack(memoryview(data)[: count * layout.LOG_ENTRY_SIZE])
    computed = np.array([crc32(entry) for (entry,) in covered], np.uint64)
    wrong = (computed != entries["crc"]) | (entries["seqnum"] != np.arange(index, index + count, dtype=np.uint64))
    return int(wrong.argmax()) if wrong.any() else count


_COVERED = Struct(f"{layout.LOG_ENTRY_CRC_SPAN}s{layout.LOG_ENTRY_SIZE - layout.LOG_ENTRY_CRC_SPAN}x")
"""An entry as its checksum sees it."""

is_plain = re.compile(rb"[^./\0][^/\0]*(?:/[^./\0][^/\0]*)*").fullmatch
"""Finds out quickly that `normalise` would leave a path as it is; says no to names with a leading dot, too."""


def normalise(path: bytes) -> tuple[bytes, Fault]:
    """A path without empty, `.` and `..` components, and why it cannot be shown.

    Lexical only; paths that lead outside are refused, not every `..` (format 7.3).
    """
    if path.startswith(b"/"):
        return b"", Fault.ABSOLUTE_PATH
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts:
                return b"", Fault.ESCAPING_PATH
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    if not parts:
        return b"", Fault.EMPTY_PATH
    if parts[0] == META_NAME:
        return b"", Fault.RESERVED_PATH
    return b"/".join(parts), Fault.NONE


def _judge_paths(matrix: NDArray[np.uint8], fault: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mark paths that have no end, and say which of the others need a closer look by `normalise`."""
    is_nul = matrix == _NUL
    end = is_nul.argmax(axis=1)
    unterminated = ~is_nul.any(axis=1) | (np.count_nonzero(matrix, axis=1) != end)
    fault[unterminated & (fault == 0)] = Fault.UNTERMINATED_PATH
    first = matrix[:, 0]
    is_slash = matrix[:, :-1] == _SLASH
    behind = matrix[:, 1:]
    doubtful = is_slash & ((behind == _SLASH) | (behind == _DOT) | (behind == _NUL))
    odd: NDArray[np.bool_] = doubtful.any(axis=1) | (first == _NUL) | (first == _DOT) | (first == _SLASH)
    return odd


class _Extents:
    """The extents of a block of entries as matrices: a row an entry, a column an extent or strip."""

    def __init__(self, fmap: NDArray[Any], is_file: NDArray[np.bool_]) -> None:
        kind, nextents = fmap["fmap_ext_type"], fmap["fmap_nextents"]
        striped = fmap["ie"][:, 0]
        self.is_file = is_file
        self.is_striped = is_file & (kind == ExtentType.INTERLEAVED)
        self.is_known = is_file & (kind <= ExtentType.INTERLEAVED)
        self.claimed = np.where(self.is_striped, striped["ie_nstrips"], nextents)
        self.one_interleaved: NDArray[np.bool_] = ~self.is_striped | (nextents == layout.MAX_INTERLEAVED_EXTENTS)
        self.count = np.where(self.is_known, np.minimum(self.claimed, layout.MAX_STRIPS), 0).astype(np.int64)
        width = max(int(self.count.max(initial=0)), 1)
        self.is_live = np.arange(width) < self.count[:, None]
        simple, strips = fmap["se"][:, :width], striped["ie_strips"][:, :width]
        choose = self.is_striped[:, None]
        self.device = np.where(choose, strips["se_devindex"], simple["se_devindex"])
        self.offset = np.where(choose, strips["se_offset"], simple["se_offset"])
        self.length = np.where(choose, strips["se_len"], simple["se_len"])
        self.chunk = np.where(self.is_striped, striped["ie_chunk_size"], 0)

    def judge(self, sizes: NDArray[np.uint64], fault: NDArray[np.uint8], space: Space) -> None:
        """Set the fault of every entry whose map could not be served safely."""

        def mark(wrong: NDArray[np.bool_], reason: Fault) -> None:
            fault[self.is_file & wrong & (fault == 0)] = reason

        def any_of(wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return np.asarray((wrong & self.is_live).any(axis=1))

        unit = space.alloc_unit
        device_sizes = np.array(space.sizes, np.uint64)
        known = np.less(self.device, np.uint64(len(device_sizes)))
        limit = device_sizes[np.where(known, self.device, 0).astype(np.int64)]
        mark(np.equal(sizes, 0), Fault.ZERO_SIZE)
        mark(~self.is_known, Fault.UNKNOWN_EXTENT_TYPE)
        mark(
            (self.claimed < 1) | (self.claimed > layout.MAX_STRIPS) | ~self.one_interleaved,
            Fault.EXTENT_COUNT,
        )
        chunk_is_bad = (self.chunk == 0) | (self.chunk & (self.chunk - 1) != 0) | (self.chunk % unit != 0)
        mark(self.is_striped & chunk_is_bad, Fault.CHUNK_SIZE)
        mark(any_of(~known), Fault.UNKNOWN_DEVICE)
        mark(
            any_of((self.offset % unit != 0) | (self.length % unit != 0) | (self.length == 0)),
            Fault.MISALIGNED,
        )
        first_usable = np.where(self.device == 0, space.first_usable(0), space.first_usable(1))
        mark(any_of(self.offset < first_usable), Fault.IN_METADATA)
        mark(
            any_of((self.offset > limit) | (self.length > limit - np.minimum(self.offset, limit))),
            Fault.BEYOND_DEVICE,
        )
        # Only extents within their devices are left to count, so nothing below can overflow.
        length = np.where(self.is_live & (fault == 0)[:, None], self.length, 0)
        mark(length.sum(axis=1) < sizes, Fault.TOO_SHORT)
        if self.is_striped.any():
            mark(self.is_striped & self._strips_too_short(sizes, length), Fault.TOO_SHORT)

    def _strips_too_short(self, sizes: NDArray[np.uint64], length: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether a strip ends before the last chunk that falls to it (format 6.4)."""
        strips = np.maximum(self.count, 1)[:, None].astype(np.uint64)
        chunk = np.maximum(self.chunk, 1)
        chunks = (sizes // chunk + (sizes % chunk != 0))[:, None]
        number = np.arange(length.shape[1], dtype=np.uint64)
        stripes = chunks // strips + (number < chunks % strips)
        short: NDArray[np.bool_] = (self.is_live & (length // chunk[:, None] < stripes)).any(axis=1)
        return short

    def store(self, tree: Namespace, rows: slice) -> None:
        """Put the extents into the namespace, those of skipped entries too: their space stays used (decisions 3)."""
        total = int(self.count.sum())
        start = tree.reserve_extents(total)
        target = tree.extents[start : start + total]
        live = self.is_live
        target["device"] = np.minimum(self.device[live], _NO_DEVICE)
        target["offset"] = self.offset[live]
        target["length"] = self.length[live]
        np.frombuffer(tree.extent_start, np.uint32)[rows] = start + np.cumsum(self.count) - self.count
        np.frombuffer(tree.extent_count, np.uint8)[rows] = self.count
        np.frombuffer(tree.chunk, np.uint64)[rows] = self.chunk
