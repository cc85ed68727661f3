# SPDX-License-Identifier: Apache-2.0
"""`famfs-unit`: what the units and the udev rule in systemd/ run. Not meant for hands."""

import os
import select
import subprocess
from typing import NoReturn

import click

from famfs_server.cli import program
from famfs_server.daemon.detaching import detach
from famfs_server.errors import FamfsError, MountError
from famfs_server.fuse import mountapi

END_SECONDS = 20.0
"""How long the server may take to end after its mount is gone."""


@click.group("famfs-unit", context_settings={"help_option_names": list(program.HELP_NAMES)})
@program.version_option
def command() -> None:
    """What the systemd units of famfs run."""


@command.command("stop")
@click.argument("unit")
@click.argument("mount_point")
def stop(*, unit: str, mount_point: str) -> None:
    """ExecStop=: unmount while somebody still answers, unless the service is to go on with the mount."""
    if _job(unit) == "restart":
        return
    for record in mountapi.find_mounts(mount_point=mount_point):
        try:
            mountapi.unmount(record.mount_point)
        except MountError as error:
            program.warn(f"{error}; detaching it, files that are open cannot be used any more")
            mountapi.unmount(record.mount_point, lazy=True)
            return
        _await_end()


@command.command("stopped")
@click.argument("unit")
@click.argument("mount_point")
def stopped(*, unit: str, mount_point: str) -> None:
    """ExecStopPost=: nobody answers any more; detach the mount, unless another server is about to."""
    job, result = _job(unit), os.environ.get("SERVICE_RESULT", "success")
    # A failure is followed by another start, unless somebody has told the service to stop.
    if job == "restart" or (job != "stop" and result != "success"):
        return
    _detach(mount_point)


@command.command("given-up")
@click.argument("mount_point")
def given_up(*, mount_point: str) -> None:
    """OnFailure=: there will be no other start; detach the mount."""
    _detach(mount_point)


@command.command("identify")
@click.argument("device")
def identify(*, device: str) -> int:
    """IMPORT{program} of the udev rule: what is on a device, as udev's properties; exit status 1 for anything else."""
    from famfs_server.dax.device import DaxDevice
    from famfs_server.dax.memory import Memory
    from famfs_server.omf import layout, superblock

    try:
        with DaxDevice.open(device, writable=False) as opened, opened.map(0, opened.align) as start:
            memory = Memory(memoryview(start))
            try:
                raw = memory.read_fresh(0, layout.SUPERBLOCK.itemsize)
            finally:
                memory.close()
        found = superblock.inspect(raw).require(device)
    except FamfsError:
        return 1
    click.echo(f"ID_FS_TYPE=famfs\nID_FS_USAGE=filesystem\nID_FS_UUID={found.uuid}\nID_FS_UUID_ENC={found.uuid}")
    return 0


def _job(unit: str) -> str:
    """What systemd is at with the unit: `stop`, `restart`, …; empty: nothing."""
    words = ["systemctl", "list-jobs", "--no-legend", "--plain", "--full", unit]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    fields = [line.split() for line in listed.splitlines()]
    return next((line[2] for line in fields if len(line) > 2 and line[1] == unit), "")


def _await_end() -> None:
    """Wait for the server, which ends when its mount is gone; a signal now would only disturb it."""
    try:
        server = os.pidfd_open(int(os.environ.get("MAINPID", "")))
    except (OSError, ValueError):
        return
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.poll(1000 * END_SECONDS)
    os.close(server)


def _detach(mount_point: str) -> None:
    for record in mountapi.find_mounts(mount_point=mount_point):
        detach(record.mount_point, record.device)


def main() -> NoReturn:
    """The program `famfs-unit`."""
    program.main(command, "famfs-unit")
