# SPDX-License-Identifier: Apache-2.0
"""A mounted file system as programs see it: the same on the master, on a client, with and without the fast path."""

import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from famfs_server.volume.space import Interleave
from harness import (
    CLIENT_UUID,
    DEVICE_SIZE,
    FAST,
    MIB,
    THIRD_UUID,
    File,
    Mount,
    Site,
    client,
    opened,
    populate,
    run,
    succeed,
)

pytestmark = pytest.mark.timeout(60)

DATA = random.Random(1).randbytes(7 * MIB + 5)
NOBODY = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--")
SCRATCH = MIB + 100
SCRATCH_NAMES = ("append", "copied", "dd", "fio", "mmap", "remote", "end", "sync", "chmod", "chown", "times", "trunc")
STRIPED = Interleave(buckets=4, strips=3, chunk_size=2 * MIB)
ODD_NAMES = (
    "name with spaces",
    "grüß",
    "\udcff\udcfe not unicode",
    "new\nline",
    "-n",
    "dir/" + "x" * 75,
)
DIRECTORIES = ("dir", "dir/sub", "closed", "open")
FILES = (
    File("hello", b"hello, world\n"),
    File("dir/big", DATA[: 5 * MIB + 123]),
    File("dir/sub/striped", DATA, interleave=STRIPED),
    File("dir/sub/one", b"1", mode=0o444),
    File("private", b"secret", mode=0o600),
    File("group", b"for the group", mode=0o640, uid=0, gid=1000),
    File("theirs", b"theirs!", mode=0o600, uid=1000, gid=1000),
    File("closed/inside", b"?", mode=0o644),
    *(File(f"scratch.{name}", size=SCRATCH) for name in SCRATCH_NAMES),
    *(File(name, name.encode("utf-8", "surrogateescape")) for name in ODD_NAMES),
)


@dataclass(frozen=True)
class World:
    """One device, mounted by its master, by a client, and by a third host for reading only."""

    device: Path
    master: Mount
    client: Mount
    reader: Mount

    @property
    def mounts(self) -> tuple[Mount, ...]:
        return self.master, self.client, self.reader


@pytest.fixture(scope="module", params=FAST, ids=lambda fast: f"fastpath={fast}")
def world(request: pytest.FixtureRequest, shared_site: Site) -> Iterator[World]:
    site, option = shared_site, f"fastpath={request.param}"
    device = site.format(f"device-{request.param}")
    populate(device, DIRECTORIES, FILES)
    with (
        site.mounted(device, option) as master,
        site.mounted(device, option, host=CLIENT_UUID) as other,
        site.mounted(device, option, "ro", host=THIRD_UUID) as reader,
    ):
        succeed("chmod", "0700", master / "closed")
        succeed("chmod", "1777", master / "open")
        yield World(device, master, other, reader)


def device_bytes(device: Path, name: str, offset: int, length: int) -> bytes:
    """Bytes of a file as they lie in the device's memory, found by the file's extents and not through a mount."""
    with opened(device) as volume:
        return volume.read(volume.namespace.resolve(name.encode()), offset, length)


# -- reading ------------------------------------------------------------------------------------


def test_listing_shows_every_name(world: World) -> None:
    expected = sorted([*DIRECTORIES, *(file.path for file in FILES), ".meta", ".meta/.superblock", ".meta/.log"])
    for mount in world.mounts:
        listed = succeed("find", mount.path, "-mindepth", "1", "-printf", "%P\\0").split("\0")[:-1]
        assert sorted(listed) == expected
        assert "total" in succeed("ls", "-laR", mount.path)


def test_attributes(world: World) -> None:
    for mount in world.mounts:
        lines = succeed("find", mount.path, "-type", "f", "-printf", "%P\\t%s\\t%m\\t%U\\t%G\\t%n\\0").split("\0")[:-1]
        found = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
        for file in FILES:
            size = len(file.data) or file.size
            assert found[file.path] == [str(size), f"{file.mode:o}", str(file.uid), str(file.gid), "1"]


def test_inode_numbers_are_the_same_everywhere(world: World) -> None:
    listings = [succeed("find", mount.path, "-printf", "%i %P\\0") for mount in world.mounts]
    assert len(set(listings)) == 1
    numbers = [line.split(" ")[0] for line in listings[0].split("\0")[:-1]]
    assert len(set(numbers)) == len(numbers)


def test_cat_and_cp_out(world: World, tmp_path: Path) -> None:
    for number, mount in enumerate(world.mounts):
        assert succeed("cat", mount / "hello") == "hello, world\n"
        copy = tmp_path / str(number)
        succeed("cp", "-a", mount.path, copy)
        for file in FILES:
            if file.data:
                assert (copy / os.fsencode(file.path).decode("utf-8", "surrogateescape")).read_bytes() == file.data
        succeed("diff", "-r", "--exclude=.meta", "--exclude=scratch.*", mount.path, copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["dir/big", "dir/sub/striped"])
def test_reads_of_every_shape(world: World, name: str, rng: random.Random) -> None:
    size = next(len(file.data) for file in FILES if file.path == name)
    pieces = [(rng.randrange(size + 10), rng.choice((1, 511, 4096, 65537, 2 * MIB, 3 * MIB))) for _ in range(60)]
    pieces += [(2 * MIB - 1, 2), (6 * MIB - 3, 7), (size - 1, 1), (size - 1, 2), (size, 1), (size + 1, 1), (0, size)]
    expected = hashlib.sha256(b"".join(DATA[:size][at : at + count] for at, count in pieces)).hexdigest()
    for mount in world.mounts:
        code = """
import hashlib
digest = hashlib.sha256()
fd = os.open(arguments[0], os.O_RDONLY)
for at, count in json.loads(arguments[1]):
    digest.update(os.pread(fd, count, at))
result = digest.hexdigest()
"""
        assert client(code, mount / name, str([list(piece) for piece in pieces])) == expected


def test_dd_reads_direct_and_cmp(world: World, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    expected.write_bytes(DATA)
    for mount in world.mounts:
        succeed("cmp", mount / "dir/sub/striped", expected)
        out = tmp_path / "out"
        succeed("dd", f"if={mount / 'dir/sub/striped'}", f"of={out}", "bs=1M", "iflag=direct", "status=none")
        succeed("cmp", out, expected)
        assert run("cmp", mount / "dir/big", expected).returncode == 1


def test_mapping_for_reading(world: World) -> None:
    code = """
import hashlib
fd = os.open(arguments[0], os.O_RDONLY)
digests = []
for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
    with mmap.mmap(fd, 0, flags, mmap.PROT_READ) as view:
        digests.append(hashlib.sha256(view).hexdigest())
result = digests
"""
    expected = hashlib.sha256(DATA).hexdigest()
    for mount in world.mounts:
        assert client(code, mount / "dir/sub/striped") == [expected, expected]


def test_lookups_of_what_is_not_there(world: World) -> None:
    for mount in world.mounts:
        for name in ("absent", "dir/absent", "x" * 255, "absent/deeper"):
            assert client("os.stat(arguments[0])", mount / name) == ("ENAMETOOLONG" if len(name) > 79 else "ENOENT")
        assert client("os.stat(arguments[0])", mount / "hello/below") == "ENOTDIR"


# -- writing ------------------------------------------------------------------------------------


def test_dd_writes_in_place(world: World, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(DATA[:300_000])
    target = world.master / "scratch.dd"
    succeed("dd", f"if={data}", f"of={target}", "bs=4096", "seek=17", "conv=notrunc", "status=none")
    at = 17 * 4096
    assert device_bytes(world.device, "scratch.dd", at, 300_000) == DATA[:300_000]
    assert device_bytes(world.device, "scratch.dd", 0, at) == bytes(at)
    for mount in world.mounts:
        succeed("cmp", "-n", "300000", f"--ignore-initial={at}:0", mount / "scratch.dd", data)
    assert "cannot" not in run("stat", target).stderr


def test_dd_that_would_truncate_is_refused(world: World) -> None:
    done = run("dd", "if=/dev/zero", f"of={world.master / 'dir/big'}", "bs=4096", "count=1", "status=none")
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr
    assert succeed("stat", "-c", "%s", world.master / "dir/big").strip() == str(5 * MIB + 123)


def test_a_client_writes_data_and_the_master_sees_it(world: World) -> None:
    code = "fd = os.open(arguments[0], os.O_RDWR); result = os.pwrite(fd, b'from the client', 4090)"
    assert client(code, world.client / "scratch.remote") == 15
    assert device_bytes(world.device, "scratch.remote", 4090, 15) == b"from the client"
    code = "fd = os.open(arguments[0], os.O_RDONLY); result = os.pread(fd, 15, 4090).decode()"
    assert client(code, world.master / "scratch.remote") == "from the client"


def test_shared_mappings_reach_the_memory_and_private_ones_do_not(world: World) -> None:
    code = """
fd = os.open(arguments[0], os.O_RDWR)
with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
    view[0:7] = b'private'
    result = [bytes(view[0:7]).decode()]
with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view:
    result.append(bytes(view[0:7]).decode(errors="replace"))
    view[4093:4099] = b'shared'
    view.flush()
"""
    assert client(code, world.master / "scratch.mmap") == ["private", "\0" * 7]
    assert device_bytes(world.device, "scratch.mmap", 4093, 6) == b"shared"
    assert device_bytes(world.device, "scratch.mmap", 0, 7) == bytes(7)


def test_fsync_and_sync(world: World) -> None:
    code = """
fd = os.open(arguments[0], os.O_RDWR)
os.write(fd, b'synced')
os.fsync(fd)
os.fdatasync(fd)
os.close(fd)
directory = os.open(arguments[1], os.O_RDONLY)
os.fsync(directory)
result = "done"
"""
    assert client(code, world.master / "scratch.sync", world.master.path) == "done"
    succeed("sync", "-f", world.master / "scratch.sync")
    assert device_bytes(world.device, "scratch.sync", 0, 6) == b"synced"


def test_the_end_of_a_file_does_not_move(world: World) -> None:
    code = f"""
fd = os.open(arguments[0], os.O_RDWR)
def attempt(offset, data):
    try:
        return os.pwrite(fd, data, offset)
    except OSError as error:
        return errno.errorcode[error.errno]
result = [
    attempt({SCRATCH - 3}, b"0123456789"),
    attempt({SCRATCH}, b"x"),
    attempt({SCRATCH} + 4096, b"x"),
    attempt({SCRATCH}, b""),
    os.fstat(fd).st_size,
]
"""
    expected = [3, "EFBIG", "EFBIG", 0, SCRATCH]
    assert client(code, world.master / "scratch.end") == expected
    assert client(code, world.client / "scratch.end") == expected
    assert device_bytes(world.device, "scratch.end", SCRATCH - 4, 99) == b"\x00012"


def test_appending_is_refused(world: World) -> None:
    code = "fd = os.open(arguments[0], os.O_WRONLY | os.O_APPEND); result = os.write(fd, b'more')"
    assert client(code, world.master / "scratch.append") == "EFBIG"
    done = run("dd", "if=/etc/hostname", f"of={world.master / 'scratch.append'}", "oflag=append", "conv=notrunc")
    assert done.returncode != 0
    assert "File too large" in done.stderr


def test_copying_inside_the_file_system(world: World) -> None:
    code = """
source = os.open(arguments[0], os.O_RDONLY)
target = os.open(arguments[1], os.O_WRONLY)
result = os.copy_file_range(source, target, 100000, 5, 70000)
"""
    assert client(code, world.master / "dir/big", world.master / "scratch.copied") == 100000
    assert device_bytes(world.device, "scratch.copied", 70000, 100000) == DATA[5:100005]


def test_fio_verifies_what_it_wrote(world: World) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    options = ["--name=v", f"--filename={world.master / 'scratch.fio'}", "--rw=randwrite", "--bs=4k", "--size=1M"]
    options += [
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_state_save=0",
        "--fallocate=none",
        "--ioengine=psync",
        "--overwrite=1",
    ]
    assert "err= 0" in succeed("fio", *options, "--allow_file_create=0")
    options = ["--name=m", f"--filename={world.master / 'scratch.fio'}", "--rw=randrw", "--bs=4k", "--size=1M"]
    assert "err= 0" in succeed("fio", *options, "--fallocate=none", "--ioengine=mmap", "--allow_file_create=0")


# -- refusals -----------------------------------------------------------------------------------

# What it is: (the call, with M the mount point; its error on the master; its error on a client).
REFUSED = {
    "unlink": ("os.unlink(M + '/hello')", "EPERM", "EROFS"),
    "unlink of nothing": ("os.unlink(M + '/absent')", "ENOENT", "ENOENT"),
    "rmdir": ("os.rmdir(M + '/open')", "EPERM", "EROFS"),
    "rename": ("os.rename(M + '/hello', M + '/other')", "EPERM", "EROFS"),
    "rename over": ("os.rename(M + '/hello', M + '/private')", "EPERM", "EROFS"),
    "link": ("os.link(M + '/hello', M + '/other')", "EPERM", "EROFS"),
    "symlink": ("os.symlink('hello', M + '/other')", "EPERM", "EROFS"),
    "readlink": ("os.readlink(M + '/hello')", "EINVAL", "EINVAL"),
    "fifo": ("os.mkfifo(M + '/other')", "EPERM", "EROFS"),
    "device node": ("os.mknod(M + '/other', 0o020666, os.makedev(1, 3))", "EPERM", "EROFS"),
    "truncate to nothing": ("os.truncate(M + '/scratch.trunc', 0)", "EPERM", "EROFS"),
    "truncate shorter": ("os.truncate(M + '/scratch.trunc', 77)", "EPERM", "EROFS"),
    "truncate longer": ("os.truncate(M + '/scratch.trunc', 1 << 40)", "EPERM", "EROFS"),
    "open and truncate": ("os.open(M + '/scratch.trunc', os.O_WRONLY | os.O_TRUNC)", "EPERM", "EROFS"),
    "truncate a directory": ("os.truncate(M + '/dir', 0)", "EISDIR", "EISDIR"),
    "setxattr": ("os.setxattr(M + '/hello', 'user.mine', b'1')", "ENOTSUP", "ENOTSUP"),
    "setxattr of ours": ("os.setxattr(M + '/hello', 'user.famfs.shadow', b'1')", "ENOTSUP", "ENOTSUP"),
    "removexattr": ("os.removexattr(M + '/hello', 'user.famfs.shadow')", "ENOTSUP", "ENOTSUP"),
    "getxattr": ("os.getxattr(M + '/hello', 'user.mine')", "ENODATA", "ENODATA"),
    "security label": ("os.getxattr(M + '/hello', 'security.selinux')", "ENODATA", "ENODATA"),
    "ioctl": ("fcntl.ioctl(os.open(M + '/hello', os.O_RDONLY), 0x5401)", "ENOTTY", "ENOTTY"),
    "flags": ("fcntl.ioctl(os.open(M + '/hello', os.O_RDONLY), 0x80086601, bytes(8))", "ENOTTY", "ENOTTY"),
    "open a directory for writing": ("os.open(M + '/dir', os.O_WRONLY)", "EISDIR", "EISDIR"),
    "read a directory": ("os.read(os.open(M + '/dir', os.O_RDONLY), 1)", "EISDIR", "EISDIR"),
    "list a file": ("os.listdir(M + '/hello')", "ENOTDIR", "ENOTDIR"),
    "mkdir of what exists": ("os.mkdir(M + '/dir')", "EEXIST", "EEXIST"),
    "mkdir over a file": ("os.mkdir(M + '/hello')", "EEXIST", "EEXIST"),
    "mkdir below nothing": ("os.mkdir(M + '/absent/dir')", "ENOENT", "ENOENT"),
    "mkdir with a path of 80 bytes": ("os.mkdir(M + '/dir/' + 'y' * 76)", "ENAMETOOLONG", "EROFS"),
    "mkdir in .meta": ("os.mkdir(M + '/.meta/dir')", "EPERM", "EROFS"),
    "mkdir of a second .meta": ("os.mkdir(M + '/.meta')", "EEXIST", "EEXIST"),
    "write to the superblock": ("os.open(M + '/.meta/.superblock', os.O_WRONLY)", "EPERM", "EPERM"),
    "write to the log": ("os.open(M + '/.meta/.log', os.O_RDWR)", "EPERM", "EPERM"),
    "chmod of a meta file": ("os.chmod(M + '/.meta/.log', 0o666)", "EPERM", "EROFS"),
    "truncate a meta file": ("os.truncate(M + '/.meta/.log', 0)", "EPERM", "EROFS"),
}


def test_refused(world: World) -> None:
    code = """
M, result = arguments[0], {}
for what, call in json.loads(arguments[1]).items():
    try:
        result[what] = ["no error", repr(eval(call))]
    except OSError as error:
        result[what] = errno.errorcode[error.errno]
    with open(M + "/hello") as file:
        assert file.read() == "hello, world\\n", what
"""
    calls = json.dumps({what: call for what, (call, _, _) in REFUSED.items()})
    for mount, column in ((world.master, 1), (world.client, 2)):
        assert client(code, mount.path, calls) == {what: row[column] for what, row in REFUSED.items()}


def test_preallocating_what_is_logged(world: World) -> None:
    for mount in (world.master, world.client):
        target = mount / "scratch.trunc"
        # All of it is there already.
        succeed("fallocate", "-l", str(SCRATCH), target)
        done = run("fallocate", "-l", "16M", target)
        assert done.returncode == 1
        assert "File too large" in done.stderr
        for mode in (["-n", "-l", "4096"], ["-p", "-o", "0", "-l", "4096"], ["-z", "-l", "4096"], ["-c", "-l", "4096"]):
            done = run("fallocate", *mode, target)
            assert done.returncode == 1
            assert "supported" in done.stderr
        assert succeed("stat", "-c", "%s", target).strip() == str(SCRATCH)


def test_a_client_cannot_change_what_is_logged(world: World) -> None:
    for call in ("os.mkdir(M + '/new')", "os.chmod(M + '/hello', 0o600)", "os.chown(M + '/hello', 1, 1)"):
        assert client(f"M = arguments[0]\n{call}", world.client.path) == "EROFS"
    assert client("os.utime(arguments[0])", world.client / "hello") == "EROFS"


def test_a_mount_for_reading_refuses_every_change(world: World) -> None:
    calls = ["os.mkdir(M + '/new')", "os.chmod(M + '/hello', 0o600)", "os.utime(M + '/hello')"]
    calls += ["os.open(M + '/hello', os.O_WRONLY)", "os.truncate(M + '/hello', 1)", "os.unlink(M + '/hello')"]
    for call in calls:
        assert client(f"M = arguments[0]\n{call}", world.reader.path) == "EROFS"


# -- attributes in memory -----------------------------------------------------------------------


def test_mode_owner_and_times_last_as_long_as_the_mount(world: World) -> None:
    master, other = world.master, world.client
    succeed("chmod", "2751", master / "scratch.chmod")
    succeed("chown", "12:34", master / "scratch.chown")
    succeed("touch", "-d", "@1000000000.25", master / "scratch.times")
    show = (
        "result = [os.stat(arguments[0]).st_mode & 0o7777, os.stat(arguments[0]).st_uid, os.stat(arguments[0]).st_gid]"
    )
    assert client(show, master / "scratch.chmod") == [0o2751, 0, 0]
    assert client(show, master / "scratch.chown") == [0o644, 12, 34]
    times = "s = os.stat(arguments[0])\nresult = [s.st_atime_ns, s.st_mtime_ns]"
    assert client(times, master / "scratch.times") == [1000000000250000000] * 2
    assert client(show, other / "scratch.chmod") == [0o644, 0, 0]
    assert client(show, other / "scratch.chown") == [0o644, 0, 0]
    assert client(times, other / "scratch.times")[0] > 1_700_000_000 * 10**9
    assert succeed("stat", "-c", "%s", master / "scratch.chmod").strip() == str(SCRATCH)


def test_untouched_times_are_those_of_the_mount(world: World) -> None:
    for mount in world.mounts:
        code = "result = sorted({os.stat(os.path.join(arguments[0], n)).st_mtime_ns for n in ('hello', 'dir/big')})"
        (time,) = client(code, mount.path)
        assert time > 1_700_000_000 * 10**9


# -- directories --------------------------------------------------------------------------------


def test_mkdir_is_seen_by_every_host_at_once(world: World) -> None:
    succeed("mkdir", "-m", "0710", world.master / "dir/made")
    succeed("mkdir", "-p", world.master / "dir/made/deep/deeper")
    for mount in world.mounts:
        shown = client("s = os.stat(arguments[0]); result = [s.st_mode, s.st_nlink]", mount / "dir/made")
        assert shown == [stat.S_IFDIR | 0o710, 1]
        assert succeed("find", mount / "dir/made", "-printf", "%P ").split() == ["deep", "deep/deeper"]
    with opened(world.device) as volume:
        assert volume.namespace.resolve(b"dir/made/deep/deeper")


def test_mkdir_obeys_the_umask_and_sets_the_owner(world: World) -> None:
    place = world.master / "open"
    script = 'cd "$1" && umask 027 && exec setpriv --reuid=1000 --regid=1001 --clear-groups mkdir by-user'
    succeed("sh", "-c", script, "sh", place)
    show = "s = os.stat(arguments[0]); result = [s.st_mode & 0o7777, s.st_uid, s.st_gid]"
    for mount in world.mounts:
        assert client(show, mount / "open/by-user") == [0o750, 1000, 1001]


# -- who may do what ----------------------------------------------------------------------------


def as_nobody(place: Path, *command: str) -> tuple[int, str]:
    """Status and output of a command that runs in `place` as another user."""
    done = run("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", place, *NOBODY, *command)
    return done.returncode, done.stdout + done.stderr


def test_permissions_are_checked_for_other_users(world: World) -> None:
    for mount in (world.master, world.client):
        assert as_nobody(mount.path, "cat", "hello") == (0, "hello, world\n")
        assert as_nobody(mount.path, "cat", "group") == (0, "for the group")
        assert as_nobody(mount.path, "cat", "theirs") == (0, "theirs!")
        for command in (["cat", "private"], ["dd", "if=/dev/zero", "of=hello", "conv=notrunc", "count=1"]):
            status, text = as_nobody(mount.path, *command)
            assert status == 1
            assert "Permission denied" in text
    for command, cause in (
        (["ls", "closed"], "Permission denied"),
        (["cat", "closed/inside"], "Permission denied"),
        (["mkdir", "dir/not-mine"], "Permission denied"),
        (["chmod", "777", "hello"], "Operation not permitted"),
        (["chown", "1000", "hello"], "Operation not permitted"),
        (["touch", "-d", "@5", "hello"], "Permission denied"),
    ):
        status, text = as_nobody(world.master.path, *command)
        assert status != 0, command
        assert cause in text


def test_the_mount_says_what_it_is(world: World) -> None:
    for mount, kind in zip(world.mounts, ("rw", "rw", "ro"), strict=True):
        (record,) = (r for r in mount.site.mounts() if r.device == mount.device_number)
        assert (record.fstype, record.source) == ("fuse.famfs", str(world.device))
        assert {kind, "nosuid", "nodev"} <= set(record.options)
        assert {"allow_other", "default_permissions"} <= set(record.super_options)


# -- figures, meta files, extended attributes, seeking ------------------------------------------


def test_statfs_gives_the_figures_of_the_device(world: World) -> None:
    with opened(world.device) as volume:
        figures = volume.statistics()
    code = """
s = os.statvfs(arguments[0])
result = [s.f_bsize * s.f_blocks, s.f_bsize * s.f_bfree, s.f_bsize * s.f_bavail, s.f_files, s.f_ffree, s.f_namemax]
"""
    for mount in world.mounts:
        succeed("ls", mount.path)
        capacity, free, available, entries, left, longest = client(code, mount.path)
        assert (capacity, entries, longest) == (DEVICE_SIZE, 15420, 79)
        assert free == available == figures.free
        assert entries - left == figures.log_entries
        line = succeed("df", "-B1", "--output=source,size,used,avail", mount.path).splitlines()[1].split()
        assert line == [str(world.device), str(capacity), str(capacity - free), str(free)]
        assert "famfs" in succeed("stat", "-f", mount.path) or succeed("df", "-T", mount.path).count("fuse.famfs")


def test_meta_files_are_the_media(world: World) -> None:
    with world.device.open("rb") as image:
        superblock = image.read(2 * MIB)
        log = image.read(8 * MIB)
    for mount in world.mounts:
        assert succeed("stat", "-c", "%s %a %u:%g %F", mount / ".meta/.superblock").split(" ", 3)[:3] == [
            "2097152",
            "444",
            "0:0",
        ]
        code = "import hashlib; result = hashlib.sha256(open(arguments[0], 'rb').read()).hexdigest()"
        assert client(code, mount / ".meta/.superblock") == hashlib.sha256(superblock).hexdigest()
        assert client(code, mount / ".meta/.log") == hashlib.sha256(log).hexdigest()


def test_extended_attribute_leads_to_the_control_socket(world: World) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
path = os.fsencode(arguments[0])
value = os.getxattr(path, "user.famfs.shadow").decode()
size = libc.getxattr(path, b"user.famfs.shadow", None, 0)
libc.getxattr(path, b"user.famfs.shadow", ctypes.create_string_buffer(3), 3)
result = [value, size, errno.errorcode[ctypes.get_errno()], os.listxattr(path)]
"""
    for mount in world.mounts:
        for name in ("hello", "dir", ".meta/.log", "."):
            value, size, refusal, names = client(code, mount / name)
            assert Path(value).parent == mount.host.run_directory
            assert Path(value).is_dir()
            assert (size, refusal, names) == (len(value), "ERANGE", [])


def test_seeking_for_data_and_holes(world: World) -> None:
    size = len(DATA)
    code = f"""
fd = os.open(arguments[0], os.O_RDONLY)
def seek(offset, whence):
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        return errno.errorcode[error.errno]
result = [seek(0, os.SEEK_DATA), seek(0, os.SEEK_HOLE), seek(4097, os.SEEK_DATA), seek({size - 1}, os.SEEK_HOLE),
    seek({size}, os.SEEK_DATA), seek({size}, os.SEEK_HOLE), seek(-5, os.SEEK_END), seek({size} + 9, os.SEEK_SET)]
"""
    for mount in world.mounts:
        expected = [0, size, 4097, size, "ENXIO", "ENXIO", size - 5, size + 9]
        assert client(code, mount / "dir/sub/striped") == expected


def test_locks_are_local_to_the_host(world: World) -> None:
    code = """
first, second = (os.open(arguments[0], os.O_RDWR) for _ in range(2))
fcntl.flock(first, fcntl.LOCK_EX)
try:
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    fcntl.flock(first, fcntl.LOCK_UN)
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    result = "works"
"""
    for mount in (world.master, world.client):
        assert client(code, mount / "scratch.sync") == "works"


def test_set_user_id_has_no_effect(site: Site) -> None:
    device = site.format()
    program = Path("/usr/bin/id").read_bytes()
    populate(device, files=[File("id", program, mode=0o4755)])
    with site.mounted(device) as mount:
        assert as_nobody(mount.path, "./id", "-u") == (0, "1000\n")
    with site.mounted(device, "suid") as mount:
        assert as_nobody(mount.path, "./id", "-u") == (0, "0\n")
    with site.mounted(device, "noexec") as mount:
        assert as_nobody(mount.path, "./id", "-u")[0] == 126


def test_without_access_for_other_users(site: Site) -> None:
    device = site.format()
    populate(device, files=[File("hello", b"hello")])
    with site.mounted(device, "nouseraccess") as mount:
        assert succeed("cat", mount / "hello") == "hello"
        status, text = as_nobody(site.directory, "cat", str(mount.path.relative_to(site.directory) / "hello"))
        assert status == 1
        assert "Permission denied" in text


def test_attributes_are_forgotten_by_the_next_mount(site: Site) -> None:
    device = site.format()
    populate(device, files=[File("hello", b"hello")])
    with site.mounted(device) as mount:
        succeed("chmod", "0600", mount / "hello")
        assert succeed("stat", "-c", "%a", mount / "hello") == "600\n"
    with site.mounted(device) as mount:
        assert succeed("stat", "-c", "%a", mount / "hello") == "644\n"


CREATIONS = (
    "os.mkdir(M + '/new')",
    "os.open(M + '/new', os.O_CREAT | os.O_WRONLY)",
    "os.open(M + '/new', os.O_CREAT | os.O_EXCL | os.O_WRONLY)",
    "os.mknod(M + '/new', 0o100644)",
)


@pytest.mark.parametrize("fast", FAST)
def test_nocreate(site: Site, fast: str) -> None:
    device = site.format()
    populate(device, files=[File("file", b"data")])
    with site.mounted(device, "nocreate", f"fastpath={fast}") as mount:
        for call in CREATIONS:
            assert client(f"M = arguments[0]\n{call}", mount.path) == "EPERM"
        assert client("os.open(arguments[0], os.O_CREAT | os.O_RDWR)\nresult = 'open'", mount / "file") == "open"


def test_a_client_creates_nothing(world: World) -> None:
    for call in CREATIONS:
        assert client(f"M = arguments[0]\n{call}", world.client.path) == "EROFS"


@pytest.mark.parametrize("cache", ["never", "auto", "always"])
@pytest.mark.parametrize("fast", FAST)
def test_cache_options(site: Site, cache: str, fast: str) -> None:
    device = site.format()
    populate(device, files=[File("file", DATA)])
    with site.mounted(device, f"cache={cache}", f"fastpath={fast}") as mount:
        code = "import hashlib; result = hashlib.sha256(open(arguments[0], 'rb').read()).hexdigest()"
        for _ in range(2):
            assert client(code, mount / "file") == hashlib.sha256(DATA).hexdigest()
        assert client("fd = os.open(arguments[0], os.O_RDWR); result = os.pwrite(fd, b'w' * 9, 3)", mount / "file") == 9
        assert device_bytes(device, "file", 0, 13) == DATA[:3] + b"w" * 9 + DATA[12:13]
