# SPDX-License-Identifier: Apache-2.0
"""The further devices of a mount: the supervisor finds, locks and holds them, workers ask it for them (design 10).

A worker has no privileges any more when the log names a new device, and must not keep what its successor needs. So the
supervisor opens devices, when a worker asks for one by its UUID through a socket pair of its own, and passes the
descriptor back. A worker that takes over inherits those that are open already.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.errors import DeviceError, DeviceModeError, FamfsError
from famfs_server.fuse.abi import BACKING_MAP
from famfs_server.fuse.dialects import Dialect, settle
from famfs_server.volume.devices import Attached
from famfs_server.volume.finder import DeviceFinder, PlaceCache

CACHE_NAME = "devices.json"
"""In the directory of run-time files: where further devices were seen last."""
_MESSAGE = 1 << 16


def describe_open(device: DaxDevice) -> dict[str, Any]:
    """What another process needs to know of an open device beside its descriptor, as JSON knows it."""
    return {
        "path": device.path,
        "mode": device.mode.name,
        "size": device.size,
        "align": device.align,
        "writable": device.writable,
    }


def reopened(facts: dict[str, Any], descriptor: int) -> DaxDevice:
    """The device that `describe_open` told of. Raises KeyError or TypeError for anything else."""
    mode = Mode[facts["mode"]]
    return DaxDevice(facts["path"], descriptor, mode, facts["size"], facts["align"], writable=facts["writable"])


def push(fuse: int, number: int, device: DaxDevice, slot: int) -> int:
    """Hand a device to a kernel that wants it pushed, by ioctl `number`; the errno that it is refused with, or 0."""
    try:
        fcntl.ioctl(fuse, number, BACKING_MAP.pack(device.fd, 0, slot))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


@dataclass(slots=True)
class DeviceKeeper:
    """The supervisor's hold of the further devices. Descriptors in `open` are inherited by whoever it forks."""

    finder: DeviceFinder
    open: dict[UUID, DaxDevice] = field(default_factory=dict)
    fuse: int = -1
    """The connection that devices are pushed to."""
    asked_at: socket.socket | None = None
    """The end at which the present worker asks."""

    @classmethod
    def create(cls, named: Sequence[tuple[UUID, str]], mount_point: str, run_root: Path) -> "DeviceKeeper":
        """For a mount at `mount_point`; `named` are the paths that its options give."""
        return cls(DeviceFinder(dict(named), PlaceCache(run_root / CACHE_NAME), avoid=mount_point))

    def connect(self) -> socket.socket:
        """Begin to listen to a new worker, and to it alone; its end of the pair."""
        if self.asked_at is not None:
            self.asked_at.close()
        self.asked_at, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return theirs

    def answer(self) -> bool:
        """Answer what the worker asks; False once it has gone."""
        assert self.asked_at is not None
        try:
            data = self.asked_at.recv(_MESSAGE)
            if not data:
                return False
            reply, descriptors = self._reply(json.loads(data))
            socket.send_fds(self.asked_at, [json.dumps(reply).encode()], descriptors)
        except ConnectionError:
            return False
        return True

    def _reply(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        uuid = UUID(request["uuid"])
        if "slot" in request:
            return {"errno": push(self.fuse, request["ioctl"], self.open[uuid], request["slot"])}, []
        try:
            device = self.open.get(uuid) or self.finder.find(UUID(request["volume"]), uuid, request["hint"])
        except FamfsError as error:
            return {"error": str(error)}, []
        except OSError as error:
            return {"error": f"cannot look for it: {error}"}, []
        self.open[uuid] = device
        return describe_open(device), [device.fd]

    def close(self) -> None:
        """Close everything; the locks end with the last process that inherited them."""
        for device in self.open.values():
            device.close()
        self.open.clear()
        if self.asked_at is not None:
            self.asked_at.close()
            self.asked_at = None


class DeviceLink:
    """A worker's way to its devices: those that it inherited, and the supervisor for others."""

    def __init__(self, keeper: DeviceKeeper, connection: socket.socket, volume: UUID) -> None:
        self._inherited = keeper.open
        self._connection = connection
        self._volume = volume

    def attach(self, uuid: UUID, hint: str | None = None) -> Attached:
        """Find a device and map it. `hint` is where it is expected. Raises DeviceError."""
        device = self._inherited.get(uuid)
        if device is None:
            device = self._inherited[uuid] = self._ask(uuid, hint)
        try:
            memory = device.memory()
        except DeviceModeError:
            if device.mode is not Mode.FSDEV:
                raise
            memory = None
        path = os.path.realpath(device.path)
        return Attached(path, device.size, memory, kernel_can_map=device.mode is Mode.FSDEV)

    def _ask(self, uuid: UUID, hint: str | None) -> DaxDevice:
        answer, descriptors = self._exchange({"uuid": str(uuid), "volume": str(self._volume), "hint": hint})
        if "error" in answer:
            raise DeviceError(answer["error"])
        return reopened(answer, descriptors[0])

    def push(self, uuid: UUID, slot: int, dialect: Dialect) -> None:
        """Have an attached device handed to the kernel as number `slot`. Raises NegotiationError where it is refused,
        and the slot is lost for this connection (protocol 3.3)."""
        answer, _ = self._exchange({"uuid": str(uuid), "slot": slot, "ioctl": dialect.push_ioctl})
        settle((dialect,), -answer["errno"])

    def _exchange(self, question: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Ask the supervisor. Raises DeviceError where it does not answer."""
        try:
            self._connection.send(json.dumps(question).encode())
            data, descriptors, _, _ = socket.recv_fds(self._connection, _MESSAGE, 1)
        except OSError as error:
            raise DeviceError(f"the supervisor cannot be asked for it: {error}") from error
        if not data:
            raise DeviceError("the supervisor has gone")
        return json.loads(data), descriptors
