# SPDX-License-Identifier: Apache-2.0
"""What sysfs tells about a dax device: driver, size, alignment (docs/devices.md)."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from famfs_server.errors import DeviceError

SYSFS = Path("/sys")


@dataclass(frozen=True, slots=True)
class DaxAttributes:
    """The facts of one dax device. `size` and `align` in bytes; `driver` is empty when none is bound."""

    name: str
    directory: Path
    driver: str
    size: int
    align: int


def attributes(device_number: int, path: str, sysfs: Path = SYSFS) -> DaxAttributes:
    """The attributes of the character device with number `device_number`.

    Raises DeviceError when it is not a dax device: handing the kernel another character device as one
    damages its bookkeeping (findings 2.h).
    """
    node = sysfs / "dev" / "char" / f"{os.major(device_number)}:{os.minor(device_number)}"
    if _link_name(node / "subsystem") != "dax":
        raise DeviceError(f"{path} is a character device but not a dax device")
    directory = node.resolve()
    try:
        size = int((directory / "size").read_text())
        align = int((directory / "align").read_text())
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path}: cannot read size and align in {directory}: {error}") from error
    return DaxAttributes(directory.name, directory, driver_of(directory), size, align)


def driver_of(directory: Path) -> str:
    """The name of the driver that the device with this directory is bound to now; "" for none."""
    return _link_name(directory / "driver")


def has_driver(name: str, sysfs: Path = SYSFS) -> bool:
    """Whether the kernel has this driver of dax devices, built in or loaded."""
    return (sysfs / "bus" / "dax" / "drivers" / name).is_dir()


def write(file: Path, text: str) -> None:
    """Write to a file of sysfs in one call, as the kernel wants it. Raises OSError with the kernel's answer."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def device_nodes(sysfs: Path = SYSFS, dev: Path = Path("/dev")) -> list[str]:
    """The paths of the dax devices of this host that have a node, dax0.0 before dax0.1 before dax10.0."""
    directory = sysfs / "bus" / "dax" / "devices"
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    return [str(dev / name) for name in names if (dev / name).exists()]


def _link_name(link: Path) -> str:
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""
