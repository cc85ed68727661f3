# SPDX-License-Identifier: Apache-2.0
"""The service under a systemd that is process 1, on a real device: started, its processes killed, restarted, upgraded
and stopped while a file is written and read.

tests/mount/test_systemd.py has more of the units, on emulated devices.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from one_file import FileLoad, kernel_sends_again
from programs import BIN, SECONDS, here, mounts, run

SetMode = Callable[[str, str], Path]

SOURCES = Path(__file__).parents[2] / "systemd"
UNITS = Path("/run/systemd/system")
CONFIGURATION = Path("/etc/famfs")
LIMIT = 300

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("VM_TEST") != "1" or not UNITS.exists(), reason="needs a guest with scripts/vm-test --systemd"
    ),
]


class Service:
    """The unit of one device, as systemd has it."""

    def __init__(self, device: Path, point: Path, host: Path) -> None:
        self.name = f"famfs@dev-{device.name}.service"
        self.point = point
        self.host = host
        for name in ("famfs@.service", "famfs-detach@.service"):
            (UNITS / name).write_text((SOURCES / name).read_text().replace("@bindir@", str(BIN)))
        dropin = UNITS / "famfs@.service.d"
        dropin.mkdir()
        # Programs start so slowly in an emulated guest that the unit's own limits are a matter of luck.
        limits = f"TimeoutStartSec={LIMIT}\nTimeoutStopSec={LIMIT}\n"
        (dropin / "host.conf").write_text(f"[Service]\nEnvironment=FAMFS_SYSTEM_UUID_FILE={host}\n{limits}")
        CONFIGURATION.mkdir(exist_ok=True)
        (CONFIGURATION / f"dev-{device.name}.conf").write_text(f"MOUNT_POINT={point}\nOPTIONS=loglevel=error\n")
        run("systemctl", "daemon-reload", host=host)

    def systemctl(self, verb: str) -> None:
        run("systemctl", verb, self.name, host=self.host, seconds=LIMIT)

    def show(self, name: str) -> str:
        """A property of the unit."""
        return run("systemctl", "show", "-P", name, self.name, host=self.host).stdout.strip()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, [self.show(name) for name in ("ActiveState", "Result", "StatusText")]
            time.sleep(0.2)


@pytest.fixture
def service(dax_names: list[str], set_mode: SetMode, tmp_path: Path) -> Iterator[Service]:
    """On a device with a file system."""
    device = set_mode(dax_names[-1], "devdax")
    host = tmp_path / "system_uuid"
    point = tmp_path / "point"
    point.mkdir()
    here("mkfs.famfs", "-f", device, host=host)
    service = Service(device, point, host)
    yield service
    if os.path.ismount(point):
        subprocess.run(["systemctl", "stop", service.name], timeout=SECONDS, check=False)
        subprocess.run(["umount", "-l", str(point)], timeout=SECONDS, check=False)


def test_killed_restarted_upgraded_stopped(service: Service) -> None:
    service.systemctl("start")
    assert "serving" in service.show("StatusText")
    assert len(mounts()) == 1
    file = service.point / "file"
    with file.open("wb") as made:
        made.write(bytes(1 << 20))
        made.flush()
        os.fsync(made.fileno())
    with FileLoad(file) as load:
        load.wait_for(5)
        first = service.show("MainPID")
        os.kill(int(run("pgrep", "-x", "famfs-worker", host=service.host).stdout), signal.SIGKILL)
        load.wait_for(5)
        assert service.show("MainPID") == first

        os.kill(int(first), signal.SIGKILL)
        service.wait_for(lambda: service.show("MainPID") not in ("0", first))
        service.wait_for(lambda: service.show("ActiveState") == "active")
        load.wait_for(5)
        second = service.show("MainPID")

        service.systemctl("restart")
        load.wait_for(5)
        third = service.show("MainPID")
        assert third not in (first, second)

        run("famfs", "upgrade", service.point, host=service.host, seconds=LIMIT)
        load.wait_for(5)
        assert service.show("MainPID") == third
        assert service.show("ActiveState") == "active"
    status = json.loads(here("famfs", "status", "--json", service.point, host=service.host).out)
    assert status["takeovers"] == 4
    assert set(load.errors) <= {"EIO"}
    assert len(load.errors) <= status["failed_at_takeover"]
    assert status["failed_at_takeover"] == 0 or not kernel_sends_again()

    service.systemctl("stop")
    assert mounts() == []
    assert (service.show("ActiveState"), service.show("Result")) == ("inactive", "success")
