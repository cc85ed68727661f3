# SPDX-License-Identifier: Apache-2.0
"""scripts/package wheel: the source archive is complete enough to build the wheel, which has all that is no Python."""

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from famfs_server import __version__
from famfs_server.cli.commands import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(250)
def test_source_archive_and_the_wheel_made_of_it() -> None:
    done = subprocess.run([ROOT / "scripts/package", "wheel"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (ROOT / "dist").glob(f"famfs_server-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        programs = archive.read(f"famfs_server-{__version__}.dist-info/entry_points.txt").decode()
    for extension in ("dax/_cacheline", "volume/_names"):
        assert [name for name in names if re.fullmatch(rf"famfs_server/{extension}\.\S+\.so", name)]
    beside = [*ROOT.glob("famfs_server/systemd/*"), *ROOT.glob("famfs_server/**/*.roff")]
    assert len(beside) == 7
    assert {str(path.relative_to(ROOT)) for path in (*beside, *ROOT.glob("famfs_server/**/*.py"))} <= names
    assert {line.split(" = ")[0] for line in programs.splitlines() if " = " in line} == {*PROGRAMS, "famfs-unit"}
    with tarfile.open(ROOT / f"dist/famfs_server-{__version__}.tar.gz") as archive_of_sources:
        inside = {name.partition("/")[2] for name in archive_of_sources.getnames()}
    assert {"scripts/setup", "scripts/install", "docs/design.md", "debian/control", "tests/conftest.py"} <= inside
