# SPDX-License-Identifier: Apache-2.0
"""Two kernels before the same server code: the running one, by system calls on a mount, and the one that the tests of
`tests/twin` play. Both have the same methods, and end in the same errors; open files have names.
"""

import mmap
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from uuid import UUID

from famfs_server.omf import layout, superblock
from tests.fmap.request_trace import FORGET, INVAL_ENTRY, Request, RequestTrace, Traced, named
from tests.fmap.volumes import Volume
from tests.twin.connection import IN_HEADER, NOTIFY_INVAL_ENTRY, Exchange, Op
from tests.twin.kernel import Attr, FakeKernel, OpenFile
from tests.twin.maps import Dialect
from tests.twin.server import Twin

LARGEST = 4 << 20
"""Bytes that are read or written by one call at most."""

Status = tuple[int, int, int]
"""Of a file: its number, size and mode."""


class Side(Protocol):
    """What programs do."""

    def open(self, file: str, path: str, flags: int) -> None: ...
    def open_held(self, file: str, held: str) -> None: ...
    def close(self, file: str) -> None: ...
    def read(self, file: str, offset: int, length: int) -> bytes: ...
    def write(self, file: str, offset: int, data: bytes) -> int: ...
    def fsync(self, file: str) -> None: ...
    def truncate(self, file: str, size: int) -> None: ...
    def allocate(self, file: str, size: int) -> None: ...
    def map(self, file: str, *, private: bool) -> int: ...
    def touch(self, file: str, offset: int) -> int: ...
    def unmap(self, file: str) -> None: ...
    def fstat(self, file: str) -> Status: ...
    def stat(self, path: str) -> Status: ...
    def listdir(self, path: str) -> Sequence[str]: ...
    def mkdir(self, path: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def drop_caches(self) -> None: ...
    def kill_worker(self) -> None: ...
    def requests(self) -> list[Traced]: ...


class Real:
    """The mount of a volume, and the trace of its requests."""

    def __init__(self, volume: Volume, trace: RequestTrace, *, spared: Callable[[], int]) -> None:
        """`spared` gives the pid of a worker that is another server's."""
        self._volume = volume
        self._trace = trace
        self._fds: dict[str, int] = {}
        self._mappings: dict[str, mmap.mmap] = {}
        # At the beginning of a page: a request holds so many pages, and not so many bytes.
        self._buffer = mmap.mmap(-1, LARGEST)
        self._spared = spared

    def _path(self, path: str) -> str:
        return os.path.join(self._volume.point, path)

    def open(self, file: str, path: str, flags: int) -> None:
        self._fds[file] = os.open(self._path(path), flags, 0o644)

    def open_held(self, file: str, held: str) -> None:
        self._fds[file] = os.open(f"/proc/self/fd/{self._fds[held]}", os.O_RDONLY)

    def close(self, file: str) -> None:
        os.close(self._fds.pop(file))

    def read(self, file: str, offset: int, length: int) -> bytes:
        count = os.preadv(self._fds[file], [memoryview(self._buffer)[:length]], offset)
        return self._buffer[:count]

    def write(self, file: str, offset: int, data: bytes) -> int:
        self._buffer[: len(data)] = data
        return os.pwritev(self._fds[file], [memoryview(self._buffer)[: len(data)]], offset)

    def fsync(self, file: str) -> None:
        os.fsync(self._fds[file])

    def truncate(self, file: str, size: int) -> None:
        os.ftruncate(self._fds[file], size)

    def allocate(self, file: str, size: int) -> None:
        os.posix_fallocate(self._fds[file], 0, size)

    def map(self, file: str, *, private: bool) -> int:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        self._mappings[file] = mapping = mmap.mmap(self._fds[file], 0, flags, mmap.PROT_READ)
        return mapping[0]

    def touch(self, file: str, offset: int) -> int:
        return self._mappings[file][offset]

    def unmap(self, file: str) -> None:
        self._mappings.pop(file).close()

    def fstat(self, file: str) -> Status:
        found = os.fstat(self._fds[file])
        return found.st_ino, found.st_size, found.st_mode

    def stat(self, path: str) -> Status:
        found = os.stat(self._path(path))
        return found.st_ino, found.st_size, found.st_mode

    def listdir(self, path: str) -> Sequence[str]:
        return os.listdir(self._path(path))

    def mkdir(self, path: str) -> None:
        os.mkdir(self._path(path), 0o755)

    def unlink(self, path: str) -> None:
        os.unlink(self._path(path))

    def drop_caches(self) -> None:
        for _ in range(3):
            # What was used lately is spared once.
            Path("/proc/sys/vm/drop_caches").write_text("2")

    def kill_worker(self) -> None:
        for pid in set(self._volume.pids("famfs-worker")) - {self._spared()}:
            os.kill(pid, signal.SIGKILL)

    def requests(self) -> list[Traced]:
        return self._trace.take()

    def let_go(self) -> None:
        """Close all that is open."""
        for mapping in self._mappings.values():
            mapping.close()
        for fd in self._fds.values():
            os.close(fd)
        self._mappings.clear()
        self._fds.clear()


class Played:
    """A fake kernel of the same dialect, and a server for an image."""

    def __init__(self, image: Path, dialect: str, host: UUID | None, options: Sequence[str]) -> None:
        self._exchanges: list[Exchange] = []
        self.files: dict[str, OpenFile] = {}
        with image.open("rb") as file:
            found = superblock.inspect(file.read(layout.SUPERBLOCK.itemsize)).superblock
        assert found is not None
        self.twin = Twin(
            image,
            Dialect(dialect),
            words=options,
            host=host,
            famfs_mode=True,
            metadata_end=layout.LOG_OFFSET + found.log_length,
            watch=self._exchanges.append,
        )
        self.kernel: FakeKernel = self.twin.mount()

    def self_test(self) -> None:
        """What a supervisor does through a mount before anybody sees it; that of the twin has none."""
        file = self.kernel.openat(b".meta/.superblock")
        self.kernel.read(file, 0, 8)
        self.kernel.close_file(file)

    def open(self, file: str, path: str, flags: int) -> None:
        self.files[file] = self.kernel.openat(os.fsencode(path), flags)

    def open_held(self, file: str, held: str) -> None:
        self.files[file] = self.kernel.open_held(self.files[held])

    def close(self, file: str) -> None:
        closed = self.files[file]
        self.kernel.close_file(closed)
        if not closed.users:
            del self.files[file]
        self._await_name(closed)

    def read(self, file: str, offset: int, length: int) -> bytes:
        return self.kernel.read(self.files[file], offset, length)

    def write(self, file: str, offset: int, data: bytes) -> int:
        return self.kernel.write(self.files[file], offset, data)

    def fsync(self, file: str) -> None:
        self.kernel.fsync(self.files[file])

    def truncate(self, file: str, size: int) -> None:
        self.kernel.truncate(self.files[file], size)

    def allocate(self, file: str, size: int) -> None:
        self.kernel.allocate(self.files[file], 0, size)

    def map(self, file: str, *, private: bool) -> int:
        self.kernel.map(self.files[file], private=private)
        return self.kernel.touch(self.files[file], 0)

    def touch(self, file: str, offset: int) -> int:
        return self.kernel.touch(self.files[file], offset)

    def unmap(self, file: str) -> None:
        unmapped = self.files[file]
        self.kernel.unmap(unmapped)
        if not unmapped.users:
            del self.files[file]
        self._await_name(unmapped)

    def _await_name(self, closed: OpenFile) -> None:
        """A new file that holds anything is logged by its last close, and the kernel is told to look its name up."""
        inode = closed.inode
        if closed.users or closed.flags & os.O_PATH:
            return
        while inode.created and inode.size and self.kernel.is_named(inode):
            assert self.kernel.pump(self.kernel.timeout), f"nobody says that {inode.path!r} leads elsewhere"

    def fstat(self, file: str) -> Status:
        return _status(self.kernel.getattr(self.files[file].inode))

    def stat(self, path: str) -> Status:
        return _status(self.kernel.statx(os.fsencode(path)))

    def listdir(self, path: str) -> Sequence[str]:
        return [os.fsdecode(name) for name in self.kernel.listdir(os.fsencode(path))]

    def mkdir(self, path: str) -> None:
        self.kernel.mkdirat(os.fsencode(path))

    def unlink(self, path: str) -> None:
        self.kernel.unlinkat(os.fsencode(path))

    def drop_caches(self) -> None:
        self.kernel.drop_caches()

    def kill_worker(self) -> None:
        self.twin.succeed()

    def contents(self) -> dict[bytes, tuple[int, bytes]]:
        """Path, nodeid and bytes of all that is logged. The log itself does not come to the image."""
        found: dict[bytes, tuple[int, bytes]] = {}
        for inode in self.kernel.walk():
            if inode.is_directory:
                found[inode.path] = inode.nodeid, b""
            elif not inode.path.startswith(b".meta/"):
                file = self.kernel.open(inode)
                found[inode.path] = inode.nodeid, self.kernel.read(file, 0, inode.size)
                self.kernel.close_file(file)
        del found[b".meta"]
        return found

    def requests(self) -> list[Traced]:
        """Those of the programs have pid 0, those of the server's own processes 1."""
        self.kernel.require_silence()
        found = [Traced(int(exchange.from_server), _request(exchange)) for exchange in self._exchanges]
        self._exchanges.clear()
        for code, body in self.kernel.notifications:
            if code == NOTIFY_INVAL_ENTRY:
                found.append(Traced(1, Request(INVAL_ENTRY, (int.from_bytes(body[:8], "little"),))))
        self.kernel.notifications.clear()
        return found


def _request(exchange: Exchange) -> Request:
    if exchange.opcode == Op.FORGET:
        return Request(FORGET, (exchange.nodeid, int.from_bytes(exchange.body, "little")))
    return named(exchange.opcode, IN_HEADER.size + len(exchange.body))


def _status(attr: Attr) -> Status:
    return attr.ino, attr.size, attr.mode
