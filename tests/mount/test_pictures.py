# SPDX-License-Identifier: Apache-2.0
"""scripts/pictures draws every picture of the documents, and they need nothing from elsewhere."""

import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness import succeed

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"

pytestmark = pytest.mark.skipif(not os.environ.get("FAMFS_TEST_LONG"), reason="takes half a minute: with --long only")


@pytest.mark.timeout(300)
def test_pictures(tmp_path: Path) -> None:
    succeed(ROOT / "scripts/pictures", tmp_path, timeout=240)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in IMAGES.iterdir()}
    for folder in (tmp_path, IMAGES):
        for path in folder.glob("*.svg"):
            ElementTree.parse(path)
            assert "url(http" not in path.read_text()
