# SPDX-License-Identifier: Apache-2.0
"""How a mount begins and ends: refusals before anything is seen, unmounting, signals, and killed processes."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import prctl
import pytest

from famfs_server.dax.device import DaxDevice, Lock
from famfs_server.omf import layout, log
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
    populate,
    run,
    succeed,
    wait_for,
)

pytestmark = pytest.mark.timeout(60)

ADMIN = 1 << prctl.CAP_SYS_ADMIN
SECUREBITS = (
    "SECBIT_NOROOT|SECBIT_NOROOT_LOCKED|SECBIT_NO_SETUID_FIXUP|SECBIT_NO_SETUID_FIXUP_LOCKED|SECBIT_KEEP_CAPS_LOCKED"
)
"""As strace names them: root is nobody special, and no exec changes that."""
PROCESSES = ["famfs-notifier", "famfs-reaper", "famfs-superviso", "famfs-worker"]
"""Those of a mount while it is served."""
PF_MEMALLOC_NOIO = 0x80000
"""In the kernel's flags of a process: what PR_SET_IO_FLUSHER sets."""


@pytest.fixture
def device(site: Site) -> Path:
    path = site.format()
    populate(path, ["dir"], [File("hello", b"hello, world\n"), File("big", size=4 * MIB)])
    return path


@contextmanager
def holding(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has a file open and reads its first bytes whenever it is sent a line."""
    code = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
for line in sys.stdin:
    try:
        print(os.pread(fd, 5, 0).decode(), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""
    words = [sys.executable, "-I", "-S", "-c", code, str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.wait(20)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def ask(process: "subprocess.Popen[str]") -> str:
    """What the holder of a file reads from it now."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("read\n")
    process.stdin.flush()
    return process.stdout.readline().rstrip("\n")


def one_line(text: str) -> str:
    """The only line of a message."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


# -- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", FAST)
def test_unmounting_ends_the_server(site: Site, device: Path, fast: str) -> None:
    mount = site.attach(device, f"fastpath={fast}")
    # The reaper may not have come so far as to name itself.
    assert wait_for(lambda: sorted(mount.host_processes().values()) == PROCESSES), mount.host_processes()
    succeed("umount", mount.path)
    assert mount.gone()
    assert list(mount.host.run_directory.iterdir()) == []
    with DaxDevice.open(str(device)) as found:
        # A process that is ending lets go of its descriptors after it has vanished from view.
        assert found.lock(Lock.MOUNTED, exclusive=True, wait=2)


def test_unmounting_a_busy_mount_is_refused_and_harmless(site: Site, device: Path) -> None:
    with site.mounted(device) as mount, holding(mount / "hello") as holder:
        done = run("umount", mount.path)
        assert done.returncode != 0
        assert "busy" in done.stderr
        assert ask(holder) == "hello"


def test_mounting_again_and_again(site: Site, device: Path) -> None:
    for _ in range(3):
        mount = site.attach(device, name="again")
        succeed("umount", mount.path)
        assert wait_for(lambda: not site.mounts())
    assert wait_for(lambda: not site.processes())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_supervisor_unmounts(site: Site, device: Path, number: signal.Signals) -> None:
    mount = site.attach(device)
    os.kill(mount.process("supervisor"), number)
    assert mount.gone()


@pytest.mark.parametrize("fast", FAST)
def test_signal_with_an_open_file_detaches_and_the_file_stays_readable(site: Site, device: Path, fast: str) -> None:
    mount = site.attach(device, f"fastpath={fast}")
    with holding(mount / "hello") as holder:
        os.kill(mount.process("supervisor"), signal.SIGTERM)
        assert wait_for(lambda: not mount.attached)
        assert mount.connected
        assert ask(holder) == "hello"
        assert wait_for(lambda: sorted(mount.host_processes().values()) == PROCESSES), mount.host_processes()
    assert mount.gone()


def test_second_signal_ends_a_mount_that_is_in_use(site: Site, device: Path) -> None:
    mount = site.attach(device)
    supervisor = mount.process("supervisor")
    with holding(mount / "hello") as holder:
        os.kill(supervisor, signal.SIGTERM)
        assert wait_for(lambda: not mount.attached)
        os.kill(supervisor, signal.SIGTERM)
        assert wait_for(lambda: not mount.host_processes())
        assert ask(holder) != "hello"
    assert mount.gone()


def test_signals_to_the_worker_are_ignored(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(mount.process("worker"), number)
        assert succeed("cat", mount / "hello") == "hello, world\n"


@pytest.mark.parametrize("fast", FAST)
def test_killed_worker_is_replaced(site: Site, device: Path, fast: str) -> None:
    with site.mounted(device, f"fastpath={fast}") as mount:
        with holding(mount / "hello") as holder:
            for _ in range(3):
                worker = mount.process("worker")
                os.kill(worker, signal.SIGKILL)
                assert ask(holder) == "hello"
                assert succeed("cat", mount / "hello") == "hello, world\n"
                assert mount.process("worker") != worker
        succeed("mkdir", mount / f"made-{fast}")
        assert client("result = sorted(os.listdir(arguments[0]))", mount / "dir") == []


def test_workers_that_die_at_once_end_the_mount(site: Site, device: Path) -> None:
    mount = site.attach(device)
    supervisor = mount.process("supervisor")
    with holding(mount / "hello") as holder:
        known: set[int] = set()
        while os.path.exists(f"/proc/{supervisor}") and len(known) < 20:
            workers = {pid for pid, comm in mount.host_processes().items() if comm == "famfs-worker"} - known
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            known |= workers
        assert 5 <= len(known) <= 7
        assert wait_for(lambda: not mount.host_processes())
        assert not mount.attached
        assert ask(holder) != "hello"
    assert mount.gone()


@pytest.mark.parametrize("fast", FAST)
def test_killed_supervisor_is_cleared_away_by_the_reaper(site: Site, device: Path, fast: str) -> None:
    mount = site.attach(device, f"fastpath={fast}")
    with holding(mount / "hello"):
        os.kill(mount.process("supervisor"), signal.SIGKILL)
        assert wait_for(lambda: not mount.attached)
        assert wait_for(lambda: not mount.host_processes())
    assert wait_for(lambda: not mount.connected)
    site.clear_run_directories()


def test_killed_reaper_is_replaced(site: Site, device: Path) -> None:
    """As often as it is killed; the last one takes the mount away when the supervisor dies."""
    with site.mounted(device) as mount:
        for _ in range(3):
            former = mount.process("reaper")
            os.kill(former, signal.SIGKILL)
            assert wait_for(lambda former=former: mount.process("reaper") != former)
        os.kill(mount.process("supervisor"), signal.SIGKILL)
        assert mount.gone()
        assert not mount.attached


def test_killed_reaper_ends_nothing(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        os.kill(mount.process("reaper"), signal.SIGKILL)
        assert succeed("cat", mount / "hello") == "hello, world\n"


# -- the command itself -------------------------------------------------------------------------


def test_the_command_lets_go_of_its_output(site: Site, device: Path) -> None:
    # A shell's pipe sees the end only when every process of the mount has closed its copy.
    host, place = site.host(), site.place("mnt")
    words = host.mount_command(device, place)
    succeed("sh", "-c", '"$@" 2>&1 | cat', "sh", *words, env=host.environment, timeout=15)
    assert [record.mount_point for record in site.mounts()] == [str(place)]
    succeed("umount", place)


def test_daemon_leaves_the_working_directory_and_the_session(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        for name in ("supervisor", "worker", "reaper"):
            pid = mount.process(name)
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert os.getsid(pid) != os.getsid(0)
            assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}


def require_minimum(mount: Mount) -> None:
    """Every thread of every process of a mount has what it needs and no more."""
    assert wait_for(lambda: sorted(mount.host_processes().values()) == PROCESSES), mount.host_processes()
    # The supervisor gives its own up when the mount has been announced, and the reaper at its leisure.
    statuses = [Path(f"/proc/{pid}/status") for pid in mount.host_processes()]
    assert wait_for(lambda: all("NoNewPrivs:\t1\n" in status.read_text() for status in statuses))
    for name, kept, inheritable in (
        ("supervisor", ADMIN, ADMIN),
        ("worker", 0, 0),
        ("notifier", 0, 0),
        ("reaper", ADMIN, 0),
    ):
        tasks = list(Path(f"/proc/{mount.process(name)}/task").iterdir())
        assert (len(tasks) > 1) == (name == "worker")
        for task in tasks:
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            found = {key: int(status[key], 16) for key in ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd")}
            wanted = {"CapPrm": kept, "CapEff": kept, "CapInh": inheritable, "CapAmb": 0, "CapBnd": 0}
            assert found == wanted, name
            assert int(status["NoNewPrivs"]) == 1


def test_privileges_while_serving(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        succeed("cat", mount / "hello")
        require_minimum(mount)
        # The files of a process that cannot be dumped are closed to root itself, unless it may trace anybody.
        without = ["setpriv", "--bounding-set=-sys_ptrace"]
        stranger = subprocess.Popen([*without, "sleep", "60"])
        try:
            look = [*without, "readlink"]
            assert wait_for(lambda: run(*look, f"/proc/{stranger.pid}/cwd").returncode == 0)
            for name in ("supervisor", "worker", "notifier", "reaper"):
                assert run(*look, f"/proc/{mount.process(name)}/cwd").returncode != 0, name
        finally:
            stranger.kill()
            stranger.wait()
        # Spared when memory is short, where it may be.
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
        may = int(line.split()[1], 16) >> prctl.CAP_SYS_RESOURCE & 1
        for name in ("supervisor", "worker", "notifier", "reaper"):
            folder = Path(f"/proc/{mount.process(name)}")
            flags = int((folder / "stat").read_text().rpartition(")")[2].split()[6])
            assert bool(flags & PF_MEMALLOC_NOIO) == bool(may)
            assert int((folder / "oom_score_adj").read_text()) == (-900 if may else 0)


def test_securebits(site: Site, device: Path) -> None:
    """Nothing in /proc tells a process's securebits, so the calls that set them are watched. A process that is not
    named has those of the one that it was forked from."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    place, calls = site.place("mnt"), site.place("calls")
    host = site.host()
    words = ["strace", "-ff", "-qq", "-e", "trace=prctl", "-o", f"{calls}/of", *host.mount_command(device, place)]

    def securebits() -> list[str]:
        """The calls, each with the last name that its process had before."""
        found = []
        for path in calls.iterdir():
            name = ""
            for call in path.read_text().splitlines():
                if "PR_SET_NAME" in call:
                    name = call.split('"')[1]
                elif "PR_SET_SECUREBITS" in call:
                    found.append(f"{name}: {call}")
        return sorted(found)

    with subprocess.Popen(words, env=host.environment, stdin=subprocess.DEVNULL) as tracer:
        try:
            assert wait_for(lambda: bool(site.mounts()), 40)
            # The supervisor sets its own last.
            assert wait_for(lambda: len(securebits()) == 3, 20), securebits()
        finally:
            succeed("umount", place)
        assert tracer.wait(20) == 0
    call = f"prctl(PR_SET_SECUREBITS, {SECUREBITS}) = 0"
    names = ("famfs-reaper", "famfs-superviso", "famfs-worker")
    assert [" ".join(line.split()) for line in securebits()] == [f"{name}: {call}" for name in names]


def test_privileges_of_successors(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        worker = mount.process("worker")
        os.kill(worker, signal.SIGKILL)
        assert succeed("cat", mount / "hello") == "hello, world\n"
        assert mount.process("worker") != worker
        require_minimum(mount)
        succeed(BIN / "famfs", "upgrade", mount.path, timeout=60)
        require_minimum(mount)


def test_only_supervisor_and_worker_hold_the_connection(site: Site, device: Path) -> None:
    with site.mounted(device) as mount:
        for name, count in (("supervisor", 1), ("worker", 1), ("reaper", 0)):
            folder = Path(f"/proc/{mount.process(name)}/fd")
            assert [os.readlink(fd) for fd in folder.iterdir()].count("/dev/fuse") == count


# -- refusals -----------------------------------------------------------------------------------

CAUSES = ("already mounted by this host", "being made or repaired")


def refused(site: Site, device: Path, place: Path, *options: str, status: int, cause: str) -> None:
    """Try to mount and fail: with one line, a status, and nothing mounted."""
    before = Path("/proc/mounts").read_text().splitlines()
    done = site.host().mount(device, place, *options)
    assert done.returncode == status, done.stderr
    assert cause in one_line(done.stderr)
    assert done.stdout == ""
    assert site.mounts() == []
    assert [line for line in Path("/proc/mounts").read_text().splitlines() if str(site.directory) in line] == [
        line for line in before if str(site.directory) in line
    ]


def test_mount_point_is_missing(site: Site, device: Path) -> None:
    refused(site, device, site.directory / "absent", status=32, cause="No such file or directory")


def test_mount_point_is_a_file(site: Site, device: Path) -> None:
    refused(site, device, device, status=32, cause="is not a directory")


def test_device_is_missing(site: Site) -> None:
    refused(site, site.directory / "absent", site.place("mnt"), status=32, cause="No such file or directory")


def test_device_is_a_directory(site: Site) -> None:
    refused(site, site.place("dir"), site.place("mnt"), status=32, cause="is not a dax device")


def test_device_is_another_character_device(site: Site) -> None:
    refused(site, Path("/dev/zero"), site.place("mnt"), status=32, cause="/dev/zero")


def test_device_has_an_odd_size(site: Site) -> None:
    odd = site.directory / "odd"
    odd.write_bytes(bytes(4097))
    refused(site, odd, site.place("mnt"), status=32, cause="multiple of 2 MiB")


def test_device_has_no_file_system(site: Site) -> None:
    blank = site.directory / "blank"
    with blank.open("wb") as image:
        image.truncate(4 << 30)
    refused(site, blank, site.place("mnt"), status=32, cause="no famfs superblock")


def test_device_is_shorter_than_the_log(site: Site, device: Path) -> None:
    os.truncate(device, 8 * MIB)
    refused(site, device, site.place("mnt"), status=32, cause="log")


@pytest.mark.parametrize("words", ["frobnicate", "fmap=perhaps", "timeout=-1", "timeout=nan", "fastpath", "ro,,what=1"])
def test_unknown_options(site: Site, device: Path, words: str) -> None:
    option = words.rpartition(",")[2].partition("=")[0]
    refused(site, device, site.place("mnt"), words, status=1, cause=option)


def test_what_somebody_else_has(site: Site, device: Path) -> None:
    """A second mount by the same host, and one of a device that is being formatted: each waits for a while first."""
    formatted = site.format("formatted")
    with site.mounted(device) as mount, DaxDevice.open(str(formatted)) as held, ThreadPoolExecutor(2) as threads:
        assert held.lock(Lock.MOUNTED, exclusive=True)
        tries = [
            threads.submit(mount.host.mount, wanted, site.place(name))
            for wanted, name in ((device, "other"), (formatted, "third"))
        ]
        for done, cause in zip((attempt.result() for attempt in tries), CAUSES, strict=True):
            assert done.returncode == 32
            assert cause in one_line(done.stderr)
        assert len(site.mounts()) == 1
        assert succeed("cat", mount / "hello") == "hello, world\n"
        with site.mounted(device, host=CLIENT_UUID) as other:
            assert succeed("cat", other / "hello") == "hello, world\n"


def test_hosts_whose_uuids_are_alike(site: Site, device: Path) -> None:
    # Equal in the last 60 bits, as those made by one machine can be.
    alike = ["00000000-0000-4000-8506-0708090a0b0c", "00000001-0000-4000-8506-0708090a0b0c"]
    with site.mounted(device, host=alike[0]), site.mounted(device, host=alike[1]) as second:
        assert succeed("cat", second / "hello") == "hello, world\n"


def test_host_without_a_readable_uuid_is_a_client(site: Site, device: Path) -> None:
    site.host().uuid_file.write_text("not a uuid\n")
    with site.mounted(device, "fmap=never") as mount:
        assert "client role" in mount.warnings
        assert client("os.mkdir(arguments[0])", mount / "new") == "EROFS"


def test_host_without_a_uuid_gets_one(site: Site, device: Path) -> None:
    site.host().uuid_file.unlink()
    with site.mounted(device, "fmap=never") as mount:
        text = mount.host.uuid_file.read_bytes()
        assert len(text) == 37
        assert text[36] == 0
        assert mount.host.uuid_file.stat().st_mode & 0o777 == 0o444
        assert client("os.mkdir(arguments[0])", mount / "new") == "EROFS"


def test_log_is_full(site: Site) -> None:
    device = format_device(site.directory / "full")
    with device.open("r+b") as image:
        image.seek(layout.LOG_OFFSET)
        image.write(log.build_header(8 * MIB, last_index=1))
    with site.mounted(device) as mount:
        succeed("mkdir", mount / "one", mount / "two")
        before = device.open("rb").read(4 * MIB)
        for _ in range(2):
            assert client("os.mkdir(arguments[0])", mount / "three") == "ENOSPC"
        assert client("result = sorted(os.listdir(arguments[0]))", mount.path) == [".meta", "one", "two"]
        assert device.open("rb").read(4 * MIB) == before
