# SPDX-License-Identifier: Apache-2.0
"""One program of the soak: uses a mount in one way until it is told to stop, and reports what it saw as JSON.

Run as `load.py MOUNT ROLE HOST NUMBER SEED STATE`. The model is in the names: a file is called `KIND-PROGRAM-N-SIZE`,
and its bytes follow from its name. So every reader on every host knows what it must find, without asking anybody.

`STATE` is a small file: a number that grows with each outage of this host, and a word, `up`, `down` or `stop`. An error
is forgiven if the mount was down at any moment of the round in which it came.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

WAIT = 0.05
FAMFS = os.path.join(os.path.dirname(sys.executable), "famfs")
PATIENCE = 60.0
"""Seconds that a copy may take."""
SCRATCH = 1 << 20
"""Bytes of the file that each host writes to all the time."""


def content(name: str) -> bytes:
    """The bytes of a file, by its name."""
    return random.Random(name).randbytes(int(name.rpartition("-")[2]))


class Load:
    """What one program does and sees."""

    def __init__(self, root: str, role: str, number: str, index: str, seed: str, state: str) -> None:
        self.root, self.role, self.number, self.index, self.state_path = root, role, number, index, state
        self.rng = random.Random(f"{seed} {role} {number} {index}")
        self.calls: dict[str, int] = {}
        self.differences: list[str] = []
        self.failures: list[str] = []
        self.made: dict[str, Any] = {}
        self.longest: tuple[float, str, float] = (0.0, "", 0.0)
        self.read = self.outages = self.rounds = 0
        self.scratch = bytearray(SCRATCH)
        self.unknown = (0, 0)
        self.begun = self.state()

    def state(self) -> tuple[str, str]:
        """Number and word."""
        with open(self.state_path) as file:
            epoch, word = file.read().split()
        return epoch, word

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A system call, counted and timed; errors of it go to the round."""
        name = function.__name__
        start = time.monotonic()
        try:
            return function(*arguments)
        finally:
            took = time.monotonic() - start
            if took > self.longest[0] and self.state() == self.begun:
                self.longest = (took, name, start)
            self.calls[name] = self.calls.get(name, 0) + 1

    def run(self) -> None:
        """Rounds until the word is `stop`."""
        act = getattr(self, self.role)
        while (state := self.state())[1] != "stop" and len(self.failures) + len(self.differences) < 20:
            if state[1] == "down":
                time.sleep(WAIT)
                continue
            self.begun = state
            self.rounds += 1
            try:
                act()
            except OSError as error:
                if self.state() == self.begun:
                    self.failures.append(f"{self.role}: {error}")
                else:
                    self.outages += 1
                    time.sleep(WAIT)

    def differ(self, what: str) -> None:
        """Note a difference, unless the mount was down."""
        if self.state() == self.begun:
            self.differences.append(f"{self.role}: {what}")

    def check(self, path: str, *, growing: bool) -> None:
        """Read a file and compare; one that is `growing` may still be short, or have zeroes where nothing is yet."""
        name = os.path.basename(path)
        fd = self.call(os.open, path, os.O_RDONLY)
        try:
            found = b""
            while piece := self.call(os.pread, fd, self.rng.choice((4096, 100_000, 1 << 20)), len(found)):
                found += piece
        finally:
            self.call(os.close, fd)
        self.read += len(found)
        wanted = content(name)
        if found == wanted:
            return
        # What is not written yet is zero, and the reader may be behind the writer or before it.
        may_be_short = (growing and not name.startswith("c-")) or name.startswith("t-")
        both = zip(found, wanted, strict=False)
        if may_be_short and len(found) <= len(wanted) and all(a in (0, b) for a, b in both):
            return
        at = next(
            (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
        )
        self.differ(f"{path}: {len(found)} of {len(wanted)} bytes, the first difference at {at}")

    # -- roles ----------------------------------------------------------------------------------

    def make(self) -> None:
        """Files by writing, in folders of their own; every other one is synchronised."""
        rng, count = self.rng, len(self.made)
        folder = f"{self.root}/made{self.index}.{count // 200}"
        if not os.path.isdir(folder):
            self.call(os.mkdir, folder)
        kind = rng.choice("wwt")
        name = f"{kind}-{self.index}-{self.rounds}-{rng.choice((1, 100, 4096, 5000, 70_000, 300_000))}"
        data, sync = content(name), rng.random() < 0.5
        fd = self.call(os.open, f"{folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if kind == "t":
                self.call(os.ftruncate, fd, len(data))
            for at in range(0, len(data), 60_000):
                piece = data[at : at + 60_000]
                if self.call(os.pwrite, fd, piece, at) != len(piece):
                    self.differ(f"a short write to {name}")
            if sync:
                self.call(os.fsync, fd)
        finally:
            self.call(os.close, fd)
        self.made[f"{os.path.basename(folder)}/{name}"] = [sync, time.monotonic()]
        if self.call(os.stat, f"{folder}/{name}").st_size != len(data):
            self.differ(f"the size of {name}")

    def copy(self) -> None:
        """Files by `famfs cp`, which is killed at times and then done again. Nobody sees one before it is whole."""
        rng = self.rng
        folder = f"{self.root}/made{self.index}.{self.rounds // 5}"
        if not os.path.isdir(folder):
            self.call(os.mkdir, folder)
        source = tempfile.mkdtemp(prefix=f"copied{self.index}-", dir=os.path.dirname(self.state_path))
        sizes = rng.choices((1, 4096, 5000, 70_000, 3_000_000), (5, 5, 5, 5, 1), k=rng.choice((1, 20, 100)))
        names = [f"c-{self.index}-{self.rounds}.{number}-{size}" for number, size in enumerate(sizes)]
        try:
            for name in names:
                with open(f"{source}/{name}", "wb") as file:
                    file.write(content(name))
            command = [FAMFS, "cp", *(f"{source}/{name}" for name in names), folder]
            killed_after = rng.uniform(0.2, 2) if rng.random() < 0.5 else None
            if not self.done(command, killed_after):
                self.done(command, None)
            now = time.monotonic()
            for name in names:
                self.made[f"{os.path.basename(folder)}/{name}"] = [True, now]
            for name in rng.sample(names, min(10, len(names))):
                self.check(f"{folder}/{name}", growing=False)
        finally:
            shutil.rmtree(source)

    def done(self, command: list[str], killed_after: float | None) -> bool:
        """Run a program to its end, or kill it after so many seconds; whether it has ended by itself. OSError if it
        says that it has failed."""
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                _, said = process.communicate(timeout=killed_after or PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                if killed_after is None:
                    self.differ(f"{command[:2]} does not end")
                self.calls["cp, killed"] = self.calls.get("cp, killed", 0) + 1
                return False
        self.calls["cp"] = self.calls.get("cp", 0) + 1
        if process.returncode:
            raise OSError(errno.EIO, said.strip())
        return True

    def look(self) -> None:
        """Files of anybody, as they are found in listings; names that are nobody's."""
        folders = [name for name in self.call(os.listdir, self.root) if name.startswith("made")]
        for folder in self.rng.sample(folders, min(2, len(folders))):
            names = self.call(os.listdir, f"{self.root}/{folder}")
            if len(names) != len(set(names)):
                self.differ(f"a name twice in {folder}")
            for name in self.rng.sample(names, min(5, len(names))):
                self.check(f"{self.root}/{folder}/{name}", growing=self.number == "0")
        if self.call(os.path.exists, f"{self.root}/absent{self.rng.random()}"):
            self.differ("a name that nobody has made")
        self.call(os.statvfs, self.root)

    def write(self) -> None:
        """A file of this host's own, written anywhere and read back; nobody else writes to it."""
        rng, scratch = self.rng, self.scratch
        fd = self.call(os.open, f"{self.root}/scratch{self.number}", os.O_RDWR)
        try:
            # A write that an outage has broken off may have been carried out in part.
            at, length = self.unknown
            scratch[at : at + length] = self.call(os.pread, fd, length, at)
            for _ in range(5):
                at = rng.randrange(SCRATCH)
                data = rng.randbytes(min(rng.choice((1, 4096, 70_000)), SCRATCH - at))
                self.unknown = (at, len(data))
                if self.call(os.pwrite, fd, data, at) != len(data):
                    self.differ("a short write")
                scratch[at : at + len(data)] = data
                self.unknown = (0, 0)
                at = rng.randrange(SCRATCH)
                found = self.call(os.pread, fd, 50_000, at)
                self.read += len(found)
                if found != scratch[at : at + 50_000]:
                    self.differ(f"what was written at {at}")
            self.call(os.fsync, fd)
        finally:
            self.call(os.close, fd)

    def refuse(self) -> None:
        """What a client must not do."""
        for act in (os.mkdir, os.unlink, os.rmdir):
            try:
                self.call(act, f"{self.root}/made0.0")
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EEXIST, errno.EISDIR):
                    raise
            else:
                self.differ(f"{act.__name__} succeeds on a client")
        time.sleep(WAIT)


def main() -> None:
    """Runs until it is told to stop; the report goes to standard output."""
    load = Load(*sys.argv[1:])
    load.run()
    print(
        json.dumps(
            {
                "role": load.role,
                "host": load.number,
                "calls": load.calls,
                "rounds": load.rounds,
                "outages": load.outages,
                "read": load.read,
                "made": load.made,
                "longest": load.longest,
                "scratch": "" if load.unknown[1] else hashlib.sha256(load.scratch).hexdigest(),
                "differences": load.differences,
                "failures": load.failures,
            }
        )
    )


if __name__ == "__main__":
    main()
