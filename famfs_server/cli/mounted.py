# SPDX-License-Identifier: Apache-2.0
"""A mounted file system as a command's target: ordinary system calls for data, the control socket for creation."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID

from famfs_server.cli.progress import reading_log
from famfs_server.cli.target import FLUSHED_AT_ONCE, Advance, Status, Target, this_host, unseen
from famfs_server.daemon.control_client import ControlClient, DirectoryRequest, FileRequest
from famfs_server.errors import DeviceFaultError, FamfsError, MediaError
from famfs_server.fuse.mountapi import MountRecord

if TYPE_CHECKING:
    from famfs_server.volume.volume import Volume


class MountedTarget(Target):
    """The file system of one mount."""

    def __init__(self, mount: MountRecord) -> None:
        self._mount = mount
        self._hidden = os.fsencode(mount.root.strip("/"))
        """What of the file system's tree lies above the mount: a bind mount shows a part only."""
        self._volume: Volume | None = None
        self._meta: MetaMemory | None = None

    @cached_property
    def _control(self) -> ControlClient:
        return ControlClient.of_mount(self._mount.mount_point)

    def _path(self, path: bytes) -> bytes:
        inside = path[len(self._hidden) :].lstrip(b"/") if self._hidden else path
        return os.path.join(os.fsencode(self._mount.mount_point), inside)

    def status(self, path: bytes) -> Status | None:
        try:
            found = os.lstat(self._path(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        mode = found.st_mode
        return Status(stat.S_ISDIR(mode), stat.S_ISREG(mode), found.st_size, stat.S_IMODE(mode))

    def create(self, files: Sequence[FileRequest]) -> None:
        self._control.create(files)

    def put(self, files: Sequence[FileRequest], data: Iterable[memoryview]) -> None:
        self._control.put(files, data)

    def mkdir(self, path: bytes, mode: int, uid: int, gid: int) -> None:
        self._control.mkdir(path, mode, uid, gid)

    def make_directories(self, directories: Sequence[DirectoryRequest]) -> None:
        self._control.make_directories(directories)

    def open(self, path: bytes, *, writable: bool = False) -> "MountedFile":
        return MountedFile(self._path(path), writable=writable, mapped=self.mapped)

    @cached_property
    def mapped(self) -> bool:
        try:
            return self._control.status().get("data_path") != "server"
        except FamfsError:
            return True

    def volume(self) -> "Volume":
        """Read from the files in `.meta`, so that every user of the mount can look."""
        if self._volume is None:
            from famfs_server.volume.volume import Volume

            with reading_log(self._mount.source) as reading:
                self._volume = Volume(self.memory(), this_host(), self._mount.source, reading=reading)
        return self._volume

    def memory(self) -> "MetaMemory":
        """The superblock and the log as memory, for whoever wants to read them raw."""
        if self._meta is None:
            self._meta = MetaMemory(self._mount.mount_point)
        return self._meta

    def add_device(self, uuid: UUID, path: str) -> None:
        self._control.add_device(uuid, path)

    def follow(self) -> None:
        # A name that is not there makes the daemon look at the log before it answers (design, "No stale misses").
        with contextlib.suppress(FileNotFoundError):
            os.lstat(os.path.join(self._mount.mount_point, f".famfs-logplay-{os.getpid()}"))
        if self._volume is not None:
            self._volume.refresh()

    def close(self) -> None:
        if self._volume is not None:
            self._volume.close()
        if self._meta is not None:
            self._meta.close()


class MountedFile:
    """A file of the mount, open. Its bytes move by pread and pwrite."""

    def __init__(self, path: bytes, *, writable: bool, mapped: bool) -> None:
        self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._name = path
        self._mapped = mapped
        found = os.fstat(self._fd)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range; shorter only at the end of the file."""
        parts = []
        while length > 0:
            part = os.pread(self._fd, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def write(self, offset: int, data: memoryview) -> None:
        """Store all of `data`, or raise."""
        while data:
            done = os.pwrite(self._fd, data, offset)
            if done <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), self._name)
            offset, data = offset + done, data[done:]

    def flush(self, advance: Advance = unseen) -> None:
        """Write everything back to memory, where other hosts see it.

        fsync asks the daemon, which knows nothing of stores to a mapped file; those lines are written back here.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            # Where the kernel maps the device itself there is nobody to ask.
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
        if self._mapped and self.size:
            import mmap

            from famfs_server.dax import cacheline

            mapping = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
            with mapping, memoryview(mapping) as view:
                for start in range(0, self.size, FLUSHED_AT_ONCE):
                    cacheline.invalidate(view, start, min(FLUSHED_AT_ONCE, self.size - start))
                    advance(min(FLUSHED_AT_ONCE, self.size - start))
            return
        advance(self.size)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)


class MetaMemory:
    """The metadata of a mounted volume, read through `.meta/.superblock` and `.meta/.log`.

    Stands for the device's memory where only metadata is looked at; it cannot be written, and has no file data.
    """

    def __init__(self, mount_point: str) -> None:
        from famfs_server.omf import layout, superblock

        self.view = memoryview(b"")
        self.reach = 0
        self.writable = False
        self.sparse = False
        self._fds: list[tuple[int, int, int]] = []
        try:
            for name, start in ((".superblock", layout.SUPERBLOCK_OFFSET), (".log", layout.LOG_OFFSET)):
                fd = os.open(os.path.join(mount_point, ".meta", name), os.O_RDONLY | os.O_CLOEXEC)
                self._fds.append((start, os.fstat(fd).st_size, fd))
            found = superblock.inspect(self.read(0, layout.SUPERBLOCK.itemsize)).superblock
            self.size = found.device_size if found else 0
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """A copy of a range of metadata."""
        for start, size, fd in self._fds:
            if start <= offset and offset + length <= start + size:
                data = os.pread(fd, length, offset - start)
                if len(data) < length:
                    raise DeviceFaultError(f"the metadata end at offset {offset + len(data):#x} of the device")
                return data
        raise MediaError(f"offset {offset:#x} of the device is not metadata")

    read_fresh = read
    """The daemon reads memory and not its cache."""

    def invalidate(self, offset: int, length: int) -> None:
        """Nothing to do: nothing is cached here."""

    present = invalidate
    """Nothing is mapped either."""

    def write(self, offset: int, data: Any) -> None:
        """Always DeviceFaultError: only the daemon writes metadata."""
        raise DeviceFaultError("metadata of a mounted file system is written by its daemon alone")

    def store_u64(self, offset: int, value: int) -> None:
        """As `write`."""
        self.write(offset, value)

    def zero(self, offset: int, length: int) -> None:
        """As `write`."""
        self.write(offset, length)

    def write_back(self, offset: int, length: int) -> None:
        """As `write`."""
        self.write(offset, length)

    def fence(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Close the files."""
        for _, _, fd in self._fds:
            os.close(fd)
        self._fds.clear()
