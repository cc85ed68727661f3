# SPDX-License-Identifier: Apache-2.0
"""`mkfs.famfs`: make a file system on a dax device, or unmake it (docs/format.md 4)."""

import os
from typing import NoReturn
from uuid import UUID

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.cli.values import SIZE, UUID_TEXT
from famfs_server.errors import FamfsError, PrivilegeError, UsageError

LOCK_SECONDS = 2.0
"""How long a daemon that has just been unmounted may take to let go of the device."""
_FAILED = 2


@program.tool("mkfs.famfs")
@click.option("-f", "--force", is_flag=True, help="Overwrite a file system that is there, also another host's.")
@click.option("-k", "--kill", is_flag=True, help="With --force: only make the superblock invalid.")
@click.option(
    "-l", "--loglen", type=SIZE, default=8 << 20, help="Bytes of the log: a power of two, 8m (the default) or more."
)
@click.option("-U", "--uuid", type=UUID_TEXT, help="UUID of the file system instead of a random one.")
@click.option("-M", "--set-daxmode", is_flag=True, help="Put the device into famfs mode afterwards.")
@click.option("-D", "--nodax", is_flag=True, hidden=True)
@click.option("-F", "--nofuse", is_flag=True, hidden=True)
@click.option("--fuse", is_flag=True, hidden=True)
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.argument("device")
def command(
    *,
    device: str,
    force: bool,
    kill: bool,
    loglen: int,
    uuid: UUID | None,
    set_daxmode: bool,
    nodax: bool,
    nofuse: bool,
    fuse: bool,
    verbose: int,
) -> None:
    """Make an empty famfs file system on DEVICE and become its master."""
    program.set_verbosity(verbose)
    if os.geteuid() != 0:
        raise PrivilegeError("must run as root")

    from famfs_server.dax import drivers
    from famfs_server.dax.device import Mode
    from famfs_server.volume import format

    format.check_log_length(loglen)
    if not set_daxmode:
        _make(device, force=force, kill=kill, loglen=loglen, uuid=uuid)
        return
    # Only in devdax mode can it be written; afterwards, and if that fails, it is in the mode that belongs there.
    with drivers.switched(device, Mode.DEVDAX):
        _make(device, force=force, kill=kill, loglen=loglen, uuid=uuid)
        drivers.switch(device, Mode.FSDEV)


def _make(device: str, *, force: bool, kill: bool, loglen: int, uuid: UUID | None) -> None:
    from famfs_server.dax import hostid
    from famfs_server.dax.device import DaxDevice, Lock
    from famfs_server.fuse import mountapi
    from famfs_server.volume import format

    with DaxDevice.open(device) as dax:
        for mount in mountapi.parse_mountinfo():
            if "famfs" in mount.fstype and os.path.realpath(mount.source) == os.path.realpath(device):
                raise UsageError(f"cannot mkfs while {device} is mounted on {mount.mount_point}")
        why = "cannot mkfs while it is mounted or in use by another famfs command"
        dax.require_lock(Lock.MOUNTED, exclusive=True, wait=LOCK_SECONDS, why=why)
        memory = dax.memory()
        try:
            # Without force a kill is an ordinary mkfs, which refuses a device with a superblock (format 4.2).
            if kill and force:
                format.kill(memory)
                click.echo(f"{device}: the superblock is invalid now")
                return
            host = hostid.system_uuid()
            format.check_overwrite(memory, device, host, force=force)
            with progress("writing an empty log", unit=""):
                made = format.make_filesystem(memory, device, host, log_length=loglen, uuid=uuid)
        finally:
            memory.close()
    click.echo(f"famfs file system on {device}")
    click.echo(f"  file system UUID:     {made.uuid}")
    click.echo(f"  device UUID:          {made.device_uuid}")
    click.echo(f"  owner's system UUID:  {made.system_uuid}")
    click.echo(f"  Device capacity:      {made.device_size}")
    click.echo(f"  Log size:             {made.log_length}")


def exit_status(error: FamfsError) -> int:
    """1 for who may not, 2 for what failed (format 4.1)."""
    return 1 if isinstance(error, PrivilegeError) else _FAILED


STATUSES = program.Statuses(usage=1, system=_FAILED, failure=exit_status)


def main() -> NoReturn:
    """The program `mkfs.famfs`."""
    program.main(command, "mkfs.famfs", STATUSES)
