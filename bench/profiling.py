# SPDX-License-Identifier: Apache-2.0
"""`--profile`: where the time of the request plane goes while a client uses it, or that of a replay."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import data, images
from bench.plan import Plan
from bench.trees import Tree

SUBJECTS = ("stat", "open", "scandir", "read", "write", "replay")


def show(plan: Plan, subject: str, console: Console) -> None:
    """Profile one subject and print functions and lines."""
    tree = Tree("profile", 1, 5_000 if plan.quick else 100_000)
    plan.say(f"profile: making the image for {subject}")
    if subject in ("read", "write"):
        image, _ = data.make_image(plan.site.directory / "profile.img")
    else:
        image = images.make_image(plan.site.directory / "profile.img", images.tree_paths(tree))
    plan.say(f"profile: {subject}")
    profile = _replay(plan, image) if subject == "replay" else _serve(plan, image, subject, tree)
    _print(subject, profile, console)


def _replay(plan: Plan, image: Path) -> dict[str, Any]:
    process = plan.site.start(sys.executable, "-m", "bench.profiled", "--replay", image)
    return _hear(process.communicate()[0])


def _serve(plan: Plan, image: Path, subject: str, tree: Tree) -> dict[str, Any]:
    place = plan.site.place("profiled")
    process = plan.site.start(sys.executable, "-m", "bench.profiled", image, place)
    assert process.stdout is not None
    process.stdout.readline()
    with plan.site.unmounting(place):
        action, job = _job(plan, subject, tree)
        client = plan.site.client(action, place, **job).wait_ready()
        process.send_signal(signal.SIGUSR1)
        client.go()
        client.result()
        process.send_signal(signal.SIGUSR2)
    return _hear(process.communicate()[0])


def _job(plan: Plan, subject: str, tree: Tree) -> tuple[str, dict[str, Any]]:
    """What the client does."""
    match subject:
        case "read" | "write":
            seconds = 0.2 if plan.quick else 3.0
            pattern = {"direction": subject, "order": "random", "block": data.BLOCKS["4 KiB"], "size": data.FILE_SIZE}
            return "data", {"file": data.FILE, "seconds": seconds, "mapped": None, **pattern}
        case "scandir":
            return subject, {"names": tree.directory_names * 10, "warm": tree.warm_names}
        case _:
            return subject, {"names": tree.file_names, "warm": tree.warm_names}


def _hear(line: str) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(line)
    return profile


def _print(subject: str, profile: dict[str, Any], console: Console) -> None:
    done = max(profile["done"], 1)
    user, system = profile["user"], profile["system"]
    console.print(
        f"{subject}: {done:,} times {profile['what']}, {(user + system) / done * 1e6:.2f} µs of CPU each, "
        f"of which {system / done * 1e6:.2f} in the kernel; {profile['samples']:,} samples",
        highlight=False,
    )
    functions = Table(title="functions", title_justify="left")
    functions.add_column("with callees", justify="right")
    functions.add_column("alone", justify="right")
    functions.add_column("")
    for each in profile["functions"]:
        functions.add_row(f"{each['inclusive']:.1%}", f"{each['alone']:.1%}", escape(each["name"]))
    console.print(functions)
    lines = Table(title="lines", title_justify="left")
    lines.add_column("share", justify="right", min_width=6)
    lines.add_column("place", min_width=20)
    lines.add_column("", no_wrap=True)
    for each in profile["lines"]:
        lines.add_row(f"{each['share']:.1%}", escape(each["place"]), escape(each["text"]))
    console.print(lines)
