# SPDX-License-Identifier: Apache-2.0
"""A short soak; `scripts/soak` runs longer ones."""

import os
import secrets
from pathlib import Path

import pytest

from harness import Site
from tests.soak.soak import LEAST, soak

SECONDS = 120 if os.environ.get("FAMFS_TEST_LONG") else 15


@pytest.mark.timeout(SECONDS + 120)
def test_three_hosts_whose_processes_are_killed(memory_folder: Path, site: Site) -> None:
    seed = int(os.environ.get("FAMFS_TEST_SEED") or secrets.randbits(32))
    summary = soak(site.directory / "soak", memory_folder / "device", SECONDS, seed)
    print(f"seed {seed}: {dict(summary.blows)}, {sum(summary.calls.values())} calls, {summary.files} files")
    assert not summary.problems, "\n".join(summary.problems)
    assert sum(summary.blows.values()) >= LEAST
    assert summary.calls["pread"] > 100
