# SPDX-License-Identifier: Apache-2.0
"""The requests that the kernel puts into the queue of a mount, and its notifications, as its own trace tells of them.

`fuse_request_send` is a trace event of the module; it tells opcode, length, and the process that the kernel asks for.
FORGET is not among them, since nobody waits for an answer; a kprobe where it enters the queue tells nodeid and count,
which the server's counters do not. Two others tell of a notification about a name, and when it has been carried out.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.twin.connection import Op

TRACING = Path("/sys/kernel/tracing")
GROUP = "agreement"
PROBES = {
    "forget": "p:{} famfs:fuse_chan_queue_forget nodeid=%dx:u64 count=%cx:u64",
    "notified": "p:{} famfs:fuse_reverse_inval_entry parent=%si:u64",
    "carried_out": "r:{} famfs:fuse_reverse_inval_entry",
}
FORGET, INVAL_ENTRY = "FORGET", "INVAL_ENTRY"

_LINE = re.compile(r"\s*.*-(?P<pid>\d+)\s+\[\d+\]\s+\S+\s+[\d.]+: (?P<event>\w+): (?P<rest>.*)")
_SENT = re.compile(r"connection (?P<connection>\d+) req \d+ opcode (?P<opcode>\d+) .*len (?P<length>\d+)")
_FORGET = re.compile(r".*nodeid=(?P<nodeid>\d+) count=(?P<count>\d+)")
_NOTIFIED = re.compile(r".*parent=(?P<parent>\d+)")


class Request(NamedTuple):
    """A request, or a notification, as far as both sides tell of it."""

    name: str
    detail: tuple[int, ...]
    """Its length in bytes; of FORGET the nodeid, and how many lookups are given back; of INVAL_ENTRY the directory."""


class Traced(NamedTuple):
    """A request, and the process in whose name the kernel asks."""

    pid: int
    request: Request


def named(opcode: int, length: int) -> Request:
    """A request by its opcode."""
    return Request(Op(opcode).name if opcode in set(Op) else f"opcode {opcode}", (length,))


class RequestTrace:
    """A trace of the one mount that the module has, from now on. It has a buffer of its own."""

    def __init__(self) -> None:
        if not (TRACING / "instances").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], check=True)
        self._folder = TRACING / "instances" / GROUP
        self._folder.mkdir()
        for name, probe in PROBES.items():
            self._define(probe.format(f"{GROUP}/{name}"))
        # Stamps of several processors are compared.
        (self._folder / "trace_clock").write_text("global")
        for event in ("famfs/fuse_request_send", *(f"{GROUP}/{name}" for name in PROBES)):
            (self._folder / "events" / event / "enable").write_text("1")
        self._pipe = os.open(self._folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        self._notified: dict[int, int] = {}
        """The directory that a process tells of."""
        self.connection = -1
        """The device number of the mount; before it is known all requests count."""

    @staticmethod
    def _define(probe: str) -> None:
        # Not truncated: that takes away the probes of others.
        fd = os.open(TRACING / "kprobe_events", os.O_WRONLY)
        try:
            os.write(fd, probe.encode() + b"\n")
        finally:
            os.close(fd)

    def take(self) -> list[Traced]:
        """What has come since the last call."""
        data = b""
        while True:
            try:
                data += os.read(self._pipe, 1 << 16)
            except BlockingIOError:
                break
        return [found for line in data.decode().splitlines() if (found := self._parsed(line))]

    def _parsed(self, text: str) -> Traced | None:
        line = _LINE.fullmatch(text)
        assert line, f"the trace has lost something: {text}"
        pid, rest = int(line["pid"]), line["rest"]
        if line["event"] == "notified":
            notified = _NOTIFIED.fullmatch(rest)
            assert notified, text
            self._notified[pid] = int(notified["parent"])
            return None
        if line["event"] == "carried_out":
            return Traced(pid, Request(INVAL_ENTRY, (self._notified.pop(pid),)))
        if line["event"] == "forget":
            forget = _FORGET.fullmatch(rest)
            assert forget, text
            return Traced(pid, Request(FORGET, (int(forget["nodeid"]), int(forget["count"]))))
        sent = _SENT.fullmatch(rest.strip())
        assert sent, text
        if self.connection not in (-1, int(sent["connection"])):
            return None
        return Traced(pid, named(int(sent["opcode"]), int(sent["length"])))

    def close(self) -> None:
        """Give it back."""
        os.close(self._pipe)
        for name in PROBES:
            (self._folder / "events" / GROUP / name / "enable").write_text("0")
        self._folder.rmdir()
        for name in PROBES:
            self._define(f"-:{GROUP}/{name}")
