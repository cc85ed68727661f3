# SPDX-License-Identifier: Apache-2.0
"""`famfs doctor` on real devices: of every fault that can be made here it names the piece that is missing, and the
mend.

It runs in this process, or in a child of it without root's rights.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import UUID

import pytest

import commands
from famfs_server.cli.doctor import BAD, Finding, System, examine_device
from famfs_server.dax import hostid
from famfs_server.dax.device import DaxDevice
from guest_modules import in_guest_only, with_kmem, without
from programs import here
from schemas import conform

SetMode = Callable[[str, str], Path]

DRIVERS = Path("/sys/bus/dax/drivers")


class Diagnosis:
    """What doctor says: of each thing what it has found."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = {finding.name: finding for finding in findings}

    @property
    def missing(self) -> dict[str, str]:
        """What is missing, in one line each: the fault and its mend."""
        return {name: f"{found.what} -> {found.mend}" for name, found in self.findings.items() if found.state == BAD}


def diagnosis(outcome: commands.Outcome) -> Diagnosis:
    """Of the whole command."""
    answer = conform(outcome.out, "doctor")
    assert outcome.status == (0 if answer["ready"] else 1)
    return Diagnosis(Finding(**found) for found in answer["findings"])


@pytest.fixture
def host(tmp_path: Path) -> Path:
    path = tmp_path / "system_uuid"
    path.write_text(str(UUID(int=7)))
    return path


@pytest.fixture
def doctor(host: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Diagnosis]:
    """`doctor(device)` as the host of this test: what it says of the device alone, since reading the kernel's symbols
    takes seconds in an emulated guest.
    """
    monkeypatch.setenv(hostid.ENVIRONMENT, str(host))
    return lambda device: Diagnosis(examine_device(str(device), System()))


@pytest.fixture
def device(dax_names: list[str], set_mode: SetMode) -> Path:
    """A devdax device that is large enough for a file system."""
    return set_mode(dax_names[-1], "devdax")


@pytest.fixture
def file_system(device: Path, host: Path) -> Path:
    """A device with a file system of this host."""
    here("mkfs.famfs", "-f", device, host=host)
    return device


def test_a_device_that_can_be_mounted(file_system: Path, host: Path) -> None:
    found = diagnosis(commands.run("famfs", "doctor", "--json", file_system, env={hostid.ENVIRONMENT: str(host)}))
    assert found.missing == {}
    assert found.findings["owner"].what.startswith("this host")
    assert file_system.name in found.findings["dax devices"].what


def test_no_driver_is_bound(dax_names: list[str], set_mode: SetMode, doctor: Callable[[Path], Diagnosis]) -> None:
    name = dax_names[-1]
    (fault,) = doctor(set_mode(name, "unbound")).missing.items()
    assert fault[0] == "driver"
    assert "has no driver bound" in fault[1]
    assert f"-> echo {name} > /sys/bus/dax/drivers/device_dax/bind (or .../new_id)" in fault[1]
    # What it says helps.
    set_mode(name, "devdax")
    assert "driver" not in doctor(Path("/dev", name)).missing


def test_the_module_is_absent(dax_names: list[str], set_mode: SetMode, doctor: Callable[[Path], Diagnosis]) -> None:
    in_guest_only()
    for name in dax_names:
        set_mode(name, "unbound")
    name = dax_names[-1]
    with without("device_dax"):
        assert doctor(Path("/dev", name)).missing == {
            "driver": f"/dev/{name} has no driver bound, and device_dax is not loaded -> "
            f"modprobe device_dax && daxctl enable-device {name}"
        }


def test_system_ram_mode(dax_names: list[str], set_mode: SetMode, doctor: Callable[[Path], Diagnosis]) -> None:
    in_guest_only()
    for name in dax_names:
        set_mode(name, "devdax")
    name = dax_names[0]
    with with_kmem():
        found = doctor(set_mode(name, "system-ram"))
        set_mode(name, "devdax")
    assert found.missing == {
        "driver": f"/dev/{name} is in system-ram mode -> daxctl reconfigure-device -m devdax {name}"
    }
    assert "driver" not in doctor(Path("/dev", name)).missing


def test_famfs_mode(dax_names: list[str], set_mode: SetMode, doctor: Callable[[Path], Diagnosis]) -> None:
    name = dax_names[-1]
    found = doctor(set_mode(name, "fsdev"))
    if not found.missing:
        pytest.skip("a famfs kernel")
    assert list(found.missing) == ["driver"]
    assert "is in famfs mode, which only a kernel with famfs can use, and this one is none" in found.missing["driver"]
    assert f"daxctl reconfigure-device -m devdax {name}" in found.missing["driver"]


def test_permission(file_system: Path, host: Path) -> None:
    """Of somebody who is not root, for whom neither the device nor the privileges are there."""
    environment = {hostid.ENVIRONMENT: str(host)}
    commands.run("famfs", "doctor", "--json", file_system, env=environment)
    found = diagnosis(commands.run_as_nobody("famfs", "doctor", "--json", file_system, env=environment))
    assert found.missing["permission"] == (
        f"{file_system} may not be read and written -> run as root, or chown {file_system}"
    )
    assert "CAP_SYS_ADMIN" in found.missing["privileges"]


def test_another_host_owns_it(file_system: Path, host: Path, doctor: Callable[[Path], Diagnosis]) -> None:
    host.write_text(str(UUID(int=8)))
    found = doctor(file_system)
    assert found.missing == {}
    assert found.findings["owner"].what.startswith(f"host {UUID(int=7)}, not this one")


def test_another_version_of_the_format(file_system: Path, doctor: Callable[[Path], Diagnosis]) -> None:
    with DaxDevice.open(str(file_system)) as opened:
        memory = opened.memory()
        memory.write(8, (77).to_bytes(4, "little"))
        memory.close()
    found = doctor(file_system)
    assert list(found.missing) == ["file system"]
    assert "version 77" in found.missing["file system"]
    assert f"use the tools that made it, or mkfs.famfs -f {file_system}" in found.missing["file system"]


def test_no_file_system(device: Path, doctor: Callable[[Path], Diagnosis]) -> None:
    with DaxDevice.open(str(device)) as opened:
        memory = opened.memory()
        memory.write(0, bytes(4096))
        memory.close()
    assert doctor(device).missing == {"file system": f"no famfs superblock found -> mkfs.famfs {device}"}


def test_a_device_that_was_bound_again_while_it_was_open(
    dax_names: list[str], set_mode: SetMode, doctor: Callable[[Path], Diagnosis]
) -> None:
    name = dax_names[-1]
    number = os.open(set_mode(name, "devdax"), os.O_RDWR)
    set_mode(name, "unbound")
    (DRIVERS / "device_dax/new_id").write_text(name)
    os.close(number)
    found = doctor(Path("/dev", name))
    assert list(found.missing) == ["driver"]
    assert "its driver was unbound while it was in use" in found.missing["driver"]
    assert f"daxctl disable-device {name}" in found.missing["driver"]
