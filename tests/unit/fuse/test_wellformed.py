# SPDX-License-Identifier: Apache-2.0
"""What libfuse is given is as long as it says; sizes and names that would lead it out of the request are refused."""

import pytest

from famfs_server.fuse import abi, wellformed
from famfs_server.fuse.abi import Opcode

MOST = 1 << 20
NAME = b"name\0"
GOOD = {
    Opcode.LOOKUP: NAME,
    Opcode.SYMLINK: NAME + b"target\0",
    Opcode.MKNOD: bytes(16) + NAME,
    Opcode.RENAME: bytes(8) + NAME + NAME,
    Opcode.RENAME2: bytes(16) + NAME + NAME,
    Opcode.LINK: bytes(8) + NAME,
    Opcode.MKDIR: bytes(8) + NAME,
    Opcode.CREATE: bytes(16) + NAME,
    Opcode.UNLINK: NAME,
    Opcode.GETXATTR: bytes(8) + NAME,
    Opcode.SETXATTR: abi.SETXATTR_IN.pack(5, 0) + NAME + b"\0\1\2\0\4",
    Opcode.WRITE: abi.WRITE_IN.pack(0, 0, 3, 0, 0, 0) + b"abc",
    Opcode.READ: abi.READ_IN.pack(0, 0, MOST, 0, 0, 0),
    Opcode.SETATTR: bytes(88),
    Opcode.GETATTR: bytes(16),
    Opcode.STATFS: b"",
    Opcode.READLINK: b"",
    Opcode.ACCESS: bytes(8),
    Opcode.POLL: bytes(24),
}


def request(opcode: int, body: bytes, claimed: int | None = None) -> memoryview:
    length = abi.IN_HEADER.size + len(body)
    return memoryview(abi.IN_HEADER.pack(length if claimed is None else claimed, opcode, 2, 1, 0, 0, 1, 0) + body)


@pytest.mark.parametrize("opcode", GOOD, ids=lambda opcode: Opcode(opcode).name)
def test_each_kind(opcode: Opcode) -> None:
    body = GOOD[opcode]
    assert wellformed.fits(request(opcode, body), opcode, MOST)
    assert not wellformed.fits(request(opcode, body, 41 + len(body)), opcode, MOST)
    assert not wellformed.fits(request(opcode, body, 0), opcode, MOST)
    for length in range(len(body)):
        assert not wellformed.fits(request(opcode, body[:length]), opcode, MOST), length


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.LOOKUP, b"name"),
        (Opcode.LOOKUP, b"two\0names\0"),
        (Opcode.RENAME, bytes(8) + NAME),
        (Opcode.WRITE, abi.WRITE_IN.pack(0, 0, (1 << 32) - 1, 0, 0, 0) + b"abc"),
        (Opcode.SETXATTR, abi.SETXATTR_IN.pack(6, 0) + NAME + b"value"),
        (Opcode.SETXATTR, abi.SETXATTR_IN.pack(0, 0) + b"name"),
        (Opcode.SETXATTR, abi.SETXATTR_IN.pack(0, 0) + b"\0"),
        (Opcode.READ, abi.READ_IN.pack(0, 0, MOST + 1, 0, 0, 0)),
        (Opcode.READDIRPLUS, abi.READ_IN.pack(0, 0, (1 << 32) - 1, 0, 0, 0)),
        (Opcode.NOTIFY_REPLY, bytes(40)),
    ],
)
def test_what_would_lead_libfuse_astray(opcode: Opcode, body: bytes) -> None:
    assert not wellformed.fits(request(opcode, body), opcode, MOST)
