# SPDX-License-Identifier: Apache-2.0
"""`famfs mount`, with the reference's letters, and `mount.famfs`, with those of mount(8)."""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.errors import FamfsError, PrivilegeError, UsageError

MOUNT_FAILED = 32
_GIVEN = re.compile(r"/dev/fd/(\d{1,9})")
_CACHE = {"always": "always", "normal": "auto", "never": "never"}

comma_options = click.option(
    "-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, separated by commas: see famfs(5)."
)
"""Adds -o, which may be given several times."""


@program.tool("mount")
@comma_options
@click.option("-t", "--timeout", metavar="SECONDS", help="How long the kernel may remember names and attributes.")
@click.option("-c", "--cache", type=click.Choice(list(_CACHE)), help="Use of the page cache on the server data path.")
@click.option("-u", "--nouseraccess", is_flag=True, help="Let nobody but you use the mount.")
@click.option("-p", "--nodefaultperm", is_flag=True, help="Leave permissions unchecked; needs --nouseraccess.")
@click.option("-M", "--set-daxmode", is_flag=True, help="Put the device into famfs mode first; as -o daxmode=famfs.")
@click.option("-S", "--shadow", metavar="PATH", help="Accepted for compatibility; there is no shadow tree.")
@click.option("-d", "--debug", is_flag=True, help="Log everything.")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.option("-f", "--fuse", is_flag=True, help="Use FUSE, as always.")
@click.option("-F", "--nofuse", is_flag=True, hidden=True)
@click.option("-L", "--load-module", is_flag=True, hidden=True)
@click.option("-R", "--remount", is_flag=True, hidden=True)
@click.option("-r", "--read", "by_read", is_flag=True, hidden=True)
@click.option("-m", "--mmap", "by_mmap", is_flag=True, hidden=True)
@click.option("-D", "--dummy", is_flag=True, hidden=True)
@click.argument("device")
@click.argument("directory")
def command(
    *,
    device: str,
    directory: str,
    options: tuple[str, ...],
    timeout: str | None,
    cache: str | None,
    nouseraccess: bool,
    nodefaultperm: bool,
    set_daxmode: bool,
    shadow: str | None,
    debug: bool,
    verbose: int,
    fuse: bool,
    nofuse: bool,
    load_module: bool,
    remount: bool,
    by_read: bool,
    by_mmap: bool,
    dummy: bool,
) -> None:
    """Mount the file system on DEVICE at DIRECTORY. Returns when the mount can be used."""
    program.set_verbosity(verbose)
    if by_read and by_mmap:
        raise UsageError("--read and --mmap exclude each other")
    if cache is not None and timeout is not None:
        raise UsageError("--cache and --timeout exclude each other")
    mode = os.environ.get("FAMFS_MODE") or "fuse"
    if not fuse and (nofuse or mode != "fuse"):
        raise UsageError(f"{'--nofuse' if nofuse else f'FAMFS_MODE={mode}'}: this server mounts through FUSE only")
    if remount or dummy:
        raise UsageError(f"--{'remount' if remount else 'dummy'} does not exist here; unmount, and mount again")
    words = list(options)
    words += ["daxmode=famfs"] if set_daxmode else []
    words += [f"timeout={timeout}"] if timeout is not None else []
    words += [f"cache={_CACHE[cache]}"] if cache is not None else []
    words += ["nouseraccess"] if nouseraccess else []
    words += ["nodefault_permissions"] if nodefaultperm else []
    words += ["debug"] if debug else []
    words += [f"shadow={shadow}"] if shadow is not None else []
    start(device, directory, words)


def start(
    device: str,
    directory: str,
    words: list[str],
    *,
    sloppy: bool = False,
    foreground: bool = False,
    fake: bool = False,
    fuse: int | None = None,
    store: bool = False,
) -> None:
    """Check the options, then mount. A directory /dev/fd/N means: the mount is made, serve it (mount.fuse3(8))."""
    from famfs_server.daemon.options import parse_options

    options = parse_options(device, directory, words, sloppy=sloppy)
    from famfs_server.daemon import lifecycle

    if fuse is None and (given := _GIVEN.fullmatch(directory)):
        fuse = int(given[1])
    waiting = partial(progress, f"mounting {device}", unit="")
    lifecycle.mount(options, foreground=foreground, fake=fake, fuse=fuse, store=store, waiting=waiting)


def helper_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what mount(8) and umount(8) both give to their helpers: -n, -v, -N and -t."""
    for option in (
        click.option("-t", "kind", metavar="TYPE", help="famfs or fuse.famfs."),
        click.option("-N", "namespace", metavar="NAMESPACE", help="Not possible: use nsenter --mount."),
        click.option("-v", "--verbose", count=True, help="Say more."),
        click.option("-n", "no_mtab", is_flag=True, help="Accepted; there is no mtab."),
    ):
        function = option(function)
    return function


@program.tool("mount.famfs")
@comma_options
@click.option("-s", "sloppy", is_flag=True, help="Tolerate unknown options.")
@click.option("-f", "fake", is_flag=True, help="Do everything but the mount.")
@click.option("-r", "read_only", is_flag=True, help="As -o ro.")
@click.option("-w", "read_write", is_flag=True, help="As -o rw.")
@helper_options
@click.argument("device")
@click.argument("directory")
def helper(
    *,
    device: str,
    directory: str,
    options: tuple[str, ...],
    sloppy: bool,
    fake: bool,
    no_mtab: bool,
    verbose: int,
    read_only: bool,
    read_write: bool,
    namespace: str | None,
    kind: str | None,
) -> None:
    """Mount the file system on DEVICE at DIRECTORY, for mount(8).

    Exit status: 0 mounted, 1 usage or permission, 2 system error, 8 interrupted, 32 the mount failed.
    """
    check_helper_options(namespace, kind, verbose)
    words = [*options, *(["ro"] if read_only else []), *(["rw"] if read_write else [])]
    start(device, directory, words, sloppy=sloppy, fake=fake)


def check_helper_options(namespace: str | None, kind: str | None, verbose: int) -> None:
    """Heed what `helper_options` has added. Raises UsageError for -N, which mount(8) and umount(8) hand on where they
    cannot enter the namespace themselves, and for another file system's -t."""
    program.set_verbosity(verbose)
    if namespace is not None:
        raise UsageError("-N: enter the mount namespace with nsenter --mount instead")
    if kind is not None and kind not in ("famfs", "fuse.famfs"):
        raise UsageError(f"-t {kind}: this is famfs")


def exit_status(error: FamfsError) -> int:
    """The bits of mount(8)."""
    return 1 if isinstance(error, UsageError | PrivilegeError) else MOUNT_FAILED


STATUSES = program.Statuses(usage=1, interrupted=8, system=2, failure=exit_status)


def main() -> NoReturn:
    """The program `mount.famfs`."""
    program.main(helper, "mount.famfs", STATUSES)
