# SPDX-License-Identifier: Apache-2.0
"""Finding the further devices of a file system on this host (docs/format.md 7.5, docs/devices.md).

The log knows a device by its UUID alone, and only the device's own superblock says which one it is. So a path, whoever
named it, is believed once the superblock there has been read. Two cases are exceptions: a path that the administrator
names, to a device without any superblock; and a device in famfs mode, whose memory no process can read.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from famfs_server.dax import sysfs
from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.errors import DeviceError, FamfsError
from famfs_server.omf import layout, superblock
from famfs_server.omf.superblock import Inspection, SuperblockState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device was last seen: its path; its directory in sysfs, empty for an emulated one; its bytes."""

    path: str
    directory: str
    size: int

    @classmethod
    def of(cls, device: DaxDevice) -> "Place":
        """The place of an open device."""
        path = os.path.realpath(device.path)
        directory = ""
        if device.mode is not Mode.EMULATED:
            directory = str(sysfs.attributes(os.fstat(device.fd).st_rdev, path).directory)
        return cls(path, directory, device.size)


class PlaceCache:
    """Remembers between runs where devices were, so that no others need be opened to find them. Only a hint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, uuid: UUID) -> Place | None:
        """Where the device was last seen, if that is known."""
        try:
            return Place(**self._read()[str(uuid)])
        except (KeyError, TypeError):
            return None

    def put(self, uuid: UUID, place: Place) -> None:
        """Remember a place. A cache that cannot be written is none."""
        if self.get(uuid) == place:
            return
        places = self._read() | {str(uuid): asdict(place)}
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            draft.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(json.dumps(places, indent=1))
            draft.replace(self._path)
        except OSError as error:
            log.debug("%s: %s", self._path, error)
            with contextlib.suppress(OSError):
                draft.unlink()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class DeviceFinder:
    """Finds, checks and locks devices. What it returns is open and belongs to the caller."""

    def __init__(
        self,
        named: Mapping[UUID, str],
        cache: PlaceCache | None,
        *,
        nodes: Callable[[], Iterable[str]] = sysfs.device_nodes,
        writable: bool = True,
        avoid: str = "",
    ) -> None:
        """`named` are the paths that the administrator gave; `nodes` gives those of all dax devices of this host.

        `avoid` is a directory below which nothing is opened: whoever holds a mount's connection must not wait for it
        (findings 1.2).
        """
        self._named = dict(named)
        self._cache = cache
        self._nodes = nodes
        self._writable = writable
        self._avoid = avoid

    def find(self, volume: UUID, uuid: UUID, hint: str | None = None) -> DaxDevice:
        """The device `uuid` of the file system `volume`, with a shared lock that keeps others from formatting it.

        `hint` is a path where it is expected. Raises DeviceError with the reason in words where there is none.
        """
        reasons: list[str] = []
        for path, seen in self._candidates(uuid, hint):
            try:
                device = self._open(path, volume, uuid, seen)
            except FamfsError as error:
                reasons.append(str(error))
                continue
            if self._cache is not None:
                self._cache.put(uuid, Place.of(device))
            return device
        if uuid in self._named or hint:
            raise DeviceError(reasons[0])
        raise DeviceError("no device of this host has its superblock; name it with the mount option daxdev=UUID=PATH")

    def _candidates(self, uuid: UUID, hint: str | None) -> Iterator[tuple[str, Place | None]]:
        """Paths to try, and what is known of the device that was there."""
        path = self._named.get(uuid, hint)
        if path is not None:
            yield path, None
            return
        known = self._cache.get(uuid) if self._cache is not None else None
        if known is not None:
            yield known.path, known
        for node in self._nodes():
            if known is None or node != known.path:
                yield node, None

    def _open(self, path: str, volume: UUID, uuid: UUID, seen: Place | None) -> DaxDevice:
        if self._avoid and path.startswith(f"{self._avoid}/"):
            raise DeviceError(f"{path} lies in the mount itself")
        named = path == self._named.get(uuid)
        device = DaxDevice.open(path, writable=self._writable)
        try:
            if device.mode is Mode.FSDEV:
                if not named and Place.of(device) != seen:
                    raise DeviceError(
                        f"{path} is in famfs mode, where its superblock cannot be read; "
                        "name it with the mount option daxdev=UUID=PATH"
                    )
            else:
                _check(inspect(device), path, volume, uuid, named=named)
            device.require_lock(Lock.MOUNTED, exclusive=False, why="is being formatted")
        except BaseException:
            device.close()
            raise
        return device


def inspect(device: DaxDevice) -> Inspection:
    """The superblock of a device that can be mapped. Nothing of it stays mapped."""
    memory = device.memory()
    try:
        return superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
    finally:
        memory.close()
        device.unmap()


def _check(found: Inspection, path: str, volume: UUID, uuid: UUID, *, named: bool) -> None:
    """Raise DeviceError unless this is the superblock of device `uuid` of the file system `volume`."""
    block = found.superblock
    if found.state is SuperblockState.SECONDARY and block is not None:
        if (block.uuid, block.device_uuid) == (volume, uuid):
            return
        raise DeviceError(f"{path} holds device {block.device_uuid} of the file system {block.uuid}")
    if found.state is not SuperblockState.ABSENT:
        what = "the log of a famfs file system" if found.state is SuperblockState.VALID else found.state.value
        raise DeviceError(f"{path} holds {what}")
    if not named:
        raise DeviceError(f"{path} holds no famfs superblock")
    log.warning("%s has no superblock; it is taken for device %s because an option says so", path, uuid)
