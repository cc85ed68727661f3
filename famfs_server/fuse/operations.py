# SPDX-License-Identifier: Apache-2.0
"""The control plane: a complete file system as `pyfuse3.Operations`.

With the fast path off every request that pyfuse3 has a handler for comes here, and the answers must be the same as the
request plane's; both ask `FileSystem` (decisions 8).
"""

import errno
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from famfs_server.fuse.abi import OpenFlag, SetattrValid
from famfs_server.fuse.filesystem import DOTDOT, Attributes, FileSystem, errno_of

P = ParamSpec("P")
R = TypeVar("R")


def _answered(
    handler: Callable[Concatenate["FamfsOperations", P], Awaitable[R]],
) -> Callable[Concatenate["FamfsOperations", P], Coroutine[Any, Any, R]]:
    """Turn every error of a handler into the errno of the reply."""

    @wraps(handler)
    async def wrapper(self: "FamfsOperations", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(errno_of(error)) from error

    return wrapper


class FamfsOperations(pyfuse3.Operations):
    """Handlers for one `FileSystem`. File handles are nodeids: an open file has no state of its own."""

    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: FileSystem) -> None:
        super().__init__()
        self._fs = filesystem

    def _entry(self, nodeid: int) -> EntryAttributes:
        fs = self._fs
        ino, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink, uid, gid, *_ = fs.attr(
            nodeid
        )
        entry = EntryAttributes()
        entry.st_ino = InodeT(ino)
        entry.st_size = size
        entry.st_blocks = blocks
        entry.st_blksize = 4096
        entry.st_mode = ModeT(mode)
        entry.st_nlink = nlink
        entry.st_uid, entry.st_gid = uid, gid
        entry.st_atime_ns = atime * 10**9 + atime_ns
        entry.st_mtime_ns = mtime * 10**9 + mtime_ns
        entry.st_ctime_ns = ctime * 10**9 + ctime_ns
        entry.entry_timeout, entry.attr_timeout = fs.timeouts(nodeid)
        return entry

    @_answered
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        node = self._fs.lookup(parent_inode, name)
        if not node:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self._fs.remember(node)
        return self._entry(node)

    @_answered
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(inode)

    @_answered
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        valid = 0
        for wanted, bit in (
            (fields.update_size, SetattrValid.SIZE),
            (fields.update_mode, SetattrValid.MODE),
            (fields.update_uid, SetattrValid.UID),
            (fields.update_gid, SetattrValid.GID),
            (fields.update_atime, SetattrValid.ATIME),
            (fields.update_mtime, SetattrValid.MTIME),
            (fields.update_ctime, SetattrValid.CTIME),
        ):
            if wanted:
                valid |= bit
        new = Attributes(
            valid,
            attr.st_size,
            attr.st_mode,
            attr.st_uid,
            attr.st_gid,
            attr.st_atime_ns,
            attr.st_mtime_ns,
            attr.st_ctime_ns,
        )
        self._fs.setattr(inode, new)
        return self._entry(inode)

    @_answered
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        self._fs.opendir(inode)
        return FileHandleT(inode)

    @_answered
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        # A handle is a number of the request: it need not be one that has ever been given.
        self._fs.opendir(fh)
        for cookie, node, name in self._fs.entries(fh, start_id):
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._entry(node), cookie):
                return
            if cookie > DOTDOT:
                self._fs.remember(node)

    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing was opened."""

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Log entries are in memory before a request that makes them is answered."""

    @_answered
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return self._opened(inode, self._fs.open(inode, flags))

    @staticmethod
    def _opened(nodeid: int, answer: int) -> FileInfo:
        """pyfuse3 would keep the page cache unless it is told not to."""
        return FileInfo(
            fh=FileHandleT(nodeid),
            direct_io=bool(answer & OpenFlag.DIRECT_IO),
            keep_cache=bool(answer & OpenFlag.KEEP_CACHE),
        )

    @_answered
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self._fs.read(fh, off, size)

    @_answered
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return self._fs.write(fh, off, memoryview(buf))

    @_answered
    async def flush(self, fh: FileHandleT) -> None:
        """Refused once and never asked again (findings 1.2)."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @_answered
    async def release(self, fh: FileHandleT) -> None:
        self._fs.release(fh)

    @_answered
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        self._fs.fsync(fh)

    @_answered
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._fs.mkdir(parent_inode, name, mode & ~ctx.umask, ctx.uid, ctx.gid))

    @_answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        blocks, bfree, bavail, files, ffree, bsize, namelen, frsize = self._fs.statfs()
        data = StatvfsData()
        data.f_blocks, data.f_bfree, data.f_bavail = blocks, bfree, bavail
        data.f_files, data.f_ffree, data.f_favail = files, ffree, ffree
        data.f_bsize, data.f_frsize, data.f_namemax = bsize, frsize, namelen
        return data

    @_answered
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return self._fs.getxattr(inode, name)

    @_answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[XAttrNameT]:
        self._fs.row(inode)
        return []

    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        # The kernel checks by mode and owner itself (default_permissions).
        return True

    def _refuse(self) -> NoReturn:
        raise pyfuse3.FUSEError(self._fs.change_errno)

    @_answered
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node, answer = self._fs.create(parent_inode, name, flags, mode & ~ctx.umask, ctx.uid, ctx.gid)
        return self._opened(node, answer), self._entry(InodeT(node))

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        self._refuse()

    @_answered
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._fs.unlink(parent_inode, name)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._refuse()

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        self._refuse()

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        self._refuse()

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        self._refuse()

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        raise pyfuse3.FUSEError(errno.EINVAL)

    def stacktrace(self) -> None:
        """Not offered: thread stacks come by signal (SIGUSR1)."""
