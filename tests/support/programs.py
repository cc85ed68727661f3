# SPDX-License-Identifier: Apache-2.0
"""The programs of the package as processes of one host or another, on real devices."""

import os
import subprocess
import sys
from pathlib import Path

import commands

BIN = Path(sys.executable).parent
SECONDS = 120
"""Of one program: starting Python takes seconds in an emulated guest."""


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


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command, which must be one line."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def mounts() -> list[str]:
    """The lines of /proc/mounts that tell of a famfs."""
    return [line for line in Path("/proc/mounts").read_text().splitlines() if "fuse.famfs" in line]
