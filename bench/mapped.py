# SPDX-License-Identifier: Apache-2.0
"""Section mapped: files that the kernel maps, as a share of a mapping of the same range of the dax device.

It needs `--device` and a kernel with extent maps, as in
`scripts/vm-test --famfs=push --devices 4G -- scripts/bench mapped --device /dev/dax0.0`. The device changes its mode
between two samples of a pair. Ratios are all that counts in a virtual machine.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import data, devdax
from bench.metadata import rate
from bench.plan import Plan
from bench.site import BenchError, run
from famfs_server.dax import drivers
from famfs_server.dax.device import Mode
from famfs_server.errors import DeviceBusyError
from famfs_server.fuse import kernels

SECTION = "mapped"
RATIO, FAULTS, OPENS = "mapped / device", "minor faults", "opens a second"
_BLOCKS = ("128 KiB", "1 MiB")
_OPENS = 2000

# Touches each page of a mapping once; prints the faults that took, without those of the program itself.
_TOUCH = """
import json, mmap, resource, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), int(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for offset in range(0, len(mapping), 4096):
    mapping[offset]
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def measure(plan: Plan) -> None:
    """Copies by turns from a file of a mount and from the device; faults of one pass; opens with and without OPEN."""
    if plan.device is None or not kernels.is_loaded():
        plan.figures.note("section mapped: no --device, or no module famfs (docs/kernel-module.md)")
        return
    path = str(plan.device)
    _switch(path, Mode.DEVDAX)
    offset = devdax.prepare(path)
    try:
        for sample in range(plan.samples):
            plan.say(f"mapped: sample {sample + 1}")
            _one_sample(plan, path, offset)
    finally:
        _switch(path, Mode.DEVDAX)
        devdax.wipe(path)


def _one_sample(plan: Plan, path: str, offset: int) -> None:
    rows = list(itertools.product(("read", "write"), _BLOCKS))
    with _mounted(plan, path) as mount:
        file = mount / devdax.NAME
        ours = [_copy(plan, str(file), 0, *row) for row in rows]
        done = subprocess.run(
            [sys.executable, "-c", _TOUCH, file, str(data.FILE_SIZE)], capture_output=True, text=True, check=True
        )
        plan.figures.add(SECTION, "64 MiB touched", FAULTS, json.loads(done.stdout), "")
        plan.figures.add(SECTION, "known file, OPEN asked for", OPENS, _opens(plan, mount), "/s")
    with _mounted(plan, path, "nocreate") as mount:
        plan.figures.add(SECTION, "known file, no_open", OPENS, _opens(plan, mount), "/s")
    _switch(path, Mode.DEVDAX)
    for (direction, block), mine in zip(rows, ours, strict=True):
        theirs = _copy(plan, path, offset, direction, block)
        plan.figures.add(SECTION, f"sequential {direction} {block}", RATIO, mine / theirs, "")


def _switch(path: str, mode: Mode) -> None:
    """Change the mode of the device; the locks of a server go a moment after its run-time folder."""
    deadline = time.monotonic() + 10
    while True:
        try:
            drivers.switch(path, mode)
        except DeviceBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _copy(plan: Plan, file: str, mapped: int, direction: str, block: str) -> float:
    return rate(
        plan.site.measure(
            "data", None, file=file, direction=direction, order="sequential", block=data.BLOCKS[block],
            size=data.FILE_SIZE, seconds=0.05 if plan.quick else 1.0, mapped=mapped,
        )
    )  # fmt: skip


def _opens(plan: Plan, mount: Path) -> float:
    names = [devdax.NAME] * _OPENS
    return rate(plan.site.measure("open", mount, names=names, warm=names[:10]))


@contextmanager
def _mounted(plan: Plan, path: str, *options: str) -> Iterator[Path]:
    _switch(path, Mode.FSDEV)
    place = plan.site.place("mapped")
    words = ["-m", "bench.mount", path, str(place), "fmap=require", *options]
    run(sys.executable, *words, env=plan.site.environment())
    with plan.site.unmounting(place):
        if not any(record.fstype == kernels.MODULE.shown_type for record in plan.site.mounts()):
            raise BenchError("the module does not serve the mount")
        yield place
