# SPDX-License-Identifier: Apache-2.0
"""The programs of the package as processes of one host or another, on real devices."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import commands
from famfs_server.fuse import kernels
from forked import Forked

BIN = Path(sys.executable).parent
SECONDS = 120
"""Of one program: starting Python takes seconds in an emulated guest."""
_forked: Forked | None = None


def run(*command: str | Path, host: Path, status: int = 0, seconds: int = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a program of this package as the host whose UUID is in the file `host`; its exit status must be `status`."""
    environment = dict(os.environ, FAMFS_SYSTEM_UUID_FILE=str(host))
    program = BIN / command[0] if (BIN / str(command[0])).exists() else command[0]
    done = subprocess.run(
        [str(program), *map(str, command[1:])], env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == status, (command, done.returncode, done.stdout, done.stderr)
    return done


def here(*command: str | Path, host: Path, status: int = 0) -> commands.Outcome:
    """As `run`, for a program that does not fork: in this process, since starting Python is what takes the time."""
    name, *arguments = map(str, command)
    done = commands.run(name, *arguments, env={"FAMFS_SYSTEM_UUID_FILE": str(host)})
    assert done.status == status, (command, done)
    return done


@contextmanager
def forking() -> Iterator[None]:
    """Meanwhile there is a process for `fork`."""
    global _forked
    _forked = Forked()
    try:
        yield
    finally:
        _forked.close()
        _forked = None


def fork(*command: str | Path, host: Path, status: int = 0) -> commands.Outcome:
    """As `run`, for a program that leaves a server behind: in a process that has imported it already."""
    assert _forked is not None
    name, *arguments = map(str, command)
    environment = {"FAMFS_SYSTEM_UUID_FILE": str(host)}
    done = commands.Outcome(*_forked.run(name, *arguments, env=environment, seconds=SECONDS))
    assert done.status == status, (command, done)
    return done


def mounts() -> list[str]:
    """The lines of /proc/mounts that tell of a famfs."""
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line for line in lines if line.split()[2] in kernels.SHOWN_TYPES]
