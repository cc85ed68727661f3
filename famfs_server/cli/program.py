# SPDX-License-Identifier: Apache-2.0
"""What every program does around its command: run it, print errors as one line, and end with the right status."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import click

from famfs_server import __version__
from famfs_server.errors import DeviceModeError, FamfsError

HELP_NAMES = ("-h", "-?", "--help")
UNKNOWN_COMMAND = 3
LARGEST_STATUS = 127
"""Counts of errors end here as exit statuses: what lies above stands for signals."""
_BROKEN_PIPE = 128 + 13


def status_of(error: FamfsError) -> int:
    """The exit status that the error's class names."""
    return error.exit_status


@dataclass(frozen=True, slots=True)
class Statuses:
    """The exit statuses of one program, where they differ from tool to tool."""

    usage: int = 2
    interrupted: int = 130
    system: int = 1
    """An error of the operating system that no class of ours stands for."""
    failure: Callable[[FamfsError], int] = status_of


def tool(
    name: str, *, help_names: Sequence[str] = HELP_NAMES, cls: type[click.Command] = click.Command
) -> Callable[[Callable[..., int | None]], click.Command]:
    """A decorator that makes a click command of a function with options; its help is the function's docstring.

    The function's result is the exit status; nothing means 0. Every command gets --version.
    """
    context = {"help_option_names": list(help_names), "max_content_width": 110}

    def decorate(function: Callable[..., int | None]) -> click.Command:
        return click.command(name, cls=cls, context_settings=context)(version_option(function))

    return decorate


def version_option(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Adds --version, which prints the program's name and the version of this package."""
    return click.version_option(__version__, "--version", message="%(prog)s %(version)s")(function)


def main(command: click.Command, program: str, statuses: Statuses | None = None) -> NoReturn:
    """Run `command` with the arguments of this process, and end the process."""
    _open_standard_streams()
    sys.exit(run(command, program, sys.argv[1:], statuses or Statuses()))


def _open_standard_streams() -> None:
    """Put /dev/null in the place of standard streams that the caller has closed: no device may come to be there, where
    a daemon takes leave of its terminal, and something has to be written to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  # for good


def run(command: click.Command, program: str, arguments: Sequence[str], statuses: Statuses) -> int:
    """Run `command` and give its exit status. Errors that a user can cause are one line on stderr."""
    logging.basicConfig(format=f"{program}: %(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            # Names on the media are bytes; what is no UTF-8 comes out as it went in.
            reconfigure(errors="surrogateescape")
    context: click.Context | None = None

    def fail(message: str, status: int, name: str = "") -> int:
        sub = context.invoked_subcommand if context else None
        name = name or (f"{program} {sub}" if sub else program)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        return min(status, LARGEST_STATUS)

    try:
        with command.make_context(program, list(arguments)) as context:
            result = command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return int(done.exit_code)
    except click.UsageError as error:
        usage = error.ctx.get_usage().replace("Usage:", "usage:", 1) if error.ctx else ""
        message = error.format_message().rstrip(".")
        status = UNKNOWN_COMMAND if isinstance(error, click.exceptions.NoSuchCommand) else statuses.usage
        return fail(f"{message}; {usage}", status, error.ctx.command_path if error.ctx else "")
    except click.ClickException as error:
        return fail(error.format_message(), statuses.usage)
    except FamfsError as error:
        return fail(str(error), statuses.failure(error))
    except (KeyboardInterrupt, click.Abort):
        return statuses.interrupted
    except BrokenPipeError:
        # Nobody reads any more: say nothing, also not when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        return fail(describe(error), statuses.system)
    return min(result, LARGEST_STATUS) if isinstance(result, int) else 0


def describe(error: OSError) -> str:
    """An error of the operating system as users know them: the path, then the cause."""
    cause = os.strerror(error.errno) if error.errno else str(error)
    return f"{os.fsdecode(error.filename) or repr('')}: {cause}" if isinstance(error.filename, str | bytes) else cause


def refuse_daxmode(wanted: bool) -> None:
    """The reference switches a device's driver on --set-daxmode; saying no is better than not doing it."""
    if wanted:
        raise DeviceModeError(
            "--set-daxmode is for mkfs.famfs and famfs mount; this command looks at a device in devdax mode: "
            "daxctl reconfigure-device -m devdax switches it"
        )


def warn(message: str) -> None:
    """A line on stderr that does not end the command."""
    context = click.get_current_context()
    print(f"{context.command_path}: {' '.join(message.split())}", file=sys.stderr)


def set_verbosity(count: int) -> None:
    """Show the log's notes as well (-v), or everything (-vv)."""
    if count:
        logging.getLogger().setLevel(logging.INFO if count == 1 else logging.DEBUG)
