# SPDX-License-Identifier: Apache-2.0
"""A server that answers anything, or nothing, while programs use its files in every way: the kernel must survive it.

In each case a server mounts, takes a device and gives random, damaged, late, double and no answers to a few clients,
sends random notifications and may die. Then the connection is aborted. What must hold: the kernel warns of nothing,
every client ends, and the next mount gets the device. FAMFS_TEST_SEED repeats the cases, as far as the order of events
does; FAMFS_TEST_LONG makes more of them. The module has guard=1: without it, it hangs and crashes as kernels with the
patches do.
"""

import collections
import contextlib
import errno
import fcntl
import mmap
import os
import queue
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from famfs_server.fuse import abi
from famfs_server.fuse.abi import InitFlag, Notify, Opcode, OpenFlag
from guest_devices import SetMode
from kernel_log import KernelLog
from tests.fmap.raw_server import (
    FIRST_NODEID,
    GET_DAXDEV,
    GET_FMAP,
    LONG,
    MAPPING,
    PAGE,
    UNIT,
    Answer,
    Client,
    File,
    Mapped,
    RawMount,
    RawServer,
    Request,
    Script,
    Stripe,
    apart,
    device_name,
    simple,
    striped,
)

CASES, SECONDS = (1500, 180) if os.environ.get("FAMFS_TEST_LONG") else (15, 4)
"""For each dialect."""
USERS = Path("/sys/module/famfs/refcnt")
CLIENTS = 3
STEPS = 80
CASE_SECONDS = 0.5
ABORT_SECONDS = 20
NAMES = [f"f{number}" for number in range(6)]
STRANGE = (
    0, 1, 2, 3, 7, 10, 63, 64, 4095, 4096, UNIT - 1, UNIT, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
    (1 << 63) - 1, 1 << 63, (1 << 64) - UNIT, (1 << 64) - 1,
)  # fmt: skip
HARMFUL_BITS = InitFlag.OVER_IO_URING | InitFlag.REQUEST_TIMEOUT
"""Never replied: the module has no io_uring, and a time limit would end the connection by itself."""


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The same length, with some fields or bits changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5)) if data else 0):
        if rng.random() < 0.5:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            continue
        width = rng.choice((4, 8))
        at = rng.randrange(len(changed)) // 4 * 4
        value = (rng.choice(STRANGE) + rng.choice((0, 0, 1, -1))) % (1 << 8 * width)
        changed[at : at + width] = value.to_bytes(width, "little")
    return bytes(changed[: len(data)])


def random_map(rng: random.Random, dialect: str, number: int) -> bytes:
    """A map that the kernel takes, most of the time, in a part of the device by the file's number; but some maps
    overlap, and some lie outside of the device.
    """
    units = [number % 6 * 10 + unit for unit in range(10)]
    rng.shuffle(units)

    def run() -> tuple[int, int, int]:
        offset, length = (units.pop() if units else 0) * UNIT, UNIT
        if rng.random() < 0.1:
            offset, length = rng.randrange(60) * UNIT, rng.choice((1, 2, 3)) * UNIT
        roll = rng.random()
        if roll < 0.02:
            offset += rng.choice((512, PAGE, -UNIT * 100, 1 << 40)) % (1 << 64)
        elif roll < 0.04:
            length = rng.choice((0, PAGE, 100, 1 << 50))
        elif dialect == "push-interleave" and roll < 0.3:
            first = rng.randrange(512)
            offset, length = offset + first * PAGE, rng.randrange(1, 513 - first) * PAGE
        return offset, length, rng.choice((0,) * 60 + (1, 64))

    count = rng.choice((5, 32, 33, 0) if rng.random() < 0.1 else (1, 2, 3))
    if dialect != "push" and rng.random() < 0.4:
        stripes = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            strips = [run() for _ in range(max(count, 1))]
            chunk = rng.choice((UNIT, UNIT, UNIT, UNIT, PAGE if dialect != "pull" else 2 * UNIT, 0, PAGE * 3))
            room = min(length for _, length, _ in strips) // UNIT * UNIT * len(strips)
            nbytes = rng.choice((room, room, room, room // 2, room + 1, rng.randrange(1, 8 * UNIT)))
            stripes.append(Stripe(strips, chunk, nbytes))
        room = min(sum(stripe.nbytes for stripe in stripes), 64 * UNIT)
        fmap: Callable[[int], bytes] = partial(_striped, stripes)
    else:
        runs = [run() for _ in range(count)]
        room = sum(length for _, length, _ in runs) % (1 << 63)
        fmap = partial(_simple, runs)
    return fmap(
        rng.choice((room, room, room, room - room % PAGE, rng.randrange(room + 1), room + (rng.random() < 0.3)))
    )


def _striped(stripes: list[Stripe], size: int) -> bytes:
    return striped(*stripes, size=size)


def _simple(runs: list[tuple[int, int, int]], size: int) -> bytes:
    return simple(*runs, size=size)


# -- the server

WAYS = {
    "error": 4, "wild": 2, "damage": 8, "cut": 2, "more": 2, "large": 1, "none": 0.3, "late": 4, "twice": 2,
    "header": 2,
}  # fmt: skip
"""What is done in place of the right answer, and how often."""


@dataclass
class Plan(Script):
    """What a hostile server does in one case."""

    seed: str = ""
    dialect: str = ""
    calm: float = 0.9
    """How often an answer is right."""
    mortal: float = 0.0
    """How often a request is its death."""


class HostileServer(RawServer):
    """Answers by chance."""

    script: Plan
    idle_ms = 4

    def __init__(self, script: Plan, control: Connection) -> None:
        super().__init__(script, control)
        self.rng = random.Random(script.seed)
        self._late: list[tuple[int, bytes | int]] = []
        self._notices: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._send_notices, daemon=True).start()

    def _send_notices(self) -> None:
        """In a thread, since a notification waits for what clients hold while they wait for an answer."""
        while True:
            self.notify(*self._notices.get())

    def idle(self) -> None:
        """Clients wait: some go on."""
        while self._late:
            self._answer_late()
        if self.rng.random() < 0.2:
            self._notify()

    def _take(self, message: bytes) -> None:
        _, opcode, unique, nodeid, *_ = abi.IN_HEADER.unpack_from(message)
        request = Request(opcode, nodeid, message[abi.IN_HEADER.size :], 0, 0, 0, unique)
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            return
        if opcode == Opcode.INIT:
            right = self._init(request.body)
            self.reply(unique, right if self.rng.random() < 0.95 else damaged(self.rng, right))
            return
        if self.rng.random() < self.script.mortal:
            os._exit(0)
        self._act(request)
        while self.rng.random() < 0.1:
            self._notify()
        while self._late and self.rng.random() < 0.2:
            self._answer_late()

    def _act(self, request: Request) -> None:
        rng, unique, right = self.rng, request.unique, self._right(request)
        if rng.random() < self.script.calm:
            self.reply(unique, right)
            return
        payload = right if isinstance(right, bytes) else rng.randbytes(rng.choice((0, 8, 16, 128, 144)))
        match rng.choices(*zip(*WAYS.items(), strict=True))[0]:
            case "error":
                self.reply(unique, -rng.randrange(1, 512))
            case "wild":
                self.reply(unique, rng.choice((1, 5, -512, -1000, (1 << 31) - 1, -(1 << 31))))
                self._late.append((unique, right))
            case "damage":
                self.reply(unique, damaged(rng, payload))
            case "cut":
                self.reply(unique, payload[: rng.randrange(len(payload) + 1)])
            case "more":
                self.reply(unique, payload + rng.randbytes(rng.randrange(1, 200)))
            case "large":
                self.reply(unique, payload + bytes(rng.choice((PAGE, 70_000, 1 << 20))))
            case "none":
                pass
            case "late":
                self._late.append((unique, right))
            case "twice":
                self.reply(unique, right)
                self.reply(unique, right)
            case "header":
                length = rng.choice((0, 15, 16, 17, 40, (1 << 32) - 1))
                self.write(struct.pack("<IiQ", length, 0, rng.choice((unique, unique + 1, unique + 2, 0))) + payload)
                self._late.append((unique, right))

    def _answer_late(self) -> None:
        if self._late:
            unique, answer = self._late.pop(self.rng.randrange(len(self._late)))
            self.reply(unique, answer)

    def _right(self, request: Request) -> bytes | int:
        if request.opcode == GET_FMAP:
            return self._map(request.nodeid)
        if request.opcode == GET_DAXDEV:
            return self.script.daxdevs[0] or -errno.EIO
        try:
            answer = self._usual(request)
        except (IndexError, UnicodeDecodeError, struct.error):
            answer = -errno.ENOENT
        return -errno.EIO if answer is None else answer

    def _map(self, nodeid: int) -> bytes | int:
        if self.rng.random() < 0.05:
            return random_map(self.rng, self.script.dialect, nodeid)
        try:
            fmap = self._file(nodeid).fmap
        except IndexError:
            return -errno.ESTALE
        assert isinstance(fmap, bytes)
        return fmap

    def _usual(self, request: Request) -> Answer:
        rng = self.rng
        match request.opcode:
            case Opcode.MKDIR | Opcode.SYMLINK | Opcode.LINK | Opcode.TMPFILE:
                return self._entry(rng.randrange(FIRST_NODEID, FIRST_NODEID + len(self._names)))
            case Opcode.UNLINK | Opcode.RMDIR | Opcode.RENAME | Opcode.RENAME2 | Opcode.ACCESS | Opcode.SYNCFS:
                return b""
            case Opcode.READLINK:
                return b"f0"
            case Opcode.GETXATTR | Opcode.LISTXATTR:
                return rng.randbytes(8)
            case Opcode.FLUSH | Opcode.FSYNC | Opcode.FALLOCATE | Opcode.SETXATTR:
                return rng.choice((b"", -errno.ENOSYS, -errno.EIO))
            case Opcode.LSEEK:
                return struct.pack("<Q", rng.choice(STRANGE))
            case Opcode.COPY_FILE_RANGE | Opcode.COPY_FILE_RANGE_64:
                return struct.pack("<Q", rng.randrange(1, 10_000))
            case Opcode.SETATTR if rng.random() < 0.3:
                return -errno.EPERM
            case Opcode.OPEN:
                return abi.OPEN_OUT.pack(request.nodeid, self._flags(), 0)
        return super()._usual(request)

    def _flags(self) -> int:
        """For the reply to OPEN or CREATE."""
        return self.rng.choice((0, OpenFlag.DIRECT_IO)) if self.rng.random() < 0.9 else self.rng.randrange(256)

    def _attributes(self, nodeid: int) -> tuple[int, ...]:
        found = list(super()._attributes(nodeid))
        if nodeid != abi.ROOT_ID and self.rng.random() < 0.05:
            found[1] = self.rng.choice((*STRANGE, self.rng.randrange(4 * UNIT)))
        return tuple(found)

    def _made(self, name: str) -> int:
        if name not in self.script.files:
            fmap = random_map(self.rng, self.script.dialect, len(self._names))
            self.add(name, File(fmap, 0, truncate=0, open_flags=self._flags()))
        return 0

    def _notify(self) -> None:
        rng = self.rng
        nodeid = rng.choice((abi.ROOT_ID, *range(FIRST_NODEID, FIRST_NODEID + len(self._names) + 1)))
        offset, length = rng.choice((0, 0, PAGE, UNIT, -1, *STRANGE)), rng.choice((0, PAGE, UNIT, *STRANGE))
        kind = rng.choice(list(Notify))
        match kind:
            case Notify.INVAL_INODE:
                body = struct.pack("<QQQ", nodeid, offset % (1 << 64), length)
            case Notify.INVAL_ENTRY | Notify.DELETE:
                name = rng.choice(self._names).encode()
                child = struct.pack("<Q", nodeid) if kind == Notify.DELETE else b""
                body = struct.pack("<Q", abi.ROOT_ID) + child + struct.pack("<II", len(name), 0) + name + b"\0"
            case Notify.STORE:
                data = rng.randbytes(rng.choice((1, 100, PAGE, 3 * PAGE)))
                body = struct.pack("<QQI4x", nodeid, offset % (1 << 64), len(data)) + data
            case Notify.RETRIEVE:
                body = struct.pack("<QQQI4x", rng.randrange(9), nodeid, offset % (1 << 64), length % (1 << 32))
            case Notify.PRUNE:
                body = struct.pack("<IIQ", 1, 0, 0) + struct.pack("<Q", nodeid)
            case _:
                body = rng.randbytes(rng.choice((0, 8, 16, 24)))
        if rng.random() < 0.2:
            body = damaged(rng, body)
        self._notices.put((int(kind) if rng.random() < 0.95 else rng.randrange(-3, 40), body))


class HostileMount(RawMount):
    """Its mount."""

    server_class = HostileServer


def plan(rng: random.Random, dialect: str, device: Path) -> Plan:
    """The next case."""
    files = {}
    for number, name in enumerate(NAMES):
        fmap = random_map(rng, dialect, number)
        size = int.from_bytes(fmap[16:24], "little") if rng.random() < 0.9 else rng.randrange(4 * UNIT)
        files[name] = File(fmap, min(size, (1 << 63) - 1), truncate=rng.choice((0, -errno.EPERM)))
    bits = MAPPING
    if rng.random() < 0.5:
        bits |= rng.getrandbits(41) & ~HARMFUL_BITS
    return Plan(
        files,
        daxdevs=[device_name(rng.choice([device] * 8 + [Path("/dev/null"), Path("/dev/none"), Path("/")]))],
        bits=bits,
        valid=rng.choice((0, LONG, LONG)),
        seed=str(rng.random()),
        dialect=dialect,
        calm=rng.choice((0.5, 0.8, 0.9, 0.97, 1)),
        mortal=rng.choice((0, 0, 0, 0.002)),
    )


# -- the clients


class Frolic:
    """A program that does things to files of a folder, one after the other, whatever comes of them."""

    def __init__(self, folder: Path, seed: float) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.fds: list[int] = []
        self.mapped: list[Mapped] = []
        self.done: collections.Counter[str] = collections.Counter()
        self.pipe = os.pipe2(os.O_NONBLOCK)
        self.spare = os.memfd_create("spare")
        os.ftruncate(self.spare, 1 << 16)
        self.data = self.rng.randbytes(3 * PAGE)

    def path(self) -> Path:
        """Some name."""
        return self.folder / self.rng.choice([*NAMES, *NAMES, "new0", "new1", "absent"])

    def fd(self) -> int:
        """Some open file."""
        if not self.fds:
            self.open()
        return self.rng.choice(self.fds)

    def place(self) -> int:
        """Somewhere in a file, or behind it."""
        unit, page = self.rng.randrange(4) * UNIT, self.rng.randrange(512) * PAGE
        return self.rng.choice((0, unit, unit + page, unit + page + self.rng.randrange(PAGE), 1 << 40))

    def open(self) -> None:
        """Open, and close what is too much."""
        flags = os.O_NONBLOCK | self.rng.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR, os.O_WRONLY))
        for flag, chance in ((os.O_TRUNC, 0.05), (os.O_APPEND, 0.1), (os.O_DIRECT, 0.05), (os.O_CREAT, 0.2)):
            if self.rng.random() < chance:
                flags |= flag
        self.fds.append(os.open(self.path(), flags))
        if len(self.fds) > 6:
            os.close(self.fds.pop(0))

    def close(self) -> None:
        """Close one."""
        os.close(self.fds.pop(self.rng.randrange(len(self.fds))))

    def read(self) -> None:
        """Also across pieces of a map."""
        os.pread(self.fd(), self.rng.choice((1, 8, PAGE, 100_000, UNIT)), self.place())

    def write(self) -> None:
        """As read."""
        os.pwrite(self.fd(), self.data[: self.rng.randrange(1, len(self.data))], self.place())

    def map(self) -> None:
        """Map a part of a file, in any way."""
        # Not MAP_POPULATE, with which any kernel goes round for ever where a file's pages cannot be read.
        flags = self.rng.choice((mmap.MAP_SHARED, mmap.MAP_SHARED, mmap.MAP_PRIVATE, 3))
        prot = self.rng.choice((mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC))
        offset = self.rng.choice((0, 0, self.rng.randrange(4) * UNIT, self.rng.randrange(512) * PAGE))
        length = self.rng.choice((PAGE, UNIT, 4 * UNIT, self.rng.randrange(1, 4 * UNIT)))
        self.mapped.append(Mapped(self.fd(), length, offset=offset, flags=flags, prot=prot))
        if len(self.mapped) > 4:
            self.mapped.pop(0).close()

    def load(self) -> None:
        """Touch pages."""
        if not self.mapped:
            self.map()
        mapped = self.rng.choice(self.mapped)
        for _ in range(4):
            mapped.load(self.rng.randrange(mapped.length), 1)

    def store(self) -> None:
        """Change them."""
        if not self.mapped:
            self.map()
        mapped = self.rng.choice(self.mapped)
        mapped.store(self.rng.randrange(mapped.length), b"x")

    def advise(self) -> None:
        """madvise(2), but neither MADV_HWPOISON nor MADV_POPULATE."""
        self.rng.choice(self.mapped).advise(self.rng.choice((*range(5), 8, 9, 10, 11, *range(14, 22))))

    def unmap(self) -> None:
        """munmap(2)."""
        self.mapped.pop(self.rng.randrange(len(self.mapped))).close()

    def size(self) -> None:
        """Truncate."""
        length = self.rng.choice((0, 5, PAGE, UNIT, 3 * UNIT))
        os.ftruncate(self.fd(), length) if self.rng.random() < 0.7 else os.truncate(self.path(), length)

    def allocate(self) -> None:
        """fallocate(2), in its modes."""
        os.posix_fallocate(self.fd(), self.place() % (4 * UNIT), PAGE)

    def look(self) -> None:
        """Attributes and listings."""
        self.rng.choice((lambda: os.stat(self.path()), lambda: os.fstat(self.fd()), lambda: os.listdir(self.folder),
                         lambda: os.statvfs(self.folder), lambda: os.listxattr(self.path())))()  # fmt: skip

    def names(self) -> None:
        """What changes the folder."""
        path, other = self.path(), self.path()
        self.rng.choice((lambda: os.unlink(path), lambda: os.rename(path, other), lambda: os.mkdir(path),
                         lambda: os.link(path, other), lambda: os.symlink("f0", path), lambda: os.readlink(path),
                         lambda: os.utime(path), lambda: os.chmod(path, 0o600)))()  # fmt: skip

    def sync(self) -> None:
        """To the device."""
        self.rng.choice((os.fsync, os.fdatasync))(self.fd())

    def send(self) -> None:
        """Copies within the kernel."""
        out, into = self.pipe
        fd, other, at = self.fd(), self.fd(), self.place() % (4 * UNIT)
        self.rng.choice((lambda: os.sendfile(self.spare, fd, at, 5000), lambda: os.sendfile(fd, self.spare, 0, 5000),
                         lambda: os.splice(fd, into, 5000, offset_src=at),
                         lambda: os.splice(out, fd, 5000, offset_dst=at, flags=2),
                         lambda: os.copy_file_range(fd, other, 5000, at, at),
                         lambda: os.read(out, 1 << 16)))()  # fmt: skip

    def lock(self) -> None:
        """Locks."""
        fcntl.flock(self.fd(), self.rng.choice((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)) | fcntl.LOCK_NB)

    def seek(self) -> None:
        """lseek(2)."""
        os.lseek(self.fd(), self.place(), self.rng.choice((os.SEEK_SET, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE)))

    def hint(self) -> None:
        """posix_fadvise(2)."""
        os.posix_fadvise(self.fd(), 0, UNIT, self.rng.randrange(6))

    def go(self) -> collections.Counter[str]:
        """How often what has worked."""
        often = [self.open, self.read, self.write, self.map, self.load, self.load, self.store]
        seldom = [
            self.close, self.advise, self.unmap, self.size, self.allocate, self.look, self.names, self.sync, self.send,
            self.lock, self.seek, self.hint,
        ]  # fmt: skip
        for _ in range(STEPS):
            step: Callable[[], None] = self.rng.choice(often if self.rng.random() < 0.7 else seldom)
            with contextlib.suppress(OSError, ValueError, IndexError):
                step()
                self.done[step.__name__] += 1
        return self.done


def frolic(folder: Path, seed: float) -> collections.Counter[str]:
    """A client."""
    return Frolic(folder, seed).go()


# -- the cases


@pytest.fixture(scope="module")
def device(dax_names: list[str], set_mode: SetMode) -> Path:
    """A device in famfs mode."""
    return set_mode(dax_names[0], "fsdev")


def case(rng: random.Random, folder: Path, dialect: str, device: Path) -> collections.Counter[str]:
    """One mount and its end; what its clients have done."""
    done: collections.Counter[str] = collections.Counter()
    with HostileMount(folder, plan(rng, dialect, device), dialect=dialect, strict="N", guard="Y") as mount:
        with contextlib.suppress(EOFError, ConnectionError):
            error = mount.call("push", str(device)) if dialect != "pull" else 0
            # Where the reply to INIT was damaged, no maps may have been negotiated.
            assert error in (0, errno.EOPNOTSUPP, errno.EPERM), os.strerror(error)
        clients = [Client(frolic, mount.point, rng.random()) for _ in range(CLIENTS)]
        until = time.monotonic() + CASE_SECONDS
        for client in clients:
            client.ends(max(until - time.monotonic(), 0))
        mount.abort()
        for client in clients:
            try:
                done += client.result(ABORT_SECONDS)
            except ChildProcessError as error:
                if error.errno != -signal.SIGBUS:
                    raise
    return done


@pytest.mark.parametrize("dialect", ["pull", "push", "push-interleave"])
def test_garbage(dialect: str, rng: random.Random, tmp_path: Path, device: Path, kernel_log: KernelLog) -> None:
    done: collections.Counter[str] = collections.Counter()
    users = USERS.read_text()
    until = time.monotonic() + SECONDS
    for number in range(CASES):
        if time.monotonic() > until:
            break
        done += case(rng, tmp_path, dialect, device)
        alarms = kernel_log.alarms()
        assert not alarms, f"case {number}: the kernel has warned:\n" + "\n".join(alarms)
    print(f"{number + 1} cases: {dict(done)}")
    assert USERS.read_text() == users, "something of these mounts is still there"
    # It was not all in vain.
    assert min(done[name] for name in ("open", "read", "write", "map", "load", "store")) > number / 3
    file = File(simple((0, UNIT)), UNIT)
    with RawMount(tmp_path, {"file": file}, dialect=dialect, device=device, strict="N", guard="Y") as mount:
        apart(lambda: Mapped(os.open(mount.path("file"), os.O_RDWR), UNIT).store(0, b"good"))
        assert apart(lambda: os.pread(os.open(mount.path("file"), os.O_RDWR), 4, 0)) == b"good"
