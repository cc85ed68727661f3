# SPDX-License-Identifier: Apache-2.0
"""What a supervisor tells its service manager while another process replays the log."""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from famfs_server.daemon.notify import ServiceManager
from famfs_server.daemon.options import parse_options
from famfs_server.daemon.supervisor import PATIENCE_MICROSECONDS, Supervisor
from famfs_server.dax.device import DaxDevice
from famfs_server.fuse.session import Session
from famfs_server.volume.namespace import Namespace
from famfs_server.volume.volume import NewFile, Volume
from manager import Manager
from memories import HOST, ScratchMemory, formatted

ENTRIES = 600


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path, {})
    yield manager
    manager.close()


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session.create(os.open(os.devnull, os.O_RDWR))
    yield session
    for descriptor in (session.fuse, session.record.fd, session.namespace):
        os.close(descriptor)
    session.libfuse_end.close()
    session.our_end.close()


def test_progress_of_a_replay(
    manager: Manager, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager is told how far it is, and is asked for patience as long as that moves."""
    memory = ScratchMemory()
    formatted(memory)
    volume = Volume(memory, HOST, "memory")
    volume.create_many([NewFile(b"%d" % number, 5, 0o644, 0, 0) for number in range(ENTRIES)])
    volume.close()
    image = tmp_path / "device"
    with image.open("wb") as file:
        file.truncate(4 << 30)
    service = ServiceManager.of_process({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    with DaxDevice.open(str(image)) as device:
        options = parse_options(str(image), str(tmp_path), [])
        supervisor = Supervisor(options, device, UUID(int=1), tmp_path, lambda: None, manager=service)
        supervisor._tell_progress(session)
        publish = Namespace.publish

        def looked_at(tree: Namespace, nodeid: int) -> None:
            publish(tree, nodeid)
            for _ in range(2):
                supervisor._tell_progress(session)

        monkeypatch.setattr(Namespace, "publish", looked_at)
        Volume(memory, HOST, "memory", state=os.dup(session.namespace)).close()
    assert service.barrier()
    patience = f"EXTEND_TIMEOUT_USEC={PATIENCE_MICROSECONDS}"
    assert manager.messages[0] == "STATUS=mounting"
    told = [line for line in manager.messages if line.endswith(f" of {ENTRIES} entries")]
    steps = [int(line.split()[3]) for line in told]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[-1] == ENTRIES
    # Each twice: the second time nothing has moved.
    assert manager.messages.count(patience) == len({*steps}) == len(steps) // 2
    for at, line in enumerate(manager.messages):
        if line == patience:
            assert manager.messages[at - 1] in told
