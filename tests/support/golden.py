# SPDX-License-Identifier: Apache-2.0
"""The golden images: media written by the reference implementation, with every field decoded beside them."""

import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
LOG_OFFSET = 0x200000

# The host to which the images belong; every other host is a client.
SYSTEM_UUID = "f00dcafe-0102-4304-8506-0708090a0b0c"


@dataclass(frozen=True)
class GoldenImages:
    """The folder of golden images."""

    folder: Path

    @property
    def names(self) -> list[str]:
        """The names of all cases, such as `02-tree`, in order."""
        return sorted(path.name.removesuffix(".sb.bin.gz") for path in self.folder.glob("*.sb.bin.gz"))

    def facts(self, name: str) -> dict[str, Any]:
        """Every decoded field of the case `name`, and what the reference computed from it."""
        facts: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return facts

    def piece(self, name: str, which: Literal["sb", "log"]) -> bytes:
        """The stored head of the superblock region or of the log region; the rest of the region is zero."""
        return gzip.decompress((self.folder / f"{name}.{which}.bin.gz").read_bytes())

    def build(self, name: str, directory: Path) -> Path:
        """Makes the case `name` a sparse image of the device's full size in `directory`."""
        path = directory / f"{name}.img"
        with path.open("wb") as image:
            image.truncate(self.facts(name)["device_size"])
            image.write(self.piece(name, "sb"))
            image.seek(LOG_OFFSET)
            image.write(self.piece(name, "log"))
        return path


def folder() -> Path:
    """Where the golden images are looked for: FAMFS_VECTORS, or `../shared/vectors` beside the checkout."""
    named = os.environ.get("FAMFS_VECTORS")
    return Path(named) if named else ROOT.parent / "shared" / "vectors"
