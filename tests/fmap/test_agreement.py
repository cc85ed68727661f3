# SPDX-License-Identifier: Apache-2.0
"""The kernel that tests/twin plays asks what the running kernel asks.

The same random calls go to a mount of the running kernel and to the fake one, each with a server of its own for a file
system of its own. After each call the results and the requests of both are compared, and at the end what is on the
devices. Where the two differ, the fake kernel is wrong, or the server decides by something that it should not look at.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.cli.target import Unmounted
from famfs_server.cli.unmounted import DeviceTarget
from famfs_server.volume.namespace import FIRST_NODEID
from guest_devices import DEVICES, SetMode
from programs import here, run
from tests.fmap.agreement import Agreement
from tests.fmap.random_calls import Programs
from tests.fmap.request_trace import RequestTrace
from tests.fmap.sides import Played, Real
from tests.fmap.volumes import DIALECTS, END_SECONDS, Volume

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
CALLS = 1000 if LONG else 25
"""On each mount."""
MADE = {
    "simple": ("-s", "3m"),
    "striped": ("-s", "20000000", "-B", "4", "-N", "3", "-C", "2m"),
    "small": ("-s", "5000"),
}
"""Files that are there before, and how they are made."""

pytestmark = pytest.mark.timeout(1200 if LONG else 240)


@pytest.fixture
def trace() -> Iterator[RequestTrace]:
    trace = RequestTrace()
    yield trace
    trace.close()


def make(volume: Volume, set_mode: SetMode, folder: Path) -> Path:
    """Files on the device, and the same on an image that stands for a device of the same size."""
    image = folder / "image"
    image.touch()
    os.truncate(image, int((DEVICES / volume.name / "size").read_text()))
    here("mkfs.famfs", "-f", image, host=volume.host)
    set_mode(volume.name, "devdax")
    for device in (volume.device, image):
        for name, words in MADE.items():
            here("famfs", "creat", "--daxdev", device, *words, name, host=volume.host)
    return image


def contents(device: Path) -> dict[bytes, tuple[int, bytes]]:
    """Path, nodeid and bytes of all that the log of an unmounted device has."""
    target = DeviceTarget(Unmounted(str(device)), write=False)
    try:
        volume = target.volume()
        tree = volume.namespace
        return {
            tree.path(node): (node, b"" if tree.is_directory(node) else volume.read(node, 0, tree.size[node]))
            for node in tree.walk()
            if node >= FIRST_NODEID
        }
    finally:
        target.close()


def await_end(volume: Volume) -> None:
    """Wait until the server is gone that a detached mount had."""
    deadline = time.monotonic() + END_SECONDS
    while volume.pids("famfs-supervisor"):
        assert time.monotonic() < deadline, "the server does not end"
        time.sleep(0.05)


@contextmanager
def agreement(
    volume: Volume, image: Path, dialect: str, trace: RequestTrace, host: Path, *options: str
) -> Iterator[Agreement]:
    """Both sides, mounted; the running kernel's is unmounted here, unless it is already."""
    played = Played(image, dialect, UUID(host.read_text().strip("\0\n")), options)
    real = Real(volume, trace, spared=lambda: played.twin.worker)
    try:
        played.self_test()
        volume.mount(*options, host=host)
        both = Agreement(real, played)
        both.mounted()
        trace.connection = os.minor(os.stat(volume.point).st_dev)
        yield both
    finally:
        real.let_go()
        if os.path.ismount(volume.point):
            volume.unmount()
        ended = played.twin.end()
        # It lies in the guest's memory.
        image.unlink()
    assert ended == 0, played.twin.log()


def test_new_files(
    volume: Volume, set_mode: SetMode, dialect: str, trace: RequestTrace, rng: random.Random, tmp_path: Path
) -> None:
    """On the master: files are made, and opened again. At the end the mount goes away while a new file is open."""
    image = make(volume, set_mode, tmp_path)
    with agreement(volume, image, dialect, trace, volume.host) as both:
        Programs(both, rng, list(MADE), creates=True).run(CALLS)
        both.call("create 'last'", lambda side: side.open("last", "last", os.O_RDWR | os.O_CREAT))
        both.call("write last", lambda side: side.write("last", 0, b"before"))
        run("umount", "-l", volume.point, host=volume.host)
        both.call("write last", lambda side: side.write("last", 6, b" and after"))
        both.call("fstat last", lambda side: side.fstat("last"))
        both.last_call("close last", lambda side: side.close("last"))
        expected = both.played.contents()
    await_end(volume)
    set_mode(volume.name, "devdax")
    found = contents(volume.device)
    assert found == expected
    assert found[b"last"][1] == b"before and after"


@pytest.mark.parametrize("who", ["nocreate", "client"])
def test_files_that_are_there(
    who: str,
    volume: Volume,
    set_mode: SetMode,
    speak: Callable[[str], None],
    trace: RequestTrace,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    """Where no file can be new the kernel asks for no open, and tells of no close."""
    image = make(volume, set_mode, tmp_path)
    dialect = rng.choice(DIALECTS)
    speak(dialect)
    client = tmp_path / "client.uuid"
    client.write_text(str(UUID(int=rng.getrandbits(128))))
    host, options = (volume.host, ("nocreate",)) if who == "nocreate" else (client, ())
    with agreement(volume, image, dialect, trace, host, *options) as both:
        Programs(both, rng, list(MADE), creates=False).run(CALLS)
        assert both.played.kernel.no_open
        expected = both.played.contents()
    set_mode(volume.name, "devdax")
    assert contents(volume.device) == expected
