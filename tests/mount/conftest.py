# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the mount tier: a site for each test, and the proof that the test left nothing behind."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.fuse import mountapi
from harness import MARK, Site, marked_processes, process_state, succeed, wait_for

FOLDER = Path(__file__).parent
ROOT = str(FOLDER.parents[1])
if ROOT not in sys.path:
    # For the soak, which processes of its own import too.
    sys.path.insert(0, ROOT)
UNABLE = "needs root and /dev/fuse"
MEMORY_NEEDED = 1 << 30
"""Bytes that the tests of this folder may use of a device."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where nothing can be mounted."""
    if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=UNABLE))


@pytest.fixture(scope="session")
def connections(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kernel's directory of FUSE connections, mounted where nothing else is in the way."""
    path = tmp_path_factory.mktemp("connections")
    succeed("mount", "-t", "fusectl", "none", path)
    yield path
    succeed("umount", "-l", path)


@pytest.fixture(scope="session", autouse=True)
def mark() -> Iterator[str]:
    """What all processes of this run bear in their environment. At its end none of them waits in the kernel."""
    value = os.environ[MARK] = f"{os.getpid()} {time.monotonic_ns()}"
    yield value
    del os.environ[MARK]
    waiting: list[str] = []

    def none_waits() -> bool:
        waiting[:] = [f"{pid} {what}" for pid, what in marked_processes(value).items() if process_state(pid) == "D"]
        return not waiting

    assert wait_for(none_waits), f"in state D for good: {waiting}"


@pytest.fixture(autouse=True)
def nothing_left(mark: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After each test there are no processes and mounts that were not there before: also those of which no site knows.

    Set up before the other fixtures of a test and behind those that tests share, and taken down in the reverse order.
    """
    base = f"{tmp_path_factory.getbasetemp()}/"

    def mounts() -> set[str]:
        return {record.mount_point for record in mountapi.parse_mountinfo() if record.mount_point.startswith(base)}

    processes_before, mounts_before = set(marked_processes(mark).values()), mounts()
    yield
    left: list[str] = []

    def clear() -> bool:
        left[:] = [f"{pid} {what}" for pid, what in marked_processes(mark).items() if what not in processes_before]
        left[:] += mounts() - mounts_before
        return not left

    if not wait_for(clear):
        pytest.fail(f"left behind: {', '.join(left)}")


def use(site: Site) -> Iterator[Site]:
    """Hand out a site; afterwards whatever is left there is taken away and reported as a failure."""
    yield site
    left: list[str] = []

    def clear() -> bool:
        left[:] = site.leftovers()
        return not left

    if not wait_for(clear):
        site.clean()
        wait_for(lambda: not site.leftovers())
        pytest.fail(f"left behind: {', '.join(left)}")


@pytest.fixture
def site(tmp_path: Path, connections: Path) -> Iterator[Site]:
    """A corner of the machine for one test."""
    yield from use(Site(tmp_path, connections))


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory, connections: Path) -> Iterator[Site]:
    """A corner of the machine for the tests of one module."""
    yield from use(Site(tmp_path_factory.mktemp("site"), connections))


def folder_in_memory() -> Iterator[Path]:
    """A folder for devices in memory where there is room: page faults of sparse files on a disk take milliseconds."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_NEEDED
    with tempfile.TemporaryDirectory(prefix="famfs-test-", dir=memory if roomy else None) as folder:
        yield Path(folder)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder for the devices of one test."""
    yield from folder_in_memory()


@pytest.fixture(scope="module")
def shared_memory_folder() -> Iterator[Path]:
    """A folder for the devices of the tests of one module."""
    yield from folder_in_memory()
