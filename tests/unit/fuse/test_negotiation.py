# SPDX-License-Identifier: Apache-2.0
"""INIT as bytes: requests recorded from kernels, libfuse's recorded reply, and what goes between them.

`init-*.bin` is what kernels wrote (7.3.4 with and without `fuse.enable_uring`); `libfuse-3.14-init-reply.bin` is what
libfuse 3.14 under pyfuse3 answered to that of 6.18, masked.
"""

import errno
import struct
from pathlib import Path

import pytest

from famfs_server.errors import NegotiationError
from famfs_server.fuse import abi, dialects
from famfs_server.fuse.abi import InitFlag
from famfs_server.fuse.dialects import Decision, InitRequest, decide
from famfs_server.fuse.negotiation import (
    FORBIDDEN,
    WANTED,
    complete_reply,
    mask_for_libfuse,
    parse_init_request,
    refuse_reply,
)

DATA = Path(__file__).parents[2] / "data"
RECORDED = (DATA / "init-6.18.bin").read_bytes()
LIBFUSE = (DATA / "libfuse-3.14-init-reply.bin").read_bytes()
MIB = 1 << 20


def request_bytes(minor: int = 45, low: int = 0x73FFFFFB, high: int = 0x5FD, *, major: int = 7) -> bytes:
    body = struct.pack("<5I44x", major, minor, 131072, low, high)
    return abi.IN_HEADER.pack(104, 26, 2, 0, 0, 0, 0, 0) + body


STOCK_73 = (DATA / "init-7.3.bin").read_bytes()
STOCK_73_URING = (DATA / "init-7.3-io-uring.bin").read_bytes()
FAMFS = request_bytes(45, high=0x5FD | 1 << 11)
SERVER = Decision("server", "no famfs")


def reply_flags(reply: bytes) -> InitFlag:
    fields = abi.INIT_OUT.unpack_from(reply, 16)
    return InitFlag(fields[3] | fields[10] << 32)


def test_recorded_request_of_6_18() -> None:
    assert request_bytes() == RECORDED
    request = parse_init_request(RECORDED)
    assert request == InitRequest(2, 7, 45, 131072, InitFlag(0x5FD73FFFFFB))
    decision = decide(request, policy="auto")
    assert decision.data_path == "server"
    assert "does not offer" in decision.reason


def test_requests_of_7_3() -> None:
    """Bits 32 to 40 and 42; with io_uring also 41 and 43 (protocol 4.3)."""
    assert request_bytes(46, high=0x5FF) == STOCK_73
    assert request_bytes(46, high=0xFFF) == STOCK_73_URING
    plain = parse_init_request(STOCK_73)
    assert InitFlag.HAS_INODE_DAX in plain.flags
    assert InitFlag.IO_URING_BUFPOOL not in plain.flags
    assert decide(plain, policy="auto").data_path == "server"
    uring = parse_init_request(STOCK_73_URING)
    assert InitFlag.OVER_IO_URING | InitFlag.IO_URING_BUFPOOL in uring.flags
    decision = decide(uring, policy="auto")
    assert decision.data_path == "server"
    assert "io_uring" in decision.reason


def test_flags2_counts_only_with_init_ext() -> None:
    request = parse_init_request(request_bytes(low=0x33FFFFFB, high=0xFFF))
    assert request.flags == 0x33FFFFFB


def test_request_of_a_kernel_before_flags2() -> None:
    data = abi.IN_HEADER.pack(56, 26, 2, 0, 0, 0, 0, 0) + struct.pack("<4I", 7, 31, 131072, 0x03FFFFFB)
    assert parse_init_request(data).flags == 0x03FFFFFB
    masked = mask_for_libfuse(data)
    assert len(masked) == 56
    assert not parse_init_request(masked).flags & FORBIDDEN
    reply = complete_reply(LIBFUSE, parse_init_request(data), SERVER, max_write=MIB)
    assert reply_flags(reply) >> 30 == 0
    assert abi.INIT_OUT.unpack_from(reply, 16)[1] == 31


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (RECORDED[:-1], "103 bytes"),
        (RECORDED + bytes(8), "112 bytes"),
        (struct.pack("<I", 56) + RECORDED[4:], "claims 56"),
        (RECORDED[:4] + struct.pack("<I", 1) + RECORDED[8:], "not INIT"),
        (request_bytes(major=8), "FUSE 8.45"),
        (request_bytes(major=6), "FUSE 6.45"),
        (request_bytes(30), "7.30"),
        (struct.pack("<I", 56) + RECORDED[4:56], "flags2"),
    ],
)
def test_bad_requests(data: bytes, words: str) -> None:
    with pytest.raises(NegotiationError, match=words):
        parse_init_request(data)


# Decisions 9: no change of the lists in the code may lose one of these.
NEVER = [
    "AUTO_INVAL_DATA",
    "ATOMIC_O_TRUNC",
    "WRITEBACK_CACHE",
    "EXPORT_SUPPORT",
    "SPLICE_WRITE",
    "SPLICE_MOVE",
    "SPLICE_READ",
    "OVER_IO_URING",
    "POSIX_LOCKS",
    "FLOCK_LOCKS",
    "POSIX_ACL",
    "NO_OPENDIR_SUPPORT",
]
ALWAYS = [
    "INIT_EXT",
    "PARALLEL_DIROPS",
    "DIRECT_IO_ALLOW_MMAP",
    "HAS_RESEND",
    "EXPLICIT_INVAL_DATA",
    "DO_READDIRPLUS",
    "READDIRPLUS_AUTO",
    "ASYNC_READ",
    "MAX_PAGES",
    "BIG_WRITES",
]


def test_lists() -> None:
    assert not WANTED & FORBIDDEN
    for name in NEVER:
        assert InitFlag[name] in FORBIDDEN
    for name in ALWAYS:
        assert InitFlag[name] in WANTED


@pytest.mark.parametrize("data", [RECORDED, STOCK_73, STOCK_73_URING, FAMFS, request_bytes(47, 0xFFFFFFFF, 0xFFFFFFFF)])
def test_libfuse_sees_no_forbidden_bit_and_nothing_else_changes(data: bytes) -> None:
    masked = mask_for_libfuse(data)
    flags = parse_init_request(masked).flags
    assert flags & FORBIDDEN == 0
    assert flags >> 45 == 0
    assert flags == parse_init_request(data).flags & ~FORBIDDEN & (1 << 45) - 1
    assert masked[:52] + masked[60:] == data[:52] + data[60:]


def test_recorded_reply_of_libfuse() -> None:
    assert len(LIBFUSE) == 80
    # Without the mask it was 0x4040b039: ATOMIC_O_TRUNC, EXPORT_SUPPORT and AUTO_INVAL_DATA on.
    assert reply_flags(LIBFUSE) == 0x4040A021
    assert abi.INIT_OUT.unpack_from(LIBFUSE, 16)[1] == 31


def test_completed_reply_for_6_18() -> None:
    reply = complete_reply(LIBFUSE, parse_init_request(RECORDED), SERVER, max_write=MIB, page_size=4096)
    assert abi.OUT_HEADER.unpack_from(reply) == (80, 0, 2)
    low = 1 << 0 | 1 << 5 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 18 | 1 << 22 | 1 << 25 | 1 << 30
    high = 1 << 4 | 1 << 7
    expected = (7, 45, 131072, low, 0, 0, MIB, 1, 256, 0, high, 0, 0)
    assert abi.INIT_OUT.unpack_from(reply, 16) == expected


@pytest.mark.parametrize("data", [RECORDED, STOCK_73, STOCK_73_URING, FAMFS, request_bytes(47, 0xFFFFFFFF, 0xFFFFFFFF)])
@pytest.mark.parametrize("libfuse_low", [0x4040A021, 0xFFFFFFFF, 0])
def test_reply_has_only_offered_and_never_forbidden_bits(data: bytes, libfuse_low: int) -> None:
    greedy = struct.pack("<IiQ4I2H2I2H2I24x", 80, 0, 2, 7, 38, 131072, libfuse_low, 0, 0, MIB, 1, 256, 0, 0xFFFFFFFF, 9)
    request = parse_init_request(data)
    flags = reply_flags(complete_reply(greedy, request, SERVER, max_write=MIB))
    assert flags & FORBIDDEN == 0
    assert flags & ~request.flags == 0
    assert flags & WANTED == WANTED
    assert flags >> 43 == 0


def test_nothing_is_asked_of_a_kernel_that_offers_nothing() -> None:
    request = parse_init_request(request_bytes(31, 0, 0))
    reply = complete_reply(LIBFUSE, request, SERVER, max_write=MIB)
    assert reply_flags(reply) == 0
    assert abi.INIT_OUT.unpack_from(reply, 16)[8] == 0


def test_famfs_bit_goes_out_when_the_decision_says_so() -> None:
    request = parse_init_request(FAMFS)
    decision = decide(request, policy="require")
    flags = reply_flags(complete_reply(LIBFUSE, request, decision, max_write=MIB))
    assert flags & InitFlag.DAX_FMAP
    assert flags & InitFlag.INIT_EXT
    without = decide(request, policy="never")
    assert not reply_flags(complete_reply(LIBFUSE, request, without, max_write=MIB)) & InitFlag.DAX_FMAP


def test_famfs_bit_that_was_not_offered() -> None:
    decision = Decision("fmap", "wrongly", (dialects.PULL,))
    with pytest.raises(NegotiationError, match="did not offer"):
        complete_reply(LIBFUSE, parse_init_request(RECORDED), decision, max_write=MIB)


def test_failed_decision_is_not_answered() -> None:
    request = parse_init_request(RECORDED)
    decision = decide(request, policy="require")
    with pytest.raises(NegotiationError, match="does not offer"):
        complete_reply(LIBFUSE, request, decision, max_write=MIB)


@pytest.mark.parametrize(
    ("max_write", "page_size", "expected", "pages"),
    [
        (MIB, 4096, MIB, 256),
        (4 * MIB, 4096, MIB, 256),
        (131072, 4096, 131072, 32),
        (MIB, 65536, MIB, 16),
        (4097, 4096, 4097, 2),
    ],
)
def test_pages_hold_max_write(max_write: int, page_size: int, expected: int, pages: int) -> None:
    request = parse_init_request(RECORDED)
    reply = complete_reply(LIBFUSE, request, SERVER, max_write=max_write, page_size=page_size)
    fields = abi.INIT_OUT.unpack_from(reply, 16)
    assert (fields[6], fields[8]) == (expected, pages)


def test_max_write_below_a_page() -> None:
    with pytest.raises(NegotiationError, match="less than a page"):
        complete_reply(LIBFUSE, parse_init_request(RECORDED), SERVER, max_write=4095, page_size=4096)


def test_short_reply_of_an_old_libfuse() -> None:
    short = struct.pack("<IiQ", 40, 0, 2) + LIBFUSE[16:40]
    reply = complete_reply(short, parse_init_request(RECORDED), SERVER, max_write=MIB)
    assert len(reply) == 80


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "0 bytes"),
        (struct.pack("<IiQ", 16, -errno.EPROTO, 2), "EPROTO"),
        (struct.pack("<IiQ", 16, -(1 << 31), 2), "-2147483648, which is no errno"),
        (struct.pack("<IiQ", 16, 0, 2), "16 bytes"),
        (LIBFUSE[:-1], "79 bytes"),
        (struct.pack("<IiQ", 88, 0, 2) + LIBFUSE[16:] + bytes(8), "88 bytes"),
        (struct.pack("<IiQ", 80, 0, 4) + LIBFUSE[16:], "request 4"),
        (LIBFUSE[:16] + struct.pack("<I", 8) + LIBFUSE[20:], "FUSE 8"),
    ],
)
def test_bad_replies_of_libfuse(reply: bytes, words: str) -> None:
    with pytest.raises(NegotiationError, match=words):
        complete_reply(reply, parse_init_request(RECORDED), SERVER, max_write=MIB)


def test_refusal() -> None:
    assert refuse_reply(2, errno.EPROTO) == struct.pack("<IiQ", 16, -errno.EPROTO, 2)
    with pytest.raises(ValueError, match="needs an errno"):
        refuse_reply(2, 0)
