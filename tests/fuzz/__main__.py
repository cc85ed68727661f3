# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.fuzz NAME…` fuzzes at length, or runs one case again."""

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from tests.fuzz.control import Control
from tests.fuzz.images import Images
from tests.fuzz.init import Init
from tests.fuzz.relayed import Relayed
from tests.fuzz.runner import Fuzzer, case_rng, run
from tests.fuzz.wire import Wire

FUZZERS: dict[str, Callable[[], Fuzzer]] = {
    "images": Images,
    "wire": Wire,
    "relayed": Relayed,
    "init": Init,
    "control": Control,
}


def main() -> int:
    """Runs what the command line names; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random and hostile input, at length.")
    parser.add_argument("name", nargs="+", choices=sorted(FUZZERS))
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each")
    parser.add_argument("--cases", type=int, default=0, help="so many, however long it takes")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="this one alone, in this process")
    given = parser.parse_args()
    found = 0
    for name in given.name:
        if given.case is not None:
            fuzzer = FUZZERS[name]()
            start = time.monotonic()
            print(dict(fuzzer.case(case_rng(name, given.seed, given.case))), f"{time.monotonic() - start:.2f} s")
            fuzzer.close()
            continue
        summary = run(
            name,
            FUZZERS[name],
            given.seed,
            seconds=given.seconds,
            cases=given.cases,
            processes=given.processes,
        )
        print(summary, flush=True)
        for finding in summary.findings:
            print(finding)
        found += len(summary.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
