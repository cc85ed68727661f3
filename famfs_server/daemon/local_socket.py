# SPDX-License-Identifier: Apache-2.0
"""Sockets in a mount's run-time directory: where they are, and who is at their other end."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

_PEERCRED = struct.Struct("3i")


@contextmanager
def address(directory: str | Path, name: str) -> Iterator[str]:
    """An address of the socket `name` in `directory`, to bind or connect to. Raises OSError.

    A socket's address has 108 bytes; by way of a descriptor the directory's path may be longer.
    """
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}/{name}"
    finally:
        os.close(handle)


class _Connection(Protocol):
    """A socket of the standard library, or one of trio's."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def peer_uid(connection: _Connection) -> int:
    """The user who has connected."""
    uid: int = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))[1]
    return uid
