# SPDX-License-Identifier: Apache-2.0
"""A real dax device of the user's, for the tests of the tier `dax`: what is on it, and consent to lose that.

FAMFS_TEST_DAX names the device. The tests unbind its driver and overwrite it, so they run only if
FAMFS_TEST_DAX_OVERWRITE names it too: `consent` sets that once somebody has typed yes, and who runs the tests
unattended sets it by hand.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import FamfsError
from famfs_server.omf import layout, superblock

DEVICE = "FAMFS_TEST_DAX"
OVERWRITE = "FAMFS_TEST_DAX_OVERWRITE"
SMALLEST = 4 << 30
ALIGN = 2 << 20


class RefusedError(Exception):
    """The tests must not run; the message is one line: cause and what to do."""


def device_name() -> str | None:
    """The name (such as dax1.0) of the device that the tests may overwrite, or None."""
    path = os.environ.get(DEVICE)
    return os.path.basename(path) if path and path == os.environ.get(OVERWRITE) else None


def content(device: DaxDevice) -> str:
    """In words, what would be lost."""
    head = device.memory().read_fresh(0, layout.SUPERBLOCK.itemsize)
    found = superblock.inspect(head)
    if found.superblock is not None:
        return f"holds a famfs file system (UUID {found.superblock.uuid})"
    return "holds no famfs file system; its first bytes are " + ("not zero" if any(head) else "zero")


def description(path: str) -> str:
    """The device and what is on it. Raises RefusedError for one that the tests cannot use."""
    if not Path(path).is_char_device():
        raise RefusedError(f"{DEVICE}={path}: not a device; name one like /dev/dax1.0")
    if path != f"/dev/{os.path.basename(path)}":
        raise RefusedError(f"{DEVICE}={path}: name the device itself, like /dev/dax1.0")
    if os.geteuid():
        raise RefusedError("tests on a real device need root")
    try:
        with DaxDevice.open(path) as device:
            if device.mode is not Mode.DEVDAX:
                raise RefusedError(f"{path} is in mode {device.mode.value}; the tests begin in devdax mode")
            if device.align != ALIGN or device.size < SMALLEST:
                raise RefusedError(f"{path}: the tests need 4 GiB or more with an alignment of 2 MiB")
            device.require_lock(Lock.MOUNTED, exclusive=True, why="is in use; unmount it first")
            return f"{path}: {device.size / (1 << 30):.1f} GiB, driver device_dax, {content(device)}"
    except FamfsError as error:
        raise RefusedError(str(error)) from error


def consent(environment: MutableMapping[str, str]) -> None:
    """Asks whether the device may be overwritten, unless the environment says so already; then it says so afterwards.

    Raises RefusedError without a yes.
    """
    path = environment.get(DEVICE)
    if not path:
        raise RefusedError(f"name the device to overwrite: {DEVICE}=/dev/dax1.0 scripts/test dax")
    print(description(path), flush=True)
    if environment.get(OVERWRITE) == path:
        return
    if not sys.stdin.isatty():
        raise RefusedError(f"the tests destroy what is on {path}; without a terminal to ask, set {OVERWRITE}={path}")
    answer = input("The tests overwrite this device and unbind its driver. Type yes to go on: ")
    if answer.strip() != "yes":
        raise RefusedError(f"{path} was left alone")
    environment[OVERWRITE] = path
