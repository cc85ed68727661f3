# SPDX-License-Identifier: Apache-2.0
"""How the kernel's dax devices answer system calls, in each mode: the facts that famfs_server.dax is built on."""

import errno
import faulthandler
import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SetMode = Callable[[str, str], Path]

MODES = ["devdax", "fsdev", "unbound"]
ALIGNMENT = 2 << 20
MAP_SHARED_VALIDATE = 3
MAP_SYNC = 0x80000
BLKGETSIZE64 = 0x80081272
OK = 0


def outcome(call: Callable[[], object]) -> str:
    """What came of a system call: ok, or the name of its error."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return named(OK)


def named(number: int) -> str:
    return errno.errorcode[number] if number else "ok"


@pytest.fixture
def name(dax_names: list[str]) -> str:
    """The device that the tests work on."""
    return dax_names[0]


@pytest.fixture
def node(name: str, set_mode: SetMode) -> Path:
    """The device's node, in devdax mode."""
    return set_mode(name, "devdax")


@pytest.fixture
def fd(node: Path) -> Iterator[int]:
    """The device, opened in devdax mode."""
    number = os.open(node, os.O_RDWR)
    yield number
    os.close(number)


@pytest.fixture
def ordinary_file(tmp_path: Path) -> Iterator[int]:
    """A file of a usual file system, with a page of content."""
    number = os.open(tmp_path / "ordinary", os.O_RDWR | os.O_CREAT)
    os.write(number, bytes(4096))
    os.lseek(number, 0, os.SEEK_SET)
    yield number
    os.close(number)


OPEN_FLAGS = {
    "O_RDONLY": os.O_RDONLY,
    "O_WRONLY": os.O_WRONLY,
    "O_RDWR": os.O_RDWR,
    "O_EXCL": os.O_RDWR | os.O_EXCL,
    "O_SYNC": os.O_RDWR | os.O_SYNC,
    "O_TRUNC": os.O_RDWR | os.O_TRUNC,
    "O_APPEND": os.O_RDWR | os.O_APPEND,
}


@pytest.mark.parametrize("flags", OPEN_FLAGS.values(), ids=OPEN_FLAGS.keys())
@pytest.mark.parametrize(("mode", "expected"), list(zip(MODES, [OK, OK, errno.ENXIO], strict=True)), ids=MODES)
def test_open(name: str, set_mode: SetMode, mode: str, expected: int, flags: int) -> None:
    node = set_mode(name, mode)
    assert outcome(lambda: os.close(os.open(node, flags))) == named(expected)


@pytest.mark.parametrize("mode", ["devdax", "fsdev"])
def test_open_without_page_cache(name: str, set_mode: SetMode, mode: str) -> None:
    node = set_mode(name, mode)
    assert outcome(lambda: os.open(node, os.O_RDWR | os.O_DIRECT)) == "EINVAL"


@pytest.mark.parametrize("mode", ["devdax", "fsdev"])
def test_open_several_times(name: str, set_mode: SetMode, mode: str) -> None:
    node = set_mode(name, mode)
    numbers = [os.open(node, os.O_RDWR) for _ in range(3)]
    for number in numbers:
        os.close(number)


def test_an_unbound_device_opens_while_somebody_still_holds_it(name: str, set_mode: SetMode, fd: int) -> None:
    node = set_mode(name, "unbound")
    assert outcome(lambda: os.close(os.open(node, os.O_RDWR))) == "ok"


def test_a_device_that_was_rebound_while_open_dies_with_its_last_user(name: str, set_mode: SetMode) -> None:
    """Until it is unbound and bound again."""
    node = set_mode(name, "devdax")
    number = os.open(node, os.O_RDWR)
    set_mode(name, "unbound")
    set_mode(name, "devdax")
    assert outcome(lambda: os.close(os.open(node, os.O_RDWR))) == "ok"
    os.close(number)
    assert outcome(lambda: os.open(node, os.O_RDWR)) == "ENXIO"
    set_mode(name, "unbound")
    set_mode(name, "devdax")
    assert outcome(lambda: os.close(os.open(node, os.O_RDWR))) == "ok"


@dataclass(frozen=True)
class Row:
    """What a mapping with these flags answers; `unbound` is on a descriptor from before the unbinding."""

    flags: int
    devdax: int
    fsdev: int
    unbound: int | None = None


MAPPINGS = {
    "shared": Row(mmap.MAP_SHARED, OK, errno.ENODEV, errno.ENXIO),
    "shared-validate": Row(MAP_SHARED_VALIDATE, OK, errno.ENODEV),
    "shared-sync": Row(mmap.MAP_SHARED | MAP_SYNC, OK, errno.ENODEV),
    "shared-validate-sync": Row(MAP_SHARED_VALIDATE | MAP_SYNC, OK, errno.EOPNOTSUPP),
    "private": Row(mmap.MAP_PRIVATE, errno.EINVAL, errno.ENODEV),
}


@pytest.mark.parametrize(
    ("mode", "row"),
    [
        pytest.param(mode, row, id=f"{mode}-{kind}")
        for mode in MODES
        for kind, row in MAPPINGS.items()
        if getattr(row, mode) is not None
    ],
)
def test_mmap(name: str, set_mode: SetMode, mode: str, row: Row) -> None:
    number = os.open(set_mode(name, "devdax" if mode == "unbound" else mode), os.O_RDWR)
    try:
        set_mode(name, mode)
        assert outcome(lambda: mmap.mmap(number, ALIGNMENT, row.flags).close()) == named(getattr(row, mode))
    finally:
        os.close(number)


@pytest.mark.parametrize(
    ("length", "offset"),
    [(4096, 0), (ALIGNMENT - 4096, 0), (ALIGNMENT + 4096, 0), (ALIGNMENT, 4096), (ALIGNMENT, ALIGNMENT // 2)],
)
def test_mmap_off_the_alignment(fd: int, length: int, offset: int) -> None:
    assert outcome(lambda: mmap.mmap(fd, length, mmap.MAP_SHARED, offset=offset)) == "EINVAL"


def test_mmap_needs_a_descriptor_open_for_writing_to_write(node: Path) -> None:
    number = os.open(node, os.O_RDONLY)
    try:
        mmap.mmap(number, ALIGNMENT, mmap.MAP_SHARED, mmap.PROT_READ).close()
        assert outcome(lambda: mmap.mmap(number, ALIGNMENT, mmap.MAP_SHARED)) == "EACCES"
    finally:
        os.close(number)


def test_msync(fd: int) -> None:
    with mmap.mmap(fd, ALIGNMENT, mmap.MAP_SHARED) as mapping:
        assert outcome(mapping.flush) == "EINVAL"


def splice(fd: int) -> None:
    reader, writer = os.pipe()
    try:
        os.splice(fd, writer, 4096)
    finally:
        os.close(reader)
        os.close(writer)


# Calls on the descriptor of a device and of an ordinary file. They answer alike whether user space may map the
# device or not.
CALLS: dict[str, tuple[Callable[[int, int], object], int]] = {
    "read": (lambda fd, _: os.read(fd, 4096), errno.EINVAL),
    "pread": (lambda fd, _: os.pread(fd, 4096, 0), errno.EINVAL),
    "preadv": (lambda fd, _: os.preadv(fd, [bytearray(4096)], 0), errno.EINVAL),
    "write": (lambda fd, _: os.write(fd, bytes(4096)), errno.EINVAL),
    "pwrite": (lambda fd, _: os.pwrite(fd, bytes(4096), 0), errno.EINVAL),
    "fsync": (lambda fd, _: os.fsync(fd), errno.EINVAL),
    "fdatasync": (lambda fd, _: os.fdatasync(fd), errno.EINVAL),
    "ftruncate": (lambda fd, _: os.ftruncate(fd, 4096), errno.EINVAL),
    "sendfile": (lambda fd, ordinary: os.sendfile(ordinary, fd, 0, 4096), errno.EINVAL),
    "splice": (lambda fd, _: splice(fd), errno.EINVAL),
    "copy_file_range": (lambda fd, ordinary: os.copy_file_range(fd, ordinary, 4096), errno.EINVAL),
    "copy_file_range-into": (lambda fd, ordinary: os.copy_file_range(ordinary, fd, 4096), errno.EINVAL),
    "posix_fallocate": (lambda fd, _: os.posix_fallocate(fd, 0, 4096), errno.ENODEV),
    "flock": (lambda fd, _: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), OK),
    "lockf": (lambda fd, _: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), OK),
    "posix_fadvise": (lambda fd, _: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL), OK),
    "ioctl-BLKGETSIZE64": (lambda fd, _: fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)), errno.ENOTTY),
}


@pytest.mark.parametrize(("call", "expected"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("mode", ["devdax", "fsdev"])
def test_call(
    name: str,
    set_mode: SetMode,
    ordinary_file: int,
    mode: str,
    call: Callable[[int, int], object],
    expected: int,
) -> None:
    number = os.open(set_mode(name, mode), os.O_RDWR)
    try:
        assert outcome(lambda: call(number, ordinary_file)) == named(expected)
    finally:
        os.close(number)


@pytest.mark.parametrize("mode", ["devdax", "fsdev"])
def test_a_descriptor_does_not_tell_the_size(name: str, set_mode: SetMode, mode: str) -> None:
    number = os.open(set_mode(name, mode), os.O_RDWR)
    try:
        assert os.fstat(number).st_size == 0
        assert os.lseek(number, 4096, os.SEEK_SET) == 0
        assert os.lseek(number, 0, os.SEEK_END) == 0
        assert os.lseek(number, 4096, os.SEEK_DATA) == 0
    finally:
        os.close(number)


@pytest.mark.parametrize("mode", ["devdax", "fsdev"])
def test_sysfs_tells_size_and_alignment(name: str, set_mode: SetMode, mode: str) -> None:
    device = os.stat(set_mode(name, mode)).st_rdev
    folder = Path(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}")
    assert (folder / "subsystem").resolve() == Path("/sys/bus/dax")
    assert folder.resolve().name == name
    assert int((folder / "size").read_text()) % ALIGNMENT == 0
    assert int((folder / "align").read_text()) == ALIGNMENT


def signal_of_reading(mapping: mmap.mmap, offset: int) -> int:
    """The signal that ends a process which reads this byte; 0 if it lives."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(0 if mapping[offset] in range(256) else 1)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_a_mapping_past_the_end_is_made_and_faults_when_touched(name: str, fd: int) -> None:
    size = int(Path("/sys/bus/dax/devices", name, "size").read_text())
    with mmap.mmap(fd, 2 * ALIGNMENT, mmap.MAP_SHARED, offset=size - ALIGNMENT) as mapping:
        assert signal_of_reading(mapping, ALIGNMENT - 1) == 0
        assert signal_of_reading(mapping, ALIGNMENT) == signal.SIGBUS


def test_unbinding_under_a_mapping_faults_and_rebinding_heals_it(name: str, set_mode: SetMode, fd: int) -> None:
    with mmap.mmap(fd, ALIGNMENT, mmap.MAP_SHARED) as mapping:
        mapping[:5] = b"famfs"
        set_mode(name, "unbound")
        assert signal_of_reading(mapping, 0) == signal.SIGBUS
        set_mode(name, "devdax")
        assert mapping[:5] == b"famfs"
