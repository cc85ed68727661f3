# SPDX-License-Identifier: Apache-2.0
"""What is settled before anybody sees a mount: capabilities first, then the data path."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from harness import File, Site, hidden_connections, populate, run, succeed, wait_for

pytestmark = pytest.mark.timeout(60)

FAMFS_KERNEL = Path("/sys/module/fuse/parameters/famfs").exists()
needs_plain_kernel = pytest.mark.skipif(FAMFS_KERNEL, reason="this kernel has famfs")


@pytest.fixture
def device(site: Site) -> Path:
    path = site.format()
    populate(path, files=[File("hello", b"hello, world\n")])
    return path


@needs_plain_kernel
def test_extent_maps_required(site: Site, device: Path) -> None:
    before = hidden_connections(site.connections)
    done = site.host().mount(device, site.place("mnt"), "fmap=require")
    assert done.returncode == 32
    (line,) = done.stderr.splitlines()
    assert "fmap=require" in line
    assert "FUSE_DAX_FMAP" in line
    assert site.mounts() == []
    assert str(site.directory) not in Path("/proc/mounts").read_text()
    assert wait_for(lambda: hidden_connections(site.connections) <= before)
    # A dead mount would answer "Transport endpoint is not connected".
    assert succeed("ls", "-A", site.place("mnt")) == ""
    with site.mounted(device) as mount:
        assert succeed("cat", mount / "hello") == "hello, world\n"


@needs_plain_kernel
def test_extent_maps_wished_for(site: Site, device: Path) -> None:
    with site.mounted(device, "fmap=auto") as mount:
        (line,) = mount.warnings.splitlines()
        assert "FUSE_DAX_FMAP" in line
        assert "not coherent" in line


def test_extent_maps_not_wanted(site: Site, device: Path) -> None:
    with site.mounted(device, "fmap=never") as mount:
        assert mount.warnings == ""


DROPPED = {
    "bounding set": ("setpriv", "--bounding-set=-sys_rawio", "--inh-caps=-sys_rawio", "--"),
    "capsh": ("capsh", "--drop=cap_sys_rawio", "--", "-c", 'exec "$0" "$@"'),
}


@pytest.mark.parametrize("how", DROPPED)
def test_without_rawio_nothing_is_opened(site: Site, device: Path, how: str) -> None:
    trace = site.directory / "trace"
    place = site.place("mnt")
    strace = ("strace", "-f", "-e", "trace=open,openat,openat2,fsopen,mount", "-o", str(trace))
    done = site.host().mount(device, place, prefix=(*strace, *DROPPED[how]))
    assert done.returncode not in (0, 139)
    (line,) = done.stderr.splitlines()
    assert "CAP_SYS_RAWIO" in line
    assert site.mounts() == []
    opened = re.findall(r'"((?:[^"\\]|\\.)*)"', trace.read_text())
    assert any(name.endswith("/mount.py") or "famfs_server" in name for name in opened), (
        "the trace is of something else"
    )
    assert "/dev/fuse" not in opened
    assert str(device) not in opened
    assert "fsopen" not in trace.read_text()
    assert "mount(" not in trace.read_text()


def test_the_trace_would_show_the_opening(site: Site, device: Path) -> None:
    """The test above is worth nothing unless the same trace of a mount that works names /dev/fuse."""
    trace = site.directory / "trace"
    place = site.place("mnt")
    strace = ("strace", "-f", "--daemonize", "-e", "trace=open,openat,openat2,fsopen", "-o", str(trace))
    host = site.host()
    # strace lives as long as the daemon and would keep pipes open.
    done = run(
        *strace,
        *host.mount_command(device, place),
        env=host.environment,
        capture_output=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    text = trace.read_text()
    assert text.index(str(device)) < text.index('"/dev/fuse"') < text.index("fsopen(")
    succeed("umount", place)
    assert wait_for(lambda: not site.processes())


def test_without_admin(site: Site, device: Path) -> None:
    done = site.host().mount(device, site.place("mnt"), prefix=("setpriv", "--bounding-set=-sys_admin", "--"))
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "CAP_SYS_ADMIN" in line


def test_in_a_user_namespace_of_its_own(site: Site, device: Path) -> None:
    if run("unshare", "-Ur", "true").returncode:
        pytest.skip("user namespaces are not allowed here")
    done = site.host().mount(device, site.place("mnt"), prefix=("unshare", "-Urm", "--"))
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "user namespace" in line
    assert os.listdir(site.place("mnt")) == []
