# SPDX-License-Identifier: Apache-2.0
"""`famfs_fused`: the reference's server by its own name, with the arguments that its mount command gives it."""

import os
from typing import NoReturn

import click

from famfs_server.cli import mount, program
from famfs_server.errors import UsageError

_ACCEPTED = frozenset({"flock", "no_flock", "readdirplus", "no_readdirplus", "pass_yaml", "no_pass_yaml"})
"""Words that choose how the reference does something; here there is one way."""


@program.tool("famfs_fused")
@click.option(
    "-o", "options", multiple=True, metavar="OPTIONS",
    help="source= or shadow=DIR (must exist), daxdev=DEV, timeout=SEC, cache=never|auto|always, mount options.",
)  # fmt: skip
@click.option("-d", "--debug", is_flag=True, help="Log everything, and stay in the foreground.")
@click.option("-f", "foreground", is_flag=True, help="Stay in the foreground.")
@click.option("-s", "single", is_flag=True, help="Accepted; threads are no choice here.")
@click.argument("directory")
def command(*, directory: str, options: tuple[str, ...], debug: bool, foreground: bool, single: bool) -> None:
    """Serve a famfs file system at DIRECTORY.

    The shadow directory is looked for, as the reference does, and not read: the log of the device is. System calls make
    no files, again as there, unless -o create is given.
    """
    shadow, device, words = sort_options(options)
    if not shadow:
        raise UsageError("-o source=DIR (or shadow=DIR) is missing")
    if not os.path.isdir(shadow):
        raise UsageError(f"source {shadow} is not a directory")
    if not device:
        raise UsageError("-o daxdev=DEV is missing: this server reads the log of the device, not a shadow tree")
    mount.start(device, directory, [*words, *(["debug"] if debug else [])], foreground=foreground or debug)


def sort_options(options: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """The shadow directory, the device, and the words for a mount of ours."""
    shadow = device = ""
    words: list[str] = []
    allow_other = create = False
    for word in (word for option in options for word in option.split(",") if word):
        key, _, value = word.partition("=")
        if key in ("shadow", "source"):
            shadow = value
        elif key == "daxdev":
            device = value
        elif key == "fsname" or word in _ACCEPTED:
            continue
        else:
            allow_other |= word == "allow_other"
            create |= word == "create"
            words.append(word)
    return shadow, device, [*words, *([] if allow_other else ["nouseraccess"]), *([] if create else ["nocreate"])]


def main() -> NoReturn:
    """The program `famfs_fused`."""
    program.main(command, "famfs_fused", mount.STATUSES)
