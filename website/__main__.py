# SPDX-License-Identifier: Apache-2.0
"""`python -m website DIRECTORY`: every document and man page as a page, with nothing fetched from anywhere."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from famfs_server import __version__
from famfs_server.cli.manual.pages import pages
from website.documents import Heading, html, parse, sections

ROOT = Path(__file__).resolve().parents[1]
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def build(directory: Path) -> None:
    """Make the site. Raises FileNotFoundError where mandoc is not installed."""
    directory.mkdir(parents=True, exist_ok=True)
    for folder in ("images", "schemas"):
        shutil.copytree(ROOT / "docs" / folder, directory / folder, dirs_exist_ok=True)
    listing = "".join(
        f'<li><a href="{path.name}">{path.name}</a></li>' for path in sorted(directory.glob("schemas/*.json"))
    )
    _write(
        directory, "schemas/index.html", "Schemas", f"<h1>Schemas of what --json prints</h1><ul>{listing}</ul>", "../"
    )
    shutil.copy(Path(__file__).parent / "style.css", directory)

    sources = {"index": ROOT / "README.md", **{path.stem: path for path in sorted(ROOT.glob("docs/*.md"))}}
    parsed = {name: parse(path.read_text(encoding="utf-8")) for name, path in sources.items()}
    numbers = {name: sections(headings) for name, (_, headings) in parsed.items()}
    manuals = {f"{name}.html": text for name, text in pages().items()}
    for name, (tokens, headings) in parsed.items():
        body = _references(html(tokens), name, numbers)
        _write(directory, f"{name}.html", headings[0].words, _contents(headings) + _manual_references(body, manuals))
    for name, text in manuals.items():
        done = subprocess.run(
            ["mandoc", "-T", "html", "-O", "fragment"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        title = name.removesuffix(".html")
        _write(directory, name, title, _manual_references(done.stdout, manuals))
    rows = "".join(
        f'<tr><td><a href="{name}">{name[:-7]}({name[-6]})</a></td><td>{escape(_summary(text))}</td></tr>'
        for name, text in sorted(manuals.items())
    )
    _write(directory, "man.html", "Man pages", f"<h1>Man pages</h1><table>{rows}</table>")


def _write(directory: Path, name: str, title: str, body: str, up: str = "") -> None:
    text = PAGE.substitute(title=escape(title), body=body, up=up, version=__version__)
    (directory / name).write_text(text, encoding="utf-8")


def _summary(roff: str) -> str:
    found = re.search(r"^\.SH NAME\n.* \\- (.*)$", roff, re.M)
    assert found is not None
    return re.sub(r"\\f.|\\&", "", found[1]).replace("\\-", "-")


def _contents(headings: list[Heading]) -> str:
    entries = [heading for heading in headings if heading.level == 2]
    if len(entries) < 4:
        return ""
    lines = "".join(f'<li><a href="#{heading.anchor}">{escape(heading.words)}</a></li>' for heading in entries)
    return f'<nav class="contents"><ul>{lines}</ul></nav>'


def _references(body: str, name: str, numbers: dict[str, dict[str, str]]) -> str:
    """Links for what the documents say in words: `docs/format.md 5.2`, `design 4`, `section 3`."""

    def link(match: re.Match[str]) -> str:
        document = match["file"] or match["document"] or name
        target = f"{document}.html"
        if match["number"]:
            anchor = numbers.get(document, {}).get(match["number"])
            if anchor is None:
                return match[0]
            target += f"#{anchor}"
        elif document not in numbers:
            return match[0]
        return f'<a href="{target}">{match[0]}</a>'

    known = "|".join(sorted(numbers))
    pattern = re.compile(
        rf"(?:\bdocs/(?P<file>[\w-]+)\.md(?: (?=\d))?|\b(?P<document>{known}) (?=\d)|\bsection (?=\d))"
        r"(?P<number>(?:\d+(?:\.\d+)*)?)"
    )
    return _outside(body, lambda text: pattern.sub(link, text))


def _manual_references(body: str, manuals: dict[str, str]) -> str:
    """Links for famfs(8) and the like, also where the name is in bold letters."""

    def link(match: re.Match[str]) -> str:
        page = f"{match['name'].replace(chr(0x2010), '-')}.{match['section']}.html"
        return f'<a href="{page}">{match[0]}</a>' if page in manuals else match[0]

    body = re.sub(r"<b>(?P<name>[\w.\-]+)</b>\s*\((?P<section>\d)\)", link, body)
    return _outside(body, lambda text: re.sub(r"(?P<name>[a-z_][\w.\-]*)\((?P<section>\d)\)", link, text))


def _outside(body: str, change: Callable[[str], str]) -> str:
    """Apply `change` to text that is neither markup, nor in a link, a heading or a block of code."""
    parts = re.split(r"(<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>|<[^>]+>)", body, flags=re.S)
    return "".join(part if part.startswith("<") else change(part) for part in parts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m website DIRECTORY")
    build(Path(sys.argv[1]))
