# SPDX-License-Identifier: Apache-2.0
"""The command `famfs` in processes that are forked and not started, so that hundreds of them take seconds.

One process has imported everything. For each command it forks a child, which does what the installed program does once
it is imported.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_CODE = """
import importlib, json, os, signal, sys, tempfile
from famfs_server.cli import famfs
from famfs_server.cli.commands import COMMANDS

for entry in COMMANDS.values():
    entry.load()
for module in ("famfs_server.volume.volume", "famfs_server.volume.check", "famfs_server.daemon.control_client"):
    importlib.import_module(module)
for line in sys.stdin:
    words, seconds = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            signal.alarm(seconds)
            for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out.fileno(), 1), (err.fileno(), 2)):
                os.dup2(descriptor, target)
            sys.argv = ["famfs", *words]
            status = 99
            try:
                famfs.main()
            except SystemExit as end:
                status = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    print(json.dumps([status, *texts]), flush=True)
"""


class Forked:
    """Runs `famfs` commands, one after the other, in an environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str | Path, seconds: int = 60) -> tuple[int, str, str]:
        """Exit status, or minus the signal, and both outputs of one command, which is killed after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[os.fspath(word) for word in words], seconds]) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], seconds + 30)[0]:
            raise TimeoutError(f"famfs {words}")
        status, out, err = json.loads(self._process.stdout.readline())
        return status, out, err

    def close(self) -> None:
        """End it, and a command that it may still run."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
