# SPDX-License-Identifier: Apache-2.0
"""`python -m famfs_server.cli.manual DIRECTORY` writes DIRECTORY/man/*.N and DIRECTORY/completions/SHELL/*."""

import sys
from pathlib import Path

from famfs_server.cli.manual.completion import completions
from famfs_server.cli.manual.pages import pages


def write(directory: Path) -> None:
    """Write all pages and scripts."""
    files = {f"man/{name}": text for name, text in pages().items()}
    files |= {f"completions/{name}": text for name, text in completions().items()}
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m famfs_server.cli.manual DIRECTORY")
    write(Path(sys.argv[1]))
