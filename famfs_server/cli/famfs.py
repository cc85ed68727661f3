# SPDX-License-Identifier: Apache-2.0
"""`famfs COMMAND …`: finds the command in the table and hands over to it."""

import sys
from typing import NoReturn

import click

from famfs_server.cli import program
from famfs_server.cli.commands import COMMANDS


class Famfs(click.Group):
    """The commands of the table, each imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, if there is one."""
        entry = COMMANDS.get(cmd_name)
        return entry.load() if entry else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in the help text, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(entry.name, entry.help) for entry in COMMANDS.values()])


@click.command(
    "famfs",
    cls=Famfs,
    invoke_without_command=True,
    add_help_option=False,
    context_settings={"max_content_width": 110},
    epilog="`famfs -h COMMAND` shows the help of a command.",
)
@click.option("-h", "-?", "--help", "wants_help", is_flag=True, help="Show this help, or that of COMMAND, and exit.")
@click.option("--dryrun", is_flag=True, help="Accepted for compatibility; has no effect.")
@program.version_option
@click.pass_context
def command(ctx: click.Context, *, wants_help: bool, dryrun: bool) -> int | None:
    """Work with famfs, the file system in memory that several hosts share."""
    name = ctx.invoked_subcommand
    if wants_help:
        shown = ctx
        if name:
            chosen = COMMANDS[name].load()
            shown = click.Context(chosen, info_name=name, parent=ctx, **chosen.context_settings)
        click.echo(shown.get_help())
        ctx.exit(0)
    if name is None:
        click.echo(ctx.get_help(), file=sys.stderr)
        return 1
    return None


def main() -> NoReturn:
    """The program `famfs`."""
    program.main(command, "famfs")
