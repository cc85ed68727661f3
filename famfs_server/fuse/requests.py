# SPDX-License-Identifier: Apache-2.0
"""The request plane: hot requests answered straight from the namespace, in tight Python.

Handlers are plain functions of a request that lies in one buffer; each writes its reply to the kernel itself. No trio,
no lock held over a system call, and no copy of file data in Python: READ hands views of device memory to writev, so
that a poisoned page becomes EIO for one reader and not a SIGBUS for all (design 4).
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable
from struct import Struct
from time import perf_counter_ns
from typing import Final

from famfs_server.fuse import abi, counters, wellformed
from famfs_server.fuse.abi import SETS_SIZE, SETS_TIMES, Opcode, OpenFlag, SetattrValid
from famfs_server.fuse.counters import OPCODES, SAMPLED
from famfs_server.fuse.delayed_opens import DelayedOpens
from famfs_server.fuse.filesystem import DOTDOT, Attributes, FileSystem, errno_of, refusal
from famfs_server.fuse.fmap_replies import FmapReplies
from famfs_server.fuse.listers import Listers
from famfs_server.fuse.listing import WINDOW, Window
from famfs_server.fuse.planes import ALWAYS, FAST
from famfs_server.fuse.session import Session
from famfs_server.volume import namespace as ns
from famfs_server.volume.provisional import FIRST_PROVISIONAL

log = logging.getLogger(__name__)

Handler = Callable[[int, int, int], None]
"""Answers a request: its unique, its nodeid and its length; the rest lies in the buffer."""

_BODY: Final = abi.IN_HEADER.size
NO_REPLY: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET})
"""Requests that nothing may answer."""

_SHORTEST: Final[dict[int, int]] = {
    opcode: wellformed.FIXED.get(opcode, 0) + 2 * wellformed.NAMES.get(opcode, 0)
    for opcode in (
        *(Opcode.LOOKUP, Opcode.GETATTR, Opcode.SETATTR, Opcode.MKDIR, Opcode.CREATE, Opcode.FORGET),
        *(Opcode.BATCH_FORGET, Opcode.FALLOCATE, Opcode.OPEN, Opcode.READ, Opcode.WRITE, Opcode.READDIR),
        *(Opcode.READDIRPLUS, Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.LSEEK),
    )
}
"""The least length of a request's body; shorter ones are EINVAL."""

REQUEST: Final = Struct("<IIQQ")
"""The part of a request's header that every handler needs: len, opcode, unique, nodeid."""

_MAKING: Final = (Opcode.MKDIR, Opcode.CREATE)
"""Requests that make a name."""

_FINDING: Final = (Opcode.LOOKUP, Opcode.READDIRPLUS)
"""Requests whose answers can name any file of a directory."""

_POISONED: Final = (errno.EFAULT, errno.EIO, 133)
"""What writing an answer fails with where the kernel cannot read the device's memory; the last is EHWPOISON."""

_NSEC = 10**9
_SIGN: Final = 1 << 63
_KNOWN: Final = frozenset(map(int, Opcode))


class RequestPlane:
    """Answers the requests of one session, each while it lies in the session's buffer."""

    def __init__(
        self,
        filesystem: FileSystem,
        session: Session,
        *,
        fast: bool,
        maps: FmapReplies | None = None,
        serve_unmapped: bool = True,
    ) -> None:
        """`fast` serves the hot opcodes too. `maps` answers for extent maps, on connections that have them. There,
        `serve_unmapped` says whether READ and WRITE, which should not come, are served or EIO."""
        self._fs = filesystem
        self._maps = maps
        self.unmapped = 0
        """READ and WRITE requests for files that the kernel should have mapped."""
        self._tree = filesystem.namespace
        self._fuse = session.fuse
        self._record = session.record
        self._buffer = self._view = session.record.buffer
        self._poison = session.record.poison
        self._most = session.max_write
        self.counts = counters.counts(session.record.counters)
        """Requests of each opcode that have come: a list, since it is the cheapest thing to count in."""
        self._window: Window | None = None
        self._listers = Listers()
        self._listed = self._listers.listed
        self._delayed = DelayedOpens(self._end_open)
        known: dict[Opcode, Handler] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._forget,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._nothing,
            Opcode.MKDIR: self._mkdir,
            Opcode.CREATE: self._create,
            Opcode.STATFS: self._statfs,
            Opcode.FSYNC: self._fsync,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.LSEEK: self._lseek,
            Opcode.FALLOCATE: self._fallocate,
            # Callers fall back to reading and writing; ENOSYS is not asked again.
            Opcode.COPY_FILE_RANGE: self._always(errno.ENOSYS),
            Opcode.COPY_FILE_RANGE_64: self._always(errno.ENOSYS),
            Opcode.IOCTL: self._always(errno.ENOTTY),
            Opcode.TMPFILE: self._always(errno.EOPNOTSUPP),
            Opcode.STATX: self._always(errno.ENOSYS),
            Opcode.SYNCFS: self._always(errno.ENOSYS),
            Opcode.FLUSH: self._always(errno.ENOSYS),
            # Requests are answered in one go, so there is never anything to interrupt.
            Opcode.INTERRUPT: self._always(errno.ENOSYS),
        }
        served = ALWAYS | FAST if fast else ALWAYS
        self._unknown = self._always(errno.ENOSYS)
        self._handlers: list[Handler | None] = [
            None if opcode in _KNOWN else self._unknown for opcode in range(OPCODES)
        ]
        for opcode in served:
            self._handlers[opcode] = known[opcode]
        # Files that are not logged are counted exactly once, which only this plane can: it sees what is sent again.
        self._for_provisional = known
        self.opcode_names: dict[int, str] = {}
        """The opcodes of this connection that FUSE does not know."""
        if maps is not None:
            self._handlers[maps.get_fmap_opcode] = self._get_fmap
            self.opcode_names[maps.get_fmap_opcode] = "get_fmap"
            if maps.get_daxdev_opcode is not None:
                self.opcode_names[maps.get_daxdev_opcode] = "get_daxdev"
                self._handlers[maps.get_daxdev_opcode] = self._get_daxdev
            if filesystem.no_open:
                self._handlers[Opcode.OPEN] = self._always(errno.ENOSYS)
            self._handlers[Opcode.READ] = self._watched(self._read, serve_unmapped)
            self._handlers[Opcode.WRITE] = self._watched(self._write, serve_unmapped)

    def answer(self, length: int) -> bool:
        """Answer the request of `length` bytes in the buffer; False if it is not this plane's."""
        size, opcode, unique, nodeid = REQUEST.unpack_from(self._buffer)
        began = 0
        if opcode < OPCODES:
            handler = self._handlers[opcode]
            self.counts[opcode] = count = self.counts[opcode] + 1
            if count & SAMPLED == 1:
                began = perf_counter_ns()
        else:
            handler = self._unknown
        if self._poison and unique & ~abi.UNIQUE_RESEND == self._poison:
            log.error("request %d (opcode %d) has ended two workers; it is answered with EIO", unique, opcode)
            handler = self._always(errno.EIO)
        elif nodeid >= FIRST_PROVISIONAL:
            handler = self._for_provisional.get(opcode, handler)
        elif opcode in _MAKING and size == length:
            handler = self._made_before(opcode, unique, nodeid, length) or handler
        if handler is None and opcode in _FINDING and self._fs.has_provisional:
            handler = self._for_provisional[opcode]
        if handler is None:
            if wellformed.fits(self._view[:length], opcode, self._most):
                return False
            handler = self._refuse_malformed
        try:
            if size != length or length - _BODY < _SHORTEST.get(opcode, 0):
                raise refusal(errno.EINVAL)
            handler(unique, nodeid, length)
        except Exception as error:
            counters.failed(self._record.counters, opcode)
            if opcode not in NO_REPLY:
                reply(self._fuse, abi.error_reply(unique, errno_of(error)))
        self._record.done(unique)
        if began:
            counters.measured(self._record.counters, opcode, self.counts[opcode], perf_counter_ns() - began)
        return True

    def finish(self) -> None:
        """To be called by a successor, before it reads: complete what a dead worker had in hand and had begun to count.

        A kernel does not send a FORGET again, and a LOOKUP that were sent again would be counted twice: in both cases
        the kernel would seem to know a file for ever that it has forgotten (decisions 15).
        """
        unique = self._record.left
        if not unique:
            return
        length, opcode, _, nodeid = REQUEST.unpack_from(self._buffer)
        try:
            if opcode in NO_REPLY:
                self._forget(unique, nodeid, length)
            elif opcode == Opcode.LOOKUP:
                self._answer_counted(unique, nodeid, length)
        except Exception:
            log.exception("request %d (opcode %d), left by a dead worker, cannot be completed", unique, opcode)
        self._record.finished()

    def end(self) -> None:
        """To be called when the connection has ended, and what was not read yet is lost (protocol 0)."""
        self._fs.made.end()

    def _answer_counted(self, unique: int, nodeid: int, length: int) -> None:
        """Answer a LOOKUP if a dead worker has counted it. If it has answered it, too, this is dropped."""
        item, before = self._record.noted_count(unique)
        if item < 0:
            return
        node = self._fs.lookup(nodeid, self._buffer[_BODY : length - 1].tobytes())
        if node >= FIRST_PROVISIONAL and self._fs.given(node) == before + 1:
            self._reply_entry(unique, node)

    # -- names and attributes -------------------------------------------------------------------

    def _name(self, start: int, length: int) -> bytes:
        """The name that ends the request."""
        name = bytes(self._view[start : length - 1])
        if self._buffer[length - 1] or b"\0" in name or b"/" in name or not name:
            raise refusal(errno.EINVAL)
        return name

    def _lookup(self, unique: int, nodeid: int, length: int) -> None:
        # A name with a slash or a NUL in it is the name of nothing, and needs no look at it.
        node = self._fs.lookup(nodeid, self._buffer[_BODY : length - 1].tobytes())
        if node:
            if nodeid in self._listed and node < FIRST_PROVISIONAL and not self._tree.is_directory(node):
                self._listers.looked_up(nodeid)
            self._entry(unique, node)
        else:
            reply(self._fuse, abi.error_reply(unique, errno.ENOENT))

    def _entry(self, unique: int, node: int) -> None:
        if node >= FIRST_PROVISIONAL:
            self._record.note_count(unique, 0, self._fs.given(node))
            self._fs.remember(node)
        self._reply_entry(unique, node)

    def _reply_entry(self, unique: int, node: int) -> None:
        fs = self._fs
        name, attributes = fs.timeouts(node)
        reply(self._fuse, abi.ENTRY_REPLY.pack(144, 0, unique, node, 0, name, attributes, 0, 0, *fs.attr(node)))

    def _forget(self, unique: int, nodeid: int, length: int) -> None:
        """Carry out a FORGET or BATCH_FORGET, from where a dead worker has come to, if any has."""
        last, before = self._record.noted_count(unique)
        for item, (node, count) in enumerate(self._given_back(nodeid, length)):
            if node < FIRST_PROVISIONAL or item < last:
                continue
            given = self._fs.given(node)
            if item == last and given != before:
                # It was subtracted, and nothing else may have been done.
                count = 0
            else:
                self._record.note_count(unique, item, given)
            self._fs.forget(node, count)

    def _given_back(self, nodeid: int, length: int) -> Iterable[tuple[int, int]]:
        """What the FORGET or BATCH_FORGET in the buffer gives back: nodeids, and how often each had been given."""
        if REQUEST.unpack_from(self._buffer)[1] == Opcode.FORGET:
            return [(nodeid, *abi.FORGET_IN.unpack_from(self._buffer, _BODY))]
        start = _BODY + abi.BATCH_FORGET_IN.size
        return abi.FORGET_ONE.iter_unpack(self._view[start : length - (length - start) % 16])

    def _getattr(self, unique: int, nodeid: int, length: int) -> None:
        fs = self._fs
        reply(self._fuse, abi.ATTR_REPLY.pack(120, 0, unique, fs.timeouts(nodeid)[1], 0, *fs.attr(nodeid)))

    def _setattr(self, unique: int, nodeid: int, length: int) -> None:
        valid, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, uid, gid = (
            abi.SETATTR_IN.unpack_from(self._buffer, _BODY)
        )
        new = Attributes(valid, size, mode, uid, gid)
        if valid & SETS_TIMES:
            now = self._fs.now()
            new.atime = now if valid & SetattrValid.ATIME_NOW else _nanoseconds(atime, atime_ns)
            new.mtime = now if valid & SetattrValid.MTIME_NOW else _nanoseconds(mtime, mtime_ns)
            new.ctime = _nanoseconds(ctime, ctime_ns)

        def change() -> None:
            self._fs.setattr(nodeid, new)
            self._getattr(unique, nodeid, length)

        self._run(unique, nodeid, change, beside=valid & SETS_SIZE != 0 and self._fs.takes_long(nodeid, size))

    def _mkdir(self, unique: int, nodeid: int, length: int) -> None:
        mode, umask = abi.MKDIR_IN.unpack_from(self._buffer, _BODY)
        _, _, _, _, uid, gid, _, _ = abi.IN_HEADER.unpack_from(self._buffer)
        name = self._name(_BODY + abi.MKDIR_IN.size, length)
        self._entry(unique, self._fs.mkdir(nodeid, name, mode & ~umask, uid, gid))

    def _create(self, unique: int, nodeid: int, length: int) -> None:
        flags, mode, umask, _ = abi.CREATE_IN.unpack_from(self._buffer, _BODY)
        _, _, _, _, uid, gid, _, _ = abi.IN_HEADER.unpack_from(self._buffer)
        name = self._name(_BODY + abi.CREATE_IN.size, length)
        node, answer = self._fs.create(nodeid, name, flags, mode & ~umask, uid, gid)
        self._created(unique, node, answer)

    def _created(self, unique: int, node: int, answer: int) -> None:
        fs = self._fs
        entry = (node, 0, *fs.timeouts(node), 0, 0, *fs.attr(node))
        reply(self._fuse, abi.CREATE_REPLY.pack(160, 0, unique, *entry, 0, answer, 0))

    def _run(self, unique: int, nodeid: int, change: Callable[[], None], *, beside: bool) -> None:
        """Carry out a change and answer it, here or in a thread of its own where others would wait for it too long."""
        if not beside:
            change()
            return
        made = self._fs.made

        def carry_out() -> None:
            try:
                with made.changing(nodeid):
                    change()
            except Exception as error:
                reply(self._fuse, abi.error_reply(unique, errno_of(error)))
            self._record.let_go(unique)

        made.begin_change(nodeid)
        self._record.hold(unique)
        try:
            threading.Thread(target=carry_out, name="long change", daemon=True).start()
        except RuntimeError:
            # The system, or the service manager's limit, has no thread left: then others have to wait.
            carry_out()

    def _made_before(self, opcode: int, unique: int, nodeid: int, length: int) -> Handler | None:
        """How to answer a MKDIR or CREATE that a dead worker has carried out already; nothing for any other
        (decisions 15)."""
        began = self._record.noted_change(unique) if unique & abi.UNIQUE_RESEND else None
        if began is None:
            self._record.note_change(unique, self._tree.replayed)
            return None
        name = bytes(self._view[_BODY + wellformed.FIXED[opcode] : length - 1])
        if opcode == Opcode.CREATE:
            node = self._fs.made.find(nodeid, name)
            return (lambda *_: self._created(unique, node, OpenFlag.DIRECT_IO)) if node else None
        node = self._tree.lookup(nodeid, name)
        return (lambda *_: self._entry(unique, node)) if node and ns.index_of(node) >= began else None

    def _is_counted(self, unique: int, nodeid: int) -> bool:
        """Whether a worker before has counted this OPEN or RELEASE: it has noted how many opens there were before."""
        opens = self._fs.made.opens(nodeid)
        noted = self._record.noted_change(unique) if unique & abi.UNIQUE_RESEND else None
        if noted is not None:
            return noted != opens
        self._record.note_change(unique, opens)
        return False

    # -- files ----------------------------------------------------------------------------------

    def _open(self, unique: int, nodeid: int, length: int) -> None:
        flags, _ = abi.OPEN_IN.unpack_from(self._buffer, _BODY)
        if self._fs.open_must_wait(nodeid):
            self._record.hold(unique)
            self._delayed.wait(nodeid, unique)
            return
        if nodeid >= FIRST_PROVISIONAL and self._is_counted(unique, nodeid):
            answer = int(OpenFlag.DIRECT_IO)
        else:
            answer = self._fs.open(nodeid, flags)
        reply(self._fuse, abi.OPEN_REPLY.pack(32, 0, unique, 0, answer, 0))

    def _end_open(self, unique: int, number: int) -> None:
        """Refuse an OPEN that has waited."""
        reply(self._fuse, abi.error_reply(unique, number))
        self._record.let_go(unique)

    def _release(self, unique: int, nodeid: int, length: int) -> None:
        if nodeid >= FIRST_PROVISIONAL:
            if self._is_counted(unique, nodeid):
                self._fs.finish_release(nodeid)
            else:
                self._fs.release(nodeid)
            if not self._fs.open_must_wait(nodeid):
                self._delayed.closed(nodeid)
        self._nothing(unique, nodeid, length)

    def _fallocate(self, unique: int, nodeid: int, length: int) -> None:
        _, offset, count, mode = abi.FALLOCATE_IN.unpack_from(self._buffer, _BODY)

        def change() -> None:
            self._fs.allocate(nodeid, offset, count, mode)
            self._nothing(unique, nodeid, length)

        self._run(unique, nodeid, change, beside=self._fs.takes_long(nodeid, offset + count))

    def _nothing(self, unique: int, nodeid: int, length: int) -> None:
        reply(self._fuse, abi.OUT_HEADER.pack(16, 0, unique))

    def _read(self, unique: int, nodeid: int, length: int) -> None:
        _, offset, size, _, _, _ = abi.READ_IN.unpack_from(self._buffer, _BODY)
        if nodeid >= FIRST_PROVISIONAL and self._fs.must_be_reached(nodeid):
            self._run(unique, nodeid, lambda: self._fetch(unique, nodeid, offset, size), beside=True)
        else:
            self._fetch(unique, nodeid, offset, size)

    def _fetch(self, unique: int, nodeid: int, offset: int, size: int) -> None:
        views = self._fs.views(nodeid, offset, size)
        total = sum(map(len, views))
        try:
            os.writev(self._fuse, [abi.OUT_HEADER.pack(16 + total, 0, unique), *views])
        except OSError as error:
            if error.errno in _POISONED:
                self._fs.memory_fails(nodeid)
            if error.errno != errno.ENOENT:
                raise refusal(errno.EIO) from error

    def _write(self, unique: int, nodeid: int, length: int) -> None:
        _, offset, size, _, _, _ = abi.WRITE_IN.unpack_from(self._buffer, _BODY)
        start = _BODY + abi.WRITE_IN.size
        if length - start != size:
            raise refusal(errno.EINVAL)
        if nodeid >= FIRST_PROVISIONAL and self._fs.takes_long(nodeid, offset + size, offset):
            # The next request comes to where the data lie.
            data = memoryview(bytes(self._view[start:length]))
            self._run(unique, nodeid, lambda: self._store(unique, nodeid, offset, data), beside=True)
        else:
            self._store(unique, nodeid, offset, self._view[start:length])

    def _store(self, unique: int, nodeid: int, offset: int, data: memoryview) -> None:
        done = self._fs.write(nodeid, offset, data)
        reply(self._fuse, abi.WRITE_REPLY.pack(24, 0, unique, done))

    def _fsync(self, unique: int, nodeid: int, length: int) -> None:
        def change() -> None:
            self._fs.fsync(nodeid)
            self._nothing(unique, nodeid, length)

        self._run(unique, nodeid, change, beside=self._fs.flushes_long(nodeid))

    def _lseek(self, unique: int, nodeid: int, length: int) -> None:
        _, offset, whence = abi.LSEEK_IN.unpack_from(self._buffer, _BODY)
        found = self._fs.lseek(nodeid, offset, whence)
        reply(self._fuse, abi.OUT_HEADER.pack(24, 0, unique) + abi.LSEEK_OUT.pack(found))

    # -- directories ----------------------------------------------------------------------------

    def _opendir(self, unique: int, nodeid: int, length: int) -> None:
        self._fs.opendir(nodeid)
        reply(self._fuse, abi.OPEN_REPLY.pack(32, 0, unique, 0, 0, 0))

    def _readdir(self, unique: int, nodeid: int, length: int) -> None:
        self._list(unique, nodeid, plus=False)

    def _readdirplus(self, unique: int, nodeid: int, length: int) -> None:
        self._list(unique, nodeid, plus=True)

    def _list(self, unique: int, nodeid: int, *, plus: bool) -> None:
        """Which of the two is asked for is the kernel's choice: it wants to know all about the first entries, and about
        later ones if somebody has looked at files of the directory meanwhile (READDIRPLUS_AUTO)."""
        _, cookie, size, _, _, _ = abi.READ_IN.unpack_from(self._buffer, _BODY)
        fs = self._fs
        fs.opendir(nodeid)
        if cookie < DOTDOT:
            fs.follow()
        # What is left of `.` and `..`, and no more: the entry behind them is told with the others.
        dots_size = max(DOTDOT - cookie, 0) * (abi.direntplus_size(2) if plus else abi.dirent_size(2))
        if fs.has_provisional or cookie >= FIRST_PROVISIONAL or size < dots_size:
            records, used = self._records(nodeid, cookie, size, plus=plus)
            reply(self._fuse, b"".join([abi.OUT_HEADER.pack(16 + used, 0, unique), *records]))
            return
        dots, bare = b"", False
        first = cookie < DOTDOT
        if first:
            # `.` and `..` depend on who asks for what is left of them; they are made one by one.
            records, used = self._records(nodeid, cookie, dots_size, plus=plus)
            dots, size, cookie = b"".join(records), size - used, DOTDOT
            bare = plus and not self._listers.begins(abi.IN_HEADER.unpack_from(self._buffer)[6], nodeid)
        if plus and not bare:
            data: bytes | memoryview = self._described(nodeid, cookie, size, first=first)
        else:
            data = fs.dirents(nodeid, cookie, size, lead=abi.ENTRY_OUT.size if plus else 0)
        total = 16 + len(dots) + len(data)
        os.writev(self._fuse, [abi.OUT_HEADER.pack(total, 0, unique), dots, data])

    def _described(self, directory: int, cookie: int, size: int, *, first: bool) -> memoryview:
        """READDIRPLUS records of what the log has made, from the window that holds them, or from a new one."""
        window = self._window
        if window is None or not window.serves(self._fs, directory, cookie, size):
            # Behind the first request the next one is likely to want names alone.
            count = min(WINDOW, size // abi.DIRENTPLUS.size + 1) if first else WINDOW
            self._window = window = Window(self._fs, directory, cookie, count=count)
        return window.take(cookie, size)

    def _records(self, directory: int, cookie: int, size: int, *, plus: bool) -> tuple[list[bytes], int]:
        """Records of a listing one by one, and the bytes that they take."""
        size_of, head = (abi.direntplus_size, self._plus_head) if plus else (abi.dirent_size, self._head)
        records: list[bytes] = []
        room = size
        for place, node, name in self._fs.entries(directory, cookie):
            need = size_of(len(name))
            if need > room:
                break
            room -= need
            records.append((head(place, node, len(name)) + name).ljust(need, b"\0"))
        return records, size - room

    def _head(self, place: int, node: int, length: int) -> bytes:
        """A READDIR record without its name."""
        return abi.DIRENT.pack(node, place, length, self._tree.mode[self._fs.row(node)] >> 12)

    def _plus_head(self, place: int, node: int, length: int) -> bytes:
        """A READDIRPLUS record without its name; the kernel knows the node from then on, if the record says its nodeid:
        not for `.` and `..`, of which it takes no reference, nor for nodes that are counted, each in a request of its
        own."""
        fs = self._fs
        entry = node if place > DOTDOT and node < FIRST_PROVISIONAL else 0
        attributes = fs.attr(node)
        kind = attributes[9] >> 12
        return abi.DIRENTPLUS.pack(entry, 0, *fs.timeouts(node), 0, 0, *attributes, node, place, length, kind)

    # -- extent maps ----------------------------------------------------------------------------

    def _get_fmap(self, unique: int, nodeid: int, length: int) -> None:
        body = bytes(self._view[_BODY:length])
        if not self._fs.map_must_wait(nodeid):
            self._send_map(unique, nodeid, body)
            return

        def wait_and_send() -> None:
            self._fs.await_map(nodeid)
            self._send_map(unique, nodeid, body)

        self._run(unique, nodeid, wait_and_send, beside=True)

    def _send_map(self, unique: int, nodeid: int, body: bytes) -> None:
        assert self._maps is not None
        payload = self._maps.get_fmap(nodeid, body)
        reply(self._fuse, abi.OUT_HEADER.pack(16 + len(payload), 0, unique), payload)

    def _get_daxdev(self, unique: int, index: int, length: int) -> None:
        assert self._maps is not None
        reply(self._fuse, abi.OUT_HEADER.pack(296, 0, unique) + self._maps.get_daxdev(index))

    def _watched(self, serve: Handler, allowed: bool) -> Handler:
        """The watchdog: a kernel that maps files never sends these requests (protocol 1.4)."""

        def serve_and_count(unique: int, nodeid: int, length: int) -> None:
            self.unmapped += 1
            if self.unmapped == 1:
                log.error(
                    "the kernel negotiated extent maps but sends reads and writes: it does not use them, and what "
                    "programs see is not coherent with other hosts; mount with fmap=never, or mend the kernel"
                )
            if not allowed:
                raise refusal(errno.EIO)
            serve(unique, nodeid, length)

        return serve_and_count

    # -- the rest -------------------------------------------------------------------------------

    def _statfs(self, unique: int, nodeid: int, length: int) -> None:
        reply(self._fuse, abi.STATFS_REPLY.pack(96, 0, unique, *self._fs.statfs()))

    def _getxattr(self, unique: int, nodeid: int, length: int) -> None:
        (size,) = abi.GETXATTR_IN.unpack_from(self._buffer, _BODY)
        start = _BODY + abi.GETXATTR_IN.size
        self._xattr_value(unique, size, self._fs.getxattr(nodeid, bytes(self._view[start : length - 1])))

    def _listxattr(self, unique: int, nodeid: int, length: int) -> None:
        (size,) = abi.GETXATTR_IN.unpack_from(self._buffer, _BODY)
        self._fs.row(nodeid)
        self._xattr_value(unique, size, b"")

    def _xattr_value(self, unique: int, size: int, value: bytes) -> None:
        if size == 0:
            reply(self._fuse, abi.OUT_HEADER.pack(24, 0, unique) + abi.GETXATTR_OUT.pack(len(value)))
        elif size < len(value):
            raise refusal(errno.ERANGE)
        else:
            reply(self._fuse, abi.OUT_HEADER.pack(16 + len(value), 0, unique) + value)

    def _refuse_malformed(self, unique: int, nodeid: int, length: int) -> None:
        raise refusal(errno.EINVAL)

    def _always(self, number: int) -> Handler:
        def refuse(unique: int, nodeid: int, length: int) -> None:
            reply(self._fuse, abi.error_reply(unique, number))

        return refuse


def _nanoseconds(seconds: int, nanoseconds: int) -> int:
    """A time of the wire, whose seconds are signed though its field is not: before 1970 they are negative."""
    return ((seconds ^ _SIGN) - _SIGN) * _NSEC + nanoseconds


def reply(fuse: int, data: bytes, payload: bytes | memoryview = b"") -> None:
    """Write a reply. One that comes too late, since its request was interrupted or the mount is gone, is dropped."""
    try:
        if payload:
            os.writev(fuse, [data, payload])
        else:
            os.write(fuse, data)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
