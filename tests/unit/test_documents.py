# SPDX-License-Identifier: Apache-2.0
"""What the documents refer to exists: tests, other documents, pictures and schemas."""

import re
from pathlib import Path

import pytest

import matrix
from famfs_server.cli.commands import COMMANDS

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


def test_commands_of_the_reference_are_there() -> None:
    names = {"mount", "fsck", "check", "mkdir", "cp", "creat", "flush", "verify", "mkmeta", "logplay", "getmap"}
    assert names | {"clone", "chkread"} <= set(COMMANDS)


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
