# SPDX-License-Identifier: Apache-2.0
"""Binding a dax device to another driver, which is what `--set-daxmode` does (docs/devices.md, "Switching modes")."""

import contextlib
import errno
import logging
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from famfs_server.dax import sysfs
from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import DeviceError, DeviceModeError

log = logging.getLogger(__name__)

DRIVERS = {Mode.DEVDAX: "device_dax", Mode.FSDEV: "fsdev_dax"}
"""The modes that a device can be switched to, and their drivers."""
MODES = {"famfs": Mode.FSDEV, "devdax": Mode.DEVDAX}
"""What users call them."""
_LOAD_SECONDS = 30
_MODPROBE_PATHS = "/usr/sbin:/sbin:/usr/bin:/bin"


@contextmanager
def switched(path: str, mode: Mode, *, sysfs_root: Path = sysfs.SYSFS) -> Iterator[Callable[[], None]]:
    """Have the device in `mode`; it stays there unless an exception comes out of the block before the function that
    the block is given is called. Raises DeviceError, and the device is then as it was."""
    before = switch(path, mode, sysfs_root=sysfs_root)
    staying = False

    def stay() -> None:
        nonlocal staying
        staying = True

    try:
        yield stay
    except BaseException:
        if not staying:
            _put_back(_device(path, sysfs_root), before, sysfs_root)
        raise


def switch(path: str, mode: Mode, *, sysfs_root: Path = sysfs.SYSFS) -> str:
    """Bind the device at `path` to the driver of `mode`; the driver that it had before, "" for none.

    Raises DeviceError, and the device then has its former driver again: DeviceBusyError where somebody has its file
    system open, DeviceModeError where it cannot be switched.
    """
    found = _device(path, sysfs_root)
    driver = DRIVERS[mode]
    if found.driver == driver:
        return driver
    if found.driver not in ("", *DRIVERS.values()):
        raise DeviceModeError(
            f"{path} is bound to {found.driver} and not switched from there; run: "
            f"daxctl reconfigure-device -m devdax {found.name}"
        )
    if found.driver:
        with DaxDevice.open(path, sysfs_root=sysfs_root) as device:
            device.require_lock(Lock.MOUNTED, exclusive=True, why="in use: unmount it before its mode is switched")
        # It is closed before the switch: fsdev_dax does not revive a device that somebody has open.
    _switch(found, driver, sysfs_root)
    return found.driver


def _device(path: str, sysfs_root: Path) -> sysfs.DaxAttributes:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DeviceError(f"{path}: {os.strerror(error.errno or errno.EIO)}") from error
    if not stat.S_ISCHR(status.st_mode):
        raise DeviceModeError(f"{path} is not a dax device and has no mode; do without --set-daxmode or daxmode=")
    return sysfs.attributes(status.st_rdev, path, sysfs_root)


def _switch(found: sysfs.DaxAttributes, driver: str, sysfs_root: Path) -> None:
    try:
        _bind(found, driver, sysfs_root)
    except DeviceModeError as error:
        _put_back(found, found.driver, sysfs_root)
        raise DeviceModeError(f"{error}; it has its former driver again ({found.driver or 'none'})") from error


def _put_back(found: sysfs.DaxAttributes, driver: str, sysfs_root: Path) -> None:
    """Give the device its former driver; DeviceModeError, naming what to do, where that fails too."""
    try:
        _bind(found, driver, sysfs_root)
    except DeviceModeError as error:
        raise DeviceModeError(
            f"{found.name} could not be given its former driver ({driver or 'none'}) again: {error}; "
            "see daxctl reconfigure-device"
        ) from error


def _bind(found: sysfs.DaxAttributes, driver: str, sysfs_root: Path) -> None:
    """Take the device from its present driver and give it to another one, or to none."""
    folder = sysfs_root / "bus" / "dax" / "drivers"
    if driver and not (folder / driver).is_dir():
        _load(driver)
        if not (folder / driver).is_dir():
            raise DeviceModeError(
                f"the kernel has no driver {driver} for {found.name}: load that module, or use a kernel that has it"
            )
    bound = sysfs.driver_of(found.directory)
    if bound == driver:
        return
    if bound:
        _tell(folder / bound / "unbind", found.name)
        # Else the former driver would claim the device again; it knows the name only if it was told.
        with contextlib.suppress(DeviceModeError):
            _tell(folder / bound / "remove_id", found.name)
    if driver:
        # A device of a pmem namespace is bound by name; one of special-purpose memory by making its name known.
        with contextlib.suppress(DeviceModeError):
            _tell(folder / driver / "bind", found.name)
        if sysfs.driver_of(found.directory) != driver:
            _tell(folder / driver / "new_id", found.name)
    if sysfs.driver_of(found.directory) != driver:
        raise DeviceModeError(f"{found.name} does not take the driver {driver or 'none'}; see the kernel log")
    log.info("%s: driver %s in place of %s", found.name, driver or "none", bound or "none")


def _tell(file: Path, name: str) -> None:
    try:
        sysfs.write(file, name)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise DeviceModeError(f"cannot switch the driver of {name}: writing to {file}: {reason}") from error


def _load(driver: str) -> None:
    """Have the kernel's module loaded, if there is one."""
    environment = {"PATH": _MODPROBE_PATHS}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["modprobe", "-q", driver], env=environment, timeout=_LOAD_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
