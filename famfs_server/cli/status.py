# SPDX-License-Identifier: Apache-2.0
"""`famfs status`: what a mount tells about itself, once or again and again."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import click

from famfs_server.cli import program
from famfs_server.cli.values import NumberType
from famfs_server.daemon.control_client import ControlClient
from famfs_server.errors import FamfsError, MountError
from famfs_server.fuse import mountapi
from famfs_server.sizes import human_size
from famfs_server.volume.check import printable

Status = Mapping[str, Any]


@program.tool("status")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: an object for MOUNT, a list without; a line with --watch."
)
@click.option("-w", "--watch", is_flag=True, help="Show it again every second, with rates, until interrupted.")
@click.option("-n", "--count", type=NumberType("count", 1, 1 << 31), help="With --watch: end after so many times.")
@click.argument("mount", required=False)
def command(*, mount: str | None, as_json: bool, watch: bool, count: int | None) -> int:
    """Show the state of the file system mounted at MOUNT or from the device MOUNT, or of all that are mounted.

    Exit status 1: a mount did not answer.
    """
    points = mount_points([mount] if mount else [])
    if watch:
        before: dict[str, Status] = {}

        def look() -> list[str]:
            nonlocal before
            now = {status["mount_point"]: status for status in ask(points, alone=mount is not None)}
            if as_json:
                lines = [json.dumps(_one_or_all(list(now.values()), mount))]
            else:
                lines = [line for point, status in now.items() for line in render(status, before.get(point))]
            before = now
            return lines

        repeat(look, count, in_place=not as_json)
        return 0
    found = ask(points, alone=mount is not None)
    if as_json:
        click.echo(json.dumps(_one_or_all(found, mount), indent=2))
    else:
        for line in (line for status in found for line in render(status)):
            click.echo(line)
    return 0 if len(found) == len(points) else 1


def _one_or_all(found: list[Status], mount: str | None) -> Status | list[Status]:
    """What --json prints: one object if one mount was named."""
    return found[0] if mount else found


def ask(points: Sequence[str], *, alone: bool = False) -> list[Status]:
    """The status of each mount. One that gives none is named on standard error; if it is `alone`, its error is
    raised."""
    found: list[Status] = []
    for point in points:
        try:
            found.append(ControlClient.of_mount(point).status())
        except FamfsError as error:
            if alone:
                raise
            program.warn(str(error))
    return found


def mount_points(named: Sequence[str] = ()) -> list[str]:
    """The mounts that are `named`, by a path in them or by their devices, else all, without their bind mounts. Raises
    MountError if there is none."""
    mounts = mountapi.find_mounts()
    if not named and not mounts:
        raise MountError("no famfs file system is mounted")
    if not named:
        return list({record.device: record.mount_point for record in reversed(mounts)}.values())[::-1]
    of_device = {os.path.realpath(record.source): record.mount_point for record in mounts}
    return [of_device.get(os.path.realpath(name), name) if name else name for name in named]


def repeat(look: Callable[[], list[str]], count: int | None, seconds: float = 1.0, *, in_place: bool = True) -> None:
    """Show what `look` gives, again and again: `in_place` on a terminal, else one text after the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    in_place = in_place and console.is_terminal
    done = 0
    try:
        with Live(console=console, auto_refresh=False, screen=True) if in_place else nullcontext() as live:
            while True:
                text = "\n".join(look())
                if live is not None:
                    live.update(Text(text), refresh=True)
                else:
                    click.echo(text)
                done += 1
                if done == count:
                    return
                time.sleep(seconds)
    except KeyboardInterrupt:
        return


def render(status: Status, before: Status | None = None) -> Iterator[str]:
    """The status as lines; with an earlier one, rates instead of sums."""
    yield f"{status['device']} on {status['mount_point']}: role {status['role']}, data path {status['data_path']}"
    yield f"  because {status['reason']}"
    module = ", module famfs" if status["fuse"] == "famfs" else ""
    yield f"  kernel {status['kernel']}{module}, server {status['version']}, uuid {status['uuid']}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["mounted_since"]))
    yield f"  mounted since {since}, {status['takeovers']} takeovers, {_memory(status)}"
    entries, space = status["log"], status["space"]
    part = _percent(entries["entries"], entries["capacity"])
    yield f"  log {entries['entries']} of {entries['capacity']} entries{part}"
    if entries["behind"] is None:
        yield "  FAULTY memory under the log: it cannot be read; names that are not known are EIO"
    elif entries["behind"]:
        yield f"  {entries['behind']} entries of the log are not read yet"
    yield f"  {status['files']} files, {status['directories']} directories, {status['not_logged_yet']} not logged yet"
    used = space["capacity"] - space["free"]
    free, capacity = human_size(space["free"]), human_size(space["capacity"])
    yield f"  space {free} of {capacity} free{_percent(used, space['capacity'])}"
    for device in status["devices"][1:]:
        yield f"  device {device['index']}: {device['path'] or device['uuid']}, {device['state']}"
        if device["problem"]:
            yield f"    {device['problem']}; files on it are EIO"
    for fault, number in status["skipped"].items():
        yield f"  {number} entries not shown: {fault.replace('_', ' ')}"
    if status["damage"]:
        yield f"  DAMAGED at log entry {status['damage']['index']}: {status['damage']['what']}"
    if faulty := status["faulty"]["files"]:
        paths = ", ".join(printable(path) for path in status["faulty"]["paths"])
        yield f"  FAULTY memory under {faulty} files: {paths}{', …' if faulty > len(status['faulty']['paths']) else ''}"
    if status["lagging"]:
        yield f"  lagging: log entry {entries['entries']} of another host is not whole yet"
    if status["foreign_writer"]:
        yield "  TWO MASTERS: somebody else has written to the log; nothing is created until the next mount"
    if failed := status["failed_at_takeover"]:
        yield f"  {failed} requests have ended with EIO: their worker died, and this kernel cannot send them again"
    if status["requests"]["unmapped"]:
        yield f"  {status['requests']['unmapped']} reads and writes of files that the kernel should have mapped"
    yield from render_requests(status, before)
    if status["log_lines_lost"]:
        yield f"  {status['log_lines_lost']} lines are missing in the log: nobody took them"
    for line in status["recent"]:
        when = time.strftime("%H:%M:%S", time.localtime(line["time"]))
        yield f"  {when} {line['level']}: {line['message']}"


def render_requests(status: Status, before: Status | None) -> Iterator[str]:
    """The opcodes, the busiest first: how many requests or how many a second, and how long they take."""
    rows = opcode_rows(status, before)
    if not rows:
        return
    number_of = "a second" if before else "count"
    yield f"  {'request':<16} {number_of:>10} {'errors':>7} {'mean':>8} {'p50 <':>8} {'p99 <':>8}"
    for name, number, row in rows:
        times = (row["sampled_seconds"] / row["samples"] if row["samples"] else 0.0, row["p50"], row["p99"])
        shown = " ".join(f"{_duration(seconds):>8}" for seconds in times)
        yield f"  {name:<16} {number:>10.0f} {row['errors']:>7} {shown}"


def opcode_rows(status: Status, before: Status | None) -> list[tuple[str, float, Mapping[str, Any]]]:
    """Name, number (requests a second, if there is a status of before) and figures of each opcode."""
    seconds = status["taken_at"] - before["taken_at"] if before else 1.0
    earlier = before["requests"]["opcodes"] if before else {}
    rows = []
    for name, row in status["requests"]["opcodes"].items():
        number = row["count"] - earlier.get(name, {"count": 0})["count"]
        if number or not before:
            rows.append((name, number / max(seconds, 1e-9), row))
    return sorted(rows, key=lambda row: -row[1])


def _memory(status: Status) -> str:
    processes = status["processes"]
    return f"worker {processes['worker']} with {human_size(processes['worker_bytes'])} of memory"


def _percent(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f}% used)" if whole else ""


def _duration(seconds: float) -> str:
    if not seconds:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"
