# SPDX-License-Identifier: Apache-2.0
"""INIT: read by us, shown to libfuse with bits taken out, answered with bits put in. Pure functions.

libfuse can neither be told to leave some bits alone nor to set others, so its part of the negotiation is
wrapped: the request that it sees lacks everything in FORBIDDEN, and its reply is completed to what the kernel
is to read (protocol 3 and 4). No bit goes to the kernel that the kernel did not offer.
"""

import errno
import mmap
import os

from famfs_server.errors import NegotiationError
from famfs_server.fuse import abi
from famfs_server.fuse.abi import InitFlag, Opcode
from famfs_server.fuse.dialects import Decision, InitRequest

WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.DO_READDIRPLUS
    # A listing tells all about its files only as long as somebody looks at them.
    | InitFlag.READDIRPLUS_AUTO
    # libfuse 3.14 leaves it out, and lookups in one directory then come one after the other.
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    # Pages of a file go only when we say so, not because an attribute looks new.
    | InitFlag.EXPLICIT_INVAL_DATA
    # Without it the kernel does not read flags2 at all.
    | InitFlag.INIT_EXT
    # MAP_SHARED of files opened with FOPEN_DIRECT_IO.
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    # A successor gets the requests that its predecessor had in hand.
    | InitFlag.HAS_RESEND
)
"""What goes into every reply, if the kernel offers it."""

FORBIDDEN = (
    # Locks stay local to the kernel: they survive a takeover and never cross hosts.
    InitFlag.POSIX_LOCKS
    | InitFlag.FLOCK_LOCKS
    # Opens with O_TRUNC would succeed; without it they become a SETATTR that is refused.
    | InitFlag.ATOMIC_O_TRUNC
    # "." and ".." are not looked up here.
    | InitFlag.EXPORT_SUPPORT
    # libfuse reads from a socket pair, whose other end is not /dev/fuse.
    | InitFlag.SPLICE_WRITE
    | InitFlag.SPLICE_MOVE
    | InitFlag.SPLICE_READ
    # An mtime that changes would tear mappings down.
    | InitFlag.AUTO_INVAL_DATA
    # The memory is shared with other hosts: nothing may linger in a page cache.
    | InitFlag.WRITEBACK_CACHE
    # The kernel checks permissions by mode, applies the umask and clears setuid bits; we do none of it.
    | InitFlag.POSIX_ACL
    | InitFlag.DONT_MASK
    | InitFlag.HANDLE_KILLPRIV
    | InitFlag.HANDLE_KILLPRIV_V2
    # ENOSYS to OPENDIR makes the kernel cache listings, and other hosts' files stay invisible.
    | InitFlag.NO_OPENDIR_SUPPORT
    # These change the layout of requests or replies.
    | InitFlag.SETXATTR_EXT
    | InitFlag.SECURITY_CTX
    | InitFlag.CREATE_SUPP_GROUP
    | InitFlag.ATTR_GENERATION
    # For virtio-fs, or for servers that map user ids or read through a backing file.
    | InitFlag.MAP_ALIGNMENT
    | InitFlag.SUBMOUNTS
    | InitFlag.HAS_INODE_DAX
    | InitFlag.PASSTHROUGH
    | InitFlag.ALLOW_IDMAP
    # Requests arrive by read(2) of one descriptor, and may wait for a successor.
    | InitFlag.OVER_IO_URING
    | InitFlag.REQUEST_TIMEOUT
    # Bit 43, whatever it means: libfuse never sees it, and the reply gets it from the decision alone.
    | InitFlag.IO_URING_BUFPOOL
)
"""What libfuse is never shown and no reply carries (bit 43 when a decision for extent maps says so)."""

_KNOWN = InitFlag((1 << 45) - 1)
_PASSED = _KNOWN & ~FORBIDDEN
_LOW = (1 << 32) - 1
_OLD_REQUEST = abi.IN_HEADER.size + abi.INIT_IN_OLD.size
_REQUEST = abi.IN_HEADER.size + abi.INIT_IN.size
_FLAGS_OFFSET = abi.IN_HEADER.size + 12
_SHORTEST_REPLY = abi.OUT_HEADER.size + 24


def parse_init_request(data: bytes) -> InitRequest:
    """Take an INIT request apart (protocol 4.1).

    Raises NegotiationError for anything that is not an INIT of a protocol version that can be served.
    """
    if len(data) not in (_OLD_REQUEST, _REQUEST):
        raise NegotiationError(f"the kernel sent an INIT request of {len(data)} bytes, not {_REQUEST}")
    length, opcode, unique, *_ = abi.IN_HEADER.unpack_from(data)
    if length != len(data):
        raise NegotiationError(f"the kernel sent an INIT request of {len(data)} bytes that claims {length}")
    if opcode != Opcode.INIT:
        raise NegotiationError(f"the first request of the connection is {opcode} and not INIT")
    major, minor, max_readahead, low = abi.INIT_IN_OLD.unpack_from(data, abi.IN_HEADER.size)
    if major != abi.VERSION:
        raise NegotiationError(f"the kernel speaks FUSE {major}.{minor}, this server FUSE 7")
    if minor < abi.OLDEST_MINOR:
        raise NegotiationError(f"the kernel speaks FUSE 7.{minor}: 7.{abi.OLDEST_MINOR} is the oldest that will do")
    flags = low
    if low & InitFlag.INIT_EXT:
        if len(data) != _REQUEST:
            raise NegotiationError("the kernel sent an INIT request with INIT_EXT but without room for flags2")
        flags |= abi.INIT_IN.unpack_from(data, abi.IN_HEADER.size)[4] << 32
    return InitRequest(unique, major, minor, max_readahead, InitFlag(flags))


def mask_for_libfuse(data: bytes) -> bytes:
    """The INIT request `data` as libfuse may see it, of the same length.

    It lacks the FORBIDDEN bits and every bit that this server has never heard of.
    """
    request = parse_init_request(data)
    flags = int(request.flags & _PASSED)
    masked = bytearray(data)
    masked[_FLAGS_OFFSET : _FLAGS_OFFSET + 4] = (flags & _LOW).to_bytes(4, "little")
    if len(data) == _REQUEST:
        masked[_FLAGS_OFFSET + 4 : _FLAGS_OFFSET + 8] = (flags >> 32).to_bytes(4, "little")
    return bytes(masked)


def complete_reply(
    libfuse_reply: bytes,
    request: InitRequest,
    decision: Decision,
    *,
    max_write: int,
    page_size: int = mmap.PAGESIZE,
) -> bytes:
    """The reply for the kernel, from libfuse's reply to the masked request (protocol 4.2).

    `max_write` is the most bytes of one WRITE (and of one READ) that the channel has room for; the reply
    never exceeds what libfuse said it can take. Raises NegotiationError if libfuse refused, if its reply is
    malformed, or if the decision is a failure: then `refuse_reply` is the answer.
    """
    if decision.failed:
        raise NegotiationError(decision.reason)
    payload = _libfuse_payload(libfuse_reply, request)
    (
        _major,
        _minor,
        max_readahead,
        low,
        max_background,
        congestion_threshold,
        libfuse_max_write,
        _time_gran,
        _max_pages,
        _map_alignment,
        high,
        _max_stack_depth,
        _request_timeout,
    ) = abi.INIT_OUT.unpack(payload)
    flags = InitFlag(low | (high << 32 if low & InitFlag.INIT_EXT else 0))
    flags = ((flags | WANTED) & _PASSED | decision.capability) & request.flags
    if decision.capability:
        # A new file has no map: pages that were cached for a mapping of it would hang the fault that comes after the
        # map (findings 1.8). Files with a map do not need the bit.
        flags &= ~InitFlag.DIRECT_IO_ALLOW_MMAP
    if decision.capability and not flags & decision.capability:
        raise NegotiationError("the decision is for a capability bit that the kernel did not offer")
    if not flags & InitFlag.INIT_EXT:
        flags &= InitFlag(_LOW)
    max_write = min(max_write, libfuse_max_write)
    if max_write < page_size:
        raise NegotiationError(f"writes of {max_write} bytes at most are less than a page")
    reply = abi.INIT_OUT.pack(
        abi.VERSION,
        min(request.minor, abi.MINOR),
        min(max_readahead, request.max_readahead),
        int(flags) & _LOW,
        max_background,
        congestion_threshold,
        max_write,
        1,
        min(-(-max_write // page_size), 0xFFFF) if flags & InitFlag.MAX_PAGES else 0,
        0,
        int(flags) >> 32,
        0,
        0,
    )
    return abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(reply), 0, request.unique) + reply


def own_reply(request: InitRequest, decision: Decision, *, max_write: int) -> bytes:
    """The reply for the kernel where no libfuse has been asked yet; one that is asked later must not answer."""
    bare = abi.INIT_OUT.pack(abi.VERSION, abi.MINOR, request.max_readahead, 0, 0, 0, max_write, 1, 0, 0, 0, 0, 0)
    header = abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(bare), 0, request.unique)
    return complete_reply(header + bare, request, decision, max_write=max_write)


def _libfuse_payload(reply: bytes, request: InitRequest) -> bytes:
    if len(reply) < abi.OUT_HEADER.size:
        raise NegotiationError(f"libfuse answered INIT with {len(reply)} bytes")
    length, error, unique = abi.OUT_HEADER.unpack_from(reply)
    if unique != request.unique:
        raise NegotiationError(f"libfuse answered request {unique} and not INIT, which is {request.unique}")
    if error:
        name = errno.errorcode.get(-error)
        what = f"{name} ({os.strerror(-error)})" if name else f"{error}, which is no errno"
        raise NegotiationError(f"libfuse refused INIT with {what}")
    longest = abi.OUT_HEADER.size + abi.INIT_OUT.size
    if length != len(reply) or not _SHORTEST_REPLY <= length <= longest:
        raise NegotiationError(f"libfuse answered INIT with {len(reply)} bytes that claim {length}")
    payload = reply[abi.OUT_HEADER.size :].ljust(abi.INIT_OUT.size, b"\0")
    if (major := abi.INIT_OUT.unpack(payload)[0]) != abi.VERSION:
        raise NegotiationError(f"libfuse speaks FUSE {major}, this server FUSE 7")
    return payload


def refuse_reply(unique: int, number: int) -> bytes:
    """The reply that ends the connection: INIT fails with errno `number`, which must not be 0.

    The kernel turns it into ECONNREFUSED for whoever uses the mount, so it has to go before anybody can.
    """
    if number == 0:
        raise ValueError("a refusal needs an errno")
    return abi.error_reply(unique, number)
