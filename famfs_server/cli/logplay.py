# SPDX-License-Identifier: Apache-2.0
"""`famfs logplay`: make a mount take in its log, or play a log into a shadow tree of YAML files.

A mount of famfs-server follows its log by itself, so there the command only reports. The shadow tree is what the
reference's server is fed with (docs/format.md 7.7).
"""

import json
import re
from typing import TYPE_CHECKING, Any

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.cli.target import Targets, Unmounted, unmounted
from famfs_server.errors import MediaError, PathError, UsageError
from famfs_server.volume.check import describe_stop
from famfs_server.volume.faults import Fault

if TYPE_CHECKING:
    from famfs_server.volume.volume import Statistics

_COUNTED_OUT = (Fault.UNKNOWN_TYPE, Fault.DEVICE_INDEX, Fault.DEVICE_DUPLICATE)
"""Entries that are neither files nor directories; logplay never counts them as errors (format 7.5)."""


class LogplayCommand(click.Command):
    """Understands `-Ss PATH`, as the reference's own tests write `-sS PATH`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Move an S that is not the last letter of a group of options behind the others."""
        return super().parse_args(ctx, [re.sub(r"^-([a-zA-Z]*)S([a-zA-Z]*s)$", r"-\1\2S", word) for word in args])


@program.tool("logplay", cls=LogplayCommand)
@click.option("-n", "--dryrun", is_flag=True, help="Write nothing.")
@click.option("-S", "--shadow", multiple=True, metavar="DIRECTORY", help="Play the log into DIRECTORY/root.")
@click.option("-s", "--shadowtest", is_flag=True, help="Compare shadow files that exist with the log.")
@click.option(
    "-d",
    "--daxdev",
    multiple=True,
    callback=lambda _context, _option, words: unmounted(words),
    metavar="DEV",
    help="Take the log from a device that is not mounted; needs --shadow.",
)
@click.option("-m", "--mmap", "by_mmap", is_flag=True, hidden=True)
@click.option("-r", "--read", "by_read", is_flag=True, hidden=True)
@click.option("-c", "--client", is_flag=True, hidden=True)
@click.option("-M", "--set-daxmode", is_flag=True, hidden=True)
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path", required=False, metavar="[MOUNT]")
def command(
    *,
    path: str | None,
    dryrun: bool,
    shadow: tuple[str, ...],
    shadowtest: bool,
    daxdev: Unmounted | None,
    by_mmap: bool,
    by_read: bool,
    client: bool,
    set_daxmode: bool,
    verbose: int,
    as_json: bool,
) -> int:
    """Take in what other hosts have logged, and show how the log reads. The exit status counts what cannot be shown."""
    program.set_verbosity(verbose)
    if by_mmap and by_read:
        raise UsageError("--mmap and --read exclude each other")
    if len(shadow) > 1:
        raise UsageError("--shadow may be given once")
    program.refuse_daxmode(set_daxmode)
    if daxdev is not None:
        if not shadow:
            raise UsageError("--daxdev needs --shadow")
        if path is not None:
            raise UsageError("say either --daxdev or a mount point")
    elif path is None:
        raise UsageError("name the mount point, or --shadow and --daxdev")
    with Targets(daxdev, write=False) as targets:
        place = targets.find("/" if path is None else path)
        if place.status() is None:
            raise PathError(f"{place.name}: does not exist")
        place.target.follow()
        volume = place.target.volume()
        figures = volume.statistics()
        created = 0
        if shadow:
            from famfs_server.cli.shadow import ShadowTree

            tree = ShadowTree(shadow[0], write=not dryrun, compare=shadowtest)
            nodes = figures.files + figures.directories
            with progress(f"playing into {shadow[0]}", nodes, "files and directories") as bar:
                created = tree.play(volume, bar.advance)
        errors = sum(count for fault, count in figures.skipped.items() if fault not in _COUNTED_OUT)
        if as_json:
            click.echo(json.dumps(as_dict(figures, created, errors), indent=2))
        else:
            kind = "(shadow)" if shadow else ""
            click.echo(f"famfs logplay{kind}: {figures.log_entries} log entries, {created} new shadow files")
            click.echo(f"  {figures.files} files and {figures.directories} directories are shown")
            for fault, count in figures.skipped.items():
                click.echo(f"  {count} entries are skipped: {fault.meaning}")
        if figures.stop is not None:
            raise MediaError(describe_stop(figures.stop))
        return errors


def as_dict(figures: "Statistics", created: int, errors: int) -> dict[str, Any]:
    """What was found, for JSON."""
    stop = figures.stop
    return {
        "log_entries": figures.log_entries,
        "files": figures.files,
        "directories": figures.directories,
        "new_shadow_files": created,
        "skipped": {fault.name.lower(): count for fault, count in figures.skipped.items()},
        "errors": errors,
        "stop": None if stop is None else {"index": stop.index, "damage": stop.damage.value},
    }
