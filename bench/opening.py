# SPDX-License-Identifier: Apache-2.0
"""Opens a volume once, in a process of its own, and prints time and memory: `python -m bench.opening IMAGE`.

Memory is the growth of Pss without the pages of the device itself, which an emulated device keeps in RAM.
"""

import gc
import json
import re
import sys
import time
from pathlib import Path

from bench.images import MASTER
from famfs_server.dax.device import DaxDevice
from famfs_server.volume.volume import Volume

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def proportional_set(without: str) -> int:
    """Bytes of Pss of this process, but for the mappings of the file `without`."""
    total = 0
    counts = True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            counts = mapping[1] != without
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def main() -> None:
    """Open the image in the first argument."""
    path = sys.argv[1]
    with DaxDevice.open(path) as device:
        memory = device.memory()
        gc.collect()
        before = proportional_set(path)
        start = time.perf_counter()
        volume = Volume(memory, MASTER, path)
        seconds = time.perf_counter() - start
        gc.collect()
        grown = proportional_set(path) - before
        entries = volume.namespace.replayed
        visible = sum(1 for _ in volume.namespace.walk())
    print(json.dumps({"seconds": seconds, "memory": grown, "entries": entries, "visible": visible}))


if __name__ == "__main__":
    main()
