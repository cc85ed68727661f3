# SPDX-License-Identifier: Apache-2.0
"""Section metadata: the first use of each name after a fresh mount, in random order, one client."""

import random
from typing import Any

from bench import contenders
from bench.plan import Plan
from bench.trees import Tree

SECTION = "metadata"
ACTIONS = {"stat": "cold stat", "open": "open+close", "scandir": "scandir", "listing": "scandir and stat"}
_ON_DIRECTORIES = ("scandir", "listing")
NAMES_MEASURED = 15_000
"""Of a larger tree that many names, chosen at random for each sample, are used; the listing is always complete."""


def trees(plan: Plan) -> list[Tree]:
    """The flat directory and the deep tree."""
    if plan.quick:
        return [Tree("15k files", 1, 1_500), Tree("100k files", 50, 100)]
    return [Tree("15k files", 1, 15_000), Tree("100k files", 1_000, 100)]


def rate(outcome: dict[str, Any]) -> float:
    """What a client did in a second."""
    return float(outcome["count"] / (outcome["end"] - outcome["start"]) * 1e9)


def measure(plan: Plan) -> None:
    """Every contender, with a fresh mount for each sample of each action."""
    shuffle = random.Random(25)
    for tree in trees(plan):
        plan.say(f"metadata: making {tree.name}")
        field = contenders.for_tree(plan.site, tree, plan.figures.note)
        for sample in range(plan.samples):
            names = shuffle.sample(tree.file_names, min(tree.files, NAMES_MEASURED))
            directories = shuffle.sample(tree.directory_names, tree.directories)
            for contender in contenders.in_turn(field, sample):
                plan.say(f"metadata: {tree.name}, sample {sample + 1}, {contender.name}")
                for action, title in ACTIONS.items():
                    used = directories if action in _ON_DIRECTORIES else names
                    with contender.mounted() as root:
                        outcome = plan.site.measure(action, root, names=used, warm=tree.warm_names)
                    plan.figures.add(SECTION, f"{tree.name}: {title}", contender.name, rate(outcome), "/s")
