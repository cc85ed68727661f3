# SPDX-License-Identifier: Apache-2.0
"""`scripts/soak SECONDS`: see tests/soak/soak.py."""

import argparse
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from rich.console import Console
from rich.table import Table

from tests.soak.soak import Summary, soak

ROOM = 8 << 30
"""Bytes that a device in memory may take."""


def main() -> int:
    """1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Mixed load on three hosts, and random deaths.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    given = parser.parse_args()
    print(f"seed {given.seed} (repeat with --seed)", flush=True)
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > ROOM
    with (
        tempfile.TemporaryDirectory(prefix="famfs-soak-") as directory,
        tempfile.TemporaryDirectory(prefix="famfs-soak-", dir=shm if roomy else None) as folder,
    ):
        summary = soak(Path(directory), Path(folder) / "device", given.seconds, given.seed)
    show(summary)
    return 1 if summary.problems else 0


def show(summary: Summary) -> None:
    """The outcome as a table, and what was wrong in lines."""
    console = Console()
    table = Table(title=f"soak, seed {summary.seed}, {summary.seconds:.0f} s")
    for title in ("host", "program", "rounds", "calls", "outages met", "MB compared", "longest call"):
        table.add_column(title, justify="left" if title in ("host", "program") else "right")
    for report in summary.reports:
        seconds, name, _ = report["longest"]
        table.add_row(
            "master" if report["host"] == "0" else f"client {report['host']}",
            report["role"],
            f"{report['rounds']:,}",
            f"{sum(report['calls'].values()):,}",
            str(report["outages"]),
            f"{report['read'] / 1e6:,.0f}",
            f"{seconds:.2f} s {name}",
        )
    console.print(table)
    blows = ", ".join(f"{count} {blow}" for blow, count in sorted(summary.blows.items()))
    console.print(f"done to it: {blows}", highlight=False)
    console.print(
        f"{sum(summary.calls.values()):,} calls, {summary.files:,} files, {summary.compared / 1e6:,.0f} MB compared; "
        f"{len(summary.problems)} differences, failed calls and leftovers",
        highlight=False,
    )
    for problem in summary.problems[:50]:
        console.print(problem, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
