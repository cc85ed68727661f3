# SPDX-License-Identifier: Apache-2.0
"""Dax devices, and binding them to one driver or another by sysfs.

Tests that use these need dax devices that they may unbind and overwrite: those of the guest that scripts/vm-test boots,
or one of the user's (`scripts/test dax`). A conftest.py imports the fixtures by name.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import programs
import real_device

DEVICES = Path("/sys/bus/dax/devices")
DRIVERS = Path("/sys/bus/dax/drivers")
DRIVER_OF_MODE = {"devdax": "device_dax", "fsdev": "fsdev_dax", "system-ram": "kmem", "unbound": None}

SetMode = Callable[[str, str], Path]
"""Brings a device, by its name, into a mode of DRIVER_OF_MODE, and gives its node."""


def bound_driver(name: str) -> str | None:
    """The driver that the device `name` (such as dax0.0) is bound to, or None."""
    link = DEVICES / name / "driver"
    return link.resolve().name if link.exists() else None


def bind(name: str, driver: str | None) -> None:
    """Moves the device to a driver, None for no driver.

    `new_id` is what binds a device of special-purpose memory: to plain `bind` the kernel answers ENODEV, since
    such a device asks for the kmem driver. One of a pmem namespace goes back to its own driver by `bind` alone.
    """
    bound = bound_driver(name)
    if bound == driver:
        return
    if bound is not None:
        (DRIVERS / bound / "unbind").write_text(name)
        (DRIVERS / bound / "remove_id").write_text(name)
    if driver is not None:
        (DRIVERS / driver / "new_id").write_text(name)
        if bound_driver(name) is None:
            (DRIVERS / driver / "bind").write_text(name)
    assert bound_driver(name) == driver


def opens(node: Path) -> bool:
    """Whether the kernel opens a device, which it may not though a driver is bound."""
    try:
        os.close(os.open(node, os.O_RDWR))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def forking() -> Iterator[None]:
    """The process for `programs.fork`, as long as nothing is open that it would inherit."""
    with programs.forking():
        yield


@pytest.fixture(scope="session")
def dax_names() -> list[str]:
    """The names of the dax devices, the smallest first."""
    given = real_device.device_name()
    if given is not None:
        return [given]
    return sorted(os.listdir(DEVICES), key=lambda name: (int((DEVICES / name / "size").read_text()), name))


@pytest.fixture(scope="session")
def set_mode(dax_names: list[str]) -> Iterator[SetMode]:
    """`set_mode(name, mode)` brings a device into the mode devdax, fsdev, system-ram or unbound, and gives its device
    node.

    A mode that this kernel does not have skips the test. After the last test every device is as it was.
    """
    before = {name: bound_driver(name) for name in dax_names}

    def switch(name: str, mode: str) -> Path:
        driver = DRIVER_OF_MODE[mode]
        if driver is not None and not (DRIVERS / driver).exists():
            pytest.skip(f"this kernel has no {driver} driver")
        bind(name, driver)
        node = Path("/dev", name)
        if driver not in (None, "kmem") and not opens(node):
            # An earlier test had it open while it was unbound and bound again.
            bind(name, None)
            bind(name, driver)
        return node

    yield switch
    for name, driver in before.items():
        bind(name, driver)
