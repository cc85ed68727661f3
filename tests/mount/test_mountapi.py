# SPDX-License-Identifier: Apache-2.0
"""Detached mounts, attach and unmount, with the real /dev/fuse.

The test process serves the mounts. A process that holds /dev/fuse and waits for its own mount can hang for
ever, so nothing here touches a mounted path: clients are other processes, mountinfo is only read, and every
read of /dev/fuse is polled first.
"""

import errno
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.errors import MountError, UsageError
from famfs_server.fuse import abi, mountapi, negotiation
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.dialects import Decision, decide, probe_push_ioctl
from famfs_server.fuse.mountapi import DEFAULT_ATTRIBUTES, DetachedMount, MountAttr

SOURCE = "/dev/dax7.7"

needs_fuse = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")
pytestmark = pytest.mark.timeout(60)

LIBFUSE = (Path(__file__).parents[1] / "data" / "libfuse-3.14-init-reply.bin").read_bytes()


def receive(fd: int, seconds: float = 20) -> bytes:
    """The next request; TimeoutError instead of waiting for ever, OSError when the mount is gone."""
    if not select.select([fd], [], [], seconds)[0]:
        raise TimeoutError("no request arrives")
    return os.read(fd, 1 << 21)


def answer_init(fd: int, data: bytes) -> None:
    request = negotiation.parse_init_request(data)
    reply = negotiation.complete_reply(LIBFUSE, request, Decision("server", "a test"), max_write=1 << 20)
    os.write(fd, reply)


def ended(fd: int) -> bool:
    """Whether the connection is gone: a read says ENODEV."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            receive(fd, 0.1)
        except TimeoutError:
            continue
        except OSError as error:
            return error.errno == errno.ENODEV
    return False


def serve_while_runs(fd: int, client: "subprocess.Popen[str]") -> None:
    """Answer GETATTR of the root and nothing else until `client` ends."""
    deadline = time.monotonic() + 20
    while client.poll() is None:
        if time.monotonic() > deadline:
            client.kill()
            raise TimeoutError("the client does not end")
        try:
            data = receive(fd, 0.05)
        except TimeoutError:
            continue
        _, opcode, unique, nodeid, *_ = abi.IN_HEADER.unpack_from(data)
        if opcode == Opcode.GETATTR and nodeid == abi.ROOT_ID:
            attr = (1, 0, 0, 0, 0, 0, 0, 0, 0, 0o040755, 1, 0, 0, 0, 4096, 0)
            os.write(fd, abi.ATTR_REPLY.pack(abi.ATTR_REPLY.size, 0, unique, 0, 0, *attr))
        elif opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
            os.write(fd, abi.error_reply(unique, errno.ENOSYS))


@pytest.fixture
def fuse() -> Iterator[int]:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """A mount point with a blank and a backslash in its name, cleared whatever the test did."""
    path = tmp_path / "mount \\ point"
    path.mkdir()
    yield str(path)
    for record in mountapi.find_mounts(mount_point=str(path)):
        mountapi.abort_connection(os.minor(record.device))
        mountapi.unmount(path, lazy=True)


@pytest.fixture
def fusectl(tmp_path: Path) -> Iterator[Path]:
    """The directory of connections, wherever else it may or may not be mounted."""
    path = tmp_path / "connections"
    path.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", path], check=True, timeout=10)
    yield path
    subprocess.run(["umount", "-l", path], check=True, timeout=10)


@needs_fuse
def test_init_arrives_while_no_path_leads_to_the_mount(fuse: int, fusectl: Path) -> None:
    with DetachedMount.create(fuse, SOURCE) as mount:
        assert mountapi.find_mounts(source=SOURCE) == []
        connection = fusectl / str(os.minor(mount.device))
        assert connection.is_dir()
        request = negotiation.parse_init_request(receive(fuse))
        assert request.minor >= abi.OLDEST_MINOR
        assert decide(request, policy="never").data_path == "server"
    assert mount.fd == -1
    assert ended(fuse)
    assert not connection.exists()


@needs_fuse
def test_recorded_init_is_what_this_kernel_sends(fuse: int) -> None:
    recorded = (Path(__file__).parents[1] / "data" / "init-6.18.bin").read_bytes()
    if not os.uname().release.startswith("6.18."):
        pytest.skip("recorded on kernel 6.18")
    with DetachedMount.create(fuse, SOURCE):
        assert receive(fuse) == recorded


@needs_fuse
def test_probe_of_the_push_ioctl_leaves_the_connection_alone(fuse: int) -> None:
    if Path("/sys/module/fuse/parameters/famfs").exists():
        pytest.skip("a famfs kernel")
    with DetachedMount.create(fuse, SOURCE):
        assert probe_push_ioctl(fuse) is False
        answer_init(fuse, receive(fuse))
        assert probe_push_ioctl(fuse) is False
    assert ended(fuse)


@needs_fuse
def test_attach_and_unmount(fuse: int, place: str) -> None:
    mount = DetachedMount.create(fuse, SOURCE)
    device = mount.device
    answer_init(fuse, receive(fuse))
    mount.attach(place)
    mount.close()
    mount.close()
    (record,) = mountapi.find_mounts(source=SOURCE, mount_point=place)
    assert (record.fstype, record.source, record.root) == ("fuse.famfs", SOURCE, "/")
    assert record.device == device
    assert {"rw", "nosuid", "nodev", "relatime"} <= set(record.options)
    assert {"user_id=0", "group_id=0", "default_permissions", "allow_other"} <= set(record.super_options)
    client = subprocess.Popen(["stat", "-c", "%F %i", place], stdout=subprocess.PIPE, text=True)
    serve_while_runs(fuse, client)
    assert client.communicate()[0] == "directory 1\n"
    assert client.returncode == 0
    mountapi.unmount(place)
    assert ended(fuse)
    assert mountapi.find_mounts(mount_point=place) == []


@needs_fuse
def test_busy_while_the_mount_descriptor_is_open(fuse: int, place: str) -> None:
    with DetachedMount.create(fuse, SOURCE) as mount:
        answer_init(fuse, receive(fuse))
        mount.attach(place)
        with pytest.raises(MountError, match="a program has a file") as caught:
            mountapi.unmount(place)
        assert caught.value.errno == errno.EBUSY
    mountapi.unmount(place)
    assert ended(fuse)


@needs_fuse
def test_lazy_unmount(fuse: int, place: str) -> None:
    with DetachedMount.create(fuse, SOURCE) as mount:
        answer_init(fuse, receive(fuse))
        mount.attach(place)
        mountapi.unmount(place, lazy=True)
        assert mountapi.find_mounts(mount_point=place) == []
    assert ended(fuse)


@needs_fuse
def test_a_private_copy_keeps_the_file_system_but_no_path_busy(fuse: int, place: str) -> None:
    with DetachedMount.create(fuse, SOURCE) as mount:
        answer_init(fuse, receive(fuse))
        mount.attach(place)
        copy = mount.clone()
    mountapi.unmount(place)
    with pytest.raises(TimeoutError):
        receive(fuse, 0.2)
    os.close(copy)
    assert ended(fuse)


@needs_fuse
@pytest.mark.parametrize(
    ("options", "shown", "hidden"),
    [
        (["ro", "noexec", "noatime"], {"ro", "nosuid", "nodev", "noexec", "noatime"}, {"rw", "relatime"}),
        (["suid", "dev", "nodiratime"], {"rw", "nodiratime"}, {"nosuid", "nodev"}),
        (["noatime", "strictatime"], {"nosuid"}, {"noatime", "relatime"}),
    ],
)
def test_mount_options(fuse: int, place: str, options: list[str], shown: set[str], hidden: set[str]) -> None:
    attributes = mountapi.attributes_from_options(options)
    with DetachedMount.create(fuse, SOURCE, attributes=attributes) as mount:
        answer_init(fuse, receive(fuse))
        mount.attach(place)
    (record,) = mountapi.find_mounts(mount_point=place)
    assert shown <= set(record.options)
    assert not hidden & set(record.options)
    mountapi.unmount(place)


@needs_fuse
def test_read_only(fuse: int, place: str) -> None:
    with DetachedMount.create(fuse, SOURCE, read_only=True, allow_other=False) as mount:
        answer_init(fuse, receive(fuse))
        mount.attach(place)
    (record,) = mountapi.find_mounts(mount_point=place)
    assert {"ro", "nosuid", "nodev"} <= set(record.options)
    assert "allow_other" not in record.super_options
    mountapi.unmount(place)


@needs_fuse
def test_abort(fuse: int, place: str, fusectl: Path) -> None:
    with DetachedMount.create(fuse, SOURCE) as mount:
        minor = os.minor(mount.device)
        answer_init(fuse, receive(fuse))
        mount.attach(place)
    assert mountapi.abort_connection(minor, fusectl)
    assert ended(fuse)
    done = subprocess.run(["stat", place], capture_output=True, text=True, timeout=10, check=False)
    assert "not connected" in done.stderr
    mountapi.unmount(place)
    assert mountapi.abort_connection(minor, fusectl) is False


def test_abort_where_nothing_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "77").mkdir()
    assert mountapi.abort_connection(77, tmp_path) is False
    assert not (tmp_path / "77" / "abort").exists()


@needs_fuse
def test_attach_to_what_is_no_directory(fuse: int, place: str, tmp_path: Path) -> None:
    with DetachedMount.create(fuse, SOURCE) as mount:
        with pytest.raises(MountError, match="no such directory") as caught:
            mount.attach(tmp_path / "absent")
        assert caught.value.errno == errno.ENOENT
        (tmp_path / "file").touch()
        with pytest.raises(MountError, match="not a directory"):
            mount.attach(tmp_path / "file")
        assert mountapi.find_mounts(source=SOURCE) == []
        # Still detached and alive: it can be attached elsewhere.
        answer_init(fuse, receive(fuse))
        mount.attach(place)
    mountapi.unmount(place)


@needs_fuse
def test_the_cause_comes_from_the_kernel() -> None:
    with pytest.raises(MountError, match=f"cannot make a FUSE mount of {SOURCE}: .*'fd'") as caught:
        DetachedMount.create(-1, SOURCE)
    assert caught.value.errno == errno.EINVAL
    assert "\n" not in str(caught.value)


@needs_fuse
def test_without_sys_admin() -> None:
    code = (
        "import os\nfrom famfs_server.fuse.mountapi import DetachedMount\n"
        "DetachedMount.create(os.open('/dev/fuse', os.O_RDWR), 'x')"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert "MountError: cannot make a FUSE mount: CAP_SYS_ADMIN is missing" in done.stderr


@needs_fuse
@pytest.mark.parametrize(("name", "words", "number"), [("", "nothing is mounted", 22), ("absent", "no such", 2)])
def test_unmounting_nothing(tmp_path: Path, name: str, words: str, number: int) -> None:
    with pytest.raises(MountError, match=words) as caught:
        mountapi.unmount(tmp_path / name)
    assert caught.value.errno == number


@needs_fuse
def test_a_symbolic_link_is_not_unmounted(fuse: int, place: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(place)
    with DetachedMount.create(fuse, SOURCE) as mount:
        answer_init(fuse, receive(fuse))
        mount.attach(link)
    assert mountapi.find_mounts(mount_point=place)
    with pytest.raises(MountError):
        mountapi.unmount(link)
    assert mountapi.find_mounts(mount_point=place)
    mountapi.unmount(place)


def test_options() -> None:
    assert mountapi.attributes_from_options([]) == DEFAULT_ATTRIBUTES
    assert mountapi.attributes_from_options(["ro", "rw"]) == DEFAULT_ATTRIBUTES
    assert mountapi.attributes_from_options(["suid", "dev", "noexec"]) == MountAttr.NOEXEC
    with pytest.raises(UsageError, match="'nosense'"):
        mountapi.attributes_from_options(["nosense"])


def test_mountinfo_is_unescaped(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(
        b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/ro\\134ot rw,errors=continue\n"
        b"37 35 0:260 / /a\\011b\\012c\\043 ro - fuse.famfs /dev/dax0.0 rw,user_id=0\n"
        b"38 35 0:5 / /caf\xe9 rw - tmpfs  rw\n"
    )
    first, second, third = mountapi.parse_mountinfo(path)
    assert first == mountapi.MountRecord(
        mount_id=36,
        parent_id=35,
        device=os.makedev(98, 0),
        root="/mnt1",
        mount_point="/mnt 2",
        options=("rw", "noatime"),
        fstype="ext3",
        source="/dev/ro\\ot",
        super_options=("rw", "errors=continue"),
    )
    assert second.mount_point == "/a\tb\nc#"
    assert (os.major(second.device), os.minor(second.device)) == (0, 260)
    assert os.fsencode(third.mount_point) == b"/caf\xe9"
    assert third.source == ""
    assert mountapi.find_mounts(path=path) == [second]
    assert mountapi.find_mounts(source="/dev/dax0.1", path=path) == []
    assert mountapi.find_mounts(mount_point="/caf\udce9", fstypes=("tmpfs",), path=path) == [third]
