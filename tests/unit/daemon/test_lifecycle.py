# SPDX-License-Identifier: Apache-2.0
"""What the process does that starts a server in the background; mounts themselves are the mount tier's."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import pytest

from famfs_server.daemon import lifecycle, locking
from famfs_server.dax.device import DaxDevice, Lock
from famfs_server.volume.format import make_filesystem
from memories import HOST, LOG_LENGTH


def test_who_gives_up_waiting_leaves_no_server_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hear, speak = os.pipe()

    def serve(*_: Any) -> NoReturn:
        os.write(speak, str(os.getpid()).encode())
        while True:
            signal.pause()

    found: list[int] = []

    @contextmanager
    def interrupted() -> Iterator[None]:
        found.append(int(os.read(hear, 100)))
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(lifecycle, "_become_daemon", serve)
    with pytest.raises(KeyboardInterrupt):
        lifecycle._daemonise(None, None, None, tmp_path, None, interrupted)  # type: ignore[arg-type]
    os.close(hear)
    os.close(speak)
    # It must be gone already, and must not stay if it is not.
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], signal.SIGKILL)


def test_file_system_that_is_made_for_another_owner_while_a_mount_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is its master now must also be its only writer on this host."""
    monkeypatch.setattr(locking, "DYING_MOUNT_SECONDS", 60.0)
    path = tmp_path / "device"
    with path.open("wb") as image:
        image.truncate(4 << 30)

    def make(device: DaxDevice, owner: UUID) -> None:
        memory = device.memory()
        made = make_filesystem(memory, str(path), owner, log_length=LOG_LENGTH)
        memory.close()
        device.unmap()
        uuids.append(made.uuid.bytes)

    def finish(device: DaxDevice) -> None:
        # Long enough for a mount that reads first to have read.
        time.sleep(0.3)
        make(device, HOST)
        device.unlock(Lock.MOUNTED)

    uuids: list[bytes] = []
    with DaxDevice.open(str(path)) as mkfs, DaxDevice.open(str(path)) as mounting, DaxDevice.open(str(path)) as other:
        make(mkfs, UUID(int=99))
        assert mkfs.lock(Lock.MOUNTED, exclusive=True)
        thread = threading.Thread(target=finish, args=(mkfs,))
        thread.start()
        assert lifecycle._take_locks(mounting, HOST) == uuids[1]
        thread.join()
        assert not other.lock(Lock.WRITER, exclusive=True)
