# SPDX-License-Identifier: Apache-2.0
"""How the server reaches new space of a device in famfs mode: through files that nobody else ever sees (design 6).

User space cannot map such a device; a famfs kernel can, for files that it has a map of. So each run of new space that
has to be zeroed or written is a *space file* for as long as that takes: a hidden name below `.meta`, which no listing
shows, only root can open and nobody can guess. A process that is not the server opens it through a private copy of the
mount, takes its name away and passes the descriptor on; the server maps it and closes it.

Two live inodes must never map one page, or an unmount hangs (findings 1.7). The kernel forgets a space file when it is
not mapped any more, since it has no name; until it has said so, its space is given to nobody, and no other file there
gets a map.
"""

import os
import threading
from collections.abc import Callable, Iterable
from stat import S_IFREG
from typing import TYPE_CHECKING

from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import DeviceError, NoSpaceError, SpaceBusyError
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume import namespace as ns
from famfs_server.volume.namespace import SPACE_ROWS, Namespace, unused

if TYPE_CHECKING:
    from famfs_server.volume.volume import Volume

FIRST_SPACE = 3 << 61
"""The nodeids of space files begin here, behind the provisional ones; the row of one is its number modulo the number of
rows."""
PREFIX = b".space-"
QUIET_SECONDS = 10.0
"""How long is waited for the kernel to forget a space file; as a rule it takes a millisecond."""


class SpaceFiles:
    """The space files of a volume. What waits must not be called by the thread that answers the kernel."""

    def __init__(self, volume: "Volume", memory: PartialMemory) -> None:
        """Find those that a predecessor has left: the kernel is about to forget them."""
        self._volume = volume
        self._memory = memory
        self.open: Callable[[bytes], int] | None = None
        """Opens a space file and takes its name away; the descriptor. Waits for the server's own answers, so it works
        in another process. Raises DeviceError."""
        self.live: dict[int, Extent] = {}
        """Those that the kernel knows or may hear of, by nodeid."""
        self._by_name: dict[bytes, int] = {}
        self._leaving: list[Extent] = []
        self._changed = threading.Condition()
        tree = self._tree
        for row in tree.space_rows():
            slot = row - tree.space_row
            extent = tree.provisional_extent(row)
            if extent is None or not tree.space_lookups[slot]:
                tree.space_serial[slot] = 0
                continue
            self.live[tree.space_serial[slot]] = extent
            self._by_name[tree.name(row)] = tree.space_serial[slot]
        self.left = frozenset(self.live)
        """The nodeids of those that a predecessor has left. How often the kernel has been given them is not certain."""

    @property
    def _tree(self) -> Namespace:
        return self._volume.namespace

    # -- what the kernel asks -------------------------------------------------------------------

    def find(self, name: bytes) -> int:
        """The nodeid of a space file that is about to be opened, or 0."""
        return self._by_name.get(name, 0)

    def names(self) -> list[bytes]:
        """The names that lead to space files."""
        return list(self._by_name)

    def row(self, nodeid: int) -> int:
        """The namespace row of a space file; 0 if it is none any more."""
        slot = nodeid % SPACE_ROWS
        return self._tree.space_row + slot if self._tree.space_serial[slot] == nodeid else 0

    def remember(self, nodeid: int) -> None:
        """The kernel is about to be given the nodeid once more."""
        if self.row(nodeid):
            self._tree.space_lookups[nodeid % SPACE_ROWS] += 1

    def given(self, nodeid: int) -> int:
        """How often the kernel has the nodeid."""
        return self._tree.space_lookups[nodeid % SPACE_ROWS] if self.row(nodeid) else 0

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel gives back `count` of the times it was given the nodeid; with the last one the space is quiet."""
        if not self.row(nodeid):
            return
        lookups, slot = self._tree.space_lookups, nodeid % SPACE_ROWS
        with self._volume.lock:
            if nodeid in self.left:
                # Whether its worker lived to say so or not, a kernel that gives a nodeid back has no inode of it.
                lookups[slot] = 0
                self._by_name = {name: node for name, node in self._by_name.items() if node != nodeid}
            else:
                lookups[slot] = max(lookups[slot] - count, 0)
            if not lookups[slot] and nodeid not in self._by_name.values():
                self._retire(nodeid)

    def _retire(self, nodeid: int) -> None:
        """The kernel knows no inode of that number. The lock is held."""
        del self.live[nodeid]
        self._tree.space_serial[nodeid % SPACE_ROWS] = 0
        self._free_quiet()
        with self._changed:
            self._changed.notify_all()

    def give_to_kernel(self, nodeid: int) -> None:
        """The kernel is about to be given the map."""
        if row := self.row(nodeid):
            self._tree.mapped[row] = 1

    # -- reaching space -------------------------------------------------------------------------

    def shows(self, extents: Iterable[Extent]) -> bool:
        """Whether this process can read and store all of `extents`."""
        return all(extent.device == 0 and self._memory.shows(extent.offset, extent.length) for extent in extents)

    def reach(self, extents: Iterable[Extent]) -> None:
        """Make all of `extents` readable and writable for this process, as long as they are not hidden again.

        Waits. Raises SpaceBusyError where the kernel does not forget another space file there, and DeviceError.
        """
        for extent in extents:
            if extent.device:
                raise DeviceError(
                    f"new space on device {extent.device} cannot be reached in famfs mode, only that on device 0"
                )
            for offset, length in self._memory.hidden(extent.offset, extent.length):
                self._show(Extent(0, offset, length))

    def _show(self, extent: Extent) -> None:
        self.await_quiet((extent,))
        nodeid, name = self._enter(extent)
        try:
            if self.open is None:
                raise DeviceError("new space of a device in famfs mode is reached through its mount, which has ended")
            descriptor = self.open(name)
            try:
                if not self._tree.mapped[self.row(nodeid)]:
                    # Faults would come to this very process as requests.
                    raise DeviceError("the kernel has opened new space without asking where it is: it does not map it")
                self._memory.show(extent.offset, extent.length, descriptor)
            finally:
                os.close(descriptor)
        finally:
            self._withdraw(nodeid, name)

    def _enter(self, extent: Extent) -> tuple[int, bytes]:
        tree = self._tree
        with self._volume.lock:
            nodeid = unused(tree.space_serial, FIRST_SPACE + tree.spaces)
            if not nodeid:
                raise NoSpaceError(f"{SPACE_ROWS} runs of new space are in use already; close some new files first")
            tree.spaces = nodeid + 1 - FIRST_SPACE
            slot = nodeid % SPACE_ROWS
            # Nobody can guess it, so nobody but the opener can hold it, and with it its space.
            name = PREFIX + os.urandom(16).hex().encode()
            row, mode = tree.space_row + slot, S_IFREG | 0o600
            tree.fill_unlogged(row, ns.META, name, mode, os.geteuid(), os.getegid(), extent)
            tree.space_lookups[slot] = 0
            tree.space_serial[slot] = nodeid
            self.live[nodeid] = extent
            self._by_name[name] = nodeid
        return nodeid, name

    def _withdraw(self, nodeid: int, name: bytes) -> None:
        """No name leads to the file any more; what the kernel has never heard of, it need not forget."""
        with self._volume.lock:
            del self._by_name[name]
            if not self._tree.space_lookups[nodeid % SPACE_ROWS]:
                self._retire(nodeid)

    def hide(self, extents: Iterable[Extent]) -> None:
        """Let go of all space files that show any of `extents`. Does not wait: the kernel forgets them soon."""
        for extent in extents:
            if extent.device == 0:
                self._memory.hide(extent.offset, extent.length)

    # -- what must wait for the kernel ----------------------------------------------------------

    def quiet(self, extents: Iterable[Extent]) -> bool:
        """Whether the kernel knows no space file that shares a byte with `extents`."""
        known = list(self.live.values())
        return not any(
            other.device == extent.device
            and other.offset < extent.offset + extent.length
            and extent.offset < other.offset + other.length
            for extent in extents
            for other in known
        )

    def await_quiet(self, extents: Iterable[Extent]) -> None:
        """Wait until `extents` are quiet. Raises SpaceBusyError after QUIET_SECONDS."""
        wanted = tuple(extents)
        with self._changed:
            if not self._changed.wait_for(lambda: self.quiet(wanted), QUIET_SECONDS):
                raise SpaceBusyError(
                    f"{self._volume.device}: the kernel still holds space that a new file was made in; try again"
                )

    def free(self, fmap: Fmap) -> None:
        """Give space back that the log does not name: at once, or when it is quiet."""
        volume = self._volume
        self.hide(fmap.extents)
        with volume.lock:
            # After a takeover the space map must hold it before it can be given back.
            assert volume.space
            self._leaving += fmap.extents
            self._free_quiet()

    def hold(self, extents: Iterable[Extent]) -> None:
        """These belong to nobody but space files; they are free when they are quiet. The lock is held."""
        self._leaving += extents

    def _free_quiet(self) -> None:
        leaving, self._leaving = self._leaving, []
        for extent in leaving:
            if self.quiet((extent,)):
                self._volume.space.free_again(Fmap((extent,)))
            else:
                self._leaving.append(extent)

    def await_returns(self) -> bool:
        """Wait for space that is about to be given back; whether there was any."""
        if not self._leaving:
            return False
        with self._changed:
            self._changed.wait_for(lambda: not self._leaving, QUIET_SECONDS)
        return True
