# SPDX-License-Identifier: Apache-2.0
"""Two hosts: every test runs in two guests at once; what they do differs by `meeting.is_master`."""

import os
from pathlib import Path

import pytest

from two_hosts import meeting, pytest_runtest_makereport  # noqa: F401 - a fixture and a hook

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips these tests where there is no second host."""
    if os.environ.get("VM_TEST_HOSTS") != "2":
        for item in items:
            if FOLDER in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs two guests: scripts/vm-test --hosts 2"))
