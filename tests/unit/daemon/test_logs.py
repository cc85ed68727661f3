# SPDX-License-Identifier: Apache-2.0
"""Log lines in the journal's own protocol, and the last ones for status."""

import contextlib
import errno
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.daemon import logs
from famfs_server.daemon.logs import JournalHandler, Recent, SyslogHandler


def fields(datagram: bytes) -> dict[str, str]:
    """The fields of one entry, as the journal reads them."""
    found = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        (length,) = struct.unpack_from("<Q", rest)
        found[name.decode()] = rest[8 : 8 + length].decode()
        assert rest[8 + length :][:1] == b"\n"
        datagram = rest[9 + length :]
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """The end of a socket where the journal would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "journal"))
        listener.settimeout(5)
        yield listener


@pytest.fixture
def logger() -> logging.Logger:
    """A logger that nobody else uses."""
    logger = logging.Logger("test", logging.DEBUG)
    logger.propagate = False
    return logger


def test_the_fields_of_a_line(journal: socket.socket, logger: logging.Logger, tmp_path: Path) -> None:
    logger.addHandler(JournalHandler({"FAMFS_MOUNT": "/mnt/a\nb"}, str(tmp_path / "journal")))
    for level, priority in ((logging.CRITICAL, "2"), (logging.WARNING, "4"), (logging.INFO, "6"), (logging.DEBUG, "7")):
        logger.log(level, "two\nlines of %s", "text")
        found = fields(journal.recv(1 << 16))
        assert found["MESSAGE"] == "two\nlines of text"
        assert found["PRIORITY"] == priority
        assert found["FAMFS_MOUNT"] == "/mnt/a\nb"
        assert found["SYSLOG_IDENTIFIER"] == "famfs-server"
        assert found["CODE_FILE"] == __file__
        assert "ERRNO" not in found
    try:
        raise OSError(errno.ENOSPC, "full")
    except OSError:
        logger.exception("it fails")
    found = fields(journal.recv(1 << 16))
    assert found["ERRNO"] == str(errno.ENOSPC)
    assert "Traceback" in found["MESSAGE"]


def test_a_journal_that_is_gone_is_no_error(
    logger: logging.Logger, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger.addHandler(JournalHandler({}, str(tmp_path / "nobody")))
    logger.error("lost")
    assert capfd.readouterr().err == ""


def test_the_last_warnings_are_kept(logger: logging.Logger) -> None:
    recent = Recent()
    logger.addHandler(recent)
    logger.info("not kept")
    for number in range(30):
        logger.warning("number %d", number)
    lines = recent.lines()
    assert [line.message for line in lines] == [f"number {number}" for number in range(10, 30)]
    assert lines[0].level == "warning"


def test_the_foreground_says_it_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger("famfs_server")
    before = root.handlers[:], root.level, root.propagate
    try:
        logs.set_up(logging.INFO, {}, background=False)
        logging.getLogger("famfs_server.volume").info("hello")
    finally:
        root.handlers[:], root.propagate = before[0], before[2]
        root.setLevel(before[1])
    assert "hello" in capfd.readouterr().err


@pytest.fixture
def set_up() -> Iterator[logging.Logger]:
    """The package's logger as a daemon in the foreground sets it up."""
    root = logging.getLogger("famfs_server")
    before = root.handlers[:], root.level, root.propagate
    logs.set_up(logging.INFO, {}, background=False)
    yield root
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


@pytest.mark.parametrize("kind", ["pipe", "socket", "no descriptors left"])
def test_a_reader_that_does_not_read_holds_nobody_up(set_up: logging.Logger, kind: str) -> None:
    ours, theirs = os.pipe() if kind != "socket" else (end.detach() for end in socket.socketpair())
    saved = os.dup(2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lost = logs.lines_lost()
    os.dup2(theirs, 2)
    try:
        if kind == "no descriptors left":
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        for number in range(4000):
            set_up.warning("line %d %s", number, "x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.dup2(saved, 2)
    assert os.get_blocking(theirs), "whoever shares standard error with us has another one now"
    told = os.read(ours, 1 << 20)
    assert told.startswith(b"famfs-server[%d]: line 0 xxx" % os.getpid())
    assert 0 < 4000 - (logs.lines_lost() - lost) < 4000
    for end in (ours, theirs, saved):
        os.close(end)


def test_syslog_that_does_not_read_holds_nobody_up(logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "log"
    lost = logs.lines_lost()
    logger.addHandler(SyslogHandler(str(path)))
    logger.warning("nobody listens")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        for number in range(2000):
            logger.warning("line %d", number)
        assert listener.recv(1000) == b"<28>famfs-server[%d]: line 0" % os.getpid()
    assert logs.lines_lost() - lost > 1000
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        logger.error("started again")
        assert listener.recv(1000) == b"<27>famfs-server[%d]: started again" % os.getpid()


def test_a_slow_disk_costs_lines_and_no_time() -> None:
    """A full pipe stands for the disk."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, bytes(4096))
    os.set_blocking(theirs, True)
    saved = os.dup(2)
    os.dup2(theirs, 2)
    try:
        scribe = logs._Scribe()
        scribe.write(b"slow")
        for _ in range(100):
            with pytest.raises(BlockingIOError):
                scribe.write(b"lost")
        while not os.read(ours, 1 << 20).endswith(b"slow"):
            pass
        deadline = time.monotonic() + 30
        told = False
        while not told and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                scribe.write(b"told")
                told = True
        assert os.read(ours, 100) == b"told"
    finally:
        os.dup2(saved, 2)
        for end in (ours, theirs, saved):
            os.close(end)


def test_a_file_for_standard_error_has_every_line_in_its_order(tmp_path: Path) -> None:
    """Also where the caller's shell opened it without O_APPEND, and others write to it."""
    code = """
import logging, os
from famfs_server.daemon.logs import StderrHandler
logger = logging.getLogger("test")
logger.addHandler(StderrHandler())
for number in range(3):
    logger.warning("logged %d", number)
    os.write(2, b"printed %d\\n" % number)
"""
    with (tmp_path / "log").open("wb") as output:
        subprocess.run([sys.executable, "-c", code], stderr=output, check=True, timeout=30)
    said = [line.rpartition(": ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert said == [f"{what} {number}" for number in range(3) for what in ("logged", "printed")]
