# SPDX-License-Identifier: Apache-2.0
"""Everything that reads what others have written, with random and hostile input for a while.

What is found here gets a test of its own in the unit tier. `python -m tests.fuzz` runs longer.
"""

import os
import secrets

import pytest

from tests.fuzz.__main__ import FUZZERS
from tests.fuzz.runner import run

LONG = bool(os.environ.get("FAMFS_TEST_LONG"))
PROCESSES = 2
SECONDS = {"images": 30, "wire": 30, "relayed": 14, "init": 5, "control": 10}
"""Of each of the processes."""
LONG_SECONDS = 250
LEAST = {"images": 200, "wire": 20_000, "relayed": 600, "init": 2_000, "control": 200}
"""What a slow machine does of it at least: fewer would mean that the fuzzer fuzzes nothing."""
COUNTED = {
    "images": "images",
    "wire": "messages",
    "relayed": "messages",
    "init": "negotiations",
    "control": "connections",
}

pytestmark = pytest.mark.timeout(2 * LONG_SECONDS if LONG else 90)


@pytest.mark.parametrize("name", FUZZERS)
def test_fuzz(name: str) -> None:
    if name == "relayed" and os.geteuid():
        pytest.skip("needs root: messages to libfuse need large socket buffers")
    seed = int(os.environ.get("FAMFS_TEST_SEED") or secrets.randbits(32))
    seconds = LONG_SECONDS if LONG else SECONDS[name]
    summary = run(name, FUZZERS[name], seed, seconds=seconds, processes=PROCESSES)
    print(summary)
    assert not summary.findings, "\n".join(summary.findings)
    assert summary.counts[COUNTED[name]] >= LEAST[name]
