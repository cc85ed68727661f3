# SPDX-License-Identifier: Apache-2.0
"""The process that opens files of the own mount for a worker: what it hands over, and how it ends."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.daemon import opener
from famfs_server.daemon.opener import OpenerLink
from famfs_server.errors import DeviceError


@pytest.fixture
def link(tmp_path: Path) -> Iterator[OpenerLink]:
    """A link to a real opener, whose directory is an ordinary one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os._exit(opener.serve(directory, theirs))
        finally:
            os._exit(99)
    os.close(directory)
    theirs.close()
    link = OpenerLink(ours)
    yield link
    link.close()
    assert os.waitpid(pid, 0)[1] == 0
    assert not link.gone


def test_file_has_no_name_any_more(link: OpenerLink, tmp_path: Path) -> None:
    for number in range(3):
        name = f".space-{number}"
        (tmp_path / name).write_bytes(b"bytes")
        descriptor = link.open(name.encode())
        assert not (tmp_path / name).exists()
        assert os.pread(descriptor, 5, 0) == b"bytes"
        os.pwrite(descriptor, b"B", 0)
        os.close(descriptor)
    assert not link.gone


def test_file_that_cannot_be_opened(link: OpenerLink, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be opened through the own mount: No such file"):
        link.open(b".space-none")
    (tmp_path / ".space-next").write_bytes(b"bytes")
    os.close(link.open(b".space-next"))


def test_opener_that_has_died() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = OpenerLink(ours)
    assert not link.gone
    theirs.close()
    assert link.gone
    with pytest.raises(DeviceError, match="new space cannot be reached"):
        link.open(b".space-any")
    link.close()
    # That is the worker's own doing.
    assert not link.gone


def test_opener_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "SECONDS", 0.05)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        link = OpenerLink(ours)
        with pytest.raises(DeviceError, match="not opened through the own mount"):
            link.open(b".space-any")
        # What it says later must not be taken for the answer to another question: it is replaced.
        assert link.gone
    link.close()
