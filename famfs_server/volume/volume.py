# SPDX-License-Identifier: Apache-2.0
"""A famfs file system as one object: superblock, log, namespace, space, and the memory of its devices."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from stat import S_IFDIR, S_IFREG
from types import TracebackType
from typing import NamedTuple, Protocol, Self
from uuid import UUID

from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import (
    DeviceFaultError,
    ExistsError,
    LogFullError,
    MediaError,
    NoSpaceError,
    NoSuchPathError,
    NotADirectoryPathError,
    PathError,
    RoleError,
)
from famfs_server.omf import append, layout, log, superblock
from famfs_server.omf.log import Extent, FileRecord, Fmap
from famfs_server.volume import fmap as fmap_arithmetic
from famfs_server.volume import namespace as ns
from famfs_server.volume.devices import Attach, Attached, Device, DeviceTable, describe
from famfs_server.volume.faults import Fault
from famfs_server.volume.namespace import Namespace, NewNode
from famfs_server.volume.replay import Damage, Replay, Stop, is_plain, normalise
from famfs_server.volume.space import Interleave, Space
from famfs_server.volume.spacefiles import SpaceFiles

logger = logging.getLogger(__name__)

_REFRESH_BLOCK = 256
"""Entries replayed under one hold of the lock while the volume is in use: about a millisecond (decisions 6)."""


_PAGE = 4096
_LONG = 64 << 20
"""Bytes of a step in work on long ranges."""
PATIENCE_SECONDS = 0.01
"""How long a half-visible entry is read again before a request that waits for it is answered (decisions 7)."""


def whole_pages(size: int) -> int:
    """The bytes of a file of `size` bytes that a mapping of it shows: to the end of its last page (findings 2.c)."""
    return -(-size // _PAGE) * _PAGE


class DeviceMemory(Protocol):
    """What a volume needs of a device's memory; `dax.memory.Memory` is the real one."""

    size: int
    reach: int
    view: memoryview
    writable: bool
    sparse: bool

    def read(self, offset: int, length: int) -> bytes: ...
    def read_fresh(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes | memoryview) -> None: ...
    def store_u64(self, offset: int, value: int) -> None: ...
    def write_back(self, offset: int, length: int) -> None: ...
    def invalidate(self, offset: int, length: int) -> None: ...
    def present(self, offset: int, length: int) -> None: ...
    def fence(self) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...


class Role(Enum):
    """What this host may do with the volume (format 3)."""

    MASTER = "master"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of a volume, in bytes and counts."""

    log_entries: int
    log_capacity: int
    files: int
    directories: int
    file_bytes: int
    capacity: int
    allocated: int
    free: int
    skipped: dict[Fault, int]
    stop: Stop | None


class NewFile(NamedTuple):
    """A file to be made: a normalised path, its size in bytes, and its attributes."""

    path: bytes
    size: int
    mode: int
    uid: int
    gid: int
    interleave: Interleave | None = None


class Volume:
    """One file system, opened. Lookups need no lock; `refresh` and everything that writes take the volume's own."""

    def __init__(
        self,
        memory: DeviceMemory,
        host: UUID | None,
        device: str,
        *,
        state: int | None = None,
        reading: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Read and check superblock and log header of `memory`, and replay the log.

        `host` None means that this host's UUID is unknown, which makes it a client. `device` is for messages. `state`
        is a memfd for the namespace; one that a predecessor has left there is taken over, and only the log's tail is
        replayed. `reading` is told after each block how many entries of a new namespace are replayed, and of how many.
        Raises MediaError when there is no file system that can be used; single bad entries never do.
        """
        self.device = device
        self._memory = memory
        raw = memory.read_fresh(0, layout.SUPERBLOCK.itemsize)
        self.superblock = superblock.inspect(raw).require(device)
        self._identity = raw[: layout.SUPERBLOCK_CRC_SPAN]
        primary = Attached(device, memory.size, memory)
        self.table = DeviceTable(Device(0, self.superblock.device_uuid, self.superblock.device_size, primary))
        self.memories = self.table.memories
        if layout.LOG_OFFSET + self.superblock.log_length > memory.size:
            raise MediaError(f"{device}: the log ends beyond the device of {memory.size} bytes")
        header = self._header()
        self.role = Role.MASTER if host == self.superblock.system_uuid else Role.CLIENT
        self.last_index = header.last_index
        self.stop: Stop | None = None
        self._settled = True
        self.give_way: Callable[[], None] = lambda: None
        """Called without the lock between the steps of a computation that takes long."""
        self.progress: Callable[[], None] = lambda: None
        """Called from time to time in work that takes long, to show that it moves."""
        self.being_made: set[tuple[int, bytes]] = set()
        """Names (parent, name) of files that are reserved: their space is being filled, and they are not logged yet."""
        self.promised: dict[tuple[int, bytes], int] = {}
        """Names (parent, name) that belong to files which are not logged yet, to their provisional nodeids."""
        self.default_interleave: Callable[[], Interleave | None] = lambda: None
        """The striping of files for which none is asked for. Raises UsageError."""
        self.lock = threading.RLock()
        self._state = state
        if state is not None and Namespace.volume_of(state) not in (0, self._number):
            raise MediaError(f"{device}: holds another file system than the one that is mounted; unmount it")
        resumed = None if state is None else Namespace.resume(self.last_index + 1, state)
        if resumed is None:
            self.namespace, self._space, self._replay = self._start(self._new_namespace(), bulk=True)
        else:
            self.namespace, self._space, self._replay = self._start(resumed, bulk=True)
            self._settled = False
        self.spaces = SpaceFiles(self, memory) if isinstance(memory, PartialMemory) else None
        """How new space is reached where the kernel alone can map it; nothing where this process maps the device."""
        if resumed is None:
            self._load(header.next_index, reading)
        elif header.next_index != resumed.replayed:
            self._resume(header.next_index)

    def _header(self) -> log.LogHeader:
        try:
            return log.decode_header(
                self._memory.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), self.superblock.log_length
            )
        except MediaError as error:
            raise MediaError(f"{self.device}: {error}") from error

    @property
    def _number(self) -> int:
        return self.superblock.uuid.int >> 64

    def _new_namespace(self) -> Namespace:
        return Namespace.create(self.last_index + 1, self.superblock.log_length, self._state, volume=self._number)

    def _start(self, tree: Namespace, *, bulk: bool) -> tuple[Namespace, Space, Replay]:
        space = Space(
            self.log_end,
            self.superblock.device_size,
            self.superblock.alloc_unit,
            available=self.table.available,
        )
        return tree, space, Replay(tree, space, bulk=bulk)

    def _load(self, end: int, reading: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        self.namespace.expect(end)
        for stop in self._replay.run(self._memory, end):
            self.stop = stop
            reading(self.namespace.replayed, end)
        self._settled = True
        if not self._replay.settle():
            # Extents overlap: only a replay entry by entry tells which of them came first.
            if self._state is None:
                self.namespace.close()
            self.namespace, self._space, self._replay = self._start(self._new_namespace(), bulk=False)
            for stop in self._replay.run(self._memory, end):
                self.stop = stop
                reading(self.namespace.replayed, end)
        self.namespace.complete()

    @property
    def space(self) -> Space:
        """The space map. After a takeover it is built when it is needed first, for lookups do not."""
        if not self._settled:
            with self.lock:
                self._settle()
        return self._space

    def _settle(self) -> None:
        if not self._settled:
            self._resume(self.namespace.replayed)

    def _resume(self, end: int) -> None:
        """Build the space map of a namespace that was taken over, and replay what the log has gained since.

        The files that are not logged come last: the predecessor may have logged one of them and died.
        """
        self._settled = True
        # A tree is resumed only if no two of its files overlap, and it must stay: who serves holds on to it.
        settled = self._replay.settle()
        assert settled
        tree = self.namespace
        if self.role is Role.MASTER and end > max(tree.replayed, tree.appending):
            tree.foreign_writer = True
        if tree.foreign_writer:
            self._replay.let_go_of_reserved()
        for stop in self._replay.run(self._memory, end):
            self.stop = stop
        if tree.foreign_writer:
            return
        for nodeid in tree.reserving_rows():
            self._space.own(tree.fmap(nodeid).extents)
        if self.spaces is not None:
            # What a predecessor reached and nobody owns now is free when the kernel has forgotten it.
            for extent in self.spaces.live.values():
                self.spaces.hold(self._space.take_free(extent))

    def close(self) -> None:
        """Let go of the namespace. The devices' memory belongs to whoever mapped it."""
        self.namespace.close()

    @property
    def log_end(self) -> int:
        """The first byte of the primary device that belongs to files."""
        return layout.LOG_OFFSET + self.superblock.log_length

    def space_begins(self, device: int) -> int:
        """The first byte of a device that belongs to files."""
        return self._space.first_usable(device)

    @property
    def devices(self) -> list[UUID | None]:
        """The UUIDs of the devices by number, as the log names them; the primary's is in the superblock."""
        return self._replay.devices

    @property
    def settled(self) -> bool:
        """Whether the space map is there; after a takeover it is built when it is needed first."""
        return self._settled

    # -- further devices ------------------------------------------------------------------------

    def attach_devices(self, attach: Attach) -> None:
        """Look for the devices that the log has named, by `attach`; and for those that it will name, when it does."""
        self.table.attach = attach
        self._follow_devices()

    def _follow_devices(self) -> list[Device]:
        with self.lock:
            return self.table.follow(self.devices, self._space.sizes)

    def add_device(self, uuid: UUID, path: str) -> Device:
        """Append the device at `path`, whose superblock is there already, to the log; new files may go to it then.

        It is attached before it is logged: a device that this host cannot use is not taken in. Raises ExistsError for
        one that is part of the file system, DeviceError, and the errors of `create_many`.
        """
        with self.lock:
            self._settle()
            index = self._begin_append(1 + len(self.promised) + len(self.being_made))
            if uuid in self.devices or uuid == self.superblock.device_uuid:
                raise ExistsError(f"{self.device}: the device {uuid} is part of the file system already")
            assert self.table.attach is not None
            found = self.table.attach(uuid, path)
            number = len(self.devices)
            entry = log.build_add_daxdev(index, device=number, size=found.size, uuid=uuid)
            self._append(index, entry)
            device = Device(number, uuid, found.size, found)
            # What is on the media is what counts, so the entry is read back like another host's.
            list(self._replay.run(self._memory, index + 1))
            self.table.enter(device)
            return device

    # -- following the log ----------------------------------------------------------------------

    def stale(self) -> bool:
        """Whether the log in memory holds entries that the namespace does not know yet, or no longer the half-visible
        one that it held."""
        return self.behind() != 0 or self.lagging

    def behind(self) -> int:
        """How many entries the log in memory has that the namespace does not know yet; negative for a log that was
        cut. Raises DeviceFaultError."""
        raw = self._memory.read_fresh(layout.LOG_OFFSET + layout.NEXT_INDEX_OFFSET, 8)
        return int.from_bytes(raw, "little") - self.namespace.replayed

    def replaced(self) -> bool:
        """Whether the superblock in memory is not that of this file system any more. Raises DeviceFaultError."""
        return self._memory.read_fresh(0, layout.SUPERBLOCK_CRC_SPAN) != self._identity

    def refresh(self) -> int:
        """Replay what has been appended since, in short steps; the number of entries taken in.

        An entry that is not whole yet is read again for a while, and at the next call: it may be on its way through
        another host's caches. A master sees entries that it did not write only when another one writes too; it stops
        writing then.
        """
        before = self.namespace.replayed
        patience = time.monotonic() + PATIENCE_SECONDS
        while self.stop is None or self.lagging:
            with self.lock:
                self._settle()
                header = self._same_log()
                replayed = self.namespace.replayed
                if header is None:
                    break
                if header.next_index <= replayed:
                    # What was half visible, if anything was, has been taken back.
                    self.stop = None
                    break
                end = header.next_index
                if self.role is Role.MASTER:
                    self._another_writes()
                step = min(end, replayed + _REFRESH_BLOCK)
                stop = list(self._replay.run(self._memory, step, end))[-1]
            if stop is None or time.monotonic() >= patience:
                self.stop = stop
                if stop is not None:
                    break
            self.give_way()
        if self.table.attach is not None and len(self.table.entries) < len(self.devices):
            for device in self._follow_devices():
                if not device.complete:
                    logger.warning("%s: %s; files on it are EIO", self.device, describe(device))
        return self.namespace.replayed - before

    @property
    def lagging(self) -> bool:
        """Whether another host's last entry was only half visible when the log was read last."""
        return self._may_recover(self.stop)

    @property
    def damage(self) -> Stop | None:
        """What has ended the replay for good."""
        stop = self.stop
        return None if self._may_recover(stop) else stop

    def _may_recover(self, stop: Stop | None) -> bool:
        """Whether what stopped a replay may go by itself: an entry of another host's, half visible (decisions 7)."""
        return stop is not None and stop.damage is Damage.TORN and self.role is Role.CLIENT

    def _same_log(self) -> log.LogHeader | None:
        """The log's header as it is now; nothing, and a REPLACED stop, where it is not the same log any more."""
        header: log.LogHeader | None = None
        try:
            if not self.replaced():
                header = self._header()
        except MediaError:
            header = None
        except DeviceFaultError:
            self.stop = Stop(self.namespace.replayed, Damage.UNREADABLE)
            return None
        if header is None or header.next_index < self.namespace.replayed:
            self.stop = Stop(header.next_index if header else 0, Damage.REPLACED)
            return None
        return header

    # -- file data ------------------------------------------------------------------------------

    def views(self, nodeid: int, offset: int, length: int) -> list[memoryview]:
        """The bytes [offset, offset + length) of a file, cut to its size, as views of device memory in file order.

        Their cache lines are invalidated, so that what another host has written is seen (decisions 11), and their pages
        mapped: the kernel answers EIO to a request whose answer it cannot copy because the worker was killed.

        Raises DeviceFaultError for a device that is not attached or too small, and for memory that faults. Touching a
        view is not guarded.
        """
        ranges = self._ranges(nodeid, offset, length)
        for memory, start, count in ranges:
            memory.present(start, count)
        return [memory.view[start : start + count] for memory, start, count in ranges]

    def _ranges(self, nodeid: int, offset: int, length: int) -> list[tuple[DeviceMemory, int, int]]:
        """Where file bytes are, as (memory, offset, length)."""
        tree = self.namespace
        length = min(length, tree.size[nodeid] - offset)
        if length <= 0:
            return []
        if tree.extent_count[nodeid] == 1:
            # By far the most files are one run, and this is the hot path of reads and writes.
            runs = [tree.first_extent(nodeid, offset, length)]
        else:
            runs = [
                (run.device, run.offset, run.length) for run in fmap_arithmetic.runs(tree.fmap(nodeid), offset, length)
            ]
        return self._in_memory(runs)

    def _in_memory(self, runs: Iterable[tuple[int, int, int]]) -> list[tuple[DeviceMemory, int, int]]:
        """Where (device, offset, length) are, as (memory, offset, length). Raises DeviceFaultError."""
        ranges = []
        for device, start, count in runs:
            memory = self.memories[device] if device < len(self.memories) else None
            if memory is None:
                raise DeviceFaultError(f"device {device} of {self.device} is not attached")
            if start + count > memory.size:
                raise DeviceFaultError(f"device {device} of {self.device} ends before the file's bytes")
            if start + count > memory.reach and not self._reached(Extent(device, start, count)):
                raise DeviceFaultError(f"file data on device {device} of {self.device} are for the kernel alone")
            ranges.append((memory, start, count))
        return ranges

    def _reached(self, extent: Extent) -> bool:
        return self.spaces is not None and self.spaces.shows((extent,))

    def read(self, nodeid: int, offset: int, length: int) -> bytes:
        """A copy of file bytes as memory has them now, shorter at the end of the file."""
        return b"".join(
            memory.read_fresh(start, count) for memory, start, count in self._ranges(nodeid, offset, length)
        )

    def write(self, nodeid: int, offset: int, data: memoryview) -> int:
        """Store file bytes and write them back to memory before returning (decisions 11); the number stored, less
        than asked for at the end of the file: sizes never change."""
        return self.store(self._ranges(nodeid, offset, len(data)), data)

    @staticmethod
    def store(ranges: Sequence[tuple[DeviceMemory, int, int]], data: memoryview) -> int:
        """Store `data`, as much as there is room for, in (memory, offset, length) in their order, and write them back
        to memory before returning; the number of bytes stored."""
        done = 0
        for memory, start, count in ranges:
            memory.write(start, data[done : done + count])
            memory.write_back(start, count)
            done += count
        for memory, _, _ in ranges:
            memory.fence()
        return done

    @property
    def reaches_data(self) -> bool:
        """Whether this process can read and store all file data; in famfs mode it reaches new space alone, for a
        time."""
        return self._memory.reach == self._memory.size

    @property
    def can_fill(self) -> bool:
        """Whether this process can zero and write new space."""
        return self.reaches_data or (self.spaces is not None and self.spaces.open is not None)

    def write_back(self, nodeid: int, offset: int = 0, length: int | None = None) -> None:
        """Write a file's cache lines back to memory: `length` bytes from `offset` on, or all that follow. Nothing to do
        in famfs mode: what this process has stored it has written back, and the rest others have stored."""
        if self.reaches_data:
            size = self.namespace.size[nodeid]
            self.write_back_ranges(self._ranges(nodeid, offset, size - offset if length is None else length))

    def write_back_ranges(self, ranges: Sequence[tuple[DeviceMemory, int, int]]) -> None:
        """Write the cache lines of (memory, offset, length) back to memory."""
        for memory, first, count in ranges:
            for start in range(first, first + count, _LONG):
                memory.write_back(start, min(_LONG, first + count - start))
                self.progress()
        for memory in {id(memory): memory for memory, _, _ in ranges}.values():
            memory.fence()

    def ranges_of(self, fmap: Fmap, offset: int, length: int) -> list[tuple[DeviceMemory, int, int]]:
        """Where bytes of a file that is not in the namespace are, as (memory, offset, length) in file order.

        Raises DeviceFaultError for a device that is not attached or too small.
        """
        return self._in_memory(
            (run.device, run.offset, run.length) for run in fmap_arithmetic.runs(fmap, offset, length)
        )

    # -- creating (master only) -----------------------------------------------------------------

    def create(self, new: NewFile) -> int:
        """Allocate space for one file and log it; its nodeid. Raises the errors of `create_many`."""
        return self.create_many([new])[0]

    def create_many(self, files: Sequence[NewFile]) -> list[int]:
        """Allocate space for `files` and log them together: all of them, or none and nothing changed.

        Raises RoleError on a client or beside another writer, MediaError when the log is damaged, LogFullError,
        NoSpaceError, and PathError (or a kind of it) for paths that exist or have no parent.
        """
        with self.reserve(files) as reservation:
            # Zeroing takes as long as the files are large; nobody else must wait for it.
            reservation.zero()
            return reservation.log()

    def reserve(self, files: Sequence[NewFile]) -> "Reservation":
        """Names and space for `files`, which nobody sees before they are logged. Raises the errors of `create_many`."""
        try:
            reservation = self._reserve(files)
        except NoSpaceError:
            if self.spaces is None or not self.spaces.await_returns():
                raise
            reservation = self._reserve(files)
        if self.spaces is not None:
            extents = [extent for fmap in reservation.maps for extent in fmap.extents]
            try:
                self.spaces.reach(fmap_arithmetic.joined(extents))
            except BaseException:
                self.give_up(reservation)
                raise
        return reservation

    def _reserve(self, files: Sequence[NewFile]) -> "Reservation":
        with self.lock:
            self._begin_append(len(files) + len(self.promised) + len(self.being_made))
            places = self._places([new.path for new in files])
            for new in files:
                if new.size <= 0:
                    raise PathError(f"{new.path.decode(errors='replace')}: a famfs file cannot be empty")
            if any(new.interleave is None for new in files) and (default := self.default_interleave()):
                files = [new if new.interleave else new._replace(interleave=default) for new in files]
            maps = self.space.allocate_many([(new.size, new.interleave) for new in files])
            self.being_made.update(places)
        return Reservation(self, files, maps, places)

    def log_reserved(self, reservation: "Reservation") -> list[int]:
        """Log the files of a reservation; their nodeids."""
        with self.lock:
            files = zip(reservation.files, reservation.maps, strict=True)
            nodes = self._log_files([FileRecord(*new[:5], fmap) for new, fmap in files], reservation.places)
            self.being_made.difference_update(reservation.places)
            return nodes

    def hide_logged(self, reservation: "Reservation") -> None:
        """Let go of the space of files that have been logged, where only a kernel can map it."""
        if self.spaces is not None:
            for fmap in reservation.maps:
                self.spaces.hide(fmap.extents)

    def give_up(self, reservation: "Reservation") -> None:
        """Give names and space of a reservation back."""
        with self.lock:
            for fmap in reservation.maps:
                self.free(fmap)
            self.being_made.difference_update(reservation.places)

    def fresh(self, files: Sequence[NewFile], maps: Sequence[Fmap]) -> Iterator[Extent]:
        """What must be zeroed of new files' space: what their mappings show, or, where that costs no more, all of it
        in as few pieces as possible."""
        if self._memory.sparse:
            yield from fmap_arithmetic.joined(extent for fmap in maps for extent in fmap.extents)
        else:
            for new, fmap in zip(files, maps, strict=True):
                yield from fmap_arithmetic.runs(fmap, 0, whole_pages(new.size))

    def free(self, fmap: Fmap) -> None:
        """Give space back that the log does not name."""
        if self.spaces is None:
            self.space.free_again(fmap)
        else:
            self.spaces.free(fmap)

    def log_promised(self, new: FileRecord, place: tuple[int, bytes]) -> int:
        """Log a file whose space is allocated already and whose name, `place`, was promised to it; its nodeid.

        Raises the errors of `create_many`, but for those of names.
        """
        with self.lock:
            return self._log_files([new], [place])[0]

    def _log_files(self, files: Sequence[FileRecord], places: Sequence[tuple[int, bytes]]) -> list[int]:
        """Append entries and show them. The lock is held."""
        first = self._begin_append(len(files))
        self._append(first, log.build_files(first, files))
        # Shown without reading back what has just been appended.
        nodes = [
            NewNode(parent, name, S_IFREG | mode & 0o7777, uid, gid, size, fmap)
            for (_, size, mode, uid, gid, fmap), (parent, name) in zip(files, places, strict=True)
        ]
        return list(self.namespace.enter(ns.nodeid_of(first), nodes))

    def mkdir(self, path: bytes, mode: int, uid: int, gid: int) -> int:
        """Log a new directory; its nodeid. Raises the errors of `create_many`."""
        with self.lock:
            index = self._begin_append(1 + len(self.promised) + len(self.being_made))
            place = self._places([path])[0]
            entry = log.build_mkdir(index, path, mode=mode, uid=uid, gid=gid)
            self._append(index, entry)
            new = NewNode(*place, S_IFDIR | mode & 0o7777, uid, gid, 0, Fmap(()))
            return self.namespace.enter(ns.nodeid_of(index), [new])[0]

    def require_room(self, count: int) -> None:
        """Raise what an append of `count` entries would, as far as can be told without a look at the log."""
        self.require_writer()
        self._require_room(self.namespace.replayed, count)

    def zero(self, extent: Extent) -> None:
        """Fill a range with zeroes, so that nobody reads what its former owner left there (design, "Writing")."""
        memory = self.memories[extent.device]
        assert memory is not None
        end = extent.offset + extent.length
        for start in range(extent.offset, end, _LONG):
            memory.zero(start, min(_LONG, end - start))
            self.progress()

    def copy_range(self, source: Extent, target: Extent) -> None:
        """Copy the bytes of `source` to the beginning of `target`."""
        origin, memory = self.memories[source.device], self.memories[target.device]
        assert origin is not None
        assert memory is not None
        step = 1 << 20
        for done in range(0, source.length, step):
            count = min(step, source.length - done)
            memory.write(target.offset + done, origin.view[source.offset + done :][:count])
            self.progress()
        memory.write_back(target.offset, source.length)

    def _begin_append(self, count: int) -> int:
        """The index of the next entry, once everything that forbids an append has been ruled out (design 6).

        `count` entries must find room; those of files that are promised come on top for whoever is not one of them.
        """
        self.require_writer()
        header = self._same_log()
        if header is None:
            assert self.stop is not None
            raise MediaError(f"{self.device}: {self.stop.damage.value}; unmount it")
        if header.next_index != self.namespace.replayed:
            self._another_writes()
            self.require_writer()
        if header.next_seqnum != header.next_index:
            append.set_counters(self._memory, header.next_index)
        self._require_room(header.next_index, count)
        return header.next_index

    def _append(self, first: int, entries: bytes) -> None:
        """Append `entries`, numbered from `first`, to the log. The lock is held."""
        self.namespace.appending = first + len(entries) // layout.LOG_ENTRY_SIZE
        append.append(self._memory, first, entries)

    @property
    def foreign_writer(self) -> bool:
        """Whether another host has written to the log of this master, which then appends nothing until the next mount
        (decisions 7)."""
        return self.namespace.foreign_writer

    def _another_writes(self) -> None:
        """Take note of another host's entries, before they are replayed. The lock is held.

        Nothing that is reserved here will ever be logged, so it is in the way of none of them: this host shows what all
        others show.
        """
        if not self.foreign_writer:
            self.namespace.foreign_writer = True
            logger.error(
                "%s: another host writes to the log too; nothing can be created until the next mount", self.device
            )
            self._settle()
            self._replay.let_go_of_reserved()

    def require_writer(self) -> None:
        """Raise unless this mount may append to the log, as far as it knows."""
        if self.role is not Role.MASTER:
            raise RoleError(
                f"{self.device}: this host is not the master of the file system, only the master can create"
            )
        if not self._memory.writable:
            raise RoleError(f"{self.device}: mounted read-only in famfs mode, where nothing can be created")
        if self.stop is not None:
            raise MediaError(
                f"{self.device}: log entry {self.stop.index} is invalid ({self.stop.damage.value}); "
                "nothing can be created until fsck has dealt with it"
            )
        if self.foreign_writer:
            raise RoleError(
                f"{self.device}: somebody else has written to the log; unmount, find the second master, mount again"
            )

    def _require_room(self, used: int, count: int) -> None:
        if used + count > self.last_index + 1:
            raise LogFullError(
                f"{self.device}: the log is full ({used} of {self.last_index + 1} entries); "
                "a larger one needs a new mkfs.famfs --loglen"
            )

    def _places(self, paths: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Parent nodeid and name for each of the new paths."""
        tree, promised, being_made = self.namespace, self.promised, self.being_made
        parents: dict[bytes, int] = {}
        seen: set[bytes] = set()
        places = []
        for path in paths:
            log.encode_path(path)
            if not is_plain(path) and normalise(path) != (path, Fault.NONE):
                raise PathError(f"{path.decode(errors='replace')}: not a plain path below the mount point")
            head, _, name = path.rpartition(b"/")
            parent = parents.get(head) or parents.setdefault(head, self._directory(head))
            place = parent, name
            if path in seen or place in promised or place in being_made or tree.lookup(parent, name):
                raise ExistsError(f"{path.decode(errors='replace')} exists already")
            seen.add(path)
            places.append(place)
        return places

    def _directory(self, path: bytes) -> int:
        """The nodeid of a directory that must exist."""
        nodeid = self.namespace.resolve(path)
        if not nodeid:
            raise NoSuchPathError(f"{path.decode(errors='replace')}: no such directory")
        if not self.namespace.is_directory(nodeid):
            raise NotADirectoryPathError(f"{path.decode(errors='replace')} is not a directory")
        return nodeid

    # -- figures --------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """The volume in figures, as far as the log has been replayed."""
        tree = self.namespace
        files, directories, file_bytes = tree.totals()
        return Statistics(
            log_entries=tree.replayed,
            log_capacity=self.last_index + 1,
            files=files,
            directories=directories,
            file_bytes=file_bytes,
            capacity=sum(self.space.sizes),
            allocated=self.space.allocated,
            free=self.space.free,
            skipped={fault: len(indexes) for fault, indexes in tree.faults().items()},
            stop=self.stop,
        )


class Reservation:
    """New files that nobody sees: their names are taken, their space is theirs, and the log knows nothing of them.

    Whoever dies with one leaves nothing behind. As a context it is given up at the end, unless it has been logged.
    """

    def __init__(
        self, volume: Volume, files: Sequence[NewFile], maps: Sequence[Fmap], places: Sequence[tuple[int, bytes]]
    ) -> None:
        """Made by `Volume.reserve`."""
        self._volume = volume
        self.files = files
        self.maps = maps
        self.places = places
        self._logged = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._logged:
            self._volume.give_up(self)

    def zero(self) -> None:
        """Fill all of the files with zeroes, as far as mappings show them, in memory."""
        for extent in self._volume.fresh(self.files, self.maps):
            self._volume.zero(extent)

    def ranges(self, number: int) -> list[tuple[DeviceMemory, int, int]]:
        """Where the bytes of one of the files belong, as (memory, offset, length) in file order."""
        return self._volume.ranges_of(self.maps[number], 0, self.files[number].size)

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Store bytes of one of the files, within its size."""
        for memory, start, count in self._volume.ranges_of(self.maps[number], offset, len(data)):
            memory.write(start, data[:count])
            data = data[count:]

    def filled(self) -> None:
        """Every byte of every file has been stored: write all of it back, and zero what follows on the last pages."""
        volume = self._volume
        for number, (new, fmap) in enumerate(zip(self.files, self.maps, strict=True)):
            for extent in fmap_arithmetic.runs(fmap, new.size, whole_pages(new.size) - new.size):
                volume.zero(extent)
            volume.write_back_ranges(self.ranges(number))

    def log(self) -> list[int]:
        """Log the files, so that everybody sees them; their nodeids. Raises the errors of `Volume.create_many`."""
        nodes = self._volume.log_reserved(self)
        self._logged = True
        self._volume.hide_logged(self)
        return nodes
