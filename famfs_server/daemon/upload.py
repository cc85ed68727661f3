# SPDX-License-Identifier: Apache-2.0
"""New files with their data, over the control socket: nobody sees them before every byte is in memory (design 6).

A request is one line of JSON that describes the files, as for /create, then their bytes one file after the other, and a
newline, by which the client says that all has come from where it should. Data go from the socket straight to their
place in the device's memory, which no file has yet. Whatever goes wrong before the end, on either side, leaves nothing.
"""

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import h11
import trio

from famfs_server.daemon.control_requests import HttpError, new_file, no_more, parse_object
from famfs_server.errors import DeviceFaultError
from famfs_server.volume.volume import DeviceMemory, NewFile, Reservation, Volume

_Received = TypeVar("_Received", bytes, bytearray, int)

SEAL = b"\n"
"""The last byte of a request."""
_PIECE = 1 << 20
_SMALL = 64 << 10
"""Files shorter than this come several at a time."""


class Body:
    """The body of a request as it comes, of a length that was said before."""

    def __init__(
        self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request, seconds: float
    ) -> None:
        """`seconds` is how long the client may be silent. Raises HttpError for a request without a length."""
        self._stream = stream
        self._connection = connection
        self._seconds = seconds
        # What h11 has read beyond the head; the rest it never sees.
        self._buffer = memoryview(connection.trailing_data[0])
        announced = dict(request.headers).get(b"content-length")
        if announced is None:
            raise HttpError(411, "say how long the request is: Content-Length")
        if len(announced) > 18:
            raise HttpError(413, "nothing is that long", number=errno.EFBIG)
        self.left = int(announced)
        """Bytes to come."""

    async def go_on(self) -> None:
        """Tell a client that waits for it to send the body."""
        if self._connection.they_are_waiting_for_100_continue:
            response = h11.InformationalResponse(status_code=100, headers=[])
            await self._stream.send_all(self._connection.send(response) or b"")

    async def line(self, limit: int) -> bytes:
        """Everything to the next newline, without it. Raises HttpError if that is more than `limit` bytes."""
        parts: list[bytes] = []
        length = 0
        while True:
            await self._fill()
            piece = bytes(self._buffer)
            head, newline, _ = piece.partition(b"\n")
            length += len(head)
            if length > limit:
                raise HttpError(413, f"the description of the files has at most {limit} bytes", number=errno.E2BIG)
            parts.append(head)
            self._used(len(head) + len(newline))
            if newline:
                return b"".join(parts)

    async def store(self, memory: DeviceMemory, offset: int, length: int) -> None:
        """Put the next `length` bytes into memory."""
        while length:
            if not self._buffer and length >= _SMALL:
                done = await self._receive_into(memory.view[offset : offset + min(length, _PIECE)])
            else:
                await self._fill()
                done = min(length, len(self._buffer))
                memory.write(offset, self._buffer[:done])
                self._used(done)
            offset, length = offset + done, length - done

    def _used(self, count: int) -> None:
        self._buffer = self._buffer[count:]
        self.left -= count

    async def end(self) -> None:
        """The last byte. Raises HttpError if it is another one."""
        await self._fill()
        if bytes(self._buffer) != SEAL:
            raise HttpError(400, "the request does not end with a newline")

    async def _fill(self) -> None:
        if self.left <= 0:
            raise HttpError(400, "the request ends before its files do")
        if not self._buffer:
            self._buffer = memoryview(await self._in_time(partial(self._stream.receive_some, _PIECE)))

    async def _receive_into(self, view: memoryview) -> int:
        try:
            done = await self._in_time(partial(self._stream.socket.recv_into, view))
        except OSError as error:
            # The kernel copies, so memory that is poisoned or gone is an error and no signal.
            if error.errno == errno.EFAULT:
                raise DeviceFaultError("the device's memory cannot be written; see the kernel log") from error
            raise
        self.left -= done
        return done

    async def _in_time(self, receive: Callable[[], Awaitable[_Received]]) -> _Received:
        """What the client sends next, which must be something and come soon."""
        with trio.move_on_after(self._seconds):
            received = await receive()
            if not received:
                raise HttpError(400, "the request ends before it is complete")
            return received
        raise HttpError(408, f"nothing has come for {self._seconds:.0f} seconds", number=errno.ETIMEDOUT)


async def receive(body: Body, volume: Volume, limit: int) -> list[int]:
    """Take in new files with their data and log them together; their nodeids.

    `limit` is the most bytes of their description. Raises HttpError, and the errors of `Volume.create_many`.
    """
    await body.go_on()
    files = await trio.to_thread.run_sync(_described, await body.line(limit))
    if body.left != sum(new.size for new in files) + len(SEAL):
        raise HttpError(400, "the request's length is not that of its files")
    # Nothing is lost if this is cancelled: a reservation that nobody logs leaves no trace.
    with await trio.to_thread.run_sync(volume.reserve, files) as reservation:
        for number in range(len(files)):
            for memory, start, count in reservation.ranges(number):
                await body.store(memory, start, count)
        await body.end()
        return await trio.to_thread.run_sync(_complete, reservation)


def _described(line: bytes) -> list[NewFile]:
    request = parse_object(line)
    rows = request.pop("files", None)
    no_more(request)
    if not isinstance(rows, list) or not rows:
        raise HttpError(400, "files must be a list that is not empty")
    return [new_file(row) for row in rows]


def _complete(reservation: Reservation) -> list[int]:
    reservation.filled()
    return reservation.log()
