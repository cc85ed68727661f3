# SPDX-License-Identifier: Apache-2.0
"""Section takeover: the worker is killed, and how long it takes until its successor has answered."""

import os
from pathlib import Path

from bench import images
from bench.contenders import OURS, RELAYED, mount_ours
from bench.plan import Plan
from bench.replay import FILES_A_DIRECTORY
from bench.site import BenchError, Site, wait_for
from bench.trees import Tree

SECTION = "takeover"
SIZES = (15_420, 1_000_000)
QUICK_SIZES = (15_420,)
_DEATHS = 5
"""Deaths on one mount; their median is a sample."""
_REPLACED_SECONDS = 30.0


def measure(plan: Plan) -> None:
    """A client kills the worker and asks for a name that does not exist, so that the answer needs a look at the log."""
    for entries in QUICK_SIZES if plan.quick else SIZES:
        row = f"{entries:,} entries"
        plan.say(f"takeover: image with {row}")
        tree = Tree("takeover", -(-entries // (FILES_A_DIRECTORY + 1)), FILES_A_DIRECTORY)
        image = images.make_image(plan.site.directory / "takeover.img", images.tree_paths(tree)[:entries])
        for column, options in ((OURS, ()), (RELAYED, ("fastpath=off",))):
            plan.say(f"takeover: {row}, {column}")
            with mount_ours(plan.site, image, *options) as root:
                _deaths(plan, root, row, column)
        image.unlink()


def _deaths(plan: Plan, root: Path, row: str, column: str) -> None:
    """Kill one worker after the other, each once it has answered."""
    worker = _next_worker(plan.site, 0)
    for death in range(1 if plan.quick else plan.samples * _DEATHS):
        outcome = plan.site.measure("outlive", root, victim=worker, name=f"absent{death}")
        plan.figures.add(SECTION, row, column, (outcome["end"] - outcome["start"]) / 1e9, "s")
        worker = _next_worker(plan.site, worker)
        plan.figures.add(SECTION, row, f"{column}, computed", _computed(worker), "s")


def _next_worker(site: Site, before: int) -> int:
    """The pid of the one worker of this run, once it is not `before`."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in site.servers() if _name(pid) == "famfs-worker" and pid != before]
        return len(found) == 1

    if not wait_for(there, _REPLACED_SECONDS):
        raise BenchError("nobody takes over from a worker that was killed")
    return found[0]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _computed(pid: int) -> float:
    """Seconds that all threads of a process have had a processor."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((tasks / task / "schedstat").read_text().split()[0]) for task in os.listdir(tasks)) / 1e9
