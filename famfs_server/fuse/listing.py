# SPDX-License-Identifier: Apache-2.0
"""Directory listings as prepared buffers: READDIRPLUS records made by columns, a window of entries at a time.

Packing records one by one costs more than everything else about a listing. A window is made when the kernel asks for
entries that the last one does not hold; it is bounded, so that neither memory nor the time of one request grows with
the directory.
"""

from bisect import bisect_right
from itertools import islice

import numpy as np

from famfs_server.fuse import abi
from famfs_server.fuse.filesystem import BLOCK_SIZE, FileSystem

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


class Window:
    """The records of consecutive entries of one directory, all of which the log has made."""

    def __init__(self, filesystem: FileSystem, directory: int, cookie: int) -> None:
        """Prepare the entries behind `cookie`, which is the nodeid of one or that of `..` (decisions 2)."""
        self.directory = directory
        self.state = filesystem.listing_state
        entries = list(islice(filesystem.entries(directory, cookie), WINDOW))
        nodes = np.fromiter((node for _, node, _ in entries), np.int64, len(entries))
        names = [name for _, _, name in entries]
        padded = [name.ljust((len(name) + 7) & ~7, b"\0") for name in names]
        heads = self._heads(filesystem, nodes, np.fromiter(map(len, names), np.uint32, len(names))).tobytes()
        size = _RECORD.itemsize
        parts: list[bytes] = []
        for number, name in enumerate(padded):
            parts += (heads[number * size : (number + 1) * size], name)
        self._data = memoryview(b"".join(parts))
        self._ends = np.cumsum([size + len(name) for name in padded], dtype=np.int64).tolist()
        self._cookies = [cookie, *nodes.tolist()]
        self._positions = {cookie: 0}

    @staticmethod
    def _heads(filesystem: FileSystem, nodes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        tree = filesystem.namespace
        heads = np.zeros(len(nodes), _RECORD)
        heads["nodeid"] = heads["ino"] = heads["dirent_ino"] = heads["offset"] = nodes
        heads["entry_valid"] = heads["attr_valid"] = filesystem.settings.timeout
        heads["size"] = sizes = np.frombuffer(tree.size, np.uint64)[nodes]
        heads["blocks"] = (sizes + 511) >> 9
        for column, times in enumerate((tree.atime, tree.mtime, tree.ctime)):
            when = np.frombuffer(times, np.uint64)[nodes]
            when = np.where(when, when, filesystem.started)
            heads["times"][:, column], heads["times_nsec"][:, column] = np.divmod(when, _NANOSECONDS)
        heads["mode"] = modes = np.frombuffer(tree.mode, np.uint32)[nodes]
        heads["type"] = modes >> 12
        heads["nlink"] = 1
        heads["uid"] = np.frombuffer(tree.uid, np.uint32)[nodes]
        heads["gid"] = np.frombuffer(tree.gid, np.uint32)[nodes]
        heads["blksize"] = BLOCK_SIZE
        heads["namelen"] = lengths
        return heads

    def serves(self, filesystem: FileSystem, directory: int, cookie: int) -> bool:
        """Whether the entries behind `cookie` are here and still as they were."""
        return (
            directory == self.directory
            and cookie in self._positions
            and (self._positions[cookie] < len(self._ends) or len(self._ends) < WINDOW)
            and self.state == filesystem.listing_state
        )

    def take(self, cookie: int, size: int) -> memoryview:
        """As many whole records behind `cookie` as fit into `size` bytes; none at the end of the directory."""
        first = self._positions[cookie]
        start = self._ends[first - 1] if first else 0
        last = bisect_right(self._ends, start + size)
        self._positions[self._cookies[last]] = last
        return self._data[start : self._ends[last - 1] if last > first else start]
