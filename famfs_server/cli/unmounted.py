# SPDX-License-Identifier: Apache-2.0
"""A file system on a device that is not mounted here as a command's target: this process is the volume's user."""

import errno
import os
from collections.abc import Iterable, Sequence
from functools import partial
from uuid import UUID

from famfs_server.cli.progress import reading_log
from famfs_server.cli.target import FLUSHED_AT_ONCE, Advance, Status, Target, Unmounted, this_host, unseen
from famfs_server.daemon.control_client import DirectoryRequest, FileRequest, run_root
from famfs_server.daemon.devices import CACHE_NAME
from famfs_server.dax import hostid
from famfs_server.dax.device import DaxDevice, Lock
from famfs_server.dax.memory import Memory
from famfs_server.errors import DeviceFaultError, NoSuchPathError, PathError
from famfs_server.volume import namespace as ns
from famfs_server.volume.devices import Attached
from famfs_server.volume.faults import Fault
from famfs_server.volume.finder import DeviceFinder, PlaceCache
from famfs_server.volume.replay import normalise
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume

LOCK_SECONDS = 2.0
"""How long to wait for a daemon that is about to end, or for another command."""


def relative_path(path: str) -> bytes:
    """`path`, relative to the root of a file system, normalised. Raises PathError for one that leads out of it."""
    plain, fault = normalise(os.fsencode(path).lstrip(b"/"))
    if fault in (Fault.NONE, Fault.RESERVED_PATH):
        # `.meta` can be looked at; making something in it is refused by the volume.
        return plain or os.path.normpath(os.fsencode(path).lstrip(b"/"))
    if fault is Fault.EMPTY_PATH:
        return b""
    raise PathError(f"{path}: {fault.meaning}")


class DeviceTarget(Target):
    """The file system on one device, opened by this process."""

    def __init__(self, named: Unmounted, *, write: bool) -> None:
        """Open, lock and replay. With `write` no other process of this host may write to the log meanwhile."""
        device = named.device
        self._device = DaxDevice.open(device, writable=write)
        self._further: list[tuple[DaxDevice, Memory]] = []
        self._memory: Memory | None = None
        try:
            self._device.require_lock(
                Lock.MOUNTED, exclusive=False, wait=LOCK_SECONDS, why="is being formatted or repaired; try again later"
            )
            if write:
                self._device.require_lock(
                    Lock.WRITER,
                    exclusive=True,
                    wait=LOCK_SECONDS,
                    why="is mounted or being written by another process of this host; use the path in the mount",
                )
            host = hostid.system_uuid() if write else this_host()
            self._memory = self._device.memory()
            with reading_log(device) as reading:
                self._volume = Volume(self._memory, host, device, reading=reading)
            finder = DeviceFinder(dict(named.further), PlaceCache(run_root() / CACHE_NAME), writable=write)
            self._volume.attach_devices(partial(self._attach, finder))
        except BaseException:
            self._close_device()
            raise

    def _attach(self, finder: DeviceFinder, uuid: UUID, hint: str | None = None) -> Attached:
        device = finder.find(self._volume.superblock.uuid, uuid, hint)
        try:
            memory = device.memory()
        except BaseException:
            device.close()
            raise
        self._further.append((device, memory))
        return Attached(device.path, device.size, memory)

    def _nodeid(self, path: bytes) -> int:
        nodeid = self._volume.namespace.resolve(path)
        if not nodeid:
            raise NoSuchPathError(f"{os.fsdecode(path)}: {os.strerror(errno.ENOENT)}")
        return nodeid

    def status(self, path: bytes) -> Status | None:
        tree = self._volume.namespace
        nodeid = tree.resolve(path)
        if not nodeid:
            return None
        is_directory = tree.is_directory(nodeid)
        return Status(is_directory, not is_directory, tree.size[nodeid], tree.mode[nodeid] & 0o7777)

    def create(self, files: Sequence[FileRequest]) -> None:
        self._volume.create_many([_new_file(new) for new in files])

    def put(self, files: Sequence[FileRequest], data: Iterable[memoryview]) -> None:
        with self._volume.reserve([_new_file(new) for new in files]) as reservation:
            number = offset = 0
            for piece in data:
                while piece:
                    done = min(len(piece), files[number].size - offset)
                    reservation.write(number, offset, piece[:done])
                    piece, offset = piece[done:], offset + done
                    if offset == files[number].size:
                        number, offset = number + 1, 0
            reservation.filled()
            reservation.log()

    def mkdir(self, path: bytes, mode: int, uid: int, gid: int) -> None:
        self._volume.mkdir(path, mode, uid, gid)

    def make_directories(self, directories: Sequence[DirectoryRequest]) -> None:
        for new in directories:
            found = self.status(new.path)
            if found is None or not found.is_directory:
                self._volume.mkdir(new.path, new.mode, new.uid, new.gid)

    def open(self, path: bytes, *, writable: bool = False) -> "DeviceFile":
        nodeid = self._nodeid(path)
        if self._volume.namespace.is_directory(nodeid):
            raise PathError(f"{os.fsdecode(path)}: {os.strerror(errno.EISDIR)}")
        if writable and nodeid < ns.FIRST_NODEID:
            raise PathError(f"{os.fsdecode(path)}: metadata cannot be written")
        return DeviceFile(self._volume, nodeid)

    @property
    def mapped(self) -> bool:
        return False

    def volume(self) -> Volume:
        return self._volume

    def add_device(self, uuid: UUID, path: str) -> None:
        self._volume.add_device(uuid, path)

    def follow(self) -> None:
        self._volume.refresh()

    def close(self) -> None:
        self._volume.close()
        self._close_device()

    def _close_device(self) -> None:
        # A mapping keeps a descriptor of its own, and with it the locks: no view of it may be left.
        if self._memory is not None:
            self._memory.close()
        for device, memory in self._further:
            memory.close()
            device.close()
        self._device.close()


def _new_file(new: FileRequest) -> NewFile:
    striping = new.striping
    interleave = Interleave(striping.buckets, striping.strips, striping.chunk_size) if striping else None
    return NewFile(new.path, new.size, new.mode, new.uid, new.gid, interleave)


class DeviceFile:
    """A file on the device; every write reaches memory before it returns."""

    def __init__(self, volume: Volume, nodeid: int) -> None:
        self._volume = volume
        self._nodeid = nodeid
        self.size: int = volume.namespace.size[nodeid]

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range; shorter only at the end of the file."""
        return self._volume.read(self._nodeid, offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        """Store all of `data`, or raise."""
        if self._volume.write(self._nodeid, offset, data) != len(data):
            raise DeviceFaultError("the file ends before the data")

    def flush(self, advance: Advance = unseen) -> None:
        """Write everything back to memory, where other hosts see it."""
        for start in range(0, self.size, FLUSHED_AT_ONCE):
            length = min(FLUSHED_AT_ONCE, self.size - start)
            self._volume.write_back(self._nodeid, start, length)
            advance(length)

    def close(self) -> None:
        """Nothing is held."""
