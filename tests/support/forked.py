# SPDX-License-Identifier: Apache-2.0
"""The programs of the package in processes that are forked and not started, so that hundreds of them take seconds.

One process has imported everything. For each program it forks a child, which does what the installed program does once
it is imported: it has that program's standard streams and environment, and no other descriptor.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from famfs_server.cli.commands import COMMANDS, PROGRAMS

_BEHIND_COMMANDS = ("famfs_server.volume.volume", "famfs_server.volume.check", "famfs_server.daemon.control_client")
_BEHIND_MOUNT = "famfs_server.daemon.lifecycle"


class Forked:
    """Runs programs, one after the other: in children of a new Python program with this environment, or, without one,
    of a fork of this process, which has imported much already. Such a one is to be made before tests open devices and
    start threads.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._channel, theirs = socket.socketpair()
        gc.collect()  # nothing is to be closed by the child's collector: other descriptors will have those numbers
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                os.setsid()
                if environment is not None:
                    os.set_inheritable(theirs.fileno(), True)
                    words = [sys.executable, __file__, str(theirs.fileno())]
                    os.execve(sys.executable, words, environment)
                _forget_what_was_inherited(theirs.fileno())
                _serve(theirs)
            os._exit(1)
        theirs.close()
        self._answers = self._channel.makefile("r")

    def run(
        self, program: str, *words: str | Path, env: dict[str, str] | None = None, seconds: int = 60
    ) -> tuple[int, str, str]:
        """Exit status, or minus the signal, and both outputs of one program, which is killed after so many seconds."""
        self._channel.settimeout(seconds + 30)
        order = [program, [os.fspath(word) for word in words], env or {}, seconds]
        self._channel.sendall(json.dumps(order).encode() + b"\n")
        status, out, err = json.loads(self._answers.readline())
        return status, out, err

    def close(self) -> None:
        """End it, and a program that it may still run; not what that has left in the background."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._answers.close()
        self._channel.close()


def _forget_what_was_inherited(channel: int) -> None:
    faulthandler.disable()
    gc.freeze()
    logging.getLogger().handlers.clear()
    os.closerange(3, channel)
    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))


def _serve(channel: socket.socket) -> None:
    for line in channel.makefile("r"):
        program, words, environment, seconds = json.loads(line)
        _load(program, words)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(seconds)
                _become(program, words, environment, (os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno()))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "surrogateescape"))
        channel.sendall(json.dumps([status, *texts]).encode() + b"\n")


def _load(program: str, words: Sequence[str]) -> None:
    """Import what this program is made of, for it and those that come later."""
    _module(program)
    command = words[0] if program == "famfs" and words else ""
    if command in COMMANDS:
        COMMANDS[command].load()
    mounts = program == "mount.famfs" or command == "mount"
    for module in (*_BEHIND_COMMANDS, *([_BEHIND_MOUNT] if mounts else [])):
        importlib.import_module(module)


def _module(program: str) -> Any:
    return importlib.import_module(f"famfs_server.cli.{PROGRAMS[program].module}")


def _become(program: str, words: Sequence[str], environment: dict[str, str], streams: Sequence[int]) -> NoReturn:
    status = 99
    try:
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  # until the end
        os.environ.update(environment)
        sys.argv = [program, *words]
        _module(program).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
