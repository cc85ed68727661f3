# SPDX-License-Identifier: Apache-2.0
"""Messages to a service manager, on a real socket, and the descriptors that one passes."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.daemon import notify
from famfs_server.daemon.notify import ServiceManager
from manager import Manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path, {})
    yield manager
    manager.close()


def connected(directory: Path, **more: str) -> ServiceManager:
    return ServiceManager.of_process({"NOTIFY_SOCKET": str(directory / "notify"), **more})


def test_messages_come_in_order(manager: Manager, tmp_path: Path) -> None:
    service = connected(tmp_path)
    service.status("mounting")
    service.ready("serving")
    assert service.barrier()
    assert manager.messages[:3] == ["STATUS=mounting", "READY=1", "STATUS=serving"]


def test_store_and_discard(manager: Manager, tmp_path: Path) -> None:
    service = connected(tmp_path)
    hear, speak = os.pipe()
    assert service.store({"first": hear, "second": speak})
    assert manager.store.keys() == {"first", "second"}
    os.close(hear)
    os.close(speak)
    os.write(manager.store["second"], b"kept")
    assert os.read(manager.store["first"], 4) == b"kept"
    service.discard(["first"])
    assert service.barrier()
    assert manager.store.keys() == {"second"}


def test_abstract_address() -> None:
    name = f"famfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        ServiceManager(f"@{name}").send("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_no_manager() -> None:
    service = ServiceManager.of_process({})
    assert not service.present
    service.ready("nobody hears")
    assert not service.store({})


def test_manager_that_has_gone(tmp_path: Path) -> None:
    service = connected(tmp_path)
    service.ready("nobody hears")
    # The descriptor that would have been passed is closed, which looks like an answer, but nothing was kept.
    assert not service.store({"name": 0})


def test_watchdog_of_this_process_alone(tmp_path: Path) -> None:
    mine, other = str(os.getpid()), str(os.getpid() + 1)
    assert connected(tmp_path, WATCHDOG_USEC="30000000", WATCHDOG_PID=mine).watchdog == 30
    assert connected(tmp_path, WATCHDOG_USEC="30000000").watchdog == 30
    assert connected(tmp_path, WATCHDOG_USEC="30000000", WATCHDOG_PID=other).watchdog == 0
    assert connected(tmp_path).watchdog == 0


def test_passed_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "FIRST_FD", 600)
    hear, speak = (os.dup2(descriptor, 600 + place) for place, descriptor in enumerate(os.pipe()))
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two", "OTHER": "stays"}
    try:
        assert notify.take_passed(environment) == {"one": hear, "two": speak}
        assert environment == {"OTHER": "stays"}
        assert notify.take_passed(environment) == {}
    finally:
        os.close(hear)
        os.close(speak)


def test_descriptors_for_another_process() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two"}
    assert notify.take_passed(environment) == {}
