# SPDX-License-Identifier: Apache-2.0
"""Guarded copies and cache maintenance on mappings whose file is really truncated under them."""

import contextlib
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from famfs_server.dax import cacheline

PAGE = mmap.PAGESIZE
PAGES = 64
SIZE = PAGES * PAGE


def truncated_mapping(keep: int) -> mmap.mmap:
    """A mapping of SIZE bytes of a file of which only the first `keep` bytes are left."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(range(256)) * (SIZE // 256))
        file.flush()
        mapping = mmap.mmap(file.fileno(), SIZE)
        file.truncate(keep)
    return mapping


@pytest.fixture
def mapping() -> Iterator[mmap.mmap]:
    """A mapping whose second half is gone."""
    with truncated_mapping(SIZE // 2) as mapping:
        yield mapping


def expect_fault(call: Callable[[], Any]) -> None:
    with pytest.raises(OSError, match="Bad address") as caught:
        call()
    assert caught.value.errno == errno.EFAULT


def test_mechanism_is_what_the_processor_offers() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if os.uname().machine == "x86_64":
        best = next(name for name in ("clwb", "clflushopt", "clflush") if name in flags)
        assert best == cacheline.MECHANISM
    elif os.uname().machine == "aarch64":
        assert cacheline.MECHANISM == "dc cvac"
    else:
        assert cacheline.MECHANISM == "none"


def test_copies_copy(rng: random.Random) -> None:
    source = rng.randbytes(300_000)
    destination = bytearray(300_000)
    model = bytearray(300_000)
    for _ in range(200):
        length = rng.choice([0, 1, 63, 4096, 65535, 65536, 200_000])
        at, origin = rng.randrange(300_001 - length), rng.randrange(300_001 - length)
        cacheline.copy_into(destination, at, source, origin, length)
        model[at : at + length] = source[origin : origin + length]
        assert cacheline.copy_from(destination, at, length) == model[at : at + length]
    assert destination == model


def test_copies_within_one_buffer_may_overlap() -> None:
    buffer = bytearray(b"abcdefgh")
    cacheline.copy_into(buffer, 2, buffer, 0, 6)
    assert buffer == b"ababcdef"


@pytest.mark.parametrize("length", [1, PAGE, SIZE // 2])
def test_reading_what_is_gone_is_an_error(mapping: mmap.mmap, length: int) -> None:
    expect_fault(lambda: cacheline.copy_from(mapping, SIZE // 2, length))
    assert cacheline.copy_from(mapping, SIZE // 2 - 256, 256) == bytes(range(256))


@pytest.mark.parametrize("length", [1, PAGE, SIZE // 2])
def test_writing_what_is_gone_is_an_error(mapping: mmap.mmap, length: int) -> None:
    expect_fault(lambda: cacheline.copy_into(mapping, SIZE // 2, bytes(length), 0, length))
    expect_fault(lambda: cacheline.store_u64(mapping, SIZE // 2, 1))
    cacheline.copy_into(mapping, 0, b"still works", 0, 11)
    assert mapping[:11] == b"still works"


def test_copying_into_ordinary_memory_from_what_is_gone_is_an_error(mapping: mmap.mmap) -> None:
    expect_fault(lambda: cacheline.copy_into(bytearray(SIZE), 0, mapping, 0, SIZE))


@pytest.mark.parametrize("maintain", [cacheline.write_back, cacheline.invalidate])
def test_maintaining_what_is_gone_is_an_error(
    mapping: mmap.mmap, maintain: Callable[[mmap.mmap, int, int], None]
) -> None:
    if cacheline.MECHANISM == "none":
        pytest.skip("no cache-line instructions on this processor")
    expect_fault(lambda: maintain(mapping, 0, SIZE))
    expect_fault(lambda: maintain(mapping, SIZE - 1, 1))


@pytest.mark.parametrize("maintain", [cacheline.write_back, cacheline.invalidate])
def test_maintenance_changes_no_byte(rng: random.Random, maintain: Callable[[bytearray, int, int], None]) -> None:
    before = rng.randbytes(SIZE)
    buffer = bytearray(before)
    for _ in range(100):
        length = rng.choice([0, 1, 63, 64, 65, 4096, 16384, SIZE // 2])
        maintain(buffer, rng.randrange(SIZE - length), length)
    maintain(buffer, SIZE, 0)
    cacheline.fence()
    cacheline.full_fence()
    assert buffer == before


def test_faults_in_several_threads_at_once_stay_apart() -> None:
    rounds, wrong = 300, []

    def work(number: int) -> None:
        # Each thread has its own mapping; lengths on both sides of the one that frees the interpreter.
        length = SIZE // 2 if number % 2 else PAGE
        with truncated_mapping(SIZE // 2) as mapping:
            pattern = bytes([number]) * (SIZE // 2)
            for _ in range(rounds):
                cacheline.copy_into(mapping, 0, pattern, 0, len(pattern))
                try:
                    cacheline.copy_from(mapping, SIZE // 2, length)
                    wrong.append(f"thread {number} read what is gone")
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        wrong.append(repr(error))
                if cacheline.copy_from(mapping, 0, length) != pattern[:length]:
                    wrong.append(f"thread {number} read another thread's bytes")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_long_copies_leave_the_interpreter_to_others() -> None:
    source, destination = bytes(64 << 20), bytearray(64 << 20)

    def resumed_during_a_copy() -> bool:
        started, times = threading.Event(), {}

        def copy() -> None:
            started.set()
            cacheline.copy_into(destination, 0, source, 0, len(source))
            times["copied"] = time.monotonic()

        thread = threading.Thread(target=copy)
        thread.start()
        started.wait()
        times["resumed"] = time.monotonic()
        thread.join()
        return times["resumed"] < times["copied"]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # a thread gives the interpreter up by itself or not at all
    try:
        # On a busy machine no processor may be free during one copy.
        assert any(resumed_during_a_copy() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def test_the_guard_survives_fork(mapping: mmap.mmap) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            cacheline.copy_from(mapping, SIZE // 2, 1)
        except OSError as error:
            status = 0 if error.errno == errno.EFAULT else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


PRELUDE = """
import mmap, os, resource, signal, sys, tempfile
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from famfs_server.dax import cacheline
file = tempfile.TemporaryFile()
file.truncate(8192)
mapping = mmap.mmap(file.fileno(), 8192)
file.truncate(4096)
try:
    cacheline.copy_from(mapping, 4096, 1)
except OSError:
    print("guarded", flush=True)
"""


def child(code: str, *options: str) -> tuple[int, str, str]:
    """Runs the prelude and `code` in a new interpreter: its exit status, output and error output."""
    done = subprocess.run([sys.executable, *options, "-c", PRELUDE + code], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


def test_an_unguarded_touch_still_dies_by_sigbus() -> None:
    status, output, _ = child("mapping[4096]\nprint('survived')")
    assert (status, output) == (-signal.SIGBUS, "guarded\n")


def test_a_sigbus_sent_by_a_process_still_kills() -> None:
    status, output, _ = child("os.kill(os.getpid(), signal.SIGBUS)\nprint('survived')")
    assert (status, output) == (-signal.SIGBUS, "guarded\n")


def test_an_unguarded_fault_goes_to_the_handler_before() -> None:
    status, output, errors = child("mapping[4096]\nprint('survived')", "-X", "faulthandler")
    assert (status, output) == (-signal.SIGBUS, "guarded\n")
    assert errors.startswith("Fatal Python error: Bus error")


@pytest.mark.parametrize(("ignored", "expected"), [("kill", "guarded\nsurvived\n"), ("touch", "guarded\n")])
def test_an_ignored_sigbus_stays_ignored_but_a_fault_kills(ignored: str, expected: str) -> None:
    act = {"kill": "os.kill(os.getpid(), signal.SIGBUS)", "touch": "mapping[4096]"}[ignored]
    code = PRELUDE.replace("from famfs", "signal.signal(signal.SIGBUS, signal.SIG_IGN)\nfrom famfs")
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{act}\nprint('survived')"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == expected
    assert done.returncode == (0 if ignored == "kill" else -signal.SIGBUS)


def test_a_read_only_destination_is_refused() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        with mmap.mmap(file.fileno(), PAGE, access=mmap.ACCESS_READ) as read_only:
            for destination in (bytes(16), memoryview(bytearray(16)).toreadonly(), read_only):
                with pytest.raises(BufferError):
                    cacheline.copy_into(destination, 0, b"x", 0, 1)  # type: ignore[arg-type]
                with pytest.raises(BufferError):
                    cacheline.store_u64(destination, 0, 1)  # type: ignore[arg-type]
            cacheline.write_back(read_only, 0, PAGE)
            cacheline.invalidate(read_only, 0, PAGE)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (0, -1), (0, 17), (16, 1), (17, 0), (sys.maxsize, sys.maxsize), (1 << 64, 1), (0, 1 << 64)],
)
def test_ranges_are_checked(offset: int, length: int) -> None:
    buffer, wide = bytearray(16), bytearray(64)
    for call in (
        lambda: cacheline.copy_from(buffer, offset, length),
        lambda: cacheline.copy_into(buffer, offset, wide, 0, length),
        lambda: cacheline.copy_into(wide, 0, buffer, offset, length),
        lambda: cacheline.write_back(buffer, offset, length),
        lambda: cacheline.invalidate(buffer, offset, length),
    ):
        with pytest.raises(ValueError, match=r"negative|outside|cannot fit"):
            call()
    assert buffer == bytes(16)


def test_arguments_are_checked() -> None:
    for arguments in ((), (b"",), (b"", 0, 0, 0), (b"", 0, "1"), (b"", 0, 1.0), (7, 0, 0), ("text", 0, 0)):
        with pytest.raises(TypeError):
            cacheline.copy_from(*arguments)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        cacheline.copy_from(memoryview(bytes(16))[::2], 0, 1)


def test_a_long_is_stored_little_endian() -> None:
    buffer = bytearray(24)
    cacheline.store_u64(buffer, 8, 0x0102030405060708)
    assert buffer.hex() == "00" * 8 + "0807060504030201" + "00" * 8
    cacheline.store_u64(buffer, 8, (1 << 64) - 1)
    assert buffer[8:16] == b"\xff" * 8


@pytest.mark.parametrize(("offset", "value"), [(4, 1), (-8, 1), (16, 1), (0, -1), (0, 1 << 64)])
def test_a_wrong_long_is_refused(offset: int, value: int) -> None:
    buffer = bytearray(16)
    with pytest.raises(ValueError, match=r"aligned|negative|outside|64 bits"):
        cacheline.store_u64(buffer, offset, value)
    assert buffer == bytes(16)


def test_buffers_are_let_go() -> None:
    buffer, source = bytearray(16), bytearray(16)
    for call in (
        lambda: cacheline.copy_from(buffer, 0, 99),
        lambda: cacheline.copy_into(buffer, 0, source, 0, 99),
        lambda: cacheline.copy_into(buffer, 0, 7, 0, 1),  # type: ignore[arg-type]
        lambda: cacheline.store_u64(buffer, 1, 1),
        lambda: cacheline.copy_into(buffer, 0, source, 0, 16),
    ):
        with contextlib.suppress(ValueError, TypeError):
            call()
        buffer.append(0)  # BufferError while somebody holds the buffer
        source.append(0)
        buffer.pop()
        source.pop()
