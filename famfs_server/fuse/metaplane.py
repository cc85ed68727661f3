# SPDX-License-Identifier: Apache-2.0
"""Answers for `.meta/.superblock` and `.meta/.log` while nothing is known of the volume (design 3, decisions 20).

A device in famfs mode cannot be mapped by user space. So its superblock and log are read through the mount itself, by
another process, while this plane answers for the two files: their nodeids and places are fixed, and the log's length is
in the superblock, which that process has opened first.
"""

import errno
import logging
import stat
from collections.abc import Callable

from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.dialects import PUSH, PUSH_INTERLEAVE, Decision
from famfs_server.fuse.filesystem import refusal
from famfs_server.fuse.fmap_replies import device_name, interleaved_map, simple_map
from famfs_server.fuse.requests import NO_REPLY, reply
from famfs_server.volume import namespace as ns
from famfs_server.volume.namespace import Namespace

log = logging.getLogger(__name__)

_REFUSED_FOR_EVER = frozenset({Opcode.FLUSH, Opcode.INTERRUPT, Opcode.STATX})
"""What is ENOSYS later too; the kernel does not ask again."""


class MetaPlane:
    """Serves a connection until the volume is there. One request at a time, each in one call of `answer`."""

    def __init__(
        self, decision: Decision, devices: tuple[str, ...], log_length: Callable[[], int], *, settled: bool = True
    ) -> None:
        """`devices` as in FmapReplies. `log_length` gives the length of the log in bytes once it is known, before that
        0; then there is no `.meta/.log`.

        The map of the superblock tests whether the kernel takes interleaved extents: it is one where the dialect has
        them, and, where the two dialects that push are not `settled`, when it is asked for first.
        """
        if not decision.candidates:
            raise ValueError("without extent maps nobody can read the superblock")
        self._dialects = decision.candidates
        self._devices = devices
        self._log_length = log_length
        self._tree = self._of(0)
        self._try_interleaved = not settled and takes_test(decision)
        self._interleaved = self._dialects[0].name == PUSH_INTERLEAVE.name

    @staticmethod
    def _of(log_length: int) -> Namespace:
        return Namespace.create(1, log_length)

    def answer(self, request: bytes) -> bytes:
        """The reply to one request as the kernel sent it; empty where none is due."""
        length, opcode, unique, nodeid, *_ = abi.IN_HEADER.unpack_from(request)
        if opcode in NO_REPLY:
            return b""
        try:
            if length != len(request):
                raise refusal(errno.EINVAL)
            payload = self._payload(opcode, nodeid, request[abi.IN_HEADER.size :])
        except OSError as error:
            return abi.error_reply(unique, error.errno or errno.EIO)
        return abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(payload), 0, unique) + payload

    def _payload(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        dialect = self._dialects[0]
        if opcode == Opcode.LOOKUP:
            return self._lookup(nodeid, body.rstrip(b"\0"))
        if opcode == Opcode.GETATTR:
            return abi.ATTR_OUT.pack(0, 0, *self._attr(nodeid))
        if opcode == Opcode.OPEN:
            # Not ENOSYS, which is for ever: whether files can be new on this mount is in the superblock.
            self._require_file(nodeid)
            return abi.OPEN_OUT.pack(0, 0, 0)
        if opcode == Opcode.RELEASE:
            return b""
        if opcode == dialect.get_fmap:
            return self._map(nodeid, body)
        if opcode == dialect.get_daxdev:
            return device_name(self._devices[0] if nodeid == 0 else None, nodeid)
        if opcode in (Opcode.READ, Opcode.WRITE):
            log.error("the kernel negotiated extent maps but sends reads and writes: it does not use them")
            raise refusal(errno.EIO)
        # Not ENOSYS for the others: the kernel remembers that.
        raise refusal(errno.ENOSYS if opcode in _REFUSED_FOR_EVER else errno.EOPNOTSUPP)

    def _lookup(self, parent: int, name: bytes) -> bytes:
        if parent == ns.META and not self._tree.size[ns.META_LOG] and (length := self._log_length()):
            self._tree.close()
            self._tree = self._of(length)
        node = self._tree.lookup(parent, name)
        if not node or (node == ns.META_LOG and not self._tree.size[node]):
            raise refusal(errno.ENOENT)
        return abi.ENTRY_OUT.pack(node, 0, 0, 0, 0, 0, *self._attr(node))

    def _attr(self, nodeid: int) -> tuple[int, ...]:
        """Not to be cached: times and owners come with the volume. The size stays (protocol 0.8)."""
        tree = self._tree
        if nodeid >= ns.FIRST_NODEID or not tree.mode[nodeid]:
            raise refusal(errno.ESTALE)
        size = tree.size[nodeid]
        return (nodeid, size, (size + 511) >> 9, 0, 0, 0, 0, 0, 0, tree.mode[nodeid], 1, 0, 0, 0, 4096, 0)

    def _require_file(self, nodeid: int) -> None:
        if stat.S_ISDIR(self._attr(nodeid)[9]):
            raise refusal(errno.EISDIR)

    def _map(self, nodeid: int, body: bytes) -> bytes:
        if not any(dialect.get_fmap_request_size == len(body) for dialect in self._dialects):
            raise refusal(errno.EINVAL)
        self._require_file(nodeid)
        extents, size = self._tree.extent_bytes(nodeid), self._tree.size[nodeid]
        if nodeid == ns.META_SUPERBLOCK and (self._interleaved or self._try_interleaved):
            self._try_interleaved = False
            return interleaved_map(extents, 1, size, size)
        return simple_map(bytes(extents), 1, size)


def takes_test(decision: Decision) -> bool:
    """Whether a test has to tell the two dialects that push from one another."""
    return decision.dialect is not None and decision.dialect.name == PUSH.name


def serve(plane: MetaPlane, fuse: int, data: bytes) -> None:
    """Answer one request on a connection; a reply that comes too late is dropped."""
    if answer := plane.answer(data):
        reply(fuse, answer)
