# SPDX-License-Identifier: Apache-2.0
"""Tests of extent maps on a running kernel: a guest whose kernel has the module famfs (scripts/vm-test --famfs).

The module checks what a famfs kernel checks, and with strict=1 warns at once of what a server must not do. After each
test the kernel's log is looked at: a warning, an oops or a hung task fails it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest_devices import SetMode, dax_names, forking, set_mode  # noqa: F401 - fixtures
from kernel_log import KernelLog
from tests.fmap.volumes import DIALECTS, Volume

FOLDER = Path(__file__).parent
PARAMETERS = Path("/sys/module/famfs/parameters")
HUNG_TASKS = Path("/proc/sys/kernel/hung_task_timeout_secs")
HUNG_SECONDS = 30
SLOW_SECONDS = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder outside of such a guest; within, each has a limit of its own."""
    for item in items:
        if FOLDER in item.path.parents:
            if not os.environ.get("VM_TEST_FAMFS"):
                item.add_marker(pytest.mark.skip(reason="needs a guest with famfs.ko: scripts/vm-test --famfs"))
            elif not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(scope="session", autouse=True)
def noticed_hangs() -> None:
    """The kernel tells of tasks that hang much sooner than it does elsewhere."""
    if HUNG_TASKS.exists() and os.environ.get("VM_TEST_FAMFS"):
        HUNG_TASKS.write_text(str(HUNG_SECONDS))


@pytest.fixture(autouse=True)
def kernel_log(request: pytest.FixtureRequest) -> Iterator[KernelLog]:
    """Fails a test during which the kernel has warned of anything, or has not where it must (mark `warns`)."""
    log = KernelLog()
    try:
        yield log
        alarms = log.alarms()
        expected = request.node.get_closest_marker("warns")
        if expected is None:
            assert not alarms, "the kernel has warned:\n" + "\n".join(alarms)
        else:
            text = expected.args[0]
            assert any(text in line for line in alarms), f"the kernel has not warned of {text!r}:\n" + "\n".join(alarms)
    finally:
        log.close()


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each dialect in turn, for mounts made during the test."""
    yield from _speaking(request.param)


@pytest.fixture
def speak() -> Iterator[Callable[[str], None]]:
    """`speak(dialect)` has the kernel speak one dialect in mounts made from then on, until the test ends."""
    path = PARAMETERS / "dialect"
    before = path.read_text()
    yield lambda dialect: path.write_text(dialect) and None
    path.write_text(before)


def _speaking(dialect: str) -> Iterator[str]:
    path = PARAMETERS / "dialect"
    before = path.read_text()
    path.write_text(dialect)
    yield dialect
    path.write_text(before)


@pytest.fixture
def volume(dax_names: list[str], set_mode: SetMode, tmp_path: Path) -> Iterator[Volume]:  # noqa: F811 - a fixture
    """A new file system on the largest device, not mounted; afterwards nothing of it is mounted."""
    volume = Volume(dax_names[-1], set_mode, tmp_path)
    volume.make()
    try:
        yield volume
    finally:
        volume.end()
