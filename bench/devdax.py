# SPDX-License-Identifier: Apache-2.0
"""Section devdax: the `server` path on a real dax device, as a share of plain copies from the same mapping.

It needs `--device`, which names the device; a device that holds a file system is left alone. Ratios are all that counts
in a virtual machine, where every figure depends on the machine below.
"""

import itertools

from bench import contenders, data
from bench.images import MASTER
from bench.metadata import rate
from bench.plan import Plan
from bench.site import BenchError
from famfs_server.dax.device import DaxDevice, Lock, Mode
from famfs_server.omf import layout, superblock
from famfs_server.volume.format import make_filesystem
from famfs_server.volume.volume import NewFile, Volume

SECTION = "devdax"
RATIO = "ours / memcpy"
NAME = "file"


def measure(plan: Plan) -> None:
    """One file on the device: through the mount, and from a mapping of the device, by turns."""
    if plan.device is None:
        plan.figures.note("section devdax: no --device")
        return
    path = str(plan.device)
    offset = prepare(path)
    try:
        with contenders.mount_ours(plan.site, plan.device) as mount:
            for sample, direction, label in itertools.product(range(plan.samples), ("read", "write"), data.BLOCKS):
                row = f"sequential {direction} {label}"
                plan.say(f"devdax: {row}, sample {sample + 1}")
                rates = [
                    rate(
                        plan.site.measure(
                            "data",
                            None,
                            file=file,
                            direction=direction,
                            order="sequential",
                            block=data.BLOCKS[label],
                            size=data.FILE_SIZE,
                            seconds=0.05 if plan.quick else 1.0,
                            mapped=mapped,
                        )
                    )
                    for file, mapped in ((str(mount / NAME), None), (path, offset))
                ]
                plan.figures.add(SECTION, row, RATIO, rates[0] / rates[1], "")
    finally:
        wipe(path)


def prepare(path: str) -> int:
    """Make a file system with one file of full size; where on the device its bytes are."""
    with DaxDevice.open(path) as device:
        device.require_lock(Lock.MOUNTED, exclusive=True, why="is in use; unmount it first")
        memory = device.memory()
        head = memory.read_fresh(0, layout.SUPERBLOCK.itemsize)
        if device.mode is not Mode.DEVDAX or superblock.inspect(head).superblock is not None:
            raise BenchError(f"{path} is no dax device in devdax mode, or holds a file system; it was left alone")
        make_filesystem(memory, path, MASTER, log_length=layout.MIN_LOG_LENGTH)
        volume = Volume(memory, MASTER, path)
        nodeid = volume.create(NewFile(NAME.encode(), data.FILE_SIZE, 0o644, 0, 0))
        volume.write(nodeid, 0, memoryview(b"x" * data.FILE_SIZE))
        offset: int = volume.namespace.fmap(nodeid).extents[0].offset
        volume.close()
        memory.close()
    return offset


def wipe(path: str) -> None:
    """Leave no file system on the device."""
    with DaxDevice.open(path) as device:
        memory = device.memory()
        memory.zero(0, layout.SUPERBLOCK_REGION)
        memory.close()
