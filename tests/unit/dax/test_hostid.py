# SPDX-License-Identifier: Apache-2.0
"""The system UUID: made once, read as the reference's tools write it, and never guessed."""

import stat
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.dax import hostid
from famfs_server.dax.hostid import HostIdError

TEXT = "f00dcafe-0102-4304-8506-0708090a0b0c"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "opt" / "famfs" / "system_uuid"
    monkeypatch.setenv(hostid.ENVIRONMENT, str(path))
    return path


def test_made_on_first_need(path: Path) -> None:
    found = hostid.system_uuid()
    assert path.read_bytes() == str(found).encode() + b"\0"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert hostid.system_uuid() == found
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [f"{TEXT}\0", f"{TEXT}\n", f"  {TEXT.upper()} what follows\n", TEXT])
def test_read(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert hostid.system_uuid() == UUID(TEXT)


@pytest.mark.parametrize("content", [b"", b"\0", b"no uuid", b"\xff\xfe", TEXT[:-1].encode()])
def test_content_that_is_no_uuid(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(HostIdError, match="holds no UUID") as error:
        hostid.system_uuid()
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_cannot_be_made(path: Path) -> None:
    path.parent.parent.mkdir()
    path.parent.write_text("a file in the way")
    with pytest.raises(HostIdError, match="cannot create the system UUID"):
        hostid.system_uuid()


def test_a_directory_is_in_the_way(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(HostIdError, match="is not a regular file"):
        hostid.system_uuid()


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hostid.ENVIRONMENT, raising=False)
    assert hostid.uuid_file() == Path("/opt/famfs/system_uuid")
