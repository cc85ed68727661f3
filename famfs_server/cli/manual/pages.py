# SPDX-License-Identifier: Apache-2.0
"""Man pages in roff: those of the programs from the table, the overviews from texts beside this module."""

import re
import textwrap
from collections.abc import Iterator
from importlib import resources

from famfs_server import __version__
from famfs_server.cli.manual import model
from famfs_server.cli.manual.examples import EXAMPLES
from famfs_server.cli.manual.model import Tool

_MOUNT_STATUS = (
    ("0", "success"),
    ("1", "usage, or a permission is missing"),
    ("2", "an error of the system"),
    ("8", "interrupted"),
    ("32", "the mount or unmount failed; nothing is left mounted half"),
)
_STATUS: dict[str, tuple[tuple[str, str], ...]] = {
    "mkfs.famfs": (("0", "success"), ("1", "usage, or not root"), ("2", "everything else that failed")),
    "mount.famfs": _MOUNT_STATUS,
    "umount.famfs": _MOUNT_STATUS,
    "famfs-server": _MOUNT_STATUS,
    "famfs_fused": _MOUNT_STATUS,
    "fsck.famfs": (
        ("0", "no errors"),
        ("1", "errors were corrected"),
        ("4", "errors are left; may come together with 1"),
        ("8", "the file system could not be examined"),
        ("16", "usage"),
        ("32", "interrupted"),
    ),
}
_OTHER_STATUS = (
    ("0", "success"),
    ("1", "failure"),
    ("2", "usage"),
    ("3", "there is no such command"),
    ("other", "a count of failures, at most 127, or the number of an error such as 16 for a device in use"),
)
_ENVIRONMENT = (
    ("FAMFS_SYSTEM_UUID_FILE", "The file with this host's UUID, instead of /opt/famfs/system_uuid."),
    ("FAMFS_RUN_DIR", "The directory for run-time files, instead of /run/famfs."),
    ("FAMFS_MODE", "Only fuse, or nothing: this server mounts through FUSE."),
)
_FILES = (
    ("/opt/famfs/system_uuid", "This host's UUID, which decides who is the master of a file system."),
    ("/run/famfs/*/sock", "The control socket of a mount."),
    ("/run/famfs/*/stacks", "What SIGUSR1 made the daemon write down."),
    ("/var/lib/famfs", "Bytes that fsck changed."),
)
_SPECIAL_SECTIONS = {"famfs.5": 5, "famfs.7": 7}


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    found = {f"{tool.page}.8": page(tool) for tool in (*model.programs(), *model.subcommands())}
    for name, section in _SPECIAL_SECTIONS.items():
        text = (resources.files(__package__) / "text" / f"{name}.roff").read_text(encoding="utf-8")
        found[name] = _head("famfs", section) + text
    return found


def page(tool: Tool) -> str:
    """The page of one program or subcommand."""
    return "".join(f"{line}\n" for line in _page(tool))


def _page(tool: Tool) -> Iterator[str]:
    yield _head(tool.page, 8).rstrip("\n")
    yield ".SH NAME"
    yield f"{_text(tool.page)} \\- {_text(tool.summary[0].lower() + tool.summary[1:])}"
    yield ".SH SYNOPSIS"
    yield f".B {_text(tool.name)}"
    words = [*(["[OPTIONS]"] if tool.shown else []), *tool.arguments]
    if tool.name == "famfs":
        words = ["[OPTIONS]", "COMMAND", "[ARGUMENTS]"]
    if words:
        yield _text(" ".join(words))
    yield ".SH DESCRIPTION"
    for number, paragraph in enumerate(re.split(r"\n\s*\n", tool.description)):
        if number:
            yield ".PP"
        yield from _lines(paragraph)
    if tool.name == "famfs":
        yield ".SH COMMANDS"
        for command in model.subcommands():
            yield ".TP"
            yield f".BR {_text(command.page)} (8)"
            yield from _lines(command.summary + ".")
    yield ".SH OPTIONS"
    for option in tool.shown:
        yield ".TP"
        value = f" \\fI{_text(option.value)}\\fR" if option.value else ""
        yield ", ".join(f"\\fB{_text(name)}\\fR" for name in option.names) + value
        yield from _lines(option.help or "See above.")
    program = tool.name if tool.name in _STATUS else "famfs"
    yield from _table("EXIT STATUS", _STATUS.get(program, _OTHER_STATUS))
    yield from _table("ENVIRONMENT", _ENVIRONMENT)
    yield from _table("FILES", _FILES)
    if examples := examples_of(tool.name):
        yield from _table("EXAMPLES", examples)
    yield ".SH SEE ALSO"
    others = ["famfs.5", "famfs.7", "famfs.8", "mount.famfs.8", "mkfs.famfs.8", "fsck.famfs.8"]
    names = [name.rpartition(".") for name in others if name != f"{tool.page}.8"]
    for number, (name, _, section) in enumerate(names):
        yield f".BR {_text(name)} ({section}){',' if number < len(names) - 1 else ''}"


def examples_of(name: str) -> tuple[tuple[str, str], ...]:
    """What is typed, and what it does."""
    return EXAMPLES.get(name) or EXAMPLES.get(name.removeprefix("famfs "), ())


def _head(name: str, section: int) -> str:
    return (
        '.\\" Made from the table of commands; see famfs_server/cli/manual.\n'
        f'.TH {_text(name).upper()} {section} "" "famfs-server {__version__}" "famfs"\n'
        ".nh\n.ad l\n"
    )


def _table(title: str, rows: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield f".SH {title}"
    for name, meaning in rows:
        yield ".TP"
        yield f"\\fB{_text(name)}\\fR"
        yield from _lines(meaning)


def _lines(paragraph: str) -> Iterator[str]:
    """A paragraph as lines that roff takes for text."""
    for line in textwrap.wrap(" ".join(paragraph.split()), 72):
        text = _text(line)
        yield f"\\&{text}" if text[:1] in (".", "'") else text


_ESCAPES = {"\\": "\\e", "-": "\\-", "…": "...", "`": "\\(ga", "'": "\\(aq"}


def _text(words: str) -> str:
    """Words with roff's own characters escaped."""
    return "".join(_ESCAPES.get(char, char) for char in words)
