# SPDX-License-Identifier: Apache-2.0
"""Running the programs of the package inside a test, on devices that are sparse files."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from famfs_server.cli import fsck, mkfs, mount, program
from famfs_server.cli.commands import PROGRAMS
from famfs_server.dax import hostid
from famfs_server.dax.device import DaxDevice, Lock
from famfs_server.volume.volume import Volume

GIB = 1 << 30
NOBODY = 65534

STATUSES: dict[str, program.Statuses] = {
    "famfs": program.Statuses(),
    "pcq": program.Statuses(),
    "mkfs.famfs": mkfs.STATUSES,
    "mount.famfs": mount.STATUSES,
    "umount.famfs": mount.STATUSES,
    "fsck.famfs": fsck.STATUSES,
    "famfs-server": mount.STATUSES,
    "famfs_fused": mount.STATUSES,
}
"""The exit statuses of each program."""


@dataclass(frozen=True)
class Outcome:
    """What a program did."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run(name: str, *arguments: str | Path, env: dict[str, str] | None = None) -> Outcome:
    """Run a program of this package in this process."""
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for variable, value in (env or {}).items():
            patch.setenv(variable, value)
        status = program.run(PROGRAMS[name].load(), name, [str(argument) for argument in arguments], STATUSES[name])
    return Outcome(status, out.getvalue(), err.getvalue())


def run_as_nobody(name: str, *arguments: str | Path, env: dict[str, str] | None = None) -> Outcome:
    """As `run`, in a child of this process without root's rights, which must have run the program before: nobody may be
    able to read its modules.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        os.write(writer, json.dumps(astuple(run(name, *arguments, env=env))).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        words = answer.read()
    os.waitpid(child, 0)
    return Outcome(*json.loads(words))


class Device:
    """A sparse file that stands for a dax device, and what is on it."""

    def __init__(self, path: Path, size: int = 4 * GIB) -> None:
        self.path = path
        with path.open("ab") as image:
            image.truncate(max(size, image.tell()))

    def head(self) -> bytes:
        """The superblock and the log of the smallest size."""
        with self.path.open("rb") as image:
            return image.read(10 << 20)

    def make(self, *options: str) -> "Device":
        """Make a file system."""
        outcome = run("mkfs.famfs", *options, self.path)
        assert outcome.status == 0, outcome.err
        return self

    @contextlib.contextmanager
    def volume(self) -> Iterator[Volume]:
        """The file system, opened to look at."""
        with DaxDevice.open(str(self.path)) as device:
            memory = device.memory()
            volume = Volume(memory, hostid.system_uuid(), str(self.path))
            try:
                yield volume
            finally:
                volume.close()
                memory.close()

    @contextlib.contextmanager
    def locked(self, lock: Lock, *, exclusive: bool) -> Iterator[None]:
        """Held by somebody else."""
        with DaxDevice.open(str(self.path)) as device:
            assert device.lock(lock, exclusive=exclusive)
            yield

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        with self.volume() as volume:
            nodeid = volume.namespace.resolve(os.fsencode(path))
            assert nodeid, path
            return volume.read(nodeid, 0, volume.namespace.size[nodeid])

    def tree(self) -> dict[str, tuple[str, int]]:
        """Every path with its mode, as ls shows the octal digits, and its size."""
        with self.volume() as volume:
            names = volume.namespace
            return {
                os.fsdecode(names.path(nodeid)): (f"{names.mode[nodeid] & 0o7777:o}", names.size[nodeid])
                for nodeid in names.walk()
            }

    def owner(self, path: str) -> tuple[int, int]:
        """uid and gid of a path."""
        with self.volume() as volume:
            nodeid = volume.namespace.resolve(os.fsencode(path))
            return volume.namespace.uid[nodeid], volume.namespace.gid[nodeid]


def host_file(directory: Path, host: UUID) -> dict[str, str]:
    """The environment in which this host is `host`."""
    path = directory / f"uuid-{host.int & 0xFFFF:x}"
    path.write_text(str(host))
    return {hostid.ENVIRONMENT: str(path)}


def json_of(outcome: Outcome) -> Any:
    """What a program printed, as JSON."""
    return json.loads(outcome.out)
