# SPDX-License-Identifier: Apache-2.0
"""A mount described for another program: understood whole, or refused before anything is changed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from famfs_server.daemon import handover
from famfs_server.daemon.bootstrap import OwnFiles
from famfs_server.daemon.handover import Held
from famfs_server.daemon.metafiles import MetaFiles
from famfs_server.daemon.options import parse_options
from famfs_server.daemon.worker import Negotiated
from famfs_server.dax.device import DaxDevice
from famfs_server.errors import HandoverError
from famfs_server.fuse.dialects import GENERATIONS, Decision
from famfs_server.fuse.session import Session
from harness import MASTER_UUID, format_device

OPTIONS = (
    "ro,noatime,cache=auto,timeout=7,nocreate,poll=0,loglevel=debug,nouseraccess",
    "daxdev=0b0b0b0b-0102-4304-8506-0708090a0b0c=/dev/dax1.0,shadow=/x",
)

FURTHER = UUID("0d0d0d0d-0102-4304-8506-0708090a0b0c")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """A mount as a supervisor holds it, with an ordinary file in place of /dev/fuse."""
    device = DaxDevice.open(str(format_device(tmp_path / "device")))
    fuse = os.memfd_create("fuse")
    session = Session.create(fuse)
    decision = Decision("fmap", "because", GENERATIONS[:2])
    files = [os.memfd_create(name) for name in "abc"]
    meta = OwnFiles(MetaFiles(*files, 8 << 20, True, *os.pipe()[:1]), os.pipe()[1])
    options = parse_options(device.path, "/mnt/famfs", OPTIONS)
    agreed = Negotiated(b"init bytes", decision)
    further = {FURTHER: DaxDevice.open(str(format_device(tmp_path / "further")))}
    yield Held(options, device, UUID(MASTER_UUID), session, tmp_path, agreed, 42, True, meta, further)
    further[FURTHER].close()
    device.close()


def transferred(held: Held, **changes: Any) -> dict[str, Any]:
    """The document as another program reads it."""
    descriptor = handover.write(held.document() | changes)
    try:
        return handover.read(descriptor)
    finally:
        os.close(descriptor)


def copies(held: Held) -> dict[str, int]:
    return {name: os.dup(descriptor) for name, descriptor in held.descriptors.items()}


def test_nothing_is_lost(held: Held) -> None:
    again = Held.restore(transferred(held), copies(held))
    for name in ("options", "host", "run_directory", "agreed", "device_number", "background"):
        assert getattr(again, name) == getattr(held, name)
    assert again.further.keys() == {FURTHER}
    for name in ("path", "mode", "size", "align", "writable"):
        assert getattr(again.device, name) == getattr(held.device, name)
        assert getattr(again.further[FURTHER], name) == getattr(held.further[FURTHER], name)
    assert again.session.max_write == held.session.max_write
    assert again.meta is not None
    assert held.meta is not None
    assert again.meta.files.log_length == held.meta.files.log_length
    held.session.record.note_change(8, 77)
    assert again.session.record.noted_change(8) == 77
    for name, descriptor in again.descriptors.items():
        assert os.path.sameopenfile(descriptor, held.descriptors[name])


def test_one_process_reads_requests_at_a_time(held: Held) -> None:
    again = Held.restore(transferred(held), copies(held))
    claim = held.session.record.claim(0)
    assert claim is not None
    assert again.session.record.claim(0.05) is None
    os.close(claim)
    assert again.session.record.claim(0) is not None


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"layouts": {"record": 99, "namespace": 0}}, "layout 99"),
        ({"layouts": {"record": handover.RECORD_LAYOUT, "namespace": 1}, "provisional": 3}, "3 files"),
        ({"layouts": {}}, "KeyError"),
        ({"agreed": {"init": "xx", "data_path": "", "reason": "", "candidates": []}}, "makes no sense"),
        ({"agreed": {"init": "", "data_path": "", "reason": "", "candidates": ["tomorrow"]}}, "tomorrow"),
        ({"device": {"mode": "FUTURE"}}, "FUTURE"),
    ],
)
def test_refused(held: Held, changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(HandoverError, match=cause) as caught:
        handover.check(transferred(held, **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_option_of_tomorrow(held: Held) -> None:
    document = held.document()
    document["options"]["compress"] = True
    with pytest.raises(HandoverError, match="compress"):
        handover.check(document)


def test_option_that_came_later(held: Held) -> None:
    # An older version did not know the option, and its mount does without.
    document = held.document()
    del document["options"]["poll"]
    handover.check(document)
    assert Held.restore(document, copies(held)).options.poll == 1.0


def test_tree_in_another_form_without_new_files(held: Held) -> None:
    layouts = {"record": handover.RECORD_LAYOUT, "namespace": 1}
    handover.check(transferred(held, layouts=layouts, provisional=0))


def test_descriptors_are_missing(held: Held) -> None:
    passed = copies(held)
    os.close(passed.pop("record"))
    with pytest.raises(HandoverError, match="record"):
        Held.restore(transferred(held), passed)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", json.dumps("text").encode(), b"\xff"])
def test_documents_that_are_none(data: bytes) -> None:
    descriptor = os.memfd_create("document")
    os.write(descriptor, data)
    with pytest.raises(HandoverError):
        handover.read(descriptor)
    os.close(descriptor)
