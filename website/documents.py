# SPDX-License-Identifier: Apache-2.0
"""Documents in Markdown as HTML: headings get anchors, and links to documents lead to their pages."""

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading: its level, its words, and its anchor, which is the one that GitHub gives it."""

    level: int
    words: str
    anchor: str


def parse(text: str) -> tuple[list[Token], list[Heading]]:
    """The tokens of a document, with anchors at its headings and without `.md` in its links; and those headings."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    headings: list[Heading] = []
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            words = "".join(child.content for child in tokens[number + 1].children or [])
            anchor = base = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            repeated = 0
            while anchor in (heading.anchor for heading in headings):
                repeated += 1
                anchor = f"{base}-{repeated}"
            token.attrSet("id", anchor)
            headings.append(Heading(int(token.tag[1]), words, anchor))
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("href", _place(str(child.attrGet("href"))))
            elif child.type == "image":
                child.attrSet("src", _place(str(child.attrGet("src"))))
    return tokens, headings


def html(tokens: list[Token]) -> str:
    """The body of a page."""
    markdown = MarkdownIt("commonmark")
    rendered: str = markdown.renderer.render(tokens, markdown.options, {})
    return rendered


def sections(headings: list[Heading]) -> dict[str, str]:
    """The anchors of the sections that have a number, by it."""
    found: dict[str, str] = {}
    for heading in headings:
        if number := re.match(r"(\d+(?:\.\d+)*)\.?\s", heading.words):
            found.setdefault(number[1], heading.anchor)
    return found


def _place(target: str) -> str:
    """Where something lies in the site: everything is in one folder, and folders have an index."""
    if "://" in target or target.startswith("#"):
        return target
    path, mark, anchor = target.partition("#")
    path = path.removeprefix("docs/").removeprefix("../")
    if path == "README.md":
        path = "index.html"
    elif path.endswith(".md"):
        path = f"{path.removesuffix('.md')}.html"
    elif "." not in path.rpartition("/")[2]:
        path = f"{path.rstrip('/')}/index.html"
    return path + mark + anchor
