# SPDX-License-Identifier: Apache-2.0
"""What was measured, the bars that it is held against, and how both are shown."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Figure:
    """One measured quantity. Its value is the median of its samples."""

    unit: str
    samples: list[float] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.samples)


@dataclass(slots=True)
class Figures:
    """All figures of a run, by section, row and column."""

    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""
    _all: dict[tuple[str, str, str], Figure] = field(default_factory=dict)

    def add(self, section: str, row: str, column: str, value: float, unit: str) -> None:
        """Add a sample."""
        self._all.setdefault((section, row, column), Figure(unit)).samples.append(value)

    def note(self, line: str) -> None:
        """Say once that something could not be measured."""
        if line not in self.notes:
            self.notes.append(line)

    def get(self, section: str, row: str, column: str) -> Figure | None:
        """A figure, if it was measured."""
        return self._all.get((section, row, column))

    def as_json(self) -> list[dict[str, Any]]:
        """Every figure with its samples."""
        return [
            {
                "section": section,
                "row": row,
                "column": column,
                "unit": figure.unit,
                "median": figure.value,
                "samples": figure.samples,
            }
            for (section, row, column), figure in self._all.items()
        ]

    def show(self, section: str, console: Console) -> None:
        """Print a section as a table: a line for each row, the medians in columns."""
        found = {place[1:]: figure for place, figure in self._all.items() if place[0] == section}
        if not found:
            return
        columns = list(dict.fromkeys(column for _, column in found))
        table = Table(title=section, title_justify="left")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for row in dict.fromkeys(row for row, _ in found):
            cells = [_cell(found.get((row, column))) for column in columns]
            table.add_row(row, *cells)
        console.print(table)


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that must be at least, or at most, `factor` times another one (or just `factor`)."""

    section: str
    row: str
    column: str
    relation: Literal["≥", "≤"]
    factor: float
    against: tuple[str, str] | None = None
    """Row and column in the same section."""

    def judge(self, figures: Figures) -> "Verdict | None":
        """What came of it, or None if one of the figures was not measured."""
        figure = figures.get(self.section, self.row, self.column)
        other = None if self.against is None else figures.get(self.section, *self.against)
        if figure is None or (self.against is not None and other is None):
            return None
        got = figure.value / (other.value if other else 1.0)
        met = got >= self.factor if self.relation == "≥" else got <= self.factor
        if self.against is None:
            wanted = f"{self.relation} {format_value(self.factor, figure.unit)}"
            return Verdict(self, wanted, format_value(got, figure.unit), got, met)
        row, column = self.against
        than = column if row == self.row else f"{row}, {column}"
        return Verdict(self, f"{self.relation} {self.factor:g} times {than}", f"{got:.2f} times", got, met)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and how the run stands to it."""

    bar: Bar
    wanted: str
    got: str
    value: float
    met: bool

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        bar = self.bar
        return {
            "section": bar.section,
            "row": bar.row,
            "column": bar.column,
            "wanted": self.wanted,
            "got": self.value,
            "met": self.met,
        }


def show_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print what came of the bars; a line that begins with MISSED for each that was missed."""
    if not verdicts:
        return
    table = Table(title="bars", title_justify="left")
    for heading in ("", "figure", "wanted", "got"):
        table.add_column(heading)
    for verdict in verdicts:
        bar = verdict.bar
        mark = "met" if verdict.met else "[bold red]MISSED[/]"
        table.add_row(mark, f"{bar.section}: {bar.row}, {bar.column}", verdict.wanted, verdict.got)
    console.print(table)


def format_value(value: float, unit: str) -> str:
    """A value with its unit, in three digits or so."""
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else format_value(figure.value, figure.unit)
