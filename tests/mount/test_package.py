# SPDX-License-Identifier: Apache-2.0
"""The Debian package: built, installed in a fresh Debian, used by mount(8), removed, purged."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not os.environ.get("FAMFS_TEST_LONG"), reason="installs a Debian of its own, in some minutes: with --long only"
)

TRIAL = """
set -ex
tree() { find / -xdev \\( -path /proc -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache \\
    -o -path /var/log -o -path /tmp \\) -prune -o -print | sort; }
tree >/tmp/before
dpkg -i dist/trial.deb
famfs --version
truncate -s 4G /dev/shm/device
mkfs.famfs --loglen 8m /dev/shm/device
mkdir /mnt/famfs
mount -t famfs /dev/shm/device /mnt/famfs
cp /etc/passwd /mnt/famfs/
cmp /etc/passwd /mnt/famfs/passwd
! dpkg --remove famfs-server
umount /mnt/famfs
fsck.famfs /dev/shm/device
touch /etc/famfs/dev-dax0.0.conf
rmdir /mnt/famfs
dpkg --remove famfs-server
test -e /etc/famfs/dev-dax0.0.conf
dpkg --purge famfs-server
tree >/tmp/after
diff /tmp/before /tmp/after >/tmp/left || true
test "$(cat /tmp/left | grep -c '^[<>]')" = 2
grep -qx '> /opt/famfs/system_uuid' /tmp/left
"""


def release_of_this_machine() -> str:
    """Its name, such as bookworm."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line.partition("=")[2] for line in lines if line.startswith("VERSION_CODENAME="))


def debian(*words: str, timeout: float) -> None:
    """Run a command in a Debian of its own, which has to succeed."""
    done = subprocess.run(
        [ROOT / "scripts/debian", *words], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_debian_package(release: str) -> None:
    for program in ("mmdebstrap", "dpkg-shlibdeps"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if release == release_of_this_machine():
        subprocess.run([ROOT / "scripts/package", "deb"], check=True, timeout=600)
    else:
        debian(release, "scripts/package", "deb", timeout=1200)
    (package,) = (ROOT / "dist").glob("famfs-server_*.deb")
    if shutil.which("lintian"):
        lint = ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)]
        done = subprocess.run(lint, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout
    show = ["dpkg-deb", "-f", str(package), "Depends"]
    depends = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    needed = sorted({"mount", *(word.split()[0] for word in depends.split(", "))})
    trial = ROOT / "dist/trial.deb"
    package.rename(trial)
    try:
        debian("--only", ",".join(needed), release, "sh", "-c", TRIAL, timeout=1200)
    finally:
        trial.unlink()
