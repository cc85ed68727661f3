# SPDX-License-Identifier: Apache-2.0
"""A service manager for tests: the notify socket and the descriptor store of systemd, as sd_notify(3) has them."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

# Gives the descriptors named in its first argument the numbers from 3 on, and becomes the program in the others.
PASS = """
import os, sys
for place, number in enumerate(sys.argv[1].split(), 3):
    os.dup2(int(number), place)
    os.close(int(number))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
_HIGH = 500


class Manager:
    """Starts one service, hears its messages, and keeps what it stores for the next start."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        self._errors = directory / "stderr"
        self._environment = {**environment, "NOTIFY_SOCKET": str(directory / "notify")}
        self.messages: list[str] = []
        """Every assignment that has come, in order."""
        self.store: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 16)
            if data == b"the end":
                return
            lines = data.decode().split("\n")
            fields = dict(line.split("=", 1) for line in lines)
            name = fields.get("FDNAME", "stored")
            if "FDSTORE" in fields:
                (self.store[name],) = descriptors
                descriptors = []
            if "FDSTOREREMOVE" in fields and name in self.store:
                os.close(self.store.pop(name))
            # A barrier is a descriptor that is closed when everything before it has been dealt with.
            for descriptor in descriptors:
                os.close(descriptor)
            self.messages += lines

    def start(self, *command: str, **more: str) -> "subprocess.Popen[bytes]":
        """Start the service, with what it has stored."""
        passed = {}
        for place, (name, descriptor) in enumerate(self.store.items()):
            os.dup2(descriptor, _HIGH + place)
            passed[name] = _HIGH + place
        environment = {
            **self._environment,
            "LISTEN_FDS": str(len(passed)),
            "LISTEN_FDNAMES": ":".join(passed),
            **more,
        }
        words = [sys.executable, "-I", "-S", "-c", PASS, " ".join(map(str, passed.values())), *command]
        self.messages.clear()
        # Not a pipe: a notifier may wait in the kernel, with its copy of it, until the next worker answers.
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(words, env=environment, pass_fds=list(passed.values()), stderr=errors)
        for descriptor in passed.values():
            os.close(descriptor)
        return self.process

    @property
    def errors(self) -> str:
        """What the service has written to standard error since it was started last."""
        return self._errors.read_text()

    def heard(self, assignment: str) -> bool:
        """Whether the service has said that since it was started."""
        return assignment in self.messages

    def close(self) -> None:
        """End the service if it runs, and forget what was stored."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        self._socket.sendto(b"the end", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()
        for descriptor in self.store.values():
            os.close(descriptor)
        self.store.clear()
