# SPDX-License-Identifier: Apache-2.0
"""What the documents refer to exists: tests, other documents, pictures and schemas."""

import re
from pathlib import Path

import click
import pytest

import matrix
from famfs_server.cli.commands import COMMANDS, PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])


def test_every_test_that_compatibility_names_exists() -> None:
    text = (ROOT / "docs/compatibility.md").read_text()
    named = re.findall(r"(tests/\S+\.py)::(\w+)", text)
    assert len(named) > 60
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
    for line in text.partition("## Kernels, dialects and formats")[0].splitlines():
        if line.startswith("| ") and not line.startswith(("| reference", "| step")):
            assert re.search(r"\| (works|differs|not applicable)", line), line
            assert "::test_" in line, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_that_are_named_exist(document: Path) -> None:
    for name in re.findall(r"\bdocs/[\w-]+\.md", document.read_text()):
        assert (ROOT / name).exists(), name


REFERENCE = {
    "mkfs.famfs": "-h -? -f --force -k --kill -l --loglen -M --set-daxmode --fuse -F --nofuse --verbose -D --nodax",
    "famfs mount": "-h -f --fuse -F --nofuse -t --timeout -d --debug -v -u --nouseraccess -p --nodefaultperm "
    "-S --shadow -M --set-daxmode -L --load-module -r --read -m --mmap -D --dummy -R --remount -c --cache",
    "famfs fsck": "-h --human -v -f -B --nbuckets -M -L -F --nofuse --fuse -? -m --mmap -r --read -D --nodax",
    "famfs check": "-v -?",
    "famfs mkmeta": "-v -h",
    "famfs mkdir": "-p -m -u -g -v",
    "famfs cp": "-r -t -m -u -g -v -C --chunksize -N --nstrips -B --nbuckets -c --compare",
    "famfs creat": "-s -r -S -m -u -g -v -t -M -C -N -B",
    "famfs verify": "-f -S -m -t -q",
    "famfs flush": "-v",
    "famfs logplay": "-n --dryrun -v -M -m -r -c --client -s --shadowtest -S --shadow -d --daxdev",
    "famfs getmap": "-q -c",
    "famfs clone": "-v",
    "famfs chkread": "-s -l",
    "famfs_fused": "-s -d -f --help --version",
    "pcq": "-C --create -b --bsize -n --nbuckets -p --producer -c --consumer -d --drain -i --info -N --nmessages "
    "-t --time -S --seed -D --dontflush -f --statusfile -P --setperm -s --status -u -g -v -?",
}
"""The programs and commands of the reference with all of their options."""
WORDS_OF_THE_SERVER = (
    "shadow= source= daxdev= timeout= cache= flock no_flock readdirplus no_readdirplus pass_yaml debug= allow_other "
    "default_permissions fsname="
)
STEPS = {"prepare": 10, "test0": 13, "test1": 9, "test2": 0, "test3": 0, "test4": 0, "test_shadow_yaml": 0,
    "test_pcq": 0, "stripe_test": 0, "test_fio": 0, "test_daxmode": 0, "test_errors": 0, "test_load_module": 0,
}  # fmt: skip
"""The reference's smoke tests, and how many numbered steps each has."""


def first_cells(heading: str) -> list[str]:
    """The first cell of each row below a heading of docs/compatibility.md."""
    section = (ROOT / "docs/compatibility.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("program", REFERENCE)
def test_every_option_of_the_reference_is_there_and_told_of(program: str) -> None:
    wanted = set(REFERENCE[program].split())
    name = program.removeprefix("famfs ")
    command = (COMMANDS if program.startswith("famfs ") else PROGRAMS)[name].load()
    context = click.Context(command, info_name=name, **command.context_settings)
    known = {
        option for parameter in command.get_params(context) for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert wanted <= known
    told: set[str] = set()
    for cell in first_cells("Programs and commands"):
        for part in re.split(r", (?=`famfs|`mkfs)", cell):
            if re.match(rf"`{re.escape(program)}\b", part):
                told |= {word.strip("[]") for span in re.findall(r"`([^`]+)`", part) for word in span.split()}
    letters = {option for option in wanted if len(option) == 2 or option in ("--fuse", "--help", "--version")}
    assert letters <= told
    if program == "famfs_fused":
        assert set(WORDS_OF_THE_SERVER.split()) <= told


def test_every_smoke_step_of_the_reference_is_told_of() -> None:
    told: dict[str, set[int]] = {}
    for cell in first_cells("Smoke steps"):
        names, numbers = re.match(r"(\w+(?:, [a-z]\w+)*)((?: \d+)?(?:, \d+)*)", cell).groups()  # type: ignore[union-attr]
        for name in names.split(", "):
            told.setdefault(name, set()).update(map(int, re.findall(r"\d+", numbers)))
    told.pop("step")
    assert told == {name: set(range(1, count + 1)) for name, count in STEPS.items()}


READING = {"check", "chkread", "doctor", "fsck", "getmap", "list", "logplay", "map", "pcq", "status", "top", "verify"}


def test_reading_commands_print_json_that_a_schema_describes() -> None:
    with_json = {
        name for name, entry in COMMANDS.items() if any("--json" in parameter.opts for parameter in entry.load().params)
    }
    assert with_json == READING
    schemas = {path.stem for path in (ROOT / "docs/schemas").glob("*.json")}
    assert schemas == READING | {"pcq-run", "watch"}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in schemas:
        assert re.search(rf'conform\([^\n]*"{name}"\)', tests), f"no test holds JSON against docs/schemas/{name}.json"


def test_the_matrix_of_kernels_dialects_and_formats_is_what_the_code_says() -> None:
    text = (ROOT / "docs/compatibility.md").read_text()
    for table in (matrix.kernels(), matrix.formats()):
        lines = "\n".join(table)
        assert f"\n\n{lines}\n\n" in text, f"docs/compatibility.md should have\n{lines}"
