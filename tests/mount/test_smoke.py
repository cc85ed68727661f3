# SPDX-License-Identifier: Apache-2.0
"""The reference's smoke steps, by their names and in their order, with its commands, on an emulated device.

Sizes are smaller than there. What differs on purpose is in docs/compatibility.md. Each step is shown by a cheaper test,
too, which is named there.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import BIN, CLIENT_UUID, Host, Site, client, run, succeed, wait_for

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not LONG, reason="a process for each command takes minutes: FAMFS_TEST_LONG=1"),
]


class Smoke:
    """A host with one device, and what its user types."""

    def __init__(self, host: Host, folder: Path, device: Path, place: Path) -> None:
        self.host, self.folder, self.device, self.place = host, folder, device, place

    def status(self, words: str) -> int:
        """Run a command line: DEV, MPT and TMP stand for device, mount point and a folder."""
        names = {"DEV": self.device, "MPT": self.place, "TMP": self.folder}
        line = words.split()
        for name, path in names.items():
            line = [word.replace(name, str(path)) for word in line]
        program = BIN / line[0]
        done = self.host.run(program if program.exists() else line[0], *line[1:])
        # A signal is no status that a step may expect.
        assert 0 <= done.returncode < 128, (words, done.stderr)
        self.out, self.err = done.stdout, done.stderr
        return done.returncode

    def good(self, *lines: str) -> None:
        """Each of the command lines succeeds."""
        for line in lines:
            assert self.status(line) == 0, (line, self.err)

    def bad(self, *lines: str) -> None:
        """Each of the command lines fails."""
        for line in lines:
            assert self.status(line) != 0, line
            assert self.err, line

    def unmount(self) -> None:
        """Unmount. What else runs on the machine may have mount namespaces with copies of the mount: wait for them."""
        if self.status("famfs umount MPT") != 0:
            assert "another mount namespace" in self.err, self.err
            assert wait_for(lambda: self.status("fsck.famfs -n DEV") == 0, 90)

    def remount(self) -> None:
        """Unmount and mount again."""
        self.unmount()
        self.good("famfs mount DEV MPT")


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """In place of the fixture for all tests: what one step mounts the next one uses, and what is left behind the last
    one, the module's site tells."""


@pytest.fixture(scope="module")
def smoke(shared_site: Site, shared_memory_folder: Path) -> Iterator[Smoke]:
    """A blank device of 8 GiB; the steps of `prepare` make and mount a file system on it."""
    device = shared_memory_folder / "dax0.0"
    with device.open("wb") as image:
        image.truncate(8 << 30)
    folder = shared_memory_folder / "tmp"
    folder.mkdir()
    smoke = Smoke(shared_site.host(), folder, device, shared_site.place("mpt"))
    yield smoke
    if os.path.ismount(smoke.place):
        succeed("umount", smoke.place)


def test_prepare(smoke: Smoke) -> None:
    smoke.good("mkfs.famfs -h", "famfs -h", "famfs -h mount")
    smoke.bad("mkfs.famfs", "mkfs.famfs TMP/nope")
    smoke.good("mkfs.famfs DEV")
    smoke.bad("mkfs.famfs --kill DEV", "mkfs.famfs DEV")
    smoke.good("mkfs.famfs -f -k DEV", "mkfs.famfs DEV", "mkfs.famfs -v -f DEV")
    for length in ("1", "11m", "1m"):
        smoke.bad(f"mkfs.famfs -f --loglen {length} DEV")
        smoke.good("famfs fsck -v DEV")
        assert "log_len               8388608" in smoke.out
    smoke.good("mkfs.famfs -f --loglen 256m DEV", "famfs fsck -v DEV")
    assert "log_len               268435456" in smoke.out
    smoke.good("mkfs.famfs -f DEV", "famfs fsck -v DEV")
    assert "log_len               8388608" in smoke.out
    smoke.good("mkfs.famfs -f -k DEV")
    assert smoke.status("famfs mount DEV MPT") not in (0, 99)
    smoke.good("mkfs.famfs DEV", "famfs mount DEV MPT")
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(smoke.place) in line)
    assert line.startswith(f"{smoke.device} ")
    assert "famfs" in line
    assert (smoke.place / ".meta/.superblock").is_file()
    assert (smoke.place / ".meta/.log").is_file()
    smoke.good("famfs logplay MPT", "famfs fsck --human MPT")
    smoke.bad("mkfs.famfs -f DEV", "famfs mount DEV MPT")
    directory = os.fsdecode(os.getxattr(smoke.place, "user.famfs.shadow"))
    assert "icache_stats" in succeed("curl", "-s", "--unix-socket", f"{directory}/sock", "http://x/icache_stats")
    assert not list(Path("/tmp").glob("famfs_dummy_*"))


def test_0(smoke: Smoke) -> None:
    smoke.bad("famfs", "famfs creat", "famfs creat MPT/a", "famfs creat -s 4096 -S 1 MPT/a")
    smoke.bad("famfs creat -s 4096 MPT", "famfs creat -s 4096 TMP/outside")
    smoke.good("famfs creat -r -s 4096 -S 1 MPT/test1", "famfs verify -S 1 -f MPT/test1")
    smoke.bad("famfs verify -S 99 -f MPT/test1")
    smoke.good("famfs creat -M MPT/m1,64k,42 -M MPT/m2,1m,43 -M MPT/m3,4096,44")
    smoke.good("famfs verify -m MPT/m1,42 -m MPT/m2,43 -m MPT/m3,44")
    smoke.bad("famfs creat -s 4096 --multi MPT/x,4096 MPT/y", "famfs creat -M MPT/x", "famfs creat -M MPT/x,4096,1,1")
    smoke.bad("famfs creat -M MPT/good,4096,1 -M MPT/none/bad,4096,1")
    assert (smoke.place / "good").stat().st_size == 4096
    smoke.bad(*(f"famfs creat -t {count} -M MPT/t,4096,1" for count in (-1, 257, 999, 1000)))
    smoke.good(
        "famfs creat -r -s 4096 -S 1 MPT/test1", "famfs creat -s 4096 MPT/test1", "famfs creat -r -S 1 MPT/test1"
    )
    smoke.bad("famfs creat -s 8192 MPT/test1", "famfs creat -s 0 MPT/zero", "famfs mkdir")
    smoke.good("famfs creat -s 8k -m 0600 -u 1 -g 2 MPT/owned", "famfs mkdir -p -m 0700 -u 3 -g 4 MPT/dir/sub")
    for _ in range(2):
        facts = [smoke.place.joinpath(name).stat() for name in ("owned", "dir/sub")]
        assert [(found.st_mode & 0o7777, found.st_uid, found.st_gid) for found in facts] == [
            (0o600, 1, 2),
            (0o700, 3, 4),
        ]
        smoke.remount()
    smoke.good("famfs logplay -h", "famfs logplay -n MPT", "famfs logplay -rc MPT", "famfs logplay -m MPT")
    smoke.good("famfs logplay -vr MPT")
    smoke.bad("famfs logplay -rm MPT", "famfs logplay")
    smoke.good("famfs chkread -l MPT/.meta/.log", "famfs chkread -s MPT/.meta/.superblock", "famfs chkread -?")
    smoke.bad("famfs chkread", "famfs chkread -s TMP/none")
    smoke.good("famfs verify -m MPT/m1,42 -m MPT/m2,43 -m MPT/m3,44")
    smoke.bad("famfs mkmeta", "famfs mkmeta TMP/none")
    smoke.good("famfs mkmeta DEV", "famfs mkmeta DEV", "famfs check MPT")
    smoke.good("famfs flush -?", "famfs flush MPT/m1 MPT/m2 MPT/m3")
    smoke.bad("famfs flush", "famfs flush MPT/none", "famfs flush MPT/m1 MPT/dir", "famfs fsck")
    smoke.good("famfs fsck -?", "famfs fsck MPT", "famfs logplay --shadow TMP/shadow0 MPT")


def test_1(smoke: Smoke) -> None:
    smoke.bad("famfs fsck DEV", "famfs fsck /none/such", "famfs fsck none")
    smoke.unmount()
    smoke.good("famfs fsck DEV")
    smoke.bad("famfs fsck MPT")
    smoke.good("famfs mount DEV MPT", "famfs fsck MPT")
    smoke.good("famfs creat -r -s 8k -S 11 MPT/one", "famfs creat -r -s 8m -S 12 MPT/two")
    smoke.good("famfs cp MPT/one MPT/one.copy", "famfs verify -S 11 -f MPT/one.copy", "famfs verify -S 12 -f MPT/two")
    smoke.bad("famfs creat -s 4k -u -1 MPT/u", "famfs creat -s 4k -g -1 MPT/g")
    smoke.good("famfs mkdir MPT/d1", "famfs mkdir MPT//d1/./d2", "famfs mkdir -p MPT", "famfs mkdir -p MPT/p/q/r/s")
    smoke.bad("famfs mkdir MPT/d1", "famfs mkdir MPT/one", "famfs mkdir MPT", "famfs mkdir -p MPT/one/under")
    smoke.bad("famfs mkdir -p MPT/../../out/of/it")
    smoke.good(*(f"famfs cp MPT/two MPT/two{number}" for number in range(10)))
    Path("/proc/sys/vm/drop_caches").write_text("3")
    smoke.good("famfs verify " + " ".join(f"-m MPT/two{number},12" for number in range(10)))
    smoke.good("famfs cp MPT/two MPT/two0")
    smoke.bad("famfs cp MPT/one MPT/two0", "famfs cp MPT/none MPT/x", "famfs cp /dev/zero MPT/x")
    smoke.good("famfs cp -m 0640 -u 5 -g 6 MPT/one MPT/two MPT/p/q/r/s", "famfs verify -S 12 -f MPT/p/q/r/s/two")
    smoke.remount()
    assert (smoke.place / "p/q/r/s/one").stat().st_mode & 0o7777 == 0o640
    source = smoke.folder / "source"
    (source / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (source / name).write_bytes(os.urandom(5000))
    smoke.good("famfs mkdir MPT/flat")
    smoke.bad("famfs cp TMP/source/a TMP/source/inner MPT/flat")
    assert (smoke.place / "flat/a").stat().st_size == 5000
    smoke.good("famfs cp -r TMP/source MPT/tree", "diff -r TMP/source MPT/tree", "famfs cp -r -c TMP/source MPT/tree")
    (source / "inner/c").write_bytes(bytes(5000))
    smoke.bad(
        "famfs cp -r -c TMP/source MPT/tree", "famfs cp -r TMP/source MPT/one", "famfs cp -r TMP/source MPT/no/such"
    )
    (source / "empty").touch()
    smoke.bad("famfs cp TMP/source/empty MPT/empty")
    smoke.good("famfs cp TMP/source/b MPT/d1/", "famfs cp TMP/source/b MPT/d1/d2/.")
    smoke.good("famfs fsck -m MPT", "famfs fsck -vv MPT", "famfs fsck -r MPT", "famfs logplay -Ss TMP/shadow1 MPT")
    smoke.bad("famfs fsck -rm MPT")
    assert (smoke.folder / "shadow1/root/two").is_file()


def test_2(smoke: Smoke) -> None:
    names = [f"big{number}" for number in range(3)]
    smoke.good(*(f"famfs creat -r -s 16m -S {number + 70} MPT/{name}" for number, name in enumerate(names)))
    verify = "famfs verify " + " ".join(f"-m MPT/{name},{number + 70}" for number, name in enumerate(names))
    smoke.good(verify)
    smoke.remount()
    smoke.good(verify)
    assert smoke.status("cmp -s MPT/big0 MPT/big1") == 1
    smoke.bad("famfs creat -s 4096 TMP/outside")
    smoke.good("famfs fsck MPT")


def test_3(smoke: Smoke) -> None:
    smoke.good("famfs creat -r -s 1m -S 80 MPT/over", "famfs cp MPT/over MPT/over.copy")
    smoke.good("dd if=/dev/zero of=MPT/over bs=4096 count=2 conv=notrunc", "dd if=MPT/over of=/dev/null bs=64k")
    smoke.bad("famfs verify -S 80 -f MPT/over")
    smoke.unmount()
    smoke.good("famfs mount -o nocreate DEV MPT")
    smoke.bad("cp /etc/passwd MPT/new", "touch MPT/new", "dd if=/dev/zero of=MPT/new count=1", "truncate -s 1 MPT/over")
    assert os.path.ismount(smoke.place)
    smoke.remount()
    assert (smoke.place / "over").stat().st_size == 1 << 20
    smoke.good("famfs cp MPT/over.copy MPT/over", "famfs verify -S 80 -f MPT/over", "famfs fsck MPT")


def test_4(smoke: Smoke) -> None:
    assert smoke.status("famfs bogus") == 3
    smoke.good("famfs creat -s 2g MPT/huge", "famfs creat -s 10000k MPT/odd")
    smoke.bad("famfs logplay --shadow TMP/s4 --daxdev TMP/none", "famfs logplay --shadow TMP/no/s --daxdev DEV")
    smoke.bad("famfs logplay --daxdev DEV", "famfs logplay --shadow TMP/a --shadow TMP/b --daxdev DEV")
    smoke.good("famfs logplay --shadow TMP/s4 --daxdev DEV", "famfs logplay --shadow TMP/s4 --daxdev DEV")
    smoke.good("famfs mount -?")
    smoke.unmount()
    smoke.bad("famfs mount", "famfs mount DEV MPT extra", "famfs mount TMP/none MPT", "famfs mount DEV TMP/none")
    smoke.bad("famfs mount -rm DEV MPT")
    smoke.good("famfs mount -r DEV MPT")


def test_pcq(smoke: Smoke) -> None:
    smoke.bad(
        "pcq --info --create MPT/q", "pcq -d -p MPT/q", "pcq -p -t 1 -N 1 MPT/q", "pcq -C MPT/q", "pcq -C -b 64 -n 8"
    )
    smoke.good("pcq -C -b 64 -n 1024 MPT/q0", "pcq -C -b 64k -n 16 MPT/q1", "pcq -C -b 1000 -n 100 MPT/q2")
    for queue in ("MPT/q0", "MPT/q2"):
        smoke.good(f"pcq -i {queue}", f"pcq -d {queue}")
        for options, count in (("-p -N 64", 64), ("-c -N 32", 32), ("-d", 32), ("-p -c -N 500", 1000)):
            smoke.good(f"pcq {options} -f TMP/status {queue}")
            assert int((smoke.folder / "status").read_text()) == count


def test_stripe(smoke: Smoke) -> None:
    smoke.bad(
        "famfs creat -B 100 -N 2 -C 2m -s 4m MPT/s",
        "famfs creat -B 4 -N 3 -C 3m -s 4m MPT/s",
        "famfs creat -B 2 -N 3 -s 4m MPT/s",
    )
    smoke.good("df MPT", *(f"famfs creat -r -S {number} -B 4 -N 3 -C 2m -s 17m MPT/s{number}" for number in (1, 2)))
    smoke.good("famfs verify -m MPT/s1,1 -m MPT/s2,2")
    smoke.remount()
    smoke.good(
        "famfs verify -m MPT/s1,1 -m MPT/s2,2", "famfs cp -t 3 -B 4 -N 2 MPT/s1 MPT/s3", "famfs verify -S 1 -f MPT/s3"
    )
    smoke.good(*(f"famfs fsck -h -B {count} MPT" for count in (1, 4, 7, 64)))


def test_errors_and_clients(smoke: Smoke, shared_site: Site) -> None:
    smoke.bad("famfs clone MPT/one MPT/clone")
    free = json.loads(smoke.host.run(BIN / "famfs", "fsck", "--json", smoke.place).stdout)["free"]
    assert client("s = os.statvfs(arguments[0]); result = s.f_bfree * s.f_frsize", smoke.place) == free
    other = shared_site.host(CLIENT_UUID)
    place = shared_site.place("client")
    assert other.run(BIN / "famfs", "mount", smoke.device, place).returncode == 0
    try:
        assert run(BIN / "famfs", "verify", "-S", "12", "-f", place / "two").returncode == 0
        assert run(BIN / "famfs", "creat", "-s", "4096", place / "new").returncode != 0
    finally:
        succeed("umount", place)
    shutil.rmtree(smoke.folder)
    smoke.folder.mkdir()
    smoke.good("famfs fsck MPT")
    smoke.unmount()
    smoke.good("fsck.famfs -n DEV")
