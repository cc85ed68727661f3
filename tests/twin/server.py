# SPDX-License-Identifier: Apache-2.0
"""The real server, in processes of its own, at the other end of a fake kernel's socket.

One process plays the supervisor: it forks the worker and registers the device as a supervisor does, but makes no mount.
What is not real is the descriptor, a socket in place of /dev/fuse, and the ioctls on it, which the fake kernel answers
through a second socket.
"""

import fcntl
import json
import logging
import mmap
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct
from typing import Any, cast
from uuid import UUID

from famfs_server.daemon.options import parse_options
from famfs_server.daemon.supervisor import Supervisor
from famfs_server.dax import partial
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import FamfsError
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.fuse.session import Session
from tests.twin.kernel import PUSH_ARGUMENT, Device, FakeKernel
from tests.twin.maps import Dialect, TwinViolation

_SOCKET_BUFFER = 4 << 20
_SO_SNDBUFFORCE = 32
_END_SECONDS = 30

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def serve(
    fuse: socket.socket,
    ioctls: socket.socket,
    opens: socket.socket,
    messages: socket.socket,
    image: str,
    words: Sequence[str],
    host: UUID | None,
    log: str,
    push: bool,
    famfs_mode: bool,
    further: Sequence[tuple[UUID, str]],
) -> None:
    """The body of the server's process, which plays the supervisor and holds the `further` devices.

    Its ioctls on /dev/fuse, and its `openat` through the mount, go to the fake kernel.
    """
    logging.basicConfig(filename=log, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    run_directory = Path(log).with_suffix(".run")
    run_directory.mkdir(exist_ok=True)
    fcntl.ioctl = _forwarding(fuse.fileno(), ioctls)
    os.open = _opening(opens)
    os.unlink = _unlinking(opens)
    PartialMemory.show = _showing(image)  # type: ignore[method-assign]
    status = 1
    try:
        device = DaxDevice.open(image)
        # The fake kernel takes the file for a device in famfs mode, which no real kernel would; the server, which asks
        # for that mode before it agrees to extent maps, has mapped it before, or must do without.
        if not famfs_mode:
            device.memory()
        device.mode = Mode.FSDEV
        supervisor = Supervisor(parse_options(image, "/twin", words), device, host, run_directory, ready=lambda: None)
        for uuid, path in further:
            supervisor.devices.open[uuid] = DaxDevice.open(path)
            supervisor.devices.open[uuid].mode = Mode.FSDEV
        status = _mount(supervisor, Session.create(fuse.fileno()), messages, push=push, famfs_mode=famfs_mode)
    except BaseException:
        logging.exception("the server fails")
    finally:
        logging.shutdown()
        os._exit(status)


class Directory:
    """A detached mount, as far as a supervisor looks at it before it is attached: nothing but a number."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def clone(self) -> int:
        """A private copy."""
        return os.open("/", os.O_RDONLY)


def _asks_kernel(path: Any, dir_fd: int | None) -> bool:
    """Whether a path leads to the own mount: by one of the names that the server itself opens."""
    return dir_fd is not None and str(path).startswith((".meta", ".space-"))


def _ask(kernel: socket.socket, what: str, flags: int, path: Any) -> list[int]:
    """Have the fake kernel carry out a system call on the mount; descriptors that come of it. Each call has a socket
    of its own for the answer: whoever made it may be dead by then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        text = json.dumps({"call": what, "flags": flags, "path": str(path)}).encode()
        socket.send_fds(kernel, [text], [theirs.fileno()])
        theirs.close()
        answer, descriptors, _, _ = socket.recv_fds(ours, 16, 1)
    (number,) = Struct("<i").unpack(answer)
    if number:
        raise OSError(number, os.strerror(number))
    return list(descriptors)


def _opening(kernel: socket.socket) -> Callable[..., int]:
    """os.open, but for what lies in `.meta`."""
    real = os.open

    def opening(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if _asks_kernel(path, dir_fd):
            return _ask(kernel, "open", flags, path)[0]
        return real(path, flags, mode, dir_fd=dir_fd)

    return opening


def _unlinking(kernel: socket.socket) -> Callable[..., None]:
    """os.unlink, likewise."""
    real = os.unlink

    def unlinking(path: Any, *, dir_fd: int | None = None) -> None:
        if _asks_kernel(path, dir_fd):
            _ask(kernel, "unlink", 0, path)
        else:
            real(path, dir_fd=dir_fd)

    return unlinking


def _showing(image: str) -> Callable[..., None]:
    """PartialMemory.show: a file of new space is the image itself here, as long as it is open, and not a file whose
    first byte lies elsewhere."""
    status = os.stat(image)

    def showing(self: PartialMemory, offset: int, length: int, descriptor: int) -> None:
        found = os.fstat(descriptor)
        assert (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)
        with self._changing:
            flags, protection = mmap.MAP_SHARED | partial._MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
            address = self._address + offset
            assert partial._libc.mmap(address, length, protection, flags, descriptor, offset) == address
            partial._libc.madvise(address, length, partial._MADV_DONTFORK)
            self._shown[offset] = offset + length

    return showing


def _mount(
    supervisor: Supervisor,
    session: Session,
    messages: socket.socket,
    *,
    push: bool,
    famfs_mode: bool,
) -> int:
    """The supervisor's own steps, and successors for workers that die; the last one's exit status.

    `messages` tells who serves, and what went wrong.
    """
    supervisor._processes.catch_signals()
    # A descriptor stands for the mount, and is closed by who does not need that.
    mount = cast("DetachedMount", Directory(os.dup(messages.fileno())))
    try:
        before = supervisor._bootstrap(session, mount) if famfs_mode else None
        served, agreed = supervisor._start_worker(session, mount, before)
    except FamfsError as error:
        _tell(messages, {"error": str(error), "status": error.exit_status})
        return 1
    try:
        if push and before is None:
            supervisor._register(session.fuse, agreed)
        said: dict[str, Any] = {"data_path": agreed.decision.data_path, "reason": agreed.decision.reason}
    except FamfsError as error:
        said = {"error": str(error), "status": error.exit_status}
    while True:
        _tell(messages, {**said, "worker": served})
        ended: dict[int, int] = {}
        while served not in ended:
            ended = supervisor._processes.wait().ended
        if ended[served] >= 0:
            return ended[served]
        session.drain()
        session.record.taken_over()
        served = supervisor._fork_worker(session, -1, agreed, successor=True)


def _tell(messages: socket.socket, message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        messages.send(json.dumps(message).encode())


def _forwarding(fuse: int, kernel: socket.socket) -> Callable[..., Any]:
    """fcntl.ioctl, but for those on the server's /dev/fuse."""
    real = fcntl.ioctl

    def ioctl(fd: Any, number: int, argument: Any = 0, mutate: bool = True) -> Any:
        if fd != fuse:
            return real(fd, number, argument, mutate)
        descriptor = PUSH_ARGUMENT.unpack(argument)[0]
        socket.send_fds(kernel, [Struct("<I").pack(number) + argument], [descriptor] if descriptor >= 0 else [])
        (result,) = Struct("<i").unpack(kernel.recv(4))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return argument

    return ioctl


class Refused(Exception):  # noqa: N818 - what the server says, not a failure of the test
    """The server gave up before it served; the message is its own line."""


class Twin:
    """A server and the kernel that it serves."""

    def __init__(
        self,
        image: Path,
        dialect: Dialect | None,
        *,
        words: Sequence[str] = (),
        host: UUID | None = None,
        log: Path | None = None,
        push: bool = True,
        famfs_mode: bool = False,
        stream: bool = False,
        further: Sequence[tuple[UUID, str]] = (),
        **kernel: Any,
    ) -> None:
        """Start a server with the mount options `words` and the host's UUID; `kernel` goes to FakeKernel.

        `push` off makes it leave out the registration of its device. `famfs_mode`: it may not map its device.
        `stream`: replies have no limit of length, and no request may be sent before the last one is answered.
        `further` are its other devices by UUID, all in famfs mode.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) if stream else _pair()
        our_ioctls, their_ioctls = _pair()
        our_opens, their_opens = _pair()
        self._messages, their_messages = _pair()
        self.log_path = log or image.with_suffix(".log")
        self.log_path.write_text("")
        devices = kernel.pop("devices", None)
        self.devices = [Device(os.path.realpath(image))] if devices is None else devices
        self.kernel = FakeKernel(ours, dialect, devices=self.devices, ioctls=our_ioctls, opens=our_opens, **kernel)
        self.data_path = self.reason = ""
        self._sockets = (ours, our_ioctls, our_opens, self._messages)
        self.worker = 0
        """The pid of the process that serves, where it is told."""
        ends = (theirs, their_ioctls, their_opens, their_messages)
        self._process = _processes.Process(
            target=serve,
            args=(*ends, str(image), words, host, str(self.log_path), push, famfs_mode, tuple(further)),
            daemon=True,
        )
        self._process.start()
        for end in ends:
            end.close()

    def mount(self) -> FakeKernel:
        """Complete INIT and wait until the server says that it serves. Raises Refused."""
        unique = 0
        # A server that finds fault with the media may be gone before it is asked.
        with suppress(BrokenPipeError):
            unique = self.kernel.start_init()
        while unique and not self.kernel.answered(unique):
            if not self.kernel.pump(self.kernel.timeout, self._messages.fileno()):
                break
        if unique and self.kernel.answered(unique):
            self.kernel.finish_init(unique)
        message = self._message()
        if "error" in message:
            raise Refused(message["error"])
        if not self.kernel.negotiated:
            self.kernel.finish_init(unique)
        self.reason, self.data_path = str(message["reason"]), str(message["data_path"])
        self.worker = int(message.get("worker", 0))
        return self.kernel

    def succeed(self) -> None:
        """Kill the process that serves, and wait until another one has taken its place."""
        os.kill(self.worker, signal.SIGKILL)
        # Until it is gone nothing may make room for what it is about to write.
        deadline = time.monotonic() + _END_SECONDS
        while Path(f"/proc/{self.worker}").exists():
            if time.monotonic() > deadline:
                raise TwinViolation("a worker cannot be killed")
            time.sleep(0.005)
        self.kernel.server_died()
        self.worker = int(self._message()["worker"])

    def _message(self) -> dict[str, Any]:
        while self.kernel.pump(self.kernel.timeout, self._messages.fileno()):
            pass
        data = self._messages.recv(1 << 16, socket.MSG_DONTWAIT)
        if not data:
            raise TwinViolation(f"the server ended without a word: {self.log()}")
        found: dict[str, Any] = json.loads(data)
        return found

    def log(self) -> str:
        """What the server has logged so far."""
        return self.log_path.read_text()

    def end(self) -> int:
        """Unmount and wait for the server's end; its exit status. A server that does not end is killed."""
        for end in self._sockets:
            end.close()
        self._process.join(_END_SECONDS)
        lives = self._process.exitcode is None
        if lives:
            self._process.kill()
            self._process.join()
        for device in self.devices:
            device.close()
        if lives:
            raise TwinViolation("the server did not end with its connection")
        return int(self._process.exitcode or 0)


@contextmanager
def mounted(image: Path, dialect: Dialect | None = None, **more: Any) -> Iterator[FakeKernel]:
    """A server for `image` and its kernel, INIT done; afterwards it must end cleanly. `more` goes to Twin."""
    twin = Twin(image, dialect, **more)
    try:
        kernel = twin.mount()
        yield kernel
        kernel.require_silence()
    except BaseException:
        with suppress(TwinViolation):
            twin.end()
        raise
    assert twin.end() == 0, twin.log()


def _pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        with suppress(PermissionError):
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
    return ends
