# SPDX-License-Identifier: Apache-2.0
"""`famfs top`: which requests the mounts of this host are answering right now, and how long they take."""

from collections.abc import Iterator

import click

from famfs_server.cli import program
from famfs_server.cli.status import Status, ask, mount_points, opcode_rows, render_requests, repeat
from famfs_server.cli.values import NumberType

_BAR = 40


@program.tool("top")
@click.option("-n", "--count", type=NumberType("count", 1, 1 << 31), help="End after so many times.")
@click.option("-d", "--delay", type=NumberType("seconds", 1, 3600), default=1, help="Seconds between two looks.")
@click.argument("mount", nargs=-1)
def command(*, mount: tuple[str, ...], count: int | None, delay: int) -> None:
    """Show the request rates of each MOUNT, or of all mounts, until interrupted."""
    points = mount or mount_points()
    before: dict[str, Status] = {}

    def look() -> list[str]:
        nonlocal before
        now = {status["mount_point"]: status for status in ask(points, alone=len(points) == 1)}
        lines = [line for point in now for line in _render(now[point], before.get(point))]
        before = now
        return lines

    repeat(look, count, delay)


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
