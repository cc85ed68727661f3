# SPDX-License-Identifier: Apache-2.0
"""A file outside that is copied into a file system, and that may change or vanish meanwhile."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from famfs_server.cli import program
from famfs_server.errors import FamfsError

PIECE = 8 << 20
_GATHERED = 1 << 20


class SourceError(FamfsError):
    """A file cannot be read whole, or is not what it was."""


@dataclass(frozen=True, slots=True)
class Source:
    """A regular file by its name, and the size in bytes that it had when it was found."""

    name: str
    size: int

    def pieces(self, buffer: memoryview) -> Iterator[memoryview]:
        """All bytes, in pieces that fill `buffer`, but for the last one. Raises SourceError unless they are as many as
        there were."""
        try:
            fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(program.describe(error)) from error
        try:
            offset = 0
            while offset < self.size:
                piece = buffer[: self.size - offset]
                done = 0
                while done < len(piece):
                    # Not every file system gives as much as is asked for.
                    count = self._read(fd, piece[done:], offset + done)
                    if not count:
                        raise SourceError(f"{self.name}: has become shorter while it was copied")
                    done += count
                yield piece
                offset += done
            if self._read(fd, memoryview(bytearray(1)), offset):
                raise SourceError(f"{self.name}: has grown while it was copied")
        finally:
            os.close(fd)

    def _read(self, fd: int, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(fd, [buffer], offset)
        except OSError as error:
            raise SourceError(f"{self.name}: {os.strerror(error.errno or 0)}") from error


def gathered(sources: Iterable[Source]) -> Iterator[memoryview]:
    """The bytes of several files, one behind the other; short files come together."""
    buffer = memoryview(bytearray(PIECE))
    used = 0
    for source in sources:
        if used and used + source.size > _GATHERED:
            yield buffer[:used]
            used = 0
        if source.size > _GATHERED:
            yield from source.pieces(buffer)
            continue
        for piece in source.pieces(buffer[used:]):
            used += len(piece)
    if used:
        yield buffer[:used]
