# SPDX-License-Identifier: Apache-2.0
"""Completions for bash, zsh and fish, from the table of commands, as plain scripts: no Python runs on Tab."""

from collections.abc import Iterator, Sequence

from famfs_server.cli.manual import model
from famfs_server.cli.manual.model import Option, Tool


def completions() -> dict[str, str]:
    """Every script, by its place below a shell's directory."""
    programs, commands = list(model.programs()), list(model.subcommands())
    found = {"zsh/_famfs": "\n".join(_zsh(programs, commands)) + "\n"}
    bash = "\n".join(_bash(programs, commands)) + "\n"
    for program in programs:
        # bash-completion looks for a file with the program's name.
        found[f"bash/{program.name}"] = bash
        found[f"fish/{program.name}.fish"] = "\n".join(_fish(program, commands)) + "\n"
    return found


def _words(options: Sequence[Option]) -> str:
    return " ".join(name for option in options for name in option.names)


def _bash(programs: Sequence[Tool], commands: Sequence[Tool]) -> Iterator[str]:
    yield "# bash completion for the programs of famfs-server"
    yield "_famfs_words() {"
    yield '    case "$1" in'
    for tool in (*programs, *commands):
        yield f'        "{tool.name}") echo "{_words(tool.shown)}" ;;'
    yield "    esac"
    yield "}"
    yield "_famfs_values() {"
    yield '    case "$1" in'
    for tool in (*programs, *commands):
        for option in tool.shown:
            if option.choices:
                names = "|".join(f'"{tool.name} {name}"' for name in option.names)
                yield f'        {names}) echo "{" ".join(option.choices)}" ;;'
    yield "    esac"
    yield "}"
    yield "_famfs_programs() {"
    yield '    local cur="${COMP_WORDS[COMP_CWORD]}" tool="${COMP_WORDS[0]##*/}"'
    names = " ".join(tool.name.partition(" ")[2] for tool in commands)
    yield "    if [[ $tool == famfs ]]; then"
    yield "        local word"
    yield '        for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield '            [[ $word == -* ]] || { tool="famfs $word"; break; }'
    yield "        done"
    yield "        if [[ $tool == famfs && $cur != -* ]]; then"
    yield f'            COMPREPLY=($(compgen -W "{names}" -- "$cur"))'
    yield "            return"
    yield "        fi"
    yield "    fi"
    yield '    local values="$(_famfs_values "$tool ${COMP_WORDS[COMP_CWORD-1]}")"'
    yield '    COMPREPLY=($(compgen -W "$values" -- "$cur"))'
    yield '    [[ $cur != -* ]] || COMPREPLY=($(compgen -W "$(_famfs_words "$tool")" -- "$cur"))'
    yield "}"
    yield f"complete -o default -F _famfs_programs {' '.join(program.name for program in programs)}"


def _zsh(programs: Sequence[Tool], commands: Sequence[Tool]) -> Iterator[str]:
    yield f"#compdef {' '.join(program.name for program in programs)}"
    yield "_famfs() {"
    yield "    local tool=${service:t}"
    yield "    if [[ $tool == famfs ]]; then"
    yield "        local -a subcommands=("
    for command in commands:
        name = command.name.partition(" ")[2]
        yield f"            '{name}:{_quoted(command.summary)}'"
    yield "        )"
    yield "        local word"
    yield "        for word in ${words[2,CURRENT-1]}; do"
    yield '            [[ $word == -* ]] || { tool="famfs $word"; break }'
    yield "        done"
    yield "        if [[ $tool == famfs && $words[CURRENT] != -* ]]; then"
    yield "            _describe command subcommands"
    yield "            return"
    yield "        fi"
    yield "    fi"
    yield "    case $tool in"
    for tool in (*programs, *commands):
        yield f"        ({tool.name.replace(' ', chr(92) + ' ')})"
        yield "            _arguments \\"
        for option in tool.shown:
            value = f":{_zsh_value(option)}" if option.value else ""
            for name in option.names:
                yield f"                '*{name}[{_quoted(option.help)}]{value}' \\"
        yield "                '*:file:_files' ;;"
    yield "    esac"
    yield "}"
    yield '_famfs "$@"'


def _zsh_value(option: Option) -> str:
    if option.choices:
        return f"value:({' '.join(option.choices)})"
    return f"{_quoted(option.value)}:_files"


def _quoted(words: str) -> str:
    """Words as zsh takes them inside of a specification in single quotes."""
    for char in "\\[]:":
        words = words.replace(char, f"\\{char}")
    return words.replace("'", "'\\''")


def _fish(program: Tool, commands: Sequence[Tool]) -> Iterator[str]:
    yield f"# fish completion for {program.name}"
    if program.name != "famfs":
        for option in program.shown:
            yield f"complete -c {program.name} {_fish_option(option)}"
        return
    for option in program.shown:
        yield f"complete -c famfs -n __fish_use_subcommand {_fish_option(option)}"
    for command in commands:
        name = command.name.partition(" ")[2]
        yield f"complete -c famfs -n __fish_use_subcommand -f -a {name} -d {_fish_quoted(command.summary)}"
        for option in command.shown:
            yield f"complete -c famfs -n '__fish_seen_subcommand_from {name}' {_fish_option(option)}"


def _fish_option(option: Option) -> str:
    words = []
    for name in option.names:
        if name.startswith("--"):
            words.append(f"-l {name[2:]}")
        else:
            words.append(f"-s {_fish_quoted(name[1:])}" if len(name) == 2 else f"-o {name[1:]}")
    if option.choices:
        words.append(f"-x -a {_fish_quoted(' '.join(option.choices))}")
    elif option.value:
        words.append("-r")
    return " ".join([*words, f"-d {_fish_quoted(option.help)}"])


def _fish_quoted(words: str) -> str:
    escaped = words.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
