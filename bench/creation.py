# SPDX-License-Identifier: Apache-2.0
"""Section creation: new files in a second, by system calls one after the other and in one request to the socket."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import contenders, images
from bench.images import FILE_SIZE
from bench.metadata import rate
from bench.plan import Plan
from bench.replay import FILES_A_DIRECTORY
from bench.site import BenchError, Client
from bench.trees import WARM_DIRECTORY, Tree
from famfs_server.daemon.control_client import CREATE_LIMIT, SOCKET_NAME

SECTION = "creation"
LOGS = {"log of 15k": 15_000, "log of 1M": 1_000_000}
_WARM = 100
_LATENCY = "/dev/cpu_dma_latency"


def measure(plan: Plan) -> None:
    """On a master, with a short log and with a long one; each sample on a fresh image and mount."""
    count = 500 if plan.quick else 10_000
    for row, entries in LOGS.items():
        if plan.quick and entries > 100_000:
            continue
        plan.say(f"creation: making the {row}")
        tree = Tree(row, entries // (FILES_A_DIRECTORY + 1), FILES_A_DIRECTORY)
        paths = images.tree_paths(tree)
        image = images.make_image(plan.site.directory / "creation.img", paths, room=3 * count + 2 * _WARM)
        for sample in range(plan.samples):
            plan.say(f"creation: {row}, sample {sample + 1}")
            images.append(image, len(paths))
            with contenders.mount_ours(plan.site, image) as root:
                try:
                    _one_by_one(plan, row, "one by one", root, _names("new", count), _names("warm", _WARM))
                    with awake():
                        names, warm = _names("awake", count), _names("awakewarm", _WARM)
                        _one_by_one(plan, row, "one by one, awake", root, names, warm)
                except BenchError as error:
                    plan.figures.note(f"creation by system calls: {error}")
                _one_batch(plan, row, count)
        image.unlink()


def _names(kind: str, count: int) -> list[str]:
    return [f"{WARM_DIRECTORY}/{kind}{number:06}" for number in range(count)]


@contextmanager
def awake() -> Iterator[None]:
    """Have the processors wait for work without halting, as cyclictest does: to wake one that has halted takes long
    in a virtual machine, and how long is its host's affair. Raises BenchError where that cannot be asked for.
    """
    try:
        request = os.open(_LATENCY, os.O_WRONLY)
    except OSError as error:
        raise BenchError(f"{_LATENCY}: {error.strerror}") from error
    try:
        os.write(request, bytes(4))
        yield
    finally:
        os.close(request)


def _one_by_one(plan: Plan, row: str, column: str, root: Path, names: list[str], warm: list[str]) -> None:
    outcome = plan.site.measure("create", root, names=names, warm=warm, size=FILE_SIZE)
    plan.figures.add(SECTION, row, column, rate(outcome), "/s")


def _one_batch(plan: Plan, row: str, count: int) -> None:
    sockets = list((plan.site.directory / "run").glob(f"*/{SOCKET_NAME}"))
    if not sockets:
        plan.figures.note("creation in batches: the server has no control socket")
        return
    process = plan.site.start(sys.executable, "-m", "bench.control", sockets[0].parent)
    job = {"action": "create", "names": _names("batch", min(count, CREATE_LIMIT)), "size": FILE_SIZE}
    client = Client(process, job).wait_ready()
    client.go()
    plan.figures.add(SECTION, row, "one batch", rate(client.result()), "/s")
