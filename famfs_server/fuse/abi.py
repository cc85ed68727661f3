# SPDX-License-Identifier: Apache-2.0
"""The FUSE wire format: every structure that this server reads or writes, as `struct.Struct`.

Numbers are little-endian, as on every machine with dax memory that runs famfs. Padding is skipped (`x`),
so that unpacking gives the fields with a meaning and nothing else; the order of fields is named beside each
structure. Sizes are asserted when the module is imported (protocol 6.2, 4.1, 4.2, 1.3).

What differs between generations of famfs kernels (opcodes, capability bit, limits) is data of
`famfs_server.fuse.dialects` and not here.
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

VERSION = 7
"""Major version of the protocol; there is no other."""

MINOR = 45
"""The newest minor version whose structures this module describes."""

OLDEST_MINOR = 31
"""The oldest minor version that is served: kernel 5.2, the first with detached mounts."""

ROOT_ID = 1
"""nodeid of the root directory."""

MIN_READ_BUFFER = 8192
"""A read of /dev/fuse with a smaller buffer is EINVAL."""

UNIQUE_RESEND = 1 << 63
"""Bit of `unique` that marks a request sent again after NOTIFY_RESEND."""

UNIQUE_INTERRUPT = 1
"""Bit of `unique` that an INTERRUPT request carries; ordinary ones are even."""

MAX_ERRNO = 511
"""The kernel refuses replies with a larger error and keeps the request (protocol 2.2)."""


class Opcode(IntEnum):
    """What a request asks for. 7 and 19 have never been assigned."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Notify(IntEnum):
    """Codes of notifications: messages from the server with `unique` 0."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7
    INC_EPOCH = 8
    PRUNE = 9


class InitFlag(IntFlag):
    """Bits of `flags | flags2 << 32` of INIT (protocol 4.3)."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    INIT_RESERVED = 1 << 31
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42
    """On minor 42 this bit was famfs's (RFC of 2025)."""
    DAX_FMAP = 1 << 43
    """famfs up to minor 45 ..."""
    IO_URING_BUFPOOL = 1 << 43
    """... and something else from minor 46 on: an alias of the same bit."""
    ATTR_GENERATION = 1 << 44


class SetattrValid(IntEnum):
    """`valid` of SETATTR (FATTR_*): which fields are to be set."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


# Plain numbers for the hot path: to get at a member of an enumeration costs as much as a few lines of it.
SETS_SIZE: Final = int(SetattrValid.SIZE)
SETS_TIMES: Final = SetattrValid.ATIME | SetattrValid.MTIME | SetattrValid.CTIME


class OpenFlag(IntEnum):
    """`open_flags` of the replies to OPEN, CREATE and OPENDIR (FOPEN_*)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


GETATTR_FH = 1 << 0
WRITE_CACHE = 1 << 0
WRITE_LOCKOWNER = 1 << 1
WRITE_KILL_SUIDGID = 1 << 2
READ_LOCKOWNER = 1 << 1
RELEASE_FLUSH = 1 << 0
RELEASE_FLOCK_UNLOCK = 1 << 1
FSYNC_FDATASYNC = 1 << 0
OPEN_KILL_SUIDGID = 1 << 0
LK_FLOCK = 1 << 0
EXPIRE_ONLY = 1 << 0
IOCTL_COMPAT = 1 << 0
IOCTL_UNRESTRICTED = 1 << 1
IOCTL_RETRY = 1 << 2
IOCTL_32BIT = 1 << 3
IOCTL_DIR = 1 << 4
IOCTL_COMPAT_X32 = 1 << 5


def _wire(layout: str, size: int) -> Struct:
    structure = Struct("<" + layout)
    if structure.size != size:
        raise AssertionError(f"wire structure {layout!r} has {structure.size} bytes and not {size}")
    return structure


_HEADER = "IiQ"
_ATTR = "6Q10I"
_ENTRY = "4Q2I" + _ATTR
_ATTR_OUT = "QI4x" + _ATTR
_OPEN_OUT = "QIi"
_DIRENT = "QQII"

# Headers.
IN_HEADER = _wire("IIQQIIIH2x", 40)
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen (in units of 8 bytes)"""
OUT_HEADER = _wire(_HEADER, 16)
"""len, error (0 or -errno; a code in notifications), unique"""

# INIT.
INIT_IN = _wire("5I44x", 64)
"""major, minor, max_readahead, flags, flags2"""
INIT_IN_OLD = _wire("4I", 16)
"""The same before minor 36, without flags2."""
INIT_OUT = _wire("4I2H2I2H2IH22x", 64)
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout"""

# Attributes and names.
ATTR = _wire(_ATTR, 88)
"""ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev,
blksize, flags"""
ENTRY_OUT = _wire(_ENTRY, 128)
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, attr"""
ATTR_OUT = _wire(_ATTR_OUT, 104)
"""attr_valid, attr_valid_nsec, attr"""
GETATTR_IN = _wire("I4xQ", 16)
"""getattr_flags, fh"""
SETATTR_IN = _wire("I4x3Q3Q3II4xII4x", 88)
"""valid, fh, size, lock_owner, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, uid, gid"""
STATX_IN = _wire("I4xQII", 24)
"""getattr_flags, fh, sx_flags, sx_mask"""
STATX_OUT = _wire("QII16x" + "IIQ3IH2x4Q" + "qI4x" * 4 + "4I112x", 288)
"""attr_valid, attr_valid_nsec, flags; mask, blksize, attributes, nlink, uid, gid, mode, ino, size, blocks,
attributes_mask; (seconds, nanoseconds) of atime, btime, ctime, mtime; rdev major and minor, dev major and
minor"""
FORGET_IN = _wire("Q", 8)
"""nlookup"""
BATCH_FORGET_IN = _wire("I4x", 8)
"""count; as many FORGET_ONE follow"""
FORGET_ONE = _wire("QQ", 16)
"""nodeid, nlookup"""
ACCESS_IN = _wire("I4x", 8)
"""mask"""

# Names made, moved and removed; the names follow, each ended by NUL.
MKNOD_IN = _wire("3I4x", 16)
"""mode, rdev, umask"""
MKDIR_IN = _wire("II", 8)
"""mode, umask"""
CREATE_IN = _wire("4I", 16)
"""flags, mode, umask, open_flags; TMPFILE has the same"""
RENAME_IN = _wire("Q", 8)
"""newdir"""
RENAME2_IN = _wire("QI4x", 16)
"""newdir, flags"""
LINK_IN = _wire("Q", 8)
"""oldnodeid"""

# Open files.
OPEN_IN = _wire("II", 8)
"""flags, open_flags; OPENDIR has the same"""
OPEN_OUT = _wire(_OPEN_OUT, 16)
"""fh, open_flags, backing_id"""
CREATE_OUT = _wire(_ENTRY + _OPEN_OUT, 144)
"""entry, then open"""
RELEASE_IN = _wire("QIIQ", 24)
"""fh, flags, release_flags, lock_owner; RELEASEDIR has the same"""
FLUSH_IN = _wire("Q8xQ", 24)
"""fh, lock_owner"""
READ_IN = _wire("QQIIQI4x", 40)
"""fh, offset, size, read_flags, lock_owner, flags; READDIR and READDIRPLUS have the same"""
WRITE_IN = _wire("QQIIQI4x", 40)
"""fh, offset, size, write_flags, lock_owner, flags; the data follow"""
WRITE_OUT = _wire("I4x", 8)
"""size; COPY_FILE_RANGE answers with the same"""
FSYNC_IN = _wire("QI4x", 16)
"""fh, fsync_flags; FSYNCDIR has the same"""
SYNCFS_IN = _wire("8x", 8)
LSEEK_IN = _wire("QQI4x", 24)
"""fh, offset, whence"""
LSEEK_OUT = _wire("Q", 8)
"""offset"""
FALLOCATE_IN = _wire("3QI4x", 32)
"""fh, offset, length, mode"""
COPY_FILE_RANGE_IN = _wire("7Q", 56)
"""fh_in, off_in, nodeid_out, fh_out, off_out, len, flags"""
COPY_FILE_RANGE_64_OUT = _wire("Q", 8)
"""bytes_copied"""
FILE_LOCK = _wire("QQII", 24)
"""start, end, type, pid"""
LK_IN = _wire("QQ" + "QQII" + "I4x", 48)
"""fh, owner, lock, lk_flags"""
IOCTL_IN = _wire("QIIQII", 32)
"""fh, flags, cmd, arg, in_size, out_size; the input follows"""
IOCTL_OUT = _wire("iIII", 16)
"""result, flags, in_iovs, out_iovs; the output follows"""
POLL_IN = _wire("QQII", 24)
"""fh, kh, flags, events"""
BMAP_IN = _wire("QI4x", 16)
"""block, blocksize"""
INTERRUPT_IN = _wire("Q", 8)
"""unique of the request to be interrupted"""

# Extended attributes and the file system as a whole.
GETXATTR_IN = _wire("I4x", 8)
"""size; LISTXATTR has the same; the name follows"""
GETXATTR_OUT = _wire("I4x", 8)
"""size"""
SETXATTR_IN = _wire("II", 8)
"""size, flags; name and value follow (SETXATTR_EXT is never negotiated)"""
STATFS_OUT = _wire("5Q3I4x24x", 80)
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize"""

# Directory listings; the name follows, padded with zeros to 8 bytes.
DIRENT = _wire(_DIRENT, 24)
"""ino, off, namelen, type"""
DIRENTPLUS = _wire(_ENTRY + _DIRENT, 152)
"""entry, then dirent"""

# Notifications.
NOTIFY_INVAL_INODE = _wire("Qqq", 24)
"""nodeid, off, len (off < 0: attributes only; len 0: to the end)"""
NOTIFY_INVAL_ENTRY = _wire("QII", 16)
"""parent, namelen, flags; the name and a NUL follow"""

# famfs (protocol 1.3).
FMAP_HEADER = _wire("BxHIIIQ8x", 32)
"""file_type, version, ext_type, nextents, fmap_size, file_size"""
FMAP_EXTENT = _wire("I4xQQ", 24)
"""devindex, offset, len; a simple extent or a strip"""
FMAP_INTERLEAVED = _wire("IIQ8x", 24)
"""nstrips, chunk_size, nbytes; as many FMAP_EXTENT follow"""
GET_FMAP_IN = _wire("I4x", 8)
"""size of the largest reply that the kernel takes; in push dialects only"""
DAXDEV_OUT = _wire("H22x256s", 280)
"""index, name (absolute path, NUL-terminated)"""
BACKING_MAP = _wire("iIQ", 16)
"""fd, flags, daxdev_index; argument of the ioctl that pushes a device"""

FMAP_VERSION = 1
FMAP_SIMPLE = 0
FMAP_INTERLEAVE = 1

# Whole replies for the hot requests: header and payload in one call.
ENTRY_REPLY = _wire(_HEADER + _ENTRY, 144)
ATTR_REPLY = _wire(_HEADER + _ATTR_OUT, 120)
OPEN_REPLY = _wire(_HEADER + _OPEN_OUT, 32)
CREATE_REPLY = _wire(_HEADER + _ENTRY + _OPEN_OUT, 160)
WRITE_REPLY = _wire(_HEADER + "I4x", 24)
STATFS_REPLY = _wire(_HEADER + "5Q3I4x24x", 96)


def dirent_size(namelen: int) -> int:
    """Bytes that a READDIR record takes for a name of `namelen` bytes, padding included."""
    return (DIRENT.size + namelen + 7) & ~7


def direntplus_size(namelen: int) -> int:
    """Bytes that a READDIRPLUS record takes for a name of `namelen` bytes, padding included."""
    return (DIRENTPLUS.size + namelen + 7) & ~7


def error_reply(unique: int, errno: int) -> bytes:
    """The reply that ends a request with `errno` (positive; 0 for success without payload).

    Raises ValueError for a number that the kernel would refuse, because it would keep the request and its
    caller would hang (protocol 2.2).
    """
    if not 0 <= errno <= MAX_ERRNO:
        raise ValueError(f"errno {errno} cannot be sent to the kernel")
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def inval_inode(nodeid: int, offset: int, length: int) -> bytes:
    """A notification: forget attributes of an inode and, from `offset` on, its pages.

    A negative `offset` means attributes only, `length` 0 to the end of the file.
    """
    size = OUT_HEADER.size + NOTIFY_INVAL_INODE.size
    return OUT_HEADER.pack(size, Notify.INVAL_INODE, 0) + NOTIFY_INVAL_INODE.pack(nodeid, offset, length)


def inval_entry(parent: int, name: bytes, flags: int = 0) -> bytes:
    """A notification: forget the name `name` in the directory `parent`."""
    size = OUT_HEADER.size + NOTIFY_INVAL_ENTRY.size + len(name) + 1
    header = OUT_HEADER.pack(size, Notify.INVAL_ENTRY, 0)
    return header + NOTIFY_INVAL_ENTRY.pack(parent, len(name), flags) + name + b"\0"


def resend() -> bytes:
    """A notification: send again every request that was read and not answered."""
    return OUT_HEADER.pack(OUT_HEADER.size, Notify.RESEND, 0)
