# SPDX-License-Identifier: Apache-2.0
"""The file systems that are compared: this server in both plane settings, bindfs, tmpfs, and the loop of constants."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.images import FILE_SIZE, make_image, tree_paths
from bench.kernel import Answers, answers
from bench.site import BenchError, Site, run
from bench.trees import WARM_DIRECTORY, WARM_FILES, Tree

OURS, RELAYED, BINDFS, TMPFS = "ours", "fastpath=off", "bindfs", "tmpfs"
LOOP, LOOP_FROM_MEMORY = "C loop", "C loop from memory"
NO_BINDFS = "bindfs is not installed (apt-get install bindfs); nothing is compared with it"
NO_COMPILER = "there is no C compiler (apt-get install gcc); nothing is compared with the loop of constants"


@dataclass(frozen=True, slots=True)
class Contender:
    """A file system that serves one tree; `mounted` mounts it afresh."""

    name: str
    mounted: Callable[[], AbstractContextManager[Path]]


@contextmanager
def mount_ours(site: Site, image: Path, *options: str, master: bool = True, place: str = "ours") -> Iterator[Path]:
    """This server, from an image. Extent maps are off: data go through the server on every kernel."""
    at = site.place(place)
    words = ["-m", "bench.mount", str(image), str(at), "fmap=never", *options]
    run(sys.executable, *words, env=site.environment(master=master))
    with site.unmounting(at):
        yield at


@contextmanager
def mount_bindfs(site: Site, source: Path) -> Iterator[Path]:
    """bindfs, which sends every request on to the directory `source`. Data do not stop in the page cache."""
    place = site.place("bindfs")
    run("bindfs", "-o", "direct_io", source, place, env=site.environment())
    with site.unmounting(place):
        yield place


@contextmanager
def mount_loop(
    site: Site, program: Path, tree: Tree, like: Answers, *, file_size: int = FILE_SIZE, data: Path | None = None
) -> Iterator[Path]:
    """The loop of constants.c, which has every file of `tree` without knowing any; all of them have the bytes of the
    file `data`, or the same constant everywhere."""
    place = site.place("loop" if data is None else "loop-from-memory")
    numbers = (tree.directories, tree.files_each, WARM_FILES, file_size, like.directory_seconds, like.listing_flags)
    process = site.start(program, place, *map(str, numbers), *([] if data is None else [data]))
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise BenchError("the loop of constants could not mount; its message is above")
    with site.unmounting(place):
        yield place


@contextmanager
def as_it_is(path: Path) -> Iterator[Path]:
    """A directory that needs no mount."""
    yield path


def compile_loop(site: Site) -> Path | None:
    """The program of constants.c, or None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    program = site.directory / "constants"
    if not program.exists():
        run(compiler, "-O2", "-Wall", "-o", program, Path(__file__).with_name("constants.c"))
    return program


def fill(tree: Tree, root: Path) -> Path:
    """Make the tree with empty files below `root`."""
    for name in (*tree.directory_names, WARM_DIRECTORY):
        (root / name).mkdir(parents=True)
    for name in (*tree.file_names, *tree.warm_names):
        os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY, 0o644))
    return root


def for_tree(site: Site, tree: Tree, note: Callable[[str], None]) -> list[Contender]:
    """Every contender that this machine has, each with the tree. `note` hears of those that are missing."""
    image = make_image(site.directory / f"{tree.name}.img", tree_paths(tree))
    source = fill(tree, site.directory / f"{tree.name}.files")
    found = [
        Contender(OURS, lambda: mount_ours(site, image)),
        Contender(RELAYED, lambda: mount_ours(site, image, "fastpath=off")),
        Contender(TMPFS, lambda: as_it_is(source)),
    ]
    if shutil.which("bindfs"):
        found.append(Contender(BINDFS, lambda: mount_bindfs(site, source)))
    else:
        note(NO_BINDFS)
    program = compile_loop(site)
    if program is not None:
        like = answers(site, image)
        found.append(Contender(LOOP, lambda: mount_loop(site, program, tree, like)))
    else:
        note(NO_COMPILER)
    return found


def in_turn(contenders: list[Contender], sample: int) -> list[Contender]:
    """The contenders in another order for each sample, so that none always comes after the same one."""
    shift = sample % len(contenders)
    turned = contenders[shift:] + contenders[:shift]
    return turned[::-1] if sample % 2 else turned
