# SPDX-License-Identifier: Apache-2.0
"""`famfs check`: does a mount show what its log says, and can its files be read?

The reference asks its kernel module about each file. Here nothing can come loose from the log but by a fault of the
server or the kernel, and this is how to look for one.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.cli.target import META, find_mount


@dataclass(slots=True)
class Tally:
    """What a check has found."""

    files: int = 0
    directories: int = 0
    not_logged_yet: int = 0
    """Files that a program on this host is making."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Paths, and what is wrong with them."""


@program.tool("check")
@click.option("-v", "--verbose", count=True, help="Name each file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path")
def command(*, path: str, verbose: int, as_json: bool) -> int:
    """Compare what a mount shows at PATH and below with the log, and read a byte of each file.

    Exit status 1 means that something differs.
    """
    from famfs_server.cli.mounted import MountedTarget

    mount, inside = find_mount(path)
    target = MountedTarget(mount)
    try:
        target.follow()
        tree = target.volume().namespace
        logged = {}
        for nodeid in tree.walk():
            name = tree.path(nodeid)
            if not inside or name == inside or name.startswith(inside + b"/"):
                logged[name] = None if tree.is_directory(nodeid) else tree.size[nodeid]
    finally:
        target.close()
    tally = Tally()
    seen = set()
    with progress("checking", len(logged), "files and directories") as bar:
        for name, shown in _walk(os.fsencode(os.path.realpath(path)), inside):
            seen.add(name)
            problem = _compare(shown, name in logged, logged.get(name), tally)
            if problem:
                tally.problems.append((os.fsdecode(name), problem))
            elif verbose and not as_json:
                click.echo(os.fsdecode(name))
            bar.advance(1)
    tally.problems += [(os.fsdecode(name), "is in the log, but not in the mount") for name in logged.keys() - seen]
    if as_json:
        rows = [{"path": name, "problem": problem} for name, problem in sorted(tally.problems)]
        counts = {"files": tally.files, "directories": tally.directories, "not_logged_yet": tally.not_logged_yet}
        click.echo(json.dumps({"path": path, **counts, "problems": rows}, indent=2))
    else:
        for row in sorted(tally.problems):
            program.warn(": ".join(row))
        click.echo(
            f"{path}: {tally.files} files and {tally.directories} directories checked, {tally.not_logged_yet} not "
            f"logged yet, {len(tally.problems)} wrong"
        )
    return 1 if tally.problems else 0


def _walk(top: bytes, inside: bytes) -> Iterator[tuple[bytes, os.DirEntry[bytes] | bytes]]:
    """Paths in the file system from `top` on, which is called `inside` there, without `.meta`."""
    if not os.path.isdir(top):
        yield inside, top
        return
    if inside:
        yield inside, top
    with os.scandir(top) as entries:
        rows = sorted(entries, key=lambda entry: entry.name)
    for entry in rows:
        name = inside + b"/" + entry.name if inside else entry.name
        if entry.is_dir(follow_symlinks=False):
            if name != META:
                yield from _walk(entry.path, name)
        else:
            yield name, entry


def _compare(shown: os.DirEntry[bytes] | bytes, known: bool, size: int | None, tally: Tally) -> str:
    """What is wrong with a path that the mount shows; empty: nothing."""
    path = shown if isinstance(shown, bytes) else shown.path
    try:
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            tally.directories += 1
            return "" if known and size is None else "is a directory, but not one of the log's"
        tally.files += 1
        if not known:
            tally.not_logged_yet += 1
            return ""
        if size != found.st_size:
            return f"has {found.st_size} bytes instead of {size}"
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pread(fd, 1, 0)
        finally:
            os.close(fd)
    except PermissionError:
        # Who may not read a file cannot say anything against it.
        return ""
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    return ""
