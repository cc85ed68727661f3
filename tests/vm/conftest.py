# SPDX-License-Identifier: Apache-2.0
"""Tests on real dax devices are skipped where there are none, and get time in an emulated guest."""

import os
from pathlib import Path

import pytest

import real_device
from guest_devices import dax_names, forking, set_mode  # noqa: F401 - fixtures

FOLDER = Path(__file__).parent

# An emulated processor starts a Python program thirty times more slowly than a real one.
SLOW_SECONDS = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder outside the guest, and gives them time inside an emulated one."""
    for item in items:
        if FOLDER in item.path.parents:
            if os.environ.get("VM_TEST") != "1" and real_device.device_name() is None:
                item.add_marker(pytest.mark.skip(reason="needs the guest that scripts/vm-test boots"))
            elif os.environ.get("VM_TEST_ACCEL") == "tcg" and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
