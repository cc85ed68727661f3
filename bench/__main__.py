# SPDX-License-Identifier: Apache-2.0
"""The command `scripts/bench`."""

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from bench import concurrency, creation, data, devdax, fmap, mapped, metadata, profiling, replay, takeover
from bench.bars import BARS
from bench.figures import Figures, Verdict, show_verdicts
from bench.plan import Plan
from bench.site import BenchError, Site
from famfs_server import __version__
from famfs_server.errors import FamfsError

_MODULES = (replay, takeover, metadata, data, fmap, concurrency, creation, devdax, mapped)
SECTIONS = {module.SECTION: module for module in _MODULES}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures famfs-server beside others, in one run, as medians of five. Needs root and /dev/fuse. "
        "What the figures mean: docs/performance.md. Ends with 0 unless something broke; a bar that is not met is "
        "printed as MISSED.",
    )
    parser.add_argument("section", nargs="*", help=f"what to measure: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one sample: does the bench itself work?")
    parser.add_argument(
        "--device", type=Path, metavar="DEV", help="sections devdax or mapped: on this dax device, which is overwritten"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there as well")
    parser.add_argument(
        "--profile",
        choices=profiling.SUBJECTS,
        help="measure nothing; show where the time of the request plane (or of the replay) goes",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.section if name not in SECTIONS]
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)} (there are {', '.join(SECTIONS)})")
    if arguments.device and arguments.section not in ([devdax.SECTION], [mapped.SECTION]):
        arguments.section = [devdax.SECTION]
    return arguments


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "famfs_server": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": model[0].partition(":")[2].strip() if model else "",
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    """Measure what the command line asks for."""
    arguments = parse()
    # A file or a pipe has no width; the widest table has seven columns.
    console = Console() if sys.stdout.isatty() else Console(width=130)
    progress = Console(stderr=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        if os.geteuid() or not os.path.exists("/dev/fuse"):
            raise BenchError("needs root and /dev/fuse")
        with Site() as site, progress.status("") as status:
            plan = Plan(site, Figures(), arguments.quick, status.update, arguments.device)
            if arguments.profile:
                profiling.show(plan, arguments.profile, console)
                return
            _measure(plan, arguments, console)
    except (BenchError, FamfsError, OSError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _measure(plan: Plan, arguments: argparse.Namespace, console: Console) -> None:
    facts = machine()
    console.print(*(f"{key} {value}" for key, value in facts.items()), sep=", ", soft_wrap=True, highlight=False)
    if plan.quick:
        console.print("[bold]--quick: small sizes and one sample; the figures prove nothing[/]")
    verdicts: list[Verdict] = []
    for name, module in SECTIONS.items():
        if not arguments.section or name in arguments.section:
            module.measure(plan)
            plan.figures.show(name, console)
            verdicts += [verdict for bar in BARS if bar.section == name and (verdict := bar.judge(plan.figures))]
    show_verdicts(verdicts, console)
    for note in plan.figures.notes:
        console.print(f"not measured: {note}", highlight=False, soft_wrap=True)
    if arguments.json:
        result = {
            "machine": facts,
            "quick": plan.quick,
            "figures": plan.figures.as_json(),
            "bars": [verdict.as_json() for verdict in verdicts],
            "notes": plan.figures.notes,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _end(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


main()
