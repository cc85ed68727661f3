# SPDX-License-Identifier: Apache-2.0
"""famfs doctor names the missing piece and the command that mends it."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from commands import Device, host_file, run, run_as_nobody
from famfs_server.cli import doctor
from famfs_server.cli.doctor import BAD, GOOD, NOTE, Finding, System
from famfs_server.dax import hostid
from golden import GoldenImages
from schemas import conform


def host(root: Path, release: str = "6.18.0") -> dict[str, Finding]:
    """What doctor finds on a host whose files lie below `root`."""
    return {finding.name: finding for finding in doctor.examine_host(System(root, release))}


def about(path: Path) -> dict[str, Finding]:
    """What doctor finds about a device."""
    return {finding.name: finding for finding in doctor.examine_device(str(path), System())}


def test_a_host_with_everything(tmp_path: Path) -> None:
    for name in ("dev/fuse", "proc/kallsyms"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sys/bus/dax/devices/dax0.0").mkdir(parents=True)
    found = host(tmp_path)
    assert found["kernel"].state == GOOD
    assert found["/dev/fuse"].state == GOOD
    assert found["dax devices"] == Finding("dax devices", GOOD, "dax0.0")
    assert found["extent maps"].state == NOTE
    assert "fmap=auto" in found["extent maps"].what


def test_what_a_host_can_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = host(tmp_path, "5.1.21")
    assert found["kernel"].state == BAD
    assert found["/dev/fuse"] == Finding("/dev/fuse", BAD, "does not exist: the module is not loaded", "modprobe fuse")
    assert found["dax devices"].mend.startswith("modprobe device_dax")
    (tmp_path / "sys/bus/dax/drivers/device_dax").mkdir(parents=True)
    assert "daxctl list" in host(tmp_path)["dax devices"].what
    assert host(tmp_path, "6.1.0-18-amd64")["kernel"].state == NOTE
    assert host(tmp_path)["extent maps"].what.startswith("cannot be seen")
    bad = tmp_path / "bad-uuid"
    bad.write_text("no uuid")
    monkeypatch.setenv(hostid.ENVIRONMENT, str(bad))
    assert host(tmp_path)["system UUID"].state == BAD
    assert str(bad) in host(tmp_path)["system UUID"].mend
    monkeypatch.setenv(hostid.ENVIRONMENT, str(tmp_path / "absent"))
    assert host(tmp_path)["system UUID"].state == NOTE
    assert not (tmp_path / "absent").exists()


def test_a_device_that_can_be_mounted(device: Device) -> None:
    found = about(device.path)
    assert {name: finding.state for name, finding in found.items()} == {
        "device": GOOD, "file system": GOOD, "owner": GOOD, "use": GOOD,
    }  # fmt: skip


def test_what_a_device_can_lack(tmp_path: Path, make_device: Callable[..., Device]) -> None:
    assert about(tmp_path / "nope")["device"].mend == "daxctl list; daxctl create-device"
    assert "not a dax device" in about(Path("/dev/null"))["device"].what
    blank = make_device("blank")
    assert about(blank.path)["file system"] == Finding(
        "file system", BAD, "no famfs superblock found", f"mkfs.famfs {blank.path}"
    )
    (tmp_path / "odd").write_bytes(b"x" * 5000)
    assert "multiple of 2 MiB" in about(tmp_path / "odd")["device"].what


@pytest.mark.parametrize(
    ("name", "which", "cause"),
    [
        ("06-bad-sb-crc", "file system", "checksum is wrong"),
        ("06b-bad-log-header-crc", "log", "log header's checksum is wrong"),
        ("06c-killed-sb", "file system", "no famfs superblock"),
    ],
)
def test_damaged_file_systems(vectors: GoldenImages, tmp_path: Path, name: str, which: str, cause: str) -> None:
    finding = about(vectors.build(name, tmp_path))[which]
    assert finding.state == BAD
    assert cause in finding.what
    assert "mkfs.famfs" in finding.mend


def test_another_version_and_a_foreign_owner(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in host_file(tmp_path, UUID(int=5)).items():
        monkeypatch.setenv(variable, value)
    assert about(device.path)["owner"].state == NOTE
    assert "not this one" in about(device.path)["owner"].what
    with device.path.open("r+b") as image:
        image.seek(8)
        image.write((77).to_bytes(4, "little"))
    finding = about(device.path)["file system"]
    assert "version 77" in finding.what
    assert "tools that made it" in finding.mend


def test_famfs_mode_needs_a_famfs_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    symbols = tmp_path / "proc/kallsyms"
    symbols.write_text("0000000000000000 t fuse_file_open\t[fuse]\n")
    finding = doctor.famfs_mode("/dev/dax0.0", System(tmp_path))
    assert finding.state == BAD
    assert "-m devdax dax0.0" in finding.mend
    symbols.unlink()
    assert doctor.famfs_mode("/dev/dax0.0", System(tmp_path)).state == GOOD


def test_the_command(device: Device, tmp_path: Path) -> None:
    good = conform(run("famfs", "doctor", "--json", device.path).out, "doctor")
    assert good["ready"] or os.geteuid() != 0
    outcome = run("famfs", "doctor", tmp_path / "nope")
    assert outcome.status == 1
    assert "missing  device: " in outcome.out
    assert "         -> daxctl list" in outcome.out
    assert conform(run("famfs", "doctor", "--json", tmp_path / "nope").out, "doctor")["ready"] is False


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")
def test_somebody_who_may_look_at_nothing(device: Device, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    device.path.chmod(0o600)
    tmp_path.chmod(0o755)
    run("famfs", "doctor", device.path)
    environment = {hostid.ENVIRONMENT: str(private / "uuid")}
    found = conform(run_as_nobody("famfs", "doctor", "--json", device.path, env=environment).out, "doctor")
    missing = {finding["name"] for finding in found["findings"] if finding["state"] == BAD}
    assert {"privileges", "system UUID"} <= missing
    assert missing & {"device", "permission"}


def test_devices_of_sysfs_are_listed(tmp_path: Path) -> None:
    from famfs_server.cli import listing

    bus = tmp_path / "bus/dax"
    for name, driver in (("dax0.0", "kmem"), ("dax1.0", ""), ("dax2.0", "fsdev_dax")):
        (bus / "devices" / name).mkdir(parents=True)
        (bus / "devices" / name / "size").write_text("4294967296\n")
        if driver:
            (bus / "drivers" / driver).mkdir(parents=True)
            (bus / "devices" / name / "driver").symlink_to(bus / "drivers" / driver)
    mount = listing.Mount("/dev/dax2.0", "/mnt", "master", "fmap", str(UUID(int=7)), "serving")
    [mounted] = [row for row in listing.list_devices([mount], tmp_path) if row.mode == "famfs"]
    assert (mounted.content, mounted.uuid) == (f"famfs {UUID(int=7)}", str(UUID(int=7)))
    assert mounted.mounted_on == ["/mnt"]
    rows = listing.list_devices([], tmp_path)
    assert rows[2].content == "what is on it can be seen when it is mounted"
    assert [(row.path, row.mode, row.size) for row in rows] == [
        ("/dev/dax0.0", "system-ram", 4 << 30),
        ("/dev/dax1.0", "no driver", 4 << 30),
        ("/dev/dax2.0", "famfs", 4 << 30),
    ]
