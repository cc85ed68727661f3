# SPDX-License-Identifier: Apache-2.0
"""How long requests are, and whether one is as long as it says, before libfuse sees it.

libfuse believes a kernel: it takes sizes and counts from the request and looks for the end of a name until it finds
one, in memory that is not the request's any more.
"""

from typing import Final

from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode

_BODY: Final = abi.IN_HEADER.size

FIXED: Final[dict[int, int]] = {
    Opcode.FORGET: abi.FORGET_IN.size,
    Opcode.GETATTR: abi.GETATTR_IN.size,
    Opcode.SETATTR: abi.SETATTR_IN.size,
    Opcode.MKNOD: abi.MKNOD_IN.size,
    Opcode.MKDIR: abi.MKDIR_IN.size,
    Opcode.RENAME: abi.RENAME_IN.size,
    Opcode.LINK: abi.LINK_IN.size,
    Opcode.OPEN: abi.OPEN_IN.size,
    Opcode.READ: abi.READ_IN.size,
    Opcode.WRITE: abi.WRITE_IN.size,
    Opcode.RELEASE: abi.RELEASE_IN.size,
    Opcode.FSYNC: abi.FSYNC_IN.size,
    Opcode.SETXATTR: abi.SETXATTR_IN.size,
    Opcode.GETXATTR: abi.GETXATTR_IN.size,
    Opcode.LISTXATTR: abi.GETXATTR_IN.size,
    Opcode.OPENDIR: abi.OPEN_IN.size,
    Opcode.READDIR: abi.READ_IN.size,
    Opcode.READDIRPLUS: abi.READ_IN.size,
    Opcode.RELEASEDIR: abi.RELEASE_IN.size,
    Opcode.FSYNCDIR: abi.FSYNC_IN.size,
    Opcode.GETLK: abi.LK_IN.size,
    Opcode.SETLK: abi.LK_IN.size,
    Opcode.SETLKW: abi.LK_IN.size,
    Opcode.ACCESS: abi.ACCESS_IN.size,
    Opcode.CREATE: abi.CREATE_IN.size,
    Opcode.BMAP: abi.BMAP_IN.size,
    Opcode.POLL: abi.POLL_IN.size,
    Opcode.BATCH_FORGET: abi.BATCH_FORGET_IN.size,
    Opcode.FALLOCATE: abi.FALLOCATE_IN.size,
    Opcode.LSEEK: abi.LSEEK_IN.size,
    Opcode.RENAME2: abi.RENAME2_IN.size,
}
"""Bytes of a body before its names or data; none where an opcode is missing."""

NAMES: Final[dict[int, int]] = {
    Opcode.LOOKUP: 1,
    Opcode.SYMLINK: 2,
    Opcode.MKNOD: 1,
    Opcode.MKDIR: 1,
    Opcode.UNLINK: 1,
    Opcode.RMDIR: 1,
    Opcode.RENAME: 2,
    Opcode.LINK: 1,
    Opcode.GETXATTR: 1,
    Opcode.REMOVEXATTR: 1,
    Opcode.CREATE: 1,
    Opcode.RENAME2: 2,
}
"""How many names the rest of a body consists of, each with its NUL."""

_READING: Final = frozenset({Opcode.READ, Opcode.READDIRPLUS})
_NEVER_ANSWERED: Final = frozenset({Opcode.NOTIFY_REPLY})
"""What libfuse takes for the answer to something that it has never asked."""


def fits(request: memoryview, opcode: int, most: int) -> bool:
    """Whether libfuse can read `request`, all of it, without leaving it, and answer with at most `most` bytes."""
    if opcode in _NEVER_ANSWERED or int.from_bytes(request[:4], "little") != len(request):
        return False
    start = _BODY + FIXED.get(opcode, 0)
    if len(request) < start:
        return False
    rest = len(request) - start
    names = NAMES.get(opcode)
    if names is not None:
        return rest > 0 and request[-1] == 0 and bytes(request[start:]).count(0) == names
    if opcode == Opcode.WRITE:
        return bool(abi.WRITE_IN.unpack_from(request, _BODY)[2] == rest)
    if opcode == Opcode.SETXATTR:
        size, _ = abi.SETXATTR_IN.unpack_from(request, _BODY)
        name, ended, value = bytes(request[start:]).partition(b"\0")
        return bool(name and ended and len(value) == size)
    if opcode in _READING:
        return bool(abi.READ_IN.unpack_from(request, _BODY)[2] <= most)
    return True
