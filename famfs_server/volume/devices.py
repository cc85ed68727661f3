# SPDX-License-Identifier: Apache-2.0
"""The devices of a volume by number: the primary, and those that ADD_DAXDEV entries have named (docs/format.md 7.5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from famfs_server.errors import FamfsError

if TYPE_CHECKING:
    from famfs_server.volume.volume import DeviceMemory


MOST_ATTACHED = 64
"""No kernel has room for more (protocol 1.2); a hostile log names thousands."""


class DeviceState(Enum):
    """Whether the files on a device can be used; the value is the word that users see."""

    ATTACHED = "attached"
    SHORT = "short"
    """It has fewer bytes than the log says: files beyond its end are EIO, and nothing new is put there."""
    UNMAPPED = "unmapped"
    """In famfs mode: extent maps may name it, the server cannot read or write it."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Attached:
    """A device as it was found on this host. `size` in bytes; no memory where user space cannot map it."""

    path: str
    size: int
    memory: "DeviceMemory | None"
    kernel_can_map: bool = False
    """It is in famfs mode, so that a famfs kernel may be told of it."""


class Attach(Protocol):
    """Finds a device and maps it. Raises FamfsError."""

    def __call__(self, uuid: UUID, hint: str | None = None) -> Attached:
        """`hint` is the path where the device must be."""


@dataclass(slots=True)
class Device:
    """One device of a volume. `size` is what superblock or log say, in bytes."""

    index: int
    uuid: UUID
    size: int
    found: Attached | None = None
    problem: str = "nobody has looked for it"
    """Why it is missing."""

    @property
    def state(self) -> DeviceState:
        """Whether its files can be used."""
        if self.found is None:
            return DeviceState.MISSING
        if self.found.size < self.size:
            return DeviceState.SHORT
        return DeviceState.ATTACHED if self.found.memory is not None else DeviceState.UNMAPPED

    @property
    def complete(self) -> bool:
        """Whether the device is there with all of its bytes."""
        return self.state in (DeviceState.ATTACHED, DeviceState.UNMAPPED)


class DeviceTable:
    """The devices of one volume. Grows with the log; `memories` grows with it."""

    def __init__(self, primary: Device) -> None:
        assert primary.found is not None
        self.entries = [primary]
        self.memories: list[DeviceMemory | None] = [primary.found.memory]
        self.available = {0}
        """Where new files may go."""
        self.attach: Attach | None = None
        """How devices are found; nothing: they are not looked for."""
        self._may_hold_new: Callable[[Device], bool] = lambda device: True

    def restrict(self, may_hold_new: Callable[[Device], bool]) -> None:
        """Let new files go only to those further devices of which `may_hold_new` is true."""
        self._may_hold_new = may_hold_new
        for device in self.entries[1:]:
            self._judge(device)

    def follow(self, uuids: Sequence[UUID | None], sizes: Sequence[int]) -> list[Device]:
        """Take in what the log has named since, and look for it; the new devices.

        `uuids` and `sizes` are those of all devices, the primary's first.
        """
        known = len(self.entries)
        for index in range(known, len(uuids)):
            uuid = uuids[index]
            assert uuid is not None
            device = Device(index, uuid, sizes[index])
            if index >= MOST_ATTACHED:
                device.problem = f"only {MOST_ATTACHED} devices are looked for"
            elif self.attach is not None:
                try:
                    device.found = self.attach(uuid)
                except FamfsError as error:
                    device.problem = str(error)
            self.enter(device)
        return self.entries[known:]

    def enter(self, device: Device) -> None:
        """Append a device, whether it is there or not."""
        self.entries.append(device)
        self.memories.append(device.found.memory if device.found is not None else None)
        self._judge(device)

    def _judge(self, device: Device) -> None:
        if device.state is DeviceState.ATTACHED and self._may_hold_new(device):
            self.available.add(device.index)
        else:
            self.available.discard(device.index)

    @property
    def incomplete(self) -> list[Device]:
        """The devices whose files cannot be used, all or some of them."""
        return [device for device in self.entries if not device.complete]


def describe(device: Device) -> str:
    """One line on a device whose files cannot be used."""
    what = f"device {device.index} ({device.uuid})"
    if device.found is not None:
        return f"{what}, {device.found.path}, has {device.found.size} bytes; the log says {device.size}"
    return f"{what} is missing: {device.problem}"
