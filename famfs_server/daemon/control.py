# SPDX-License-Identifier: Apache-2.0
"""The control socket's server: HTTP/1.1 over a unix socket, for batches of files, status, watching and log level.

Whoever can connect may look at figures; only root, and the user whom the mount option `control_uid` names, may change
anything or see names (SO_PEERCRED). A request that is malformed, too large, half sent or slow costs its own connection
and nothing else.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import h11
import trio

from famfs_server.daemon import local_socket, upload
from famfs_server.daemon.control_client import SOCKET_NAME
from famfs_server.daemon.control_requests import (
    HttpError,
    new_directory,
    new_file,
    no_more,
    parse_object,
    path_of,
    uuid_of,
)
from famfs_server.daemon.options import SYSLOG_LEVELS, syslog_level
from famfs_server.daemon.watch import Watcher, lines
from famfs_server.errors import (
    ExistsError,
    FamfsError,
    LogFullError,
    NoSpaceError,
    NoSuchPathError,
    NotADirectoryPathError,
    PathError,
    PrivilegeError,
    RoleError,
    UsageError,
)
from famfs_server.volume.volume import Volume

log = logging.getLogger(__name__)

_AT_ONCE = 50
"""Nodes that are gone through before others may have the interpreter: about a millisecond, each with its line."""
_WATCH_SECONDS = 0.05
"""How often a watcher looks whether there is something to tell. It reads a few words of memory."""

_HTTP_STATUS: tuple[tuple[type[FamfsError], int], ...] = (
    (NoSuchPathError, 404),
    (ExistsError, 409),
    (NotADirectoryPathError, 409),
    (PathError, 400),
    (UsageError, 400),
    (PrivilegeError, 403),
    (RoleError, 403),
    (LogFullError, 507),
    (NoSpaceError, 507),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask of the server. Sizes in bytes."""

    header: int = 16 << 10
    body: int = 16 << 20
    seconds: float = 30.0
    """For sending a request whole (of the data of files: for each piece), and again for taking the answer."""
    connections: int = 64
    watchers: int = 16
    """Of the connections, at most so many for watching."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, ready to be sent."""

    status: int
    body: bytes
    content_type: str = "application/json"
    allow: str = ""


@dataclass(frozen=True, slots=True)
class _Route:
    """What a method of a path does; a `restricted` one needs more than being able to connect."""

    handle: Callable[["ControlServer", bytes], Reply]
    restricted: bool = False


@dataclass(frozen=True, slots=True)
class _Upload:
    """A path whose requests have no limit: the data of files (`upload.receive`)."""

    restricted: bool = True


@dataclass(frozen=True, slots=True)
class _Feed:
    """A path whose answer goes on until one side ends it. `begin` is given the query of the request."""

    begin: Callable[["ControlServer", dict[str, str]], Watcher]
    restricted: bool = True


class ControlServer:
    """Serves one mount's control socket. Work on the volume is done in threads: it waits for the volume's lock."""

    def __init__(
        self,
        volume: Volume,
        status: Callable[[], Mapping[str, Any]],
        *,
        owner: int = 0,
        limits: Limits | None = None,
        keep_log_level: Callable[[int], None] = lambda level: None,
    ) -> None:
        """`status` gives what `/status` shows, and must be quick; `owner` is the uid that may do all beside root;
        `keep_log_level` remembers a syslog priority that was set, for the next worker."""
        self._volume = volume
        self._status = status
        self._trusted = frozenset({0, owner})
        self._limits = limits or Limits()
        self._keep_log_level = keep_log_level
        self._connections = 0
        self._watchers = 0

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answer until cancelled."""
        await trio.serve_listeners(self._connection, [listener])

    async def _connection(self, stream: trio.SocketStream) -> None:
        """One client, from its first byte to its last; no error of its making leaves this."""
        self._connections += 1
        try:
            async with stream:
                await self._talk(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionError):
            log.debug("a control client has gone before its answer")
        except Exception:
            log.exception("a control request fails")
        finally:
            self._connections -= 1

    async def _talk(self, stream: trio.SocketStream) -> None:
        uid = local_socket.peer_uid(stream.socket)
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header)
        while True:
            reply: Reply | None = None
            act: Callable[[], Awaitable[Reply | None]] | None = None
            with trio.move_on_after(self._limits.seconds):
                try:
                    act = await self._hear(stream, connection, uid)
                    if act is None:
                        return
                except HttpError as error:
                    reply = _failure(error.status, error.number, str(error), allow=error.allow)
                except h11.RemoteProtocolError as error:
                    reply = _failure(error.error_status_hint, 22, f"not an HTTP request: {error}")
                except FamfsError as error:
                    reply = _refusal(error)
            if act is not None:
                reply = await act()
                if reply is None:
                    return
            elif reply is None:
                reply = _failure(408, 110, f"the request did not arrive within {self._limits.seconds:.0f} seconds")
            with trio.move_on_after(self._limits.seconds):
                await _send(stream, connection, reply)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    async def _hear(
        self, stream: trio.SocketStream, connection: h11.Connection, uid: int
    ) -> Callable[[], Awaitable[Reply | None]] | None:
        """The next request, and what is to be done about it, which may take its time; it gives nothing if it has
        answered itself. Nothing when the client has hung up."""
        if self._connections > self._limits.connections:
            raise HttpError(503, "too many clients at once; try again", number=11)
        request = await _next_request(stream, connection)
        if request is None:
            return None
        self._check_head(request)
        route = self._route(request, uid)
        if isinstance(route, _Upload):
            return partial(self._upload, stream, connection, request)
        body = await self._body(stream, connection, request)
        if isinstance(route, _Feed):
            return partial(self._feed, stream, connection, route.begin(self, _query(request)))
        # Not given up half way: trio waits for a thread.
        return partial(trio.to_thread.run_sync, self._answer, route, body)

    async def _upload(self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request) -> Reply:
        """PUT /files: new files with their data; all of them, or none."""
        try:
            body = upload.Body(stream, connection, request, self._limits.seconds)
            return _json({"nodeids": await upload.receive(body, self._volume, self._limits.body)})
        except HttpError as error:
            return _failure(error.status, error.number, str(error))
        except FamfsError as error:
            return _refusal(error)

    async def _feed(self, stream: trio.SocketStream, connection: h11.Connection, watcher: Watcher) -> None:
        """Answer with all that a watcher has to tell, until it ends or the client leaves."""
        if self._watchers >= self._limits.watchers:
            await _send(stream, connection, _failure(503, 11, "too many watchers at once"))
            return
        self._watchers += 1
        gone = (trio.BrokenResourceError, trio.ClosedResourceError)
        try:
            async with trio.open_nursery() as nursery:

                async def until_the_client_leaves() -> None:
                    with contextlib.suppress(*gone):
                        await stream.receive_some(1)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_the_client_leaves)
                with contextlib.suppress(*gone):
                    await _tell_all(stream, connection, watcher)
                nursery.cancel_scope.cancel()
        finally:
            self._watchers -= 1

    async def _body(self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request) -> bytes:
        announced = dict(request.headers).get(b"content-length", b"0")
        # h11 has checked that these are digits, not how many.
        if len(announced) > 18 or int(announced) > self._limits.body:
            raise HttpError(413, f"a request has at most {self._limits.body} bytes", number=7)
        parts = []
        received = 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[])
                    await stream.send_all(connection.send(go_on) or b"")
                connection.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Data):
                received += len(event.data)
                if received > self._limits.body:
                    raise HttpError(413, f"a request has at most {self._limits.body} bytes", number=7)
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return b"".join(parts)
            else:
                raise HttpError(400, "the request ends before its body does")

    def _check_head(self, request: h11.Request) -> None:
        """h11 limits only heads that come in pieces."""
        size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
        if size > self._limits.header:
            raise HttpError(431, f"the head of a request has at most {self._limits.header} bytes", number=7)

    def _route(self, request: h11.Request, uid: int) -> _Route | _Feed | _Upload:
        path = request.target.decode("ascii", "replace").partition("?")[0]
        method = request.method.decode("ascii", "replace")
        methods = ROUTES.get(path)
        if methods is None:
            raise HttpError(404, f"there is no {path[:100]}", number=2)
        route = methods.get(method)
        if route is None:
            allow = ", ".join(methods)
            raise HttpError(405, f"{path} understands {allow}, not {method[:20]}", number=95, allow=allow)
        if route.restricted and uid not in self._trusted:
            who = " or ".join(["root", *(f"uid {owner}" for owner in self._trusted - {0})])
            raise HttpError(403, f"only {who} may ask the daemon of this mount for that", number=1)
        return route

    def _answer(self, route: _Route, body: bytes) -> Reply:
        try:
            return route.handle(self, body)
        except HttpError as error:
            return _failure(error.status, error.number, str(error))
        except FamfsError as error:
            return _refusal(error)
        except Exception as error:
            log.exception("a control request fails")
            return _failure(500, 5, f"{type(error).__name__}: {error}")

    # -- the paths (in a thread) ----------------------------------------------------------------

    def create(self, body: bytes) -> Reply:
        """POST /create: all of the files, or none."""
        request = parse_object(body)
        rows = request.pop("files", None)
        no_more(request)
        if not isinstance(rows, list):
            raise HttpError(400, "files must be a list")
        return _json({"nodeids": self._volume.create_many([new_file(row) for row in rows]) if rows else []})

    def mkdir(self, body: bytes) -> Reply:
        """POST /mkdir: one directory, or several in their order but for those that exist already."""
        request = parse_object(body)
        if "directories" not in request:
            return _json({"nodeid": self._volume.mkdir(*new_directory(request))})
        rows = request.pop("directories")
        no_more(request)
        if not isinstance(rows, list):
            raise HttpError(400, "directories must be a list")
        tree = self._volume.namespace
        made = 0
        for path, mode, uid, gid in [new_directory(row) for row in rows]:
            existing = tree.resolve(path)
            if not existing or not tree.is_directory(existing):
                self._volume.mkdir(path, mode, uid, gid)
                made += 1
        return _json({"made": made})

    def add_device(self, body: bytes) -> Reply:
        """POST /devices: one more device, whose superblock is written already."""
        row = parse_object(body)
        path, uuid = os.fsdecode(path_of(row)), uuid_of(row)
        no_more(row)
        if not path.startswith("/"):
            raise HttpError(400, "path must be absolute")
        return _json({"index": self._volume.add_device(uuid, path).index})

    def status(self, body: bytes) -> Reply:
        """GET /status."""
        return _json(dict(self._status()))

    def pid(self, body: bytes) -> Reply:
        """GET /pid: the process that serves."""
        return _text(f"{os.getpid()}\n")

    def metrics(self, body: bytes) -> Reply:
        """GET /metrics: the status as Prometheus reads it."""
        # Imported by those who want it: the library takes a tenth of a second.
        from famfs_server.daemon import metrics

        return Reply(200, metrics.exposition([self._status()]), metrics.CONTENT_TYPE)

    def icache_stats(self, body: bytes) -> Reply:
        """GET /icache_stats: figures of the namespace as YAML."""
        figures = self._volume.statistics()
        lines = {
            "inodes": figures.files + figures.directories,
            "files": figures.files,
            "directories": figures.directories,
            "log_entries": figures.log_entries,
            "skipped": sum(figures.skipped.values()),
        }
        return _text("---\nicache_stats:\n" + "".join(f"  {key}: {value}\n" for key, value in lines.items()) + "...\n")

    def icache_dump(self, body: bytes) -> Reply:
        """GET /icache_dump: every node goes into the log."""
        tree = self._volume.namespace
        count = 0
        for nodeid in tree.walk():
            log.info(
                "inode %d mode %o size %d path %r", nodeid, tree.mode[nodeid], tree.size[nodeid], tree.path(nodeid)
            )
            count += 1
            if not count % _AT_ONCE:
                self._volume.give_way()
        return _text(f"{count} inodes written to the log\n")

    def log_level(self, body: bytes) -> Reply:
        """GET /log_level: as a syslog priority."""
        level = logging.getLogger("famfs_server").getEffectiveLevel()
        return _text(f"{max(number for number, known in enumerate(SYSLOG_LEVELS) if known >= level)}\n")

    def set_log_level(self, body: bytes) -> Reply:
        """POST or PUT /log_level: 0 to 7."""
        level = syslog_level(body.decode("ascii", "replace"))
        logging.getLogger("famfs_server").setLevel(SYSLOG_LEVELS[level])
        self._keep_log_level(level)
        return _text(f"{level}\n")

    # -- feeds (on trio) ------------------------------------------------------------------------

    def watch(self, query: dict[str, str]) -> Watcher:
        """GET /watch[?from=INDEX]: what changes, as lines of JSON; without INDEX from now on."""
        start = query.pop("from", None)
        if query:
            raise HttpError(400, f"unknown parameter {sorted(query)[0][:50]!r}")
        if start is not None and not (start.isascii() and start.isdigit() and len(start) < 20):
            raise HttpError(400, "from must be the index of a log entry")
        return Watcher(self._volume, None if start is None else int(start))


ROUTES: dict[str, dict[str, _Route | _Feed | _Upload]] = {
    "/create": {"POST": _Route(ControlServer.create, restricted=True)},
    "/files": {"PUT": _Upload()},
    "/mkdir": {"POST": _Route(ControlServer.mkdir, restricted=True)},
    "/devices": {"POST": _Route(ControlServer.add_device, restricted=True)},
    "/status": {"GET": _Route(ControlServer.status)},
    "/metrics": {"GET": _Route(ControlServer.metrics)},
    "/pid": {"GET": _Route(ControlServer.pid)},
    "/icache_stats": {"GET": _Route(ControlServer.icache_stats)},
    "/icache_dump": {"GET": _Route(ControlServer.icache_dump)},
    "/watch": {"GET": _Feed(ControlServer.watch)},
    "/log_level": {
        "GET": _Route(ControlServer.log_level),
        "POST": _Route(ControlServer.set_log_level, restricted=True),
        "PUT": _Route(ControlServer.set_log_level, restricted=True),
    },
}


async def listen(directory: Path, *, public: bool = False) -> trio.SocketListener:
    """A listener on the socket in `directory`, which must exist. A socket left there by a dead daemon is replaced.

    A `public` one can be connected to by every user who can reach the directory.
    """
    with contextlib.suppress(FileNotFoundError):
        (directory / SOCKET_NAME).unlink()
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with local_socket.address(directory, SOCKET_NAME) as address:
        await listener.bind(address)
    (directory / SOCKET_NAME).chmod(0o666 if public else 0o600)
    listener.listen(64)
    return trio.SocketListener(listener)


def _query(request: h11.Request) -> dict[str, str]:
    """The parameters behind the path of a request."""
    return dict(parse_qsl(request.target.decode("ascii", "replace").partition("?")[2], keep_blank_values=True))


async def _next_request(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    """The head of the next request; nothing when the client has hung up."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some())
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


async def _tell_all(stream: trio.SocketStream, connection: h11.Connection, watcher: Watcher) -> None:
    headers = [("Content-Type", "application/x-ndjson"), ("Connection", "close")]
    await stream.send_all(connection.send(h11.Response(status_code=200, headers=headers)) or b"")
    data = lines(iter([watcher.begin()]))
    while True:
        await stream.send_all(connection.send(h11.Data(data=data)) or b"")
        if watcher.ended:
            break
        while not watcher.is_behind:
            await trio.sleep(_WATCH_SECONDS)
        data = lines(watcher.take())
    await stream.send_all(connection.send(h11.EndOfMessage()) or b"")


async def _send(stream: trio.SocketStream, connection: h11.Connection, reply: Reply) -> None:
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    headers = [("Content-Type", reply.content_type), ("Content-Length", str(len(reply.body)))]
    if reply.allow:
        headers.append(("Allow", reply.allow))
    if connection.their_state is not h11.DONE:
        headers.append(("Connection", "close"))
    parts = [
        connection.send(event) or b""
        for event in (
            h11.Response(status_code=reply.status, headers=headers),
            h11.Data(data=reply.body),
            h11.EndOfMessage(),
        )
    ]
    await stream.send_all(b"".join(parts))


def _json(value: Mapping[str, Any]) -> Reply:
    return Reply(200, json.dumps(value).encode() + b"\n")


def _text(text: str) -> Reply:
    return Reply(200, text.encode("utf-8", "surrogateescape"), "text/plain; charset=utf-8")


def _refusal(error: FamfsError) -> Reply:
    status = next((status for kind, status in _HTTP_STATUS if isinstance(error, kind)), 500)
    return _failure(status, error.errno, str(error), kind=type(error).__name__)


def _failure(status: int, number: int, line: str, *, kind: str = "", allow: str = "") -> Reply:
    answer = {"errno": number, "error": " ".join(line.split())}
    if kind:
        answer["kind"] = kind
    return Reply(status, json.dumps(answer).encode() + b"\n", allow=allow)
