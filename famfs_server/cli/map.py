# SPDX-License-Identifier: Apache-2.0
"""`famfs map`: a picture of what lies where, of a whole file system or of one file."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from famfs_server.cli import program
from famfs_server.cli.target import Place, Targets, Unmounted, daxdev_option, names_device
from famfs_server.errors import NoSuchPathError, UsageError
from famfs_server.sizes import human_size

if TYPE_CHECKING:
    from famfs_server.cli.regions import Map
    from famfs_server.omf.log import Fmap

_PICTURES = (".svg", ".png")
_SHOWN_CHUNKS = 16
"""Chunks of a strip that are shown one by one."""


@program.tool("map")
@click.option("-o", "--output", metavar="FILE", help="Draw into FILE, whose name ends in .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print the regions as JSON.")
@daxdev_option
@click.argument("path")
def command(*, path: str, output: str | None, as_json: bool, daxdev: Unmounted | None) -> None:
    """Draw the device PATH, the file system mounted at PATH, or the place of the file PATH.

    Without --output as text: a letter and a colour stand for superblock, log, files by size, striped files, free space,
    and, in red, for space that faulty entries claim.
    """
    from famfs_server.cli import regions

    if output is not None and Path(output).suffix not in _PICTURES:
        raise UsageError(f"{output}: the name of a picture ends in {' or '.join(_PICTURES)}")
    if daxdev is None and names_device(path):
        path, daxdev = "/", Unmounted(path)
    with Targets(daxdev, write=False) as targets:
        place = targets.find(path)
        found = place.status()
        if found is None:
            raise NoSuchPathError(f"{place.name}: no such file")
        volume = place.target.volume()
        whole = regions.of_volume(volume, f"{daxdev.device if daxdev else path}: famfs {volume.superblock.uuid}")
        if found.is_directory:
            if place.path:
                raise UsageError(f"{path}: name the mount point, a device or a file")
            lines: list[str] = []
        else:
            fmap = volume.namespace.fmap(_nodeid(place))
            lines = list(describe(place.name, found.size, fmap))
            whole = only(whole, place, fmap)
    if as_json:
        click.echo(json.dumps(as_dict(whole), indent=2))
        return
    if output is not None:
        draw(whole, Path(output))
        return
    show(whole, lines)


def _nodeid(place: Place) -> int:
    nodeid = place.target.volume().namespace.resolve(place.path)
    if not nodeid:
        raise NoSuchPathError(f"{place.name}: is not in the log (yet), so it has no place")
    return nodeid


def only(whole: "Map", place: Place, fmap: "Fmap") -> "Map":
    """The map with nothing but metadata and one file on it, its extents or strips numbered."""
    from famfs_server.cli.regions import Kind

    word = "strip" if fmap.chunk_size else "extent"
    numbers = {(extent.device, extent.offset): number for number, extent in enumerate(fmap.extents)}
    kept = []
    for region in whole.regions:
        number = numbers.get((region.device, region.start))
        if region.kind in (Kind.SUPERBLOCK, Kind.LOG):
            kept.append(region)
        elif number is not None and region.kind is not Kind.PROBLEM:
            kept.append(replace(region, name=f"{word} {number}"))
    title = f"{place.name} on {whole.title}"
    return replace(whole, title=title, regions=tuple(kept), rest="other files, or free")


def describe(name: str, size: int, fmap: "Fmap") -> Iterator[str]:
    """How the bytes of one file lie: extent by extent, or which chunks fall to each strip."""
    if not fmap.chunk_size:
        yield f"{name}: {human_size(size)} in {len(fmap.extents)} extent{'s' if len(fmap.extents) > 1 else ''}"
        at = 0
        for extent in fmap.extents:
            end = min(at + extent.length, size)
            yield f"  bytes {at:#x} to {end:#x}: device {extent.device} at {extent.offset:#x}"
            at = end
        return
    strips, chunk = len(fmap.extents), fmap.chunk_size
    chunks = -(-size // chunk)
    yield f"{name}: {human_size(size)} in {chunks} chunks of {human_size(chunk)} over {strips} strips"
    for number, extent in enumerate(fmap.extents):
        mine = range(number, chunks, strips)
        shown = " ".join(str(index) for index in mine[:_SHOWN_CHUNKS])
        more = f" … {mine[-1]}" if len(mine) > _SHOWN_CHUNKS else ""
        yield f"  strip {number}: device {extent.device} at {extent.offset:#x}, chunks {shown}{more}"


def as_dict(found: "Map") -> dict[str, Any]:
    """The map, for JSON."""
    return {
        "title": found.title,
        "devices": [{"number": number, "size": size} for number, size in enumerate(found.sizes)],
        "totals": {kind.name.lower(): number for kind, number in found.totals().items()},
        "regions": [
            {
                "device": region.device,
                "start": region.start,
                "end": region.end,
                "kind": region.kind.name.lower(),
                "name": region.name,
            }
            for region in found.regions
        ],
    }


def draw(found: "Map", path: Path) -> None:
    """Write the picture."""
    from famfs_server.cli import drawing

    picture = drawing.svg(found)
    path.write_bytes(drawing.png(picture) if path.suffix == ".png" else picture.encode())


def show(found: "Map", lines: list[str]) -> None:
    """Print the picture, and the words on one file."""
    from rich.console import Console

    from famfs_server.cli import drawing

    console = Console(highlight=False)
    for text in drawing.terminal(found, console.width):
        console.print(text, no_wrap=True, crop=True)
    for line in lines:
        click.echo(line)
