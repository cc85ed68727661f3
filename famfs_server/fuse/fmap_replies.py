# SPDX-License-Identifier: Apache-2.0
"""Extent maps for famfs kernels: what GET_FMAP and GET_DAXDEV are answered with (protocol 1.3, 2).

A map lets the kernel hand raw memory to programs, so this is a security boundary: whatever the namespace says, a map is
checked once more against the devices that are attached, against superblock and log, and against the limits of the
dialect, and is refused in words rather than sent in doubt.
"""

import errno
import logging
import os
from collections.abc import Callable

from famfs_server.fuse import abi
from famfs_server.fuse.dialects import Dialect, ExtentKind, Registration
from famfs_server.fuse.filesystem import FileSystem, refusal
from famfs_server.volume import fmap as fmap_arithmetic
from famfs_server.volume import namespace as ns
from famfs_server.volume.provisional import FIRST_PROVISIONAL
from famfs_server.volume.spacefiles import FIRST_SPACE

log = logging.getLogger(__name__)

_PATH_FIELD = 256


class FmapReplies:
    """Encodes the maps of one volume for one connection."""

    def __init__(
        self,
        filesystem: FileSystem,
        candidates: tuple[Dialect, ...],
        devices: tuple[str, ...],
        *,
        pushed: Callable[[int], bool] = lambda slot: False,
    ) -> None:
        """`candidates` are the dialects that INIT left open: the first GET_FMAP tells them apart by its length.

        `devices` holds the path of the first device, as every process of this host may resolve it; those of the others
        are in the volume's table. `pushed` tells whether the kernel has a further device in a slot, where it wants them
        pushed.
        """
        if not candidates:
            raise ValueError("extent maps need a dialect")
        self._fs = filesystem
        self._tree = filesystem.namespace
        self.candidates = candidates
        self._devices = devices
        self._pushed = pushed
        self._last: tuple[int, int, memoryview] | None = None
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

    def get_fmap(self, nodeid: int, body: bytes) -> bytes | memoryview:
        """The payload of the answer to GET_FMAP: the map, or its header alone where the kernel must make more room.

        May be asked again at any time, by any process, with the same result. Raises OSError: ESTALE or EISDIR for what
        has no map, EBUSY for the inode that a file had before it was logged, EINVAL for a request of no known dialect,
        EOPNOTSUPP for a file that the dialect cannot express.
        """
        dialect = self._dialect(len(body))
        row = self._fs.require_file(nodeid)
        if FIRST_PROVISIONAL <= nodeid < FIRST_SPACE:
            # Before it was logged its creator may have filled the inode's page cache (findings 1.8, 2.f).
            raise refusal(errno.EBUSY)
        message = self._message(row, dialect)
        room = abi.GET_FMAP_IN.unpack(body)[0] if dialect.size_probe else dialect.max_reply
        self.served += 1
        self._fs.map_given(nodeid)
        return message if len(message) <= room else message[: abi.FMAP_HEADER.size]

    def get_daxdev(self, index: int) -> bytes:
        """The payload of the answer to GET_DAXDEV; the index comes in place of the nodeid (protocol 1.3)."""
        return device_name(self._path(index), index)

    def _path(self, index: int) -> str | None:
        """The path of a device that the kernel may take; nothing for one that is not there or not in famfs mode."""
        if index == 0:
            return self._devices[0]
        entries = self._fs.volume.table.entries
        found = entries[index].found if 0 < index < len(entries) else None
        return found.path if found is not None and found.kernel_can_map else None

    def _dialect(self, body_size: int) -> Dialect:
        for dialect in self.candidates:
            if dialect.get_fmap_request_size == body_size:
                if len(self.candidates) > 1:
                    self.candidates = (dialect,)
                    log.info("the kernel speaks dialect %s (%s)", dialect.name, dialect.title)
                return dialect
        raise refusal(errno.EINVAL)

    def _message(self, row: int, dialect: Dialect) -> bytes | memoryview:
        tree = self._tree
        size, chunk_size, raw = tree.size[row], tree.chunk[row], tree.extent_bytes(row)
        # A map that is too large is asked for twice in a row; encoding half a million extents once is enough.
        if self._last is not None and self._last[:2] == (row, size):
            return self._last[2]
        extents = list(abi.FMAP_EXTENT.iter_unpack(raw))
        problem = self._unsafe(row, extents, dialect) or _inexpressible(dialect, extents, chunk_size)
        if problem:
            self._refuse(row, problem)
        if chunk_size and _takes_strips(dialect, len(extents), chunk_size):
            return interleaved_map(raw, len(extents), chunk_size, size)
        if not chunk_size and len(extents) <= dialect.max_extents:
            return simple_map(raw, len(extents), size)
        count = -(-size // chunk_size) if chunk_size else len(extents)
        length = abi.FMAP_HEADER.size + count * abi.FMAP_EXTENT.size
        if count > dialect.max_extents or length > dialect.max_reply:
            self._refuse(
                row,
                f"its map of {count} extents needs {length} bytes; dialect {dialect.name} takes {dialect.max_extents} "
                f"extents and {dialect.max_reply} bytes",
            )
        message = fmap_arithmetic.unroll(tree.extent_rows(row), chunk_size, size, lead=abi.FMAP_HEADER.size)
        message[: abi.FMAP_HEADER.size] = _simple_header(count, size)
        self._last = (row, size, message)
        return message

    def _unsafe(self, row: int, extents: list[tuple[int, ...]], dialect: Dialect) -> str:
        """Why the extents must not reach the kernel, or nothing. Overlaps with other files were ruled out by replay."""
        volume = self._fs.volume
        entries = volume.table.entries
        is_meta = row < ns.FIRST_NODEID
        if not extents:
            return "it has no extents"
        for device, offset, length in extents:
            found = entries[device].found if device < len(entries) else None
            if found is None:
                return f"it lies on device {device}, which is not attached"
            if device and not found.kernel_can_map:
                return f"it lies on device {device}, which is not in famfs mode"
            if device and dialect.registration is Registration.PUSH and not self._pushed(device):
                return f"it lies on device {device}, which the kernel has not been given"
            if not length or offset + length > found.size:
                return "an extent reaches beyond its device"
            if not is_meta and offset < volume.space_begins(device):
                return "an extent lies in the superblock or the log"
        return ""

    def _refuse(self, nodeid: int, problem: str) -> None:
        if nodeid not in self.refused:
            self.refused[nodeid] = problem
            path = os.fsdecode(self._tree.path(nodeid))
            log.error("%s cannot be mapped by this kernel: %s; mount with fmap=never to use it", path, problem)
        raise refusal(errno.EOPNOTSUPP)


def device_name(path: str | None, index: int) -> bytes:
    """The payload of the answer to GET_DAXDEV: the path of a device. Raises OSError EINVAL where there is none."""
    if path is None:
        # Given what it cannot take, the kernel gives the slot up for the whole connection (protocol 3.3).
        raise refusal(errno.EINVAL)
    name = os.fsencode(path)
    if not name.startswith(b"/") or len(name) >= _PATH_FIELD:
        log.error("device %d cannot be named to the kernel: %s", index, path)
        raise refusal(errno.EINVAL)
    return abi.DAXDEV_OUT.pack(index, name)


def _takes_strips(dialect: Dialect, strips: int, chunk_size: int) -> bool:
    return (
        ExtentKind.INTERLEAVED in dialect.extent_kinds
        and strips <= dialect.max_strips
        and chunk_size % dialect.alignment == 0
        and (dialect.chunk_sizes is None or chunk_size in dialect.chunk_sizes)
        and chunk_size < 1 << 32
    )


def _inexpressible(dialect: Dialect, extents: list[tuple[int, ...]], chunk_size: int) -> str:
    """Why the dialect has no words for extents or strips such as these, or nothing."""
    alignment = dialect.alignment
    for device, offset, length in extents:
        if device > dialect.max_devindex:
            return f"it lies on device {device}, dialect {dialect.name} knows none beyond {dialect.max_devindex}"
        if offset % alignment or length % alignment:
            return f"its extents are not aligned to {alignment} bytes"
    if chunk_size % alignment:
        return f"its chunks are not aligned to {alignment} bytes"
    return ""


def simple_map(extents: bytes | memoryview, count: int, size: int) -> bytes:
    """A map of `count` extents, encoded already, for a file of `size` bytes."""
    return b"".join((_simple_header(count, size), extents))


def _simple_header(count: int, size: int) -> bytes:
    total = abi.FMAP_HEADER.size + count * abi.FMAP_EXTENT.size
    return abi.FMAP_HEADER.pack(0, abi.FMAP_VERSION, abi.FMAP_SIMPLE, count, total, size)


def interleaved_map(strips: memoryview, count: int, chunk_size: int, size: int) -> bytes:
    """A map of `count` strips, encoded already, for a file of `size` bytes that goes round them in chunks."""
    total = abi.FMAP_HEADER.size + abi.FMAP_INTERLEAVED.size + len(strips)
    header = abi.FMAP_HEADER.pack(0, abi.FMAP_VERSION, abi.FMAP_INTERLEAVE, 1, total, size)
    return b"".join((header, abi.FMAP_INTERLEAVED.pack(count, chunk_size, size), strips))
