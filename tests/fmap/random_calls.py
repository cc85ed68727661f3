# SPDX-License-Identifier: Apache-2.0
"""Programs that make random calls on both sides of an agreement. The fake kernel tells what they can do next."""

import os
import random
from collections.abc import Callable

from tests.fmap.agreement import Agreement
from tests.fmap.sides import LARGEST
from tests.twin.kernel import OpenFile

MIB = 1 << 20
MOST_OPEN = 6
LONGEST_FILE = 8 * MIB
META = (".meta/.superblock", ".meta/.log")


class Programs:
    """`create` tells whether they try to make files; where that is refused, some tries are enough."""

    def __init__(self, agreement: Agreement, rng: random.Random, paths: list[str], *, creates: bool) -> None:
        self._agreement = agreement
        self._rng = rng
        self._paths = [*paths, "missing"]
        self._folders = [""]
        self._open: dict[str, OpenFile] = {}
        self._mapped: set[str] = set()
        self._count = 0
        self._weights: dict[Callable[[], None], int] = {
            self.create: 10 if creates else 1,
            self.open: 12,
            self.open_held: 2,
            self.close: 10,
            self.write: 12,
            self.read: 8,
            self.fsync: 4,
            self.truncate: 4,
            self.allocate: 2,
            self.map: 5,
            self.touch: 3,
            self.unmap: 3,
            self.fstat: 2,
            self.stat: 6,
            self.listdir: 4,
            self.mkdir: 2,
            self.unlink: 1,
            self.drop_caches: 2,
            self.kill_worker: 2,
        }

    def run(self, calls: int) -> None:
        """Make so many calls, and close everything."""
        made = len(self._agreement.calls) + calls
        while len(self._agreement.calls) < made:
            if len(self._open) > MOST_OPEN:
                self.close()
            self._rng.choices(list(self._weights), list(self._weights.values()))[0]()
        while self._open or self._mapped:
            self.close()
            self.unmap()

    # -- choices --------------------------------------------------------------------------------

    def _file(self, suits: Callable[[OpenFile], bool] = lambda file: not file.flags & os.O_PATH) -> str:
        """An open file, or nothing."""
        names = [name for name, file in self._open.items() if suits(file)]
        return self._rng.choice(names) if names else ""

    def _held(self) -> str:
        """A file that is merely held. Not one that was dropped, since it was empty at its last close: for a second the
        kernel knows the attributes of such a one, and then it finds it stale without opening it."""
        return self._file(lambda file: bool(file.flags & os.O_PATH and file.inode.size))

    def _writable(self) -> str:
        return self._file(lambda file: file.flags & (os.O_ACCMODE | os.O_PATH) == os.O_RDWR)

    def _offset(self, file: OpenFile) -> int:
        size = file.inode.size
        return self._rng.choice((0, 0, size, self._rng.randrange(size + 1), size + self._rng.randrange(3 * MIB)))

    def _length(self) -> int:
        return self._rng.choice((1, 100, 4096, 5000, 70_000, MIB, LARGEST - self._rng.randrange(MIB)))

    def _opened(self, what: str, path: str, flags: int) -> None:
        if path in self._folders:
            return
        self._count += 1
        name = f"file{self._count}"
        words = f"{what} {path!r} {flags:#o} as {name}"
        if self._agreement.call(words, lambda side: side.open(name, path, flags)) is None:
            self._open[name] = self._agreement.played.files[name]

    def _result(self, name: str) -> Callable[[bytes | int], object]:
        """What is compared of the bytes of a file. Those of `.meta` are each side's own: it has its own UUIDs, and the
        twin's log is a copy into which nothing is appended."""
        is_meta = self._agreement.played.files[name].inode.path.startswith(b".meta/")
        return (lambda data: 0 if isinstance(data, int) else len(data)) if is_meta else (lambda data: data)

    # -- calls ----------------------------------------------------------------------------------

    def create(self) -> None:
        self._count += 1
        new = os.path.join(self._rng.choice(self._folders), "n" * self._rng.randrange(1, 20) + str(self._count))
        path = new if self._rng.random() < 0.8 else self._rng.choice(self._paths)
        self._paths.append(path)
        self._opened("create", path, os.O_RDWR | os.O_CREAT | self._rng.choice((0, os.O_EXCL)))

    def open(self) -> None:
        flags = (os.O_RDONLY,) * 5 + (os.O_RDWR,) * 5 + (os.O_PATH, os.O_PATH, os.O_RDWR | os.O_TRUNC)
        path = self._rng.choice(self._paths[-8:] if self._rng.random() < 0.5 else [*self._paths, *META])
        self._opened("open", path, self._rng.choice(flags))

    def open_held(self) -> None:
        if held := self._held():
            self._count += 1
            name = f"file{self._count}"
            act = f"open {held} again as {name}"
            if self._agreement.call(act, lambda side: side.open_held(name, held)) is None:
                self._open[name] = self._agreement.played.files[name]

    def close(self) -> None:
        if name := self._file(lambda file: True):
            del self._open[name]
            self._agreement.call(f"close {name}", lambda side: side.close(name))

    def write(self) -> None:
        if name := self._writable():
            offset, length = self._offset(self._open[name]), self._length()
            if offset + length <= LONGEST_FILE:
                data = self._rng.randbytes(length)
                act = f"write {name} {length} at {offset}"
                self._agreement.call(act, lambda side: side.write(name, offset, data))

    def read(self) -> None:
        if name := self._file():
            offset, length = self._offset(self._open[name]), self._length()
            result = self._result(name)
            self._agreement.call(
                f"read {name} {length} at {offset}", lambda side: result(side.read(name, offset, length))
            )

    def fsync(self) -> None:
        if name := self._file():
            self._agreement.call(f"fsync {name}", lambda side: side.fsync(name))

    def truncate(self) -> None:
        if name := self._writable():
            size = self._rng.choice((0, 5000, self._open[name].inode.size, self._rng.randrange(5 * MIB)))
            self._agreement.call(f"truncate {name} {size}", lambda side: side.truncate(name, size))

    def allocate(self) -> None:
        if name := self._writable():
            size = self._rng.choice((5000, 1 + self._rng.randrange(5 * MIB)))
            self._agreement.call(f"allocate {name} {size}", lambda side: side.allocate(name, size))

    def map(self) -> None:
        name = self._file(lambda file: not file.flags & os.O_PATH and file.inode.size > 0)
        if name and name not in self._mapped:
            private = self._rng.random() < 0.7
            act = f"map {name} {'private' if private else 'shared'}"
            result = self._result(name)
            if not isinstance(self._agreement.call(act, lambda side: result(side.map(name, private=private))), str):
                self._mapped.add(name)

    def touch(self) -> None:
        files = self._agreement.played.files
        names = sorted(name for name in self._mapped if files[name].inode.map)
        if names:
            # Of a file without a map, a page may be in the cache or not.
            name = self._rng.choice(names)
            offset = self._rng.randrange(files[name].inode.size)
            result = self._result(name)
            self._agreement.call(f"touch {name} at {offset}", lambda side: result(side.touch(name, offset)))

    def unmap(self) -> None:
        if self._mapped:
            name = self._rng.choice(sorted(self._mapped))
            self._mapped.remove(name)
            self._agreement.call(f"unmap {name}", lambda side: side.unmap(name))

    def fstat(self) -> None:
        if name := self._rng.choice((self._file, self._held))():
            self._agreement.call(f"fstat {name}", lambda side: side.fstat(name))

    def stat(self) -> None:
        path = self._rng.choice([*self._paths, *self._folders, *META])
        self._agreement.call(f"stat {path!r}", lambda side: side.stat(path))

    def listdir(self) -> None:
        path = self._rng.choice(self._folders)
        self._agreement.call(f"list {path!r}", lambda side: side.listdir(path))

    def mkdir(self) -> None:
        path = self._rng.choice([f"folder{self._count}", *self._paths, *self._folders[1:]])
        if self._agreement.call(f"mkdir {path!r}", lambda side: side.mkdir(path)) is None:
            self._folders.append(path)

    def unlink(self) -> None:
        path = self._rng.choice(self._paths)
        if path not in self._folders:
            self._agreement.call(f"unlink {path!r}", lambda side: side.unlink(path))

    def drop_caches(self) -> None:
        self._agreement.call("drop caches", lambda side: side.drop_caches())

    def kill_worker(self) -> None:
        self._agreement.call("kill the worker", lambda side: side.kill_worker())
