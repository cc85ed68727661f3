# SPDX-License-Identifier: Apache-2.0
"""Bytes to the control socket of a real server on a real socket: requests of the corpus, mutated, cut and run together.

Whatever comes, the connection ends in time, what is said is HTTP, no error is one that nobody foresaw, and the server
answers the next client.
"""

import contextlib
import json
import logging
import random
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import trio

from agreement import check_places, shown
from complaints import Complaints
from famfs_server.daemon.control import ControlServer, Limits, listen
from famfs_server.volume import check
from famfs_server.volume.volume import Volume
from memories import HOST, ScratchMemory, formatted

_CORPUS = Path(__file__).parent / "corpus" / "control"
_LIMITS = Limits(header=4096, body=64 << 10, seconds=0.05, connections=8, watchers=2)
_PATIENCE = 10.0
_HEAD = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [^\r\n]*\r\n(?:[!-9;-~]+: [^\r\n]*\r\n)*\r\n")
_WORDS = (
    *(b"0", b"-1", b"1e9", b"18446744073709551616", b"9" * 30, b"null", b"[]", b"{}", b'"', b"\\ud800", b"\\u0000"),
    *(b"\r\n", b"\n", b"\0", b"\xff\xfe", b":", b" ", b"HTTP/1.1", b"HTTP/9", b"chunked", b"Content-Length: 5\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"/create", b"/files"),
    *(b"GET", b"POST", b"PUT", b"[" * 5000, b"a" * 5000, b"..", b".meta/x", b"?from=", b"%00", b"d/../x"),
)


class Control:
    """Connections to a control server."""

    def __init__(self) -> None:
        self._complaints = Complaints()
        self._memory = ScratchMemory()
        formatted(self._memory)
        self._volume = Volume(self._memory, HOST, "memory")
        self._folder = tempfile.TemporaryDirectory(prefix="famfs-fuzz-")
        self._corpus = [path.read_bytes() for path in sorted(_CORPUS.iterdir())]
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))
        self._thread.start()
        assert self._started.wait(_PATIENCE)

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        server = ControlServer(self._volume, lambda: {"answer": 42}, limits=_LIMITS)
        listener = await listen(Path(self._folder.name))
        with self._scope:
            self._started.set()
            await server.serve(listener)

    def case(self, rng: random.Random) -> Counter[str]:
        """Some connections one after the other, and one that must be served."""
        counts: Counter[str] = Counter()
        for _ in range(20):
            counts["connections"] += 1
            # A request may have turned the log down.
            logging.getLogger("famfs_server").setLevel(logging.ERROR)
            data = b"".join(self._mutated(rng) for _ in range(rng.choice((1, 1, 2, 3))))
            counts["answers"] += self._judge(self._talk(rng, data))
        assert json.loads(self._served()) == {"answer": 42}
        assert not self._complaints.lines, self._complaints.lines
        return counts

    def _served(self) -> bytes:
        """What a client is told who does everything right. On a busy machine it may be too slow for the limits, which
        are short here, or come before the server has noticed that others have left."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            answer = self._exchange(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 200 "):
                return body
            assert head.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 ")), head
            assert time.monotonic() < deadline, head

    def _mutated(self, rng: random.Random) -> bytes:
        found = bytearray(rng.choice(self._corpus))
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            at, roll = rng.randrange(len(found) + 1), rng.random()
            if roll < 0.3 and at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            elif roll < 0.5:
                del found[at : at + rng.choice((1, 2, 10, 100))]
            elif roll < 0.6:
                found[at:at] = found[: rng.randrange(len(found) + 1)]
            else:
                found[at : at + rng.choice((0, 1, 4))] = rng.choice(_WORDS)
        return bytes(found)

    def _talk(self, rng: random.Random, data: bytes) -> bytes:
        """Send, in one or more pieces, and leave: at once, or when the server has said all."""
        pieces = []
        while data and rng.random() < 0.5:
            cut = rng.randrange(len(data) + 1)
            pieces.append(data[:cut])
            data = data[cut:]
        return self._exchange(*pieces, data, leave=rng.random() < 0.2)

    def _exchange(self, *pieces: bytes, leave: bool = False) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_PATIENCE)
            connection.connect(f"{self._folder.name}/sock")
            answer = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    connection.sendall(piece)
                if leave:
                    return b""
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(1 << 16):
                    answer += part
            return answer

    @staticmethod
    def _judge(answer: bytes) -> int:
        """What came must be answers, one behind the other; how many."""
        count = at = 0
        while at < len(answer):
            head = _HEAD.match(answer, at)
            assert head, answer[at : at + 200]
            at = head.end()
            if head[1] == b"100":
                continue
            count += 1
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", head[0])
            if not length:
                # A watcher's answer has no end but that of the connection.
                assert b"chunked" in head[0] or b"close" in head[0], head[0]
                break
            at += int(length[1])
            assert at <= len(answer)
        return count

    def close(self) -> None:
        """The volume is whole, and nothing that was given up has kept space."""
        deadline = time.monotonic() + _PATIENCE
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(deadline - time.monotonic())
        assert not self._thread.is_alive()
        again = Volume(self._memory, HOST, "memory")
        assert shown(self._volume) == shown(again)
        assert self._volume.space.allocated == again.space.allocated
        check_places(again, self._memory)
        assert check.examine(self._memory, "memory", HOST).clean
        self._folder.cleanup()
