# SPDX-License-Identifier: Apache-2.0
"""Volumes on several devices: where bytes lie, what is lost with a device, and where new files go."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from famfs_server.dax.device import DaxDevice
from famfs_server.errors import DeviceError, DeviceFaultError, ExistsError
from famfs_server.omf import append, layout, log
from famfs_server.omf.log import Extent, FileRecord, Fmap
from famfs_server.volume import namespace as ns
from famfs_server.volume.devices import MOST_ATTACHED, Attached, DeviceState
from famfs_server.volume.faults import Fault
from famfs_server.volume.provisional import Provisional
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, ScratchMemory, formatted

MIB = 1 << 20
GIB = 1 << 30
UNIT = layout.ALLOC_UNIT
UUIDS = (UUID(int=101), UUID(int=102))


class Box:
    """Three devices, some of which may be away."""

    def __init__(self) -> None:
        self.primary = ScratchMemory(8 * GIB)
        formatted(self.primary)
        self.further = {uuid: ScratchMemory(8 * GIB) for uuid in UUIDS}
        self.away: set[UUID] = set()
        self.asked: list[UUID] = []

    def attach(self, uuid: UUID, hint: str | None = None) -> Attached:
        """What a daemon does."""
        self.asked.append(uuid)
        if uuid in self.away or uuid not in self.further:
            raise DeviceError("it is away")
        memory = self.further[uuid]
        return Attached(f"/dev/{uuid.int}", memory.size, memory)

    @property
    def memories(self) -> list[ScratchMemory]:
        """All of them by number."""
        return [self.primary, *self.further.values()]

    def open(self, host: UUID = HOST, state: int | None = None) -> Volume:
        """The volume as a daemon opens it."""
        volume = Volume(self.primary, host, "primary", state=state)
        volume.attach_devices(self.attach)
        return volume


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box()
    yield box
    for memory in box.memories:
        memory.close()


@pytest.fixture
def full(box: Box) -> Box:
    """A box whose devices are all in the log, with a file on each and one striped over all of them."""
    volume = box.open()
    for uuid in UUIDS:
        volume.add_device(uuid, "/dev/dax")
    for number in range(3):
        fmap = Fmap((Extent(number, 64 * MIB, 2 * UNIT),))
        nodeid = place(volume, b"on%d" % number, 2 * UNIT - 5, fmap)
        volume.write(nodeid, 0, memoryview(data_of(number)))
    nodeid = volume.create(NewFile(b"striped", 9 * UNIT, 0o644, 0, 0, Interleave(8, 3)))
    volume.write(nodeid, 0, memoryview(data_of(3, 9 * UNIT)))
    volume.close()
    return box


def place(volume: Volume, name: bytes, size: int, fmap: Fmap) -> int:
    """Log a file in a place that no allocator has chosen."""
    return volume.log_promised(FileRecord(name, size, 0o644, 0, 0, fmap), (ns.ROOT, name))


def data_of(number: int, size: int = 2 * UNIT - 5) -> bytes:
    return (bytes([number + 1]) * 1000 + bytes(range(24)))[:1021] * (size // 1021) + bytes(size % 1021)


def read(volume: Volume, name: bytes) -> bytes:
    nodeid = volume.namespace.resolve(name)
    return volume.read(nodeid, 0, volume.namespace.size[nodeid])


def test_bytes_lie_where_the_map_says(full: Box) -> None:
    volume = full.open(UUID(int=5))
    for number, memory in enumerate(full.memories):
        assert bytes(memory.view[64 * MIB :][: 2 * UNIT - 5]) == data_of(number)
        assert read(volume, b"on%d" % number) == data_of(number)
    strips = volume.namespace.fmap(volume.namespace.resolve(b"striped")).extents
    assert sorted(strip.device for strip in strips) == [0, 1, 2]
    for chunk in range(9):
        strip = strips[chunk % 3]
        stored = full.memories[strip.device].view[strip.offset + chunk // 3 * UNIT :][:UNIT]
        assert bytes(stored) == data_of(3, 9 * UNIT)[chunk * UNIT :][:UNIT]
    assert read(volume, b"striped") == data_of(3, 9 * UNIT)
    assert (
        b"".join(volume.views(volume.namespace.resolve(b"striped"), UNIT - 3, 6))
        == data_of(3, 9 * UNIT)[UNIT - 3 : UNIT + 3]
    )
    volume.close()


@pytest.mark.parametrize("away", [0, 1])
def test_only_the_files_of_a_missing_device_are_lost(away: int, full: Box) -> None:
    full.away = {UUIDS[away]}
    volume = full.open()
    lost = volume.table.entries[away + 1]
    assert [entry.state for entry in volume.table.entries].count(DeviceState.ATTACHED) == 2
    assert (lost.state, lost.problem, lost.found) == (DeviceState.MISSING, "it is away", None)
    assert volume.table.incomplete == [lost]
    calls: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
        (volume.read, (0, 1)),
        (volume.views, (0, 1)),
        (volume.write, (0, memoryview(b"x"))),
        (volume.write_back, ()),
    )
    for number in range(3):
        nodeid = volume.namespace.resolve(b"on%d" % number)
        if number == away + 1:
            for act, more in calls:
                with pytest.raises(DeviceFaultError, match=f"device {number} of primary is not attached"):
                    act(nodeid, *more)
        else:
            assert read(volume, b"on%d" % number) == data_of(number)
    striped = volume.namespace.resolve(b"striped")
    strips = volume.namespace.fmap(striped).extents
    for chunk in range(3):
        if strips[chunk].device == away + 1:
            with pytest.raises(DeviceFaultError):
                volume.read(striped, chunk * UNIT, UNIT)
        else:
            assert volume.read(striped, chunk * UNIT, UNIT) == data_of(3, 9 * UNIT)[chunk * UNIT :][:UNIT]
    # New files keep away from it, and statistics count what is free where they may go.
    assert volume.space.available == {0, 2 - away}
    made = volume.create(NewFile(b"new", 9 * UNIT, 0o644, 0, 0, Interleave(8, 4)))
    assert {strip.device for strip in volume.namespace.fmap(made).extents} == {0, 2 - away}
    volume.close()


def test_device_that_is_shorter_than_the_log_says(full: Box) -> None:
    whole = full.further[UUIDS[0]]
    short = ScratchMemory(66 * MIB)
    full.further[UUIDS[0]] = short
    volume = full.open()
    assert volume.table.entries[1].state is DeviceState.SHORT
    assert volume.space.available == {0, 2}
    nodeid = volume.namespace.resolve(b"on1")
    assert volume.read(nodeid, 0, 2 * MIB) == bytes(2 * MIB)
    with pytest.raises(DeviceFaultError, match="ends before"):
        volume.read(nodeid, 2 * MIB, 1)
    volume.close()
    full.further[UUIDS[0]] = whole
    short.close()


def test_device_that_appears_in_the_log_is_attached(full: Box) -> None:
    """A client sees it at the next look, and asks for it once, whether it is there or not."""
    box = Box()
    box.further = full.further
    master, client = box.open(), box.open(UUID(int=5))
    master.add_device(UUIDS[0], "/dev/dax")
    box.asked.clear()
    assert client.refresh() == 1
    assert box.asked == [UUIDS[0]]
    assert client.table.entries[1].state is DeviceState.ATTACHED
    master.add_device(UUIDS[1], "/dev/dax")
    box.away = {UUIDS[1]}
    nodeid = master.create(NewFile(b"f", UNIT, 0o644, 0, 0))
    client.refresh()
    assert client.table.entries[2].problem == "it is away"
    client.refresh()
    assert box.asked == [UUIDS[0], UUIDS[1], UUIDS[1]]
    assert client.read(nodeid, 0, 3) == bytes(3)
    master.close()
    client.close()
    box.primary.close()


def test_takeover_keeps_the_table(full: Box) -> None:
    state = os.memfd_create("state")
    first = full.open(state=state)
    full.asked.clear()
    again = full.open(state=state)
    assert full.asked == list(UUIDS)
    assert [entry.uuid for entry in again.table.entries[1:]] == list(UUIDS)
    assert read(again, b"striped") == read(first, b"striped")
    assert again.space.available == {0, 1, 2}
    again.close()


def test_adding_devices(box: Box) -> None:
    volume = box.open()
    box.away = {UUIDS[0]}
    with pytest.raises(DeviceError, match="away"):
        volume.add_device(UUIDS[0], "/dev/dax")
    assert volume.namespace.replayed == 0
    box.away.clear()
    added = volume.add_device(UUIDS[0], "/dev/dax")
    assert (added.index, added.size, added.state) == (1, 8 * GIB, DeviceState.ATTACHED)
    with pytest.raises(ExistsError, match="part of the file system already"):
        volume.add_device(UUIDS[0], "/dev/dax")
    with pytest.raises(ExistsError, match="part of the file system already"):
        volume.add_device(volume.superblock.device_uuid, "/dev/dax")
    assert volume.statistics().capacity == 16 * GIB
    other = box.open(UUID(int=5))
    assert other.namespace.replayed == 1
    assert other.table.entries[1].uuid == UUIDS[0]
    for opened in (other, volume):
        opened.close()


def test_growing_file_moves_to_another_device(box: Box) -> None:
    """Its bytes go with it, and what a predecessor reserved is found by whoever takes over."""
    volume = box.open()
    volume.add_device(UUIDS[0], "/dev/dax")
    new = Provisional(volume)
    nodeid = new.create(1, b"grows", 0o644, 0, 0)
    new.grow(nodeid, 3 * UNIT)
    row = new.row(nodeid)
    volume.write(row, 0, memoryview(data_of(1)))
    # All but the rest of the first device is taken.
    start = volume.namespace.fmap(row).extents[0].offset
    filler = 8 * GIB - start - 4 * UNIT
    place(volume, b"filler", filler, Fmap((Extent(0, start + 4 * UNIT, filler),)))
    assert volume.space.own((Extent(0, start + 4 * UNIT, filler),))
    new.grow(nodeid, 8 * UNIT)
    (extent,) = volume.namespace.fmap(row).extents
    assert extent.device == 1
    assert volume.read(row, 0, 2 * UNIT - 5) == data_of(1)
    new.released(nodeid)
    assert bytes(box.further[UUIDS[0]].view[extent.offset :][: 2 * UNIT - 5]) == data_of(1)
    volume.close()


def test_superblock_of_a_further_device_is_no_place_for_files(box: Box) -> None:
    volume = box.open()
    volume.add_device(UUIDS[0], "/dev/dax")
    place(volume, b"bad", 5, Fmap((Extent(1, 0, UNIT),)))
    volume.close()
    again = box.open()
    assert again.namespace.faults() == {Fault.IN_METADATA: [1]}
    assert again.namespace.resolve(b"bad") == 0
    again.close()


def test_space_that_was_named_before_its_device(box: Box) -> None:
    """The file is not shown; but nothing new is put over its data."""
    entries = [
        log.build_file(
            0, b"early", size=UNIT, mode=0o644, uid=0, gid=0, fmap=Fmap((Extent(1, layout.SUPERBLOCK_REGION, UNIT),))
        ),
        log.build_add_daxdev(1, device=1, size=8 * GIB, uuid=UUIDS[0]),
    ]
    following = box.open(UUID(int=5))
    append.append(box.primary, 0, b"".join(entries))
    following.refresh()
    for volume in (following, box.open()):
        assert volume.namespace.faults() == {Fault.UNKNOWN_DEVICE: [0]}
        assert next(volume.space.free_runs(1))[0] == layout.SUPERBLOCK_REGION + UNIT
        volume.close()


def test_hostile_number_of_devices(box: Box) -> None:
    count = 300
    entries = [log.build_add_daxdev(n, device=n + 1, size=1 << 62, uuid=UUID(int=1000 + n)) for n in range(count)]
    append.append(box.primary, 0, b"".join(entries))
    volume = box.open()
    assert len(box.asked) == MOST_ATTACHED - 1
    assert len(volume.table.incomplete) == count
    assert "looked for" in volume.table.entries[-1].problem
    volume.close()


def test_golden_image_with_devices(golden_image: Callable[[str, Path], Path], tmp_path: Path) -> None:
    facts = [UUID(f"a0a1a2a3-a4a5-46a7-a8a9-aaabacad000{n}") for n in (3, 4)]
    asked = []

    def attach(uuid: UUID, hint: str | None = None) -> Attached:
        asked.append(uuid)
        raise DeviceError("away")

    with DaxDevice.open(str(golden_image("09-add-daxdev", tmp_path))) as device:
        memory = device.memory()
        volume = Volume(memory, HOST, device.path)
        volume.attach_devices(attach)
        assert asked == facts
        assert [entry.size for entry in volume.table.entries] == [8 * GIB, 16 * GIB, 32 * GIB]
        assert volume.namespace.faults() == {Fault.DEVICE_DUPLICATE: [3], Fault.DEVICE_INDEX: [4]}
        for name in (b"before", b"after"):
            assert len(read(volume, name)) == MIB
        volume.close()
        memory.close()
