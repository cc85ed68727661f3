# SPDX-License-Identifier: Apache-2.0
"""Finding further devices: nothing is believed but superblocks, the administrator, and the same place as before."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax import sysfs
from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import DeviceError
from famfs_server.omf import layout
from famfs_server.omf.superblock import SuperblockState
from famfs_server.volume import finder as finder_module
from famfs_server.volume.finder import DeviceFinder, Place, PlaceCache
from famfs_server.volume.format import check_overwrite, make_filesystem, prepare_device

HOST = UUID("f00dcafe-0102-4304-8506-0708090a0b0c")
VOLUME, OTHER = UUID(int=1), UUID(int=2)
FIRST, SECOND = UUID(int=11), UUID(int=12)
SIZE = 4 << 30


@pytest.fixture
def nodes(tmp_path: Path) -> Callable[[], list[str]]:
    """A bus with dax0.0, dax1.0 and dax10.0, whose nodes are files; dax2.0 is on the bus and has no node."""
    dev = tmp_path / "dev"
    dev.mkdir()
    for name in ("dax0.0", "dax1.0", "dax10.0", "dax2.0"):
        (tmp_path / "sys" / "bus" / "dax" / "devices" / name).mkdir(parents=True)
        if name != "dax2.0":
            with (dev / name).open("wb") as image:
                image.truncate(SIZE)
    return lambda: sysfs.device_nodes(tmp_path / "sys", dev)


def prepare(path: str | Path, uuid: UUID, volume: UUID = VOLUME) -> None:
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        prepare_device(memory, str(path), uuid=volume, host=HOST, device_uuid=uuid)
        memory.close()


@pytest.fixture
def found() -> Iterator[Callable[..., str]]:
    """`found(finder, uuid)` is the path at which the finder finds a device of VOLUME; it stays open meanwhile."""
    devices = []

    def find(finder: DeviceFinder, uuid: UUID, hint: str | None = None) -> str:
        devices.append(finder.find(VOLUME, uuid, hint))
        return devices[-1].path

    yield find
    for device in devices:
        device.close()


def test_nodes_come_in_the_order_of_their_numbers(nodes: Callable[[], list[str]]) -> None:
    assert [Path(node).name for node in nodes()] == ["dax0.0", "dax1.0", "dax10.0"]
    assert sysfs.device_nodes(Path("/nonexistent")) == []


def test_scan(nodes: Callable[[], list[str]], found: Callable[..., str]) -> None:
    dax0, dax1, dax10 = nodes()
    prepare(dax0, FIRST, OTHER)
    prepare(dax10, FIRST)
    finder = DeviceFinder({}, None, nodes=nodes)
    assert found(finder, FIRST) == dax10
    with pytest.raises(DeviceError, match="no device of this host has its superblock"):
        finder.find(VOLUME, SECOND)
    # A primary is no further device, whatever its own UUID is.
    with DaxDevice.open(dax1) as device:
        memory = device.memory()
        make_filesystem(memory, dax1, HOST, log_length=8 << 20, uuid=VOLUME, device_uuid=SECOND)
        memory.close()
    with pytest.raises(DeviceError, match="no device of this host has its superblock"):
        finder.find(VOLUME, SECOND)


def test_device_that_is_found_cannot_be_formatted(nodes: Callable[[], list[str]], found: Callable[..., str]) -> None:
    path = nodes()[1]
    prepare(path, FIRST)
    finder = DeviceFinder({}, None, nodes=nodes)
    assert found(finder, FIRST) == path
    with DaxDevice.open(path) as device:
        assert not device.lock(Lock.MOUNTED, exclusive=True)
        # Several mounts may share it.
        assert found(finder, FIRST) == path
    with DaxDevice.open(nodes()[2]) as device:
        prepare(nodes()[2], SECOND)
        assert device.lock(Lock.MOUNTED, exclusive=True)
        with pytest.raises(DeviceError):
            finder.find(VOLUME, SECOND)


def test_named_device(
    nodes: Callable[[], list[str]], found: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    dax0, dax1, dax10 = nodes()
    prepare(dax0, FIRST)
    prepare(dax1, SECOND)
    # A superblock is believed more than an option.
    with pytest.raises(DeviceError, match=f"{dax1} holds device {SECOND}"):
        DeviceFinder({FIRST: dax1}, None, nodes=nodes).find(VOLUME, FIRST)
    assert found(DeviceFinder({FIRST: dax0}, None, nodes=nodes), FIRST) == dax0
    assert not caplog.records
    # Where there is none, the option is all there is.
    assert found(DeviceFinder({FIRST: dax10}, None, nodes=nodes), FIRST) == dax10
    assert "has no superblock" in caplog.text
    with pytest.raises(DeviceError, match="No such file"):
        DeviceFinder({FIRST: "/nonexistent"}, None, nodes=nodes).find(VOLUME, FIRST)
    with pytest.raises(DeviceError, match="holds no famfs superblock"):
        DeviceFinder({}, None, nodes=nodes).find(VOLUME, FIRST, dax10)


def test_damaged_superblock_is_not_believed(nodes: Callable[[], list[str]]) -> None:
    path = nodes()[0]
    prepare(path, FIRST)
    with open(path, "r+b") as image:
        image.seek(50)
        image.write(b"\xff")
    with pytest.raises(DeviceError, match="wrong checksum"):
        DeviceFinder({FIRST: path}, None, nodes=nodes).find(VOLUME, FIRST)


def test_nothing_is_opened_below_the_mount(tmp_path: Path) -> None:
    inside = tmp_path / "mnt" / "image"
    with pytest.raises(DeviceError, match="lies in the mount itself"):
        DeviceFinder({FIRST: str(inside)}, None, avoid=str(tmp_path / "mnt")).find(VOLUME, FIRST)


def test_cache(nodes: Callable[[], list[str]], found: Callable[..., str], tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    prepare(image, FIRST)
    cache = PlaceCache(tmp_path / "run" / "devices.json")
    assert found(DeviceFinder({FIRST: str(image)}, cache, nodes=nodes), FIRST) == str(image)
    # Known from now on; and nothing else is opened to find it.
    assert found(DeviceFinder({}, cache, nodes=lambda: ["/nonexistent"]), FIRST) == str(image)
    # What is there now is another one.
    prepare(image, SECOND)
    prepare(nodes()[1], FIRST)
    assert found(DeviceFinder({}, cache, nodes=nodes), FIRST) == nodes()[1]
    assert cache.get(FIRST) == Place(nodes()[1], "", SIZE)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"00000000-0000-0000-0000-00000000000b": 7}'])
def test_cache_that_is_damaged(text: str, tmp_path: Path) -> None:
    cache = PlaceCache(tmp_path / "devices.json")
    (tmp_path / "devices.json").write_text(text)
    assert cache.get(FIRST) is None
    place = Place("/dev/dax0.0", "", SIZE)
    cache.put(FIRST, place)
    assert cache.get(FIRST) == place
    PlaceCache(tmp_path / "devices.json" / "below").put(FIRST, place)


def test_device_in_famfs_mode(
    nodes: Callable[[], list[str]],
    found: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its memory cannot be read: it has to be named, or to be where it was when it could be read."""
    path = nodes()[0]
    real = DaxDevice.open

    def opened(path: str, *, writable: bool = True) -> DaxDevice:
        device = real(path, writable=writable)
        device.mode = Mode.FSDEV
        return device

    monkeypatch.setattr(finder_module.DaxDevice, "open", opened)
    place = Place(path, "/sys/devices/dax0.0", SIZE)
    monkeypatch.setattr(Place, "of", classmethod(lambda cls, device: place))
    with pytest.raises(DeviceError, match="no device of this host"):
        DeviceFinder({}, None, nodes=nodes).find(VOLUME, FIRST)
    assert found(DeviceFinder({FIRST: path}, None, nodes=nodes), FIRST) == path
    cache = PlaceCache(tmp_path / "devices.json")
    cache.put(FIRST, place)
    assert found(DeviceFinder({}, cache, nodes=nodes), FIRST) == path
    cache.put(FIRST, Place(path, "/sys/devices/dax1.0", SIZE))
    with pytest.raises(DeviceError, match="no device of this host"):
        DeviceFinder({}, cache, nodes=nodes).find(VOLUME, FIRST)


def test_superblock_of_a_further_device(nodes: Callable[[], list[str]]) -> None:
    path = nodes()[0]
    with DaxDevice.open(path) as device:
        memory = device.memory()
        made = prepare_device(memory, path, uuid=VOLUME, host=HOST, device_uuid=FIRST)
        assert (made.uuid, made.device_uuid, made.system_uuid) == (VOLUME, FIRST, HOST)
        assert (made.log_offset, made.log_length, made.flags) == (0, 0, layout.FLAG_SECONDARY)
        assert made.device_size == SIZE
        found = finder_module.inspect(device)
        assert found.state is SuperblockState.SECONDARY
        with pytest.raises(Exception, match=f"further device of the file system {VOLUME}"):
            found.require(path)
        with pytest.raises(Exception, match="already has a famfs superblock"):
            check_overwrite(memory, path, HOST, force=False)
        # A file system of its own does not go on calling itself a further device.
        again = make_filesystem(memory, path, HOST, log_length=8 << 20)
        assert again.flags == 0
        memory.close()
