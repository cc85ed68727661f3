# SPDX-License-Identifier: Apache-2.0
"""Drawing the map of a file system: as text for a terminal, as SVG, and as PNG made of the SVG."""

import shutil
import subprocess
from collections.abc import Iterator
from itertools import groupby
from xml.sax.saxutils import escape

from rich.text import Text

from famfs_server.cli.regions import KINDS, Kind, Map, Region
from famfs_server.errors import FamfsError
from famfs_server.sizes import human_size

_LARGEST_ROWS = 16
_MARGIN, _LABEL, _WIDTH, _ROW, _GAP = 24, 92, 1000, 22, 6
_FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"
_NARROWEST = 4.0
"""Pixels from which on a region gets an outline and its name as a tooltip."""
_MOST_OUTLINES = 2000
_BRIGHT = (Kind.FREE, Kind.SMALL, Kind.STRIPED)
"""Kinds whose colour needs dark letters."""


class PictureError(FamfsError):
    """A picture cannot be made here."""


def rows_of(size: int) -> int:
    """In how many rows a device is drawn: one for each 4 GiB, at most 16."""
    return max(1, min(_LARGEST_ROWS, -(-size // (4 << 30))))


def terminal(found: Map, width: int) -> Iterator[Text]:
    """The map as lines of coloured letters that can be read without colours, too."""
    yield Text(found.title, style="bold")
    columns = max(width - 12, 20)
    for device, size in enumerate(found.sizes):
        rows = max(4, rows_of(size))
        kinds = found.dominant(device, rows * columns)
        if len(found.sizes) > 1:
            yield Text(f"device {device}: {human_size(size)}")
        for row in range(rows):
            line = Text(f"{human_size(size * row // rows):>9}  ")
            for kind, run in groupby(kinds[row * columns : (row + 1) * columns]):
                line.append(kind.letter * len(list(run)), _style(kind))
            yield line
    yield Text("")
    totals = found.totals()
    for kind in KINDS:
        if totals[kind] or kind is Kind.FREE:
            line = Text("  ").append(f" {kind.letter} ", _style(kind))
            yield line.append(f" {human_size(totals[kind]):>8}  {found.words(kind)}")


def _style(kind: Kind) -> str:
    return f"{'#222222' if kind in _BRIGHT else '#ffffff'} on {kind.colour}"


def svg(found: Map) -> str:
    """The map as an SVG picture: strips of the devices, the largest regions with their names as tooltips, a legend."""
    body: list[str] = []
    y = _MARGIN + 34
    for device, size in enumerate(found.sizes):
        rows = rows_of(size)
        if len(found.sizes) > 1:
            body.append(_text(_MARGIN, y + 4, f"device {device}, {human_size(size)}", 13))
            y += 18
        kinds = found.dominant(device, rows * _WIDTH)
        for row in range(rows):
            body.append(_text(_MARGIN + _LABEL - 10, y + 15, human_size(size * row // rows), 11, anchor="end"))
            x = _MARGIN + _LABEL
            for kind, run in groupby(kinds[row * _WIDTH : (row + 1) * _WIDTH]):
                length = len(list(run))
                body.append(f"<rect x='{x}' y='{y}' width='{length}' height='{_ROW}' fill='{kind.colour}'/>")
                x += length
            body += _outlines(found, device, size, row, rows, y)
            y += _ROW + _GAP
        y += 10
    totals = found.totals()
    x = _MARGIN
    for kind in KINDS:
        if totals[kind] or kind is Kind.FREE:
            words = f"{found.words(kind)}: {human_size(totals[kind])}"
            if x + 30 + 7 * len(words) > _MARGIN + _LABEL + _WIDTH:
                x, y = _MARGIN, y + 22
            body.append(f"<rect x='{x}' y='{y}' width='14' height='14' rx='2' fill='{kind.colour}' stroke='#888'/>")
            body.append(_text(x + 20, y + 12, words, 12))
            x += 36 + 7 * len(words)
    height = y + 14 + _MARGIN
    width = 2 * _MARGIN + _LABEL + _WIDTH
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>\n"
        f"<rect width='{width}' height='{height}' fill='white'/>\n" + _text(_MARGIN, _MARGIN + 12, found.title, 16)
    )
    return "\n".join((head, *body, "</svg>\n"))


def _outlines(found: Map, device: int, size: int, row: int, rows: int, y: int) -> Iterator[str]:
    """The regions of one row that are wide enough to be told apart."""
    first, last = size * row / rows, size * (row + 1) / rows
    scale = _WIDTH / (last - first)
    wide: list[tuple[float, float, Region]] = []
    for region in found.regions:
        start, end = max(region.start, first), min(region.end, last)
        if region.device == device and (end - start) * scale >= _NARROWEST:
            wide.append((start, end, region))
    for start, end, region in wide[:_MOST_OUTLINES]:
        x, width = _MARGIN + _LABEL + (start - first) * scale, (end - start) * scale
        tip = f"{region.name}: {region.start:#x} to {region.end:#x}, {human_size(region.end - region.start)}"
        yield (
            f"<rect x='{x:.1f}' y='{y}' width='{width:.1f}' height='{_ROW}' fill='transparent' stroke='white' "
            f"stroke-width='0.8'><title>{_clean(tip)}</title></rect>"
        )
        short = region.name.rpartition("/")[2]
        if len(short) * 6.2 + 6 < width:
            yield _text(x + 4, y + 15, short, 10, colour="#222" if region.kind in _BRIGHT else "white")


def _text(x: float, y: float, words: str, size: int, *, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f"<text x='{x:.1f}' y='{y}' {_FONT} font-size='{size}' text-anchor='{anchor}' fill='{colour}'>"
        f"{_clean(words)}</text>"
    )


def _clean(words: str) -> str:
    """Text from the media as XML may hold it."""
    return escape("".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in words))


def png(picture: str) -> bytes:
    """An SVG picture as PNG, by cairosvg or rsvg-convert. Raises PictureError where there is neither."""
    try:
        import cairosvg
    except (ImportError, OSError):
        program = shutil.which("rsvg-convert")
        if program is None:
            raise PictureError(
                "PNG needs the Python package cairosvg (pip install 'famfs-server[pictures]') or the program "
                "rsvg-convert; write an SVG file instead"
            ) from None
        done = subprocess.run([program, "-z", "2"], input=picture.encode(), capture_output=True, check=False)
        if done.returncode:
            raise PictureError(f"rsvg-convert fails: {done.stderr.decode(errors='replace')}") from None
        return done.stdout
    data: bytes = cairosvg.svg2png(bytestring=picture.encode(), scale=2)
    return data
