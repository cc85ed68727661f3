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

# In namespaces of its own: what is mounted and what runs in there ends with it.
ENTER = """
root=$1
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 dev "$root/dev"
for name in null zero full random urandom fuse; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs shm "$root/dev/shm"
mount -t tmpfs run "$root/run"
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive sh -c "$2"
"""

TRIAL = """
set -ex
tree() { find / -xdev \\( -path /proc -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache \\
    -o -path /var/log -o -path /tmp \\) -prune -o -print | sort; }
tree >/tmp/before
dpkg -i /tmp/famfs-server.deb
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


@pytest.mark.timeout(1500)
def test_debian_package(tmp_path: Path) -> None:
    for program in ("mmdebstrap", "dpkg-shlibdeps"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    subprocess.run([ROOT / "scripts/package", "deb"], check=True, timeout=600)
    (package,) = (ROOT / "dist").glob("famfs-server_*.deb")
    if shutil.which("lintian"):
        lint = ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)]
        done = subprocess.run(lint, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout
    release = next(
        line.partition("=")[2] for line in Path("/etc/os-release").read_text().split("\n") if "CODENAME" in line
    )
    show = ["dpkg-deb", "-f", str(package), "Depends"]
    depends = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    needed = ["mount", *(word.split()[0] for word in depends.split(", "))]
    root = tmp_path / "root"
    make = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(sorted({*needed}))}", release, str(root)]
    subprocess.run(make, check=True, timeout=600)
    try:
        shutil.copy(package, root / "tmp/famfs-server.deb")
        enter = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "bash",
            "-ec",
            ENTER,
            "bash",
            str(root),
            TRIAL,
        ]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        shutil.rmtree(root, ignore_errors=True)
