# SPDX-License-Identifier: Apache-2.0
"""What a mounted volume answers, whichever plane asks: rules and attributes, no wire format and no pyfuse3.

Refusals are OSError with the errno that applications expect; errors of the volume carry their errno themselves.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from famfs_server.errors import DeviceFaultError, FamfsError
from famfs_server.fuse.abi import SETS_SIZE, SETS_TIMES, OpenFlag, SetattrValid, inval_entry, inval_inode
from famfs_server.omf import layout
from famfs_server.volume import namespace as ns
from famfs_server.volume.check import describe_stop
from famfs_server.volume.provisional import FIRST_PROVISIONAL, NUMBER_BITS, Provisional
from famfs_server.volume.replay import Damage
from famfs_server.volume.spacefiles import FIRST_SPACE, PREFIX, SpaceFiles
from famfs_server.volume.volume import Role, Volume

log = logging.getLogger(__name__)

BLOCK_SIZE = 4096
"""st_blksize, and the unit of statfs."""
DAY = 86400
MOMENT = 1
"""Seconds for which the kernel may keep attributes of a new file that it has just been told."""
LONG = 64 << 20
"""Bytes that are zeroed within a request; more than that is done beside the request plane."""
_SOME = 256
DOT, DOTDOT = 1, 2
"""The listing cookies of `.` and `..`."""
SHADOW_XATTR = b"user.famfs.shadow"
"""Names the run-time directory of the mount, in which clients find the control socket (design 12)."""

_KEPT: Final = SetattrValid.MODE | SetattrValid.UID | SetattrValid.GID | SETS_TIMES
"""What SETATTR changes in memory alone."""

NO_OWNER: Final = (1 << 32) - 1
"""The user that no user namespace has."""

_LATEST = (1 << 64) - 1
"""The latest time that can be kept, in nanoseconds."""

_FATAL = (Damage.UNREADABLE, Damage.REPLACED)
"""Damage under which a name that is not known is not known to be missing either (decisions 5)."""

Attr = tuple[int, ...]
"""The 16 fields of the wire's attr, in its order."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the mount options say about answers. Times are in seconds."""

    shadow: bytes
    timeout: int = DAY
    direct_io: bool = True
    keep_cache: bool = False
    create: bool = True
    read_only: bool = False
    maps: bool = False
    """The kernel is given extent maps."""
    no_open: bool = True
    """With maps, the kernel may be told never to ask for an OPEN again, where that is safe."""


@dataclass(slots=True)
class Attributes:
    """New attributes of a SETATTR; only those that `valid` names count. Times are in nanoseconds."""

    valid: int
    size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    atime: int = 0
    mtime: int = 0
    ctime: int = 0


def refusal(number: int) -> OSError:
    """The error that a request ends with when it asks for what the file system does not do."""
    return OSError(number, os.strerror(number))


class FileSystem:
    """One mounted volume. Every method may be called from any thread."""

    def __init__(self, volume: Volume, settings: Settings) -> None:
        """The time of the mount stands for the times that the media do not hold; a takeover keeps it."""
        self.volume = volume
        self.namespace = volume.namespace
        self.made = Provisional(volume)
        self.notify: Callable[[bytes], None] = lambda notification: None
        """Where notifications to the kernel go; set when the connection serves."""
        self.settings = settings
        self.namespace.started = self.namespace.started or time.time_ns()
        self.started = self.namespace.started
        self.open_flags = int(OpenFlag.PARALLEL_DIRECT_WRITES | OpenFlag.DIRECT_IO if settings.direct_io else 0)
        if settings.keep_cache:
            self.open_flags |= OpenFlag.KEEP_CACHE
        tree = self.namespace
        self._log_rows = tree.provisional_row
        self._size, self._mode, self._uid, self._gid = tree.size, tree.mode, tree.uid, tree.gid
        self._seconds, self._nanoseconds = divmod(self.started, 10**9)
        self._own_times = self.namespace.local_changes > 0
        self._refreshing = threading.Lock()
        self._reported = volume.stop
        self._log_fails = False
        self._hinted: set[int] = set()
        self.faulty: Counter[int] = Counter()
        """Namespace rows of files whose memory could not be accessed, with how often."""
        self.no_open = settings.maps and settings.no_open and not self._creates
        """Whether every OPEN is ENOSYS, which the kernel takes for an answer to all later ones: they cost nothing then.

        It sends no RELEASE for any file either, whenever that was opened, so no file could be logged when it is closed:
        never where files can be new (decisions 23, findings 2)."""
        if self.no_open:
            self._close_metadata()
        self._told = tree.published
        """Up to which entry the kernel has been told of directories that gained some."""

    @property
    def _creates(self) -> bool:
        """Whether system calls can make files on this mount."""
        settings = self.settings
        return self.volume.role is Role.MASTER and settings.create and not settings.read_only

    def _close_metadata(self) -> None:
        """Have the kernel refuse writing to the files of `.meta`, since it does not ask: it refuses that for every file
        whose owner has no place in its user namespace, to root as well."""
        tree = self.namespace
        for row in (ns.META_SUPERBLOCK, ns.META_LOG):
            tree.uid[row] = NO_OWNER

    # -- names ----------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> int:
        """The nodeid of a name, or 0; a name that is missing is looked for in what the log has gained since.

        A file that is logged keeps the nodeid that its creator has, as long as that has it open. With maps no longer:
        pages can be in the cache of that inode, and they and a map must never meet (findings 1.8).
        """
        node = self.namespace.lookup(parent, name)
        if not node:
            if len(name) > layout.MAX_PATH:
                raise refusal(errno.ENAMETOOLONG)
            node = self.made.find(parent, name)
            if not node and parent == ns.META and self.volume.spaces is not None:
                node = self.volume.spaces.find(name)
            if not node and self.follow():
                node = self.namespace.lookup(parent, name)
        return self._known_as(node)

    def _known_as(self, node: int) -> int:
        """The nodeid under which the kernel knows, or is to know, a file that the log has made."""
        alias = self.made.aliases.get(node, node)
        if alias != node and self.settings.maps and not self.made.opens(alias):
            return node
        return alias

    def remember(self, nodeid: int) -> None:
        """The kernel is about to be given a nodeid; only those that the log does not know are counted."""
        if (keeper := self._keeper(nodeid)) is not None:
            keeper.remember(nodeid)

    def given(self, nodeid: int) -> int:
        """How often the kernel has been given a nodeid that is counted, and has not given it back."""
        keeper = self._keeper(nodeid)
        return keeper.given(nodeid) if keeper is not None else 0

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel gives a nodeid back."""
        if (keeper := self._keeper(nodeid)) is not None:
            keeper.forget(nodeid, count)

    def _keeper(self, nodeid: int) -> Provisional | SpaceFiles | None:
        """Who keeps a nodeid that the log does not know."""
        if nodeid < FIRST_PROVISIONAL:
            return None
        return self.made if nodeid < FIRST_SPACE else self.volume.spaces

    def drop_left_names(self) -> None:
        """Have the kernel drop the names of space files that a predecessor has left, for nobody will take them away."""
        if self.volume.spaces is not None:
            for name in self.volume.spaces.names():
                self.notify(inval_entry(ns.META, name))

    def follow(self, *, thorough: bool = False) -> bool:
        """Replay what the log has gained, and say whether there was anything (design, "No stale misses"). A `thorough`
        look is at the superblock too: a file system that was made anew may have as many entries as the one before."""
        volume = self.volume
        self._require_log()
        try:
            stale = volume.stale() or (thorough and volume.replaced())
        except DeviceFaultError as error:
            if not self._log_fails:
                log.error("%s: the log cannot be read, names that are not known are EIO: %s", volume.device, error)
            self._log_fails = True
            raise
        if self._log_fails:
            log.warning("%s: the log can be read again", volume.device)
        self._log_fails = False
        if not stale:
            return False
        with self._refreshing:
            volume.refresh()
            damage = volume.damage
            if damage is not None and damage != self._reported:
                self._reported = damage
                log.error("%s: %s", volume.device, describe_stop(damage))
        self._require_log()
        return True

    def tell_of_gains(self) -> None:
        """Have the kernel drop what it has cached of directories that another host has put something into: one
        notification for each directory, however much came (decisions 10).

        For the background poll, not for requests: they look at the log before they answer.
        """
        tree = self.namespace
        first, self._told = self._told, tree.published
        if self.volume.role is Role.MASTER or first == self._told:
            return
        parents = np.unique(np.frombuffer(tree.parent, np.uint32)[first : self._told])
        # A skipped entry has no parent, and a directory that is as new as its entries is not known to the kernel yet.
        for directory in parents[(parents != 0) & (parents < first)].tolist():
            self.notify(inval_inode(directory, 0, 0))

    def _require_log(self) -> None:
        stop = self.volume.stop
        if stop is not None and stop.damage in _FATAL:
            raise refusal(errno.EIO)

    def entries(self, directory: int, cookie: int) -> Iterator[tuple[int, int, bytes]]:
        """A directory's entries behind `cookie`, as (cookie, nodeid, name).

        The cookie of an entry is its nodeid, that of `.` 1 and that of `..` 2, so that a listing can go on after a
        takeover, and finds what was made meanwhile (decisions 2). Files that are not logged come last. Their cookies
        say how far the log had been listed before, and their numbers: one that is logged while the listing goes on is
        neither left out nor told twice.
        """
        tree = self.namespace
        if cookie == 0:
            self.follow()
            yield DOT, directory, b"."
        if cookie <= DOT:
            yield DOTDOT, tree.parent[directory], b".."
        if cookie < FIRST_PROVISIONAL:
            since, after = max(cookie, DOTDOT), -1
            while True:
                end = max(tree.published, since + 1)
                names, nodes = self.names_behind(directory, since, _SOME)
                if not nodes:
                    break
                for name, node in zip(names, nodes, strict=True):
                    yield node, self._known_as(node), name
                since = nodes[-1]
            since = end
        else:
            since, after = divmod(cookie - FIRST_PROVISIONAL, 1 << NUMBER_BITS)
        for number, node, name in self.made.within(directory, since, after):
            yield FIRST_PROVISIONAL + (since << NUMBER_BITS) + number, node, name

    def names_behind(self, directory: int, cookie: int, count: int) -> tuple[list[bytes], list[int]]:
        """The names and nodeids of up to `count` entries that the log has made, behind that of `cookie`."""
        tree = self.namespace
        self._require_cookie(directory, cookie)
        nodes = list(islice(tree.children(directory, cookie if cookie > DOTDOT else 0), count))
        return tree.names(nodes), nodes

    def dirents(self, directory: int, cookie: int, size: int, *, lead: int = 0) -> bytes:
        """READDIR records of the entries that the log has made behind that of `cookie`, in at most `size` bytes; each
        has `lead` zero bytes before it."""
        self._require_cookie(directory, cookie)
        tree = self.namespace
        first = tree.next_sibling[cookie] if cookie > DOTDOT else tree.first_child[directory]
        return tree.dirents(first, size, lead)

    def _require_cookie(self, directory: int, cookie: int) -> None:
        tree = self.namespace
        if cookie > DOTDOT and not (tree.exists(cookie) and tree.parent[cookie] == directory):
            raise refusal(errno.EINVAL)

    @property
    def listing_state(self) -> tuple[int, int]:
        """Changes whenever a listing may: with entries of the log, and with attributes that were set."""
        return self.namespace.published, self.namespace.local_changes

    @property
    def has_provisional(self) -> bool:
        """Whether the kernel knows any file by a provisional nodeid."""
        return bool(self.volume.promised or self.made.aliases)

    def row(self, nodeid: int) -> int:
        """The namespace row of a node, which the nodeid is except for files that were made by system calls.

        ESTALE for one that names nothing, EIO when another file system has come under the mount.
        """
        row = nodeid
        if nodeid >= self._log_rows:
            row = self._row_beyond(nodeid)
        stop = self.volume.stop
        if stop is not None and stop.damage is Damage.REPLACED:
            raise refusal(errno.EIO)
        if not self._mode[row]:
            raise refusal(errno.ESTALE)
        return row

    def _row_beyond(self, nodeid: int) -> int:
        """The row of what the log has not made, or 0."""
        keeper = self._keeper(nodeid)
        return keeper.row(nodeid) if keeper is not None else 0

    # -- attributes -----------------------------------------------------------------------------

    def attr(self, nodeid: int) -> Attr:
        """The attributes of a node, in the wire's order; ESTALE if there is none."""
        row = self.row(nodeid)
        size = self._size[row]
        if self._own_times:
            tree = self.namespace
            (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = (
                divmod(column[row] or self.started, 10**9) for column in (tree.atime, tree.mtime, tree.ctime)
            )
        else:
            atime = mtime = ctime = self._seconds
            atime_ns = mtime_ns = ctime_ns = self._nanoseconds
        return (
            nodeid,
            size,
            (size + 511) >> 9,
            atime,
            mtime,
            ctime,
            atime_ns,
            mtime_ns,
            ctime_ns,
            self._mode[row],
            1,
            self._uid[row],
            self._gid[row],
            0,
            BLOCK_SIZE,
            0,
        )

    def timeouts(self, nodeid: int) -> tuple[int, int]:
        """Seconds for which a name and its attributes may be cached.

        What the log has made stays as it is, directories too: they have neither a size nor a count of links, and their
        times do not tell what is in them. A file that is not logged may be dropped, so its name is asked for each time.
        Its attributes change by this kernel's own calls alone, and the one that makes a file looks at them before it
        returns.
        """
        longest = self.settings.timeout
        return (0, min(MOMENT, longest)) if nodeid >= FIRST_PROVISIONAL else (longest, longest)

    def setattr(self, nodeid: int, new: Attributes) -> None:
        """Change mode, owner or times in memory; a size can be set once, which logs the file (decisions 12, 23)."""
        row = self.row(nodeid)
        if new.valid & SETS_SIZE:
            self._set_size(nodeid, row, new.size)
        if not new.valid & _KEPT:
            return
        if self.volume.role is not Role.MASTER:
            raise refusal(errno.EROFS)
        if row < ns.FIRST_NODEID and row != ns.ROOT:
            raise refusal(errno.EPERM)
        tree = self.namespace
        # The size may just have moved the file into the log.
        row = self.row(nodeid)
        if new.valid & SetattrValid.MODE:
            tree.mode[row] = tree.mode[row] & ~0o7777 | new.mode & 0o7777
        if new.valid & SetattrValid.UID:
            tree.uid[row] = new.uid
        if new.valid & SetattrValid.GID:
            tree.gid[row] = new.gid
        for bit, column, value in (
            (SetattrValid.ATIME, tree.atime, new.atime),
            (SetattrValid.MTIME, tree.mtime, new.mtime),
            (SetattrValid.CTIME, tree.ctime, new.ctime),
        ):
            if new.valid & bit:
                # Within what a column holds, 1970 to 2554; 0 there would mean that nobody has set it.
                column[row] = min(max(value, 1), _LATEST)
                self._own_times = True
        tree.local_changes += 1

    def takes_long(self, nodeid: int, size: int, written: int | None = None) -> bool:
        """Whether making a file `size` bytes long, by writing from `written` on, would hold up other requests: new
        space is zeroed, and what is there may have to move."""
        return nodeid >= FIRST_PROVISIONAL and self.made.takes_long(nodeid, size, written, LONG)

    def must_be_reached(self, nodeid: int) -> bool:
        """Whether reading the file would hold up other requests: only a kernel can map it, and this process has to be
        given a file that shows it first, or is about to let go of it."""
        return self.volume.spaces is not None and (self.made.is_changing(nodeid) or not self.made.shows(nodeid))

    def flushes_long(self, nodeid: int) -> bool:
        """Whether writing a file back would hold up other requests."""
        return self.namespace.size[self.row(nodeid)] > LONG

    def _set_size(self, nodeid: int, row: int, size: int) -> None:
        if self.is_growing(nodeid):
            self.made.resize(nodeid, size)
        elif size != self.namespace.size[row]:
            if self.volume.role is not Role.MASTER:
                raise refusal(errno.EROFS)
            self._hint_truncate(row)
            raise refusal(errno.EPERM)

    def is_growing(self, nodeid: int) -> bool:
        """Whether the file is not in the log yet, so that its size may still change."""
        return FIRST_PROVISIONAL <= nodeid < FIRST_SPACE and not self.made.is_logged(nodeid)

    def allocate(self, nodeid: int, offset: int, length: int, mode: int) -> None:
        """fallocate(2): sizes a new file and logs it; within a file that is logged there is nothing to do."""
        row = self.require_file(nodeid)
        if mode:
            raise refusal(errno.EOPNOTSUPP)
        end = offset + length
        if self.is_growing(nodeid):
            self.made.resize(nodeid, max(end, self.namespace.size[row]))
        elif end > self.namespace.size[row]:
            raise refusal(errno.EFBIG)

    @staticmethod
    def now() -> int:
        """The present time in nanoseconds, for attributes that are to be set to it."""
        return time.time_ns()

    def _hint_truncate(self, row: int) -> None:
        if row not in self._hinted:
            self._hinted.add(row)
            log.warning(
                "%s: the size of a famfs file never changes; write into it without truncating "
                "(dd conv=notrunc), or copy to a new name",
                os.fsdecode(self.namespace.path(row)),
            )

    # -- file data ------------------------------------------------------------------------------

    def open(self, nodeid: int, flags: int) -> int:
        """Allow an open with the open(2) `flags`; the FOPEN flags of the reply."""
        row = self.require_file(nodeid)
        if flags & os.O_ACCMODE != os.O_RDONLY and row < ns.FIRST_NODEID:
            raise refusal(errno.EPERM)
        if flags & os.O_TRUNC and self.namespace.size[row]:
            self._hint_truncate(row)
            raise refusal(errno.EPERM)
        if FIRST_PROVISIONAL <= nodeid < FIRST_SPACE:
            if self.settings.maps:
                # Its inode never gets a map. Where nobody has it open any more, the name leads to another one by now.
                raise refusal(errno.EBUSY if self.made.opens(nodeid) else errno.ESTALE)
            self.made.opened(nodeid)
            # Pages that were cached while the file had no map would hang the fault that comes after (findings 1.8).
            return self.open_flags | OpenFlag.DIRECT_IO
        return self.open_flags

    def open_must_wait(self, nodeid: int) -> bool:
        """Whether an open would be refused because somebody has the inode open that a file had before it was logged."""
        return self.settings.maps and FIRST_PROVISIONAL <= nodeid < FIRST_SPACE and self.made.opens(nodeid) > 0

    def release(self, nodeid: int) -> None:
        """An open file is closed for the last time by its opener; a new one may go into the log now."""
        if not FIRST_PROVISIONAL <= nodeid < FIRST_SPACE:
            return
        self.made.released(nodeid)
        self._drop_old_name(nodeid)

    def finish_release(self, nodeid: int) -> None:
        """Do what comes after a close that a dead worker has counted, which may have got that far or not."""
        self.made.settle(nodeid)
        self._drop_old_name(nodeid)

    def _drop_old_name(self, nodeid: int) -> None:
        row = self.made.row(nodeid)
        if row and row < self.namespace.published and not self.made.opens(nodeid):
            # The kernel will look the name up again, under the nodeid that the log gives it, and keep that for long.
            self.notify(inval_entry(self.namespace.parent[row], self.namespace.name(row)))

    def opendir(self, nodeid: int) -> None:
        """Allow a directory to be listed."""
        if not self.namespace.is_directory(self.row(nodeid)):
            raise refusal(errno.ENOTDIR)

    def require_file(self, nodeid: int) -> int:
        """The row of a file. Raises ESTALE or EISDIR for anything else."""
        row = self.row(nodeid)
        if self.namespace.is_directory(row):
            raise refusal(errno.EISDIR)
        return row

    def views(self, nodeid: int, offset: int, length: int) -> list[memoryview]:
        """File bytes as views of device memory (`Volume.views`)."""
        row = self.require_file(nodeid)
        try:
            if nodeid >= FIRST_PROVISIONAL:
                self.made.reach(nodeid)
            return self.volume.views(row, offset, length)
        except DeviceFaultError:
            self.memory_fails(nodeid)
            raise

    def read(self, nodeid: int, offset: int, length: int) -> bytes:
        """A copy of bytes of a file that the log has made (`Volume.read`)."""
        try:
            return self.volume.read(self.require_file(nodeid), offset, length)
        except DeviceFaultError:
            self.memory_fails(nodeid)
            raise

    def memory_fails(self, nodeid: int) -> None:
        """Remember for status that memory of a file could not be accessed; it is logged once for each file."""
        row = self.row(nodeid)
        if row not in self.faulty:
            log.error(
                "%s: its memory cannot be accessed: poisoned, truncated or no longer bound; see the kernel log",
                os.fsdecode(self.namespace.path(row)),
            )
        self.faulty[row] += 1

    def write(self, nodeid: int, offset: int, data: memoryview) -> int:
        """Store file bytes. A file that is not logged grows; in others, fewer bytes than asked for are stored at the
        end, and EFBIG is the answer behind it (decisions 12, 23)."""
        row = self.require_file(nodeid)
        if row < ns.FIRST_NODEID:
            raise refusal(errno.EPERM)
        try:
            if self.is_growing(nodeid):
                self.made.grow(nodeid, offset + len(data), data)
                return len(data)
            if offset >= self.namespace.size[row] and len(data):
                raise refusal(errno.EFBIG)
            if nodeid >= FIRST_PROVISIONAL:
                self.made.reach(nodeid)
            return self.volume.write(row, offset, data)
        except DeviceFaultError:
            self.memory_fails(nodeid)
            raise

    def fsync(self, nodeid: int) -> None:
        """Write the file's cache lines back to memory, where other hosts see them; a new file is logged first."""
        row = self.row(nodeid)
        if self.is_growing(nodeid):
            self.made.log(nodeid)
        elif not self.namespace.is_directory(row):
            self.volume.write_back(row)

    # -- maps (design 6, 7) ---------------------------------------------------------------------

    def map_must_wait(self, nodeid: int) -> bool:
        """Whether the kernel may not be given the map of a file at once, because another inode stands for its bytes or
        may do so soon."""
        spaces = self.volume.spaces
        if spaces is None or nodeid >= FIRST_SPACE or self.is_growing(nodeid):
            return False
        return bool(spaces.live) and not spaces.quiet(self.namespace.fmap(self.row(nodeid)).extents)

    def await_map(self, nodeid: int) -> None:
        """Let go of a file's bytes, and wait until no other inode stands for them. Raises SpaceBusyError."""
        spaces = self.volume.spaces
        assert spaces is not None
        extents = self.namespace.fmap(self.require_file(nodeid)).extents
        spaces.hide(extents)
        spaces.await_quiet(extents)

    def map_given(self, nodeid: int) -> None:
        """The kernel is about to be given the map of a file of new space."""
        if nodeid >= FIRST_SPACE and self.volume.spaces is not None:
            self.volume.spaces.give_to_kernel(nodeid)

    def lseek(self, nodeid: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE: a famfs file has no holes but its end."""
        size = self.namespace.size[self.require_file(nodeid)]
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise refusal(errno.EINVAL)
        if offset >= size:
            raise refusal(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else size

    # -- creating, and what nobody can do -------------------------------------------------------

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> int:
        """Make and log a directory; its nodeid."""
        path = self._new_path(parent, name)
        return self.volume.mkdir(path, mode & 0o7777 | self._mode[parent] & stat.S_ISGID, uid, self._group(parent, gid))

    def create(self, parent: int, name: bytes, flags: int, mode: int, uid: int, gid: int) -> tuple[int, int]:
        """Make a file that is not logged yet, or open one that somebody made meanwhile; its nodeid and FOPEN flags.

        The kernel counts as given the nodeid.
        """
        path = self._new_path(parent, name)
        # Whoever may create writes all of the log, so there is no need to look at it; an append does that anyway.
        if node := self.namespace.lookup(parent, name) or self.made.find(parent, name):
            node = self._known_as(node)
            if flags & os.O_EXCL:
                raise refusal(errno.EEXIST)
            if self.settings.maps and node < FIRST_PROVISIONAL:
                # The kernel asks for no map after CREATE: it is to look the name up, and to open it.
                raise refusal(errno.ESTALE)
            answer = self.open(node, flags)
            self.remember(node)
            return node, answer
        if not self.volume.can_fill:
            raise refusal(errno.EOPNOTSUPP)
        log.debug("%r is made", path)
        made = self.made.create(parent, name, mode, uid, self._group(parent, gid))
        return made, self.open_flags | OpenFlag.DIRECT_IO

    def _group(self, parent: int, gid: int) -> int:
        """The group of something new: that of the directory if this is set-group-ID, as on every file system."""
        return self._gid[parent] if self._mode[parent] & stat.S_ISGID else gid

    def unlink(self, parent: int, name: bytes) -> None:
        """Refused, but for the names of space files, which their opener takes away."""
        if parent != ns.META or not name.startswith(PREFIX):
            raise refusal(self.change_errno)

    @property
    def change_errno(self) -> int:
        """What unlink, rename, link and the like are refused with: the format has none of them."""
        return errno.EPERM if self.volume.role is Role.MASTER else errno.EROFS

    def _new_path(self, parent: int, name: bytes) -> bytes:
        if self.volume.role is not Role.MASTER:
            raise refusal(errno.EROFS)
        self.opendir(parent)
        if not self.settings.create or parent == ns.META:
            raise refusal(errno.EPERM)
        # No kernel asks for these; an entry that bears such a name would take its space and never be shown.
        if name in (b"", b".", b"..") or b"/" in name:
            raise refusal(errno.EINVAL)
        path = self.namespace.path(parent) + b"/" + name if parent != ns.ROOT else name
        if len(path) > layout.MAX_PATH:
            raise refusal(errno.ENAMETOOLONG)
        return path

    # -- extended attributes and figures --------------------------------------------------------

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        """The value of an extended attribute; there is one, the same for every node, and there when nothing else is:
        by it tools find out what is wrong."""
        if name == SHADOW_XATTR:
            return self.settings.shadow
        self.row(nodeid)
        raise refusal(errno.ENODATA)

    def statfs(self) -> tuple[int, ...]:
        """The fields of the wire's statfs: the true figures of the devices and of the log."""
        volume = self.volume
        capacity = volume.last_index + 1
        free = volume.space.free // BLOCK_SIZE
        left = max(capacity - volume.namespace.replayed, 0)
        blocks = sum(volume.space.sizes) // BLOCK_SIZE
        return (blocks, free, free, capacity, left, BLOCK_SIZE, layout.MAX_PATH, BLOCK_SIZE)


def errno_of(error: BaseException) -> int:
    """The errno that a request ends with because of `error`; EIO for what nobody foresaw, which is logged."""
    if isinstance(error, FamfsError):
        return error.errno
    if isinstance(error, OSError) and error.errno:
        return min(error.errno, 511)
    if isinstance(error, MemoryError):
        log.error("there is no memory left for a request")
        return errno.ENOMEM
    log.error("a request failed in a way that nobody foresaw", exc_info=error)
    return errno.EIO
