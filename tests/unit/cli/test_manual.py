# SPDX-License-Identifier: Apache-2.0
"""Man pages and completions tell of every program, command and option, and their readers understand them."""

import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from commands import STATUSES
from famfs_server.cli.commands import COMMANDS, PROGRAMS
from famfs_server.cli.manual import __main__ as manual
from famfs_server.cli.manual import model, pages
from famfs_server.cli.manual.completion import completions
from famfs_server.cli.manual.examples import EXAMPLES
from famfs_server.daemon import options

TOOLS = [*model.programs(), *model.subcommands()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the generator writes."""
    folder = tmp_path_factory.mktemp("manual")
    manual.write(folder)
    return folder


def test_there_is_a_page_for_everything(written: Path) -> None:
    names = {path.name for path in (written / "man").iterdir()}
    assert names == {
        *(f"{name}.8" for name in PROGRAMS),
        *(f"famfs-{name}.8" for name in COMMANDS),
        "famfs.5",
        "famfs.7",
    }
    assert set(STATUSES) == set(PROGRAMS)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.page)
def test_a_page_tells_of_every_option(tool: model.Tool) -> None:
    text = pages.page(tool).replace("\\-", "-")
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"):
        assert f".SH {section}\n" in text
    for option in tool.shown:
        for name in option.names:
            assert f"\\fB{name}\\fR" in text
        assert option.help, option.names
    assert tool.description


# Each has its own page.
WITHOUT_EXAMPLES = {"famfs", "famfs clone"}


def test_examples_are_commands_that_exist() -> None:
    assert {tool.name for tool in TOOLS if not pages.examples_of(tool.name)} == WITHOUT_EXAMPLES
    assert set(EXAMPLES) <= {tool.name for tool in TOOLS}
    for lines in EXAMPLES.values():
        for line, meaning in lines:
            name, *words = shlex.split(line)
            if name == "mount":
                name, words = "mount.famfs", [*words[:1], "famfs", *words[2:]]
            elif name == "umount":
                name = "umount.famfs"
            entry = COMMANDS[words.pop(0)] if name == "famfs" else PROGRAMS[name]
            entry.load().make_context(name, words)
            assert meaning.endswith(".")


def test_every_mount_option_is_described(written: Path) -> None:
    text = (written / "man/famfs.5").read_text().replace("\\-", "-")
    for name in (*options._VALUES, *options._FLAGS):
        positive = {"allow_other": "nouseraccess", "default_permissions": "nodefault_permissions"}.get(name, name)
        assert re.search(rf"\\fB{positive}\b", text), name


def test_man_understands_every_page(written: Path) -> None:
    man = shutil.which("man")
    if man is None or shutil.which("groff") is None:
        pytest.skip("needs man and groff")
    for path in sorted((written / "man").iterdir()):
        done = subprocess.run(
            [man, "--warnings", "-Tutf8", "-l", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), path.name
        assert "SEE ALSO" in re.sub(".\b", "", done.stdout)


def test_mandoc_understands_every_page(written: Path) -> None:
    mandoc = shutil.which("mandoc")
    if mandoc is None:
        pytest.skip("needs mandoc")
    files = [str(path) for path in (written / "man").iterdir()]
    done = subprocess.run(
        [mandoc, "-T", "lint", "-W", "warning", *files], capture_output=True, text=True, timeout=60, check=False
    )
    assert not [line for line in done.stdout.splitlines() if "missing date" not in line]


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers behind these words; the last one is being typed."""
    code = f'source "{script}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _famfs_programs; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code, "bash", *words], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes(written: Path) -> None:
    script = written / "completions/bash/famfs"
    assert completed(script, "famfs", "") == set(COMMANDS)
    assert completed(script, "famfs", "ma") == {"map"}
    assert completed(script, "famfs", "--dr") == {"--dryrun"}
    assert completed(script, "famfs", "creat", "--n") == {"--nbuckets", "--nstrips"}
    assert completed(script, "famfs", "creat", "fi") == set()
    assert completed(script, "famfs", "mount", "-c", "") == {"always", "normal", "never"}
    assert completed(script, "pcq", "-P", "") == completed(script, "famfs", "pcq", "--setperm", "") == set("pcbn")
    assert completed(script, "/sbin/mkfs.famfs", "--lo") == {"--loglen"}
    for tool in model.subcommands():
        offered = completed(script, *tool.name.split(), "-")
        assert offered == {name for option in tool.shown for name in option.names}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_of_every_option(written: Path, shell: str) -> None:
    texts = [path.read_text() for path in (written / f"completions/{shell}").iterdir()]
    text = "\n".join(texts)
    for tool in TOOLS:
        for option in tool.shown:
            for name in option.names:
                spelled = name if shell == "zsh" else f" {name[2:]} " if name.startswith("--") else f"'{name[1:]}'"
                assert spelled in text, name
    if (program := shutil.which(shell)) is not None:
        for path in (written / f"completions/{shell}").iterdir():
            done = subprocess.run([program, "-n", path], capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, done.stderr) == (0, "")


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'source "$SCRIPTS/bash/famfs"'),
    "zsh": (["zsh", "-f", "-i"], 'fpath=("$SCRIPTS/zsh" $fpath); autoload -Uz compinit; compinit -D -u'),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_tab_completes(written: Path, tmp_path: Path, shell: str) -> None:
    """At a terminal, where each program is a function that says what words it was given."""
    command, load = SHELLS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    say = '{ printf "<%s>" "$@"; echo .; }'
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        "SCRIPTS": str(written / "completions"),
    }
    (tmp_path / "data.bin").touch()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(shell, command, environment)

    def until(pattern: str) -> str:
        seen = ""
        while (found := re.search(pattern, seen, re.DOTALL)) is None:
            assert select.select([terminal], [], [], 30)[0], f"{shell} is silent after {seen!r}"
            seen += os.read(terminal, 4096).decode()
        return found.group(1)

    try:
        os.write(terminal, f"{load}; famfs() {say}; mkfs.famfs() {say}; PS1='rea''dy> '\n".encode())
        until("(ready> )")
        for typed, words in (
            ("famfs logl\t", "<loglevel>"),
            ("famfs creat --nb\t", "<creat><--nbuckets>"),
            ("mkfs.famfs --logl\t", "<--loglen>"),
            ("famfs mount --cache al\t", "<mount><--cache><always>"),
            ("famfs cp dat\t", "<cp><data.bin>"),
        ):
            os.write(terminal, f"{typed}\n".encode())
            assert until(r"((?:<[^<>]*>)+)\..*ready> ") == words, typed
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)


def test_fish_completes(written: Path) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("needs fish")

    def offered(line: str) -> set[str]:
        code = f"source {written}/completions/fish/famfs.fish; complete -C '{line}'"
        command = [fish, "--no-config", "-c", code]
        environment = {**os.environ, "HOME": str(written), "XDG_CONFIG_HOME": str(written / "config")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=True)
        return {line.partition("\t")[0] for line in done.stdout.splitlines()}

    assert offered("famfs ma") == {"map"}
    assert offered("famfs creat --n") == {"--nbuckets", "--nstrips"}


def test_each_program_has_its_scripts() -> None:
    names = set(completions())
    assert names == {"zsh/_famfs", *(f"bash/{n}" for n in PROGRAMS), *(f"fish/{n}.fish" for n in PROGRAMS)}
