# SPDX-License-Identifier: Apache-2.0
"""Files that system calls have made and the log does not know yet (decisions 1, 23).

The format stores a file only with its size and its space, but `creat` comes before either. Until a file's size is
certain it lives in a provisional row of the namespace, under a provisional nodeid, and nobody on another host sees it.
It is logged when it is sized, at its first fsync, or at its last close; a file that is empty then is dropped.

The kernel keeps the nodeid that it was given first for as long as it remembers the inode. Two live inodes for one file
must never be (two maps of one page hang an unmount), so the provisional nodeid goes on naming the logged file until the
kernel has forgotten it. That is why lookups are counted here, and only here.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from stat import S_IFREG

import numpy as np

from famfs_server.errors import ExistsError, FamfsError, NoSpaceError
from famfs_server.omf.log import Extent, FileRecord, Fmap
from famfs_server.volume.namespace import PROVISIONAL_ROWS, unused
from famfs_server.volume.space import whole_units
from famfs_server.volume.volume import Volume, whole_pages

log = logging.getLogger(__name__)

FIRST_PROVISIONAL = 1 << 62
"""Provisional nodeids begin here; the row of one is its number modulo the number of rows."""


NUMBER_BITS = 32
BROKEN_OFF_SECONDS = 2.0
"""How long the end of a mount waits for changes of files whose callers are gone: less than a new mount waits for it."""
_NOTHING = memoryview(b"")


def number_of(nodeid: int) -> int:
    """Which of the new files of a mount a provisional nodeid was given to; it has NUMBER_BITS bits."""
    return (nodeid - FIRST_PROVISIONAL) % ((1 << NUMBER_BITS) - 1)


class Provisional:
    """The provisional files of a volume. Every method that changes something takes the volume's lock."""

    def __init__(self, volume: Volume) -> None:
        """Find the provisional files that a predecessor has left in the namespace."""
        self._volume = volume
        self._tree = tree = volume.namespace
        self._base = tree.provisional_row
        self._lock = volume.lock
        self._by_name = volume.promised
        self.aliases: dict[int, int] = {}
        """Logged nodeid to the provisional one that the kernel still knows it by."""
        self._changing: dict[int, int] = {}
        """Files that are changed beside other requests, and how many such changes there are of each."""
        self._counting, self._turn = threading.Lock(), threading.Lock()
        self._turns: dict[int, threading.Lock] = {}
        """In famfs mode each file has its own turn: every new one is reached beside other requests."""
        for slot in np.flatnonzero(np.frombuffer(tree.serial, np.uint64)).tolist():
            nodeid, row = tree.serial[slot], self._base + slot
            if not tree.logged[slot] and (logged := self._found_in_log(row)):
                self._became(slot, logged)
            elif logged := tree.logged[slot]:
                self.aliases[logged] = nodeid
            elif tree.mode[row]:
                self._by_name[tree.parent[row], tree.name(row)] = nodeid

    def _found_in_log(self, row: int) -> int:
        """The nodeid of the logged file that has the row's name and space, or 0: its worker died before it said so."""
        tree = self._tree
        logged = tree.lookup(tree.parent[row], tree.name(row)) if tree.extent_count[row] else 0
        return logged if logged and tree.first_extent(logged, 0, 0) == tree.first_extent(row, 0, 0) else 0

    # -- looking up -----------------------------------------------------------------------------

    def row(self, nodeid: int) -> int:
        """The namespace row of a provisional nodeid, or that of the file it has become; 0 if it is none any more."""
        slot = nodeid % PROVISIONAL_ROWS
        if self._tree.serial[slot] != nodeid:
            return 0
        return self._tree.logged[slot] or self._base + slot

    def find(self, parent: int, name: bytes) -> int:
        """The nodeid of a file that is not logged yet, or 0."""
        return self._by_name.get((parent, name), 0)

    def within(self, parent: int, since: int, after: int) -> list[tuple[int, int, bytes]]:
        """The files in a directory whose numbers are above `after`, and which are not logged yet, or were logged under
        a nodeid from `since` on: (number, nodeid, name) by number, ascending (design 4, "Listings")."""
        tree = self._tree
        with self._lock:
            found = [
                (number_of(nodeid), nodeid, name)
                for (directory, name), nodeid in self._by_name.items()
                if directory == parent
            ]
            logged = np.frombuffer(tree.parent, np.uint32)[since : tree.published] == parent
            for node in (np.flatnonzero(logged) + since).tolist():
                if tree.made_as[node]:
                    found.append((tree.made_as[node] - 1, self.aliases.get(node, node), tree.name(node)))
        return sorted(row for row in found if row[0] > after)

    def is_logged(self, nodeid: int) -> bool:
        """Whether the file is in the log."""
        return self._tree.logged[nodeid % PROVISIONAL_ROWS] != 0

    def opens(self, nodeid: int) -> int:
        """How often the file is open under its provisional nodeid."""
        slot = nodeid % PROVISIONAL_ROWS
        return self._tree.opens[slot] if self._tree.serial[slot] == nodeid else 0

    @property
    def in_use(self) -> bool:
        """Whether anybody has a file open that this mount has made, or one waits to be logged."""
        return bool(self._by_name) or bool(np.frombuffer(self._tree.opens, np.uint32).any())

    # -- changes that take long -----------------------------------------------------------------

    def takes_long(self, nodeid: int, end: int, written: int | None, limit: int) -> bool:
        """Whether `grow` would zero or move more than `limit` bytes, or would have to wait for one that does."""
        if nodeid in self._changing:
            return True
        slot = nodeid % PROVISIONAL_ROWS
        row = self._base + slot
        size = self._tree.size[row]
        if self._volume.spaces is not None and self._must_be_reached(nodeid, end):
            return True
        if end <= max(size, limit) or self._tree.serial[slot] != nodeid or self._tree.logged[slot]:
            return False
        extent = self._extent(row)
        moved = size if extent is not None and end > extent.length else 0
        return max((end if written is None else written) - size, moved) > limit

    def is_changing(self, nodeid: int) -> bool:
        """Whether a change of the file is made beside other requests."""
        return nodeid in self._changing

    def begin_change(self, nodeid: int) -> None:
        """A change of the file is about to be made beside others; `changing` makes it."""
        with self._counting:
            self._changing[nodeid] = self._changing.get(nodeid, 0) + 1
            if self._volume.spaces is not None:
                self._turns.setdefault(nodeid, threading.Lock())

    @contextmanager
    def changing(self, nodeid: int) -> Iterator[None]:
        """The time of a change that takes long: one after the other, so that nobody writes to a file that moves. In
        famfs mode one after the other of each file, since others wait for the kernel meanwhile."""
        try:
            with self._turns.get(nodeid, self._turn):
                yield
        finally:
            with self._counting:
                self._changing[nodeid] -= 1
                if not self._changing[nodeid]:
                    del self._changing[nodeid]
                    self._turns.pop(nodeid, None)

    # -- bytes that only a kernel can map -------------------------------------------------------

    def _extents(self, nodeid: int) -> tuple[Extent, ...]:
        """Where the file is, logged or not."""
        row = self.row(nodeid)
        return self._tree.fmap(row).extents if row else ()

    def _must_be_reached(self, nodeid: int, end: int) -> bool:
        """Whether the first `end` bytes lie, or will lie, where this process reaches nothing yet."""
        if self._tree.serial[nodeid % PROVISIONAL_ROWS] != nodeid:
            return False
        extent = self._extent(self._base + nodeid % PROVISIONAL_ROWS)
        if not self.is_logged(nodeid) and end and (extent is None or whole_units(end) > extent.length):
            return True
        return not self.shows(nodeid)

    def shows(self, nodeid: int) -> bool:
        """Whether this process can read and store the bytes that the file has."""
        spaces = self._volume.spaces
        return spaces is None or spaces.shows(self._extents(nodeid))

    def reach(self, nodeid: int) -> None:
        """Make the bytes that the file has readable and writable for this process; what waits is done beside requests,
        and nothing is to be waited for where `shows` is true.

        Raises SpaceBusyError where the kernel does not forget another file of new space there.
        """
        if self._volume.spaces is not None:
            self._volume.spaces.reach(self._extents(nodeid))

    # -- what the kernel remembers --------------------------------------------------------------

    def remember(self, nodeid: int) -> None:
        """The kernel is about to be given the nodeid once more."""
        self._tree.lookups[nodeid % PROVISIONAL_ROWS] += 1

    def given(self, nodeid: int) -> int:
        """How often the kernel has the nodeid."""
        slot = nodeid % PROVISIONAL_ROWS
        return self._tree.lookups[slot] if self._tree.serial[slot] == nodeid else 0

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel gives back `count` of the times it was given the nodeid."""
        slot = nodeid % PROVISIONAL_ROWS
        with self._lock:
            if self._tree.serial[slot] == nodeid:
                self._tree.lookups[slot] -= min(count, self._tree.lookups[slot])
                self._retire(slot)

    def opened(self, nodeid: int) -> None:
        """One more open of the file."""
        self._tree.opens[nodeid % PROVISIONAL_ROWS] += 1

    def released(self, nodeid: int) -> None:
        """One open less; with the last one the file is logged, or dropped if it is empty."""
        with self._lock:
            if self.opens(nodeid):
                self._tree.opens[nodeid % PROVISIONAL_ROWS] -= 1
            self.settle(nodeid)

    def settle(self, nodeid: int) -> None:
        """Log a file that nobody has open any more, or drop it if it is empty. May be done again."""
        slot = nodeid % PROVISIONAL_ROWS
        tree = self._tree
        with self._lock:
            if tree.serial[slot] != nodeid:
                return
            # A row without a mode was dropped before; its name may belong to somebody else by now.
            if tree.opens[slot] == 0 and not tree.logged[slot] and tree.mode[self._base + slot]:
                try:
                    self.log(nodeid)
                except FamfsError as error:
                    # close(2) cannot be told; fsync before it would have been.
                    path = os.fsdecode(tree.path(self._base + slot))
                    log.error("%s is lost: it could not be logged when it was closed: %s", path, error)
                if not tree.logged[slot]:
                    self._drop(slot)
            if tree.opens[slot] == 0 and self._volume.spaces is not None:
                self._volume.spaces.hide(self._extents(nodeid))
            self._retire(slot)

    def end(self) -> None:
        """The connection has ended: nobody has a file open any more, though the kernel does not tell of each close then
        (protocol 0). All that hold anything are logged, as they are now.

        To be called by the thread that began all changes. Those that are still made beside it were broken off by their
        callers, and the end of the server waits for them for a moment only.
        """
        until = time.monotonic() + BROKEN_OFF_SECONDS
        while self._changing and time.monotonic() < until:
            time.sleep(0.01)
        for nodeid in list(self._by_name.values()):
            slot = nodeid % PROVISIONAL_ROWS
            if self.is_changing(nodeid):
                path = os.fsdecode(self._tree.path(self._base + slot))
                log.error("%s is lost: the mount has ended while it was changed", path)
            else:
                self._tree.opens[slot] = 0
                self.settle(nodeid)

    # -- making and growing ---------------------------------------------------------------------

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> int:
        """A new, empty file that is open once and has been given to the kernel once; its nodeid.

        Raises ExistsError, NoSpaceError when too many are open, or what an append would raise now.
        """
        tree = self._tree
        with self._lock:
            being_made = self._volume.being_made
            self._volume.require_room(1 + len(self._by_name) + len(being_made))
            if (parent, name) in self._by_name or (parent, name) in being_made or tree.lookup(parent, name):
                raise ExistsError(f"{os.fsdecode(name)} exists already")
            nodeid = unused(tree.serial, FIRST_PROVISIONAL + tree.made)
            if not nodeid:
                raise NoSpaceError(f"{PROVISIONAL_ROWS} new files are open already; close some of them first")
            tree.made = nodeid + 1 - FIRST_PROVISIONAL
            slot = nodeid % PROVISIONAL_ROWS
            tree.fill_unlogged(self._base + slot, parent, name, S_IFREG | mode & 0o7777, uid, gid, Extent(0, 0, 0))
            tree.lookups[slot], tree.opens[slot], tree.logged[slot] = 1, 1, 0
            tree.serial[slot] = nodeid
            self._by_name[parent, name] = nodeid
            return nodeid

    def grow(self, nodeid: int, end: int, data: memoryview = _NOTHING) -> None:
        """Make a file that is not logged at least `end` bytes long, in space that it is given for that. Its bytes up to
        `end` are `data`; what is new before these is zeroed.

        The size says so at last, when all of it is in memory: nobody reads what lay there before, not even if this
        process dies. Raises NoSpaceError, having changed nothing, DeviceFaultError, and what an append would raise now:
        what can never be logged is written to no more.
        """
        row = self._base + nodeid % PROVISIONAL_ROWS
        tree = self._tree
        size = tree.size[row]
        start = end - len(data)
        grows = end > size
        moved = None
        if grows:
            moved = self._make_room(row, end)
        else:
            self._volume.require_writer()
        # The kernel lets nobody else change the size meanwhile, and other files need not wait.
        self.reach(nodeid)
        if grows:
            if moved is not None:
                self._move(row, moved, size)
            if start > size:
                self._zero(row, size, start)
            if end < whole_pages(end):
                self._zero(row, end, whole_pages(end))
        if data:
            extent = self._extent(row)
            assert extent is not None
            self._volume.store(self._volume.ranges_of(Fmap((extent,)), start, len(data)), data)
        if grows:
            tree.size[row] = end

    def resize(self, nodeid: int, size: int) -> None:
        """Set the size of a file that is not logged, and log it unless it is empty."""
        row = self._base + nodeid % PROVISIONAL_ROWS
        before = self._tree.size[row]
        if size > before:
            self.grow(nodeid, size)
        elif size < before:
            self._volume.require_writer()
            self.reach(nodeid)
            # A mapping shows the rest of the last page.
            self._zero(row, size, min(before, whole_pages(size)))
            self._tree.size[row] = size
        if size:
            self.log(nodeid)

    def log(self, nodeid: int) -> None:
        """Enter a file into the log, as long as it is now; nothing to do for an empty one."""
        slot = nodeid % PROVISIONAL_ROWS
        row = self._base + slot
        tree = self._tree
        with self._lock:
            size = tree.size[row]
            if tree.logged[slot] or not size:
                return
            extent = self._trim(row, size)
            new = FileRecord(tree.path(row), size, tree.mode[row], tree.uid[row], tree.gid[row], Fmap((extent,)))
            # Its bytes are in memory, or behind the fence that the entry waits for: all stores were written back.
            place = tree.parent[row], tree.name(row)
            logged = self._volume.log_promised(new, place)
            del self._by_name[place]
            self._became(slot, logged)

    def _became(self, slot: int, logged: int) -> None:
        """The log knows the file by the nodeid `logged` from now on."""
        row = self._base + slot
        tree = self._tree
        # Otherwise nobody has set a time.
        if tree.local_changes:
            for column in (tree.atime, tree.mtime, tree.ctime):
                column[logged] = column[row]
        tree.made_as[logged] = 1 + number_of(tree.serial[slot])
        tree.logged[slot] = logged
        tree.set_provisional_extent(row, 0, 0, 0)
        self.aliases[logged] = tree.serial[slot]

    # -- space ----------------------------------------------------------------------------------

    def _extent(self, row: int) -> Extent | None:
        return self._tree.provisional_extent(row)

    def _make_room(self, row: int, end: int) -> Extent | None:
        """`_reserve`, once more where space is about to be given back."""
        try:
            with self._lock:
                return self._reserve(row, end)
        except NoSpaceError:
            spaces = self._volume.spaces
            if spaces is None or not spaces.await_returns():
                raise
        with self._lock:
            return self._reserve(row, end)

    def _reserve(self, row: int, end: int) -> Extent | None:
        """Reserve space for `end` bytes, in place if possible; where it is not, the result is where to move the file.
        The space doubles, so that growing stays cheap."""
        # Where another host writes too, what is free here may be that one's.
        self._volume.require_writer()
        space = self._volume.space
        extent = self._extent(row)
        need = whole_units(end)
        if extent is None:
            extent = space.allocate_run(need)
        elif need > extent.length:
            for length in (max(need, 2 * extent.length), need):
                if space.extend(extent, length):
                    extent = Extent(extent.device, extent.offset, length)
                    break
            else:
                return self._room_elsewhere(extent, need)
        self._tree.set_provisional_extent(row, extent.device, extent.offset, extent.length)
        return None

    def _room_elsewhere(self, extent: Extent, need: int) -> Extent:
        space = self._volume.space
        try:
            return space.allocate_run(max(need, 2 * extent.length))
        except NoSpaceError:
            return space.allocate_run(need)

    def _move(self, row: int, target: Extent, used: int) -> None:
        """Move the `used` bytes of a row to `target`. Lookups and other files go on meanwhile; nobody writes to this
        one (`changing`)."""
        volume = self._volume
        extent = self._extent(row)
        assert extent is not None
        try:
            if volume.spaces is not None:
                volume.spaces.reach((target,))
            volume.copy_range(Extent(extent.device, extent.offset, used), target)
        except BaseException:
            with self._lock:
                volume.free(Fmap((target,)))
            raise
        with self._lock:
            self._tree.set_provisional_extent(row, target.device, target.offset, target.length)
            volume.free(Fmap((extent,)))

    def _trim(self, row: int, size: int) -> Extent:
        """Give back what a growing file had reserved beyond its size."""
        extent = self._extent(row)
        assert extent is not None
        length = whole_units(size)
        if length < extent.length:
            rest = Extent(extent.device, extent.offset + length, extent.length - length)
            self._volume.free(Fmap((rest,)))
            extent = Extent(extent.device, extent.offset, length)
            self._tree.set_provisional_extent(row, extent.device, extent.offset, extent.length)
        return extent

    def _zero(self, row: int, start: int, end: int) -> None:
        extent = self._extent(row)
        assert extent is not None
        self._volume.zero(Extent(extent.device, extent.offset + start, end - start))

    # -- ending ---------------------------------------------------------------------------------

    def _drop(self, slot: int) -> None:
        """Forget a file that never reached the log."""
        row = self._base + slot
        tree = self._tree
        extent = self._extent(row)
        if extent is not None:
            self._volume.free(Fmap((extent,)))
            tree.set_provisional_extent(row, 0, 0, 0)
        tree.mode[row] = 0
        self._by_name.pop((tree.parent[row], tree.name(row)), None)

    def _retire(self, slot: int) -> None:
        """Free the row of a file that neither the kernel nor anybody else needs."""
        tree = self._tree
        if tree.lookups[slot] or tree.opens[slot]:
            return
        if logged := tree.logged[slot]:
            self.aliases.pop(logged, None)
        elif tree.mode[self._base + slot]:
            return
        tree.serial[slot] = 0
