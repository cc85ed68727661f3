# SPDX-License-Identifier: Apache-2.0
"""The program that uses a file system while it is measured, in a process of its own.

Started as a file, without the package and without site-packages. It reads one job from standard input, a line of JSON;
prepares and warms up; prints "ready"; waits for another line; does the job, and prints what came of it as JSON. Times
are of CLOCK_MONOTONIC in nanoseconds, so that those of several clients fit together.
"""

import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Work = Callable[[], dict[str, Any]]

now = time.monotonic_ns


def _timed(count: int, work: Callable[[], None]) -> dict[str, Any]:
    start = now()
    work()
    return {"count": count, "start": start, "end": now()}


def stat(job: Job) -> Work:
    """Ask for the attributes of each name once."""
    names: list[str] = job["names"]

    def pass_over(names: list[str]) -> None:
        call = os.stat
        for name in names:
            call(name)

    pass_over(job["warm"])
    return lambda: _timed(len(names), lambda: pass_over(names))


def open_close(job: Job) -> Work:
    """Open each name for reading once, and close it."""
    names: list[str] = job["names"]

    def pass_over(names: list[str]) -> None:
        opening, closing, flags = os.open, os.close, os.O_RDONLY
        for name in names:
            closing(opening(name, flags))

    pass_over(job["warm"])
    return lambda: _timed(len(names), lambda: pass_over(names))


def scandir(job: Job) -> Work:
    """List each directory once. The count is that of the entries."""
    found = 0

    def pass_over() -> None:
        nonlocal found
        for name in job["names"]:
            with os.scandir(name) as entries:
                for _ in entries:
                    found += 1

    for name in job["warm"]:
        os.stat(name)

    def work() -> dict[str, Any]:
        result = _timed(0, pass_over)
        result["count"] = found
        return result

    return work


def listing(job: Job) -> Work:
    """List each directory once and ask for the attributes of each entry, as `ls -l` does."""
    found = 0

    def pass_over() -> None:
        nonlocal found
        for name in job["names"]:
            with os.scandir(name) as entries:
                for entry in entries:
                    entry.stat()
                    found += 1

    for name in job["warm"]:
        os.stat(name)

    def work() -> dict[str, Any]:
        result = _timed(0, pass_over)
        result["count"] = found
        return result

    return work


def _offsets(size: int, block: int, order: str) -> list[int]:
    blocks = range(size // block)
    if order == "sequential":
        return [number * block for number in blocks]
    source = random.Random(block)
    return [source.randrange(len(blocks)) * block for _ in range(min(len(blocks), 1 << 14))]


def data(job: Job) -> Work:
    """Read or write a file in blocks for some time. The count is that of the bytes.

    With `mapped`, an offset into the file, its bytes from there on are copied to or from a mapping instead.
    """
    block, size = job["block"], job["size"]
    offsets = _offsets(size, block, job["order"])
    writes = job["direction"] == "write"
    descriptor = os.open(job["file"], os.O_RDWR if writes else os.O_RDONLY)
    buffer = bytearray(b"y") * block
    step: Callable[[int], object]
    if job["mapped"] is not None:
        start: int = job["mapped"]
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        mapping = memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection, offset=start))
        target = memoryview(buffer)

        def store(offset: int) -> None:
            mapping[offset : offset + block] = target

        def load(offset: int) -> None:
            target[:] = mapping[offset : offset + block]

        step = store if writes else load
    else:
        buffers = [buffer]

        def write(offset: int) -> None:
            os.pwrite(descriptor, buffer, offset)

        def read(offset: int) -> None:
            os.preadv(descriptor, buffers, offset)

        step = write if writes else read
    for offset in offsets[: max(1, (4 << 20) // block)]:
        step(offset)
    batch = max(1, (256 << 10) // block)

    def work() -> dict[str, Any]:
        done = at = 0
        start = now()
        deadline = start + int(job["seconds"] * 1e9)
        while (end := now()) < deadline:
            for offset in offsets[at : at + batch]:
                step(offset)
                done += 1
            at = at + batch if at + batch < len(offsets) else 0
        return {"count": done * block, "start": start, "end": end}

    return work


def latency(job: Job) -> Work:
    """Read the first 4 KiB of a file again and again until SIGTERM: when each read began, and how long it took. The
    file is opened for direct I/O by the server, so that every read is a request."""
    descriptor = os.open(job["file"], os.O_RDONLY)
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    for _ in range(1000):
        os.pread(descriptor, 4096, 0)

    def work() -> dict[str, Any]:
        starts: list[int] = []
        took: list[int] = []
        call = os.pread
        start = now()
        while not stopped:
            call(descriptor, 4096, 0)
            end = now()
            starts.append(start)
            took.append(end - start)
            start = end
        return {"starts": starts, "took": took}

    return work


def follow(job: Job) -> Work:
    """Watch the server take in `entries` more log entries, by the inodes that statfs calls free.

    A server that does not begin by itself within `patience` seconds is made to, by a name that does not exist.
    """
    before = os.statvfs(".").f_ffree
    goal = before - job["entries"]

    def work() -> dict[str, Any]:
        begun = asked = now()
        prompted = False
        while (free := os.statvfs(".").f_ffree) > goal:
            if free == before:
                begun = now()
                if begun - asked > job["patience"] * 1e9:
                    if prompted:
                        raise TimeoutError("the server does not follow the log")
                    prompted = True
                    try:
                        os.stat("a-name-that-does-not-exist")
                    except FileNotFoundError:
                        continue
            time.sleep(0.002)
        return {"start": begun, "end": now(), "prompted": prompted}

    return work


def relayed(job: Job) -> Work:
    """Keep the control plane busy until SIGTERM, by a request that the request plane does not answer."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)

    def work() -> dict[str, Any]:
        count = 0
        start = now()
        while not stopped:
            try:
                os.removexattr(".", "user.nothing")
            except OSError:
                count += 1
        return {"count": count, "start": start, "end": now()}

    return work


def create(job: Job) -> Work:
    """Make each name a file of `size` bytes, as programs do: create, set the size, close."""
    size: int = job["size"]

    def pass_over(names: list[str]) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        for name in names:
            descriptor = os.open(name, flags, 0o644)
            os.ftruncate(descriptor, size)
            os.close(descriptor)

    pass_over(job["warm"])
    return lambda: _timed(len(job["names"]), lambda: pass_over(job["names"]))


def outlive(job: Job) -> Work:
    """Kill the process `victim`, and ask for a `name` that does not exist."""
    os.path.exists(job["name"] + "-before")

    def ask() -> None:
        os.kill(job["victim"], signal.SIGKILL)
        if os.path.exists(job["name"]):
            raise FileExistsError(job["name"])

    return lambda: _timed(1, ask)


JOBS: dict[str, Callable[[Job], Work]] = {
    "stat": stat,
    "open": open_close,
    "scandir": scandir,
    "listing": listing,
    "data": data,
    "latency": latency,
    "follow": follow,
    "relayed": relayed,
    "create": create,
    "outlive": outlive,
}


def main() -> None:
    """Do the job on standard input."""
    job = json.loads(sys.stdin.readline())
    if job.get("root"):
        os.chdir(job["root"])
    try:
        work = JOBS[job["action"]](job)
        print("ready", flush=True)
        sys.stdin.readline()
        result = work()
    except OSError as error:
        result = {"error": str(error), "errno": error.errno}
    print(json.dumps(result), flush=True)


main()
