# SPDX-License-Identifier: Apache-2.0
"""scripts/docs: a page for every document and man page, every link and anchor leads somewhere, nothing is fetched."""

import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from website import __main__ as website
from website.documents import parse, sections

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page refers to, what it loads, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "iframe")
        if anchor := values.get("id"):
            assert anchor not in self.anchors, anchor
            self.anchors.add(anchor)
        if tag == "a" and (target := values.get("href")):
            self.links.append(target)
        elif target := values.get("src") or values.get("href"):
            self.loaded.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("mandoc") is None:
        pytest.skip("needs mandoc")
    directory = tmp_path_factory.mktemp("site")
    website.build(directory)
    return directory


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    followed = 0
    for path, page in pages.items():
        for target in page.loaded:
            assert "://" not in target, f"{path.name} loads {target}"
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
        for target in page.links:
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            other = (path.parent / unquote(name)).resolve() if name else path
            assert other.is_file(), f"{path.name}: {target}"
            assert not anchor or unquote(anchor) in pages[other].anchors, f"{path.name}: {target}"
            followed += 1
    assert followed > 500


def test_there_is_a_page_for_everything(site: Path) -> None:
    names = {path.name for path in site.glob("*.html")}
    assert {f"{path.stem}.html" for path in ROOT.glob("docs/*.md")} | {"index.html", "man.html"} <= names
    assert {"famfs.5.html", "famfs.7.html", "famfs-server.8.html", "famfs-creat.8.html"} <= names
    assert 'href="famfs-creat.8.html"' in (site / "man.html").read_text()
    assert "url(" not in (site / "style.css").read_text()
    assert "@import" not in (site / "style.css").read_text()


def test_sections_that_are_named_are_links(site: Path) -> None:
    assert '<a href="design.html#8-surviving">docs/design.md 8</a>' in (site / "service.html").read_text()


def test_anchors_are_those_of_github() -> None:
    _, headings = parse("# 1. What `it` is\n\n## Same\n\n## Same\n\n### 1.4 A, b - c\n")
    assert [heading.anchor for heading in headings] == ["1-what-it-is", "same", "same-1", "14-a-b---c"]
    assert sections(headings) == {"1": "1-what-it-is", "1.4": "14-a-b---c"}
