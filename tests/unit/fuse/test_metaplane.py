# SPDX-License-Identifier: Apache-2.0
"""What is answered while nothing is known of the volume."""

import errno
import os

import pytest

from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.dialects import PULL, PUSH, PUSH_INTERLEAVE, Decision, Dialect
from famfs_server.fuse.metaplane import MetaPlane
from famfs_server.omf import layout

DEVICE = "/dev/dax7.7"
LENGTH = 8 << 20
SUPERBLOCK, LOG = 4, 5


class Log:
    """The log's length, when it has become known."""

    length = 0

    def __call__(self) -> int:
        return self.length


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture(params=[PULL, PUSH, PUSH_INTERLEAVE], ids=lambda dialect: dialect.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    found: Dialect = request.param
    return found


@pytest.fixture
def plane(dialect: Dialect, log: Log) -> MetaPlane:
    return MetaPlane(Decision("fmap", "a test", (dialect,)), (DEVICE,), log)


def ask(plane: MetaPlane, opcode: int, nodeid: int, body: bytes = b"") -> tuple[int, bytes]:
    """The errno and the payload of an answer."""
    request = abi.IN_HEADER.pack(abi.IN_HEADER.size + len(body), opcode, 42, nodeid, 0, 0, 1, 0) + body
    answer = plane.answer(request)
    length, error, unique = abi.OUT_HEADER.unpack_from(answer)
    assert (length, unique) == (len(answer), 42)
    return -error, answer[abi.OUT_HEADER.size :]


def lookup(plane: MetaPlane, parent: int, name: bytes) -> tuple[int, int]:
    """The nodeid and the size of a name, or minus the errno and nothing."""
    error, payload = ask(plane, Opcode.LOOKUP, parent, name + b"\0")
    if error:
        return -error, 0
    nodeid, generation, *valid = abi.ENTRY_OUT.unpack(payload)[:6]
    assert (generation, *valid) == (0, 0, 0, 0, 0), "nothing may be cached before the volume is known"
    return nodeid, abi.ENTRY_OUT.unpack(payload)[7]


def test_log_is_there_once_its_length_is_known(plane: MetaPlane, log: Log) -> None:
    assert lookup(plane, 1, b".meta") == (3, 0)
    assert lookup(plane, 3, b".superblock") == (SUPERBLOCK, layout.SUPERBLOCK_REGION)
    assert lookup(plane, 3, b".log") == (-errno.ENOENT, 0)
    log.length = LENGTH
    assert lookup(plane, 3, b".log") == (LOG, LENGTH)
    assert lookup(plane, 3, b".superblock") == (SUPERBLOCK, layout.SUPERBLOCK_REGION)
    assert lookup(plane, 3, b".other") == (-errno.ENOENT, 0)
    assert lookup(plane, 1, b"file") == (-errno.ENOENT, 0)


def test_maps(plane: MetaPlane, dialect: Dialect, log: Log) -> None:
    body = bytes(dialect.get_fmap_request_size)
    log.length = LENGTH
    lookup(plane, 3, b".log")
    for nodeid, offset, length in ((SUPERBLOCK, 0, 2 << 20), (LOG, 2 << 20, LENGTH)):
        error, payload = ask(plane, dialect.get_fmap, nodeid, body)
        assert error == 0
        # That of the superblock tests whether the kernel takes what the dialect has.
        interleaved = dialect is PUSH_INTERLEAVE and nodeid == SUPERBLOCK
        end = 80 if interleaved else 56
        assert abi.FMAP_HEADER.unpack_from(payload) == (0, 1, int(interleaved), 1, end, length)
        if interleaved:
            assert abi.FMAP_INTERLEAVED.unpack_from(payload, 32) == (1, length, length)
        assert abi.FMAP_EXTENT.unpack_from(payload, end - 24) == (0, offset, length)
        assert len(payload) == end
    for nodeid, number in ((1, errno.EISDIR), (3, errno.EISDIR), (0, errno.ESTALE), (2, errno.ESTALE)):
        assert ask(plane, dialect.get_fmap, nodeid, body) == (number, b"")
    assert ask(plane, dialect.get_fmap, 16, body) == (errno.ESTALE, b"")
    assert ask(plane, dialect.get_fmap, 1 << 62, body) == (errno.ESTALE, b"")
    assert ask(plane, dialect.get_fmap, SUPERBLOCK, body + bytes(4)) == (errno.EINVAL, b"")


def test_device(plane: MetaPlane, dialect: Dialect) -> None:
    error, payload = ask(plane, 55, 0)
    if dialect is PULL:
        assert (error, payload) == (0, abi.DAXDEV_OUT.pack(0, os.fsencode(DEVICE)))
        assert ask(plane, 55, 1) == (errno.EINVAL, b"")
    else:
        assert error


def test_opens(plane: MetaPlane) -> None:
    assert ask(plane, Opcode.OPEN, SUPERBLOCK, bytes(8)) == (0, bytes(16))
    assert ask(plane, Opcode.OPEN, 3, bytes(8)) == (errno.EISDIR, b"")
    assert ask(plane, Opcode.RELEASE, SUPERBLOCK, bytes(24)) == (0, b"")


def test_the_first_map_of_the_superblock_tells_the_dialects_that_push_apart(dialect: Dialect) -> None:
    """It is interleaved once; a kernel that refuses it asks again, at the next open."""
    plane = MetaPlane(Decision("fmap", "a test", (dialect,)), (DEVICE,), lambda: LENGTH, settled=False)
    body = bytes(dialect.get_fmap_request_size)
    kinds = [abi.FMAP_HEADER.unpack_from(ask(plane, dialect.get_fmap, SUPERBLOCK, body)[1])[2] for _ in range(3)]
    assert kinds == {"pull": [0, 0, 0], "push": [1, 0, 0], "push-interleave": [1, 1, 1]}[dialect.name]


@pytest.mark.parametrize("opcode", [opcode for opcode in Opcode if opcode not in (Opcode.INIT, Opcode.BATCH_FORGET)])
def test_kernel_remembers_no_refusal_that_does_not_last(opcode: Opcode, plane: MetaPlane) -> None:
    """ENOSYS is for ever; what the volume will answer must not get it."""
    if opcode == Opcode.FORGET:
        assert plane.answer(abi.IN_HEADER.pack(48, opcode, 2, 4, 0, 0, 1, 0) + bytes(8)) == b""
        return
    error, _ = ask(plane, opcode, SUPERBLOCK, bytes(64))
    lasting = {Opcode.FLUSH, Opcode.STATX, Opcode.INTERRUPT}
    assert (error == errno.ENOSYS) == (opcode in lasting)


def test_request_that_claims_another_length(plane: MetaPlane) -> None:
    request = abi.IN_HEADER.pack(41, Opcode.GETATTR, 2, 1, 0, 0, 1, 0) + bytes(16)
    assert plane.answer(request) == abi.error_reply(2, errno.EINVAL)


def test_nothing_without_maps() -> None:
    with pytest.raises(ValueError, match="without extent maps"):
        MetaPlane(Decision("server", "a test"), (DEVICE,), lambda: 0)
