# SPDX-License-Identifier: Apache-2.0
"""Requests as no kernel sends them, by way of libfuse and pyfuse3: the whole server with `fastpath=off`.

One case is one connection to a server in processes of its own, which the twin's kernel plays (tests/twin). Whatever
comes, each request that is due an answer gets one, of the right form, from the worker that began.
"""

import random
import tempfile
from collections import Counter
from pathlib import Path

from famfs_server.dax.device import DaxDevice
from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.volume import check
from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile, Volume
from memories import HOST, formatted
from tests.fuzz import wire
from tests.twin.server import Twin

MESSAGES = 600
"""Requests of one connection."""
_DEVICE_SIZE = 8 << 30
_EMPTY = (Opcode.ACCESS, Opcode.FSYNCDIR)
"""What succeeds without a payload, and never gets that far on the request plane."""


class Relayed:
    """Connections to a server that hands everything it can to libfuse."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="famfs-fuzz-")

    def case(self, rng: random.Random) -> Counter[str]:
        """One connection; afterwards fsck has nothing to say."""
        image = Path(self._folder.name) / "image"
        with image.open("wb") as file:
            file.truncate(_DEVICE_SIZE)
        with DaxDevice.open(str(image)) as device:
            memory = device.memory()
            formatted(memory)
            volume = Volume(memory, HOST, str(image))
            volume.mkdir(b"dir", 0o2755, 0, 7)
            volume.create(NewFile(b"file", 100_000, 0o644, 1, 2))
            volume.create(NewFile(b"dir/striped", 5 << 20, 0o600, 3, 4, Interleave(2, 2, 2 << 20)))
            volume.close()
            twin = Twin(image, None, words=("fmap=never", "fastpath=off"), host=HOST, timeout=15)
            try:
                connection = Connection(twin, rng)
                connection.talk(MESSAGES)
                twin.kernel.require_silence()
            finally:
                status = twin.end()
            said = twin.log()
            assert (status, "Traceback" in said) == (0, False), said
            assert check.examine(memory, str(image), HOST).clean
            memory.close()
        return connection.counts

    def close(self) -> None:
        """Nothing is left."""
        self._folder.cleanup()


class Connection(wire.Requests):
    """The kernel's end."""

    def __init__(self, twin: Twin, rng: random.Random) -> None:
        super().__init__(rng)
        self._kernel = twin.mount()

    def talk(self, count: int) -> None:
        """So many requests."""
        for _ in range(count):
            opcode = self.opcode()
            self._request(opcode, self._nodeid(), self._body(opcode))

    def _request(self, opcode: int, nodeid: int, body: bytes) -> None:
        self.counts["messages"] += 1
        length = abi.IN_HEADER.size + len(body)
        claimed = self.claimed(length)
        silent = opcode in wire.SILENT
        unique = self._kernel.send(opcode, nodeid, body, claim=claimed, no_reply=silent)
        if silent:
            if claimed == length:
                self._forgotten(opcode, nodeid, body)
            return
        error, payload = self._kernel.receive(unique)
        if opcode in _EMPTY and not error:
            assert not payload, (opcode, body)
            return
        data = abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(payload), -error, unique) + payload
        self._judge(opcode, nodeid, body, unique, data)
