# SPDX-License-Identifier: Apache-2.0
"""Section fmap: the time from GET_FMAP to its answer, over a socket in place of /dev/fuse."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.images import append, format_image
from bench.kernel import server
from bench.plan import Plan
from bench.site import BenchError
from bench.transport import ECHO_SIZE
from famfs_server.fuse import abi
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.dialects import PULL, PUSH
from famfs_server.omf import layout, log
from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume.namespace import nodeid_of

SECTION = "fmap"
COLUMN = "round trip"
_STRIPS = 16
_CHUNK = 2 << 20
_TIB = 1 << 40
_FILES = 16
"""Small files of each kind: they are asked for in turn, so that no answer is the one before."""


def make_image(path: Path) -> tuple[list[int], list[int], list[int]]:
    """A device of more than 2 TiB, sparse; the nodeids of simple files, of striped ones, and of two of 1 TiB."""
    log_length = layout.MIN_LOG_LENGTH
    place = layout.LOG_OFFSET + log_length
    kinds = ([(_CHUNK, 1, 0)] * _FILES, [(_STRIPS * _CHUNK, _STRIPS, _CHUNK)] * _FILES, [(_TIB, _STRIPS, _CHUNK)] * 2)
    entries: list[bytes] = []
    nodeids: tuple[list[int], list[int], list[int]] = ([], [], [])
    for found, files in zip(nodeids, kinds, strict=True):
        for size, strips, chunk in files:
            length = size // strips
            extents = tuple(Extent(0, place + number * length, length) for number in range(strips))
            place += size
            index = len(entries)
            fmap = Fmap(extents, chunk)
            entries.append(log.build_file(index, f"f{index}", size=size, mode=0o644, uid=0, gid=0, fmap=fmap))
            found.append(nodeid_of(index))
    format_image(path, place, log_length)
    with path.open("r+b") as image:
        image.seek(layout.entry_offset(0))
        image.write(b"".join(entries))
    append(path, len(entries))
    return nodeids


def measure(plan: Plan) -> None:
    """Small maps beside requests that are answered with an error at once; a large one beside as many plain bytes."""
    count = 200 if plan.quick else 3_000
    image = plan.site.directory / "fmap.img"
    simple, striped, huge = make_image(image)
    with server(plan.site, str(image), PULL.name) as kernel:
        kernel.negotiate()
        rows: dict[str, Callable[[int], object]] = {
            "nothing": lambda turn: kernel.ask(Opcode.FLUSH, simple[0], bytes(abi.FLUSH_IN.size)),
            "GETATTR": lambda turn: kernel.ask(Opcode.GETATTR, simple[0], bytes(abi.GETATTR_IN.size)),
            "simple": lambda turn: kernel.get_fmap(PULL.get_fmap, simple[turn % _FILES], b""),
            "16 strips": lambda turn: kernel.get_fmap(PULL.get_fmap, striped[turn % _FILES], b""),
        }
        _time(plan, rows, count)
    with server(plan.site, str(image), PUSH.name) as kernel, server(plan.site) as floor:
        kernel.negotiate()
        room = abi.GET_FMAP_IN.pack(4096)

        def probe_and_fetch(turn: int) -> int:
            nodeid = huge[turn % len(huge)]
            needed = kernel.get_fmap(PUSH.get_fmap, nodeid, room)
            if kernel.get_fmap(PUSH.get_fmap, nodeid, abi.GET_FMAP_IN.pack(needed)) != needed:
                raise BenchError("the size of a map changed between two requests")
            return needed

        sizes = ECHO_SIZE.pack(abi.FMAP_HEADER.size), ECHO_SIZE.pack(probe_and_fetch(0))

        def as_many_bytes(turn: int) -> None:
            for size in sizes:
                floor.ask(PUSH.get_fmap, 0, size)

        _time(plan, {"1 TiB, unrolled": probe_and_fetch, "as many bytes, made beforehand": as_many_bytes}, count // 200)


def _time(plan: Plan, rows: dict[str, Callable[[int], object]], count: int) -> None:
    names: Sequence[str] = list(rows)
    for sample in range(plan.samples):
        for name in names if sample % 2 else reversed(names):
            plan.say(f"fmap: {name}, sample {sample + 1}")
            ask = rows[name]
            for turn in range(max(count // 10, 2)):
                ask(turn)
            start = time.perf_counter()
            for turn in range(count):
                ask(turn)
            plan.figures.add(SECTION, name, COLUMN, (time.perf_counter() - start) / count * 1e6, "µs")
