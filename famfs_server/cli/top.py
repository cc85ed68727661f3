# SPDX-License-Identifier: Apache-2.0
"""`famfs top`: which requests the mounts of this host are answering right now, and how long they take."""

import json
from collections.abc import Iterator
from typing import Any

import click

from famfs_server.cli import program
from famfs_server.cli.status import Status, ask, mount_points, opcode_rows, render_requests, repeat
from famfs_server.cli.values import NumberType

_BAR = 40


@program.tool("top")
@click.option("-n", "--count", type=NumberType("count", 1, 1 << 31), help="End after so many times.")
@click.option("-d", "--delay", type=NumberType("seconds", 1, 3600), default=1, help="Seconds between two looks.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each look.")
@click.argument("mount", nargs=-1)
def command(*, mount: tuple[str, ...], count: int | None, delay: int, as_json: bool) -> None:
    """Show the request rates of each MOUNT, or of all mounts, until interrupted. The first look has none."""
    points = mount_points(mount)
    before: dict[str, Status] = {}

    def look() -> list[str]:
        nonlocal before
        now = {status["mount_point"]: status for status in ask(points, alone=len(points) == 1)}
        if as_json:
            lines = [json.dumps([as_dict(now[point], before.get(point)) for point in now])]
        else:
            lines = [line for point in now for line in _render(now[point], before.get(point))]
        before = now
        return lines

    repeat(look, count, delay, in_place=not as_json)


def as_dict(status: Status, before: Status | None) -> dict[str, Any]:
    """The rates of one mount, for JSON; seconds, bytes, and requests a second, nothing at the first look."""
    rows = opcode_rows(status, before) if before else []
    return {
        "taken_at": status["taken_at"],
        "mount_point": status["mount_point"],
        "device": status["device"],
        "role": status["role"],
        "data_path": status["data_path"],
        "log": {name: status["log"][name] for name in ("entries", "capacity")},
        "space": {name: status["space"][name] for name in ("free", "capacity")},
        "requests_a_second": sum(rate for _, rate, _ in rows) if before else None,
        "opcodes": {
            name: {"requests_a_second": rate, "errors": row["errors"], "p50": row["p50"], "p99": row["p99"]}
            for name, rate, row in rows
        },
    }


def _render(status: Status, before: Status | None) -> Iterator[str]:
    rows = opcode_rows(status, before)
    total = sum(number for _, number, _ in rows) if before else 0.0
    what = f"{status['device']}, {status['role']}, {status['data_path']}"
    yield f"{status['mount_point']} ({what}): {total:.0f} requests a second"
    used = status["log"]["entries"] / max(status["log"]["capacity"], 1)
    space = 1 - status["space"]["free"] / max(status["space"]["capacity"], 1)
    yield f"  log   {_bar(used)} {100 * used:.1f}%"
    yield f"  space {_bar(space)} {100 * space:.1f}%"
    if before is not None:
        yield from render_requests(status, before)
    yield ""


def _bar(part: float) -> str:
    full = round(min(max(part, 0.0), 1.0) * _BAR)
    return "█" * full + "░" * (_BAR - full)
