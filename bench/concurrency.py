# SPDX-License-Identifier: Apache-2.0
"""Section concurrency: two clients beside one, and requests beside slow work in the server."""

import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench import contenders, images
from bench.contenders import OURS, Contender
from bench.metadata import ACTIONS, rate
from bench.plan import Plan
from bench.site import Client
from bench.trees import Tree
from famfs_server.daemon.control_client import SOCKET_NAME

SECTION = "concurrency"
IDLE, BUSY = "idle", "during replay and dump"
PATIENCE = 1.5
"""Seconds in which a server that polls the log has begun to replay by itself."""
_SHOWN = Tree("shown", 10, 100)


def measure(plan: Plan) -> None:
    """Both halves."""
    _two_clients(plan)
    _slow_work(plan)


def _two_clients(plan: Plan) -> None:
    """The names of one fresh mount, used by one client, and shared out between two."""
    tree = Tree("clients", 2, 1_000 if plan.quick else 15_000)
    compared = contenders.for_tree(plan.site, tree, plan.figures.note)
    compared = [each for each in compared if each.name in (OURS, contenders.BINDFS, contenders.LOOP)]
    shuffle = random.Random(11)
    for sample in range(plan.samples):
        for contender in contenders.in_turn(compared, sample):
            for action in ("stat", "open"):
                for clients in (1, 2) if sample % 2 else (2, 1):
                    names = shuffle.sample(tree.file_names, tree.files)
                    plan.say(f"concurrency: {action}, {clients} clients, {contender.name}, sample {sample + 1}")
                    outcome = _share(plan, contender, action, [names[part::clients] for part in range(clients)], tree)
                    row = f"{ACTIONS[action]}, {'one client' if clients == 1 else 'two clients'}"
                    plan.figures.add(SECTION, row, contender.name, rate(outcome), "/s")


def _share(plan: Plan, contender: Contender, action: str, parts: list[list[str]], tree: Tree) -> dict[str, Any]:
    """The outcome of several clients as if they were one."""
    with contender.mounted() as root:
        clients = [plan.site.client(action, root, names=part, warm=tree.warm_names) for part in parts]
        for client in clients:
            client.wait_ready()
        for client in clients:
            client.go()
        outcomes = [client.result() for client in clients]
    return {
        "count": sum(each["count"] for each in outcomes),
        "start": min(each["start"] for each in outcomes),
        "end": max(each["end"] for each in outcomes),
    }


def _slow_work(plan: Plan) -> None:
    """Reads one after the other: first alone, then while another host's files are replayed and the control plane is
    kept busy."""
    added = 5_000 if plan.quick else 100_000
    first = images.tree_paths(_SHOWN)
    later = [(b"later", True), *((b"later/%07d" % number, False) for number in range(added - 1))]
    plan.say("concurrency: making the image")
    image = images.make_image(plan.site.directory / "busy.img", [*first, *later], visible=len(first))
    for sample in range(plan.samples):
        images.append(image, len(first))
        plan.say(f"concurrency: slow work, sample {sample + 1}")
        with contenders.mount_ours(plan.site, image, master=False) as root:
            _one_disturbance(plan, root, image, len(first), added)


def _one_disturbance(plan: Plan, root: Path, image: Path, before: int, added: int) -> None:
    measured = plan.site.client("latency", root, file=_SHOWN.file_names[0]).wait_ready()
    following = plan.site.client("follow", root, entries=added, patience=PATIENCE).wait_ready()
    busy = _control_plane(plan, root).wait_ready()
    measured.go()
    idle_from = time.monotonic_ns()
    time.sleep(0.2 if plan.quick else 1.0)
    busy.go()
    idle_to = time.monotonic_ns()
    time.sleep(0.05)
    images.append(image, before + added)
    following.go()
    window = following.result()
    measured.stop()
    busy.stop()
    outcome = measured.result()
    busy.result()
    _add(plan, IDLE, outcome, idle_from, idle_to)
    _add(plan, BUSY, outcome, window["start"], window["end"])
    plan.figures.add(SECTION, BUSY, "replay", (window["end"] - window["start"]) / 1e9, "s")
    if window["prompted"]:
        plan.figures.note(f"concurrency: the server did not follow the log within {PATIENCE} s; a missing name made it")


def _control_plane(plan: Plan, root: Path) -> Client:
    """A client that keeps the control plane busy: with dumps from the control socket, if the server has one."""
    sockets = list((plan.site.directory / "run").glob(f"*/{SOCKET_NAME}"))
    if not sockets:
        plan.figures.note("concurrency: the server has no control socket; relayed requests keep its control plane busy")
        return plan.site.client("relayed", root)
    process = plan.site.start(sys.executable, "-m", "bench.control", sockets[0].parent)
    return Client(process, {"action": "dump"})


def _add(plan: Plan, row: str, outcome: dict[str, Any], start: int, end: int) -> None:
    """The rate and the latencies of requests that touch [start, end)."""
    took = [
        duration
        for begun, duration in zip(outcome["starts"], outcome["took"], strict=True)
        if begun + duration > start and begun < end
    ]
    plan.figures.add(SECTION, row, "requests", len(took) / (end - start) * 1e9, "/s")
    ordered = sorted(took)
    plan.figures.add(SECTION, row, "median", statistics.median(ordered) / 1e9, "s")
    plan.figures.add(SECTION, row, "p99", ordered[int(len(ordered) * 0.99)] / 1e9, "s")
    plan.figures.add(SECTION, row, "slowest", ordered[-1] / 1e9, "s")
