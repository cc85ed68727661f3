# SPDX-License-Identifier: Apache-2.0
"""What a section is given: where to work, how much to measure, and where figures go."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figures
from bench.site import Site


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    site: Site
    figures: Figures
    quick: bool
    """Small sizes and one sample: for looking whether the bench itself works."""
    say: Callable[[str], None]
    """Tells whoever waits what is going on."""
    device: Path | None = None
    """A real dax device that may be overwritten."""

    @property
    def samples(self) -> int:
        """Samples of each figure; the median counts."""
        return 1 if self.quick else 5
