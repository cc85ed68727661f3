# SPDX-License-Identifier: Apache-2.0
"""What the units run: unmount or leave alone, by what systemd is at; and what udev is told of a device."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from famfs_server.cli import unit
from famfs_server.fuse import mountapi
from famfs_server.fuse.mountapi import MountRecord

UNIT, PLACE = "famfs@dev-dax0.0.service", "/mnt/famfs"


class Machine:
    """Notes what is done to the one mount there is, and plays systemctl."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.done: list[str] = []
        self._program = directory / "systemctl"
        monkeypatch.setenv("PATH", str(directory), prepend=":")
        monkeypatch.delenv("MAINPID", raising=False)
        record = MountRecord(1, 1, 42, "/", PLACE, (), "fuse.famfs", "/dev/dax0.0", ())
        monkeypatch.setattr(mountapi, "find_mounts", lambda *, mount_point: [record] if mount_point == PLACE else [])
        monkeypatch.setattr(mountapi, "unmount", lambda path, lazy=False: self.done.append(f"unmount {path} {lazy}"))
        monkeypatch.setattr(unit, "detach", lambda path, device: self.done.append(f"detach {path} {device}"))
        self.job("")

    def job(self, kind: str) -> None:
        """What systemd is at."""
        line = f"  17 {UNIT} {kind} running" if kind else ""
        self._program.write_text(f"#!/bin/sh\necho '  16 other.service stop waiting'\necho '{line}'\n")
        self._program.chmod(0o755)

    def run(self, *words: str) -> list[str]:
        """Run famfs-unit; what it has done."""
        self.done.clear()
        result = CliRunner().invoke(unit.command, words, catch_exceptions=False, standalone_mode=False)
        assert result.exception is None
        return [*self.done]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.mark.parametrize(("job", "done"), [("stop", [f"unmount {PLACE} False"]), ("restart", []), ("", ["unmount"])])
def test_stop(machine: Machine, job: str, done: list[str]) -> None:
    machine.job(job)
    assert [line[: len(wanted)] for line, wanted in zip(machine.run("stop", UNIT, PLACE), done, strict=True)] == done


@pytest.mark.parametrize(
    ("job", "result", "detached"),
    [
        ("restart", "success", False),
        ("restart", "signal", False),
        ("", "signal", False),
        ("", "watchdog", False),
        ("", "exit-code", False),
        ("", "success", True),
        ("stop", "success", True),
        ("stop", "timeout", True),
    ],
)
def test_stopped(machine: Machine, monkeypatch: pytest.MonkeyPatch, job: str, result: str, detached: bool) -> None:
    machine.job(job)
    monkeypatch.setenv("SERVICE_RESULT", result)
    assert machine.run("stopped", UNIT, PLACE) == ([f"detach {PLACE} 42"] if detached else [])


def test_given_up(machine: Machine) -> None:
    machine.job("restart")
    assert machine.run("given-up", PLACE) == [f"detach {PLACE} 42"]
    assert machine.run("given-up", "/mnt/other") == []


def test_identify(tmp_path: Path) -> None:
    from harness import format_device

    device = format_device(tmp_path / "device")
    result = CliRunner().invoke(unit.command, ["identify", str(device)], standalone_mode=False)
    properties = dict(line.split("=") for line in result.stdout.splitlines())
    assert properties["ID_FS_TYPE"] == "famfs"
    assert len(properties["ID_FS_UUID"]) == 36
    assert result.return_value == 0
    blank = tmp_path / "blank"
    with blank.open("wb") as image:
        image.truncate(4 << 30)
    for other in (blank, tmp_path / "absent", Path("/dev/zero")):
        result = CliRunner().invoke(unit.command, ["identify", str(other)], standalone_mode=False)
        assert (result.return_value, result.stdout) == (1, "")


def test_systemctl_that_is_missing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert machine.run("stop", UNIT, PLACE) == [f"unmount {PLACE} False"]
