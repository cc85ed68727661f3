# SPDX-License-Identifier: Apache-2.0
"""The tree of names and attributes, as columns in one shared memory file.

A nodeid is a pure function of the log index, and it is also the row in every column. The log's capacity bounds the
number of rows, so each column is laid out at its full length in a sparse memfd: nothing ever moves, pages that no entry
has reached cost nothing, and another process that maps the same memfd sees the same tree at once. That is how a
successor takes over without replaying the log.

One thread at a time inserts (the volume's lock); any thread looks up without a lock: a row's columns are filled before
its slot in the name index makes it reachable, and rows never go away.
"""

import hashlib
import mmap
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from stat import S_IFDIR, S_IFREG, S_ISDIR
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from famfs_server.omf import layout
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume._names import Index
from famfs_server.volume.faults import Fault

ROOT = 1
META = 3
META_SUPERBLOCK = 4
META_LOG = 5
FIRST_NODEID = 16
"""The nodeid of log entry 0. Below it are the root and `.meta`; 2 stays free, the listing cookie of `..`."""

META_NAME = b".meta"
S_IFMT_MASK = 0o170000
_DEVICE_MASK = 0xFFFFFFFF
PROVISIONAL_ROWS = 1 << 14
"""Rows behind those of the log, for files that are not logged yet (volume/provisional.py)."""
SPACE_ROWS = 1 << 14
"""Rows behind these, for files that stand for new space (volume/spacefiles.py)."""
_HEADER_WORDS = 16
_IDENTITY, _PUBLISHED, _NAMES_USED, _EXTENTS_USED, _STARTED, _LOCAL_CHANGES, _MADE, _VOLUME = range(8)
_KEY, _KEY_2, _CAPACITY, _EXPECTED, _SPACES, _FOREIGN, _APPENDING = range(8, 15)
LAYOUT = 1
"""To be raised when what the columns hold changes its meaning and their places do not."""

EXTENT = np.dtype([("device", "<u4"), ("reserved", "<u4"), ("offset", "<u8"), ("length", "<u8")])
"""Laid out like the kernel's simple extent (protocol 1.3), so that a map is a copy of rows."""


def unused(serials: Sequence[int], first: int) -> int:
    """The first nodeid from `first` on whose row, its number modulo the number of `serials`, has no nodeid; 0 if all
    have one."""
    rows = len(serials)
    for nodeid in range(first, first + rows):
        if not serials[nodeid % rows]:
            return nodeid
    return 0


def nodeid_of(index: int) -> int:
    """The nodeid of log entry `index`; the same on every host and after every restart."""
    return index + FIRST_NODEID


def index_of(nodeid: int) -> int:
    """The log index of a node that the log made."""
    return nodeid - FIRST_NODEID


_COLUMNS: tuple[tuple[str, Literal["Q", "I", "B"], str], ...] = (
    ("header", "Q", "header"),
    ("size", "Q", "rows"),
    ("chunk", "Q", "rows"),
    ("name_offset", "Q", "rows"),
    ("atime", "Q", "rows"),
    ("mtime", "Q", "rows"),
    ("ctime", "Q", "rows"),
    ("mode", "I", "rows"),
    ("uid", "I", "rows"),
    ("gid", "I", "rows"),
    ("parent", "I", "rows"),
    ("next_sibling", "I", "rows"),
    ("first_child", "I", "rows"),
    ("last_child", "I", "rows"),
    ("extent_start", "I", "rows"),
    ("slots", "I", "slots"),
    ("extent_count", "B", "rows"),
    ("name_length", "B", "rows"),
    ("fault", "B", "rows"),
    ("made_as", "I", "rows"),
    ("serial", "Q", "provisional"),
    ("lookups", "Q", "provisional"),
    ("logged", "I", "provisional"),
    ("opens", "I", "provisional"),
    ("space_serial", "Q", "space"),
    ("space_lookups", "Q", "space"),
    ("mapped", "B", "rows"),
)
"""The columns in the order in which they lie in memory: name, kind of number, and what their length follows."""


def _fingerprint() -> int:
    text = repr((LAYOUT, _HEADER_WORDS, FIRST_NODEID, PROVISIONAL_ROWS, SPACE_ROWS, EXTENT.descr, _COLUMNS))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


IDENTITY = _fingerprint()
"""Stands for the layout of the memory: the same in every program that lays it out like this."""


class NewNode(NamedTuple):
    """A node that is to be shown: where it belongs, and what it is. `mode` has the file type, `size` is in bytes."""

    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    fmap: Fmap


class Namespace:
    """The tree of one volume. Sizes are in bytes; names are bytes, as on the media."""

    def __init__(self, fd: int, capacity: int) -> None:
        """Map the columns in the memfd `fd`, made by `create` for a log of `capacity` entries."""
        self.provisional_row = capacity + FIRST_NODEID
        self.space_row = self.provisional_row + PROVISIONAL_ROWS
        rows = self.space_row + SPACE_ROWS
        slots = 1 << (2 * self.space_row - 1).bit_length()
        counts = {
            "header": _HEADER_WORDS,
            "rows": rows,
            "slots": slots,
            "provisional": PROVISIONAL_ROWS,
            "space": SPACE_ROWS,
        }
        places: dict[str, tuple[int, int, Literal["Q", "I", "B"]]] = {}
        end = 0
        for name, code, counted in _COLUMNS:
            length = counts[counted] * np.dtype(code).itemsize
            places[name] = (end, length, code)
            end += -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        extents_at = end
        extent_rows = rows * layout.MAX_STRIPS
        end += -(-extent_rows * EXTENT.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._names_at = end
        end += rows * layout.PATH_FIELD
        if os.fstat(fd).st_size != end:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, end)
        self.fd = fd
        self.capacity = capacity
        self._map = mmap.mmap(fd, end)
        whole = memoryview(self._map)

        def column(name: str) -> memoryview:
            start, length, code = places[name]
            return whole[start : start + length].cast(code)

        self._header = column("header")
        self._slots = column("slots")
        self.size = column("size")
        self.chunk = column("chunk")
        self.name_offset = column("name_offset")
        self.atime, self.mtime, self.ctime = column("atime"), column("mtime"), column("ctime")
        self.mode, self.uid, self.gid = column("mode"), column("uid"), column("gid")
        self.parent = column("parent")
        self.next_sibling = column("next_sibling")
        self.first_child = column("first_child")
        self.last_child = column("last_child")
        self.extent_start = column("extent_start")
        self.extent_count = column("extent_count")
        self.name_length = column("name_length")
        self.fault = column("fault")
        self.made_as = column("made_as")
        self.serial, self.lookups = column("serial"), column("lookups")
        self.logged, self.opens = column("logged"), column("opens")
        self.space_serial, self.space_lookups = column("space_serial"), column("space_lookups")
        self.mapped = column("mapped")
        self._open_index(self._header[_KEY : _KEY_2 + 1].tobytes())
        self._extent_bytes = whole[extents_at : extents_at + extent_rows * EXTENT.itemsize]
        self._extent_words = self._extent_bytes.cast("Q")
        self.extents = np.frombuffer(self._map, EXTENT, count=extent_rows, offset=extents_at)

    @classmethod
    def create(cls, capacity: int, log_length: int, fd: int | None = None, *, volume: int = 0) -> "Namespace":
        """A tree with the root and `.meta` alone, for a log of `log_length` bytes with room for `capacity` entries.

        It lies in the memfd `fd`, whatever that held before, or in a new one. `volume` is what `volume_of` tells.
        """
        if fd is None:
            fd = os.memfd_create("famfs-namespace", os.MFD_CLOEXEC)
        os.ftruncate(fd, 0)
        namespace = cls(fd, capacity)
        namespace._set_key(os.urandom(16))
        namespace.mode[ROOT] = S_IFDIR | 0o755
        namespace.parent[ROOT] = ROOT
        superblock = Fmap((Extent(0, layout.SUPERBLOCK_OFFSET, layout.SUPERBLOCK_REGION),))
        log = Fmap((Extent(0, layout.LOG_OFFSET, log_length),))
        namespace.enter(
            META,
            [
                NewNode(ROOT, META_NAME, S_IFDIR | 0o755, 0, 0, 0, Fmap(())),
                NewNode(META, b".superblock", S_IFREG | 0o444, 0, 0, layout.SUPERBLOCK_REGION, superblock),
                NewNode(META, b".log", S_IFREG | 0o444, 0, 0, log_length, log),
            ],
        )
        namespace.publish(FIRST_NODEID)
        namespace._header[_VOLUME] = volume
        namespace._header[_CAPACITY] = capacity
        return namespace

    def complete(self) -> None:
        """Say that the tree can be resumed: the log was replayed once, and no two visible files share space."""
        self._header[_IDENTITY] = IDENTITY

    @staticmethod
    def volume_of(fd: int) -> int:
        """The number of the volume whose tree another process has left in the memfd `fd`; 0 where there is none."""
        return int.from_bytes(os.pread(fd, 8, 8 * _VOLUME), sys.byteorder)

    @staticmethod
    def identity_of(fd: int) -> int:
        """The layout of the tree that another program has left in the memfd `fd`: IDENTITY if it is ours, 0 if it was
        not complete."""
        return int.from_bytes(os.pread(fd, 8, 8 * _IDENTITY), sys.byteorder)

    @staticmethod
    def progress_of(fd: int) -> tuple[int, int]:
        """How many log entries the tree in the memfd `fd` holds the outcome of, and how many it is to hold when the
        replay that another process is at has ended."""
        published, expected = (int.from_bytes(os.pread(fd, 8, 8 * at), sys.byteorder) for at in (_PUBLISHED, _EXPECTED))
        return max(0, published - FIRST_NODEID), expected

    @classmethod
    def provisional_in(cls, fd: int) -> int:
        """How many nodeids that the log does not know are in use in the tree in the memfd `fd`, which is laid out as
        ours."""
        capacity = int.from_bytes(os.pread(fd, 8, 8 * _CAPACITY), sys.byteorder)
        tree = cls(fd, capacity)
        columns = tree.serial, tree.space_serial
        return sum(int(np.count_nonzero(np.frombuffer(column, np.uint64))) for column in columns)

    @classmethod
    def resume(cls, capacity: int, fd: int) -> "Namespace | None":
        """The tree that another process left in the memfd `fd`, or nothing if there is none that can be used.

        The identity covers the layout, so that the tree of a version of this module which laid it out in another way
        is not taken for ours; a tree without one was not complete.
        """
        if os.fstat(fd).st_size == 0:
            return None
        namespace = cls(fd, capacity)
        if namespace._header[_IDENTITY] != IDENTITY:
            return None
        # What a process was doing when it died lies beyond what it published, and is done again.
        last = next((node for node in range(namespace.published - 1, 0, -1) if namespace.extent_count[node]), 0)
        namespace._header[_EXTENTS_USED] = namespace.extent_start[last] + namespace.extent_count[last]
        return namespace

    def _set_key(self, key: bytes) -> None:
        self._open_index(key)
        for word, at in ((_KEY, 0), (_KEY_2, 8)):
            self._header[word] = int.from_bytes(key[at : at + 8], sys.byteorder)

    def _open_index(self, key: bytes) -> None:
        index = Index(
            key,
            self._slots,
            self.parent,
            self.name_offset,
            self.name_length,
            self.next_sibling,
            self.first_child,
            self.last_child,
            self.mode,
            self._map,
        )
        self.lookup: Callable[[int, bytes], int] = index.find
        """The nodeid of a name (the second argument) in the directory with the nodeid of the first, or 0."""
        self.dirents: Callable[[int, int, int], bytes] = index.dirents
        """READDIR records (protocol 6.2) of a node and its later siblings, as many as fit into that many bytes, each
        behind as many zero bytes as the last argument says."""
        self.link: Callable[[int, int, bytes], bool] = index.link
        """Make a node (the first argument), all of whose other columns are set and whose name is stored, reachable in a
        directory by that name; False if it is another node's."""

    def close(self) -> None:
        """Let go of the memfd. Columns must not be used afterwards."""
        os.close(self.fd)

    @property
    def published(self) -> int:
        """One more than the highest nodeid that the log has reached so far, visible or skipped."""
        return self._header[_PUBLISHED]

    @property
    def replayed(self) -> int:
        """The number of log entries that the tree holds the outcome of."""
        return self._header[_PUBLISHED] - FIRST_NODEID

    def expect(self, entries: int) -> None:
        """Say that a replay up to this entry begins, for those who wait for its end."""
        self._header[_EXPECTED] = entries

    @property
    def started(self) -> int:
        """The time of the mount in nanoseconds, kept over takeovers; 0 until it is set."""
        return self._header[_STARTED]

    @started.setter
    def started(self, nanoseconds: int) -> None:
        self._header[_STARTED] = nanoseconds

    @property
    def local_changes(self) -> int:
        """Changes of mode, owner or times that only this mount sees."""
        return self._header[_LOCAL_CHANGES]

    @local_changes.setter
    def local_changes(self, count: int) -> None:
        self._header[_LOCAL_CHANGES] = count

    @property
    def made(self) -> int:
        """How many provisional files there have been; no two of one mount may have the same nodeid."""
        return self._header[_MADE]

    @made.setter
    def made(self, count: int) -> None:
        self._header[_MADE] = count

    @property
    def spaces(self) -> int:
        """How many files have stood for new space; no two of one mount may have the same nodeid."""
        return self._header[_SPACES]

    @spaces.setter
    def spaces(self, count: int) -> None:
        self._header[_SPACES] = count

    @property
    def foreign_writer(self) -> bool:
        """Whether another host has written to the log of this master; kept over takeovers."""
        return self._header[_FOREIGN] != 0

    @foreign_writer.setter
    def foreign_writer(self, found: bool) -> None:
        self._header[_FOREIGN] = found

    @property
    def appending(self) -> int:
        """Up to which entry this host has begun to append. What the log holds beyond is another one's."""
        return self._header[_APPENDING]

    @appending.setter
    def appending(self, end: int) -> None:
        self._header[_APPENDING] = end

    def publish(self, nodeid: int) -> None:
        """Say that every entry below `nodeid` has been dealt with."""
        self._header[_PUBLISHED] = nodeid

    # -- looking up -----------------------------------------------------------------------------

    def resolve(self, path: bytes) -> int:
        """The nodeid of a normalised path relative to the root, or 0."""
        node = ROOT
        if path:
            for name in path.split(b"/"):
                node = self.lookup(node, name)
                if not node:
                    return 0
        return node

    def exists(self, nodeid: int) -> bool:
        """Whether `nodeid` names a visible file or directory."""
        return 0 < nodeid < self._header[_PUBLISHED] and self.mode[nodeid] != 0

    def is_directory(self, nodeid: int) -> bool:
        """Whether the node is a directory."""
        return S_ISDIR(self.mode[nodeid])

    def name(self, nodeid: int) -> bytes:
        """The last component of the node's path; empty for the root."""
        start = self.name_offset[nodeid]
        return self._map[start : start + self.name_length[nodeid]]

    def names(self, nodes: list[int]) -> list[bytes]:
        """The last components of many nodes' paths."""
        text, offsets, lengths = self._map, self.name_offset, self.name_length
        return [text[(start := offsets[node]) : start + lengths[node]] for node in nodes]

    def path(self, nodeid: int) -> bytes:
        """The node's path relative to the root; empty for the root."""
        names = []
        while nodeid != ROOT:
            names.append(self.name(nodeid))
            nodeid = self.parent[nodeid]
        return b"/".join(reversed(names))

    def children(self, directory: int, after: int = 0) -> Iterator[int]:
        """The nodeids of a directory's children in log order, beginning behind child `after`."""
        node = self.next_sibling[after] if after else self.first_child[directory]
        while node:
            yield node
            node = self.next_sibling[node]

    def walk(self) -> Iterator[int]:
        """Every node that the log made and that is visible, in log order."""
        mode = self.mode
        return (nodeid for nodeid in range(FIRST_NODEID, self.published) if mode[nodeid])

    def first_extent(self, nodeid: int, offset: int, length: int) -> tuple[int, int, int]:
        """The device range (device, offset, length) of file bytes that all lie in the first extent, or strip."""
        at = 3 * self.extent_start[nodeid]
        return self._extent_words[at] & _DEVICE_MASK, self._extent_words[at + 1] + offset, length

    def totals(self) -> tuple[int, int, int]:
        """How many files and directories the log has made, and the sum of the files' sizes."""
        rows = slice(FIRST_NODEID, self.published)
        kinds = np.frombuffer(self.mode, np.uint32)[rows] & S_IFMT_MASK
        is_file = kinds == S_IFREG
        sizes = np.frombuffer(self.size, np.uint64)[rows]
        return int(is_file.sum()), int((kinds == S_IFDIR).sum()), int(sizes[is_file].sum())

    def extent_bytes(self, nodeid: int) -> memoryview:
        """The file's extents as they lie in memory, which is how famfs kernels take them (protocol 1.3)."""
        start = self.extent_start[nodeid]
        return self._extent_bytes[EXTENT.itemsize * start : EXTENT.itemsize * (start + self.extent_count[nodeid])]

    def extent_rows(self, nodeid: int) -> NDArray[np.void]:
        """The file's extents or strips, as rows of EXTENT."""
        start = self.extent_start[nodeid]
        return self.extents[start : start + self.extent_count[nodeid]]

    def fmap(self, nodeid: int) -> Fmap:
        """Where the file's bytes are."""
        rows = self.extent_rows(nodeid).tolist()
        return Fmap(tuple(Extent(d, o, n) for d, _, o, n in rows), self.chunk[nodeid])

    # -- growing (under the volume's lock) ------------------------------------------------------

    def reserve_extents(self, count: int) -> int:
        """Room for `count` more extents; the first row of it."""
        start = self._header[_EXTENTS_USED]
        self._header[_EXTENTS_USED] = start + count
        return int(start)

    def set_provisional_extent(self, row: int, device: int, offset: int, length: int) -> None:
        """Store the one extent of a provisional row, which has its own place: the rows of the log come in its order."""
        place = self.provisional_row * layout.MAX_STRIPS + row - self.provisional_row
        at = 3 * place
        self._extent_words[at], self._extent_words[at + 1], self._extent_words[at + 2] = device, offset, length
        self.extent_start[row] = place
        self.extent_count[row] = 1 if length else 0

    def provisional_extent(self, row: int) -> Extent | None:
        """The one extent of a provisional row, if it has space."""
        if not self.extent_count[row]:
            return None
        at = 3 * self.extent_start[row]
        return Extent(*self._extent_words[at : at + 3])

    def set_provisional_name(self, row: int, name: bytes) -> None:
        """Store the name of a provisional row, which has its own place: many of them may come and go."""
        place = self._names_at + row * layout.PATH_FIELD
        self._map[place : place + len(name)] = name
        self.name_offset[row], self.name_length[row] = place, len(name)

    def fill_unlogged(self, row: int, parent: int, name: bytes, mode: int, uid: int, gid: int, extent: Extent) -> None:
        """Describe, in a row behind those of the log, a file that is as long as its one extent."""
        self.mode[row], self.parent[row], self.uid[row], self.gid[row] = mode, parent, uid, gid
        self.size[row] = extent.length
        self.atime[row] = self.mtime[row] = self.ctime[row] = 0
        self.set_provisional_extent(row, *extent)
        self.set_provisional_name(row, name)
        self.mapped[row] = 0

    def reserving_rows(self) -> list[int]:
        """The provisional rows that have space."""
        counts = np.frombuffer(self.extent_count, np.uint8)[self.provisional_row : self.space_row]
        return [self.provisional_row + int(slot) for slot in np.flatnonzero(counts)]

    def space_rows(self) -> list[int]:
        """The rows that stand for new space."""
        return [self.space_row + int(slot) for slot in np.flatnonzero(np.frombuffer(self.space_serial, np.uint64))]

    def store_names(self, data: bytes) -> int:
        """Append name bytes; the offset at which they lie."""
        used = self._header[_NAMES_USED]
        start: int = self._names_at + used
        self._map[start : start + len(data)] = data
        self._header[_NAMES_USED] = used + len(data)
        return start

    def enter(self, first: int, nodes: Sequence[NewNode]) -> range:
        """Show `nodes`, none of whose names exists, as the next ones, from nodeid `first` on; their nodeids.

        By columns, because nodes come in batches of thousands; one alone, because files are made one by one as well.
        """
        new = range(first, first + len(nodes))
        if len(nodes) == 1:
            self._enter_one(first, nodes[0])
            return new
        rows = slice(new.start, new.stop)
        parents, names, modes, uids, gids, sizes, maps = zip(*nodes, strict=True)
        self.mode[rows] = array("I", modes)
        self.uid[rows] = array("I", uids)
        self.gid[rows] = array("I", gids)
        self.size[rows] = array("Q", sizes)
        self.chunk[rows] = array("Q", [fmap.chunk_size for fmap in maps])
        counts = [len(fmap.extents) for fmap in maps]
        start = self.reserve_extents(sum(counts))
        self.extent_count[rows] = array("B", counts)
        self.extent_start[rows] = array("I", accumulate(counts[:-1], initial=start))
        words = array("Q", chain.from_iterable(extent for fmap in maps for extent in fmap.extents))
        self._extent_words[3 * start : 3 * start + len(words)] = words
        lengths = [len(name) for name in names]
        start = self.store_names(b"".join(names))
        self.name_length[rows] = array("B", lengths)
        self.name_offset[rows] = array("Q", accumulate(lengths[:-1], initial=start))
        for nodeid, parent, name in zip(new, parents, names, strict=True):
            self.link(nodeid, parent, name)
        self.publish(new.stop)
        return new

    def _enter_one(self, nodeid: int, node: NewNode) -> None:
        parent, name, mode, uid, gid, size, (extents, chunk_size) = node
        self.mode[nodeid], self.uid[nodeid], self.gid[nodeid] = mode, uid, gid
        self.size[nodeid], self.chunk[nodeid] = size, chunk_size
        self.extent_count[nodeid] = len(extents)
        self.extent_start[nodeid] = start = self.reserve_extents(len(extents))
        for at, extent in enumerate(extents, start):
            self._extent_words[3 * at], self._extent_words[3 * at + 1], self._extent_words[3 * at + 2] = extent
        self.name_length[nodeid], self.name_offset[nodeid] = len(name), self.store_names(name)
        self.link(nodeid, parent, name)
        self.publish(nodeid + 1)

    def skip(self, nodeid: int, fault: Fault) -> None:
        """Record that the entry of `nodeid` is not shown, and why."""
        self.mode[nodeid] = 0
        self.fault[nodeid] = fault

    def faults(self) -> dict[Fault, list[int]]:
        """The log indexes of skipped entries, by reason."""
        column = np.frombuffer(self.fault, np.uint8)[FIRST_NODEID : self.published]
        found: dict[Fault, list[int]] = {}
        for index in np.flatnonzero(column).tolist():
            found.setdefault(Fault(int(column[index])), []).append(index)
        return found
