# SPDX-License-Identifier: Apache-2.0
"""The tools' side of the control socket: blocking calls that end in a value or in the error that the daemon met.

Imports neither numpy nor trio: a command that only talks to a daemon starts fast.
"""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import h11

from famfs_server import errors
from famfs_server.daemon import local_socket
from famfs_server.errors import FamfsError

SOCKET_NAME = "sock"
SHADOW_XATTR = "user.famfs.shadow"
"""On every file of a mount: the directory that holds the socket (design 12)."""

CREATE_LIMIT = 10_000
"""Files in one request to create; as JSON they stay far below the daemon's limit for a request."""

_CALL_SECONDS = 600.0
_MAX_RESPONSE = 64 << 20
_CHUNK = 1 << 16

_BY_ERRNO: dict[int, type[FamfsError]] = {
    errno.EPERM: errors.PrivilegeError,
    errno.EACCES: errors.PrivilegeError,
    errno.ENODEV: errors.DeviceError,
    errno.EBUSY: errors.DeviceBusyError,
    errno.EIO: errors.DeviceFaultError,
    errno.EROFS: errors.RoleError,
    errno.ENOSPC: errors.NoSpaceError,
    errno.EINVAL: errors.PathError,
    errno.ENAMETOOLONG: errors.NameTooLongError,
    errno.ENOENT: errors.NoSuchPathError,
    errno.ENOTDIR: errors.NotADirectoryPathError,
    errno.EEXIST: errors.ExistsError,
}


def run_root() -> Path:
    """Where run-time files of mounts lie."""
    return Path(os.environ.get("FAMFS_RUN_DIR") or "/run/famfs")


class ControlError(FamfsError):
    """The daemon cannot be reached, or its answer cannot be understood."""


@dataclass(frozen=True, slots=True)
class Striping:
    """How to stripe a file; checked by whoever allocates."""

    buckets: int
    strips: int
    chunk_size: int


@dataclass(frozen=True, slots=True)
class FileRequest:
    """A file to be made: a normalised path below the root of the file system, size in bytes, attributes."""

    path: bytes
    size: int
    mode: int
    uid: int
    gid: int
    striping: Striping | None = None


@dataclass(frozen=True, slots=True)
class DirectoryRequest:
    """A directory to be made: a normalised path below the root of the file system, attributes."""

    path: bytes
    mode: int
    uid: int
    gid: int


class ControlClient:
    """Calls to the daemon whose socket lies in `directory`. One connection for each call."""

    def __init__(self, directory: str, *, seconds: float = _CALL_SECONDS) -> None:
        """`seconds` is how long the daemon may stay silent."""
        self.directory = directory
        self._seconds = seconds

    @classmethod
    def of_mount(cls, path: str) -> "ControlClient":
        """The client for the mount that `path` lies in. Raises ControlError where the daemon names no socket."""
        try:
            return cls(os.fsdecode(os.getxattr(path, SHADOW_XATTR).rstrip(b"\0")))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ControlError(f"{path or repr(path)}: {os.strerror(error.errno or 0)}") from error
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                raise ControlError(f"{path}: is not in a mounted famfs file system") from error
            raise ControlError(
                f"{path}: the mount does not say where its control socket is ({os.strerror(error.errno or 0)})"
            ) from error

    def create(self, files: Sequence[FileRequest]) -> list[int]:
        """Make `files`, all of them or none; their nodeids. At most CREATE_LIMIT of them."""
        return [int(nodeid) for nodeid in self._call("POST", "/create", _described(files))["nodeids"]]

    def put(self, files: Sequence[FileRequest], data: Iterable[memoryview]) -> list[int]:
        """Make `files` with their data, all of them or none; their nodeids. At most CREATE_LIMIT of them.

        `data` are the bytes of all files, one after the other, in pieces of any size. Nobody sees a file before all of
        them are in memory; what `data` raises leaves nothing behind.
        """
        head = json.dumps(_described(files)).encode() + b"\n"
        upload = _Upload(head, sum(new.size for new in files), data)
        answer = _object(b"".join(self._exchange("PUT", "/files", upload)), "/files")
        return [int(nodeid) for nodeid in answer["nodeids"]]

    def mkdir(self, path: bytes, mode: int, uid: int, gid: int) -> int:
        """Make a directory; its nodeid."""
        answer = self._call("POST", "/mkdir", {"path": _text(path), "mode": mode, "uid": uid, "gid": gid})
        return int(answer["nodeid"])

    def make_directories(self, directories: Sequence[DirectoryRequest]) -> int:
        """Make directories in this order, but for those that exist already; how many were made. At most CREATE_LIMIT.

        The first one that cannot be made ends it; those before it stay.
        """
        rows = [{"path": _text(new.path), "mode": new.mode, "uid": new.uid, "gid": new.gid} for new in directories]
        return int(self._call("POST", "/mkdir", {"directories": rows})["made"])

    def add_device(self, uuid: UUID, path: str) -> int:
        """Make the device at `path`, an absolute one, part of the file system; its number."""
        return int(self._call("POST", "/devices", {"uuid": str(uuid), "path": path})["index"])

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        return self._call("GET", "/status")

    def pid(self) -> int:
        """The process that serves the mount."""
        return int(self.request("GET", "/pid"))

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return _object(self.request(method, path, b"" if body is None else json.dumps(body).encode()), path)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of the daemon's answer. Raises the daemon's own error, or ControlError."""
        parts, received = [], 0
        for part in self._exchange(method, path, body):
            received += len(part)
            if received > _MAX_RESPONSE:
                raise ControlError(f"the daemon's answer to {path} is larger than {_MAX_RESPONSE} bytes")
            parts.append(part)
        return b"".join(parts)

    def watch(self, index: int | None = None) -> Iterator[dict[str, Any]]:
        """What changes from log entry `index` on, or from now on, as it happens; ends when the daemon has nothing more
        to tell. Raises ControlError where the connection breaks: go on behind the last entry that came."""
        line = b""
        for part in self._exchange("GET", "/watch" if index is None else f"/watch?from={index}", b"", patient=True):
            *whole, line = (line + part).split(b"\n")
            for text in whole:
                try:
                    yield json.loads(text)
                except ValueError as error:
                    raise ControlError(f"what the daemon tells watchers makes no sense: {error}") from error

    def _exchange(self, method: str, path: str, body: "bytes | _Upload", *, patient: bool = False) -> Iterator[bytes]:
        """One request, and the body of its answer piece by piece; a `patient` caller waits for them for ever."""
        try:
            with self._connect() as connection:
                answer = _answer(connection, method, path, body)
                status = next(answer)
                assert isinstance(status, int)
                if status != 200:
                    raise decode_error(status, b"".join(part for part in answer if isinstance(part, bytes)))
                if patient:
                    connection.settimeout(None)
                for part in answer:
                    assert isinstance(part, bytes)
                    yield part
        except TimeoutError as error:
            raise ControlError(f"the daemon did not answer {path} within {self._seconds:.0f} seconds") from error
        except PermissionError as error:
            raise errors.PrivilegeError(
                "only root may talk to the daemon of this mount; the mount option control_uid names one more user"
            ) from error
        except OSError as error:
            raise ControlError(
                f"cannot reach the daemon in {self.directory}: {os.strerror(error.errno or errno.EIO)}"
            ) from error
        except h11.RemoteProtocolError as error:
            raise ControlError(f"the daemon's answer to {path} is broken: {error}") from error

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(self._seconds)
            with local_socket.address(self.directory, SOCKET_NAME) as address:
                connection.connect(address)
        except BaseException:
            connection.close()
            raise
        return connection


def decode_error(status: int, body: bytes) -> FamfsError:
    """The error in a refused request's body: the daemon's own class where this package has it."""
    try:
        answer = json.loads(body)
        number, line, kind = int(answer["errno"]), " ".join(str(answer["error"]).split()), str(answer.get("kind", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ControlError(f"the daemon refused the request with status {status}")
    named = getattr(errors, kind, None)
    if isinstance(named, type) and issubclass(named, FamfsError):
        return named(line)
    error = _BY_ERRNO.get(number, FamfsError)(line)
    error.errno = number
    return error


def _object(answer: bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(answer)
    except ValueError as error:
        raise ControlError(f"the daemon's answer to {path} makes no sense: {error}") from error
    if not isinstance(value, dict):
        raise ControlError(f"the daemon's answer to {path} is not an object")
    return value


def _described(files: Sequence[FileRequest]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for new in files:
        row = {"path": _text(new.path), "size": new.size, "mode": new.mode, "uid": new.uid, "gid": new.gid}
        rows.append(row if new.striping is None else row | {"interleave": asdict(new.striping)})
    return {"files": rows}


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class _Upload:
    """A request's body that is not at hand as a whole: a line, `size` bytes in pieces, and a newline."""

    line: bytes
    size: int
    data: Iterable[memoryview]

    def __len__(self) -> int:
        return len(self.line) + self.size + 1


def _send(connection: socket.socket, body: bytes | _Upload) -> None:
    if isinstance(body, bytes):
        connection.sendall(body)
        return
    connection.sendall(body.line)
    left = body.size
    for piece in body.data:
        connection.sendall(piece)
        left -= len(piece)
    if left:
        raise ControlError(f"{left} bytes of the files are missing")
    connection.sendall(b"\n")


def _answer(connection: socket.socket, method: str, path: str, body: bytes | _Upload) -> Iterator[int | bytes]:
    """Send a request; the status of its answer, and then the answer's body piece by piece."""
    protocol = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Connection", "close"), ("Content-Length", str(len(body)))]
    head = protocol.send(h11.Request(method=method, target=path, headers=headers)) or b""
    # A daemon that refuses early answers and closes before it has read everything.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(head)
        _send(connection, body)
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(connection.recv(_CHUNK))
        elif isinstance(event, h11.Response):
            yield event.status_code
        elif isinstance(event, h11.Data):
            yield bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return
        elif isinstance(event, h11.ConnectionClosed):
            raise ControlError(f"the daemon closed the connection without an answer to {path}")
