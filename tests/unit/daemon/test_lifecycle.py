# SPDX-License-Identifier: Apache-2.0
"""What the process does that starts a server in the background; mounts themselves are the mount tier's."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from famfs_server.daemon import lifecycle


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
