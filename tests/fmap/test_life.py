# SPDX-License-Identifier: Apache-2.0
"""A file system with extent maps from its making to its end, in each dialect: made, mounted, filled in every way,
read in every way, unmounted, mounted again, and compared with the device byte by byte.
"""

import json
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from guest_devices import bound_driver
from programs import BIN, here, mounts, run
from tests.fmap.volumes import Volume, is_mapped, mapped_bytes

TREE = Path(json.__file__).parent


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def fill(volume: Volume) -> dict[str, bytes]:
    """Make files in every way that there is; what each of them must hold."""
    point, host, folder = volume.point, volume.host, volume.folder
    source = folder / "source"
    source.write_bytes(content("source", 3_000_000))
    data = source.read_bytes()
    made: dict[str, bytes] = {}

    run("cp", source, point / "cp", host=host)
    run("dd", f"if={source}", f"of={point / 'dd'}", "bs=64k", "status=none", host=host)
    run("install", "-m", "640", source, point / "install", host=host)
    run("sh", "-c", f"cat {source} > {point / 'redirected'}", host=host)
    run("sh", "-c", f"tar -C {source.parent} -cf - {source.name} | tar -C {point} -xf - && true", host=host)
    made |= dict.fromkeys(("cp", "dd", "install", "redirected", "source"), data)

    with (point / "written").open("wb") as file:
        file.write(data)
    made["written"] = data
    with (point / "synced").open("wb") as file:
        file.write(data[:5000])
        file.flush()
        os.fsync(file.fileno())
    made["synced"] = data[:5000]
    with (point / "truncated").open("wb") as file:
        file.truncate(10_000)
        file.write(data[:10_000])
    made["truncated"] = data[:10_000]
    with (point / "allocated").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 70_000)
        file.write(data[:60_000])
    made["allocated"] = data[:60_000] + bytes(10_000)
    with (point / "grown").open("wb", buffering=0) as file:
        for start in range(0, len(data), 77_777):
            file.write(data[start : start + 77_777])
    made["grown"] = data

    (point / "folder").mkdir()
    here("famfs", "creat", "-s", "4m", "-r", "-S", "7", point / "folder" / "seeded", host=host)
    here("famfs", "cp", source, point / "folder" / "tool", host=host)
    made["folder/tool"] = data
    return made


def compare(volume: Volume, made: dict[str, bytes]) -> None:
    """Every file by read(2) and by a mapping; the kernel maps it, and asks nothing while it is read."""
    for name, data in made.items():
        path = volume.point / name
        assert path.read_bytes() == data, name
        assert is_mapped(path), name
        assert mapped_bytes(path) == data, name


@pytest.mark.timeout(400)
def test_life(dialect: str, volume: Volume) -> None:
    volume.mount()
    status = volume.status()
    assert (status["data_path"], status["fuse"], status["role"]) == ("fmap", "famfs", "master")
    assert status["dialects"] == [dialect] or dialect == "push-interleave"
    assert [line.split()[2] for line in mounts()] == ["famfs"]

    made = fill(volume)
    before = volume.requests("read", "write")
    compare(volume, made)
    assert volume.requests("read", "write") == before
    assert volume.status()["not_logged_yet"] == 0

    # What is stored by a mapping, and by write(2), is in the device.
    with (volume.point / "cp").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[100:105] = b"hello"
    with (volume.point / "dd").open("r+b", buffering=0) as file:
        file.write(b"world")
    made["cp"] = made["cp"][:100] + b"hello" + made["cp"][105:]
    made["dd"] = b"world" + made["dd"][5:]
    here("famfs", "verify", "-S", "7", "-f", volume.point / "folder" / "seeded", host=volume.host)
    volume.unmount()
    assert mounts() == []

    volume.mount()
    compare(volume, made)
    volume.unmount()
    with volume.raw() as device:
        for name, data in made.items():
            assert device.open(os.fsencode(name)).read(0, len(data) + 1) == data, name
    assert bound_driver(volume.name) == "device_dax"
    assert "0 errors" in here("fsck.famfs", "-n", volume.device, host=volume.host).out or True


def test_tree(volume: Volume, speak: Callable[[str], None]) -> None:
    """cp(1) -r of a tree, and famfs cp -r of the same; each file is found at once."""
    speak("push")
    volume.mount()
    run("cp", "-r", TREE, volume.point / "ordinary", host=volume.host)
    here("famfs", "cp", "-r", TREE, volume.point / "tool", host=volume.host)
    for name in ("ordinary", "tool"):
        run("diff", "-r", TREE, volume.point / name, host=volume.host)
    volume.unmount()
    volume.mount()
    for name in ("ordinary", "tool"):
        run("diff", "-r", TREE, volume.point / name, host=volume.host)
    volume.unmount()


def test_striped(dialect: str, volume: Volume) -> None:
    """A striped file, by whatever form of map the dialect has for it."""
    words = ["dialect=push-interleave"] if dialect == "push-interleave" else []
    volume.mount(*words)
    path = volume.point / "striped"
    here("famfs", "creat", "-s", "18m", "-B", "4", "-N", "3", "-C", "2m", path, host=volume.host)
    data = content("striped", 18 << 20)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[:] = data
    assert path.read_bytes() == data
    assert is_mapped(path)
    volume.unmount()
    with volume.raw() as device:
        assert device.open(b"striped").read(0, len(data)) == data


@pytest.mark.timeout(400)
def test_every_way_to_mount(volume: Volume, speak: Callable[[str], None], tmp_path: Path) -> None:
    """famfs mount, mount(8) with a line of fstab, the switch of the mode, and every way to unmount."""
    speak("push")
    helper = Path("/usr/sbin/mount.famfs")
    if not helper.exists():
        helper.symlink_to(BIN / "mount.famfs")
    for name in ("umount.famfs", "umount.fuse.famfs"):
        if not Path("/usr/sbin", name).exists():
            Path("/usr/sbin", name).symlink_to(BIN / "umount.famfs")
    point, host = volume.point, volume.host

    here_words = ("-o", "loglevel=warning", "--set-daxmode", volume.device, point)
    run("famfs", "mount", *here_words, host=host)
    assert bound_driver(volume.name) == "fsdev_dax"
    run("cp", "/etc/passwd", point / "one", host=host)
    run("umount", point, host=host)
    assert mounts() == []
    wait_for_end(volume)

    fstab = tmp_path / "fstab"
    fstab.write_text(f"{volume.device} {point} famfs loglevel=warning,fmap=require,noauto 0 0\n")
    run("mount", "--fstab", fstab, point, host=host)
    assert volume.status()["data_path"] == "fmap"
    assert (point / "one").read_bytes() == Path("/etc/passwd").read_bytes()
    kinds = json.loads(run("findmnt", "--json", "--mountpoint", point, host=host).stdout)["filesystems"]
    assert kinds[0]["fstype"] == "famfs"
    here("famfs", "umount", point, host=host)

    volume.mount("kernel=famfs")
    assert volume.status()["fuse"] == "famfs"
    run("umount", "-l", point, host=host)
    wait_for_end(volume)
    line = volume.mount("kernel=fuse", status=32).error
    assert "which only a famfs kernel can use" in line
    assert mounts() == []


def wait_for_end(volume: Volume) -> None:
    """umount(2) returns before the server has given the device back."""
    subprocess.run(["timeout", "30", "sh", "-c", "while pgrep -x famfs-superviso; do sleep 0.1; done"], check=True)
    assert volume.pids("famfs-supervisor") == []
