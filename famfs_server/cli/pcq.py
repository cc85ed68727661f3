# SPDX-License-Identifier: Apache-2.0
"""`pcq` and `famfs pcq`: a producer/consumer queue over two files, to show and to test memory that hosts share.

A queue NAME is two files, each with one writer: NAME has the geometry, the messages and the number of messages put;
NAME.consumer has the number of messages taken. So a producer and a consumer on two hosts need no lock, only the order
of stores and the write-backs of docs/coherence.md.
"""

import json
import os
import signal
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from famfs_server.cli import program
from famfs_server.cli.attributes import Ownership
from famfs_server.cli.target import NotFamfsError, Targets
from famfs_server.cli.values import OWNER, SEED, SIZE, NumberType
from famfs_server.daemon.control_client import FileRequest
from famfs_server.errors import ExistsError, MediaError, UsageError

_MAGIC = b"famfspcq"
_HEAD = struct.Struct("<8sIIQ")
"""Magic, version, bytes of a bucket, number of buckets."""
_VERSION = 1
_COUNTER_AT = 64
"""Both counters have a cache line of their own."""
_COUNTER = struct.Struct("<Q")
_BUCKETS_AT = 4096
_LINE = 64
_CRC = struct.Struct("<I")
SMALLEST_BUCKET = _COUNTER.size + _CRC.size
"""A message is its number, a payload, and a checksum over both."""
_LARGEST_BUCKET = 1 << 24
_SHORTEST_SLEEP, _LONGEST_SLEEP = 20e-6, 2e-3
_PATTERN = 4096

_PERMISSIONS = {"p": (0o644, 0o444), "c": (0o444, 0o644), "b": (0o644, 0o644), "n": (0o444, 0o444)}


@dataclass(slots=True)
class Shared:
    """A file that another host writes or reads at the same time.

    Data move by pread and pwrite, which the daemon carries out on memory itself; where the kernel maps the device
    (`lines` is a mapping then) the cache lines are written back and dropped here.
    """

    fd: int
    lines: memoryview | None

    def load(self, offset: int, length: int) -> bytes:
        """Bytes as memory has them now."""
        if self.lines is not None:
            from famfs_server.dax import cacheline

            cacheline.invalidate(self.lines, offset, length)
        return os.pread(self.fd, length, offset)

    def store(self, offset: int, data: bytes) -> None:
        """Store, and return when memory has it."""
        os.pwrite(self.fd, data, offset)
        if self.lines is not None:
            from famfs_server.dax import cacheline

            cacheline.write_back(self.lines, offset, len(data))
            cacheline.fence()

    def counter(self) -> int:
        """The number of messages that this file's writer has dealt with."""
        return int(_COUNTER.unpack(self.load(_COUNTER_AT, _COUNTER.size))[0])

    def set_counter(self, value: int) -> None:
        """Make the other side see that more messages were dealt with."""
        self.store(_COUNTER_AT, _COUNTER.pack(value))


@dataclass(slots=True)
class Tally:
    """What one run has done."""

    sent: int = 0
    received: int = 0
    errors: int = 0
    first_error: str = ""

    def wrong(self, line: str) -> None:
        """Count a message that is not what it should be."""
        self.errors += 1
        self.first_error = self.first_error or line

    @property
    def status(self) -> int:
        """What goes into a status file: messages sent and received, or minus the errors."""
        return -self.errors if self.errors else self.sent + self.received


@dataclass(slots=True)
class Run:
    """When to end: after so many messages, at a point in time, or when told to."""

    messages: int | None
    until: float | None
    stopped: threading.Event = field(default_factory=threading.Event)

    def goes_on(self, done: int) -> bool:
        """Whether another message is wanted."""
        if self.stopped.is_set() or (self.messages is not None and done >= self.messages):
            return False
        return self.until is None or time.monotonic() < self.until

    def wait(self, done: int, ready: Callable[[], bool]) -> bool:
        """Wait until `ready`; False if the run ends before."""
        sleep = _SHORTEST_SLEEP
        while not ready():
            if not self.goes_on(done):
                return False
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP)
        return True


class Queue:
    """An opened queue."""

    def __init__(self, name: str, produced: Shared, consumed: Shared) -> None:
        """Raises MediaError for files that are no queue."""
        self.name = name
        self._produced, self._consumed = produced, consumed
        self.bucket_size, self.buckets = _geometry(name, produced)
        self._stride = _stride(self.bucket_size)
        self._pattern = b""

    @property
    def put(self) -> int:
        """Messages ever put."""
        return self._produced.counter()

    @property
    def taken(self) -> int:
        """Messages ever taken."""
        return self._consumed.counter()

    def use_seed(self, seed: int) -> None:
        """Take payloads from `seed`; a consumer then compares them."""
        from famfs_server.seeded import SeededStream

        data = bytearray(self.bucket_size + _PATTERN)
        SeededStream(seed).fill(data)
        self._pattern = bytes(data)

    def _payload(self, number: int) -> bytes:
        start = number * 61 % _PATTERN
        return self._pattern[start : start + self.bucket_size - SMALLEST_BUCKET]

    def produce(self, run: Run, tally: Tally) -> None:
        """Put messages as long as the run goes on."""
        put = self.put
        known = self.taken
        while run.goes_on(tally.sent):
            if put - known >= self.buckets:

                def has_room(full: int = put - self.buckets) -> bool:
                    return self.taken > full

                if not run.wait(tally.sent, has_room):
                    return
                known = self.taken
            message = _COUNTER.pack(put) + self._payload(put)
            at = _BUCKETS_AT + put % self.buckets * self._stride
            self._produced.store(at, message + _CRC.pack(zlib.crc32(message)))
            put += 1
            self._produced.set_counter(put)
            tally.sent += 1

    def consume(self, run: Run, tally: Tally, *, drain: bool = False) -> None:
        """Take messages as long as the run goes on; with `drain` until the queue is empty."""
        taken = self.taken
        known = self.put
        while run.goes_on(tally.received):
            if taken >= known:

                def has_message(empty: int = taken) -> bool:
                    return self.put > empty

                if not (has_message() if drain else run.wait(tally.received, has_message)):
                    return
                known = self.put
            bucket = self._produced.load(_BUCKETS_AT + taken % self.buckets * self._stride, self.bucket_size)
            self._check(taken, bucket, tally)
            taken += 1
            self._consumed.set_counter(taken)
            tally.received += 1

    def _check(self, number: int, bucket: bytes, tally: Tally) -> None:
        message = bucket[: -_CRC.size]
        if _COUNTER.unpack_from(message)[0] != number:
            tally.wrong(f"message {number}: the bucket holds message {_COUNTER.unpack_from(message)[0]}")
        elif zlib.crc32(message) != _CRC.unpack_from(bucket, len(message))[0]:
            tally.wrong(f"message {number}: the checksum is wrong")
        elif self._pattern and message[_COUNTER.size :] != self._payload(number):
            tally.wrong(f"message {number}: the payload is not that of the seed")


def _geometry(name: str, produced: Shared) -> tuple[int, int]:
    """Bytes of a bucket, and the number of buckets, by the head of a producer's file. Raises MediaError."""
    magic, version, bucket_size, buckets = _HEAD.unpack(produced.load(0, _HEAD.size).ljust(_HEAD.size))
    sound = magic == _MAGIC and version == _VERSION and bucket_size >= SMALLEST_BUCKET and buckets
    if not sound or file_size(bucket_size, buckets) > os.fstat(produced.fd).st_size:
        raise MediaError(f"{name}: is not a queue; make it with --create")
    return bucket_size, buckets


def _stride(bucket_size: int) -> int:
    """Bytes from one bucket to the next: no two share a cache line."""
    return -(-bucket_size // _LINE) * _LINE


def file_size(bucket_size: int, buckets: int) -> int:
    """Bytes of the producer's file."""
    return _BUCKETS_AT + buckets * _stride(bucket_size)


def _consumer_name(name: str) -> str:
    return f"{name}.consumer"


@program.tool("pcq")
@click.option("-C", "--create", is_flag=True, help="Make the queue; one that exists with this geometry is emptied.")
@click.option("-b", "--bsize", type=SIZE, help="Bytes of a bucket, which holds one message.")
@click.option("-n", "--nbuckets", type=NumberType("count", 1, 1 << 32), help="Number of buckets.")
@click.option("-p", "--producer", is_flag=True, help="Put messages.")
@click.option("-c", "--consumer", is_flag=True, help="Take messages, and check them.")
@click.option("-d", "--drain", is_flag=True, help="Take messages until the queue is empty.")
@click.option("-i", "--info", is_flag=True, help="Show geometry and counters.")
@click.option("--json", "as_json", is_flag=True, help="With --info, and of a run: print JSON.")
@click.option("-N", "--nmessages", type=NumberType("count", 1, (1 << 63) - 1), help="End after so many messages.")
@click.option("-t", "--time", "seconds", type=NumberType("seconds", 1, 1 << 31), help="End after so many seconds.")
@click.option("-S", "--seed", type=SEED, help="Seed of the payloads; a consumer compares them with it.")
@click.option("-D", "--dontflush", is_flag=True, help="Leave cache lines alone.")
@click.option("-f", "--statusfile", metavar="FILE", help="Where the number of messages goes; negative: errors.")
@click.option("-P", "--setperm", type=click.Choice(list(_PERMISSIONS)), help="Who may write: p, c, b(oth), n(one).")
@click.option("-s", "--status", "interval", type=NumberType("seconds", 1, 1 << 31), help="Show progress that often.")
@click.option("-u", "--uid", type=OWNER, help="With --create: owner of the files.")
@click.option("-g", "--gid", type=OWNER, help="With --create: group of the files.")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.argument("name")
def command(
    *,
    name: str,
    create: bool,
    bsize: int | None,
    nbuckets: int | None,
    producer: bool,
    consumer: bool,
    drain: bool,
    info: bool,
    as_json: bool,
    nmessages: int | None,
    seconds: int | None,
    seed: int | None,
    dontflush: bool,
    statusfile: str | None,
    setperm: str | None,
    interval: int | None,
    uid: int | None,
    gid: int | None,
    verbose: int,
) -> int:
    """Run a producer/consumer queue over the files NAME and NAME.consumer.

    With neither --nmessages nor --time, producers and consumers run until they are interrupted. The exit status is the
    number of messages that were wrong.
    """
    runs = producer or consumer or drain
    if [create, setperm is not None, info, runs].count(True) != 1 or (drain and (producer or consumer)):
        raise UsageError("say one of --create, --info, --setperm, --drain, or --producer and/or --consumer")
    if nmessages is not None and seconds is not None:
        raise UsageError("--nmessages and --time exclude each other")
    if create:
        if bsize is None or nbuckets is None:
            raise UsageError("--create needs --bsize and --nbuckets")
        if not SMALLEST_BUCKET <= bsize <= _LARGEST_BUCKET:
            raise UsageError(f"a bucket has {SMALLEST_BUCKET} to {_LARGEST_BUCKET} bytes, not {bsize}")
        _create(name, bsize, nbuckets, Ownership.of(uid, gid))
        return 0
    if setperm is not None:
        for path, mode in zip((name, _consumer_name(name)), _PERMISSIONS[setperm], strict=True):
            os.chmod(path, mode)
        return 0
    with ExitStack() as stack:
        queue = _open_queue(stack, name, producer=producer, consumer=consumer or drain, flush=not dontflush)
        if info:
            _show(queue, as_json=as_json)
            return 0
        if seed is not None or producer:
            queue.use_seed(seed or 1)
        run = Run(nmessages, None if seconds is None else time.monotonic() + seconds)
        tell = partial(_tell, name, tally := Tally(), as_json=as_json)
        _work(queue, run, tally, tell, producer=producer, consumer=consumer, drain=drain, interval=interval)
    if statusfile is not None:
        Path(statusfile).write_text(f"{tally.status}\n")
    if tally.errors:
        program.warn(f"{name}: {tally.errors} messages are wrong, first {tally.first_error}")
    if verbose or as_json or statusfile is None:
        tell()
    return tally.errors


def _create(name: str, bucket_size: int, buckets: int, owner: Ownership) -> None:
    """Make both files, or empty a queue that has this geometry already. Raises ExistsError for other files."""
    with Targets(None, write=True) as targets:
        for path, size in ((name, file_size(bucket_size, buckets)), (_consumer_name(name), _BUCKETS_AT)):
            try:
                place = targets.find(path)
            except NotFamfsError:
                _create_elsewhere(path, size, owner)
                continue
            found = place.status()
            if found is None:
                place.target.create([FileRequest(place.path, size, 0o644, owner.uid, owner.gid)])
            elif not found.is_file or found.size != size:
                raise ExistsError(f"{path}: exists and is not a queue of this geometry")
    with ExitStack() as stack:
        produced, consumed = (_open(stack, path, writable=True, flush=True) for path in (name, _consumer_name(name)))
        consumed.set_counter(0)
        produced.set_counter(0)
        produced.store(0, _HEAD.pack(_MAGIC, _VERSION, bucket_size, buckets))


def _create_elsewhere(path: str, size: int, owner: Ownership) -> None:
    """A file on another file system, to compare with."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise ExistsError(f"{path}: exists and is not a queue of this geometry") from None
        return
    try:
        os.ftruncate(fd, size)
        os.fchown(fd, owner.uid, owner.gid)
    finally:
        os.close(fd)


def _open_queue(stack: ExitStack, name: str, *, producer: bool, consumer: bool, flush: bool) -> Queue:
    """Open both files, to be written by whom this process is. Raises MediaError for what is no queue."""
    produced = _open(stack, name, writable=producer, flush=flush)
    # Of a file that is none it would mislead to say that the other one is missing.
    _geometry(name, produced)
    try:
        consumed = _open(stack, _consumer_name(name), writable=consumer, flush=flush)
    except FileNotFoundError:
        raise MediaError(
            f"{name}: the queue's second file {_consumer_name(name)} is missing; --create makes it"
        ) from None
    return Queue(name, produced, consumed)


def _open(stack: ExitStack, path: str, *, writable: bool, flush: bool) -> Shared:
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    if not flush or not _is_mapped(path):
        return Shared(fd, None)
    import mmap

    mapping = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
    lines = memoryview(mapping)
    stack.callback(mapping.close)
    stack.callback(lines.release)
    return Shared(fd, lines)


def _is_mapped(path: str) -> bool:
    """Whether the kernel maps the device, so that the caches are this process's own affair."""
    with Targets(None, write=False) as targets:
        try:
            return targets.find(path).target.mapped
        except NotFamfsError:
            return False


def _show(queue: Queue, *, as_json: bool) -> None:
    put, taken = queue.put, queue.taken
    if as_json:
        click.echo(
            json.dumps(
                {
                    "queue": queue.name,
                    "bucket_size": queue.bucket_size,
                    "buckets": queue.buckets,
                    "put": put,
                    "taken": taken,
                },
                indent=2,
            )
        )
        return
    click.echo(f"{queue.name}: {queue.buckets} buckets of {queue.bucket_size} bytes")
    click.echo(f"  {put} messages put, {taken} taken, {put - taken} waiting")


def _tell(name: str, tally: Tally, *, as_json: bool) -> None:
    """Print what a run has done so far, in one line."""
    if as_json:
        done = {"queue": name, "sent": tally.sent, "received": tally.received, "errors": tally.errors}
        click.echo(json.dumps(done | {"first_error": tally.first_error or None}))
    else:
        click.echo(f"{name}: sent {tally.sent}, received {tally.received}, errors {tally.errors}")


def _work(
    queue: Queue,
    run: Run,
    tally: Tally,
    tell: Callable[[], None],
    *,
    producer: bool,
    consumer: bool,
    drain: bool,
    interval: int | None,
) -> None:
    """Run what was asked for, each in a thread of its own, until it ends or a signal comes."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            run.stopped.set()

    jobs: list[Callable[[], None]] = []
    if producer:
        jobs.append(lambda: queue.produce(run, tally))
    if consumer or drain:
        jobs.append(lambda: queue.consume(run, tally, drain=drain))
    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    previous = {
        number: signal.signal(number, lambda _number, _frame: run.stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for thread in threads:
            thread.start()
        shown = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.05)
            if interval is not None and time.monotonic() - shown >= interval:
                shown += interval
                tell()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if failures:
        raise failures[0]


def main() -> NoReturn:
    """The program `pcq`."""
    program.main(command, "pcq")
