# SPDX-License-Identifier: Apache-2.0
"""Directory listings as prepared buffers: READDIRPLUS records made by columns, a window of entries at a time.

Packing records one by one costs more than everything else about a listing. A window is made when the kernel asks for
entries that the last one does not hold; it is bounded, so that neither memory nor the time of one request grows with
the directory.
"""

import stat
from bisect import bisect_right

import numpy as np

from famfs_server.fuse import abi
from famfs_server.fuse.filesystem import BLOCK_SIZE, DOTDOT, FileSystem

WINDOW = 2048
"""Entries prepared at once."""

_RECORD = np.dtype(
    [
        ("nodeid", "<u8"),
        ("generation", "<u8"),
        ("entry_valid", "<u8"),
        ("attr_valid", "<u8"),
        ("entry_valid_nsec", "<u4"),
        ("attr_valid_nsec", "<u4"),
        ("ino", "<u8"),
        ("size", "<u8"),
        ("blocks", "<u8"),
        ("times", "<u8", 3),
        ("times_nsec", "<u4", 3),
        ("mode", "<u4"),
        ("nlink", "<u4"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("rdev", "<u4"),
        ("blksize", "<u4"),
        ("flags", "<u4"),
        ("dirent_ino", "<u8"),
        ("offset", "<u8"),
        ("namelen", "<u4"),
        ("type", "<u4"),
    ]
)
"""The wire's direntplus without its name (protocol 6.2)."""

if _RECORD.itemsize != abi.DIRENTPLUS.size:
    raise AssertionError(f"a direntplus has {abi.DIRENTPLUS.size} bytes, the columns make {_RECORD.itemsize}")

_NANOSECONDS = 10**9
_REGULAR = stat.S_IFREG >> 12
_PADDING = [b"\0" * (-length % 8) for length in range(8)]


class Window:
    """The records of consecutive entries of one directory, all of which the log has made."""

    def __init__(self, filesystem: FileSystem, directory: int, cookie: int, *, count: int = WINDOW) -> None:
        """Prepare `count` entries behind `cookie`, which is the nodeid of one or that of `..` (decisions 2).

        The records make the kernel know each file, so that a stat of it costs nothing; but the first regular file of a
        directory is left to be looked up (`fuse/listers.py`).
        """
        self.directory = directory
        self._count = count
        self.state = filesystem.listing_state
        names, nodes = filesystem.names_behind(directory, cookie, count)
        lengths = [len(name) for name in names]
        columns = self._heads(filesystem, np.array(nodes, np.int64), np.array(lengths, np.uint32))
        if cookie == DOTDOT:
            columns["nodeid"][np.flatnonzero(columns["type"] == _REGULAR)[:1]] = 0
        heads = columns.tobytes()
        size = _RECORD.itemsize
        parts: list[bytes] = []
        for start, name in zip(range(0, len(heads), size), names, strict=True):
            parts += (heads[start : start + size], name, _PADDING[len(name) & 7])
        self._data = memoryview(b"".join(parts))
        self._ends = np.cumsum((np.array(lengths, np.int64) + size + 7) & ~7).tolist()
        self._cookies = [cookie, *nodes]
        self._positions = {cookie: 0}

    @staticmethod
    def _heads(filesystem: FileSystem, nodes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        tree = filesystem.namespace
        heads = np.zeros(len(nodes), _RECORD)
        heads["dirent_ino"] = heads["offset"] = nodes
        heads["namelen"] = lengths
        modes = np.frombuffer(tree.mode, np.uint32)[nodes]
        heads["type"] = modes >> 12
        heads["nodeid"] = heads["ino"] = nodes
        heads["entry_valid"] = heads["attr_valid"] = filesystem.settings.timeout
        heads["size"] = sizes = np.frombuffer(tree.size, np.uint64)[nodes]
        heads["blocks"] = (sizes + 511) >> 9
        for column, times in enumerate((tree.atime, tree.mtime, tree.ctime)):
            when = np.frombuffer(times, np.uint64)[nodes]
            when = np.where(when, when, filesystem.started)
            heads["times"][:, column], heads["times_nsec"][:, column] = np.divmod(when, _NANOSECONDS)
        heads["mode"] = modes
        heads["nlink"] = 1
        heads["uid"] = np.frombuffer(tree.uid, np.uint32)[nodes]
        heads["gid"] = np.frombuffer(tree.gid, np.uint32)[nodes]
        heads["blksize"] = BLOCK_SIZE
        return heads

    def serves(self, filesystem: FileSystem, directory: int, cookie: int, size: int) -> bool:
        """Whether `size` bytes of the entries behind `cookie`, or all that there are, are here as they are wanted and
        still as they were."""
        if directory != self.directory or self.state != filesystem.listing_state:
            return False
        first = self._positions.get(cookie)
        if first is None:
            return False
        start = self._ends[first - 1] if first else 0
        return len(self._data) - start >= size or len(self._ends) < self._count

    def take(self, cookie: int, size: int) -> memoryview:
        """As many whole records behind `cookie` as fit into `size` bytes; none at the end of the directory."""
        first = self._positions[cookie]
        start = self._ends[first - 1] if first else 0
        last = bisect_right(self._ends, start + size)
        self._positions[self._cookies[last]] = last
        return self._data[start : self._ends[last - 1] if last > first else start]
