# SPDX-License-Identifier: Apache-2.0
"""scripts/install in a folder: what is where afterwards, and what systemd thinks of it."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from harness import format_device

ROOT = Path(__file__).parents[2]
VENV = Path(sys.executable).parent.parent
UNITS = "usr/local/lib/systemd/system"

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def install(*options: str) -> None:
    done = subprocess.run([ROOT / "scripts/install", *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("root")
    install("--root", str(path), "--venv", str(VENV))
    return path


def test_the_checkout_need_not_be_set_up(tmp_path: Path) -> None:
    """What runs is the installed package, and not the one of the folder, whose extensions may not have been built."""
    checkout = tmp_path / "checkout"
    for name in ("scripts", "systemd", "famfs_server"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    words = [checkout / "scripts/install", "--root", tmp_path / "root", "--venv", VENV]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "root/usr/local/share/man/man8/famfs.8").exists()


def analyze(root: Path, *words: str) -> str:
    """What systemd-analyze says, with its exit status as the last line."""
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{root / UNITS}:"}
    command = ["systemd-analyze", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    return f"{done.stdout}{done.stderr}{done.returncode}"


@pytest.mark.parametrize("unit", ["famfs@dev-dax0.0.service", "famfs-detach@dev-dax0.0.service"])
def test_units_are_valid(root: Path, unit: str) -> None:
    assert analyze(root, "verify", "--man=no", unit) == "0"


def test_example_of_a_mount_unit_is_valid(root: Path) -> None:
    assert analyze(root, "verify", "--man=no", str(ROOT / "systemd/mnt-famfs.mount")) == "0"


def test_exposure(root: Path) -> None:
    # A service whose mount all are to see cannot have a mount namespace; what is left is at most this much.
    said = analyze(root, "security", "--offline=true", "--no-pager", "famfs@dev-dax0.0.service")
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", said)[1]) < 4.5  # type: ignore[index]
    for setting in ("PrivateMounts", "ProtectSystem", "PrivateTmp", "PrivateDevices", "ProtectHome"):
        assert setting not in (root / UNITS / "famfs@.service").read_text()


def test_udev_rule(root: Path) -> None:
    """The program of the rule says what the rule asks for."""
    rule = (root / "etc/udev/rules.d/90-famfs.rules").read_text()
    program, verb = re.search(r'IMPORT\{program\}="(\S+) (\S+) \$devnode"', rule).groups()  # type: ignore[union-attr]
    device = format_device(root / "device")
    done = subprocess.run([program, verb, device], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for name, wanted in re.findall(r'ENV\{(\w+)\}=="([^"]+)"', rule):
        assert fnmatchcase(said[name], wanted), name
    link = re.search(r'SYMLINK\+="([^"]+)"', rule)[1]  # type: ignore[index]
    assert re.sub(r"\$env\{(\w+)\}", lambda found: said[found[1]], link) == f"famfs/by-uuid/{said['ID_FS_UUID']}"
    assert 'TAG+="systemd"' in rule


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None or os.geteuid() != 0, reason="needs systemd-tmpfiles")
def test_folders_at_boot(root: Path) -> None:
    """With a root of its own that has no users but root."""
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    for number in range(2):
        words = ["systemd-tmpfiles", f"--root={root}", "--create", str(root / "etc/tmpfiles.d/famfs.conf")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, ""), number
        assert (root / "run/famfs").stat().st_mode & 0o7777 == 0o700
        assert (root / "etc/famfs").stat().st_mode & 0o7777 == 0o755


def test_again_and_away(tmp_path: Path) -> None:
    def tree() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    # An empty folder of others, and one that others put something into.
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    options = ["--root", str(tmp_path), "--venv", str(VENV)]
    install(*options)
    (tmp_path / "etc/udev/rules.d/99-other.rules").touch()
    before = tree()
    assert {"sbin/mount.famfs", "sbin/umount.fuse.famfs", "usr/local/bin/famfs", f"{UNITS}/famfs@.service"} <= {*before}
    assert not any("@bindir@" in path.read_text() for path in tmp_path.rglob("*.service"))
    # Of a former version.
    manifest = tmp_path / "usr/local/lib/famfs/manifest"
    former = tmp_path / "usr/local/bin/famfs-former"
    former.touch()
    manifest.write_text(f"{manifest.read_text()}{former}\n")
    install(*options)
    assert tree() == before
    install("--uninstall", "--root", str(tmp_path))
    assert tree() == [
        *("etc", "etc/udev", "etc/udev/rules.d", "etc/udev/rules.d/99-other.rules"),
        *("usr", "usr/local", "usr/local/bin"),
    ]


def test_places_of_a_package(tmp_path: Path) -> None:
    install("--destdir", str(tmp_path), "--prefix", "/usr", "--venv", str(VENV))
    assert {path.name for path in tmp_path.iterdir()} == {"usr"}
    for name in ("sbin/mount.famfs", "lib/udev/rules.d/90-famfs.rules", "lib/tmpfiles.d/famfs.conf"):
        assert (tmp_path / "usr" / name).exists()
    assert "ExecStart=/usr/bin/famfs-server" in (tmp_path / "usr/lib/systemd/system/famfs@.service").read_text()


def test_commands_of_the_units_run(root: Path) -> None:
    for unit in (root / UNITS).iterdir():
        for program in re.findall(r"^Exec\w+=(\S+)", unit.read_text(), re.M):
            done = subprocess.run([program, "--help"], capture_output=True, timeout=30, check=False)
            assert done.returncode == 0, done.stderr
