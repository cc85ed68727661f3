# SPDX-License-Identifier: Apache-2.0
"""File systems on three devices and kernels that map them: pulled by number, or pushed before the first open."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

import golden
from famfs_server.dax.device import DaxDevice
from famfs_server.omf.log import Extent, FileRecord, Fmap
from famfs_server.volume.devices import Attached
from famfs_server.volume.format import make_filesystem, prepare_device
from famfs_server.volume.namespace import ROOT
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from tests.twin.kernel import Device
from tests.twin.maps import Dialect
from tests.twin.server import Refused, Twin, mounted
from tests.twin.test_negative import refused

MASTER = UUID(golden.SYSTEM_UUID)
UUIDS = (UUID(int=101), UUID(int=102))
MIB = 1 << 20
WHERE = 64 * MIB
STRIPED = b"".join(bytes([number]) * (2 * MIB) for number in range(6))


class Three:
    """A file system whose second and third device are the files in `further`."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "primary"
        self.further = [(uuid, str(folder / f"further{uuid.int}")) for uuid in UUIDS]
        for path in (self.image, *(path for _, path in self.further)):
            with open(path, "wb") as image:
                image.truncate(4 << 30)
        devices = [DaxDevice.open(str(path)) for path in (self.image, *(path for _, path in self.further))]
        memories = [device.memory() for device in devices]
        made = make_filesystem(memories[0], "x", MASTER, log_length=8 << 20)
        found = {}
        for (uuid, path), memory in zip(self.further, memories[1:], strict=True):
            prepare_device(memory, path, uuid=made.uuid, host=MASTER, device_uuid=uuid)
            found[uuid] = Attached(path, memory.size, memory)
        volume = Volume(memories[0], MASTER, "x")
        volume.attach_devices(lambda uuid, hint=None: found[uuid])
        for uuid, path in self.further:
            volume.add_device(uuid, path)
        for number in range(3):
            name, fmap = b"on%d" % number, Fmap((Extent(number, WHERE, 2 * MIB),))
            volume.write(
                volume.log_promised(FileRecord(name, 5, 0o644, 0, 0, fmap), (ROOT, name)),
                0,
                memoryview(b"file%d" % number),
            )
        striped = volume.create(NewFile(b"striped", len(STRIPED), 0o644, 0, 0, Interleave(4, 3)))
        volume.write(striped, 0, memoryview(STRIPED))
        self.metadata_end = volume.log_end
        volume.close()
        for memory, device in zip(memories, devices, strict=True):
            memory.close()
            device.close()

    def devices(self) -> list[Device]:
        """As the kernel sees them."""
        return [Device(os.path.realpath(path)) for path in (str(self.image), *(path for _, path in self.further))]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Three]:
    return Three(tmp_path)


def test_pushed_devices_are_mapped(three: Three) -> None:
    """In front of the first open, each in the slot of its number."""
    devices = three.devices()
    with mounted(
        three.image,
        Dialect.PUSH_INTERLEAVE,
        words=["dialect=push-interleave", "require_all_daxdevs"],
        host=MASTER,
        devices=devices,
        further=three.further,
        metadata_end=three.metadata_end,
    ) as kernel:
        assert kernel.slots == dict(enumerate(devices))
        for number in range(3):
            assert kernel.read(kernel.open(kernel.resolve(b"on%d" % number)), 0, 9) == b"file%d" % number
        opened = kernel.open(kernel.resolve(b"striped"))
        for chunk in range(6):
            place = chunk * 2 * MIB
            assert kernel.read(opened, place, 7) == STRIPED[place : place + 7]


def test_worker_that_takes_over_knows_what_was_pushed(three: Three) -> None:
    twin = Twin(
        three.image,
        Dialect.PUSH_INTERLEAVE,
        words=["dialect=push-interleave"],
        host=MASTER,
        devices=three.devices(),
        further=three.further,
        metadata_end=three.metadata_end,
    )
    kernel = twin.mount()
    twin.succeed()
    assert kernel.read(kernel.open(kernel.resolve(b"on2")), 0, 9) == b"file2"
    assert twin.end() == 0


def test_device_that_the_kernel_refuses(three: Three) -> None:
    """Its files cannot be opened, which is said; the others go on. Where all are required the mount fails."""
    common = {"host": MASTER, "further": three.further, "metadata_end": three.metadata_end}
    for required in (False, True):
        devices = three.devices()
        devices[1].held = True
        words = ["dialect=push-interleave", *(["require_all_daxdevs"] if required else [])]
        twin = Twin(three.image, Dialect.PUSH_INTERLEAVE, words=words, devices=devices, **common)
        if required:
            with pytest.raises(Refused, match=r"require_all_daxdevs: device 1 .*another mount holds the device"):
                twin.mount()
        else:
            kernel = twin.mount()
            assert kernel.slots == {0: devices[0], 1: None, 2: devices[2]}
            for name in (b"on1", b"striped"):
                with refused(errno.EOPNOTSUPP):
                    kernel.open(kernel.resolve(name))
            assert kernel.read(kernel.open(kernel.resolve(b"on2")), 0, 9) == b"file2"
            assert "another mount holds the device" in twin.log()
        twin.end()


def test_missing_device_is_not_pushed(three: Three) -> None:
    devices = three.devices()
    with mounted(
        three.image,
        Dialect.PUSH_INTERLEAVE,
        words=["dialect=push-interleave"],
        host=MASTER,
        devices=devices,
        further=three.further[1:],
        metadata_end=three.metadata_end,
    ) as kernel:
        assert kernel.slots == {0: devices[0], 2: devices[2]}
        with refused(errno.EOPNOTSUPP):
            kernel.open(kernel.resolve(b"on1"))
        assert kernel.read(kernel.open(kernel.resolve(b"on2")), 0, 9) == b"file2"


def test_pulled_devices(three: Three) -> None:
    """GET_DAXDEV for each number; but the maps of such kernels can name the first device alone (decisions 13)."""
    devices = three.devices()
    with mounted(
        three.image,
        Dialect.PULL,
        host=MASTER,
        devices=devices,
        further=three.further,
        metadata_end=three.metadata_end,
    ) as kernel:
        for number in range(3):
            kernel._pull(number)
        assert kernel.slots == dict(enumerate(devices))
        kernel._pull(3)
        assert 3 not in kernel.slots
        assert kernel.read(kernel.open(kernel.resolve(b"on0")), 0, 9) == b"file0"
        for name in (b"on1", b"on2", b"striped"):
            with refused(errno.EOPNOTSUPP):
                kernel.open(kernel.resolve(name))


def test_device_that_is_not_in_famfs_mode_is_not_named(three: Three) -> None:
    """A kernel that asked for it would lose the slot for the whole connection."""
    devices = three.devices()
    words = [f"daxdev={uuid}={path}" for uuid, path in three.further]
    with mounted(
        three.image, Dialect.PULL, words=words, host=MASTER, devices=devices, metadata_end=three.metadata_end
    ) as kernel:
        for number in (1, 2):
            kernel._pull(number)
        assert kernel.slots == {}
        assert kernel.read(kernel.open(kernel.resolve(b"on0")), 0, 9) == b"file0"
