# SPDX-License-Identifier: Apache-2.0
"""`famfs devadd`: make one more device part of a file system (docs/format.md 4.4, 7.5)."""

import os
from collections.abc import Callable, Set
from uuid import UUID

import click

from famfs_server.cli import program
from famfs_server.cli.target import Targets, Unmounted, names_device, unmounted
from famfs_server.daemon.control_client import ControlError
from famfs_server.errors import FamfsError, MediaError, RoleError

LOCK_SECONDS = 2.0
"""How long somebody who is about to let go of the device may take."""


@program.tool("devadd")
@click.option("-f", "--force", is_flag=True, help="Overwrite a famfs superblock that is there.")
@click.option(
    "--daxdev",
    "further",
    multiple=True,
    metavar="UUID=PATH",
    help="Where a further device is that the file system has already; for one that is not mounted.",
)
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.argument("device")
@click.argument("target", metavar="MOUNT|PRIMARY")
def command(*, device: str, target: str, force: bool, further: tuple[str, ...], verbose: int) -> None:
    """Experimental: add DEVICE to a file system, named by its mount point or, not mounted, by its first device.

    New files may use it from then on. It cannot be taken out again, and readers other than famfs_server do not know
    files on it. Only the master can add devices; other hosts find the device by its superblock, or are told where it is
    by the mount option daxdev=UUID=PATH.
    """
    program.set_verbosity(verbose)
    from famfs_server.volume.check import describe_stop
    from famfs_server.volume.volume import Role

    with Targets(_unmounted(target, further), write=True) as targets:
        place = targets.find("/" if names_device(target) else target)
        place.target.follow()
        volume = place.target.volume()
        if volume.role is not Role.MASTER:
            raise RoleError(
                f"{target}: this host is not the master of the file system, only the master can add devices"
            )
        if volume.stop is not None:
            raise MediaError(f"{target}: {describe_stop(volume.stop)}")
        known = {uuid for uuid in [volume.superblock.device_uuid, *volume.devices] if uuid is not None}
        path = os.path.realpath(device)

        def add(made: UUID) -> None:
            try:
                place.target.add_device(made, path)
            except ControlError:
                # The daemon's worker may have logged it and died before it could say so.
                place.target.follow()
                if made not in volume.devices:
                    raise

        uuid = add_prepared(path, volume.superblock.uuid, known, add, force=force)
    click.echo(f"{device} is device {len(known)} of the file system {volume.superblock.uuid}")
    click.echo(f"  device UUID: {uuid}")


def _unmounted(target: str, further: tuple[str, ...]) -> Unmounted | None:
    """The file system on the device `target`; nothing if it is a place in a mount."""
    return unmounted((target, *further)) if names_device(target) else None


def add_prepared(path: str, volume: UUID, known: Set[UUID], add: Callable[[UUID], None], *, force: bool) -> UUID:
    """Check the device at `path`, write a superblock that makes it one of `volume`, have `add` log it; its UUID.

    Where it cannot be logged, which `add` says by a FamfsError, the superblock is made invalid again; not where nobody
    knows whether it was. Raises DeviceError, ExistsError, and what `add` raises.
    """
    from famfs_server.dax import hostid
    from famfs_server.dax.device import DaxDevice, Lock
    from famfs_server.volume import format

    with DaxDevice.open(path) as device:
        memory = device.memory()
        try:
            # Once before the lock, which a mount of this very file system may have, and once when it is certain.
            format.check_addition(memory, path, volume, known, align=device.align, force=force)
            why = "is mounted, or in use by another famfs command"
            device.require_lock(Lock.MOUNTED, exclusive=True, wait=LOCK_SECONDS, why=why)
            format.check_addition(memory, path, volume, known, align=device.align, force=force)
            uuid = format.prepare_device(memory, path, uuid=volume, host=hostid.system_uuid()).device_uuid
            # From here on it may be opened by whoever logs it, and still not be formatted.
            device.lock(Lock.MOUNTED, exclusive=False)
            try:
                add(uuid)
            except FamfsError:
                format.kill(memory)
                raise
        finally:
            memory.close()
    return uuid
