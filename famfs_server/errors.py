# SPDX-License-Identifier: Apache-2.0
"""Everything that can go wrong, as exceptions that know their exit status and their errno.

The message of an exception is one line for a user: the cause, and what to do about it. A class holds
two numbers: `exit_status`, what a `famfs` command ends with, and `errno`, what a system call on the
mount answers when the error reaches it.
"""

import errno


class FamfsError(Exception):
    """The base of every error that a user can cause or meet."""

    exit_status: int = 1
    errno: int = errno.EIO


class UsageError(FamfsError):
    """A command line or an option that cannot mean anything."""

    exit_status = 2
    errno = errno.EINVAL


class PrivilegeError(FamfsError):
    """A capability or permission is missing."""

    errno = errno.EPERM


class DeviceError(FamfsError):
    """The dax device is absent, of the wrong kind or of the wrong size."""

    errno = errno.ENODEV


class DeviceModeError(DeviceError):
    """The dax device is bound to a driver under which the operation is impossible."""


class DeviceBusyError(DeviceError):
    """Somebody else holds the device."""

    exit_status = errno.EBUSY
    errno = errno.EBUSY


class DeviceFaultError(FamfsError):
    """Memory of the device cannot be read or written: poisoned, truncated or unbound."""

    errno = errno.EIO


class SpaceBusyError(DeviceError):
    """New space of a device in famfs mode that the kernel still knows, or knows already, by another file."""

    errno = errno.EBUSY


class MediaError(FamfsError):
    """The superblock or the log on the device is not valid."""

    errno = errno.EINVAL


class RoleError(FamfsError):
    """This host is not the master of the file system."""

    errno = errno.EROFS


class LogFullError(FamfsError):
    """The metadata log has no room for another entry."""

    errno = errno.ENOSPC


class NoSpaceError(FamfsError):
    """The devices have no room of the size and shape that was asked for."""

    errno = errno.ENOSPC


class PathError(FamfsError):
    """A path that the file system cannot hold."""

    errno = errno.EINVAL


class NameTooLongError(PathError):
    """A path longer than the format can store."""

    errno = errno.ENAMETOOLONG


class NoSuchPathError(PathError):
    """A path, or a parent of it, does not exist."""

    errno = errno.ENOENT


class NotADirectoryPathError(PathError):
    """A parent of the path is a file."""

    errno = errno.ENOTDIR


class ExistsError(PathError):
    """The path exists already."""

    errno = errno.EEXIST


class NegotiationError(FamfsError):
    """The kernel and this server cannot agree on a protocol."""

    exit_status = 32
    errno = errno.EPROTO


class HandoverError(FamfsError):
    """What a running server would hand over cannot be taken over by this program."""

    exit_status = 32
    errno = errno.EPROTO


class MountError(FamfsError):
    """The kernel refused a step of mounting or unmounting."""

    exit_status = 32
