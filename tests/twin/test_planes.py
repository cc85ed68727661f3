# SPDX-License-Identifier: Apache-2.0
"""The request plane and pyfuse3 answer alike: the same requests to two servers, and the replies field by field."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any

import pytest

from famfs_server.fuse.planes import ALWAYS, FAST
from tests.twin import trees
from tests.twin.connection import ATTR, ATTR_HEAD, DIRENT, ENTRY_HEAD, IO_IN, OPEN_OUT, Exchange, Op
from tests.twin.kernel import Attr, FakeKernel, Inode
from tests.twin.maps import PMD, Dialect
from tests.twin.server import mounted

CALLS: dict[str, tuple[int, bytes]] = {
    "statfs": (17, b""),
    "fsync": (20, Struct("<II").pack(0, 0)),
    "fdatasync": (20, Struct("<II").pack(1, 0)),
    "getxattr size": (22, Struct("<II").pack(0, 0) + b"user.famfs.shadow\0"),
    "getxattr small": (22, Struct("<II").pack(3, 0) + b"user.famfs.shadow\0"),
    "getxattr none": (22, Struct("<II").pack(100, 0) + b"security.capability\0"),
    "listxattr size": (23, Struct("<II").pack(0, 0)),
    "listxattr": (23, Struct("<II").pack(100, 0)),
    "setxattr": (21, Struct("<II").pack(1, 0) + b"user.a\0x"),
    "removexattr": (24, b"user.a\0"),
    "access": (34, Struct("<II").pack(7, 0)),
    "readlink": (5, b""),
    "lseek data": (46, Struct("<QII").pack(5, os.SEEK_DATA, 0)),
    "lseek hole": (46, Struct("<QII").pack(5, os.SEEK_HOLE, 0)),
    "fallocate": (43, Struct("<QQII").pack(0, 4096, 0, 0)),
    "copy_file_range": (47, bytes(56)),
    "copy_file_range_64": (53, bytes(56)),
    "ioctl": (39, Struct("<QIIQII").pack(0, 0, 0x5401, 0, 0, 0)),
    "tmpfile": (51, Struct("<4I").pack(0, 0o600, 0, 0) + b"\0"),
    "statx": (52, bytes(24)),
    "syncfs": (50, bytes(8)),
    "mknod": (8, Struct("<4I").pack(0o100644, 0, 0, 0) + b"node\0"),
    "symlink": (6, b"link\0target\0"),
    "unlink": (10, b"sd\0"),
    "rmdir": (11, b"sd\0"),
    "rename": (12, Struct("<Q").pack(1) + b"sd\0new\0"),
    "link": (13, Struct("<Q").pack(16) + b"new\0"),
}
"""Requests for a file, a directory and what is neither."""

ON_HANDLES = (20, 43, 46)
"""Those that begin with a file handle, which pyfuse3 is given and the request plane does not look at."""


def looked_up(kernel: FakeKernel) -> Iterator[Inode]:
    """Everything below the root, each by a lookup: which names a listing describes is each plane's own matter."""
    todo = [kernel.root()]
    while todo:
        directory = todo.pop()
        for name in [name for name, _ in kernel.listing(directory) if name not in (b".", b"..")]:
            inode = kernel.lookup(directory, name)
            yield inode
            if inode.is_directory:
                todo.append(inode)


def exercise(kernel: FakeKernel) -> None:
    """Everything that a kernel does, errors included. Deterministic, but for file handles."""

    def attempt(action: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        with suppress(OSError):
            action(*arguments, **more)

    inodes = {inode.path: inode for inode in looked_up(kernel)}
    root, directory, file = kernel.root(), inodes[b"sd"], inodes[b"sd/odd"]
    for size in (200, 400, 100_000):
        list(kernel.listing(root, size))
        list(kernel.names(directory, size))
    for name in (b"missing", b"x" * 255, b"\xff\xfe", b"sd"):
        attempt(kernel.lookup, root, name)
    attempt(kernel.lookup, file, b"below a file")
    for inode in inodes.values():
        kernel.getattr(inode)
    for opcode, body in CALLS.values():
        for nodeid in (1, directory.nodeid, file.nodeid, 4, 2, 99_999, 1 << 62):
            handle = Struct("<Q").pack(nodeid) if opcode in ON_HANDLES else b""
            attempt(kernel.call, opcode, nodeid, handle + body, most=4096)
    for opcode in (Op.GETATTR, Op.OPENDIR, Op.OPEN):
        for nodeid in (2, directory.nodeid, file.nodeid, 99_999, 1 << 62):
            attempt(kernel.call, opcode, nodeid, bytes(16 if opcode is Op.GETATTR else 8), most=128)

    for path in (b"sd/odd", b"small_1m", b".meta/.log"):
        inode = inodes[path]
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC):
            attempt(lambda inode, flags: kernel.close_file(kernel.open(inode, flags)), inode, flags)
        opened = kernel.open(inode)
        for offset, length in ((0, 10), (PMD - 5, 10), (0, 300_000), (inode.size - 5, 100), (inode.size, 10)):
            attempt(kernel.read, opened, offset, length)
        # A kernel that maps files writes wherever it is told to, and nobody has told it to write into the log.
        writes = ((0, b"abc"), (PMD - 2, b"abcd"), (inode.size - 2, b"abcd"), (inode.size, b"x"))
        for offset, data in () if inode.map and path == b".meta/.log" else writes:
            attempt(kernel.write, opened, offset, data)
            attempt(kernel.read, opened, max(offset - 2, 0), 10)
        if not inode.map:
            attempt(kernel.call, Op.WRITE, inode.nodeid, IO_IN.pack(opened.handle, 7, 0, 0, 0, 0, 0), exact=8)
        kernel.close_file(opened)

    for valid in (1, 8, 0x208, 0x10 | 0x20, 0x10 | 0x80 | 0x20 | 0x100, 0, 0x400):
        for inode in (file, directory, root, inodes[b".meta/.log"]):
            attempt(kernel.setattr, inode, valid, size=5, mode=0o640)
            kernel.getattr(inode)
    kernel.setattr(file, 8, size=file.size)

    attempt(kernel.mkdir, directory, b"made", 0o777)
    attempt(kernel.mkdir, directory, b"made")
    attempt(kernel.mkdir, file, b"below a file")
    attempt(kernel.mkdir, kernel.lookup(root, b".meta"), b"reserved")
    attempt(kernel.mkdir, root, b"y" * 80)
    attempt(make_file, kernel)
    kernel.forget(file)
    kernel.forget(inodes[b"small_1m"], inodes[b"one_chunk"])
    kernel.require_silence(0.2)


def make_file(kernel: FakeKernel) -> None:
    created = kernel.create(kernel.root(), b"created", 0o666)
    kernel.write(created, 0, b"data")
    kernel.read(created, 0, 10)
    kernel.setattr(created.inode, 0x48, size=10_000, handle=created.handle)
    kernel.getattr(created.inode)
    kernel.close_file(created)
    while created.inode.nodeid in kernel.inodes:
        assert kernel.pump(kernel.timeout), "the kernel is not told that the name leads elsewhere now"


def attributes(raw: bytes) -> Attr:
    """Attributes without the times, which are those of the mount until somebody sets them."""
    found = Attr(*ATTR.unpack(raw))
    return found._replace(atime=0, mtime=0, ctime=0, atimensec=0, mtimensec=0, ctimensec=0)


def entry(raw: bytes) -> tuple[Any, ...]:
    return (*ENTRY_HEAD.unpack_from(raw), attributes(raw[ENTRY_HEAD.size : ENTRY_HEAD.size + ATTR.size]))


def opening(raw: bytes) -> tuple[Any, ...]:
    """An open without its handle, which is ours to choose, and the bit that pyfuse3 has no word for."""
    _, flags, backing = OPEN_OUT.unpack(raw)
    return flags & ~(1 << 6), backing


def listing(raw: bytes) -> Iterator[tuple[Any, ...]]:
    """A listing; of `.` and `..` kernels look at the name alone."""
    at = 0
    while at < len(raw):
        ino, cookie, namelen, kind = DIRENT.unpack_from(raw, at + 128)
        name = raw[at + 152 : at + 152 + namelen]
        nodeid, *_ = ENTRY_HEAD.unpack_from(raw, at)
        if name in (b".", b".."):
            yield name, cookie, kind, None
        else:
            yield name, (ino, cookie, kind), entry(raw[at : at + 128]) if nodeid else None
        at += (152 + namelen + 7) & ~7


def fields(exchange: Exchange) -> Any:
    """A reply as fields that can be compared."""
    payload = exchange.payload
    if exchange.opcode == Op.READDIRPLUS and not exchange.error:
        return list(listing(payload or b""))
    if exchange.error or not payload:
        return exchange.error, payload
    match exchange.opcode:
        case Op.LOOKUP | Op.MKDIR:
            return entry(payload)
        case Op.GETATTR | Op.SETATTR:
            return (*ATTR_HEAD.unpack_from(payload), attributes(payload[ATTR_HEAD.size :]))
        case Op.OPEN | Op.OPENDIR:
            return opening(payload)
        case Op.CREATE:
            return entry(payload[:128]), opening(payload[128:])
        case Op.INIT:
            return Struct("<4I2H2I2H2IH22x").unpack(payload)
    return payload


def alike(one: Exchange, other: Exchange) -> bool:
    """Whether both planes said the same. A listing may name files without describing them, if it wants to be fast."""
    if (one.opcode, one.nodeid) != (other.opcode, other.nodeid):
        return False
    if one.opcode != Op.READDIRPLUS or one.error or other.error:
        return bool(fields(one) == fields(other))
    records = list(zip(fields(one), fields(other), strict=False))
    return len(fields(one)) == len(fields(other)) and all(
        fast[:-1] == slow[:-1] and (fast[-1] is None or fast[-1] == slow[-1]) for fast, slow in records
    )


@pytest.mark.parametrize("host", [trees.MASTER, trees.OTHER_DEVICE], ids=["master", "client"])
@pytest.mark.parametrize("dialect", [None, Dialect.PULL])
def test_both_planes_answer_alike(
    dialect: Dialect | None, host: Any, golden_image: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    heard: list[list[Exchange]] = []
    for setting in ("on", "off"):
        # A new image each time, under the same name, since the server tells that in an extended attribute.
        image = trees.of_volume(golden_image("03-interleaved", tmp_path)).image
        heard.append([])
        words = (f"fastpath={setting}",)
        with mounted(image, dialect, words=words, host=host, watch=heard[-1].append, metadata_end=10 << 20) as kernel:
            exercise(kernel)
    fast, slow = heard
    differ = [
        (one.opcode, one.nodeid, one.body[:80], fields(one), fields(other))
        for one, other in zip(fast, slow, strict=False)
        if not alike(one, other)
    ]
    assert not differ, "\n".join(f"{row[:3]}\n    fast {row[3]}\n    slow {row[4]}" for row in differ[:20])
    assert len(fast) == len(slow)
    if dialect is None:
        assert {exchange.opcode for exchange in fast} >= FAST | ALWAYS - {Op.INTERRUPT}
