# SPDX-License-Identifier: Apache-2.0
"""Making and unmaking a file system: what mkfs decides before it writes, and then writes (docs/format.md 4)."""

from collections.abc import Set
from uuid import UUID, uuid4

from famfs_server.errors import DeviceError, ExistsError, MediaError, RoleError, UsageError
from famfs_server.omf import append, layout, superblock
from famfs_server.omf.superblock import Superblock, SuperblockState
from famfs_server.volume.volume import DeviceMemory


def check_log_length(length: int) -> None:
    """Raise UsageError for a length that no log may have; before any device is touched (format 4.2.1)."""
    if not superblock.is_log_length(length):
        raise UsageError(f"invalid log length ({length}): it must be a power of two of at least 8 MiB")


def kill(memory: DeviceMemory) -> None:
    """Make the superblock invalid, whatever it is (format 4.2.4)."""
    append.kill(memory)


def check_overwrite(memory: DeviceMemory, device: str, host: UUID | None, *, force: bool) -> None:
    """Decide whether mkfs may write here, in the order of format 4.2 (5, size, 6).

    Unlike the reference, a superblock with a wrong checksum also needs force: it may be all that is left of somebody's
    data. Raises RoleError, DeviceError or ExistsError.
    """
    found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
    valid = found.state is SuperblockState.VALID and found.superblock is not None
    if not force and valid and found.superblock is not None and found.superblock.system_uuid != host:
        raise RoleError(
            f"Device {device} has a superblock owned by another host. Run mkfs.famfs there, or use -f to take it over"
        )
    _require_size(memory, device)
    if not force and found.state is not SuperblockState.ABSENT:
        detail = "" if valid else f" ({found.problem.split(';')[0]})"
        raise ExistsError(f"Device {device} already has a famfs superblock{detail}; use -f to overwrite it")


def make_filesystem(
    memory: DeviceMemory,
    device: str,
    host: UUID,
    *,
    log_length: int,
    uuid: UUID | None = None,
    device_uuid: UUID | None = None,
) -> Superblock:
    """Write an empty file system owned by `host`, and give its superblock. The data area is never touched."""
    check_log_length(log_length)
    if layout.LOG_OFFSET + log_length >= memory.size:
        raise UsageError(f"a log of {log_length} bytes leaves no room on a device of {memory.size} bytes")
    _clear_flags(memory)
    append.make(
        memory,
        uuid=uuid or uuid4(),
        device_uuid=device_uuid or uuid4(),
        system_uuid=host,
        log_length=log_length,
        device_size=memory.size,
        device_path=device,
    )
    return _written(memory, device, SuperblockState.VALID)


def check_addition(
    memory: DeviceMemory, device: str, volume: UUID, known: Set[UUID], *, align: int, force: bool
) -> None:
    """Decide whether a device may become a further one of the file system `volume`, which has the devices `known`.

    Size and overwriting as for mkfs (format 4.2), but for a superblock of the file system itself: that of a device in
    its table is never overwritten. Raises DeviceError or ExistsError.
    """
    _require_size(memory, device)
    if align % layout.ALLOC_UNIT:
        raise DeviceError(f"{device}: is aligned to {align} bytes; extents need multiples of 2 MiB")
    found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
    block = found.superblock
    if block is not None and block.uuid == volume and block.device_uuid in known:
        raise ExistsError(f"{device} is part of the file system {volume} already")
    if not force and found.state is not SuperblockState.ABSENT:
        what = "holds a famfs file system" if found.state is SuperblockState.VALID else found.problem.split(";")[0]
        raise ExistsError(f"{device}: {what}; use -f to overwrite it")


def prepare_device(
    memory: DeviceMemory, device: str, *, uuid: UUID, host: UUID, device_uuid: UUID | None = None
) -> Superblock:
    """Write the superblock of a further device of the file system `uuid`, and give it (format 4.4)."""
    append.make_secondary(
        memory,
        uuid=uuid,
        device_uuid=device_uuid or uuid4(),
        system_uuid=host,
        device_size=memory.size,
        device_path=device,
    )
    return _written(memory, device, SuperblockState.SECONDARY)


def _require_size(memory: DeviceMemory, device: str) -> None:
    if memory.size < layout.MIN_DEVICE_SIZE:
        raise DeviceError(f"{device}: unsupported memory device size (<4GiB): {memory.size} bytes")


def _written(memory: DeviceMemory, device: str, state: SuperblockState) -> Superblock:
    """The superblock that has been written. Raises MediaError unless it is there, in `state`."""
    found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
    if found.state is not state or found.superblock is None:
        raise MediaError(f"{device}: what was written did not stay; the device is not writable")
    return found.superblock


def _clear_flags(memory: DeviceMemory) -> None:
    """A device that was a further one until now must not go on calling itself so: mkfs writes no flags (format 4.3)."""
    found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
    if found.state is SuperblockState.SECONDARY:
        memory.write(layout.SUPERBLOCK_FLAGS_OFFSET, bytes(8))
