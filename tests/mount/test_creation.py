# SPDX-License-Identifier: Apache-2.0
"""Files and directories made by ordinary system calls and programs, on the master, and how other hosts see them."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from famfs_server.daemon.control_client import ControlClient
from famfs_server.omf import layout, log
from famfs_server.volume import check
from harness import (
    BIN,
    CLIENT_UUID,
    DEVICE_SIZE,
    FAST,
    MIB,
    Mount,
    Site,
    client,
    format_device,
    opened,
    run,
    succeed,
    wait_for,
)

pytestmark = pytest.mark.timeout(60)

DATA = random.Random(3).randbytes(3 * MIB + 77)
NOBODY = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--")
OLD = b"old secrets "
SOILED = 64 * MIB
FIRST_PROVISIONAL = 1 << 62


@dataclass(frozen=True)
class World:
    """One device, mounted by its master and by a client."""

    device: Path
    master: Mount
    client: Mount

    def bytes_of(self, name: str) -> bytes:
        """A file's bytes as they lie in memory, found by its extents and not through a mount."""
        self.settle()
        with opened(self.device) as volume:
            node = volume.namespace.resolve(name.encode())
            assert node, f"{name} is not in the log"
            return volume.read(node, 0, volume.namespace.size[node])

    def settle(self) -> None:
        """Wait until everything that was closed is in the log: close(2) does not."""
        (directory,) = (path for path in self.master.host.run_directory.iterdir() if path.is_dir())
        control = ControlClient(str(directory), seconds=20)
        assert wait_for(lambda: control.status()["not_logged_yet"] == 0)

    def names(self) -> set[str]:
        """What the log holds."""
        self.settle()
        with opened(self.device) as volume:
            return {os.fsdecode(volume.namespace.path(node)) for node in volume.namespace.walk()}


def soil(device: Path) -> None:
    """Leave old data where new files will lie."""
    with device.open("r+b") as image:
        image.seek(layout.LOG_OFFSET + 8 * MIB)
        piece = (OLD * (MIB // len(OLD) + 1))[:MIB]
        for _ in range(SOILED // MIB):
            image.write(piece)


@pytest.fixture(scope="module", params=FAST, ids=lambda fast: f"fastpath={fast}")
def world(request: pytest.FixtureRequest, shared_site: Site, shared_memory_folder: Path) -> Iterator[World]:
    site, option = shared_site, f"fastpath={request.param}"
    device = format_device(shared_memory_folder / f"device-{request.param}")
    with (
        site.mounted(device, option) as master,
        site.mounted(device, option, "poll=0", host=CLIENT_UUID) as other,
    ):
        succeed("mkdir", "-m", "1777", master / "open")
        yield World(device, master, other)
    with opened(device) as volume:
        report = check.examine(volume.memories[0], str(device), None)
        assert report.clean, list(check.render(report))
    device.unlink()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


class Holder:
    """A process that does to its open files what it is told."""

    CODE = """
import errno, json, os, sys
files = []
for line in sys.stdin:
    call, *words = json.loads(line)
    try:
        if call == "open":
            files.append(os.open(words[0], words[1], words[2]))
            result = len(files) - 1
        elif call == "pread":
            result = os.pread(files[words[0]], words[1], words[2]).hex()
        elif call == "pwrite":
            result = os.pwrite(files[words[0]], bytes.fromhex(words[1]), words[2])
        elif call == "stat":
            found = os.fstat(files[words[0]])
            result = [found.st_ino, found.st_size, found.st_mode & 0o7777]
        else:
            result = getattr(os, call)(files[words[0]], *words[1:])
    except OSError as error:
        result = errno.errorcode[error.errno]
    print(json.dumps(result), flush=True)
"""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(self, call: str, *words: object) -> object:
        """Do a call of os; its result, or the name of the error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([call, *words], default=os.fspath) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def create(self, path: Path, flags: int = os.O_EXCL, mode: int = 0o644) -> object:
        """Make a file, and keep it open for reading and writing; its number."""
        return self("open", path, os.O_RDWR | os.O_CREAT | flags, mode)

    def write(self, file: object, data: bytes, offset: int) -> object:
        """Write at an offset; how many bytes."""
        return self("pwrite", file, data.hex(), offset)

    def read(self, file: object, length: int, offset: int) -> bytes:
        """Read at an offset."""
        found = self("pread", file, length, offset)
        assert isinstance(found, str)
        return bytes.fromhex(found)


@contextmanager
def holder(*prefix: str) -> Iterator[Holder]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-I", "-S", "-c", Holder.CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with process:
            yield Holder(process)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)
    finally:
        process.kill()


def exists(path: Path) -> bool:
    """Whether a name can be looked up."""
    return bool(client("result = os.path.lexists(arguments[0])", path))


def stat_of(path: Path) -> list[int]:
    """Mode, uid, gid and size of a path; the name of the error where there is none."""
    code = "s = os.stat(arguments[0]); result = [s.st_mode & 0o7777, s.st_uid, s.st_gid, s.st_size]"
    found: list[int] = client(code, path)
    return found


def cli(mount: Mount, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a command of `famfs` as the mount's host."""
    return mount.host.run(BIN / "famfs", *words)


# -- programs -----------------------------------------------------------------------------------


def test_directories(world: World) -> None:
    root = world.master.path
    succeed("mkdir", "-p", root / "d/e/f")
    succeed("mkdir", "-p", root / "d/e/f")
    succeed("install", "-d", "-m", "0750", "-o", "12", "-g", "34", root / "d/installed/deep")
    assert run("mkdir", root / "d/e").returncode == 1
    assert stat_of(root / "d/installed/deep")[:3] == [0o750, 12, 34]
    # install(1) sets the mode after it has made the directory, which is in the log by then.
    for name, mode in (("d/e/f", 0o755), ("d/installed/deep", 0o700)):
        assert stat_of(world.client / name)[0] == mode


# How a program makes $new out of $source, which holds DATA.
PROGRAMS = {
    "cp": 'cp "$source" "$new"',
    "cp --sparse": 'cp --sparse=always "$source" "$new"',
    "install": 'install -m 640 "$source" "$new"',
    "dd": 'dd if="$source" of="$new" bs=64k status=none',
    "dd with fsync": 'dd if="$source" of="$new" bs=1M conv=fsync status=none',
    "dd notrunc": 'truncate -s $size "$new" && dd if="$source" of="$new" bs=300001 conv=notrunc status=none',
    "fallocate": 'fallocate -l $size "$new" && cat "$source" 1<> "$new"',
    "cat": 'cat "$source" > "$new"',
    "append": 'cat "$source" >> "$new"',
    "tee": 'tee "$new" < "$source" > /dev/null',
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_make_whole_files(world: World, source: Path, program: str) -> None:
    name = f"by {program}"
    variables = {"source": str(source), "new": str(world.master / name), "size": str(len(DATA))}
    succeed("sh", "-ec", PROGRAMS[program], env={**os.environ, **variables})
    succeed("cmp", source, world.master / name)
    succeed("cmp", source, world.client / name)
    assert world.bytes_of(name) == DATA


def test_tree_is_copied(world: World, tmp_path: Path) -> None:
    rng = random.Random(5)
    tree = tmp_path / "tree"
    for number in range(60):
        path = tree / f"dir{number % 7}" / f"sub{number % 3}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice((1, 4095, 4096, 4097, 100_000))))
        path.chmod(0o600 | rng.randrange(0o100))
    succeed("cp", "-a", tree, world.master / "tree")
    for mount in (world.master, world.client):
        succeed("diff", "-r", tree, mount / "tree")
        shown = [succeed("find", "-printf", "%P %m %U %G\\n", cwd=place) for place in (tree, mount / "tree")]
        # Modes of directories are set after they are logged, and are local to the master.
        if mount is world.master:
            assert sorted(shown[0].splitlines()) == sorted(shown[1].splitlines())


def test_posix_fallocate_and_reading_back(world: World) -> None:
    code = """
fd = os.open(arguments[0], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
os.posix_fallocate(fd, 0, 3000001)
result = [os.fstat(fd).st_size, os.read(fd, 4000000) == bytes(3000001)]
os.pwrite(fd, b"end", 2999998)
"""
    assert client(code, world.master / "posix") == [3000001, True]
    assert world.bytes_of("posix") == bytes(2999998) + b"end"


# -- attributes ---------------------------------------------------------------------------------


def test_umask_and_modes(world: World) -> None:
    code = """
os.umask(0o027)
fd = os.open(arguments[0] + "/masked", os.O_WRONLY | os.O_CREAT, 0o666)
os.write(fd, b"1")
os.mkdir(arguments[0] + "/masked.dir", 0o777)
os.umask(0)
fd = os.open(arguments[0] + "/all", os.O_WRONLY | os.O_CREAT, 0o7777)
os.write(fd, b"1")
"""
    client(code, world.master.path)
    for mount in (world.master, world.client):
        assert stat_of(mount / "masked")[0] == 0o640
        assert stat_of(mount / "masked.dir")[0] == 0o750
        assert stat_of(mount / "all")[0] & 0o777 == 0o777


def as_nobody(place: Path, script: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell script in a directory as a user without rights, who cannot reach it by its path."""
    return run("sh", "-ec", 'cd "$1" && shift && exec "$@"', "sh", place, *NOBODY, "sh", "-ec", script)


def test_owner_is_who_made_it(world: World) -> None:
    done = as_nobody(world.master / "open", "umask 077; printf mine > mine; mkdir mine.dir")
    assert done.returncode == 0, done.stderr
    for mount in (world.master, world.client):
        assert stat_of(mount / "open/mine") == [0o600, 1000, 1000, 4]
        assert stat_of(mount / "open/mine.dir")[:3] == [0o700, 1000, 1000]
    done = as_nobody(world.master.path, "printf no > no")
    assert "Permission denied" in done.stderr


def test_setgid_directories_give_their_group(world: World) -> None:
    root = world.master.path
    succeed("install", "-d", "-m", "2777", "-g", "4242", root / "group")
    done = as_nobody(root / "group", "umask 002; printf 1 > file; mkdir dir; printf 2 > dir/deep")
    assert done.returncode == 0, done.stderr
    for mount in (world.master, world.client):
        assert stat_of(mount / "group/file") == [0o664, 1000, 4242, 1]
        assert stat_of(mount / "group/dir")[:3] == [0o2775, 1000, 4242]
        assert stat_of(mount / "group/dir/deep")[:3] == [0o664, 1000, 4242]


def test_attributes_that_are_set_before_the_size_are_logged(world: World) -> None:
    with holder() as act:
        file = act.create(world.master / "attributes")
        assert act("fchmod", file, 0o604) is None
        assert act("fchown", file, 77, 88) is None
        assert act("ftruncate", file, 5) is None
        assert act("fchmod", file, 0o777) is None
    assert stat_of(world.master / "attributes") == [0o777, 77, 88, 5]
    assert stat_of(world.client / "attributes") == [0o604, 77, 88, 5]


def test_everything_is_there_after_a_remount(site: Site, memory_folder: Path, source: Path) -> None:
    device = format_device(memory_folder / "device")
    with site.mounted(device) as mount:
        succeed("install", "-d", "-m", "0711", "-o", "5", "-g", "6", mount / "dir")
        succeed("install", "-m", "0751", "-o", "7", "-g", "8", source, mount / "dir/file")
    for host in (CLIENT_UUID, None):
        with site.mounted(device, **({"host": host} if host else {})) as mount:
            succeed("cmp", source, mount / "dir/file")
            # install(1) sets owner and mode by name when the data are written: before the file is closed.
            assert stat_of(mount / "dir/file")[3] == len(DATA)


# -- growing ------------------------------------------------------------------------------------


def test_holes_read_as_zeroes(world: World) -> None:
    with holder() as act:
        file = act.create(world.master / "holes")
        assert act.write(file, b"end", 5 * MIB + 3) == 3
        assert act.write(file, b"middle", 3 * MIB - 2) == 6
        assert act.read(file, MIB, 2 * MIB) == bytes(MIB - 2) + b"mi"
        assert act("stat", file)[1] == 5 * MIB + 6  # type: ignore[index]
    expected = bytearray(5 * MIB + 6)
    expected[3 * MIB - 2 : 3 * MIB + 4] = b"middle"
    expected[-3:] = b"end"
    assert world.bytes_of("holes") == expected
    succeed("cmp", "-n", str(5 * MIB + 6), world.master / "holes", world.client / "holes")


def test_growth_that_must_move(world: World) -> None:
    with holder() as act:
        files = [act.create(world.master / f"moving{number}") for number in range(3)]
        for step in range(12):
            for number, file in enumerate(files):
                piece = bytes([17 * number + step]) * 900_001
                assert act.write(file, piece, step * 900_001) == 900_001
        for number, file in enumerate(files):
            for step in range(12):
                assert set(act.read(file, 900_001, step * 900_001)) == {17 * number + step}
    for number in range(3):
        expected = b"".join(bytes([17 * number + step]) * 900_001 for step in range(12))
        assert world.bytes_of(f"moving{number}") == expected


@pytest.mark.parametrize("fast", FAST)
def test_new_space_never_shows_old_data(site: Site, memory_folder: Path, fast: str) -> None:
    size = 2500001
    made = {
        "truncate": f"os.ftruncate(fd, {size})",
        "fallocate": f"os.posix_fallocate(fd, 0, {size})",
        "hole": f"os.pwrite(fd, b'\\0', {size - 1})",
        "steps": f"[os.pwrite(fd, bytes(1), at) for at in range(0, {size}, 100000)]",
        "shrunk": f"(os.pwrite(fd, bytes([120]) * 4096, {size - 1}), os.ftruncate(fd, {size}))",
        "control": "",
    }
    code = """
data = open(arguments[0], "rb").read()
result = [len(data), data.replace(bytes(1), b"").hex()[:40]]
"""
    device = format_device(memory_folder / "device")
    soil(device)
    with (
        site.mounted(device, f"fastpath={fast}") as mount,
        site.mounted(device, f"fastpath={fast}", host=CLIENT_UUID) as other,
    ):
        for name, act in made.items():
            create = "fd = os.open(arguments[0], os.O_RDWR | os.O_CREAT | os.O_EXCL)\n"
            if act:
                client(create + act, mount / name)
            else:
                assert cli(mount, "creat", "-s", str(size), mount / name).returncode == 0
            assert client(code, mount / name) == [size, "78" if name == "shrunk" else ""], name
        assert wait_for(lambda: act_names(other) == [".meta", *sorted(made)])
        for name in made:
            assert client(code, other / name) == [size, "78" if name == "shrunk" else ""], name
    with opened(device) as volume:
        memory = volume.memories[0]
        assert memory is not None
        assert OLD in memory.read(layout.LOG_OFFSET + 8 * MIB + SOILED - MIB, MIB)
        for name in made:
            (extent,) = volume.namespace.fmap(volume.namespace.resolve(name.encode())).extents
            # A mapping shows the rest of the last page, too.
            assert not any(memory.read(extent.offset + size, -size % 4096)), name


def test_shrinking_before_it_is_logged(world: World) -> None:
    with holder() as act:
        file = act.create(world.master / "shrunk")
        act.write(file, b"x" * 9000, 0)
        assert act("ftruncate", file, 0) is None
        act.write(file, b"again", 4)
        assert act.read(file, 100, 0) == bytes(4) + b"again"
        act.write(file, b"y" * 5000, 100)
        assert act("ftruncate", file, 50) is None
        assert act("stat", file)[1] == 50  # type: ignore[index]
    assert world.bytes_of("shrunk") == (bytes(4) + b"again").ljust(50, b"\0")


def test_mapped_while_new(world: World) -> None:
    code = """
fd = os.open(arguments[0], os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.ftruncate(fd, 100000)
with mmap.mmap(fd, 100000) as view:
    view[99990:] = b"0123456789"
    view.flush()
result = os.pread(fd, 10, 99990).decode()
"""
    assert client(code, world.master / "mapped") == "0123456789"
    assert world.bytes_of("mapped")[99990:] == b"0123456789"


def test_size_is_final_once_it_is_logged(world: World) -> None:
    with holder() as act:
        file = act.create(world.master / "final")
        assert act.write(file, b"12345", 0) == 5
        assert act("fsync", file) is None
        assert act.write(file, b"67", 4) in (1, "EFBIG")
        assert act.write(file, b"x", 5) == "EFBIG"
        assert act("ftruncate", file, 6) == "EPERM"
        assert act("ftruncate", file, 5) is None
        assert act("posix_fallocate", file, 0, 5) is None
        assert act("posix_fallocate", file, 0, 6) == "EFBIG"
    assert stat_of(world.client / "final")[3] == 5


# -- names --------------------------------------------------------------------------------------


def test_empty_files_are_dropped(world: World) -> None:
    path = world.master / "empty"
    for _ in range(3):
        succeed("touch", path)
        assert not exists(path)
    assert not exists(world.client / "empty")
    assert "empty" not in world.names()
    succeed("sh", "-c", 'echo full > "$1"', "sh", path)
    assert wait_for(lambda: exists(world.client / "empty"))
    assert succeed("cat", world.client / "empty") == "full\n"


def test_others_see_a_file_when_it_is_whole(world: World) -> None:
    theirs = world.client / "whole"
    with holder() as act:
        file = act.create(world.master / "whole")
        assert not exists(theirs)
        act.write(file, DATA[:100_000], 0)
        assert exists(world.master / "whole")
        assert not exists(theirs)
        assert "whole" not in succeed("ls", world.client.path).split("\n")
        act.write(file, DATA[100_000:200_000], 100_000)
        assert act("close", file) is None
        assert wait_for(lambda: exists(theirs))
        assert client("result = open(arguments[0], 'rb').read().hex()", theirs) == DATA[:200_000].hex()


def test_exclusive_creation(world: World) -> None:
    with holder() as act, holder() as other:
        assert act.create(world.master / "mine") == 0
        assert other.create(world.master / "mine") == "EEXIST"
        assert other.create(world.master / "mine", 0) == 0
        act.write(0, b"x", 0)
        assert other.read(0, 10, 0) == b"x"
        assert act("close", 0) is None
        assert other.create(world.master / "mine") == "EEXIST"
        assert not exists(world.client / "mine")
        assert other("close", 0) is None
        assert other.create(world.master / "mine") == "EEXIST"
    assert world.bytes_of("mine") == b"x"


def test_few_requests_make_a_file(world: World) -> None:
    """The kernel asks again for the directory, which it has just changed, but not for the file that it has made."""
    code = """
for number in range(50):
    fd = os.open(f"{arguments[0]}/{number}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    os.ftruncate(fd, 4096)
    os.close(fd)
"""
    succeed("mkdir", world.master / "few")

    def asked() -> Counter[str]:
        requests = json.loads(succeed(BIN / "famfs", "status", "--json", world.master.path))["requests"]["opcodes"]
        return Counter({name: figures["count"] for name, figures in requests.items()})

    before = asked()
    client(code, world.master / "few")
    more = asked() - before
    assert more["create"] == more["setattr"] == 50
    # One for each look at the directory, and a few of the command that counts.
    assert more["getattr"] < 75


def test_two_openers(world: World) -> None:
    with holder() as one, holder() as two:
        one.create(world.master / "two")
        assert two("open", world.master / "two", os.O_RDWR, 0) == 0
        for step in range(20):
            act = (one, two)[step % 2]
            assert act.write(0, bytes([step]) * 1000, step * 1000) == 1000
            assert (two, one)[step % 2].read(0, 1000, step * 1000) == bytes([step]) * 1000
        assert one("stat", 0) == two("stat", 0)
        one("close", 0)
        assert two.write(0, b"end", 20_000) == 3
    assert world.bytes_of("two") == b"".join(bytes([step]) * 1000 for step in range(20)) + b"end"


def test_names_of_new_files_do_not_change(world: World) -> None:
    with holder() as act:
        file = act.create(world.master / "fixed")
        for code in ("os.unlink(M)", "os.rename(M, M + '2')", "os.link(M, M + '2')"):
            assert client(code.replace("M", "arguments[0]"), world.master / "fixed") == "EPERM"
        act.write(file, b"x", 0)


def test_new_files_are_listed(world: World) -> None:
    code = """
result = [[entry.name, entry.inode(), entry.is_file(follow_symlinks=False), entry.stat().st_ino, entry.stat().st_size]
    for entry in os.scandir(arguments[0]) if entry.name.startswith("listed")]
"""
    with holder() as act:
        files = [act.create(world.master / f"listed{number}") for number in range(5)]
        for number, file in enumerate(files):
            act.write(file, b"x" * (number + 1), 0)
        act("fsync", files[2])
        inodes = [act("stat", file)[0] for file in files]  # type: ignore[index]
        found = sorted(client(code, world.master.path))
        assert found == [[f"listed{number}", inodes[number], True, inodes[number], number + 1] for number in range(5)]
        assert [row[0] for row in client(code, world.client.path)] == ["listed2"]
    found = sorted(client(code, world.master.path))
    assert [row[0] for row in found] == [f"listed{number}" for number in range(5)]
    assert len({row[1] for row in found}) == 5


def test_inode_numbers_stay_while_a_file_is_open(world: World) -> None:
    path = world.master / "inode"
    ask = "result = os.stat(arguments[0]).st_ino"
    with holder() as act:
        file = act.create(path)
        number = act("stat", file)[0]  # type: ignore[index]
        assert number >= FIRST_PROVISIONAL
        for call in (("ftruncate", file, 3 * MIB), ("fsync", file)):
            assert act(*call) is None
            assert act("stat", file)[0] == number  # type: ignore[index]
            assert client(ask, path) == number
        reader = act("open", path, os.O_RDONLY, 0)
        act("close", file)
        assert act("stat", reader)[0] == number  # type: ignore[index]
        assert client(ask, path) == number
    logged = client(ask, world.client / "inode")
    assert logged < FIRST_PROVISIONAL
    assert wait_for(lambda: client(ask, path) == logged)


def test_name_that_a_command_takes_meanwhile(world: World) -> None:
    with holder() as act:
        file = act.create(world.master / "taken")
        for words in (("creat", "-s", "4096"), ("mkdir",)):
            done = cli(world.master, *words, world.master / "taken")
            assert done.returncode != 0, done
            assert "exist" in done.stderr
        assert client("os.mkdir(arguments[0])", world.master / "taken") == "EEXIST"
        act.write(file, b"ours", 0)
    assert world.bytes_of("taken") == b"ours"
    assert cli(world.master, "creat", "-s", "4096", world.master / "taken2").returncode == 0
    with holder() as act:
        assert act.create(world.master / "taken2") == "EEXIST"
        assert act.create(world.master / "taken2", 0) == 0
        assert act("stat", 0)[1] == 4096  # type: ignore[index]


def test_longest_path(world: World) -> None:
    root = world.master.path
    succeed("mkdir", root / "p")
    make = "fd = os.open(arguments[0], os.O_CREAT | os.O_WRONLY); os.write(fd, b'1'); result = 'made'"
    assert client(make, root / "p" / ("x" * 77)) == "made"
    assert client(make, root / "p" / ("x" * 78)) == "ENAMETOOLONG"
    assert client("os.mkdir(arguments[0])", root / "p" / ("y" * 78)) == "ENAMETOOLONG"
    assert stat_of(world.client / "p" / ("x" * 77))[3] == 1


# -- refusals -----------------------------------------------------------------------------------

REFUSED = {
    "create": "os.open(M + '/refused', os.O_CREAT | os.O_WRONLY)",
    "mkdir": "os.mkdir(M + '/refused')",
    "mkfifo": "os.mkfifo(M + '/refused')",
}


@pytest.mark.parametrize("what", REFUSED)
def test_clients_create_nothing(world: World, what: str) -> None:
    assert client(REFUSED[what].replace("M", "arguments[0]"), world.client.path) == "EROFS"


def test_nothing_is_created_in_meta(world: World) -> None:
    for what in ("create", "mkdir"):
        code = REFUSED[what].replace("M", "arguments[0] + '/.meta'")
        assert client(code, world.master.path) == "EPERM"


def test_unnamed_files(world: World) -> None:
    code = "os.open(arguments[0], os.O_TMPFILE | os.O_RDWR)"
    assert client(code, world.master.path) in ("EOPNOTSUPP", "ENOTSUP")


@pytest.mark.parametrize("fast", FAST)
def test_nocreate(site: Site, memory_folder: Path, fast: str) -> None:
    device = format_device(memory_folder / "device")
    with site.mounted(device, f"fastpath={fast}", "nocreate") as mount:
        for what in ("create", "mkdir"):
            assert client(REFUSED[what].replace("M", "arguments[0]"), mount.path) == "EPERM"
        assert cli(mount, "creat", "-s", "4096", mount / "by-command").returncode == 0
        assert stat_of(mount / "by-command")[3] == 4096


@pytest.mark.parametrize("fast", FAST)
def test_log_is_full(site: Site, memory_folder: Path, fast: str) -> None:
    device = format_device(memory_folder / "device")
    with device.open("r+b") as image:
        image.seek(layout.LOG_OFFSET)
        image.write(log.build_header(8 * MIB, last_index=1))
    with site.mounted(device, f"fastpath={fast}") as mount:
        with holder() as act:
            assert act.create(mount / "one") == 0
            assert act.create(mount / "two") == 1
            # There is room for both and for nothing else; nobody finds out only when a file is closed.
            assert act.create(mount / "three") == "ENOSPC"
            assert client("os.mkdir(arguments[0])", mount / "three") == "ENOSPC"
            for file in (0, 1):
                assert act.write(file, b"data", 0) == 4
                assert act("fsync", file) is None
        assert act_names(mount) == [".meta", "one", "two"]
        assert client("os.open(arguments[0], os.O_CREAT | os.O_WRONLY)", mount / "three") == "ENOSPC"


def act_names(mount: Mount) -> list[str]:
    """The names in a mount's root."""
    names: list[str] = client("result = sorted(os.listdir(arguments[0]))", mount.path)
    return names


@pytest.mark.parametrize("fast", FAST)
def test_device_is_full(site: Site, memory_folder: Path, fast: str) -> None:
    device = format_device(memory_folder / "device")
    left = 8 * MIB
    size = DEVICE_SIZE - layout.LOG_OFFSET - 8 * MIB - left
    with site.mounted(device, f"fastpath={fast}") as mount:
        assert cli(mount, "creat", "-s", str(size), mount / "large").returncode == 0
        with holder() as act:
            file = act.create(mount / "small")
            assert act("ftruncate", file, left + 1) == "ENOSPC"
            assert act("posix_fallocate", file, 0, left + 1) == "ENOSPC"
            for step in range(left // MIB):
                assert act.write(file, b"x" * MIB, step * MIB) == MIB
            assert act.write(file, b"x", left) == "ENOSPC"
            assert act("stat", file)[1] == left  # type: ignore[index]
            other = act.create(mount / "other")
            assert act.write(other, b"x", 0) == "ENOSPC"
            assert act("ftruncate", other, 1) == "ENOSPC"
        assert act_names(mount) == [".meta", "large", "small"]
        assert client("s = os.statvfs(arguments[0]); result = s.f_bfree", mount.path) == 0
    with opened(device) as volume:
        node = volume.namespace.resolve(b"small")
        assert volume.read(node, left - 5, 5) == b"x" * 5


# -- many ---------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_more_files_than_can_be_new_at_a_time(site: Site, memory_folder: Path) -> None:
    count = 17_000
    device = format_device(memory_folder / "device", log_length=32 * MIB, size=64 << 30)
    code = """
for number in range(int(arguments[1])):
    fd = os.open(arguments[0] + "/f%d" % number, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.ftruncate(fd, 1 + number % 5000)
    os.close(fd)
result = len(os.listdir(arguments[0]))
"""
    with site.mounted(device) as mount:
        start = time.monotonic()
        assert client(code, mount.path, str(count), timeout=170) == count + 1
        print(f"{count / (time.monotonic() - start):.0f} files/s made one by one")
    with opened(device) as volume:
        assert volume.statistics().files == count


def test_many_new_files_at_a_time(world: World) -> None:
    code = """
files = [os.open(arguments[0] + "/many%d" % number, os.O_RDWR | os.O_CREAT | os.O_EXCL) for number in range(900)]
for number, fd in enumerate(files):
    os.write(fd, b"%d" % number)
result = sum(name.startswith("many") for name in os.listdir(arguments[0]))
"""
    assert client(code, world.master.path) == 900
    code = "result = [open(arguments[0] + '/many%d' % number).read() for number in range(900)]"
    world.settle()
    assert client(code, world.client.path) == [str(number) for number in range(900)]
