# SPDX-License-Identifier: Apache-2.0
"""The command line of `scripts/vm-test`."""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vm.cache import KERNEL_SUITES, Cache, cache_folder
from vm.guest import CXL_UNIT_MIB, LOW_MEMORY_MIB
from vm.module import UnavailableError
from vm.report import STATUS_FAILED, STATUS_TIMEOUT, STATUS_UNAVAILABLE, STATUS_USAGE, RunnerError, say
from vm.runner import Order, run
from vm.tier import run_tier

MODES = ["devdax", "fsdev", "unbound"]
DIALECTS = ["none", "pull", "push", "push-interleave"]


def size(text: str) -> int:
    """A size like 512M or 4G, in MiB."""
    match = re.fullmatch(r"(\d+)([MG])", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512M or 4G")
    return int(match[1]) * (1024 if match[2] in "Gg" else 1)


def device_sizes(text: str) -> list[int]:
    sizes = [size(word) for word in text.split(",")] if text != "none" else []
    if any(one % 2 for one in sizes):
        raise argparse.ArgumentTypeError("a dax device's size is a multiple of 2M")
    return sizes


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vm-test",
        usage="%(prog)s [options] -- COMMAND...  |  %(prog)s [options] --pytest|--tier|--all [-- PYTEST-ARGUMENTS...]",
        description="Run a command in a virtual machine that has real /dev/dax devices.",
        epilog=f"Exit status: the command's own; {STATUS_TIMEOUT} time limit; {STATUS_FAILED} no guest, or it died; "
        f"{STATUS_UNAVAILABLE} tier fmap without its module; {STATUS_USAGE} wrong use. FAMFS_VM_CACHE names the cache "
        "(~/.cache/famfs-vm-test).",
        allow_abbrev=False,
    )

    def add(name: str, words: str, **settings: Any) -> None:
        parser.add_argument(name, help=words, **settings)

    add("--devices", "dax devices, e.g. 512M,4G; none (4G,4G)", type=device_sizes, default=[4096, 4096])
    add("--mode", "what the devices are bound to at first (devdax)", choices=MODES, default="devdax")
    add("--hosts", "so many guests, which have the devices' memory in common (1)", type=positive, default=1)
    add("--memory", "memory of a guest beside the devices, at least 2G (2G)", type=size, default=LOW_MEMORY_MIB)
    add("--cpus", "processors of a guest (this machine's, shared out, at most 4)", type=positive, default=0)
    add("--timeout", "seconds for boot and command together (1200)", type=positive, default=1200)
    add("--results", "folder the guests can write to; gets kernel.log, and junit.xml with --pytest", type=Path)
    kernels = sorted(KERNEL_SUITES)
    add("--kernel", "newest, or Debian 12's own (backports)", choices=kernels, default="backports")
    add(
        "--famfs",
        "load famfs.ko, which gives the guest's kernel extent maps in this dialect (pull), with strict=1",
        metavar="DIALECT", nargs="?", const="pull", choices=DIALECTS,
    )  # fmt: skip
    add("--cxl", "the devices are regions of emulated CXL memory (slow)", action="store_true")
    add("--systemd", "process 1 of the guest is this machine's systemd", action="store_true")
    add("--accel", "auto: KVM if a guest boots with it (auto)", choices=["auto", "kvm", "tcg"], default="auto")
    add("--pytest", "run pytest of .venv (or of PATH) with the arguments after --", action="store_true")
    add("--tier", "run the tests of tests/vm (or tests/fmap): in one guest, then in two", metavar="NAME", nargs="?",
        const="vm", choices=["vm", "fmap"])  # fmt: skip
    add("--all", "the same on every kernel and in every mode", action="store_true")
    add("--refresh", "fetch QEMU and the kernel anew", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command and not (options.pytest or options.tier or options.all):
        parser.error("no command; write it after --")
    if options.memory < LOW_MEMORY_MIB:
        parser.error("--memory is at least 2G")
    if options.mode == "fsdev" and options.kernel == "stable":
        parser.error("Debian 12's kernel has no fsdev mode; use --kernel backports")
    if options.famfs and options.kernel == "stable":
        parser.error("Debian 12's kernel has no fsdev mode, which famfs.ko needs; use --kernel backports")
    if options.cxl and options.kernel == "stable":
        parser.error("Debian 12's kernel makes no regions of CXL memory; use --kernel backports")
    if options.cxl and any(one % CXL_UNIT_MIB for one in options.devices):
        parser.error("with --cxl a device's size is a multiple of 256M")
    return options


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        options = arguments(sys.argv[1:])
        cache = Cache(cache_folder())
        if options.refresh:
            with cache.locked():
                cache.forget()
        order = Order(**{field.name: getattr(options, field.name) for field in fields(Order)})
        if options.tier or options.all:
            return run_tier(options.tier or "vm", order, cache, everything=options.all)
        return run(order, cache)
    except UnavailableError as reason:
        say(f"no module famfs: {reason}")
        if not options.tier:
            return STATUS_FAILED
        if options.results:
            options.results.mkdir(parents=True, exist_ok=True)
            (options.results / "unavailable").write_text(str(reason))
        return STATUS_UNAVAILABLE
    except RunnerError as failure:
        say(str(failure))
        return STATUS_FAILED
    except OSError as error:
        say(f"{error.strerror}: {error.filename}")
        return STATUS_FAILED


if __name__ == "__main__":
    sys.exit(main())
