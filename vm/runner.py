# SPDX-License-Identifier: Apache-2.0
"""Runs one command in one guest, or the same in several guests that have their dax devices in common."""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vm.cache import Cache
from vm.guest import SPLIT_MEMORY_MIB, Guest, Hardware, accelerator, device_memory, guest_files, wait_for_any
from vm.module import famfs_module
from vm.report import STATUS_FAILED, STATUS_TIMEOUT, RunnerError, say

PASSED_VARIABLES = re.compile(r"PATH|VIRTUAL_ENV|CI|(FAMFS|PYTEST|HYPOTHESIS|COVERAGE)_\w+")
VOLATILE_FOLDERS = [Path("/tmp"), Path("/var/tmp"), Path("/run"), Path("/dev/shm")]  # the guest has its own
PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = "famfs_server"
SYSTEMD = Path("/lib/systemd/systemd")
MEETING = "/run/famfs-vm/meeting"
COMPILE_SECONDS = 60
BOOTS = 3
ORDER_SECONDS = 0.1  # how often the meeting folder is looked at


@dataclass(frozen=True)
class Order:
    """What to boot and what to run in it. Sizes in MiB; `pytest`: the command is pytest's arguments."""

    command: Sequence[str]
    pytest: bool = False
    hosts: int = 1
    devices: Sequence[int] = (4096, 4096)
    mode: str = "devdax"
    memory: int = 2048
    cpus: int = 0
    kernel: str = "backports"
    accel: str = "auto"
    timeout: float = 1200
    results: Path | None = None
    cxl: bool = False
    systemd: bool = False
    famfs: str | None = None
    """The dialect of famfs.ko, which is loaded then."""

    @property
    def processors(self) -> int:
        """Of each guest: this machine's are shared out."""
        return self.cpus or max(1, min(4, (os.cpu_count() or 1) // self.hosts))


class BootError(Exception):
    """A guest's kernel died while it booted, before anything of this checkout ran."""


def run(order: Order, cache: Cache) -> int:
    """Boots the guests and waits for their ends. Gives the exit status of the command (of the first guest whose
    command failed), STATUS_TIMEOUT or STATUS_FAILED.

    Once in hundreds of boots a kernel dies on an emulated processor. That says nothing of the command, so it is said
    and the guests are booted again, BOOTS times in all, within the same time limit.
    """
    deadline = time.monotonic() + order.timeout
    for boot in range(1, BOOTS + 1):
        try:
            return run_once(replace(order, timeout=deadline - time.monotonic()), cache)
        except BootError:
            if boot < BOOTS:
                say(f"nothing of the command has run: booting again ({boot + 1} of {BOOTS})")
    return STATUS_FAILED


def run_once(order: Order, cache: Cache) -> int:
    """As `run`, with one boot. Raises BootError."""
    began = time.monotonic()
    results = order.results
    if results:
        results.mkdir(parents=True, exist_ok=True)
        results = results.resolve()
    devices = sum(order.devices)
    memory = order.memory if order.cxl else max(order.memory, SPLIT_MEMORY_MIB - devices)
    check_machine(memory * order.hosts, devices)
    with cache.locked():
        tools = cache.cxl_tools() if order.cxl else cache.tools()
        kernel = cache.kernel(order.kernel, cxl=order.cxl)
        module = famfs_module(cache, kernel.version) if order.famfs else None
        chosen = order.accel if order.accel != "auto" else accelerator(cache, tools, kernel)
    if order.systemd and not SYSTEMD.exists():
        raise RunnerError("this machine has no systemd that a guest could start; install the package systemd")
    if order.mode == "fsdev" and not kernel.has_fsdev:
        raise RunnerError(f"kernel {kernel.version} has no fsdev mode")

    compile_ahead(order)
    hardware = Hardware(chosen, order.processors, memory, order.devices, order.cxl)
    here = Path.cwd()
    kept = [here] if any(here.is_relative_to(folder) for folder in VOLATILE_FOLDERS) else []
    say(
        f"{'' if order.hosts == 1 else f'{order.hosts} guests: '}kernel {kernel.version}, {chosen}, "
        f"{order.processors} processor{'s'[: order.processors > 1]}, {memory} MiB, "
        f"{f'famfs.ko ({order.famfs}), ' if order.famfs else ''}"
        f"{'CXL' if order.cxl else 'dax'} {'+'.join(map(str, order.devices)) or 'none'} MiB"
    )
    with contextlib.ExitStack() as stack:
        memories = stack.enter_context(device_memory(order.devices))
        guests = []
        for number in range(1, order.hosts + 1) if order.hosts > 1 else [0]:
            guest = stack.enter_context(Guest(cache, tools, kernel, number))
            guests.append(guest)
            shares = guest.share("hostroot", Path("/"), cached=True)
            if results:
                shares += guest.share("results", results, cached=False)
            if number:
                meeting = guests[0].folder / "meeting"
                meeting.mkdir(exist_ok=True)
                shares += guest.share("meeting", meeting, cached=False)
            settings = {
                "PROBE": "",
                "MODULES": " ".join(path.stem for path in kernel.modules),
                "DEVICES": str(len(order.devices)),
                "MODE": order.mode,
                "CXL": "1" if order.cxl else "",
                "SYSTEMD": "1" if order.systemd else "",
                "FAMFS": f"dialect={order.famfs} strict=1" if order.famfs else "",
                "RESULTS": str(results or ""),
                "HOST": str(number or ""),
            }
            job = job_script(order, results, chosen, number)
            initrd = guest_files(tools, kernel, settings, kept, job, [module] if module else [])
            guest.start(hardware, memories, initrd, shares)
        statuses = [
            judged(guest, mishap, order, results, time.monotonic() - began)
            for guest, mishap in watched(guests, began + order.timeout)
        ]
    return next((status for status in statuses if status), 0)


def watched(guests: Sequence[Guest], deadline: float) -> list[tuple[Guest, str]]:
    """Waits for the ends of all guests. Gives those that have a status to report, with what ended them ("" if they
    ended by themselves). One that another has had killed, by a file `kill-NUMBER` in the meeting folder, has none.

    The others learn of an end by a file `ended-NUMBER`.
    """
    running, ended, killed = list(guests), [], set()
    meeting = guests[0].folder / "meeting"
    while running and (left := deadline - time.monotonic()) > 0:
        wait_for_any(running, left if len(guests) == 1 else min(left, ORDER_SECONDS))
        for guest in list(running):
            if guest.number and guest not in killed and (meeting / f"kill-{guest.number}").exists():
                guest.kill()
                killed.add(guest)
            mishap = guest.mishap()
            if mishap is not None:
                running.remove(guest)
                if guest not in killed:
                    ended.append((guest, mishap))
                if guest.number:
                    (meeting / f"ended-{guest.number}").touch()
    return ended + [(guest, "timeout") for guest in running]


def judged(guest: Guest, mishap: str, order: Order, results: Path | None, seconds: float) -> int:
    """Says how a guest ended, and gives its status. Raises BootError."""
    who = f"guest {guest.number}: " if guest.number else ""
    log, reports = guest.kernel_log(), guest.reports()
    if results:
        (results / (f"kernel-{guest.number}.log" if guest.number else "kernel.log")).write_text(log)
    if reports.get("status", "").isdigit():
        ready = reports.get("ready", "?")
        say(f"{who}exit status {reports['status']} after {seconds:.1f} s (guest ready at {ready} s)")
        return int(reports["status"])
    stage = "while the command ran" if "ready" in reports else "before the command began"
    late, died = mishap == "timeout", mishap == ""
    if "error" in reports:
        mishap = f"the guest could not be set up: {reports['error']}"
    elif late:
        mishap = f"time limit of {order.timeout:.0f} s passed {stage}"
    else:
        panic = re.findall(r"Kernel panic.*|Out of memory.*|BUG: .*", log)
        mishap = f"the guest died {stage}: {mishap or (panic or ['it ended without a word'])[-1]}"
    tail = "\n".join(log.splitlines()[-25:])
    say(f"{who}{mishap}; its kernel log ends:\n{tail or '(empty)'}")
    if died and not reports:
        raise BootError
    return STATUS_TIMEOUT if late and "error" not in reports else STATUS_FAILED


def pytest_command(words: Sequence[str], results: Path | None, number: int) -> list[str]:
    report = f"junit-{number}.xml" if number else "junit.xml"
    # The plugin of Hypothesis imports all of it, which takes an emulated processor 10 seconds.
    plugins = ["-p", "no:hypothesispytest"]
    return [python(), "-m", "pytest", *plugins, *([f"--junitxml={results / report}"] if results else []), *words]


def python() -> str:
    """The checkout's own Python, or that of PATH."""
    own = PROJECT / ".venv" / "bin" / "python"
    return str(own) if own.exists() else shutil.which("python3") or "python3"


def compile_ahead(order: Order) -> None:
    """Leave byte code of the checkout's package, and of the tests as pytest changes them, beside the sources: what a
    guest writes vanishes, and each would compile anew, 10 times more slowly. What fails here fails there, with words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    commands = [[python(), "-m", "compileall", "-qq", str(PROJECT / PACKAGE)]]
    if order.pytest:
        commands.append([*pytest_command(order.command, None, 0), "--collect-only"])
    for command in commands:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, env={**environment, "VM_TEST": "1"}, stdin=subprocess.DEVNULL, capture_output=True,
                check=False, timeout=COMPILE_SECONDS,
            )  # fmt: skip


def job_script(order: Order, results: Path | None, accelerator: str, number: int) -> str:
    """What the guest runs: this folder, this PATH, the variables that tests look at, the command."""
    command = pytest_command(order.command, results, number) if order.pytest else order.command
    variables = {name: value for name, value in os.environ.items() if PASSED_VARIABLES.fullmatch(name)}
    variables |= {"HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
    variables |= {"VM_TEST": "1", "VM_TEST_ACCEL": accelerator}
    if order.famfs:
        variables["VM_TEST_FAMFS"] = order.famfs
    if results:
        variables["VM_TEST_RESULTS"] = str(results)
    if number:
        variables |= {"VM_TEST_HOST": str(number), "VM_TEST_HOSTS": str(order.hosts), "VM_TEST_MEETING": MEETING}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"{exports}cd {shlex.quote(str(Path.cwd()))} || exit 127\nexec {shlex.join(command)}\n"


def check_machine(memory: int, devices: int) -> None:
    """memory and devices in MiB. Raises RunnerError if this machine cannot run the guests."""
    if platform.machine() != "x86_64":
        raise RunnerError(f"the guest needs an x86-64 machine; this is {platform.machine()}")
    if os.geteuid():
        raise RunnerError("needs root, to share this machine's files with the guest: sudo scripts/vm-test ...")
    match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(match[1]) // 1024 if match else memory
    if available < memory:
        raise RunnerError(f"not enough memory: a run takes {memory} MiB, {available} MiB are available")
    if available < memory + devices:
        say(f"the devices hold {devices} MiB, more than this machine has available: do not fill them")
