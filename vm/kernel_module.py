# SPDX-License-Identifier: Apache-2.0
"""The command line of `scripts/kernel-module`."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from vm.cache import Cache, cache_folder
from vm.module import UnavailableError, famfs_module
from vm.report import STATUS_FAILED, RunnerError, say

MODULES = Path("/lib/modules")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kernel-module",
        description="Build famfs.ko, FUSE with extent maps, and print where it is. Without options: for the kernel "
        "that scripts/vm-test boots.",
        epilog=f"Exit status: 0 built; {STATUS_FAILED} not built, with the reason. Needs root and, unless everything "
        "is cached, the network. FAMFS_VM_CACHE names the cache (~/.cache/famfs-vm-test).",
        allow_abbrev=False,
    )
    parser.add_argument("--running", action="store_true", help="for this machine's running kernel, one of Debian 13's")
    parser.add_argument(
        "--install", action="store_true", help="with --running: where modprobe finds it, loaded at boot"
    )
    parser.add_argument("--refresh", action="store_true", help="fetch compiler, headers and source anew")
    options = parser.parse_args()
    if options.install and not options.running:
        parser.error("--install is for the running kernel: add --running")
    return options


def install(module: Path, version: str) -> None:
    """Place the module for modprobe, and have it loaded when the machine boots. Raises RunnerError."""
    folder = MODULES / version
    if not folder.is_dir():
        raise RunnerError(f"there is no {folder}: the running kernel's modules are not on this machine")
    (folder / "updates").mkdir(exist_ok=True)
    shutil.copy2(module, folder / "updates" / module.name)
    Path("/etc/modules-load.d/famfs.conf").write_text("# Made by scripts/kernel-module --install.\nfamfs\n")
    if not shutil.which("depmod"):
        raise RunnerError("the module is in place, but there is no depmod: apt-get install kmod, then depmod -a")
    subprocess.run(["depmod", "-a", version], check=True)
    say(f"installed in {folder / 'updates'}; load it now: modprobe famfs")


def main() -> int:
    options = arguments()
    try:
        if os.geteuid():
            raise RunnerError("needs root, to compile in a root of its own: sudo scripts/kernel-module")
        cache = Cache(cache_folder())
        with cache.locked():
            version = platform.release() if options.running else cache.kernel("backports").version
            if options.refresh:
                for name in (f"toolchain-{version}", f"module-{version}"):
                    shutil.rmtree(cache.folder / name, ignore_errors=True)
            module = famfs_module(cache, version)
        if options.install:
            install(module, version)
    except UnavailableError as failure:
        say(f"no module for this kernel: {failure}")
        return STATUS_FAILED
    except RunnerError as failure:
        say(str(failure))
        return STATUS_FAILED
    print(module)
    return 0


if __name__ == "__main__":
    sys.exit(main())
