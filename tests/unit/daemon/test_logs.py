# SPDX-License-Identifier: Apache-2.0
"""Log lines in the journal's own protocol, and the last ones for status."""

import errno
import logging
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.daemon import logs
from famfs_server.daemon.logs import JournalHandler, Recent


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
    logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.addHandler(JournalHandler({}, str(tmp_path / "nobody")))
    logger.error("lost")
    assert capsys.readouterr().err == ""


def test_the_last_warnings_are_kept(logger: logging.Logger) -> None:
    recent = Recent()
    logger.addHandler(recent)
    logger.info("not kept")
    for number in range(30):
        logger.warning("number %d", number)
    lines = recent.lines()
    assert [line.message for line in lines] == [f"number {number}" for number in range(10, 30)]
    assert lines[0].level == "warning"


def test_the_foreground_says_it_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger("famfs_server")
    before = root.handlers[:], root.level, root.propagate
    try:
        logs.set_up(logging.INFO, {}, background=False)
        logging.getLogger("famfs_server.volume").info("hello")
    finally:
        root.handlers[:], root.propagate = before[0], before[2]
        root.setLevel(before[1])
    assert "hello" in capsys.readouterr().err
