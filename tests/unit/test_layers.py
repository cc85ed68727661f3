# SPDX-License-Identifier: Apache-2.0
"""Imports go downwards only, and the lower rooms know nothing of the kernel interface above them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import famfs_server

PACKAGE = Path(famfs_server.__file__).parent

# A room may import rooms of a smaller number, its own modules, and the leaves.
LEVEL = {"cli": 5, "daemon": 4, "fuse": 3, "volume": 2, "omf": 1, "dax": 1}
LEAVES = frozenset({"errors", "privileges", "seeded", "sizes"})

# These import nothing of the package but the errors.
ONLY_ERRORS = frozenset({"omf", "dax"}) | LEAVES

# Another kernel interface must fit beside `fuse`, so nothing of this kind reaches below it.
FOREIGN = frozenset({"pyfuse3", "trio", "prctl", "click", "rich"})
WITHOUT_FOREIGN = frozenset({"omf", "volume", "dax"})


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The full names of everything that the text of `module` imports, at any depth in its code."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `module` (such as `famfs_server.omf.log`) imports and must not."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    found = []
    for name in imports(source, module, is_package):
        top, _, rest = name.partition(".")
        if top in FOREIGN and room in WITHOUT_FOREIGN:
            found.append(name)
        if top != "famfs_server":
            continue
        target = rest.split(".")[0]
        if target in LEVEL:
            allowed = target == room or (room in LEVEL and room not in ONLY_ERRORS and LEVEL[target] < LEVEL[room])
        elif target in LEAVES:
            allowed = target == "errors" or (room in LEVEL and room not in ONLY_ERRORS)
        else:
            allowed = True  # a name of the package itself, such as __version__
        if not allowed:
            found.append(name)
    return found


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, with its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_go_downwards(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_room_has_a_level() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= LEVEL.keys()
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} <= LEAVES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("famfs_server.omf.log", "import famfs_server.volume.replay"),
        ("famfs_server.omf.log", "from famfs_server.dax.memory import Memory"),
        ("famfs_server.omf.log", "from ..dax import memory"),
        ("famfs_server.omf.log", "from famfs_server import seeded"),
        ("famfs_server.dax.device", "from famfs_server import privileges"),
        ("famfs_server.dax.device", "def late():\n    import trio"),
        ("famfs_server.volume.volume", "from pyfuse3 import Operations"),
        ("famfs_server.volume.volume", "from ..fuse.abi import Opcode"),
        ("famfs_server.fuse.channel", "from famfs_server.daemon import state"),
        ("famfs_server.daemon.state", "import famfs_server.cli.famfs"),
        ("famfs_server.errors", "from famfs_server.omf import layout"),
        ("famfs_server.seeded", "from famfs_server.privileges import drop"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("famfs_server.omf.log", "from famfs_server.errors import MediaError\nfrom .layout import ENTRY"),
        ("famfs_server.volume.volume", "from famfs_server.omf import log\nimport famfs_server.dax.memory"),
        ("famfs_server.fuse.channel", "import trio\nfrom famfs_server.volume.volume import Volume"),
        ("famfs_server.cli.famfs", "import click\nfrom famfs_server import __version__, privileges, seeded"),
        ("famfs_server.seeded", "import numpy\nfrom famfs_server.errors import FamfsError"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
