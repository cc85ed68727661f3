# SPDX-License-Identifier: Apache-2.0
"""Devices, modes, privileges and policies on a kernel with extent maps; memory that fails; a device that another file
system of the same kernel holds.
"""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest_devices import SetMode, bound_driver
from programs import BIN, SECONDS, fork, here, mounts, run
from tests.fmap.volumes import Volume, is_mapped, mapped_bytes

MADV_HWPOISON = 100


@pytest.fixture
def second(dax_names: list[str], set_mode: SetMode) -> Iterator[str]:
    """The name of another device that is large enough, in devdax mode again afterwards."""
    name = dax_names[-2] if len(dax_names) > 1 else ""
    if not name or int(Path("/sys/bus/dax/devices", name, "size").read_text()) < 4 << 30:
        pytest.skip("needs a second device of 4 GiB: --devices 4G,4G")
    yield name
    set_mode(name, "devdax")


def test_two_devices(volume: Volume, dialect: str, second: str, set_mode: SetMode) -> None:
    """A file across two devices is mapped where the dialect knows more than one, and refused in words elsewhere."""
    other = Path("/dev", second)
    set_mode(second, "devdax")
    here("famfs", "devadd", "-f", other, volume.device, host=volume.host)
    words = ("-s", "8m", "-N", "2", "-B", "2", "-C", "2m", "-r", "-S", "5")
    here("famfs", "creat", "--daxdev", volume.device, *words, "striped", host=volume.host)
    here("famfs", "creat", "--daxdev", volume.device, "-s", "1m", "-r", "-S", "6", "plain", host=volume.host)
    set_mode(second, "fsdev")
    uuid = next(device["uuid"] for device in volume_devices(volume) if device["index"] == 1)
    volume.mount(f"daxdev={uuid}={other}", "require_all_daxdevs")
    here("famfs", "verify", "-S", "6", "-f", volume.point / "plain", host=volume.host)
    striped = volume.point / "striped"
    if dialect == "push-interleave":
        here("famfs", "verify", "-S", "5", "-f", striped, host=volume.host)
        assert is_mapped(striped)
    else:
        with pytest.raises(OSError, match="not supported"):
            striped.open("rb")
        assert any("cannot be mapped" in line["message"] for line in volume.status()["recent"])
    volume.unmount()


def volume_devices(volume: Volume) -> list[dict[str, object]]:
    with volume.raw() as target:
        return [{"index": device.index, "uuid": device.uuid} for device in target.volume().table.entries]


def test_policies(volume: Volume, speak: Callable[[str], None], set_mode: SetMode) -> None:
    """What a mount does about extent maps that it was told to have, or not to have."""
    speak("push")
    line = volume.mount("fmap=never", status=32).error
    assert "only a famfs kernel can use" in line
    set_mode(volume.name, "devdax")
    line = fork(
        "mount.famfs", volume.device, volume.point, "-o", "loglevel=warning,fmap=require", host=volume.host, status=32
    ).error
    assert "fmap=require cannot be met" in line
    fork("mount.famfs", volume.device, volume.point, "-o", "loglevel=warning", host=volume.host)
    assert volume.status()["data_path"] == "server"
    volume.unmount()
    fork("mount.famfs", volume.device, volume.point, "-o", "loglevel=error,kernel=famfs", host=volume.host)
    assert (volume.status()["data_path"], volume.status()["fuse"]) == ("server", "famfs")
    (volume.point / "file").write_bytes(b"served")
    volume.unmount()
    speak("none")
    line = volume.mount("fmap=require", status=32).error
    assert "does not offer FUSE_DAX_FMAP" in line
    assert mounts() == []
    speak("push")
    volume.mount("fmap=require")
    assert mapped_bytes(volume.point / "file") == b"served"
    volume.unmount()


def test_without_rawio(volume: Volume, speak: Callable[[str], None], set_mode: SetMode) -> None:
    """CAP_SYS_RAWIO is asked for before anything is opened."""
    speak("push")
    set_mode(volume.name, "fsdev")
    drop = "import os, sys, ctypes; ctypes.CDLL(None).prctl(24, 17); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", drop, str(BIN / "mount.famfs"), str(volume.device), str(volume.point)]
    environment = dict(os.environ, FAMFS_SYSTEM_UUID_FILE=str(volume.host))
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    assert done.returncode in (1, 32), done
    assert "CAP_SYS_RAWIO" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert mounts() == []


@pytest.mark.timeout(300)
def test_memory_that_fails(volume: Volume, dialect: str, set_mode: SetMode) -> None:
    """The kernel gives the whole device up; that is an error for who reads, the server lives, and a mount mends it."""
    volume.mount()
    for number in range(3):
        (volume.point / f"file-{number}").write_bytes(bytes([number]) * 5000)
    path = volume.point / "file-1"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            fd = os.open(path, os.O_RDWR)
            mapping = mmap.mmap(fd, 4096)
            mapping[0] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            libc = ctypes.CDLL(None, use_errno=True)
            failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), MADV_HWPOISON)
            status = 0 if not failed else 100 if ctypes.get_errno() == errno.EINVAL else 2
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended == 100:
        pytest.skip("this kernel injects no memory failures")
    errors = set()
    for number in range(3):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says it
            (volume.point / f"file-{number}").read_bytes()
        errors.add(caught.value.errno)
    assert errors <= {errno.EIO, errno.EHWPOISON if hasattr(errno, "EHWPOISON") else 133}
    assert volume.status()["files"] == 3
    volume.unmount()
    volume.mount()
    assert (volume.point / "file-2").read_bytes() == bytes([2]) * 5000
    volume.unmount()
    assert bound_driver(volume.name) == "fsdev_dax"


def test_module_is_loaded_once(volume: Volume) -> None:
    module = Path("/run/famfs-vm/modules/famfs.ko")
    done = subprocess.run(["/run/famfs-vm/busybox", "insmod", module], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "exists" in done.stderr
    volume.mount()
    done = subprocess.run(["/run/famfs-vm/busybox", "rmmod", "famfs"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (volume.point / "file").write_bytes(b"goes on")
    volume.unmount()


def test_a_mount_without_a_server(tmp_path: Path) -> None:
    """mount(2) of the type by hand, without a descriptor of a server: EINVAL, and nothing is mounted."""
    done = subprocess.run(
        ["mount", "-i", "-t", "famfs", "none", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 32
    assert not os.path.ismount(tmp_path)


def test_doctor_knows_the_module(volume: Volume, speak: Callable[[str], None]) -> None:
    speak("push-interleave")
    found = here("famfs", "doctor", host=volume.host).out
    assert "by the module famfs (dialect push-interleave)" in found
    run("true", host=volume.host)
