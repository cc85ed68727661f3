# SPDX-License-Identifier: Apache-2.0
"""Section data: reads and writes of one file, beside copies to and from the same memory."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import contenders
from bench.contenders import BINDFS, LOOP, LOOP_FROM_MEMORY, OURS, RELAYED, TMPFS, Contender
from bench.images import MASTER, format_image
from bench.kernel import answers
from bench.metadata import rate
from bench.plan import Plan
from bench.site import Site
from bench.trees import WARM_DIRECTORY, Tree
from famfs_server.dax.device import DaxDevice
from famfs_server.omf import layout
from famfs_server.volume.volume import NewFile, Volume

SECTION = "data"
MEMCPY = "memcpy"
BLOCKS = {"4 KiB": 4 << 10, "128 KiB": 128 << 10, "1 MiB": 1 << 20}
FILE_SIZE = 64 << 20
"""More than the caches of most processors hold, so that the bytes come from memory."""
_TREE = Tree("data", 1, 1)
"""Its only file carries the data."""
FILE = _TREE.file_names[0]
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Fields:
    contenders: list[Contender]
    image: Path
    offset: int
    """Where on the device the file's bytes are."""


def measure(plan: Plan) -> None:
    """Each pattern for a while with each contender; all of them stay mounted, since nothing of it is cached."""
    seconds = 0.05 if plan.quick else 0.4
    fields = _prepare(plan.site, plan.figures.note)
    with ExitStack() as mounts:
        files = {each.name: mounts.enter_context(each.mounted()) / FILE for each in fields.contenders}
        for sample, pattern in itertools.product(range(plan.samples), _patterns()):
            direction, order, label = pattern
            row = f"{order} {direction} {label}"
            plan.say(f"data: {row}, sample {sample + 1}")
            names = [*(each.name for each in contenders.in_turn(fields.contenders, sample)), MEMCPY]
            for name in names:
                outcome = plan.site.measure(
                    "data",
                    None,
                    file=str(files.get(name, fields.image)),
                    direction=direction,
                    order=order,
                    block=BLOCKS[label],
                    size=FILE_SIZE,
                    seconds=seconds,
                    mapped=fields.offset if name == MEMCPY else None,
                )
                plan.figures.add(SECTION, row, name, rate(outcome) / _MIB, "MiB/s")


def _patterns() -> Iterator[tuple[str, str, str]]:
    return itertools.product(("read", "write"), ("sequential", "random"), BLOCKS)


def _prepare(site: Site, note: Callable[[str], None]) -> _Fields:
    image, offset = make_image(site.directory / "data.img")
    source = site.directory / "data.files"
    for name in (*_TREE.directory_names, WARM_DIRECTORY):
        (source / name).mkdir(parents=True)
    (source / FILE).write_bytes(b"x" * FILE_SIZE)
    # At two places at once, one host could not mount one device: the second contender gets a copy.
    copy = site.directory / "data-relayed.img"
    make_image(copy)
    found = [
        Contender(OURS, lambda: contenders.mount_ours(site, image)),
        Contender(RELAYED, lambda: contenders.mount_ours(site, copy, "fastpath=off", place="relayed")),
        Contender(TMPFS, lambda: contenders.as_it_is(source)),
    ]
    if shutil.which("bindfs"):
        found.append(Contender(BINDFS, lambda: contenders.mount_bindfs(site, source)))
    else:
        note(contenders.NO_BINDFS)
    program = contenders.compile_loop(site)
    if program is not None:
        like = answers(site, image)
        for name, data in ((LOOP, None), (LOOP_FROM_MEMORY, source / FILE)):
            mounted = partial(contenders.mount_loop, site, program, _TREE, like, file_size=FILE_SIZE, data=data)
            found.append(Contender(name, mounted))
    else:
        note(contenders.NO_COMPILER)
    return _Fields(found, image, offset)


def make_image(path: Path) -> tuple[Path, int]:
    """A device whose only file is full of bytes, and where they lie."""
    format_image(path, layout.MIN_DEVICE_SIZE, layout.MIN_LOG_LENGTH)
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        volume = Volume(memory, MASTER, str(path))
        for name in _TREE.directory_names:
            volume.mkdir(name.encode(), 0o755, 0, 0)
        nodeid = volume.create(NewFile(FILE.encode(), FILE_SIZE, 0o644, 0, 0))
        volume.write(nodeid, 0, memoryview(b"x" * FILE_SIZE))
        offset = volume.namespace.fmap(nodeid).extents[0].offset
        volume.close()
        memory.close()
    return path, offset
