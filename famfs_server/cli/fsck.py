# SPDX-License-Identifier: Apache-2.0
"""`famfs fsck` and `fsck.famfs`: check a file system, mounted or not, show its figures, mend what is safe."""

import json
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from famfs_server.cli import program
from famfs_server.cli.progress import reading_log
from famfs_server.cli.target import NotFamfsError, find_mount, this_host
from famfs_server.cli.values import NumberType
from famfs_server.errors import DeviceBusyError, FamfsError, MediaError, UsageError
from famfs_server.sizes import human_size

if TYPE_CHECKING:
    from famfs_server.volume.check import Report
    from famfs_server.volume.repair import Repair
    from famfs_server.volume.volume import DeviceMemory

LOCK_SECONDS = 1.0
SAVE_DIRECTORY = "/var/lib/famfs"
"""Where the bytes that a repair changes are kept."""
CORRECTED, ERRORS_LEFT = 1, 4


@dataclass(frozen=True, slots=True)
class Mending:
    """What may be mended, and where the bytes as they were are kept; no name: a new file in SAVE_DIRECTORY."""

    torn: bool
    save: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the file system is now, and what has been done to it."""

    report: "Report"
    repaired: tuple[str, ...] = ()
    saved_in: str = ""

    @property
    def fsck_bits(self) -> int:
        """The bits of fsck(8): corrected, errors left."""
        return (CORRECTED if self.repaired else 0) | (0 if self.report.clean else ERRORS_LEFT)


@program.tool("fsck", help_names=("-?", "--help"))
@click.option("-h", "--human", is_flag=True, help="Print sizes with suffixes.")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("-B", "--nbuckets", type=NumberType("count", 1, 64), help="Show how full each of so many parts is.")
@click.option("-f", "--force", is_flag=True, help="Read the device even though it is mounted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--repair", is_flag=True, help="Mend what is safe: counters that disagree, a torn last entry.")
@click.option("--save", metavar="FILE", help=f"With --repair: keep changed bytes here; default: {SAVE_DIRECTORY}.")
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
    repair: bool,
    save: str | None,
    set_daxmode: bool,
    load_module: bool,
    nofuse: bool,
    fuse: bool,
    by_mmap: bool,
    by_read: bool,
    nodax: bool,
) -> int:
    """Check the file system on the device PATH, or the one mounted at PATH. Changes nothing without --repair.

    The exit status is the number of allocation units that two files claim.
    """
    if by_mmap and by_read:
        raise UsageError("--mmap and --read exclude each other")
    program.refuse_daxmode(set_daxmode)
    if save is not None and not repair:
        raise UsageError("--save needs --repair")
    if force and repair:
        raise UsageError("--force and --repair exclude each other: a file system in use is not repaired")
    outcome = examine(path, force=force, mending=Mending(torn=True, save=save) if repair else None)
    show(outcome, human=human, verbose=verbose, nbuckets=nbuckets, as_json=as_json)
    return outcome.report.exit_status


def show(outcome: Outcome, *, human: bool, verbose: int, nbuckets: int | None, as_json: bool) -> None:
    """Print the report."""
    from famfs_server.volume import check

    report = outcome.report
    buckets = report.buckets(nbuckets) if nbuckets else []
    if as_json:
        rows = [
            {"number": row.number, "used": row.used, "free": row.free, "largest_free": row.largest_free}
            for row in buckets
        ]
        repairs = {"repaired": list(outcome.repaired), "saved_in": outcome.saved_in or None}
        click.echo(json.dumps(report.as_dict() | repairs | ({"buckets": rows} if rows else {}), indent=2))
        return
    for line in check.render(report, human=human, verbose=verbose):
        click.echo(line)
    for action in outcome.repaired:
        click.echo(f"REPAIRED: {action}; the bytes as they were are in {outcome.saved_in}")
    size = human_size if human else str
    for row in buckets:
        click.echo(
            f"bucket {row.number}: used {size(row.used)} free {size(row.free)} largest free {size(row.largest_free)}"
        )


def examine(path: str, *, force: bool = False, mending: Mending | None = None) -> Outcome:
    """Examine a device, or the file system that a path is mounted in; with `mending` mend what can be mended.

    Raises DeviceBusyError for a device in use, unless `force`, and for a mounted file system that is to be mended.
    """
    from famfs_server.volume import check

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

        if mending:
            raise DeviceBusyError(f"{path}: a mounted file system is not repaired; unmount it first")
        target = MountedTarget(mount)
        try:
            with reading_log(mount.source) as reading:
                return Outcome(check.examine(target.memory(), mount.source, this_host(), reading=reading))
        finally:
            target.close()

    from famfs_server.dax.device import DaxDevice, Lock

    with DaxDevice.open(path, writable=not force) as device:
        if not force:
            why = "is mounted or in use; name the mount point instead, or use --force"
            device.require_lock(Lock.MOUNTED, exclusive=True, wait=LOCK_SECONDS, why=why)
        memory = device.memory()
        try:
            with reading_log(path) as reading:
                report = check.examine(memory, path, this_host(), reading=reading)
            return mend(memory, report, mending) if mending else Outcome(report)
        finally:
            memory.close()


def mend(memory: "DeviceMemory", report: "Report", mending: Mending) -> Outcome:
    """Repair what can be repaired, once the bytes that will be lost are safe on a disk, and examine it again."""
    from famfs_server.volume import check, repair

    planned = repair.plan(memory, report, torn=mending.torn)
    if planned is None:
        return Outcome(report)
    saved_in = save_copy(planned, report, mending.save)
    repair.carry_out(memory, planned)
    return Outcome(check.examine(memory, report.device, this_host()), planned.actions, saved_in)


def save_copy(planned: "Repair", report: "Report", name: str | None) -> str:
    """Write the bytes that a repair changes into a new file, and see that the disk has it; the file's name."""
    if name is None:
        Path(SAVE_DIRECTORY).mkdir(mode=0o700, parents=True, exist_ok=True)
        name = os.path.join(SAVE_DIRECTORY, f"fsck-{report.superblock.uuid}-{time.time_ns()}.json")
    with open(name, "x", encoding="ascii") as file:
        json.dump(planned.as_dict(report), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return name


class FsckHelper(click.Command):
    """Drops -C, which fsck(8) gives with a number attached or with none: there is no progress to show."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As every command, without -C."""
        return super().parse_args(ctx, [word for word in args if not re.fullmatch(r"-C\d*", word)])


@program.tool("fsck.famfs", cls=FsckHelper)
@click.option("-a", "-p", "automatic", is_flag=True, help="Mend counters that disagree.")
@click.option("-y", "yes", is_flag=True, help="Mend them, and take a torn last entry off the log.")
@click.option("-n", "no", is_flag=True, help="Change nothing.")
@click.option("-f", "--force", is_flag=True, help="Check even though it seems clean, as always.")
@click.option("-v", "-V", "--verbose", count=True, help="Say more.")
@click.argument("device")
def helper(*, device: str, automatic: bool, yes: bool, no: bool, force: bool, verbose: int) -> int:
    """Check the file system on DEVICE, for fsck(8). Changes nothing without -a, -p or -y.

    Exit status: 0 clean, 1 errors corrected, 4 errors left, 8 failed, 16 usage, 32 interrupted; 1 and 4 may come
    together.
    """
    if no and (automatic or yes):
        raise click.UsageError("-n goes with none of -a, -p and -y", click.get_current_context())
    outcome = examine(device, mending=Mending(torn=yes) if automatic or yes else None)
    show(outcome, human=False, verbose=verbose, nbuckets=None, as_json=False)
    return outcome.fsck_bits


def exit_status(error: FamfsError) -> int:
    """The bits of fsck(8): what is wrong with the media are errors left, everything else went wrong here."""
    return ERRORS_LEFT if isinstance(error, MediaError) else 8


STATUSES = program.Statuses(usage=16, interrupted=32, system=8, failure=exit_status)


def main() -> NoReturn:
    """The program `fsck.famfs`."""
    program.main(helper, "fsck.famfs", STATUSES)
