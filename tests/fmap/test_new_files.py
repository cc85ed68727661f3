# SPDX-License-Identifier: Apache-2.0
"""New files on a connection with extent maps: an inode that was there before its file was logged never gets a map.

Whatever its creator does with the descriptor, pages of that inode's cache never meet a map: a second opener waits, and
then gets the inode that the log gives the file. With strict=1 the kernel warns of the contrary at once.
"""

import ctypes
import errno
import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from guest_devices import SetMode
from programs import run
from tests.fmap.raw_server import UNIT, File, RawMount, apart, simple
from tests.fmap.volumes import Volume, is_mapped, mapped_bytes

DATA = bytes(range(256)) * 800
NOBODY = 65534
MOMENT = 10.0


def error_of(path: Path) -> int:
    """The errno that opening a file for reading ends with, or 0."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return error.errno or -1
    return 0


def until(what: Callable[[], object], seconds: float = MOMENT) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


def by_sendfile(fd: int) -> None:
    with open("/dev/null", "wb") as sink:
        os.sendfile(sink.fileno(), fd, 0, len(DATA))
    reader, writer = os.pipe()
    os.splice(fd, writer, 8192, offset_src=0)
    os.close(reader)
    os.close(writer)


def by_fadvise(fd: int) -> None:
    os.posix_fadvise(fd, 0, len(DATA), os.POSIX_FADV_WILLNEED)


def by_readahead(fd: int) -> None:
    ctypes.CDLL(None).readahead(fd, ctypes.c_long(0), ctypes.c_size_t(len(DATA)))


def by_private_mapping(fd: int) -> None:
    with mmap.mmap(fd, len(DATA), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        assert mapping[:1000] == DATA[:1000]
        mapping[5] = 1


def by_private_mapping_untouched(fd: int) -> None:
    mapping = mmap.mmap(fd, len(DATA), mmap.MAP_PRIVATE, mmap.PROT_READ)
    mapping.close()


WAYS = [by_sendfile, by_fadvise, by_readahead, by_private_mapping, by_private_mapping_untouched]


@pytest.fixture
def mounted(volume: Volume, speak: Callable[[str], None]) -> Volume:
    """The file system, mounted, for everybody."""
    speak("push")
    volume.mount()
    volume.point.chmod(0o777)
    for folder in (volume.folder, *volume.folder.parents):
        if len(folder.parts) > 2:
            folder.chmod(0o755)
    return volume


class Unprivileged:
    """A process of an unprivileged user that runs a function, and can tell of paths meanwhile."""

    def __init__(self, work: Callable[[Callable[[Path], None]], None]) -> None:
        hear, speak = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                os.close(hear)
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                work(lambda path: os.write(speak, os.fsencode(path) + b"\n") and None)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(speak)
        self.told = os.fdopen(hear)
        """What it tells of: a path in each line."""

    def join(self) -> None:
        """Wait for its end, which must be a good one."""
        self.told.close()
        deadline = time.monotonic() + 60
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                assert status == 0
                return
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                raise AssertionError("it does not end")
            time.sleep(0.01)


def test_pages_that_a_creator_has_cached(mounted: Volume) -> None:
    """Every call that puts pages into the cache, before the file is closed and opened again."""
    for number, fill in enumerate(WAYS):
        path = mounted.point / f"{number}-{fill.__name__}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, DATA)
        fill(fd)
        os.close(fd)
        assert path.read_bytes() == DATA, fill.__name__
        assert is_mapped(path), fill.__name__
        assert mapped_bytes(path) == DATA, fill.__name__


def test_a_second_opener_of_a_new_file(mounted: Volume) -> None:
    """Refused as long as its creator has it open, whether it is logged or not; mapped as soon as that is closed."""
    for name, settle in (
        ("growing", lambda fd: None),
        ("synced", os.fsync),
        ("sized", lambda fd: os.ftruncate(fd, 9999)),
    ):
        path = mounted.point / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, DATA)
        for fill in WAYS:
            fill(fd)
        settle(fd)
        assert error_of(path) == errno.EBUSY, name
        # The creator goes on as before.
        assert os.pread(fd, 100, 0) == DATA[:100]
        assert os.pwrite(fd, b"after", 0) == 5
        os.close(fd)
        assert path.read_bytes()[:5] == b"after"
        assert is_mapped(path)


def test_a_private_mapping_outlives_its_descriptor(mounted: Volume) -> None:
    """Such a file counts as open; then it is mapped by the kernel."""
    path = mounted.point / "mapped"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, DATA)
    mapping = mmap.mmap(fd, len(DATA), mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(fd)
    assert error_of(path) == errno.EBUSY
    assert mapping[:10] == DATA[:10]
    mapping.close()
    assert mapped_bytes(path) == DATA


def test_an_old_inode_that_is_held(mounted: Volume) -> None:
    """Who holds the inode that a file had before it was logged keeps nobody from the file, and gets nothing by it."""
    path = mounted.point / "held"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, DATA)
    handle = os.open(path, os.O_PATH)
    by_sendfile(fd)
    os.close(fd)
    assert mapped_bytes(path) == DATA
    assert error_of(Path(f"/proc/self/fd/{handle}")) == errno.ESTALE
    assert mapped_bytes(path) == DATA
    os.close(handle)


def test_an_unprivileged_creator_races_a_reader(mounted: Volume) -> None:
    """An unprivileged user makes files and fills the cache in every way, while root opens and maps each at once."""
    count = 60

    def make(tell: Callable[[Path], None]) -> None:
        for number in range(count):
            path = mounted.point / f"race-{number}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            tell(path)
            os.write(fd, DATA)
            by_fadvise(fd)
            by_sendfile(fd)
            mapping = mmap.mmap(fd, len(DATA), mmap.MAP_PRIVATE, mmap.PROT_READ)
            if number % 2:
                assert mapping[:1] == DATA[:1]
            if number % 3 == 0:
                os.fsync(fd)
            os.close(fd)
            mapping.close()
            assert error_of(path) in (0, errno.EBUSY)

    maker = Unprivileged(make)
    seen = 0
    for line in maker.told:
        path = Path(line.rstrip("\n"))
        numbers = {error_of(path)}
        while 0 not in numbers:
            numbers.add(error_of(path))
            assert numbers <= {0, errno.EBUSY, errno.ENOENT}, numbers
        assert mapped_bytes(path) == DATA, path
        seen += 1
    maker.join()
    assert seen == count


def test_many_new_files_at_once(mounted: Volume) -> None:
    """Files made and read again by several at once: what is closed can be opened, however busy the connection is."""

    def maker(name: str) -> Callable[[Callable[[Path], None]], None]:
        def make(tell: Callable[[Path], None]) -> None:
            for number in range(40):
                path = mounted.point / f"{name}-{number}"
                path.write_bytes(bytes(path) * 50)
                assert path.read_bytes() == bytes(path) * 50

        return make

    makers = [Unprivileged(maker(f"maker{number}")) for number in range(3)]
    for process in makers:
        process.join()
    assert mounted.status()["not_logged_yet"] == 0
    assert len(os.listdir(mounted.point)) == 121


def test_opens_are_asked_for_only_where_files_can_be_new(volume: Volume, speak: Callable[[str], None]) -> None:
    speak("push")
    volume.mount()
    (volume.point / "one").write_bytes(DATA)
    assert volume.status()["no_open"] is False
    volume.unmount()
    for options, host in ((("nocreate",), volume.host), (("ro",), volume.host), ((), volume.folder / "client")):
        volume.mount(*options, host=host)
        assert volume.status()["no_open"] is True, options
        (volume.point / "one").read_bytes()
        before = volume.requests("open", "get_fmap")
        for _ in range(5):
            assert (volume.point / "one").read_bytes() == DATA
        assert volume.requests("open", "get_fmap") == before
        volume.unmount()


def test_nobody_writes_into_the_metadata(volume: Volume, speak: Callable[[str], None]) -> None:
    """Not even root, on the master and on a client, whether the kernel asks for opens or not."""
    speak("push")
    for options, host in (((), volume.host), (("nocreate",), volume.host), ((), volume.folder / "client")):
        volume.mount(*options, host=host)
        for name in (".superblock", ".log"):
            path = volume.point / ".meta" / name
            for _ in range(2):
                for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
                    with pytest.raises(PermissionError):
                        os.open(path, flags)
                # The kernel has no place for the owner of files that nobody may write to, and says so: EOVERFLOW.
                with pytest.raises(OSError, match=r"permitted|Value too large|Read-only"):
                    path.chmod(0o666)
                with pytest.raises(OSError, match=r"denied|permitted|Read-only"):
                    os.truncate(path, 0)
            assert path.read_bytes()[:8]
        volume.unmount()
    run("fsck.famfs", "-n", volume_in_devdax(volume), host=volume.host)


def volume_in_devdax(volume: Volume) -> Path:
    with volume.raw():
        return volume.device


# -- the end of a mount -------------------------------------------------------------------------


def ended(volume: Volume) -> Callable[[], bool]:
    return lambda: not volume.pids("famfs-supervisor") and not volume.pids("famfs-worker")


def test_what_is_written_after_a_lazy_unmount(mounted: Volume) -> None:
    """A mount that was detached in use goes on until the last close, and what was written until then is logged."""
    fd = os.open(mounted.point / "late", os.O_RDWR | os.O_CREAT, 0o644)
    empty = os.open(mounted.point / "empty", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, DATA[:1000])
    run("umount", "-l", mounted.point, host=mounted.host)
    until(lambda: not os.path.ismount(mounted.point))
    time.sleep(3)
    os.pwrite(fd, DATA, 0)
    os.write(empty, b"now it has bytes")
    os.close(fd)
    os.close(empty)
    until(ended(mounted), 20)
    mounted.mount()
    assert (mounted.point / "late").read_bytes() == DATA
    assert (mounted.point / "empty").read_bytes() == b"now it has bytes"


def test_the_device_is_free_when_the_mount_has_ended(mounted: Volume) -> None:
    """Files of new space keep neither the connection nor the device: not after a lazy unmount, not after any other."""
    fds = [os.open(mounted.point / f"new-{number}", os.O_RDWR | os.O_CREAT, 0o644) for number in range(5)]
    for fd in fds:
        os.write(fd, DATA)
    run("umount", "-l", mounted.point, host=mounted.host)
    for fd in fds:
        os.close(fd)
    until(ended(mounted), 20)
    mounted.mount()
    assert len(os.listdir(mounted.point)) == 6
    with (mounted.point / "more").open("wb") as file:
        file.write(DATA)
        file.flush()
    mounted.unmount()
    assert ended(mounted)()


# -- what a mount must notice -------------------------------------------------------------------


def test_a_dialect_that_the_kernel_does_not_speak(volume: Volume, speak: Callable[[str], None]) -> None:
    """Forced and wrong: the mount fails, names what is wrong, and leaves nothing."""
    for spoken, forced in (
        ("push", "push-interleave"), ("push", "pull"), ("pull", "push"), ("pull", "push-interleave"),
        ("push-interleave", "pull"),
    ):  # fmt: skip
        speak(spoken)
        line = volume.mount(f"dialect={forced}", status=32).error
        assert "dialect" in line, (spoken, forced, line)
        assert f"dialect={spoken.partition('-')[0]}" in line, (spoken, forced, line)
        assert len(line.strip().splitlines()) == 1
        assert not os.path.ismount(volume.point)
    for spoken, forced in (
        ("push", "push"),
        ("push-interleave", "push"),
        ("push-interleave", "push-interleave"),
        ("pull", "pull"),
    ):
        speak(spoken)
        volume.mount(f"dialect={forced}")
        assert volume.status()["dialects"] == [forced]
        volume.unmount()


def test_a_device_that_the_kernel_gives_to_nobody_else(
    volume: Volume, dialect: str, set_mode: SetMode, tmp_path: Path
) -> None:
    """Another file system of this kernel holds the device: that is said, and not that memory has failed."""
    set_mode(volume.name, "fsdev")
    folder = tmp_path / "other"
    folder.mkdir()
    with RawMount(folder, {"file": File(simple((0, UNIT)), UNIT)}, dialect=dialect, device=volume.device) as other:
        assert apart(other.path("file").read_bytes)[:8]
        line = volume.mount(status=32).error
        assert "another" in line
        assert "poison" not in line
        assert len(line.strip().splitlines()) == 1
    volume.mount()
    volume.unmount()
