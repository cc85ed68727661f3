# SPDX-License-Identifier: Apache-2.0
"""Section replay: how long it takes to read a log, to mount, and what memory the names take."""

import json
import sys
import time

from bench.contenders import mount_ours
from bench.images import make_image, tree_paths
from bench.plan import Plan
from bench.site import BenchError, run
from bench.trees import Tree

SECTION = "replay"
FILES_A_DIRECTORY = 100
SIZES = (1_000, 15_420, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 15_420)


def measure(plan: Plan) -> None:
    """Replay in a fresh process, and the mount command from its start until the mount is usable."""
    site = plan.site
    for entries in QUICK_SIZES if plan.quick else SIZES:
        row = f"{entries:,} entries"
        plan.say(f"replay: image with {row}")
        tree = Tree("replay", -(-entries // (FILES_A_DIRECTORY + 1)), FILES_A_DIRECTORY)
        image = make_image(site.directory / "replay.img", tree_paths(tree)[:entries])
        for sample in range(plan.samples):
            plan.say(f"replay: {row}, sample {sample + 1}")
            # The run's own environment, so that a run that is ended early ends this process too.
            printed = run(sys.executable, "-m", "bench.opening", image, env=site.environment())
            outcome = json.loads(printed)
            if outcome["entries"] != entries or outcome["visible"] != entries:
                raise BenchError(f"of {entries} entries {outcome['visible']} became visible")
            plan.figures.add(SECTION, row, "replay", outcome["seconds"], "s")
            plan.figures.add(SECTION, row, "memory a file", outcome["memory"] / entries, "B")
            start = time.perf_counter()
            with mount_ours(site, image):
                plan.figures.add(SECTION, row, "mount command", time.perf_counter() - start, "s")
        image.unlink()
