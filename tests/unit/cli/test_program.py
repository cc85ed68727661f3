# SPDX-License-Identifier: Apache-2.0
"""What all programs have in common: help, version, errors as one line, statuses, lazy imports."""

import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pytest

from commands import run
from famfs_server import __version__
from famfs_server.cli import program
from famfs_server.cli.commands import COMMANDS, PROGRAMS
from famfs_server.errors import DeviceBusyError, MountError, UsageError

SCRIPTS = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["scripts"]
"""The programs by name, as they are installed: modules and functions."""


def installed(name: str) -> list[str]:
    """What a program's file does."""
    module, _, function = SCRIPTS[name].partition(":")
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


@pytest.mark.parametrize("option", ["-h", "-?", "--help"])
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_help(name: str, option: str) -> None:
    outcome = run(name, option)
    if name == "fsck.famfs" and option == "-h":
        assert outcome.status == 0
    assert outcome.status == 0
    assert outcome.out.startswith(f"Usage: {name}")
    assert outcome.err == ""


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_every_command(name: str) -> None:
    for arguments in ((name, "-?"), (name, "--help"), ("-h", name)):
        outcome = run("famfs", *arguments)
        assert outcome.status == 0
        assert outcome.out.startswith(f"Usage: famfs {name}")
    assert COMMANDS[name].load().name == name


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"fsck"}))
def test_dash_h_is_help_except_in_fsck(name: str) -> None:
    assert run("famfs", name, "-h").status == 0
    assert run("famfs", "fsck", "-h").status == 2


def test_the_list_of_commands_comes_from_the_table() -> None:
    out = run("famfs", "-h").out
    for entry in COMMANDS.values():
        assert f"  {entry.name} " in out
        assert entry.help in " ".join(out.split())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_interrupted_while_it_is_imported(name: str, tmp_path: Path) -> None:
    """Silently, as later; and not at all where a shell has the signal ignored."""
    module = tmp_path / "click.py"
    module.write_text("import pathlib, time\npathlib.Path(__file__).with_name('here').touch()\ntime.sleep(20)\n")
    with subprocess.Popen(
        # Who runs the tests in the background of a shell has the signal ignored.
        ["env", "--default-signal=INT", *installed(name), "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "here").exists():
            assert time.monotonic() < deadline, "the program does not begin"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"")
        assert process.returncode == 130


def test_ignored_interrupt_is_ignored(tmp_path: Path) -> None:
    module = tmp_path / "click.py"
    module.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)\n")
    words = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *installed("famfs")]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"")


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_version(name: str) -> None:
    assert run(name, "--version").out == f"{name} {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((), 1),
        (("--",), 1),
        (("bogus",), 3),
        (("-h", "bogus"), 3),
        (("-Z",), 2),
        (("creat", "-Z"), 2),
        (("creat", "--bogus=1", "x"), 2),
        (("mkdir",), 2),
        (("cp", "x"), 2),
        (("verify",), 2),
        (("fsck",), 2),
        (("logplay",), 2),
        (("getmap",), 2),
        (("flush",), 2),
        (("chkread",), 2),
        (("umount",), 2),
        (("mount",), 2),
        (("mount", "a"), 2),
        (("mount", "a", "b", "c"), 2),
        (("fsck", "-rm", "/"), 2),
        (("mount", "-rm", "a", "b"), 2),
        (("mount", "-c", "sometimes", "a", "b"), 2),
        (("mount", "-c", "never", "-t", "1", "a", "b"), 2),
        (("mount", "-o", "bogus", "a", "b"), 2),
        (("mount", "-p", "a", "b"), 2),
        (("mount", "-F", "a", "b"), 2),
        (("check",), 2),
        (("mkmeta",), 2),
        (("clone",), 2),
        (("clone", "a", "b"), 2),
        (("pcq",), 2),
        (("mount", "-t", "-1", "a", "b"), 2),
    ],
)
def test_usage_errors_of_famfs(arguments: tuple[str, ...], status: int) -> None:
    outcome = run("famfs", *arguments)
    assert outcome.status == status
    assert outcome.out == ""
    if status != 1:
        assert outcome.error.startswith("famfs")


def test_a_usage_error_shows_the_usage() -> None:
    assert run("famfs", "creat", "-Z").error == "famfs creat: No such option '-Z'; usage: famfs creat [OPTIONS] [FILE]"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("mkfs.famfs",), 1),
        (("mkfs.famfs", "-Z", "d"), 1),
        (("mkfs.famfs", "-l", "much", "d"), 1),
        (("mkfs.famfs", "-U", "no-uuid", "d"), 1),
        (("mount.famfs",), 1),
        (("mount.famfs", "d"), 1),
        (("mount.famfs", "d", "m", "-Z"), 1),
        (("mount.famfs", "d", "m", "-o", "bogus"), 1),
        (("mount.famfs", "d", "m", "-o", "fmap=sometimes", "-s"), 1),
        (("mount.famfs", "d", "m", "-N", "/proc/1/ns/mnt"), 1),
        (("mount.famfs", "d", "m", "-t", "ext4"), 1),
        (("fsck.famfs",), 16),
        (("fsck.famfs", "-Z", "d"), 16),
        (("famfs-server",), 1),
        (("famfs-server", "d"), 1),
        (("umount.famfs",), 1),
        (("umount.famfs", "m", "-N", "/proc/1/ns/mnt"), 1),
        (("umount.famfs", "m", "-t", "ext4"), 1),
        (("famfs_fused",), 1),
        (("famfs_fused", "m"), 1),
        (("famfs_fused", "m", "-o", "daxdev=/dev/dax0.0"), 1),
        (("famfs_fused", "m", "-o", "source=/nope,daxdev=/dev/dax0.0"), 1),
        (("famfs_fused", "m", "-o", f"source={__file__},daxdev=/dev/dax0.0"), 1),
        (("famfs_fused", "m", "-o", "shadow=/"), 1),
        (("famfs_fused", "m", "-o", "shadow=/,daxdev=/d,bogus"), 1),
    ],
)
def test_usage_errors_of_the_helpers(arguments: tuple[str, ...], status: int) -> None:
    outcome = run(*arguments)
    assert outcome.status == status
    assert outcome.error.startswith(f"{arguments[0]}: ")


@pytest.mark.parametrize(
    "words",
    [
        "shadow=/,daxdev=/nope",
        "source=/,daxdev=/nope,timeout=5,cache=always,no_flock,readdirplus,pass_yaml,fsname=x,debug=7",
        "shadow=/,daxdev=/nope,allow_other,default_permissions,cache=auto",
    ],
)
def test_the_server_takes_the_arguments_of_the_reference(words: str, tmp_path: Path) -> None:
    outcome = run("famfs_fused", "-s", "-d", "-o", words, tmp_path)
    assert outcome.status == 32 or os.geteuid() != 0
    assert outcome.error.startswith("famfs_fused: /nope: ") or os.geteuid() != 0


def test_the_server_of_the_reference_makes_no_files_and_lets_nobody_in() -> None:
    from famfs_server.cli.fused import sort_options

    assert sort_options(("shadow=/s", "daxdev=/d,ro")) == ("/s", "/d", ["ro", "nouseraccess", "nocreate"])
    assert sort_options(("allow_other,create",)) == ("", "", ["allow_other", "create"])


def test_the_mode_of_the_reference(tmp_path: Path) -> None:
    for arguments in (("mount",), ("mount", "-o", "timeout=1")):
        outcome = run("famfs", *arguments, tmp_path / "d", tmp_path, env={"FAMFS_MODE": "v1"})
        assert outcome.status == 2
        assert "FUSE only" in outcome.error
    assert "FUSE only" not in run("famfs", "mount", "--fuse", tmp_path / "d", tmp_path, env={"FAMFS_MODE": "v1"}).err


def test_what_needs_a_mount(tmp_path: Path) -> None:
    for arguments, cause in (
        (("check", tmp_path), "not in a mounted famfs"),
        (("mkmeta", tmp_path), "is not mounted"),
        (("mkmeta", tmp_path / "nope"), "No such file"),
        *(((name, tmp_path), "not in a mounted famfs") for name in ("status", "top", "metrics", "loglevel", "upgrade")),
        (("status", tmp_path / "nope"), "nope: No such file"),
        (("loglevel", ""), "'': No such file"),
        (("chkread", "-s", tmp_path), f"{tmp_path}: Is a directory"),
    ):
        outcome = run("famfs", *arguments)
        assert outcome.status == 1
        assert cause in outcome.error


def failing(error: BaseException) -> click.Command:
    @program.tool("tool")
    def command() -> None:
        """Fail."""
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("so\nit is"), 2, "prog: so it is"),
        (DeviceBusyError("busy"), errno.EBUSY, "prog: busy"),
        (MountError("no"), 32, "prog: no"),
        (FileNotFoundError(errno.ENOENT, "x", "/a/b"), 1, "prog: /a/b: No such file or directory"),
        (OSError(errno.ENOTCONN, "x"), 1, "prog: Transport endpoint is not connected"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_errors_become_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str | None
) -> None:
    assert program.run(failing(error), "prog", [], program.Statuses()) == status
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_counts_stay_below_the_statuses_of_signals() -> None:
    @program.tool("tool")
    def command() -> int:
        """Count."""
        return 1000

    assert program.run(command, "prog", [], program.Statuses()) == 127


def test_a_reader_that_leaves_is_no_error_message() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from famfs_server.cli import famfs; famfs.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "-h"], stdout=write_end, stderr=subprocess.PIPE, timeout=30, check=False
    )
    os.close(write_end)
    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("closed", "arguments", "status"),
    [
        (">&-", ["-h"], 0),
        (">&- 2>&-", ["bogus"], 3),
        ("<&- >&- 2>&-", ["fsck", "/nope"], 2),
        ("<&-", ["import", "-", "/"], 1),
    ],
)
def test_streams_that_the_caller_has_closed(closed: str, arguments: list[str], status: int) -> None:
    code = "from famfs_server.cli import famfs; famfs.main()"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr
    assert (b"famfs import: /" in done.stderr) is (status == 1)


def test_a_closed_stream_is_not_taken_by_a_device(tmp_path: Path) -> None:
    code = """
import os, sys
from famfs_server.cli import program
program._open_standard_streams()
os.write(int(sys.argv[1]), " ".join(os.readlink(f"/proc/self/fd/{n}") for n in range(3)).encode())
"""
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(out)]
    subprocess.run(command, pass_fds=[out], timeout=30, check=True)
    os.close(out)
    assert (tmp_path / "out").read_text() == "/dev/null /dev/null /dev/null"


@pytest.mark.parametrize("arguments", [("-h",), ("bogus",), ("-h", "mount"), ("mkdir", "--help"), ("creat", "/etc/x")])
def test_starting_imports_no_heavy_module(arguments: tuple[str, ...]) -> None:
    code = """
import sys
from famfs_server.cli import famfs, program
program.run(famfs.command, "famfs", sys.argv[1:], program.Statuses())
heavy = sorted({"numpy", "trio", "rich", "yaml", "pyfuse3", "prctl"} & set(sys.modules))
print("HEAVY", heavy)
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=30, check=True)
    assert b"HEAVY []" in done.stdout


def test_only_the_chosen_command_is_imported() -> None:
    code = """
import sys
from famfs_server.cli import famfs, program
program.run(famfs.command, "famfs", ["mkdir", "--help"], program.Statuses())
print("LOADED", sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("famfs_server.cli.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True, text=True)
    loaded = set(done.stdout.partition("LOADED ")[2].strip("[]\n").replace("'", "").split(", "))
    assert not loaded & (set(COMMANDS) - {"mkdir"})
    assert "mkdir" in loaded


def test_the_table_names_a_module_for_every_command() -> None:
    folder = Path(program.__file__).parent
    for entry in COMMANDS.values():
        assert (folder / f"{entry.module}.py").exists()
