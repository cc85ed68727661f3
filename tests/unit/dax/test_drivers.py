# SPDX-License-Identifier: Apache-2.0
"""Switching drivers, in a sysfs tree of the test in which a driver core of the test answers as a kernel's does.

The rules that it plays are those of docs/devices.md; the guest of the vm tier has the real ones.
"""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from famfs_server.dax import drivers, sysfs
from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import DeviceBusyError, DeviceError, DeviceModeError

NAME = "dax0.0"
NULL = os.makedev(1, 3)
KERNEL = ("device_dax", "fsdev_dax", "kmem")


class DriverCore:
    """The dax bus of a kernel: the tree, and what writing to its files does."""

    def __init__(self, root: Path, node: Path, driver: str | None, *, by_name: tuple[str, ...] = ()) -> None:
        self.root = root
        self.node = node
        self.bus = root / "bus" / "dax"
        self.device = self.bus / "devices" / NAME
        self.device.mkdir(parents=True)
        (self.device / "size").write_text("4294967296\n")
        (self.device / "align").write_text("2097152\n")
        (self.device / "subsystem").symlink_to(self.bus)
        for name in KERNEL:
            (self.bus / "drivers" / name).mkdir(parents=True)
        link = root / "dev" / "char" / "1:3"
        link.parent.mkdir(parents=True)
        link.symlink_to(self.device)
        self.known = {name: {NAME} if name in by_name else set() for name in KERNEL}
        self.broken: dict[str, int] = {}
        """driver/file to the errno that writing there ends with."""
        self.ignoring: set[str] = set()
        """Drivers that refuse the device without an error."""
        self.written: list[str] = []
        if driver:
            self._bind(driver)
        if driver and driver not in by_name:
            self.known[driver].add(NAME)

    @property
    def driver(self) -> str:
        """What the device is bound to."""
        return sysfs.driver_of(self.device)

    def _bind(self, driver: str) -> None:
        if driver not in self.ignoring:
            (self.device / "driver").symlink_to(self.bus / "drivers" / driver)

    def write(self, file: Path, text: str) -> None:
        """What the kernel does."""
        driver, what = file.parent.name, file.name
        self.written.append(f"{driver}/{what}")
        assert text == NAME
        if number := self.broken.get(f"{driver}/{what}"):
            raise OSError(number, os.strerror(number))
        if what == "unbind":
            if self.driver != driver:
                raise OSError(errno.ENODEV, "not bound here")
            (self.device / "driver").unlink()
        elif what == "remove_id":
            if NAME not in self.known[driver]:
                raise OSError(errno.ENODEV, "not known here")
            self.known[driver].discard(NAME)
        elif what == "bind":
            if self.driver:
                raise OSError(errno.EBUSY, "bound")
            if NAME not in self.known[driver]:
                raise OSError(errno.ENODEV, "not known")
            self._bind(driver)
        elif what == "new_id":
            self.known[driver].add(NAME)
            if not self.driver:
                self._bind(driver)


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> DriverCore:
    """A kernel whose device has the driver that the test's parameter names, or device_dax."""
    node = tmp_path / NAME
    try:
        os.mknod(node, stat.S_IFCHR | 0o600, NULL)
        os.close(os.open(node, os.O_RDWR))
    except PermissionError:
        pytest.skip("needs root, and devices in the folder of the tests")
    core = DriverCore(tmp_path / "sys", node, getattr(request, "param", "device_dax"))
    monkeypatch.setattr(sysfs, "write", core.write)
    monkeypatch.setattr(drivers, "_load", lambda driver: None)
    return core


def switch(core: DriverCore, mode: Mode) -> str:
    return drivers.switch(str(core.node), mode, sysfs_root=core.root)


@pytest.mark.parametrize("core", ["device_dax", "fsdev_dax", None], indirect=True)
@pytest.mark.parametrize("mode", [Mode.FSDEV, Mode.DEVDAX])
def test_there_and_back(core: DriverCore, mode: Mode) -> None:
    before = core.driver
    assert switch(core, mode) == before
    assert core.driver == drivers.DRIVERS[mode]
    # Nobody else claims the name any more.
    assert [driver for driver, names in core.known.items() if names] == [core.driver]
    other = Mode.DEVDAX if mode is Mode.FSDEV else Mode.FSDEV
    assert switch(core, other) == drivers.DRIVERS[mode]
    assert core.driver == drivers.DRIVERS[other]


def test_device_of_a_namespace_is_bound_by_name(core: DriverCore) -> None:
    """It is in the table of device_dax from the start, and is bound there by plain `bind`."""
    switch(core, Mode.FSDEV)
    core.known["device_dax"].add(NAME)
    core.written.clear()
    switch(core, Mode.DEVDAX)
    assert core.driver == "device_dax"
    assert "device_dax/new_id" not in core.written


def test_nothing_to_do(core: DriverCore) -> None:
    assert switch(core, Mode.DEVDAX) == "device_dax"
    assert core.written == []


@pytest.mark.parametrize("broken", ["device_dax/unbind", "fsdev_dax/new_id"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY, errno.ENODEV])
def test_failure_puts_the_driver_back(core: DriverCore, broken: str, number: int) -> None:
    core.broken[broken] = number
    with pytest.raises(DeviceModeError, match=r"it has its former driver again \(device_dax\)") as error:
        switch(core, Mode.FSDEV)
    assert os.strerror(number) in str(error.value)
    assert "\n" not in str(error.value)
    assert core.driver == "device_dax"


@pytest.mark.parametrize("broken", ["device_dax/remove_id", "fsdev_dax/bind"])
def test_failures_that_do_not_matter(core: DriverCore, broken: str) -> None:
    core.broken[broken] = errno.EIO
    switch(core, Mode.FSDEV)
    assert core.driver == "fsdev_dax"


@pytest.mark.parametrize("core", ["device_dax", None], indirect=True)
def test_driver_that_refuses_without_a_word(core: DriverCore) -> None:
    before = core.driver
    core.ignoring.add("fsdev_dax")
    with pytest.raises(DeviceModeError, match="does not take the driver fsdev_dax"):
        switch(core, Mode.FSDEV)
    assert core.driver == before


def test_driver_that_does_not_come_back(core: DriverCore) -> None:
    core.ignoring |= {"fsdev_dax", "device_dax"}
    with pytest.raises(DeviceModeError, match=r"could not be given its former driver \(device_dax\) again"):
        switch(core, Mode.FSDEV)


def test_kernel_without_the_driver(core: DriverCore, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(drivers, "_load", loaded.append)
    shutil.rmtree(core.bus / "drivers" / "fsdev_dax")
    with pytest.raises(DeviceModeError, match="the kernel has no driver fsdev_dax"):
        switch(core, Mode.FSDEV)
    assert loaded == ["fsdev_dax"]
    assert (core.driver, core.written) == ("device_dax", [])


def test_module_that_had_to_be_loaded(core: DriverCore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = core.bus / "drivers" / "fsdev_dax"
    folder.rmdir()
    monkeypatch.setattr(drivers, "_load", lambda driver: folder.mkdir())
    switch(core, Mode.FSDEV)
    assert core.driver == "fsdev_dax"


def test_device_in_use_stays_as_it_is(core: DriverCore) -> None:
    with DaxDevice.open(str(core.node), sysfs_root=core.root) as device:
        assert device.lock(Lock.MOUNTED, exclusive=False)
        with pytest.raises(DeviceBusyError, match="unmount it before its mode is switched"):
            switch(core, Mode.FSDEV)
    assert (core.driver, core.written) == ("device_dax", [])
    switch(core, Mode.FSDEV)


@pytest.mark.parametrize("core", ["kmem"], indirect=True)
def test_memory_is_not_taken_away(core: DriverCore) -> None:
    with pytest.raises(DeviceModeError, match="reconfigure-device -m devdax dax"):
        switch(core, Mode.FSDEV)
    assert (core.driver, core.written) == ("kmem", [])


def test_what_has_no_mode(core: DriverCore, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path, words in ((file, "is not a dax device and has no mode"), (tmp_path / "absent", "No such file")):
        with pytest.raises(DeviceError, match=words):
            drivers.switch(str(path), Mode.FSDEV, sysfs_root=core.root)


def fail_within(core: DriverCore, mode: Mode, *, staying: bool) -> None:
    """A block that fails, having said or not that the device is to stay as it is."""
    with drivers.switched(str(core.node), mode, sysfs_root=core.root) as stay:
        assert core.driver == drivers.DRIVERS[mode]
        if staying:
            stay()
        raise ZeroDivisionError


@pytest.mark.parametrize("core", ["device_dax", None], indirect=True)
def test_block_that_fails_puts_the_driver_back(core: DriverCore) -> None:
    before = core.driver
    with pytest.raises(ZeroDivisionError):
        fail_within(core, Mode.FSDEV, staying=False)
    assert core.driver == before


def test_block_that_ends_well_or_has_said_so_leaves_it(core: DriverCore) -> None:
    with drivers.switched(str(core.node), Mode.FSDEV, sysfs_root=core.root):
        pass
    assert core.driver == "fsdev_dax"
    with pytest.raises(ZeroDivisionError):
        fail_within(core, Mode.DEVDAX, staying=True)
    assert core.driver == "device_dax"
