# SPDX-License-Identifier: Apache-2.0
"""Progress bars: on a terminal, and for work that takes long; nowhere else."""

import contextlib
import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import STATUSES, Device, run
from famfs_server.cli import program, progress
from famfs_server.cli.commands import PROGRAMS

WAIT = 30.0


class Terminal:
    """A terminal that somebody reads."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w")
        self._text = bytearray()
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # A terminal whose other end is closed is an error, and no end of file.
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 4096):
                with self._grown:
                    self._text += data
                    self._grown.notify()

    def here(self) -> contextlib.AbstractContextManager[object]:
        """While it is this process's standard error."""
        return contextlib.redirect_stderr(self.file)

    def shows(self, word: str) -> bool:
        """Whether `word` appears before long."""
        with self._grown:
            return self._grown.wait_for(lambda: word.encode() in self._text, WAIT)

    def close(self) -> str:
        """Everything that was written, without colours and cursor movements."""
        self.file.close()
        self._reader.join(WAIT)
        os.close(self._master)
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", self._text.decode())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    found = Terminal()
    yield found
    if not found.file.closed:
        found.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is long."""

    class Now(threading.Timer):
        def start(self) -> None:
            self.function()

    monkeypatch.setattr(threading, "Timer", Now)


def test_a_bar_comes_when_work_takes_long(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.SHOWN_AFTER == 1
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.01)
    with terminal.here(), progress.progress("copying", 200) as bar:
        bar.advance(50)
        assert terminal.shows("copying")
        bar.advance(100)
        assert terminal.shows("150/200 bytes")
        print("a warning", file=sys.stderr)
    assert "a warning" in terminal.close()


def test_short_work_is_silent(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 3600)
    with terminal.here(), progress.progress("copying", 200) as bar:
        bar.advance(200)
    assert terminal.close() == ""


def test_a_bar_that_comes_too_late_stays_away(terminal: Terminal) -> None:
    with terminal.here():
        with progress.progress("copying", 200) as bar:
            pass
        bar.show()
    assert terminal.close() == ""


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], at_once: None) -> None:
    with progress.progress("copying", 200) as bar:
        bar.advance(200)
    assert capsys.readouterr() == ("", "")


def test_output_to_a_file_stays_out_of_the_terminal(terminal: Terminal, at_once: None) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), terminal.here(), progress.progress("copying", 200):
        print("a line")
    assert out.getvalue() == "a line\n"
    assert "a line" not in terminal.close()


def test_units(terminal: Terminal, at_once: None) -> None:
    with terminal.here(), progress.progress("reading", 0, "entries") as bar:
        bar.set(10, 20)
        assert terminal.shows("10/20")
    with terminal.here(), progress.progress("looking", unit="files") as bar:
        bar.advance(7)
        assert terminal.shows("7 files")
    with terminal.here(), progress.progress("[waiting]", unit=""):
        assert terminal.shows("[waiting]")


def source_tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_bytes(b"x" * 5000)
    return folder


def prepare_export(device: Device, folder: Path) -> list[object]:
    run("famfs", "creat", "--daxdev", device.path, "-s", "5000", "f")
    return ["export", "--daxdev", device.path, "-o", folder / "a.tar", "/"]


def prepare_import(device: Device, folder: Path) -> list[object]:
    assert run("famfs", *map(str, prepare_export(device, folder))).status == 0
    return ["import", "--daxdev", device.path, folder / "a.tar", "/"]


def prepare_file(*words: object) -> Callable[[Device, Path], list[object]]:
    def prepare(device: Device, folder: Path) -> list[object]:
        run("famfs", "creat", "--daxdev", device.path, "-s", "5000", "-r", "-S", "1", "f")
        return [*words, "--daxdev", device.path]

    return prepare


LONG: dict[str, tuple[str, Callable[[Device, Path], list[object]]]] = {
    "cp": ("copying", lambda device, folder: ["cp", "-r", "--daxdev", device.path, source_tree(folder / "s"), "/d"]),
    "cp, looking": ("looking", lambda d, folder: ["cp", "-r", "--daxdev", d.path, source_tree(folder / "s"), "/d"]),
    "creat": ("filling", lambda device, folder: ["creat", "--daxdev", device.path, "-s", "9k", "-r", "new"]),
    "verify": ("verifying", prepare_file("verify", "-f", "f", "-S", "1")),
    "flush": ("flushing", prepare_file("flush", "f")),
    "getmap": ("reading the log", prepare_file("getmap", "f")),
    "export": ("exporting", prepare_export),
    "import": ("importing", prepare_import),
    "fsck": ("reading the log", lambda device, folder: ["fsck", device.path]),
    "map": ("reading the log", lambda device, folder: ["map", device.path]),
    "logplay": ("playing", prepare_file("logplay", "--shadow", "PLACE")),
}


@pytest.mark.parametrize("name", LONG)
def test_commands_that_can_take_long(
    name: str, device: Device, tmp_path: Path, terminal: Terminal, at_once: None
) -> None:
    title, prepare = LONG[name]
    words = [str(tmp_path / "shadow") if word == "PLACE" else str(word) for word in prepare(device, tmp_path)]
    with contextlib.redirect_stdout(io.StringIO()), terminal.here():
        assert program.run(PROGRAMS["famfs"].load(), "famfs", words, STATUSES["famfs"]) == 0
    assert title in terminal.close()


def test_mkfs_and_chkread(device: Device, tmp_path: Path, terminal: Terminal, at_once: None) -> None:
    with device.path.open("rb") as image, (tmp_path / "log").open("wb") as log:
        image.seek(2 << 20)
        log.write(image.read(8 << 20))
    with contextlib.redirect_stdout(io.StringIO()), terminal.here():
        for name, words in (("mkfs.famfs", ["-f", str(device.path)]), ("famfs", ["chkread", "-l", f"{tmp_path}/log"])):
            assert program.run(PROGRAMS[name].load(), name, words, STATUSES[name]) == 0
    text = terminal.close()
    assert "writing an empty log" in text
    assert "comparing" in text


def test_an_interrupt_ends_the_threads_at_their_next_piece() -> None:
    begun, later = threading.Event(), threading.Event()

    def endless(bar: progress.Bar) -> None:
        while True:
            begun.set()
            bar.advance(1)

    jobs = []

    def interrupted() -> None:
        with progress.progress("copying", 200) as bar, progress.workers(1, bar) as pool:
            jobs.append(pool.submit(endless, bar))
            pool.submit(later.set)
            assert begun.wait(WAIT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(jobs[0].exception(), progress.StoppedError)
    assert not later.is_set()
