# SPDX-License-Identifier: Apache-2.0
"""A file system on three devices, mounted: what is served, what a missing device costs, and who holds the devices."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax.device import DaxDevice, Lock
from famfs_server.omf.log import Extent, FileRecord, Fmap
from famfs_server.volume.devices import Attached
from famfs_server.volume.format import prepare_device
from famfs_server.volume.namespace import ROOT
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile
from harness import BIN, CLIENT_UUID, MASTER_UUID, MIB, Mount, Site, client, format_device, opened

UUIDS = (UUID(int=101), UUID(int=102))
STRIPED = bytes(range(256)) * (9 << 13)
"""Nine chunks of 2 MiB on three strips."""
CHUNK = 2 * MIB

READ = "result = open(arguments[0], 'rb').read().hex()"
SAME = """
data = open(arguments[0], 'rb').read()
result = data == bytes(range(256)) * (9 << 13)
"""
EACH_CHUNK = """
import errno
result = []
fd = os.open(arguments[0], os.O_RDONLY)
for chunk in range(3):
    try:
        result.append(len(os.pread(fd, 4096, chunk << 21)))
    except OSError as error:
        result.append(errno.errorcode[error.errno])
"""
WRITE = """
fd = os.open(arguments[0], os.O_WRONLY)
result = os.pwrite(fd, arguments[1].encode(), int(arguments[2]))
os.fsync(fd)
"""


class Three:
    """Three devices, and how they are named to a mount."""

    def __init__(self, folder: Path) -> None:
        self.primary = format_device(folder / "primary")
        self.further = tuple(folder / f"further{number}" for number in (1, 2))
        for path in self.further:
            with path.open("wb") as image:
                image.truncate(4 << 30)
        self.options = tuple(f"daxdev={uuid}={path}" for uuid, path in zip(UUIDS, self.further, strict=True))
        self.strips: tuple[int, ...] = ()

    def fill(self) -> None:
        """Put a striped file on all of them, and a file on the first and on the second."""
        with opened(self.primary) as volume:
            devices = [DaxDevice.open(str(path)) for path in self.further]
            memories = [device.memory() for device in devices]
            found = {
                uuid: Attached(device.path, memory.size, memory)
                for uuid, device, memory in zip(UUIDS, devices, memories, strict=True)
            }
            volume.attach_devices(lambda uuid, hint=None: found[uuid])
            for uuid, memory in zip(UUIDS, memories, strict=True):
                prepare_device(memory, "x", uuid=volume.superblock.uuid, host=UUID(MASTER_UUID), device_uuid=uuid)
                volume.add_device(uuid, found[uuid].path)
            striped = volume.create(NewFile(b"striped", len(STRIPED), 0o644, 0, 0, Interleave(4, 3)))
            volume.write(striped, 0, memoryview(STRIPED))
            self.strips = tuple(strip.device for strip in volume.namespace.fmap(striped).extents)
            for number in range(3):
                fmap, name = Fmap((Extent(number, 64 * MIB, CHUNK),)), b"on%d" % number
                nodeid = volume.log_promised(FileRecord(name, 5, 0o644, 0, 0, fmap), (ROOT, name))
                volume.write(nodeid, 0, memoryview(b"file%d" % number))
            for memory, device in zip(memories, devices, strict=True):
                memory.close()
                device.close()


@pytest.fixture(scope="module")
def three(shared_memory_folder: Path) -> Three:
    three = Three(shared_memory_folder)
    three.fill()
    return three


@pytest.fixture(scope="module")
def mount(shared_site: Site, three: Three) -> Iterator[Mount]:
    with shared_site.mounted(three.primary, *three.options, "require_all_daxdevs") as mount:
        yield mount


REWRITE = """
fd = os.open(arguments[0], os.O_WRONLY)
result = os.pwrite(fd, bytes(range(256)) * (9 << 13), 0)
"""


def devices_of(mount: Mount) -> list[dict[str, object]]:
    found = json.loads(mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout)["devices"]
    assert [row["index"] for row in found] == list(range(len(found)))
    return list(found)


def test_every_device_is_served(mount: Mount, three: Three) -> None:
    assert client(SAME, mount / "striped") is True
    for number in range(3):
        assert client(READ, mount / f"on{number}") == (b"file%d" % number).hex()
        assert client(WRITE, mount / f"on{number}", "FILE", "0") == 4
        path = (three.primary, *three.further)[number]
        with path.open("rb") as image:
            image.seek(64 * MIB)
            assert image.read(5) == b"FILE%d" % number
        assert client(WRITE, mount / f"on{number}", "file", "0") == 4
    rows = devices_of(mount)
    assert [(row["state"], row["path"], row["size"]) for row in rows] == [
        ("attached", str(path), 4 << 30) for path in (three.primary, *three.further)
    ]
    assert [row["uuid"] for row in rows[1:]] == [str(uuid) for uuid in UUIDS]


def test_devices_are_locked_while_they_are_in_use(mount: Mount, three: Three) -> None:
    for path in three.further:
        with DaxDevice.open(str(path)) as device:
            assert not device.lock(Lock.MOUNTED, exclusive=True)
        refused = mount.host.run(BIN / "mkfs.famfs", "-f", path)
        assert refused.returncode == 2
        assert "in use by another famfs command" in refused.stderr


def test_takeover(mount: Mount) -> None:
    """The devices outlive the worker, without being looked for again."""
    old = mount.process("worker")
    os.kill(old, signal.SIGKILL)
    assert client(SAME, mount / "striped") is True
    assert mount.process("worker") != old
    assert [row["state"] for row in devices_of(mount)] == ["attached"] * 3


def test_upgrade_keeps_them_open(mount: Mount, three: Three) -> None:
    away = three.further[0].with_suffix(".away")
    three.further[0].rename(away)
    try:
        done = mount.host.run(BIN / "famfs", "upgrade", mount.path)
        assert done.returncode == 0, done.stderr
        assert client(SAME, mount / "striped") is True
    finally:
        away.rename(three.further[0])


def test_new_files_are_striped_over_all_devices(mount: Mount) -> None:
    done = mount.host.run(BIN / "famfs", "creat", "-r", "-S", "7", "-s", "12m", "-N", "3", "-B", "4", mount / "new")
    assert done.returncode == 0, done.stderr
    assert mount.host.run(BIN / "famfs", "verify", "-S", "7", "-f", mount / "new").returncode == 0
    shown = mount.host.run(BIN / "famfs", "getmap", "--json", mount / "new").stdout
    assert all(f'"device": {number}' in shown or f'"devindex": {number}' in shown for number in range(3)), shown


def test_truncated_device_hurts_its_own_files_alone(mount: Mount, three: Three) -> None:
    path = three.further[0]
    os.truncate(path, 2 * MIB)  # the superblock stays
    try:
        assert client(READ, mount / "on1") == "EIO"
        assert client(WRITE, mount / "on1", "x", "0") == "EIO"
        for number in (0, 2):
            assert client(READ, mount / f"on{number}") == (b"file%d" % number).hex()
            assert client(WRITE, mount / f"on{number}", "file", "0") == 4
    finally:
        os.truncate(path, 4 << 30)
    # What is there again works again; its bytes are gone.
    assert client(READ, mount / "on1") == bytes(5).hex()
    assert client(WRITE, mount / "on1", "file1", "0") == 5
    assert client(REWRITE, mount / "striped") == len(STRIPED)


@pytest.mark.parametrize("away", [0, 1])
def test_missing_device(away: int, site: Site, three: Three, mount: Mount) -> None:
    """Another host, where one device is missing."""
    named = three.options[1 - away]
    with site.mounted(three.primary, named, host=CLIENT_UUID) as other:
        assert f"device {away + 1} ({UUIDS[away]}) is missing" in other.warnings
        expected = ["EIO" if device == away + 1 else 4096 for device in three.strips]
        assert client(EACH_CHUNK, other / "striped") == expected
        for number in range(3):
            wanted = "EIO" if number == away + 1 else (b"file%d" % number).hex()
            assert client(READ, other / f"on{number}") == wanted
        rows = devices_of(other)
        assert [row["state"] for row in rows].count("missing") == 1
        assert rows[away + 1]["state"] == "missing"
        text = other.host.run(BIN / "famfs", "status", other.path).stdout
        assert "files on it are EIO" in text


@pytest.mark.parametrize("away", [0, 1])
def test_all_devices_are_required(away: int, site: Site, three: Three, mount: Mount) -> None:
    place = site.place("refused")
    done = site.host(CLIENT_UUID).mount(
        three.primary, place, three.options[1 - away], "require_all_daxdevs", "fmap=never"
    )
    assert done.returncode == 32
    assert done.stderr.splitlines() == [
        f"mount.famfs: require_all_daxdevs: device {away + 1} ({UUIDS[away]}) is missing: "
        "no device of this host has its superblock; name it with the mount option daxdev=UUID=PATH"
    ]
    assert not site.mounts()


def test_further_device_is_no_file_system_of_its_own(site: Site, three: Three, mount: Mount) -> None:
    done = site.host(CLIENT_UUID).mount(three.further[0], site.place("none"))
    assert done.returncode == 32
    assert "name the device that holds its log" in done.stderr


def test_places_are_remembered(site: Site, three: Three, mount: Mount) -> None:
    """Once a mount has been told where devices are, the next one on this host need not be."""
    for options in (three.options, ()):
        with site.mounted(three.primary, *options, host=CLIENT_UUID) as other:
            assert client(SAME, other / "striped") is True


def test_adding_a_device_to_a_mount(site: Site, memory_folder: Path) -> None:
    """Used at once by the master; found by another host once it is told where; never by its neighbours."""
    primary = format_device(memory_folder / "primary")
    added = memory_folder / "added"
    with added.open("wb") as image:
        image.truncate(4 << 30)
    with site.mounted(primary) as master, site.mounted(primary, host=CLIENT_UUID) as other:
        famfs = [BIN / "famfs"]
        refused = other.host.run(*famfs, "devadd", added, other.path)
        assert (refused.returncode, "only the master can add devices" in refused.stderr) == (1, True), refused.stderr
        done = master.host.run(*famfs, "devadd", added, master.path)
        assert done.returncode == 0, done.stderr
        uuid = devices_of(master)[1]["uuid"]
        assert f"device UUID: {uuid}" in done.stdout
        assert devices_of(master)[1]["state"] == "attached"
        again = master.host.run(*famfs, "devadd", "-f", added, master.path)
        assert again.returncode != 0
        assert "is part of the file system" in again.stderr
        made = master.host.run(*famfs, "creat", "-r", "-S", "5", "-s", "8m", "-N", "2", "-B", "4", master / "new")
        assert made.returncode == 0, made.stderr
        # The other host has no way to know where the device is; a striped file is half there.
        assert client(EACH_CHUNK, other / "new").count("EIO") in (1, 2)
        assert devices_of(other)[1]["state"] == "missing"
    with site.mounted(primary, f"daxdev={uuid}={added}", host=CLIENT_UUID) as other:
        assert other.host.run(BIN / "famfs", "verify", "-S", "5", "-f", other / "new").returncode == 0


def test_striping_of_files_for_which_none_is_asked_for(site: Site, memory_folder: Path) -> None:
    device, config = format_device(memory_folder / "device"), site.directory / "alloc.cfg"
    config.write_text("interleaved_alloc: {nbuckets: 4, nstrips: 9}")
    refused = site.host().mount(device, site.place("refused"), f"alloc_cfg={config}", "fmap=never")
    assert refused.returncode != 0
    assert refused.stderr == f"mount.famfs: {config}: 9 strips need as many buckets, not 4\n"
    config.write_text("interleaved_alloc: {nbuckets: 4, nstrips: 3, chunk_size: 2M}")
    with site.mounted(device, f"alloc_cfg={config}") as mount:
        for number in range(2):
            made = mount.host.run(BIN / "famfs", "creat", "-s", "8m", mount / f"f{number}")
            assert made.returncode == 0, made.stderr
            shown = mount.host.run(BIN / "famfs", "getmap", "--json", mount / f"f{number}").stdout
            assert json.loads(shown)[0]["chunk_size"] == CHUNK
            assert shown.count('"offset"') == 3
            if not number:
                os.kill(mount.process("worker"), signal.SIGKILL)
                assert client("result = os.path.exists(arguments[0])", mount / "f0") is True
        config.write_text("striped: please")
        failed = mount.host.run(BIN / "famfs", "creat", "-s", "8m", mount / "f2")
        assert failed.returncode != 0
        assert "must hold one mapping" in failed.stderr
