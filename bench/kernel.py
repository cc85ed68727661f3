# SPDX-License-Identifier: Apache-2.0
"""The kernel's part of a connection, played over a socket with a server of bench/transport.py."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.site import BenchError, Site
from famfs_server.fuse import abi
from famfs_server.fuse.abi import InitFlag, Opcode
from famfs_server.fuse.dialects import PULL

_OFFERED = InitFlag(0x5FD << 32 | 0x73FFFFFB) | InitFlag.DAX_FMAP
"""What Linux 6.18 offers, and extent maps."""


class Kernel:
    """The other end of a server's transport: sends a request and waits for its answer."""

    def __init__(self, transport: socket.socket) -> None:
        self._transport = transport
        self._unique = 0
        self._buffer = bytearray(16 << 20)
        self._view = memoryview(self._buffer)

    def ask(self, opcode: int, nodeid: int, body: bytes = b"") -> memoryview:
        """The whole answer; valid until the next request."""
        self._unique += 2
        header = abi.IN_HEADER.pack(abi.IN_HEADER.size + len(body), opcode, self._unique, nodeid, 0, 0, 0, 0)
        self._transport.sendall(header + body)
        length, wanted = 0, abi.OUT_HEADER.size
        while length < wanted:
            got = self._transport.recv_into(self._view[length:])
            if not got:
                raise BenchError("the server on the socket has ended")
            length += got
            wanted = int.from_bytes(self._view[:4], "little")
        return self._view[:length]

    def negotiate(self) -> InitFlag:
        """INIT, as a kernel with extent maps sends it; the low flags of the answer."""
        low, high = int(_OFFERED) & 0xFFFFFFFF, int(_OFFERED) >> 32
        answer = self.ask(Opcode.INIT, 0, abi.INIT_IN.pack(abi.VERSION, 45, 1 << 17, low, high))
        _, error, _ = abi.OUT_HEADER.unpack_from(answer)
        if error:
            raise BenchError(f"the server refused INIT: {os.strerror(-error)}")
        return InitFlag(abi.INIT_OUT.unpack_from(answer, abi.OUT_HEADER.size)[3])

    def get_fmap(self, opcode: int, nodeid: int, body: bytes) -> int:
        """Ask for a map; the size of the map, which is more than came if it has to be asked for again."""
        answer = self.ask(opcode, nodeid, body)
        if len(answer) < abi.OUT_HEADER.size + abi.FMAP_HEADER.size:
            _, error, _ = abi.OUT_HEADER.unpack_from(answer)
            raise BenchError(f"GET_FMAP of node {nodeid}: {os.strerror(-error)}")
        return int(abi.FMAP_HEADER.unpack_from(answer, abi.OUT_HEADER.size)[4])


@contextmanager
def server(site: Site, *words: str) -> Iterator[Kernel]:
    """A server of bench/transport.py in a process of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            number = theirs.fileno()
            process = site.start(sys.executable, "-m", "bench.transport", str(number), *words, pass_fds=(number,))
        yield Kernel(ours)
        ours.shutdown(socket.SHUT_RDWR)
        process.wait(timeout=10)


@dataclass(frozen=True, slots=True)
class Answers:
    """What decides how many requests a kernel sends."""

    directory_seconds: int
    """How long it may cache the attributes of directories."""
    listing_flags: int
    """Bits of INIT that decide between READDIR and READDIRPLUS."""


def answers(site: Site, image: Path) -> Answers:
    """Ask this server itself, so that the loop of constants gets the same requests."""
    with server(site, str(image), PULL.name) as kernel:
        flags = kernel.negotiate() & (InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO)
        answer = kernel.ask(Opcode.GETATTR, abi.ROOT_ID, bytes(abi.GETATTR_IN.size))
        return Answers(abi.ATTR_OUT.unpack_from(answer, abi.OUT_HEADER.size)[0], int(flags))
