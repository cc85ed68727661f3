# SPDX-License-Identifier: Apache-2.0
"""Extent maps for famfs kernels: what GET_FMAP and GET_DAXDEV are answered with (protocol 1.3, 2).

A map lets the kernel hand raw memory to programs, so this is a security boundary: whatever the namespace says, a map is
checked once more against the devices that are attached, against superblock and log, and against the limits of the
dialect, and is refused in words rather than sent in doubt.
"""

import errno
import logging
import os

import numpy as np
from numpy.typing import NDArray

from famfs_server.fuse import abi
from famfs_server.fuse.dialects import Dialect, ExtentKind
from famfs_server.fuse.filesystem import FileSystem, refusal
from famfs_server.volume import fmap as fmap_arithmetic
from famfs_server.volume import namespace as ns

log = logging.getLogger(__name__)

_PATH_FIELD = 256


class FmapReplies:
    """Encodes the maps of one volume for one connection."""

    def __init__(self, filesystem: FileSystem, candidates: tuple[Dialect, ...], devices: tuple[str, ...]) -> None:
        """`candidates` are the dialects that INIT left open: the first GET_FMAP tells them apart by its length.

        `devices` are the paths of the attached devices by number, as every process of this host may resolve them.
        """
        if not candidates:
            raise ValueError("extent maps need a dialect")
        self._fs = filesystem
        self._tree = filesystem.namespace
        self.candidates = candidates
        self._devices = devices
        self._last: tuple[int, int, bytes] | None = None
        self.served = 0
        """Maps sent so far."""
        self.refused: dict[int, str] = {}
        """Why a file has no map, by nodeid: each is logged once."""

    @property
    def get_fmap_opcode(self) -> int:
        """The opcode that asks for a map; the same in every dialect that is served."""
        return self.candidates[0].get_fmap

    @property
    def get_daxdev_opcode(self) -> int | None:
        """The opcode that asks for a device, if the kernel may speak a dialect that has one."""
        return next((dialect.get_daxdev for dialect in self.candidates if dialect.get_daxdev is not None), None)

    def get_fmap(self, nodeid: int, body: bytes) -> bytes:
        """The payload of the answer to GET_FMAP: the map, or its header alone where the kernel must make more room.

        May be asked again at any time, by any process, with the same result. Raises OSError: ESTALE or EISDIR for what
        has no map, EINVAL for a request of no known dialect, EOPNOTSUPP for a file that the dialect cannot express.
        """
        dialect = self._dialect(len(body))
        self._fs.require_file(nodeid)
        message = self._message(nodeid, dialect)
        room = abi.GET_FMAP_IN.unpack(body)[0] if dialect.size_probe else dialect.max_reply
        self.served += 1
        return message if len(message) <= room else message[: abi.FMAP_HEADER.size]

    def get_daxdev(self, index: int) -> bytes:
        """The payload of the answer to GET_DAXDEV; the index comes in place of the nodeid (protocol 1.3)."""
        if not 0 <= index < len(self._devices):
            raise refusal(errno.EINVAL)
        name = os.fsencode(self._devices[index])
        if not name.startswith(b"/") or len(name) >= _PATH_FIELD:
            log.error("device %d cannot be named to the kernel: %s", index, self._devices[index])
            raise refusal(errno.EINVAL)
        return abi.DAXDEV_OUT.pack(index, name)

    def _dialect(self, body_size: int) -> Dialect:
        for dialect in self.candidates:
            if dialect.get_fmap_request_size == body_size:
                if len(self.candidates) > 1:
                    self.candidates = (dialect,)
                    log.info("the kernel speaks dialect %s (%s)", dialect.name, dialect.title)
                return dialect
        raise refusal(errno.EINVAL)

    def _message(self, nodeid: int, dialect: Dialect) -> bytes:
        # A map that is too large is asked for twice in a row; encoding half a million extents once is enough.
        size = self._tree.size[nodeid]
        if self._last is not None and self._last[:2] == (nodeid, size):
            return self._last[2]
        rows, chunk_size = self._tree.extent_rows(nodeid), self._tree.chunk[nodeid]
        problem = self._unsafe(nodeid, rows)
        if not problem and chunk_size and not _takes_strips(dialect, len(rows), chunk_size):
            rows, chunk_size = fmap_arithmetic.unroll(rows, chunk_size, size), 0
        problem = problem or _inexpressible(dialect, rows, chunk_size)
        if problem:
            self._refuse(nodeid, problem)
        message = _encode(rows, chunk_size, size)
        if len(message) > dialect.max_reply:
            self._refuse(nodeid, f"its map has {len(message)} bytes, dialect {dialect.name} takes {dialect.max_reply}")
        self._last = (nodeid, size, message)
        return message

    def _unsafe(self, nodeid: int, rows: NDArray[np.void]) -> str:
        """Why the extents must not reach the kernel, or nothing. Overlaps with other files were ruled out by replay."""
        volume = self._fs.volume
        sizes = np.array([memory.size if memory else 0 for memory in volume.memories], np.uint64)
        device = rows["device"].astype(np.int64)
        if not len(rows) or (device >= len(sizes)).any():
            return "it lies on a device that is not attached"
        limit = sizes[device]
        if (rows["length"] == 0).any() or (rows["offset"] > limit).any():
            return "an extent lies outside of its device"
        if (rows["length"] > limit - rows["offset"]).any():
            return "an extent reaches beyond its device"
        if nodeid >= ns.FIRST_NODEID and ((device == 0) & (rows["offset"] < volume.space.log_end)).any():
            return "an extent lies in the superblock or the log"
        return ""

    def _refuse(self, nodeid: int, problem: str) -> None:
        if nodeid not in self.refused:
            self.refused[nodeid] = problem
            path = os.fsdecode(self._tree.path(nodeid))
            log.error("%s cannot be mapped by this kernel: %s; mount with fmap=never to use it", path, problem)
        raise refusal(errno.EOPNOTSUPP)


def _takes_strips(dialect: Dialect, strips: int, chunk_size: int) -> bool:
    return (
        ExtentKind.INTERLEAVED in dialect.extent_kinds
        and strips <= dialect.max_strips
        and chunk_size % dialect.alignment == 0
        and (dialect.chunk_sizes is None or chunk_size in dialect.chunk_sizes)
        and chunk_size < 1 << 32
    )


def _inexpressible(dialect: Dialect, rows: NDArray[np.void], chunk_size: int) -> str:
    """Why the dialect has no words for this map, or nothing."""
    if not chunk_size and len(rows) > dialect.max_extents:
        return f"it has {len(rows)} extents, dialect {dialect.name} takes {dialect.max_extents}"
    if (rows["device"] > dialect.max_devindex).any():
        return f"dialect {dialect.name} knows no device but {dialect.max_devindex} and below"
    if (rows["offset"] % dialect.alignment != 0).any() or (rows["length"] % dialect.alignment != 0).any():
        return f"its extents are not aligned to {dialect.alignment} bytes"
    return ""


def _encode(rows: NDArray[np.void], chunk_size: int, size: int) -> bytes:
    extents = rows.tobytes()
    if chunk_size:
        strips = abi.FMAP_INTERLEAVED.pack(len(rows), chunk_size, size)
        total = abi.FMAP_HEADER.size + len(strips) + len(extents)
        return abi.FMAP_HEADER.pack(0, abi.FMAP_VERSION, abi.FMAP_INTERLEAVE, 1, total, size) + strips + extents
    total = abi.FMAP_HEADER.size + len(extents)
    return abi.FMAP_HEADER.pack(0, abi.FMAP_VERSION, abi.FMAP_SIMPLE, len(rows), total, size) + extents
