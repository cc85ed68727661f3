# SPDX-License-Identifier: Apache-2.0
"""`famfs cp` into a mount: other hosts see whole files or none, whoever is killed and when; again completes it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import BIN, CLIENT_UUID, MIB, Mount, Site, client, opened, wait_for

pytestmark = pytest.mark.timeout(120)

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
LARGE = 12 * MIB
PIECE = MIB
SMALL_FILES = 150

# cp as it is, stopped (by itself, and so at a known place) when it has handed over so many bytes, in whole pieces.
STOPPED_AT = f"""
import os, signal, sys, threading
from famfs_server.cli import cp, program
from famfs_server.cli.source import Source
left = int(sys.argv.pop(1))
cp._BATCH_BYTES = 4 << 20
real = Source.pieces

def pieces(source, buffer):
    global left
    for piece in real(source, buffer[:{PIECE}]):
        if left <= 0:
            # To this very thread: it would go on for a while if another one took the signal.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        left -= len(piece)
        yield piece

Source.pieces = pieces
program.main(cp.command, "famfs cp")
"""

# Every file of a tree that can be seen, and whether it is what the source is.
LOOK = """
place, source = arguments
result = {}
for folder, _, names in os.walk(place):
    if ".meta" in folder:
        continue
    for name in names:
        path = os.path.join(folder, name)
        inside = os.path.relpath(path, place)
        if inside.startswith(".meta"):
            continue
        with open(path, "rb") as one, open(os.path.join(source, inside), "rb") as other:
            result[inside] = one.read() == other.read()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(4)
    folder = tmp_path_factory.mktemp("source")
    for number in range(SMALL_FILES):
        path = folder / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(1, 20_000)))
    (folder / "large").write_bytes(rng.randbytes(LARGE))
    return folder


@pytest.fixture
def device(memory_folder: Path, site: Site) -> Path:
    return site.format(str(memory_folder / "device"))


def seen(mount: Mount, source: Path) -> list[str]:
    """The files that a host sees; all of them must be whole."""
    found = client(LOOK, mount.path, source)
    assert all(found.values()), [name for name, whole in found.items() if not whole]
    return sorted(found)


def everything(source: Path) -> list[str]:
    return sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())


@contextmanager
def stopped_copy(mount: Mount, source: Path, after: int) -> Iterator["subprocess.Popen[str]"]:
    """A copy that has stopped in the middle, when so many bytes were handed over."""
    command = [sys.executable, "-c", STOPPED_AT, str(after), "-r", source, mount.path]
    process = subprocess.Popen(command, env=mount.host.environment, stderr=subprocess.PIPE, text=True)
    try:
        state = Path(f"/proc/{process.pid}/stat")
        assert wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", 30)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_killed_copy_leaves_whole_files_and_is_completed_by_the_next(
    site: Site, device: Path, source: Path, rng: random.Random
) -> None:
    with site.mounted(device, "poll=0") as master, site.mounted(device, "poll=0", host=CLIENT_UUID) as other:
        places = [0, 1, LARGE // 2, LARGE - PIECE, LARGE - 1, LARGE + 1, rng.randrange(LARGE)]
        visible: list[str] = []
        for after in sorted(places if LONG else rng.sample(places, 2)):
            with stopped_copy(master, source, after) as process:
                before, visible = visible, seen(other, source)
                # It stops before a piece, when what went before is no less than asked for.
                assert "large" not in visible or -(-after // PIECE) * PIECE >= LARGE
                os.kill(process.pid, signal.SIGKILL)
                process.wait(20)
            assert set(visible) >= set(before)
        done = master.host.run(BIN / "famfs", "cp", "-r", "--verify", source, master.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert seen(other, source) == seen(master, source) == everything(source)
    with opened(device) as volume:
        tree = volume.namespace
        assert not tree.faults()
        # Interrupted copies keep no space.
        used = sum(extent.length for node in tree.walk() for extent in tree.fmap(node).extents)
        assert volume.space.allocated == used + volume.log_end


def test_killed_at_any_moment(site: Site, device: Path, source: Path, rng: random.Random) -> None:
    with site.mounted(device) as master, site.mounted(device, "poll=0", host=CLIENT_UUID) as other:
        for _ in range(30 if LONG else 2):
            words = [BIN / "famfs", "cp", "-r", "-t", "3", source, master.path]
            process = subprocess.Popen(words, env=master.host.environment, stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(0.1, 1))
            process.kill()
            process.wait(20)
            seen(other, source)
        assert master.host.run(BIN / "famfs", "cp", "-r", source, master.path).returncode == 0
        assert seen(other, source) == everything(source)


def test_killed_worker_fails_no_copy(site: Site, device: Path, source: Path) -> None:
    with site.mounted(device) as master, site.mounted(device, "poll=0", host=CLIENT_UUID) as other:
        with stopped_copy(master, source, LARGE // 2) as process:
            worker = master.process("worker")
            os.kill(worker, signal.SIGKILL)
            assert wait_for(lambda: worker not in master.host_processes())
            assert "large" not in seen(other, source)
            os.kill(process.pid, signal.SIGCONT)
            # It stops at each piece from now on.
            while process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                time.sleep(0.01)
            assert process.returncode == 0
        assert seen(other, source) == everything(source)


def test_killed_server_leaves_no_half_file(site: Site, device: Path, source: Path) -> None:
    with site.mounted(device, "poll=0", host=CLIENT_UUID) as other:
        with site.mounted(device) as master, stopped_copy(master, source, LARGE // 2) as process:
            os.kill(master.process("supervisor"), signal.SIGKILL)
            assert wait_for(lambda: not master.attached)
            while process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                time.sleep(0.01)
            assert process.returncode == 1
            assert process.stderr is not None
            assert all(line.startswith("famfs cp: ") for line in process.stderr.read().splitlines())
        assert "large" not in seen(other, source)
        with site.mounted(device) as master:
            done = master.host.run(BIN / "famfs", "cp", "-r", source, master.path)
            assert (done.returncode, done.stderr) == (0, "")
        assert seen(other, source) == everything(source)


def test_logged_first_is_seen_first(site: Site, device: Path, source: Path) -> None:
    with site.mounted(device) as master, site.mounted(device, "poll=0", host=CLIENT_UUID) as other:
        command = [sys.executable, "-c", STOPPED_AT, "0", "--log-first", source / "large", master.path / "large"]
        process = subprocess.Popen(command, env=master.host.environment)
        try:
            empty = "result = os.path.exists(arguments[0]) and not any(open(arguments[0], 'rb').read())"
            assert wait_for(lambda: bool(client(empty, other / "large")), 30)
            while process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                time.sleep(0.01)
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait(20)
        assert seen(other, source) == ["large"]
