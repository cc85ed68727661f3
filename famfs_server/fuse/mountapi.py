# SPDX-License-Identifier: Apache-2.0
"""Mounting in two steps: a FUSE mount that is live but that no path leads to, then the attach.

fsopen, fsconfig and fsmount make the mount; INIT can be answered, devices registered and a file opened while
nobody else can see it; move_mount shows it. Whatever fails before that leaves nothing behind. Called by
system call number, since the C library's wrappers are younger than the calls (kernel 5.2).
"""

import ctypes
import errno
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from types import TracebackType
from typing import Self

from famfs_server.errors import MountError, UsageError
from famfs_server.fuse import kernels
from famfs_server.fuse.kernels import KernelFuse

# The same numbers on every architecture but alpha.
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_OPEN_TREE_CLONE = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_SYMLINKS = 0x10
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class MountAttr(IntFlag):
    """Attributes of a mount (not of the file system in it). The atime rules are one field and not bits."""

    RDONLY = 0x01
    NOSUID = 0x02
    NODEV = 0x04
    NOEXEC = 0x08
    NOATIME = 0x10
    STRICTATIME = 0x20
    NODIRATIME = 0x80
    NOSYMFOLLOW = 0x200000


DEFAULT_ATTRIBUTES = MountAttr.NOSUID | MountAttr.NODEV
"""The media come from another host and can carry setuid modes."""

_ATIME_FIELD = MountAttr.NOATIME | MountAttr.STRICTATIME

OPTION_ATTRIBUTES: dict[str, tuple[MountAttr, MountAttr]] = {
    "ro": (MountAttr.RDONLY, MountAttr(0)),
    "rw": (MountAttr(0), MountAttr.RDONLY),
    "nosuid": (MountAttr.NOSUID, MountAttr(0)),
    "suid": (MountAttr(0), MountAttr.NOSUID),
    "nodev": (MountAttr.NODEV, MountAttr(0)),
    "dev": (MountAttr(0), MountAttr.NODEV),
    "noexec": (MountAttr.NOEXEC, MountAttr(0)),
    "exec": (MountAttr(0), MountAttr.NOEXEC),
    "noatime": (MountAttr.NOATIME, _ATIME_FIELD),
    "atime": (MountAttr(0), _ATIME_FIELD),
    "relatime": (MountAttr(0), _ATIME_FIELD),
    "strictatime": (MountAttr.STRICTATIME, _ATIME_FIELD),
    "nodiratime": (MountAttr.NODIRATIME, MountAttr(0)),
    "diratime": (MountAttr(0), MountAttr.NODIRATIME),
    "nosymfollow": (MountAttr.NOSYMFOLLOW, MountAttr(0)),
    "symfollow": (MountAttr(0), MountAttr.NOSYMFOLLOW),
}
"""Mount option: (attributes that it sets, attributes that it clears first)."""


def attributes_from_options(options: Iterable[str]) -> MountAttr:
    """Mount attributes from words like `ro` or `noexec`; a later word wins over an earlier one.

    Starts from DEFAULT_ATTRIBUTES. Raises UsageError for a word that is not in OPTION_ATTRIBUTES.
    """
    attributes = DEFAULT_ATTRIBUTES
    for option in options:
        if option not in OPTION_ATTRIBUTES:
            raise UsageError(f"mount option {option!r} is no attribute of a mount")
        added, cleared = OPTION_ATTRIBUTES[option]
        attributes = attributes & ~cleared | added
    return attributes


def _failure(what: str, number: int, hint: str | None = None) -> MountError:
    error = MountError(f"{what}: {hint or os.strerror(number)}")
    error.errno = number
    return error


def _call(number: int, *arguments: int | bytes | None) -> int:
    """A system call; OSError with its errno. The interpreter lock is released meanwhile."""
    words = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _context_messages(context: int) -> str | None:
    """What the kernel wrote into the log of a file system context, as one line."""
    messages = []
    while True:
        try:
            message = os.read(context, 4096)
        except OSError:
            break
        messages.append(message.decode(errors="replace").partition(" ")[2].strip())
    return "; ".join(messages) or None


class DetachedMount:
    """A FUSE mount without a path, owned by a descriptor; closing that unattached ends the connection.

    As long as somebody has a file of the mount open, the connection outlives the descriptor.
    """

    def __init__(self, fd: int) -> None:
        """Take over `fd`, a descriptor that fsmount returned (here, or in the process that passed it on)."""
        self._fd = fd

    @classmethod
    def create(
        cls,
        fuse_fd: int,
        source: str,
        *,
        kernel: KernelFuse = kernels.SYSTEM,
        read_only: bool = False,
        attributes: MountAttr = DEFAULT_ATTRIBUTES,
        allow_other: bool = True,
        default_permissions: bool = True,
    ) -> Self:
        """Make the mount that `fuse_fd`, a fresh descriptor of `kernel.device`, serves. INIT is queued on return.

        `source` is shown as the device in /proc/mounts. Needs CAP_SYS_ADMIN; CAP_SYS_RAWIO in this very
        thread is what makes a famfs kernel offer extent maps (protocol 3.1). Raises
        MountError with the cause.
        """
        try:
            context = _call(_FSOPEN, kernel.fstype.encode(), _FSOPEN_CLOEXEC)
        except OSError as error:
            hints = {
                errno.ENODEV: f"the kernel has no such file system: load the module {kernel.name}",
                errno.ENOSYS: "the kernel has no fsopen: 5.2 is the oldest that will do",
                errno.EPERM: "CAP_SYS_ADMIN is missing",
            }
            number = error.errno or errno.EIO
            raise _failure("cannot make a FUSE mount", number, hints.get(number)) from None
        strings = {
            "source": source,
            **({} if kernel.subtype is None else {"subtype": kernel.subtype}),
            "fd": str(fuse_fd),
            "rootmode": "40000",
            "user_id": str(os.getuid()),
            "group_id": str(os.getgid()),
        }
        flags = {"allow_other": allow_other, "default_permissions": default_permissions}
        try:
            for key, value in strings.items():
                # The descriptor too goes as a string: FSCONFIG_SET_FD is EINVAL on 6.18.
                _call(_FSCONFIG, context, _SET_STRING, key.encode(), os.fsencode(value), 0)
            for key, wanted in flags.items():
                if wanted:
                    _call(_FSCONFIG, context, _SET_FLAG, key.encode(), None, 0)
            _call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
            bits = attributes | MountAttr.RDONLY if read_only else attributes
            return cls(_call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, int(bits)))
        except OSError as error:
            message = _context_messages(context)
            raise _failure(f"cannot make a FUSE mount of {source}", error.errno or errno.EIO, message) from None
        finally:
            os.close(context)

    @property
    def fd(self) -> int:
        """The mount as a directory descriptor; -1 after `close`."""
        return self._fd

    @property
    def device(self) -> int:
        """Device number of the file system, as in st_dev. Sends no request, so the server itself may ask."""
        status = ctypes.create_string_buffer(256)
        result: int = _libc.statx(self._fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, status)
        if result < 0:
            raise _failure("cannot ask a detached mount for its device number", ctypes.get_errno())
        major, minor = (int.from_bytes(status.raw[at : at + 4], "little") for at in (0x88, 0x8C))
        return os.makedev(major, minor)

    def attach(self, path: str | os.PathLike[str]) -> None:
        """Show the mount at `path`. The descriptor stays open, and umount says busy until it is closed.

        Raises MountError; the mount then stays detached.
        """
        try:
            flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_SYMLINKS
            _call(_MOVE_MOUNT, self._fd, b"", _AT_FDCWD, os.fsencode(path), flags)
        except OSError as error:
            hints = {
                errno.ENOENT: "no such directory",
                errno.ENOTDIR: "not a directory",
                errno.EINVAL: "not a directory, or no place for mounts",
                errno.EPERM: "CAP_SYS_ADMIN is missing",
            }
            number = error.errno or errno.EIO
            raise _failure(f"cannot mount at {os.fspath(path)}", number, hints.get(number)) from None

    def clone(self) -> int:
        """A descriptor of a private copy of the mount.

        What is mapped through it does not keep the visible mount busy, but does keep the file system.
        """
        try:
            return _call(_OPEN_TREE, self._fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
        except OSError as error:
            raise _failure("cannot copy a mount", error.errno or errno.EIO) from None

    def close(self) -> None:
        """Let go of the descriptor; an unattached mount is gone then. May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unmount(path: str | os.PathLike[str], *, lazy: bool = False, force: bool = False) -> None:
    """Unmount what is mounted at `path`, which is not followed if it is a symbolic link.

    `lazy` detaches it at once and frees it when the last user is gone; `force` aborts the connection first.
    Raises MountError.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0) | (_MNT_FORCE if force else 0)
    result: int = _libc.umount2(os.fsencode(path), flags)
    if result == 0:
        return
    number = ctypes.get_errno()
    hints = {
        errno.EBUSY: "a program has a file or its working directory there (see fuser -vm)",
        errno.EINVAL: "nothing is mounted there",
        errno.ENOENT: "no such directory",
        errno.EPERM: "CAP_SYS_ADMIN is missing",
    }
    raise _failure(f"cannot unmount {os.fspath(path)}", number, hints.get(number))


@dataclass(frozen=True)
class MountRecord:
    """One line of mountinfo; paths and names unescaped."""

    mount_id: int
    parent_id: int
    device: int
    """As in st_dev: os.major and os.minor take it apart."""
    root: str
    mount_point: str
    options: tuple[str, ...]
    fstype: str
    """One of `kernels.SHOWN_TYPES` for mounts of this server."""
    source: str
    super_options: tuple[str, ...]


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def parse_mountinfo(path: str | os.PathLike[str] = "/proc/self/mountinfo") -> list[MountRecord]:
    """Every mount of the mount namespace, in the order of mountinfo (later ones cover earlier ones)."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        fields = line.split(b" ")
        separator = fields.index(b"-", 6)
        major, _, minor = fields[2].partition(b":")
        fstype, source, super_options = fields[separator + 1 : separator + 4]
        records.append(
            MountRecord(
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                device=os.makedev(int(major), int(minor)),
                root=_unescape(fields[3]),
                mount_point=_unescape(fields[4]),
                options=tuple(_unescape(fields[5]).split(",")),
                fstype=_unescape(fstype),
                source=_unescape(source),
                super_options=tuple(_unescape(super_options).split(",")),
            )
        )
    return records


def find_mounts(
    *,
    source: str | None = None,
    mount_point: str | None = None,
    fstypes: Collection[str] = kernels.SHOWN_TYPES,
    path: str | os.PathLike[str] = "/proc/self/mountinfo",
) -> list[MountRecord]:
    """Mounts of one of these types of this source, at this mount point, or both. Touches none of them."""
    return [
        record
        for record in parse_mountinfo(path)
        if record.fstype in fstypes and source in (None, record.source) and mount_point in (None, record.mount_point)
    ]


def abort_connection(dev_minor: int, connections: Path = kernels.SYSTEM.connections) -> bool:
    """Abort the FUSE connection whose file system has this minor device number.

    Every request of it ends, every later one fails with ENOTCONN. False if there is no such connection, or
    if the control file system is not mounted at `connections`.
    """
    try:
        # Never created: in a real directory, where fusectl is not mounted, there is no such file.
        fd = os.open(connections / str(dev_minor) / "abort", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
    return True
