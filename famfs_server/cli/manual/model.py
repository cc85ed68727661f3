# SPDX-License-Identifier: Apache-2.0
"""What the table of commands knows, in a form that pages and completions are made of."""

from collections.abc import Iterator
from dataclasses import dataclass

import click

from famfs_server.cli.commands import COMMANDS, PROGRAMS


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its spellings, what its value is called (empty: it has none), and its help."""

    names: tuple[str, ...]
    value: str
    help: str
    hidden: bool
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A program, or a subcommand of famfs."""

    name: str
    """As it is typed: `famfs creat`, `mkfs.famfs`."""
    summary: str
    description: str
    """Paragraphs, an empty line between them."""
    options: tuple[Option, ...]
    arguments: tuple[str, ...]

    @property
    def page(self) -> str:
        """The name of its man page."""
        return self.name.replace(" ", "-")

    @property
    def shown(self) -> tuple[Option, ...]:
        """The options that help and pages tell of."""
        return tuple(option for option in self.options if not option.hidden)


def programs() -> Iterator[Tool]:
    """All programs that are installed."""
    for name, entry in PROGRAMS.items():
        yield _tool(name, entry.help, entry.load())


def subcommands() -> Iterator[Tool]:
    """All subcommands of famfs."""
    for name, entry in COMMANDS.items():
        yield _tool(f"famfs {name}", entry.help, entry.load())


def _tool(name: str, summary: str, command: click.Command) -> Tool:
    context = click.Context(command, info_name=name, **command.context_settings)
    options, arguments = [], []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            options.append(_option(parameter, context))
        else:
            arguments.append(parameter.make_metavar(context))
    description = (command.help or "").strip()
    return Tool(name, summary.rstrip("."), description, tuple(options), tuple(arguments))


def _option(parameter: click.Option, context: click.Context) -> Option:
    choices = tuple(parameter.type.choices) if isinstance(parameter.type, click.Choice) else ()
    takes_value = not (parameter.is_flag or parameter.count)
    value = ""
    if takes_value:
        value = parameter.metavar or ("|".join(map(str, choices)) or parameter.type.name.upper())
    text = parameter.help or ""
    if takes_value and parameter.show_default and parameter.default is not None:
        text += f" Default: {parameter.default}."
    names = tuple(sorted((*parameter.opts, *parameter.secondary_opts), key=lambda name: (name.startswith("--"), name)))
    return Option(names, value, text, parameter.hidden, tuple(map(str, choices)))
