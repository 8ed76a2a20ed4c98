"""Tables of means and standard deviations over seeds, with the paper's values beside them: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from teracon_fast.report.run_report import markdown_table, shown


@dataclass(frozen=True)
class Entry:
    """One quantity.

    Attributes:
        values: one per seed, NaN if there is none.
        form: format specification, optionally followed by " %".
        paper: the paper's value, or NaN.
    """

    values: tuple[float, ...]
    form: str = ".4f"
    paper: float = math.nan

    @property
    def known(self) -> list[float]:
        """The finite values."""
        return [value for value in self.values if math.isfinite(value)]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.known)) if self.known else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (n - 1); NaN for fewer than two."""
        return float(np.std(self.known, ddof=1)) if len(self.known) > 1 else math.nan

    def text(self) -> str:
        """Mean and standard deviation."""
        spread = f" ± {self._print(self.spread).lstrip('+')}" if math.isfinite(self.spread) else ""
        return self._print(self.mean).replace(" %", "" if spread else " %") + spread

    def paper_text(self) -> str:
        """The paper's value."""
        return self._print(self.paper)

    def _print(self, value: float) -> str:
        form, _, unit = self.form.partition(" ")
        text = shown(value, form)
        if math.isfinite(value) and value < 0 and not text.strip("+-0.,"):
            text = shown(0.0, form)  # not "-0.00"
        return text + (f" {unit}" if unit and math.isfinite(value) else "")


@dataclass(frozen=True)
class Column:
    """A heading, and the names of its quantities in a CSV file; a table shows all but the first in brackets."""

    heading: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A label, and for each column an entry of each of its quantities."""

    label: str
    entries: tuple[tuple[Entry, ...], ...]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it. first: heading of the labels.
        columns, lines: its content.
    """

    title: str
    first: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows as text; the paper's values follow in a row of their own."""
        rows = []
        for line in self.lines:
            rows.append([line.label, *(_joined(entries, Entry.text) for entries in line.entries)])
            if any(math.isfinite(entry.paper) for entries in line.entries for entry in entries):
                rows.append([f"{line.label}, paper", *(_joined(entries, Entry.paper_text) for entries in line.entries)])
        return [self.first, *(column.heading for column in self.columns)], rows

    def upright(self) -> tuple[list[str], list[list[str]]]:
        """`rows` transposed, for narrow screens."""
        heading, rows = self.rows()
        heading, *rows = (list(column) for column in zip(heading, *rows, strict=True))
        return heading, rows

    def markdown(self) -> str:
        """A title and the table."""
        return f"## {self.title}\n\n{markdown_table(*self.rows())}"


def _joined(entries: tuple[Entry, ...], text: Callable[[Entry], str]) -> str:
    """ "0.0411 (-3.06 %)"; unknown values after the first are left out."""
    first, *others = (text(entry) for entry in entries)
    behind = [other for other in others if other != "–"]
    return f"{first} ({', '.join(behind)})" if behind else first


def csv_text(grid: Grid, paper: bool = True) -> str:
    """The table as CSV: columns for mean, standard deviation and, if wanted, the paper's value of each quantity."""
    heading = [grid.first, "seeds"]
    for name in (name for column in grid.columns for name in column.names):
        heading += [name, f"{name} spread", *([f"{name} paper"] if paper else [])]
    rows: list[Sequence[object]] = [heading]
    for line in grid.lines:
        entries = [entry for entries in line.entries for entry in entries]
        numbers = [
            value for entry in entries for value in (entry.mean, entry.spread, *((entry.paper,) if paper else ()))
        ]
        seeds = max((len(entry.known) for entry in entries), default=0)
        rows.append([line.label, seeds, *(repr(value) if math.isfinite(value) else "" for value in numbers)])
    return csv_of(rows)


def csv_of(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
