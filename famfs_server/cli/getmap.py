# SPDX-License-Identifier: Apache-2.0
"""`famfs getmap`: show on which devices, and where there, the bytes of files lie."""

import json
from typing import Any

import click

from famfs_server.cli import program
from famfs_server.cli.target import Place, Targets, Unmounted, daxdev_option
from famfs_server.errors import NoSuchPathError


@program.tool("getmap")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit status says whether these are famfs files.")
@click.option("-c", "--continue", "go_on", is_flag=True, hidden=True)
@daxdev_option
@click.argument("file", nargs=-1, required=True)
def command(*, file: tuple[str, ...], as_json: bool, quiet: bool, go_on: bool, daxdev: Unmounted | None) -> None:
    """Show the extents of each FILE, as the log has them. Works on every kernel."""
    with Targets(daxdev, write=False) as targets:
        maps = [_map_of(targets.find(name)) for name in file]
    if quiet:
        return
    if as_json:
        click.echo(json.dumps(maps, indent=2))
        return
    for found in maps:
        striped = found["chunk_size"]
        kind = f"{len(found['extents'])} strips in chunks of {striped}" if striped else "simple"
        click.echo(f"{found['file']}: {found['size']} bytes, {kind}")
        for number, extent in enumerate(found["extents"]):
            place = f"device {extent['device']} offset {extent['offset']:#x} length {extent['length']:#x}"
            click.echo(f"  {'strip' if striped else 'extent'} {number}: {place}")


def _map_of(place: Place) -> dict[str, Any]:
    found = place.require_file()
    volume = place.target.volume()
    nodeid = volume.namespace.resolve(place.path)
    if not nodeid:
        raise NoSuchPathError(f"{place.name}: is not in the log (yet), so it has no extents")
    fmap = volume.namespace.fmap(nodeid)
    return {
        "file": place.name,
        "size": found.size,
        "chunk_size": fmap.chunk_size,
        "extents": [
            {"device": extent.device, "offset": extent.offset, "length": extent.length} for extent in fmap.extents
        ],
    }
