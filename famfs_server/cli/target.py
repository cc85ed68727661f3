# SPDX-License-Identifier: Apache-2.0
"""Where a command works: a file system that is mounted, or one on a device that is not, behind one face.

A command asks `Targets` for the place that a path names and never learns which of the two it is.
"""

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from uuid import UUID

import click

from famfs_server.daemon.control_client import DirectoryRequest, FileRequest
from famfs_server.errors import NoSuchPathError, PathError, UsageError
from famfs_server.fuse import kernels, mountapi

if TYPE_CHECKING:
    from famfs_server.volume.volume import Volume

META = b".meta"


class NotFamfsError(PathError):
    """The path does not lie in a famfs file system."""


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a file or directory. `size` in bytes, `mode` permission bits only."""

    is_directory: bool
    is_file: bool
    size: int
    mode: int


Advance = Callable[[int], None]
"""Is told how many more bytes are done."""


FLUSHED_AT_ONCE = 64 << 20
"""Bytes between two words of a flush about how far it is."""


def unseen(_done: int) -> None:
    """Nobody wants to know how far something is."""


class OpenFile(Protocol):
    """A file of the file system whose bytes can be moved. Offsets and lengths are in bytes."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range; shorter only at the end of the file."""

    def write(self, offset: int, data: memoryview) -> None:
        """Store all of `data`, or raise."""

    def flush(self, advance: Advance = unseen) -> None:
        """Write everything back to memory, where other hosts see it."""

    def close(self) -> None:
        """Give the file back."""


class Target(ABC):
    """One file system. Paths are bytes, normalised, relative to its root; the root's is empty."""

    @abstractmethod
    def status(self, path: bytes) -> Status | None:
        """The file or directory at `path`, or nothing."""

    @abstractmethod
    def create(self, files: Sequence[FileRequest]) -> None:
        """Make `files`: all of them, or none."""

    @abstractmethod
    def put(self, files: Sequence[FileRequest], data: Iterable[memoryview]) -> None:
        """Make `files` with their data: all of them, or none. `data` are their bytes, one file after the other, in
        pieces of any size. Nobody sees a file before all of them are in memory."""

    @abstractmethod
    def mkdir(self, path: bytes, mode: int, uid: int, gid: int) -> None:
        """Make a directory."""

    @abstractmethod
    def make_directories(self, directories: Sequence[DirectoryRequest]) -> None:
        """Make directories in this order, but for those that exist already."""

    @abstractmethod
    def open(self, path: bytes, *, writable: bool = False) -> OpenFile:
        """Open a file for its bytes."""

    @property
    @abstractmethod
    def mapped(self) -> bool:
        """Whether stores may sit in CPU caches that the daemon knows nothing of (decisions 11)."""

    @abstractmethod
    def volume(self) -> "Volume":
        """The file system's metadata, to look at."""

    @abstractmethod
    def add_device(self, uuid: UUID, path: str) -> None:
        """Make the device at `path`, whose superblock is there already, part of the file system."""

    @abstractmethod
    def follow(self) -> None:
        """Take in what other hosts have appended to the log."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True, slots=True)
class Place:
    """A path in a file system; `name` is what the user called it."""

    target: Target
    path: bytes
    name: str

    def below(self, name: bytes) -> "Place":
        """The place of `name` in this directory."""
        path = self.path + b"/" + name if self.path else name
        return Place(self.target, path, os.path.join(self.name, os.fsdecode(name)))

    def status(self) -> Status | None:
        """What is at this place, if anything is."""
        return self.target.status(self.path)

    def require_file(self) -> Status:
        """The status of the file here. Raises PathError for a directory or for nothing."""
        found = self.status()
        if found is None:
            raise NoSuchPathError(f"{self.name}: {os.strerror(errno.ENOENT)}")
        if not found.is_file:
            raise PathError(f"{self.name}: is not a regular file")
        return found


@dataclass(frozen=True, slots=True)
class Unmounted:
    """A file system that is not mounted: the device with its log, and where its further devices are, by UUID."""

    device: str
    further: tuple[tuple[UUID, str], ...] = ()


class Targets:
    """Finds the file system of each path that a command was given; gives all of them back at the end.

    `daxdev` names the device whose file system is meant, not mounted here; paths are relative to its root then.
    """

    def __init__(self, daxdev: Unmounted | None, *, write: bool) -> None:
        self._daxdev = daxdev
        self._write = write
        self._stack = ExitStack()
        self._open: dict[str | int, Target] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def find(self, path: str) -> Place:
        """The place that `path` names. Raises NotFamfsError for one outside of any famfs file system."""
        if not path:
            raise PathError("a path must not be empty")
        if self._daxdev is not None:
            from famfs_server.cli.unmounted import DeviceTarget, relative_path

            named, write = self._daxdev, self._write
            target = self._target(named.device, lambda: DeviceTarget(named, write=write))
            return Place(target, relative_path(path), path)
        try:
            mount, inside = find_mount(path)
        except NotFamfsError as error:
            raise NotFamfsError(f"{error} (--daxdev names a device that is not mounted)") from None
        return Place(self._target(mount.mount_id, lambda: _mounted(mount)), inside, path)

    def _target(self, key: str | int, make: Callable[[], Target]) -> Target:
        if key not in self._open:
            target = make()
            self._stack.callback(target.close)
            self._open[key] = target
        return self._open[key]


def _mounted(mount: mountapi.MountRecord) -> Target:
    from famfs_server.cli.mounted import MountedTarget

    return MountedTarget(mount)


def find_mount(path: str) -> tuple[mountapi.MountRecord, bytes]:
    """The famfs mount that `path` lies in, and the path relative to the root of its file system."""
    real = os.path.realpath(path)
    # The last of the longest: later mounts cover earlier ones.
    covering: mountapi.MountRecord | None = None
    for record in mountapi.parse_mountinfo():
        point = record.mount_point.rstrip("/")
        longer = covering is None or len(record.mount_point) >= len(covering.mount_point)
        if (real == point or real.startswith(point + "/")) and longer:
            covering = record
    if covering is None or covering.fstype not in kernels.SHOWN_TYPES:
        raise NotFamfsError(f"{path or repr(path)}: not in a mounted famfs file system")
    inside = os.path.relpath(real, covering.mount_point)
    whole = os.path.normpath(os.path.join(covering.root, inside)).strip("/")
    return covering, b"" if whole == "." else os.fsencode(whole)


def names_device(path: str) -> bool:
    """Whether `path` is a device, or a file that stands for one, and no place in a mounted file system.

    Raises OSError for what is not there, but in a mounted file system.
    """
    try:
        find_mount(path)
    except NotFamfsError:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    return False


def this_host() -> UUID | None:
    """This host's UUID; nothing where it is unknown, which makes the host a client."""
    from famfs_server.dax import hostid

    try:
        return hostid.system_uuid()
    except hostid.HostIdError:
        return None


def unmounted(words: Sequence[str]) -> Unmounted | None:
    """What --daxdev means, if it was given: one device, and further ones as UUID=PATH. Raises UsageError."""
    devices, further = [], []
    for word in words:
        text, _, path = word.partition("=")
        try:
            further.append((UUID(text), path))
        except ValueError:
            devices.append(word)
            continue
        if not path:
            raise UsageError(f"--daxdev {word}: write UUID=PATH")
    if len(devices) == 1:
        return Unmounted(devices[0], tuple(further))
    if devices or further:
        raise UsageError("--daxdev names the device of the file system once, and further devices as UUID=PATH")
    return None


def daxdev_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --daxdev."""
    return click.option(
        "--daxdev",
        multiple=True,
        callback=lambda _context, _option, words: unmounted(words),
        metavar="DEV",
        help="Work on this device, not mounted here; paths are relative to its root. UUID=PATH: a further device.",
    )(function)
