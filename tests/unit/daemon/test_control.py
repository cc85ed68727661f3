# SPDX-License-Identifier: Apache-2.0
"""The control socket: a real server on a real unix socket over a real volume, and clients that behave and misbehave."""

import contextlib
import errno
import json
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import trio

import famfs_server
from famfs_server import errors
from famfs_server.daemon.control import ROUTES, ControlServer, Limits, listen
from famfs_server.daemon.control_client import (
    CREATE_LIMIT,
    ControlClient,
    ControlError,
    DirectoryRequest,
    FileRequest,
    Striping,
    decode_error,
)
from famfs_server.dax.device import DaxDevice
from famfs_server.omf import layout
from famfs_server.volume import format
from famfs_server.volume import namespace as ns
from famfs_server.volume.provisional import Provisional
from famfs_server.volume.volume import NewFile, Volume

HOST = UUID("f00dcafe-0102-4304-8506-0708090a0b0c")
NOBODY = 65534
CLOSED = "another user cannot read this checkout, which lies in a folder closed to others"
LIMITS = Limits(header=4096, body=256 << 10, seconds=20, connections=8, watchers=2)


class Server:
    """A control server in a thread of its own, over a volume in a sparse file."""

    def __init__(self, directory: Path, host: UUID = HOST, limits: Limits = LIMITS, owner: int = 0) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(8 << 30)
        self._device = DaxDevice.open(str(image))
        self.memory = self._device.memory()
        format.make_filesystem(self.memory, "/dev/dax0.0", HOST, log_length=layout.MIN_LOG_LENGTH)
        self.volume = Volume(self.memory, host, "/dev/dax0.0")
        self.client = ControlClient(str(directory), seconds=10)
        self._public = owner != 0
        self._server = ControlServer(
            self.volume, lambda: {"data_path": "server", "answer": 42}, owner=owner, limits=limits
        )
        self._started = threading.Event()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        assert self._started.wait(10)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        listener = await listen(self.directory, public=self._public)
        with self._scope:
            self._started.set()
            await self._server.serve(listener)

    def close(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.volume.close()
        self.memory.close()
        self._device.close()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        previous = os.getcwd()
        os.chdir(self.directory)
        try:
            connection.connect("sock")
        finally:
            os.chdir(previous)
        return connection

    def raw(self, *pieces: bytes, shut: bool = False) -> bytes:
        """Everything that the server says to these bytes until it closes."""
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    connection.sendall(piece)
                if shut:
                    connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    answer += part
            return answer

    def as_nobody(self, act: Callable[[], object]) -> str:
        """What `act` gives, done by another user in another process."""
        if os.geteuid() != 0:
            pytest.skip("needs root to become another user")
        for path in (self.directory, *self.directory.parents):
            if path == Path("/tmp"):
                break
            path.chmod(0o755)
        if not self._public:
            (self.directory / "sock").chmod(0o666)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            outcome = "nothing"
            try:
                signal.alarm(20)
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                outcome = str(act()) if os.access(famfs_server.__file__, os.R_OK) else CLOSED
            except BaseException as error:
                outcome = repr(error)
            finally:
                os.write(write_end, outcome.encode())
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            answer = pipe.read().decode()
        os.waitpid(pid, 0)
        if answer == CLOSED:
            pytest.skip(answer)
        return answer

    def is_well(self) -> bool:
        """Whether the server answers, given time to notice on a busy machine that other clients have left."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return bool(self.client.status()["answer"] == 42)
            except errors.FamfsError as error:
                if "too many clients" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "run")
    yield running
    running.close()


def file(path: bytes, size: int = 4096) -> FileRequest:
    return FileRequest(path, size, 0o640, 1, 2)


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if not headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_created_files_are_in_the_volume(server: Server) -> None:
    names = [b"plain", b"gr\xc3\xbc\xc3\x9f", b"no utf-8 \xff", b'quote"\\']
    nodeids = server.client.create([file(name, 5000) for name in names])
    tree = server.volume.namespace
    assert nodeids == [tree.resolve(name) for name in names]
    assert {tree.size[nodeid] for nodeid in nodeids} == {5000}
    assert {tree.mode[nodeid] & 0o7777 for nodeid in nodeids} == {0o640}
    assert {(tree.uid[nodeid], tree.gid[nodeid]) for nodeid in nodeids} == {(1, 2)}


def test_striping_reaches_the_allocator(server: Server) -> None:
    striped = replace(file(b"striped", 32 << 20), striping=Striping(4, 3, 2 << 20))
    [nodeid] = server.client.create([striped])
    fmap = server.volume.namespace.fmap(nodeid)
    assert (fmap.chunk_size, len(fmap.extents)) == (2 << 20, 3)


def test_directories(server: Server) -> None:
    nodeid = server.client.mkdir(b"d", 0o700, 3, 4)
    server.client.create([file(b"d/f")])
    tree = server.volume.namespace
    assert tree.is_directory(nodeid)
    assert tree.resolve(b"d/f")


def test_directories_together(server: Server) -> None:
    server.client.mkdir(b"d", 0o700, 3, 4)
    wanted = [DirectoryRequest(path, 0o711, 5, 6) for path in (b"d", b"d/e", b"d/e/f", b"d/e")]
    assert server.client.make_directories(wanted) == 2
    tree = server.volume.namespace
    assert tree.mode[tree.resolve(b"d")] & 0o7777 == 0o700
    deepest = tree.resolve(b"d/e/f")
    assert (tree.mode[deepest] & 0o7777, tree.uid[deepest], tree.gid[deepest]) == (0o711, 5, 6)
    server.client.create([file(b"d/g")])
    # What comes before the one that cannot be made stays.
    with pytest.raises(errors.ExistsError):
        server.client.make_directories([DirectoryRequest(path, 0o755, 0, 0) for path in (b"h", b"d/g", b"i")])
    assert tree.resolve(b"h")
    assert not tree.resolve(b"i")


def test_the_largest_batch_fits(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", limits=Limits())
    try:
        batch = [file(b"%079d" % number) for number in range(3000)]
        assert len(server.client.create(batch)) == 3000
        longest = json.dumps({"path": "\\udcff" * 79, "size": 1 << 62, "mode": 4095, "uid": 1 << 31, "gid": 1 << 31})
        assert CREATE_LIMIT * (len(longest) + 120) < Limits().body
    finally:
        server.close()


@pytest.mark.parametrize(
    ("files", "kind", "number"),
    [
        ([file(b"there")], errors.ExistsError, errno.EEXIST),
        ([file(b"new"), file(b"new")], errors.ExistsError, errno.EEXIST),
        ([file(b"missing/x")], errors.NoSuchPathError, errno.ENOENT),
        ([file(b"there/x")], errors.NotADirectoryPathError, errno.ENOTDIR),
        ([file(b"x" * 80)], errors.NameTooLongError, errno.ENAMETOOLONG),
        ([file(b"../x")], errors.PathError, errno.EINVAL),
        ([file(b"new"), file(b".meta/x")], errors.PathError, errno.EINVAL),
        ([file(b"new"), file(b"big", 1 << 40)], errors.NoSpaceError, errno.ENOSPC),
        ([file(b"new", 0)], errors.PathError, errno.EINVAL),
        ([file(b"new", -1)], errors.PathError, errno.EINVAL),
        ([replace(file(b"new"), striping=Striping(2, 3, 2 << 20))], errors.UsageError, errno.EINVAL),
        ([replace(file(b"new"), striping=Striping(4, 4, 3 << 20))], errors.UsageError, errno.EINVAL),
        ([file(b"n%d" % number) for number in range(2000)] + [file(b"there")], errors.ExistsError, errno.EEXIST),
    ],
)
def test_refused_batches_change_nothing_and_say_why(
    tmp_path: Path, files: list[FileRequest], kind: type[errors.FamfsError], number: int
) -> None:
    server = Server(tmp_path / "run", limits=Limits())
    try:
        server.client.create([file(b"there")])
        before = server.memory.read(0, 16 << 20)
        with pytest.raises(errors.FamfsError) as caught:
            server.client.create(files)
        assert type(caught.value) is kind
        assert caught.value.errno == number
        assert "\n" not in str(caught.value)
        assert server.memory.read(0, 16 << 20) == before
        assert server.is_well()
    finally:
        server.close()


def test_a_client_of_the_volume_cannot_create(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", host=UUID(int=1))
    try:
        with pytest.raises(errors.RoleError):
            server.client.mkdir(b"d", 0o755, 0, 0)
        with pytest.raises(errors.RoleError):
            put(server, (b"f", b"data"))
    finally:
        server.close()


def test_looking(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.client.create([file(b"a"), file(b"b")])
    assert server.client.pid() == os.getpid()
    assert b"files: 2" in server.client.request("GET", "/icache_stats")
    with caplog.at_level(logging.INFO, logger="famfs_server"):
        assert b"2 inodes" in server.client.request("GET", "/icache_dump?verbose=1")
    assert "b'a'" in caplog.text


def test_log_level_is_a_syslog_priority(server: Server) -> None:
    logger = logging.getLogger("famfs_server")
    before = logger.level
    try:
        for number, level in (("7", logging.DEBUG), ("4", logging.WARNING), ("3", logging.ERROR)):
            assert server.client.request("POST", "/log_level", number.encode()) == f"{number}\n".encode()
            assert logger.level == level
            assert server.client.request("GET", "/log_level") == f"{number}\n".encode()
        with pytest.raises(errors.UsageError):
            server.client.request("PUT", "/log_level", b"8")
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\0\xff\x80 nonsense\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\n\r\n", 400),
        (b"GET /status HTTP/x\r\nHost: x\r\n\r\n", 400),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"DELETE /create HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"GET /create HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"GET /status HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 8192 + b"\r\n\r\n", 431),
        (post("/create", b"", "Content-Length: 99999999999"), 413),
        (post("/create", b"", "Content-Length: " + "9" * 20), 413),
        (post("/create", b"", "Content-Length: -1"), 400),
        (post("/create", b"40001\r\n" + b" " * 0x40001 + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), 413),
        (post("/create", b"", "Expect: 100-continue", "Content-Length: 99999999"), 413),
        (post("/create", b""), 400),
        (post("/create", b"{"), 400),
        (post("/create", b"[" * 100_000), 400),
        (post("/create", b"[]"), 400),
        (post("/create", b"{}"), 400),
        (post("/create", b'{"files":1}'), 400),
        (post("/create", b'{"files":[1]}'), 400),
        (post("/create", b'{"files":[],"more":1}'), 400),
        (post("/create", b'{"files":[{"path":"x"}]}'), 400),
        (post("/create", b'{"files":[{"path":"x","size":1.5,"mode":0,"uid":0,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"x","size":true,"mode":0,"uid":0,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"x","size":1,"mode":65536,"uid":0,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"x","size":1,"mode":0,"uid":4294967295,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"x","size":' + b"9" * 5000 + b',"mode":0,"uid":0,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"\\ud800","size":1,"mode":0,"uid":0,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"a\\u0000b","size":1,"mode":0,"uid":0,"gid":0}]}'), 400),
        (post("/create", b'{"files":[{"path":"x","size":1,"mode":0,"uid":0,"gid":0,"interleave":7}]}'), 400),
        (post("/mkdir", b'{"path":"","mode":0,"uid":0,"gid":0}'), 400),
        (post("/mkdir", b'{"path":"/x","mode":0,"uid":0,"gid":0}'), 400),
        (post("/mkdir", b'{"path":"a//x","mode":0,"uid":0,"gid":0}'), 400),
        (post("/mkdir", b'{"directories":{}}'), 400),
        (post("/mkdir", b'{"directories":[7]}'), 400),
        (post("/mkdir", b'{"directories":[{"path":"x"}]}'), 400),
        (post("/mkdir", b'{"directories":[],"more":1}'), 400),
        (post("/devices", b'{"path":"/dev/dax1.0"}'), 400),
        (post("/devices", b'{"path":"/dev/dax1.0","uuid":7}'), 400),
        (post("/devices", b'{"path":"dax1.0","uuid":"00000000-0000-0000-0000-000000000007"}'), 400),
        (post("/devices", b'{"path":"/x","uuid":"00000000-0000-0000-0000-000000000007","size":1}'), 400),
        (post("/log_level", b"loud"), 400),
    ],
)
def test_bad_requests_get_their_status_and_change_nothing(server: Server, request_bytes: bytes, status: int) -> None:
    before = server.memory.read(0, 16 << 20)
    head, _, body = server.raw(request_bytes).partition(b"\r\n\r\n")
    assert head.split()[:2] == [b"HTTP/1.1", str(status).encode()]
    answer = json.loads(body)
    assert answer["errno"] > 0
    assert "\n" not in answer["error"]
    assert server.memory.read(0, 16 << 20) == before
    assert server.is_well()


def test_405_names_what_is_allowed(server: Server) -> None:
    assert b"Allow: POST" in server.raw(b"GET /create HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


def test_two_requests_on_one_connection(server: Server) -> None:
    one = b"GET /pid HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /pid HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert server.raw(one + last).count(b"HTTP/1.1 200") == 2


def test_continue_is_sent_to_who_waits_for_it(server: Server) -> None:
    body = b'{"path":"d","mode":493,"uid":0,"gid":0}'
    with server.connect() as connection:
        connection.sendall(post("/mkdir", b"", "Expect: 100-continue", f"Content-Length: {len(body)}"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "half", [b"", b"POST /cre", post("/mkdir", b'{"path":"d"', "Content-Length: 40"), b"\r\n", b"\0"]
)
def test_half_a_request_costs_only_its_connection(server: Server, half: bytes) -> None:
    server.raw(half, shut=True)
    assert server.is_well()
    assert server.volume.namespace.replayed == 0


def test_a_slow_request_is_given_up(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", limits=replace(LIMITS, seconds=0.5))
    try:
        start = time.monotonic()
        answer = server.raw(b"POST /mkdir HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start >= 0.5
    finally:
        server.close()


def test_a_client_that_leaves_early_hurts_nobody(server: Server) -> None:
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert server.is_well()


def test_too_many_clients_are_turned_away_and_the_rest_served(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.connections):
            stack.enter_context(server.connect())
        refused = server.raw(b"GET /pid HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 503")
    assert server.is_well()


def test_another_user_may_look_but_not_change(server: Server) -> None:
    def act() -> str:
        looked = server.client.pid() > 0
        for change in (
            lambda: server.client.mkdir(b"d", 0o755, 0, 0),
            lambda: server.client.create([file(b"f")]),
            lambda: server.client.request("PUT", "/log_level", b"7"),
            lambda: next(server.client.watch()),
            lambda: put(server, (b"f", b"x")),
        ):
            with contextlib.suppress(errors.PrivilegeError):
                change()
                looked = False
        return "refused" if looked else "allowed"

    assert server.as_nobody(act) == "refused"
    assert server.volume.namespace.replayed == 0


def test_figures_are_all_that_another_user_gets(server: Server) -> None:
    """Whatever paths there are, or will be."""

    def act() -> str:
        answered = []
        for path, methods in ROUTES.items():
            for method in methods:
                head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
                if not server.raw(head.encode()).startswith(b"HTTP/1.1 403"):
                    answered.append(f"{method} {path}")
        return " ".join(sorted(answered))

    assert server.as_nobody(act) == (
        "GET /icache_dump GET /icache_stats GET /log_level GET /metrics GET /pid GET /status"
    )


def test_a_user_whom_the_mount_trusts_may_change(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", owner=NOBODY)
    try:
        assert server.as_nobody(lambda: server.client.mkdir(b"d", 0o755, 0, 0)) == "16"
        assert server.as_nobody(lambda: next(server.client.watch())["index"]) == "1"
    finally:
        server.close()


# -- files with their data ----------------------------------------------------------------------


def put(server: Server, *files: tuple[bytes, bytes]) -> list[int]:
    """Make files with their data, in pieces of odd sizes."""
    data = b"".join(content for _, content in files)
    pieces = [memoryview(data)[at : at + 70_001] for at in range(0, len(data), 70_001)]
    return server.client.put([FileRequest(name, len(content), 0o640, 1, 2) for name, content in files], pieces)


def head(server: Server, *files: tuple[bytes, int], length: int | None = None) -> bytes:
    """A request for files of a size, up to their data."""
    rows = [{"path": name.decode(), "size": size, "mode": 0o644, "uid": 0, "gid": 0} for name, size in files]
    line = json.dumps({"files": rows}).encode() + b"\n"
    total = len(line) + sum(size for _, size in files) + 1 if length is None else length
    return b"PUT /files HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (total, line)


def contents(server: Server) -> dict[bytes, bytes]:
    tree = server.volume.namespace
    return {tree.path(node): server.volume.read(node, 0, tree.size[node]) for node in tree.walk()}


def test_files_come_with_their_data(server: Server, rng: random.Random) -> None:
    files = {b"f%d" % number: rng.randbytes(size) for number, size in enumerate((1, 4095, 4096, 65_536, 3 << 20))}
    assert put(server, *files.items()) == [16, 17, 18, 19, 20]
    assert contents(server) == files
    assert server.volume.namespace.replayed == 5


def test_striped_files_come_with_their_data(server: Server, rng: random.Random) -> None:
    data = rng.randbytes((9 << 20) + 5)
    request = FileRequest(b"striped", len(data), 0o644, 0, 0, Striping(4, 3, 2 << 20))
    server.client.put([request], [memoryview(data)])
    assert contents(server) == {b"striped": data}


def test_nobody_sees_a_file_before_it_is_whole(server: Server, rng: random.Random) -> None:
    data = rng.randbytes(3 << 20)
    free = server.volume.space.free
    with server.connect() as connection:
        connection.sendall(head(server, (b"small", 10), (b"large", len(data))) + bytes(10) + data[:-1])
        deadline = time.monotonic() + 10
        while server.volume.space.free == free and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.volume.space.free < free
        assert contents(server) == {}
        # The names are taken meanwhile, for whichever way of making a file.
        with pytest.raises(errors.ExistsError):
            server.client.create([file(b"large")])
        with pytest.raises(errors.ExistsError):
            Provisional(server.volume).create(ns.ROOT, b"large", 0o644, 0, 0)
        connection.sendall(data[-1:] + b"\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert contents(server) == {b"small": bytes(10), b"large": data}


@pytest.mark.parametrize("sent", [0, 1, 5000, 70_000, 3 << 20, (3 << 20) + 5000])
def test_a_client_that_dies_leaves_nothing(server: Server, sent: int) -> None:
    free = server.volume.space.free
    answer = server.raw(head(server, (b"large", 3 << 20), (b"small", 5000)) + bytes(sent), shut=True)
    assert answer.startswith(b"HTTP/1.1 400")
    assert server.volume.space.free == free
    assert contents(server) == {}
    assert put(server, (b"large", b"x")) == [16]


def test_data_that_fail_on_the_way_leave_nothing(server: Server) -> None:
    def data() -> Iterator[memoryview]:
        yield memoryview(bytes(5000))
        raise errors.MediaError("the source has a hole")

    with pytest.raises(errors.MediaError, match="hole"):
        server.client.put([FileRequest(b"f", 10_000, 0o644, 0, 0)], data())
    with pytest.raises(ControlError, match="5000 bytes of the files are missing"):
        server.client.put([FileRequest(b"f", 10_000, 0o644, 0, 0)], [memoryview(bytes(5000))])
    assert server.is_well()
    assert contents(server) == {}


def test_uploads_that_are_refused(server: Server) -> None:
    seal = b"\n"
    for request, status in (
        (head(server, (b"f", 100)) + bytes(101), 400),
        (head(server, (b"f", 100), length=50) + bytes(100) + seal, 400),
        (head(server, (b"f", 100), length=5000) + bytes(100) + seal, 400),
        (head(server, (b"f", 100), length=10) + bytes(100) + seal, 400),
        (head(server) + seal, 400),
        (head(server, (b"f", 0)) + seal, 400),
        (head(server, (b"f", 1), (b"f", 1)) + b"ab" + seal, 409),
        (head(server, (b"d/f", 1)) + b"a" + seal, 404),
        (head(server, (b"f", 1 << 50)) + b"a", 507),
        (b"PUT /files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde", 411),
        (b"PUT /files HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n\r\n" % (b"9" * 19), 413),
        (b"PUT /files HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nno json\n\n", 400),
        (b"PUT /files HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n" + b" " * (300 << 10), 413),
        (b"POST /files HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
    ):
        answer = server.raw(request)
        assert answer.startswith(b"HTTP/1.1 %d" % status), (request[-200:], answer)
    assert server.is_well()
    assert contents(server) == {}
    assert not server.volume.being_made


@pytest.mark.parametrize(("size", "sent"), [(100, 50), (3 << 20, 1 << 20)])
def test_slow_uploads_are_given_up(tmp_path: Path, size: int, sent: int) -> None:
    server = Server(tmp_path / "run", limits=replace(LIMITS, seconds=0.5))
    try:
        answer = server.raw(head(server, (b"f", size)) + bytes(sent))
        assert answer.startswith(b"HTTP/1.1 408")
        assert contents(server) == {}
        assert not server.volume.being_made
    finally:
        server.close()


def test_uploads_that_find_no_room_or_a_bad_path(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = server.volume.space.free
    for path, error in (
        (b"../f", errors.PathError),
        (b".meta/f", errors.PathError),
        (b"/f", errors.PathError),
        (b"x" * 80, errors.NameTooLongError),
    ):
        with pytest.raises(error):
            put(server, (path, b"data"))
    monkeypatch.setattr(server.volume, "last_index", 1)
    with pytest.raises(errors.LogFullError):
        put(server, (b"a", b"data"), (b"b", b"data"), (b"c", b"data"))
    assert put(server, (b"a", b"data"), (b"b", b"data")) == [16, 17]
    assert server.volume.space.free == free - 2 * layout.ALLOC_UNIT


def test_room_in_the_log_is_kept_for_files_on_their_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = server.volume
    monkeypatch.setattr(volume, "last_index", 0)
    with volume.reserve([NewFile(b"on its way", 1, 0o644, 0, 0)]) as reservation:
        for make in (
            lambda: volume.mkdir(b"d", 0o755, 0, 0),
            lambda: volume.create(NewFile(b"more", 1, 0o644, 0, 0)),
            lambda: Provisional(volume).create(ns.ROOT, b"new", 0o644, 0, 0),
        ):
            with pytest.raises(errors.LogFullError):
                make()
        reservation.zero()
        assert reservation.log() == [16]


# -- watching -----------------------------------------------------------------------------------


def test_watchers_are_told_what_is_made(server: Server) -> None:
    server.volume.mkdir(b"before", 0o755, 0, 0)
    watching = server.client.watch()
    assert next(watching)["index"] == 1
    server.volume.mkdir(b"d", 0o750, 1, 2)
    made = next(watching)
    assert made == {
        "event": "directory",
        "index": 1,
        "nodeid": 17,
        "path": "d",
        "mode": 0o750,
        "uid": 1,
        "gid": 2,
    }
    server.client.create([file(b"d/f%d" % number) for number in range(3)])
    assert [next(watching)["path"] for _ in range(3)] == ["d/f0", "d/f1", "d/f2"]
    watching.close()
    again = server.client.watch(0)
    assert [next(again).get("path") for _ in range(6)] == [None, "before", "d", "d/f0", "d/f1", "d/f2"]
    again.close()


def test_a_watcher_that_does_not_listen_costs_nothing_and_loses_nothing(server: Server) -> None:
    count = 4000
    watching = server.client.watch()
    next(watching)
    for start in range(0, count, 1000):
        server.client.create([file(b"f%d" % number) for number in range(start, start + 1000)])
    assert server.is_well()
    assert [next(watching)["path"] for _ in range(count)] == [f"f{number}" for number in range(count)]
    watching.close()


def test_places_for_watchers_are_few_and_come_back(server: Server) -> None:
    watchers = [server.client.watch() for _ in range(LIMITS.watchers)]
    for watcher in watchers:
        next(watcher)
    with pytest.raises(errors.FamfsError, match="too many watchers"):
        next(server.client.watch())
    assert server.is_well()
    watchers[0].close()
    deadline = time.monotonic() + 10
    while True:
        try:
            again = server.client.watch()
            next(again)
            break
        except errors.FamfsError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    again.close()


@pytest.mark.parametrize("query", ["from=1", "from=-1", "from=x", "from=", "from=99999999999999999999", "form=0"])
def test_watching_from_nowhere(server: Server, query: str) -> None:
    answer = server.raw(b"GET /watch?%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % query.encode())
    assert answer.startswith(b"HTTP/1.1 400")
    assert server.is_well()


def test_a_dead_socket_is_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    dead = tmp_path / "dead"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(dead))
    dead.rename(directory / "sock")

    async def replace_it() -> None:
        listener = await listen(directory)
        await listener.aclose()

    trio.run(replace_it)
    with pytest.raises(ControlError, match="cannot reach the daemon"):
        ControlClient(str(directory)).status()


def test_a_path_longer_than_an_address_works(tmp_path: Path) -> None:
    server = Server(tmp_path / ("x" * 100) / ("y" * 100))
    try:
        assert server.is_well()
    finally:
        server.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{",
        b"HTTP/1.1 500 No\r\nContent-Length: 1\r\n\r\n{",
    ],
)
def test_the_client_turns_a_broken_daemon_into_one_line(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ControlError) as caught:
            ControlClient(str(tmp_path), seconds=5).status()
        thread.join()
    assert "\n" not in str(caught.value)


def test_a_silent_daemon_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        with pytest.raises(ControlError, match="did not answer"):
            ControlClient(str(tmp_path), seconds=0.2).status()


def test_errors_survive_the_way_through_the_socket() -> None:
    for kind in (errors.LogFullError, errors.NoSpaceError, errors.UsageError, errors.MediaError):
        body = json.dumps({"errno": kind.errno, "error": "why\nso", "kind": kind.__name__}).encode()
        error = decode_error(507, body)
        assert type(error) is kind
        assert str(error) == "why so"
    assert type(decode_error(500, b'{"errno":30,"error":"x","kind":"os"}')) is errors.RoleError
    assert decode_error(500, b'{"errno":12,"error":"x"}').errno == 12
