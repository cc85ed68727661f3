# SPDX-License-Identifier: Apache-2.0
"""Which plane answers which opcode: one table, without the opcodes of famfs, which belong to dialects (decisions 8)."""

from enum import Enum
from typing import Final

from famfs_server.fuse.abi import Opcode


class Plane(Enum):
    """Who answers a request for a node of the log. Those for provisional nodeids go to the request plane always."""

    ALWAYS_FAST = "the request plane: pyfuse3 has no handler for it, or it must be carried out exactly once"
    FAST = "the request plane, or the control plane with the fast path off"
    CONTROL = "the control plane"
    UNSENT = "the control plane, though no kernel asks it of a server that has negotiated as this one does"


PLANES: Final[dict[Opcode, Plane]] = {
    Opcode.LOOKUP: Plane.FAST,
    Opcode.FORGET: Plane.ALWAYS_FAST,
    Opcode.GETATTR: Plane.FAST,
    Opcode.SETATTR: Plane.FAST,
    Opcode.READLINK: Plane.CONTROL,
    Opcode.SYMLINK: Plane.CONTROL,
    Opcode.MKNOD: Plane.CONTROL,
    Opcode.MKDIR: Plane.FAST,
    Opcode.UNLINK: Plane.CONTROL,
    Opcode.RMDIR: Plane.CONTROL,
    Opcode.RENAME: Plane.CONTROL,
    Opcode.LINK: Plane.CONTROL,
    Opcode.OPEN: Plane.FAST,
    Opcode.READ: Plane.FAST,
    Opcode.WRITE: Plane.FAST,
    Opcode.STATFS: Plane.FAST,
    Opcode.RELEASE: Plane.FAST,
    Opcode.FSYNC: Plane.FAST,
    Opcode.SETXATTR: Plane.CONTROL,
    Opcode.GETXATTR: Plane.FAST,
    Opcode.LISTXATTR: Plane.FAST,
    Opcode.REMOVEXATTR: Plane.CONTROL,
    Opcode.FLUSH: Plane.ALWAYS_FAST,
    Opcode.INIT: Plane.UNSENT,
    Opcode.OPENDIR: Plane.FAST,
    Opcode.READDIR: Plane.ALWAYS_FAST,
    Opcode.RELEASEDIR: Plane.FAST,
    Opcode.FSYNCDIR: Plane.CONTROL,
    Opcode.GETLK: Plane.UNSENT,
    Opcode.SETLK: Plane.UNSENT,
    Opcode.SETLKW: Plane.UNSENT,
    Opcode.ACCESS: Plane.CONTROL,
    Opcode.CREATE: Plane.FAST,
    Opcode.INTERRUPT: Plane.ALWAYS_FAST,
    Opcode.BMAP: Plane.CONTROL,
    Opcode.DESTROY: Plane.UNSENT,
    Opcode.IOCTL: Plane.ALWAYS_FAST,
    Opcode.POLL: Plane.CONTROL,
    Opcode.NOTIFY_REPLY: Plane.UNSENT,
    Opcode.BATCH_FORGET: Plane.ALWAYS_FAST,
    Opcode.FALLOCATE: Plane.ALWAYS_FAST,
    Opcode.READDIRPLUS: Plane.FAST,
    Opcode.RENAME2: Plane.CONTROL,
    Opcode.LSEEK: Plane.ALWAYS_FAST,
    Opcode.COPY_FILE_RANGE: Plane.ALWAYS_FAST,
    Opcode.SETUPMAPPING: Plane.UNSENT,
    Opcode.REMOVEMAPPING: Plane.UNSENT,
    Opcode.SYNCFS: Plane.ALWAYS_FAST,
    Opcode.TMPFILE: Plane.ALWAYS_FAST,
    Opcode.STATX: Plane.ALWAYS_FAST,
    Opcode.COPY_FILE_RANGE_64: Plane.ALWAYS_FAST,
}

ALWAYS: Final = frozenset(opcode for opcode, plane in PLANES.items() if plane is Plane.ALWAYS_FAST)
"""Answered by the request plane with the fast path off too."""
FAST: Final = frozenset(opcode for opcode, plane in PLANES.items() if plane is Plane.FAST)
"""Answered by the request plane unless the fast path is off."""
