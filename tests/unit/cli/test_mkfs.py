# SPDX-License-Identifier: Apache-2.0
"""mkfs.famfs from the outside: what it accepts, refuses, writes and says (format 4, smoke test prepare.sh)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from commands import GIB, Device, host_file, run
from famfs_server.dax.device import Lock

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mkfs.famfs needs root")

Make = Callable[..., Device]
FS_UUID = "12345678-1234-4234-8234-123456789abc"


def log_length(device: Device) -> str:
    out = run("famfs", "fsck", "-v", device.path).out
    return next(line.split()[1] for line in out.splitlines() if "log_len" in line)


def test_a_blank_device_becomes_a_file_system(make_device: Make, host: UUID) -> None:
    device = make_device()
    outcome = run("mkfs.famfs", "-U", FS_UUID, device.path)
    assert outcome.status == 0
    assert outcome.err == ""
    for text in (FS_UUID, str(host), str(4 * GIB), str(8 << 20)):
        assert text in outcome.out
    with device.volume() as volume:
        assert volume.superblock.uuid == UUID(FS_UUID)
        assert volume.superblock.system_uuid == host
        assert volume.superblock.device_path == str(device.path)[:64]


@pytest.mark.parametrize("options", [(), ("-v",), ("-F",), ("--fuse",), ("-k",)])
def test_a_file_system_is_not_overwritten_without_force(device: Device, options: tuple[str, ...]) -> None:
    before = device.head()
    outcome = run("mkfs.famfs", *options, device.path)
    assert outcome.status == 2
    assert outcome.error.startswith("mkfs.famfs: ")
    assert device.head() == before


@pytest.mark.parametrize("options", [("-f",), ("-v", "-f"), ("-fv",), ("--force", "--verbose"), ("-D", "-f")])
def test_force_makes_it_anew(device: Device, options: tuple[str, ...]) -> None:
    before = device.head()
    assert run("mkfs.famfs", *options, device.path).status == 0
    assert device.head() != before


def test_another_hosts_file_system_needs_force(device: Device, tmp_path: Path) -> None:
    other = host_file(tmp_path, UUID(int=99))
    before = device.head()
    outcome = run("mkfs.famfs", device.path, env=other)
    assert outcome.status == 2
    assert "owned by another host" in outcome.error
    assert device.head() == before
    assert run("mkfs.famfs", "-f", device.path, env=other).status == 0


def test_kill_and_what_comes_after(device: Device) -> None:
    before = device.head()
    assert run("mkfs.famfs", "-k", device.path).status == 2
    assert run("mkfs.famfs", "-f", "-k", device.path).status == 0
    assert device.head() == bytes(8) + before[8:]
    assert run("famfs", "fsck", device.path).status == 1
    assert run("mkfs.famfs", device.path).status == 0


def test_kill_without_force_is_an_ordinary_mkfs(make_device: Make) -> None:
    """As in the reference: a device that has a superblock is left alone (above), a blank one is formatted."""
    device = make_device()
    assert run("mkfs.famfs", "-k", device.path).status == 0
    assert run("famfs", "fsck", device.path).status == 0


def test_lengths_of_the_log(device: Device) -> None:
    for length in ("1", "1m", "11m", "7m", "0", "0x800001"):
        outcome = run("mkfs.famfs", "-f", "--loglen", length, device.path)
        assert outcome.status == 2
        assert "invalid log length" in outcome.error
        assert log_length(device) == "8388608"
    assert run("mkfs.famfs", "-f", "--loglen", "256m", device.path).status == 0
    assert log_length(device) == "268435456"
    assert run("mkfs.famfs", "-f", "-l", "4g", device.path).status == 2
    assert log_length(device) == "268435456"
    assert run("mkfs.famfs", "-f", device.path).status == 0
    assert log_length(device) == "8388608"


@pytest.mark.parametrize("length", ["-1", "8mb", "9999999999999999999g", "", "1e7"])
def test_absurd_log_lengths_are_usage_errors(device: Device, length: str) -> None:
    before = device.head()
    outcome = run("mkfs.famfs", "-f", f"--loglen={length}", device.path)
    assert outcome.status == 1
    assert outcome.error.startswith("mkfs.famfs: Invalid value for '-l'")
    assert device.head() == before


@pytest.mark.parametrize("force", [(), ("-f",)])
def test_the_smallest_device(make_device: Make, force: tuple[str, ...]) -> None:
    small = make_device("small", 4 * GIB - (2 << 20))
    outcome = run("mkfs.famfs", *force, small.path)
    assert outcome.status == 2
    assert "<4GiB" in outcome.error
    assert small.head() == bytes(10 << 20)


def test_what_is_no_device(tmp_path: Path, make_device: Make) -> None:
    odd = make_device("odd", 4 * GIB + 4096)
    (tmp_path / "fifo.d").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path, words in (
        (tmp_path / "absent", "No such file"),
        (tmp_path / "fifo.d", "not a dax device"),
        (tmp_path / "loop", "symbolic links"),
        (Path("/dev/null"), "not a dax device"),
        (odd.path, "multiple of 2 MiB"),
    ):
        outcome = run("mkfs.famfs", "-f", path)
        assert outcome.status == 2
        assert words in outcome.error
    assert odd.head() == bytes(10 << 20)


def test_a_device_in_use_is_refused(device: Device) -> None:
    before = device.head()
    for options in (("-f",), ("-f", "-k")):
        with device.locked(Lock.MOUNTED, exclusive=False):
            outcome = run("mkfs.famfs", *options, device.path)
        assert outcome.status == 2
        assert "cannot mkfs while" in outcome.error
        assert device.head() == before
    assert run("mkfs.famfs", "-f", device.path).status == 0


def test_emulated_device_has_no_mode(device: Device) -> None:
    before = device.head()
    outcome = run("mkfs.famfs", "-f", "-M", device.path)
    assert outcome.status == 2
    assert "is not a dax device and has no mode" in outcome.error
    assert device.head() == before


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_host_without_a_uuid_changes_nothing(device: Device, tmp_path: Path, content: bytes | None) -> None:
    before = device.head()
    path = tmp_path / "broken"
    path.mkdir() if content is None else path.write_bytes(content)
    outcome = run("mkfs.famfs", "-f", device.path, env={"FAMFS_SYSTEM_UUID_FILE": str(path)})
    assert outcome.status == 2
    assert str(path) in outcome.error
    assert device.head() == before


def test_only_root_may(device: Device) -> None:
    before = device.head()
    read_end, write_end = os.pipe()
    # Forked, since the user to become may not be able to import anything here.
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        outcome = run("mkfs.famfs", "-f", device.path)
        os.write(write_end, f"{outcome.status} {outcome.err}".encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"1 mkfs.famfs: must run as root\n"
    os.waitpid(pid, 0)
    assert device.head() == before


def test_the_program_in_a_process_of_its_own(make_device: Make) -> None:
    device = make_device()
    code = "from famfs_server.cli import mkfs; mkfs.main()"
    for status in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(device.path)], capture_output=True, timeout=30, check=False
        )
        assert done.returncode == status
