# SPDX-License-Identifier: Apache-2.0
"""What breaks around a mount: its device, its logs, its descriptors, its memory, its run-time folder.

Each fault is injected from outside. Other files go on working, and `famfs status` says what is wrong.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from famfs_server.daemon.upgrade_client import SUPERVISOR_SOCKET
from harness import (
    BIN,
    CLIENT_UUID,
    FAST,
    MIB,
    File,
    Mount,
    Site,
    client,
    format_device,
    opened,
    populate,
    run,
    succeed,
    wait_for,
)

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))

pytestmark = pytest.mark.timeout(180 if LONG else 60)

HELLO = b"hello, world\n"
SIZE = 64 << 30
LAST = 4000 * MIB
"""Where on the device the first byte of the file `far` lies, which is what is cut off."""


@pytest.fixture
def device(memory_folder: Path) -> Path:
    """A device with a file at its beginning and one at its end, and room between them."""
    path = format_device(memory_folder / "device", size=SIZE)
    between = LAST - 10 * MIB - 4 * MIB
    populate(
        path,
        ["dir", "many", *(f"many/{number}" for number in range(3000))],
        [File("near", HELLO), File("more", size=2 * MIB), File("between", size=between)],
    )
    populate(path, [], [File("far", b"far away" * 1000)])
    with opened(path) as volume:
        tree = volume.namespace
        assert tree.first_extent(tree.resolve(b"far"), 0, 1)[1] >= LAST
    return path


def status(mount: Mount) -> dict[str, Any]:
    """What the mount says of itself."""
    found: dict[str, Any] = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)
    return found


def said(mount: Mount) -> list[str]:
    """The last warnings and errors of its worker."""
    return [line["message"] for line in status(mount)["recent"]]


def require_service(mount: Mount) -> None:
    """A file can be read and written, a directory listed, and names that are not there are missing."""
    code = """
fd = os.open(arguments[0] + "/more", os.O_RDWR)
os.pwrite(fd, b"written", 5)
result = [open(arguments[0] + "/near").read(), os.pread(fd, 7, 5).decode(), sorted(os.listdir(arguments[0]))[:2]]
result.append(os.path.exists(arguments[0] + "/absent"))
"""
    assert client(code, mount.path) == [HELLO.decode(), "written", [".meta", "between"], False]


@contextmanager
def injected(pid: int, *words: str) -> Iterator[None]:
    """System calls of a process are tampered with by strace, as `words` say."""
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", os.devnull, *words, "-p", str(pid)])

    def attached() -> bool:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return all(f"TracerPid:\t{tracer.pid}\n" in (task / "status").read_text() for task in tasks)

    try:
        assert wait_for(attached), "strace does not attach"
        yield
    finally:
        tracer.terminate()
        tracer.wait(30)


def worker_in_place(mount: Mount) -> int:
    """The worker's pid, as soon as there is exactly one."""
    found: list[int] = []

    def one() -> bool:
        found[:] = [pid for pid, comm in mount.host_processes().items() if comm == "famfs-worker"]
        return len(found) == 1

    assert wait_for(one), found
    return found[0]


# -- the device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", FAST)
def test_memory_that_is_gone_under_one_file(site: Site, device: Path, fast: str) -> None:
    with site.mounted(device, f"fastpath={fast}") as mount:
        os.truncate(device, LAST)
        for act in ("open(arguments[0], 'rb').read(100)", "os.pwrite(os.open(arguments[0], os.O_RDWR), b'x', 5)"):
            assert client(act, mount / "far") == "EIO"
        assert client("result = os.stat(arguments[0]).st_size", mount / "far") == 8000
        require_service(mount)
        assert status(mount)["faulty"] == {"files": 1, "paths": ["far"]}
        assert [line for line in said(mount) if "far: its memory cannot be accessed" in line] != []
        text = mount.host.run(BIN / "famfs", "status", mount.path).stdout
        assert "FAULTY memory under 1 files: far" in text
        assert status(mount)["takeovers"] == 0
        os.truncate(device, SIZE)
        assert client("result = len(open(arguments[0], 'rb').read())", mount / "far") == 8000


def test_log_that_cannot_be_read_and_comes_back(site: Site, device: Path) -> None:
    """The memory of the log is gone: names that are known stay, others are EIO, and no worker dies of it. Once the
    memory is back all goes on; and if a worker does die of a SIGBUS, the next one does."""
    with device.open("rb") as image:
        start = image.read(20 * MIB)
    with site.mounted(device, host=CLIENT_UUID) as mount:
        worker = mount.process("worker")
        require_service(mount)
        os.truncate(device, 2 * MIB)
        assert client("os.stat(arguments[0])", mount / "unknown") == "EIO"
        assert client("result = os.stat(arguments[0]).st_size", mount / "near") == len(HELLO)
        assert client("open(arguments[0], 'rb').read(100)", mount / "near") == "EIO"
        found = status(mount)
        assert found["log"]["behind"] is None
        assert found["faulty"]["paths"] == ["near"]
        assert "FAULTY memory under the log" in mount.host.run(BIN / "famfs", "status", mount.path).stdout
        assert len([line for line in said(mount) if "the log cannot be read" in line]) == 1
        assert mount.process("worker") == worker
        with device.open("r+b") as image:
            image.truncate(SIZE)
            image.write(start)
        assert client("os.stat(arguments[0])", mount / "unknown") == "ENOENT"
        require_service(mount)
        assert mount.process("worker") == worker
        os.kill(worker, signal.SIGBUS)
        require_service(mount)
        assert worker_in_place(mount) != worker
        found = status(mount)
        assert (found["damage"], found["takeovers"], found["faulty"]["files"]) == (None, 1, 0)
        assert any(f"worker {worker} has ended with status -7" in line for line in said(mount))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("error", ["EIO", "EHWPOISON"])
def test_memory_that_the_kernel_cannot_read(site: Site, device: Path, error: str) -> None:
    """What a poisoned page makes of the answer to one READ."""
    with site.mounted(device) as mount:
        worker = mount.process("worker")
        with injected(worker, "-e", f"inject=writev:error={error}:when=1"):
            assert client("os.pread(os.open(arguments[0], os.O_RDONLY), 100, 0)", mount / "far") == "EIO"
            require_service(mount)
        assert client("result = len(open(arguments[0], 'rb').read())", mount / "far") == 8000
        found = status(mount)
        assert found["faulty"] == {"files": 1, "paths": ["far"]}
        assert (found["takeovers"], found["processes"]["worker"]) == (0, worker)


def test_new_files_where_memory_is_gone(site: Site, device: Path) -> None:
    code = """
fd = os.open(arguments[0] + "/new", os.O_RDWR | os.O_CREAT)
try:
    os.pwrite(fd, b"x" * 5000, 0)
finally:
    os.close(fd)
"""
    with site.mounted(device) as mount:
        os.truncate(device, LAST)
        assert client(code, mount.path) == "EIO"
        # What could not be filled is not in the log.
        assert client("result = os.path.exists(arguments[0])", mount / "new") is False
        require_service(mount)
        os.mkdir(mount / "made")
        assert status(mount)["takeovers"] == 0
        os.truncate(device, SIZE)
        assert client(code, mount.path) is None
        assert client("result = os.stat(arguments[0]).st_size", mount / "new") == 5000


def test_without_sysfs(site: Site, device: Path) -> None:
    """In a mount namespace of its own, where /sys is an empty folder."""
    script = f"""
set -e
mount -t tmpfs none /sys
{BIN}/mount.famfs {device} {site.place("mnt")}
cat {site.place("mnt")}/near
{BIN}/famfs status --json {site.place("mnt")} > {site.directory}/status
umount {site.place("mnt")}
"""
    done = run("unshare", "-m", "--propagation", "slave", "sh", "-c", script, env=site.host().environment)
    assert (done.returncode, done.stdout) == (0, HELLO.decode()), done.stderr
    assert json.loads((site.directory / "status").read_text())["takeovers"] == 0
    assert wait_for(lambda: not site.processes())


# -- the run-time folder ------------------------------------------------------------------------


@contextmanager
def small_run_directory(site: Site, inodes: int) -> Iterator[Path]:
    """Run-time folders are in a file system that has room for so many files and folders."""
    path = site.host().run_directory
    path.mkdir(exist_ok=True)
    succeed("mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes},mode=700", "none", path)
    try:
        yield path
    finally:
        succeed("umount", "-l", path)


def has_been_made(path: Path) -> bool:
    """Whether there was room to make a file."""
    try:
        path.touch()
    except OSError:
        return False
    return True


def test_no_room_for_the_run_time_folder(site: Site, device: Path) -> None:
    with small_run_directory(site, 1):
        done = site.host().mount(device, site.place("mnt"))
        assert done.returncode == 32
        assert done.stderr.splitlines() == [done.stderr.strip()]
        assert "No space left on device" in done.stderr
        assert not [record for record in site.mounts() if record.fstype.startswith("fuse")]


def test_no_room_for_the_socket_of_upgrades(site: Site, device: Path) -> None:
    """A mount that was usable for a moment must not go because one more name finds no room."""
    with small_run_directory(site, 4) as folder, site.mounted(device) as mount:
        assert not list(folder.glob(f"*/{SUPERVISOR_SOCKET}"))
        require_service(mount)
        done = mount.host.run(BIN / "famfs", "upgrade", mount.path)
        assert done.returncode != 0
        assert len(done.stderr.splitlines()) == 1, done.stderr
        supervisor = mount.process("supervisor")
        time.sleep(1.5)
        require_service(mount)
        assert mount.process("supervisor") == supervisor


def test_no_room_for_the_control_socket(site: Site, device: Path) -> None:
    """A successor that cannot make it serves files without, and makes it as soon as there is room."""
    with small_run_directory(site, 6) as folder, site.mounted(device) as mount:
        assert status(mount)["takeovers"] == 0
        (socket_path,) = folder.glob("*/sock")
        fillers = [folder / "filler", folder / "another"]
        supervisor, worker = mount.process("supervisor"), mount.process("worker")
        socket_path.unlink()
        fillers[0].touch()
        # The place that the worker's own socket takes is free once it is dead.
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        assert wait_for(lambda: has_been_made(fillers[1]))
        with pytest.raises(OSError, match="No space left"):
            socket_path.touch()
        os.kill(supervisor, signal.SIGCONT)
        require_service(mount)
        assert worker_in_place(mount) != worker
        done = mount.host.run(BIN / "famfs", "status", mount.path)
        assert done.returncode != 0
        assert len(done.stderr.splitlines()) == 1
        fillers[1].unlink()
        assert wait_for(lambda: mount.host.run(BIN / "famfs", "status", mount.path).returncode == 0)
        assert any("there is no control socket" in line for line in said(mount))


# -- what a process may have --------------------------------------------------------------------


@contextmanager
def limited(pid: int, which: int, limit: int) -> Iterator[None]:
    """A process has no more of something than it has now."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, before)


@pytest.mark.parametrize("fast", FAST)
def test_no_descriptors_left(site: Site, device: Path, fast: str) -> None:
    with site.mounted(device, f"fastpath={fast}") as mount:
        require_service(mount)
        status(mount)
        worker = mount.process("worker")
        with limited(worker, resource.RLIMIT_NOFILE, 3):
            waiting = socket.socket(socket.AF_UNIX)
            waiting.settimeout(20)
            waiting.connect(os.fsdecode(os.getxattr(mount.path, "user.famfs.shadow")) + "/sock")
            waiting.sendall(b"GET /pid HTTP/1.1\r\nHost: x\r\n\r\n")
            require_service(mount)
            succeed("cp", mount / "near", mount / "copied")
            assert client("result = open(arguments[0]).read()", mount / "copied") == HELLO.decode()
            # The server tries ten times a second.
            time.sleep(1.5)
        # Whoever asked meanwhile is answered now.
        with waiting:
            assert waiting.recv(1000).startswith(b"HTTP/1.1 200")
        assert any("accept" in line for line in said(mount)), said(mount)
        assert mount.process("worker") == worker


@pytest.mark.parametrize("fast", FAST)
def test_no_memory_left(site: Site, device: Path, fast: str) -> None:
    """The worker gets no more memory: calls succeed or fail with an error, and none hangs. With memory, or in the next
    worker, all is well again."""
    code = """
import errno
root, found = arguments[0], {}
for number in range(60):
    for act in (
        lambda: os.stat(root + "/near"),
        lambda: os.listdir(root + "/many"),
        lambda: open(root + "/near").read(),
        lambda: os.pread(os.open(root + "/between", os.O_RDONLY), 1 << 20, number << 20),
        lambda: os.mkdir(root + "/dir/d%d" % number),
        lambda: open(root + "/dir/f%d" % number, "w").write("x" * 300000),
    ):
        try:
            act()
            what = "done"
        except OSError as error:
            what = errno.errorcode[error.errno]
        found[what] = found.get(what, 0) + 1
result = found
"""
    with site.mounted(device, f"fastpath={fast}") as mount:
        require_service(mount)
        worker = mount.process("worker")
        used = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.prlimit(worker, resource.RLIMIT_AS)
        resource.prlimit(worker, resource.RLIMIT_AS, (used + (64 << 10), before[1]))
        found = client(code, mount.path)
        print(f"fastpath={fast}: {found}")
        assert found["done"] > 0
        assert found.keys() <= {"done", "ENOMEM", "EIO"}
        if worker_in_place(mount) == worker:
            resource.prlimit(worker, resource.RLIMIT_AS, before)
        require_service(mount)
        assert client("os.mkdir(arguments[0])", mount / "afterwards") is None
        assert status(mount)["damage"] is None
        mount.unmount()
    assert run(BIN / "famfs", "fsck", device, env=site.host().environment).returncode == 0


# -- logs, clocks and signals -------------------------------------------------------------------


@contextmanager
def in_foreground(site: Site, device: Path, stderr: int | IO[bytes], **environment: str) -> Iterator[Mount]:
    """A mount whose server stays in the foreground, and ends with 0."""
    place = site.place("mnt")
    server = subprocess.Popen(
        [BIN / "famfs-server", device, place, "-o", "fmap=never"],
        env={**site.host().environment, **environment},
        stdin=subprocess.DEVNULL,
        stderr=stderr,
    )
    try:
        assert wait_for(lambda: any(record.mount_point == str(place) for record in site.mounts()))
        (record,) = (record for record in site.mounts() if record.mount_point == str(place))
        mount = site.known(device, record)
        require_service(mount)
        yield mount
        succeed("umount", place)
        assert server.wait(20) == 0
    except BaseException:
        site.abandon(place)
        raise
    finally:
        server.kill()
        server.communicate()


def make_files(mount: Mount, name: str, count: int) -> None:
    """Make so many files, of each of which a debug log tells."""
    code = """
root, name, count = arguments
for number in range(int(count)):
    with open(root + "/dir/%s%060d" % (name, number), "w") as file:
        file.write("x")
result = [entry.startswith(name) for entry in os.listdir(root + "/dir")].count(True)
"""
    assert client(code, mount.path, name, str(count)) == count


def test_logs_that_nobody_reads(site: Site, device: Path) -> None:
    """A server in the foreground whose standard error is a full pipe."""
    with in_foreground(site, device, subprocess.PIPE) as mount:
        mount.host.run(BIN / "famfs", "loglevel", mount.path, "debug")
        make_files(mount, "some", 1500)
        require_service(mount)
        assert status(mount)["log_lines_lost"] > 0
        worker = mount.process("worker")
        os.kill(worker, signal.SIGKILL)
        require_service(mount)
        assert status(mount)["takeovers"] == 1


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_logs_on_a_slow_disk(site: Site, device: Path) -> None:
    """Each write to the log takes longer than a worker may go without answering: lines are lost, and nobody waits."""
    path = site.directory / "log"
    with path.open("wb") as output, in_foreground(site, device, output) as mount:
        mount.host.run(BIN / "famfs", "loglevel", mount.path, "debug")
        make_files(mount, "before", 3)
        assert status(mount)["log_lines_lost"] == 0
        worker = mount.process("worker")
        with injected(worker, "-P", str(path), "-e", "inject=write:delay_enter=20s"):
            os.mkdir(mount / "made")
            before = time.monotonic()
            make_files(mount, "meanwhile", 40)
            require_service(mount)
            found = status(mount)
            assert (found["takeovers"], found["processes"]["worker"]) == (0, worker)
            # Otherwise nobody has been tried.
            assert found["log_lines_lost"] > 0
            print(f"40 files took {time.monotonic() - before:.1f} s")
        make_files(mount, "afterwards", 3)


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    static volatile long *offset;
    int result;

    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    result = real(clock, now);
    if (clock == CLOCK_REALTIME) {
        if (!offset)
            offset = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, open(getenv("FAMFS_TEST_CLOCK"), O_RDONLY), 0);
        now->tv_sec += *offset;
    }
    return result;
}
"""
"""A clock on the wall that a file moves by so many seconds, for one server alone."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is not installed")
def test_clock_that_is_set(site: Site, device: Path) -> None:
    """Years ahead, and back beyond the start of the mount: nothing waits or gives up by it, nor does a successor."""
    years = 10 * 365 * 86400
    source, library, clock = (site.directory / name for name in ("clock.c", "clock.so", "clock"))
    source.write_text(CLOCK)
    succeed("cc", "-shared", "-fPIC", "-o", library, source, "-ldl")
    clock.write_bytes(bytes(8))

    def moved(mount: Mount, seconds: int) -> None:
        with clock.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
        require_service(mount)
        assert abs(status(mount)["taken_at"] - time.time() - seconds) < 86400, "the clock has not been moved"
        assert mount.host.run(BIN / "famfs", "status", mount.path).returncode == 0

    environment = {"LD_PRELOAD": str(library), "FAMFS_TEST_CLOCK": str(clock)}
    with in_foreground(site, device, subprocess.DEVNULL, **environment) as mount:
        worker = mount.process("worker")
        for number, seconds in enumerate((0, years, -years)):
            moved(mount, seconds)
            make_files(mount, f"round{number}", 5)
            time.sleep(1.2)
            require_service(mount)
            # A beat, a poll and a look at the worker later nobody has been replaced.
            assert (status(mount)["takeovers"], mount.process("worker")) == (number, worker)
            os.kill(worker, signal.SIGKILL)
            require_service(mount)
            worker = worker_in_place(mount)
            assert status(mount)["takeovers"] == number + 1


def test_stopped_supervisor(site: Site, device: Path) -> None:
    """While the supervisor is stopped its worker serves; if that one dies, calls wait until the supervisor goes on."""
    seconds = 30 if LONG else 3
    with site.mounted(device) as mount:
        supervisor, worker = mount.process("supervisor"), mount.process("worker")
        os.kill(supervisor, signal.SIGSTOP)
        try:
            require_service(mount)
            os.kill(worker, signal.SIGKILL)
            words = ["dd", f"if={mount / 'near'}", "status=none"]
            waiting = subprocess.Popen(words, stdout=subprocess.PIPE)
            time.sleep(seconds)
            assert waiting.poll() is None
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert waiting.communicate(timeout=20)[0] == HELLO
        require_service(mount)
        assert status(mount)["takeovers"] == 1


def test_stopped_supervisor_and_worker(site: Site, device: Path) -> None:
    """While both are stopped calls wait; once the supervisor goes on it replaces the worker, which stays stopped."""
    seconds = 30 if LONG else 1
    with site.mounted(device) as mount:
        supervisor, worker = mount.process("supervisor"), mount.process("worker")
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(worker, signal.SIGSTOP)
        try:
            waiting = subprocess.Popen(["dd", f"if={mount / 'near'}", "status=none"], stdout=subprocess.PIPE)
            time.sleep(seconds)
            assert waiting.poll() is None
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert waiting.communicate(timeout=40)[0] == HELLO
        assert worker_in_place(mount) != worker
        require_service(mount)
        assert status(mount)["takeovers"] == 1


@pytest.mark.skipif(not LONG, reason="takes half a minute; --long")
def test_worker_that_is_stopped_while_nobody_asks_for_anything(site: Site, device: Path) -> None:
    """It keeps nobody waiting, so it is left alone for as long as that lasts."""
    with site.mounted(device, "poll=0") as mount:
        require_service(mount)
        worker = mount.process("worker")
        os.kill(worker, signal.SIGSTOP)
        time.sleep(30)
        assert mount.process("worker") == worker
        os.kill(worker, signal.SIGCONT)
        require_service(mount)
        assert mount.process("worker") == worker


def test_run_time_folder_that_was_taken_away(site: Site, device: Path) -> None:
    """Somebody has cleaned up: files are served, and the next worker finds its folder missing and serves too."""
    with site.mounted(device) as mount:
        for path in mount.host.run_directory.iterdir():
            shutil.rmtree(path)
        require_service(mount)
        worker = mount.process("worker")
        os.kill(worker, signal.SIGKILL)
        require_service(mount)
        assert worker_in_place(mount) != worker


def test_killed_notifier(site: Site, device: Path) -> None:
    """A worker without it cannot tell the kernel to forget names of new files; another worker takes its place."""
    with site.mounted(device) as mount:
        worker, notifier = mount.process("worker"), mount.process("notifier")
        os.kill(notifier, signal.SIGKILL)
        require_service(mount)
        assert wait_for(lambda: worker not in mount.host_processes())
        require_service(mount)
        assert worker_in_place(mount) != worker
        assert mount.process("notifier") != notifier
        assert status(mount)["takeovers"] == 1
        assert any("ended with status 1" in line for line in said(mount))
