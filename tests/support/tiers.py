# SPDX-License-Identifier: Apache-2.0
"""Runs the tiers of tests one after the other and sums them up; `scripts/test` is the way in.

A tier is a folder of tests with a time limit of its own (`lint` is three checkers instead). A tier that
fails, runs out of time or collects nothing makes the run fail; the others still run.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import real_device

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# Seconds, for two slow cores; together they stay below 45 minutes.
LIMITS = {"lint": 90, "unit": 240, "twin": 300, "mount": 900, "fuzz": 120, "vm": 480, "fmap": 900, "dax": 900}
LONG_FACTOR = 10

# Never run unless named: it destroys what is on the device that FAMFS_TEST_DAX names.
DANGEROUS = "dax"

# What scripts/vm-test ends with where a tier cannot run, for a reason that lies outside of this checkout.
UNAVAILABLE = 77

# An interrupted pytest still tears its fixtures down (unmounts, ends daemons); it gets this long.
GRACE = 20


@dataclass
class Result:
    """What a tier came to."""

    tier: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def run(command: list[str], limit: float, environment: dict[str, str]) -> int | None:
    """Runs `command` in a process group of its own; its exit status, or None if `limit` seconds were over."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return None
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(GRACE)
        raise


def run_lint(limit: float, environment: dict[str, str]) -> Result:
    """Runs the checkers; each counts as one test."""
    result = Result("lint")
    deadline = time.monotonic() + limit
    for command in (
        ["ruff", "check", "--quiet", "."],
        ["ruff", "format", "--quiet", "--check", "."],
        ["mypy", "--strict", "famfs_server"],
    ):
        status = run([str(BIN / command[0]), *command[1:]], deadline - time.monotonic(), environment)
        if status == 0:
            result.passed += 1
        else:
            result.failed += 1
            result.notes.append(f"FAILED {' '.join(command)}" + (" (out of time)" if status is None else ""))
    return result


def cases(report: Path) -> Iterator[tuple[str, str, str]]:
    """Each test of a JUnit report: its name, `passed`, `failed` or `skipped`, and the reason of a skip."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            yield name, "failed", ""
        elif skip is not None:
            yield name, "skipped", skip.get("message") or "no reason given"
        else:
            yield name, "passed", ""


def outcomes_of(results: Path) -> dict[str, tuple[str, str]]:
    """What came of each test, with the reason of a skip, by all reports below a folder. Guests that run one test
    together report it each: the worse outcome counts.
    """
    order = ["skipped", "passed", "failed"]
    found: dict[str, tuple[str, str]] = {}
    for report in sorted(results.rglob("junit*.xml")):
        prefix = f"{report.parent.name} " if report.parent != results else ""
        for name, outcome, reason in cases(report):
            name = prefix + name
            if name not in found or order.index(outcome) > order.index(found[name][0]):
                found[name] = outcome, reason
    return found


def run_pytest(tier: str, limit: float, environment: dict[str, str], seed: int, *, everything: bool) -> Result:
    """Runs the tests in the folder of `tier`. `everything` is for the vm tier: all kernels and modes."""
    result = Result(tier)
    with tempfile.TemporaryDirectory(prefix="famfs-test-") as directory:
        options = ["-q", "-rsf"]
        if tier in ("vm", "fmap"):
            # Several runs, each with a folder of its own in the results.
            more = ["--all"] if everything and tier == "vm" else ["--tier", tier]
            guests = ["scripts/vm-test", *more, "--timeout", f"{limit - GRACE:.0f}", "--results", directory, "--"]
            status = run([*guests, *options], limit, environment)
        else:
            report = Path(directory) / "junit.xml"
            folder = ["tests/vm", "--ignore=tests/vm/hosts"] if tier == DANGEROUS else [f"tests/{tier}"]
            tests = [*folder, *options, f"--hypothesis-seed={seed}", f"--junitxml={report}"]
            status = run([sys.executable, "-m", "pytest", *tests], limit, environment)
        outcomes = outcomes_of(Path(directory))
        unavailable = Path(directory) / "unavailable"
        if status == UNAVAILABLE and unavailable.exists():
            result.skipped = 1
            result.notes.append(f"SKIPPED the whole tier: {unavailable.read_text()}")
            return result
    skips: dict[str, list[str]] = {}
    for name, (outcome, reason) in outcomes.items():
        setattr(result, outcome, getattr(result, outcome) + 1)
        if outcome == "failed":
            result.notes.append(f"FAILED {name}")
        elif outcome == "skipped":
            skips.setdefault(reason, []).append(name)
    result.notes += [
        f"SKIPPED {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") + f": {reason}"
        for reason, names in skips.items()
    ]
    if status is None:
        result.failed += 1
        result.notes.append(f"FAILED out of time after {limit:.0f} s")
    elif status == 5:
        result.failed += 1
        result.notes.append("FAILED no tests were collected")
    elif status != 0 and result.failed == 0:
        result.failed += 1
        result.notes.append(f"FAILED pytest ended with status {status}")
    return result


def existing_tiers() -> list[str]:
    """The tiers that have tests in this checkout, in the order in which they run."""
    return [tier for tier in LIMITS if tier in ("lint", "dax") or any((ROOT / "tests" / tier).rglob("test_*.py"))]


def main() -> int:
    """Runs the tiers named on the command line; 0 when nothing failed."""
    tiers = existing_tiers()
    parser = argparse.ArgumentParser(prog="scripts/test", description="Run the tests.")
    parser.add_argument("--long", action="store_true", help="random tests try many more cases")
    parser.add_argument("--all", action="store_true", help="tier vm: every kernel of a guest and every mode")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="repeat a random run")
    parser.add_argument("tier", nargs="*", help=f"of: {', '.join(tiers)} (default: all but {DANGEROUS})")
    arguments = parser.parse_args()
    for tier in arguments.tier:
        if tier not in tiers:
            parser.error(f"no tier {tier} here; there are: {', '.join(tiers)}")
    environment = dict(os.environ, FAMFS_TEST_SEED=str(arguments.seed))
    if arguments.long:
        environment["FAMFS_TEST_LONG"] = "1"
    if DANGEROUS in arguments.tier:
        try:
            real_device.consent(environment)
        except real_device.RefusedError as error:
            print(f"scripts/test: {error}", file=sys.stderr)
            return 2

    print(f"seed {arguments.seed} (repeat with --seed)", flush=True)
    results = []
    for tier in arguments.tier or [tier for tier in tiers if tier != DANGEROUS]:
        print(f"=== {tier}", flush=True)
        limit = LIMITS[tier] * (LONG_FACTOR if arguments.long or (arguments.all and tier == "vm") else 1)
        start = time.monotonic()
        if tier == "lint":
            result = run_lint(limit, environment)
        else:
            result = run_pytest(tier, limit, environment, arguments.seed, everything=arguments.all)
        result.seconds = time.monotonic() - start
        results.append(result)

    print("=== summary")
    for result in results:
        counts = f"{result.passed:5} passed {result.failed:4} failed {result.skipped:4} skipped"
        print(f"{result.tier:6} {counts} {result.seconds:7.1f} s")
        for note in result.notes:
            print(f"       {note}")
    passed, failed, skipped = (sum(getattr(r, key) for r in results) for key in ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
