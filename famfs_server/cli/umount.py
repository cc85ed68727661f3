# SPDX-License-Identifier: Apache-2.0
"""`famfs umount`: unmount, and return when the server has given the device back."""

import os
import select
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

import click

from famfs_server.cli import mount, program
from famfs_server.cli.progress import progress
from famfs_server.daemon.control_client import ControlClient
from famfs_server.errors import FamfsError, MountError, UsageError
from famfs_server.fuse import kernels, mountapi

_SERVER_SECONDS = 10.0
_SHOWN = 3
"""Processes that are named."""


@program.tool("umount")
@click.option("-l", "--lazy", is_flag=True, help="Detach now, free it when the last user has gone.")
@click.option("-f", "--force", is_flag=True, help="End all requests first.")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.argument("path", metavar="DIRECTORY|DEVICE")
def command(*, path: str, lazy: bool, force: bool, verbose: int) -> None:
    """Unmount the famfs file system at DIRECTORY, or the one from DEVICE."""
    program.set_verbosity(verbose)
    detach(path, lazy=lazy, force=force)


@program.tool("umount.famfs")
@click.option("-l", "lazy", is_flag=True, help="Detach now, free it when the last user has gone.")
@click.option("-f", "force", is_flag=True, help="End all requests first.")
@click.option("-r", "read_only", is_flag=True, help="Accepted; a busy mount is not made read-only instead.")
@mount.helper_options
@click.argument("path", metavar="DIRECTORY|DEVICE")
def helper(
    *,
    path: str,
    lazy: bool,
    force: bool,
    no_mtab: bool,
    read_only: bool,
    verbose: int,
    namespace: str | None,
    kind: str | None,
) -> None:
    """Unmount the famfs file system at DIRECTORY, or the one from DEVICE, for umount(8); wait for its server.

    Exit status: 0 unmounted, 1 usage or permission, 2 system error, 8 interrupted, 32 the unmount failed.
    """
    mount.check_helper_options(namespace, kind, verbose)
    detach(path, lazy=lazy, force=force)


def detach(path: str, *, lazy: bool, force: bool) -> None:
    """Unmount what is mounted at or from `path`, and wait until its server has ended."""
    point = _mount_point(path)
    numbers = {record.device for record in mountapi.find_mounts(mount_point=point)}
    server = None if lazy or force else _server_of(point)
    try:
        mountapi.unmount(point, lazy=lazy, force=force)
        if server is not None:
            _wait(server, point, numbers)
    finally:
        if server is not None:
            os.close(server)


def _mount_point(path: str) -> str:
    """The mount point that is meant. The mount is not touched: its server may be dead."""
    absolute = os.path.abspath(path)
    directory = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    mounts = [record for record in mountapi.parse_mountinfo() if record.fstype in kernels.SHOWN_TYPES]
    if any(record.mount_point == directory for record in mounts):
        return directory
    from_device = [record for record in mounts if record.source in (absolute, path)]
    if not from_device:
        raise MountError(f"{path}: no famfs file system is mounted there")
    if len(from_device) > 1:
        points = ", ".join(record.mount_point for record in from_device)
        raise UsageError(f"{path} is mounted more than once, say where to unmount it: {points}")
    return from_device[0].mount_point


def _server_of(point: str) -> int | None:
    """A descriptor of the server's supervisor, which becomes readable when that ends.

    The process that answers is a worker; its parent holds the device.
    """
    try:
        worker = ControlClient.of_mount(point).pid()
        status = Path(f"/proc/{worker}/status").read_text()
        parent = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
        return os.pidfd_open(parent if parent > 1 else worker)
    except (FamfsError, OSError, ValueError, StopIteration):
        # Dead, or another user's: then there is nothing to wait for.
        return None


def _wait(server: int, point: str, numbers: Collection[int]) -> None:
    poll = select.poll()
    poll.register(server, select.POLLIN)
    with progress(f"waiting for the server of {point}", unit=""):
        ended = bool(poll.poll(_SERVER_SECONDS * 1000))
    if not ended:
        holders = holders_of(numbers)
        why = f": {', '.join(holders[:_SHOWN])} still has it, in another mount namespace or place" if holders else ""
        raise MountError(f"{point} is unmounted, but its server still runs after {_SERVER_SECONDS:.0f} seconds{why}")


def holders_of(numbers: Collection[int], proc: Path = Path("/proc")) -> list[str]:
    """The processes that see a mount with one of these device numbers, as words."""
    found = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(record.device in numbers for record in mountapi.parse_mountinfo(entry / "mountinfo")):
                found.append(f"process {entry.name} ({(entry / 'comm').read_text().strip()})")
        except (OSError, ValueError):
            # It has ended, or is nobody's business.
            continue
    return sorted(found)


def main() -> NoReturn:
    """The program `umount.famfs`."""
    program.main(helper, "umount.famfs", mount.STATUSES)
