# SPDX-License-Identifier: Apache-2.0
"""`famfs mkdir`: log new directories."""

import click

from famfs_server.cli import program
from famfs_server.cli.attributes import Ownership, ownership_options
from famfs_server.cli.target import Place, Targets, Unmounted, daxdev_option
from famfs_server.errors import ExistsError, NotADirectoryPathError

DEFAULT_MODE = 0o755
"""The umask does not apply to it (format 8)."""


@program.tool("mkdir")
@click.option("-p", "--parents", is_flag=True, help="Make parents as well; a directory that exists is no error.")
@ownership_options
@click.option("-v", "--verbose", count=True, help="Name each directory made.")
@daxdev_option
@click.argument("directory", nargs=-1, required=True)
def command(
    *,
    directory: tuple[str, ...],
    parents: bool,
    mode: int | None,
    uid: int | None,
    gid: int | None,
    verbose: int,
    daxdev: Unmounted | None,
) -> None:
    """Make each DIRECTORY. Its mode is 755 unless -m says another one; the umask does not matter."""
    owner = Ownership.of(uid, gid)
    with Targets(daxdev, write=True) as targets:
        for place in [targets.find(name) for name in directory]:
            for made in make_directory(place, DEFAULT_MODE if mode is None else mode, owner, parents=parents):
                if verbose:
                    click.echo(f"created directory {made.path.decode(errors='surrogateescape')}")


def make_directory(place: Place, mode: int, owner: Ownership, *, parents: bool) -> list[Place]:
    """Make the directory at `place`; with `parents` also those above, and none that exists. What was made."""
    made = []
    components = place.path.split(b"/") if place.path else []
    first = 1 if parents else len(components)
    if not components and not parents:
        raise ExistsError(f"{place.name}: exists already")
    for depth in range(first, len(components) + 1):
        here = Place(place.target, b"/".join(components[:depth]), place.name)
        found = here.status() if parents else None
        if found is not None and not found.is_directory:
            raise NotADirectoryPathError(f"{here.name}: {here.path.decode(errors='replace')} is not a directory")
        if found is None:
            here.target.mkdir(here.path, mode, owner.uid, owner.gid)
            made.append(here)
    return made
