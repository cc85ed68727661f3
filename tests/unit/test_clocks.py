# SPDX-License-Identifier: Apache-2.0
"""Nothing waits, gives up or measures by the clock on the wall, which administrators and NTP set as they like."""

import ast
from pathlib import Path

import famfs_server

PACKAGE = Path(famfs_server.__file__).parent

WALL = {
    "time",
    "time_ns",
    "localtime",
    "gmtime",
    "ctime",
    "now",
    "utcnow",
    "today",
    "clock_gettime",
    "clock_gettime_ns",
}
"""Functions of `time` and `datetime` that read that clock."""

ALLOWED = {
    "cli/archive.py",  # times of members
    "cli/fsck.py",  # part of a name
    "cli/status.py",  # shows when something was
    "daemon/status.py",  # says when the figures were taken
    "fuse/filesystem.py",  # times of files
}


def wall_clock_calls(source: str) -> list[int]:
    """The lines on which the clock on the wall is read."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in WALL
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("time", "datetime", "date")
    ]


def test_only_what_is_shown_or_stored_comes_from_the_clock_on_the_wall() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if wall_clock_calls(path.read_text())}
    assert found == ALLOWED


def test_none_is_imported_by_name() -> None:
    """Which would hide it from the test above."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                assert not WALL & {name.name for name in node.names}, path


def test_a_clock_that_is_read_is_noticed() -> None:
    assert wall_clock_calls("import time\nuntil = time.monotonic() + 5\nnow = time.time()\n") == [3]
