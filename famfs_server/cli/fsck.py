# SPDX-License-Identifier: Apache-2.0
"""`famfs fsck` and `fsck.famfs`: check a file system, mounted or not, and show its figures."""

import json
import os
import re
import stat
from typing import NoReturn

import click

from famfs_server.cli import program
from famfs_server.cli.target import NotFamfsError, find_mount, this_host
from famfs_server.cli.values import NumberType
from famfs_server.errors import FamfsError, MediaError, UsageError
from famfs_server.volume import check
from famfs_server.volume.check import Report

LOCK_SECONDS = 1.0


@program.tool("fsck", help_names=("-?", "--help"))
@click.option("-h", "--human", is_flag=True, help="Print sizes with suffixes.")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("-B", "--nbuckets", type=NumberType("count", 1, 64), help="Show how full each of so many parts is.")
@click.option("-f", "--force", is_flag=True, help="Read the device even though it is mounted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-M", "--set-daxmode", is_flag=True, hidden=True)
@click.option("-L", "--load-module", is_flag=True, hidden=True)
@click.option("-F", "--nofuse", is_flag=True, hidden=True)
@click.option("--fuse", is_flag=True, hidden=True)
@click.option("-m", "--mmap", "by_mmap", is_flag=True, hidden=True)
@click.option("-r", "--read", "by_read", is_flag=True, hidden=True)
@click.option("-D", "--nodax", is_flag=True, hidden=True)
@click.argument("path")
def command(
    *,
    path: str,
    human: bool,
    verbose: int,
    nbuckets: int | None,
    force: bool,
    as_json: bool,
    set_daxmode: bool,
    load_module: bool,
    nofuse: bool,
    fuse: bool,
    by_mmap: bool,
    by_read: bool,
    nodax: bool,
) -> int:
    """Check the file system on the device PATH, or the one mounted at PATH. Never changes anything.

    The exit status is the number of allocation units that two files claim.
    """
    if by_mmap and by_read:
        raise UsageError("--mmap and --read exclude each other")
    program.refuse_daxmode(set_daxmode)
    report = examine(path, force=force)
    show(report, human=human, verbose=verbose, nbuckets=nbuckets, as_json=as_json)
    return report.exit_status


def show(report: Report, *, human: bool, verbose: int, nbuckets: int | None, as_json: bool) -> None:
    """Print the report."""
    buckets = report.buckets(nbuckets) if nbuckets else []
    if as_json:
        rows = [
            {"number": row.number, "used": row.used, "free": row.free, "largest_free": row.largest_free}
            for row in buckets
        ]
        click.echo(json.dumps(report.as_dict() | ({"buckets": rows} if rows else {}), indent=2))
        return
    for line in check.render(report, human=human, verbose=verbose):
        click.echo(line)
    size = check.human_size if human else str
    for row in buckets:
        click.echo(
            f"bucket {row.number}: used {size(row.used)} free {size(row.free)} largest free {size(row.largest_free)}"
        )


def examine(path: str, *, force: bool = False) -> Report:
    """Examine a device, or the file system that a path is mounted in.

    Raises DeviceBusyError for a device in use, unless `force`.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UsageError(program.describe(error)) from error
    try:
        mount, _ = find_mount(path)
    except NotFamfsError:
        if stat.S_ISDIR(found.st_mode):
            raise
    else:
        from famfs_server.cli.mounted import MountedTarget

        target = MountedTarget(mount)
        try:
            return check.examine(target.memory(), mount.source, this_host())
        finally:
            target.close()

    from famfs_server.dax.device import DaxDevice, Lock

    with DaxDevice.open(path) as device:
        if not force:
            why = "is mounted or in use; name the mount point instead, or use --force"
            device.require_lock(Lock.MOUNTED, exclusive=True, wait=LOCK_SECONDS, why=why)
        memory = device.memory()
        try:
            return check.examine(memory, path, this_host())
        finally:
            memory.close()


class FsckHelper(click.Command):
    """Drops -C, which fsck(8) gives with a number attached or with none: there is no progress to show."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As every command, without -C."""
        return super().parse_args(ctx, [word for word in args if not re.fullmatch(r"-C\d*", word)])


@program.tool("fsck.famfs", cls=FsckHelper)
@click.option("-a", "-p", "automatic", is_flag=True, help="Accepted; nothing is ever repaired.")
@click.option("-y", "yes", is_flag=True, help="Accepted; nothing is ever repaired.")
@click.option("-n", "no", is_flag=True, help="Change nothing, as always.")
@click.option("-f", "--force", is_flag=True, help="Check even though it seems clean, as always.")
@click.option("-v", "-V", "--verbose", count=True, help="Say more.")
@click.argument("device")
def helper(*, device: str, automatic: bool, yes: bool, no: bool, force: bool, verbose: int) -> int:
    """Check the file system on DEVICE, for fsck(8). Exit status: 0 clean, 4 errors left, 8 failed, 16 usage."""
    report = examine(device)
    show(report, human=False, verbose=verbose, nbuckets=None, as_json=False)
    return report.fsck_bits


def exit_status(error: FamfsError) -> int:
    """The bits of fsck(8): what is wrong with the media are errors left, everything else went wrong here."""
    return 4 if isinstance(error, MediaError) else 8


STATUSES = program.Statuses(usage=16, interrupted=32, system=8, failure=exit_status)


def main() -> NoReturn:
    """The program `fsck.famfs`."""
    program.main(helper, "fsck.famfs", STATUSES)
