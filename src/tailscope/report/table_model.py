"""What a table is: columns that know how their values are written, and rows of raw values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tailscope.report.rows import Row
from tailscope.report.text import DASH, interval, number, p_value, percent, points, significant

WRITERS: dict[str, Callable[[Any], str]] = {
    "text": lambda value: DASH if value is None else str(value),
    "count": lambda value: number(value, 0),
    "share": percent,
    "whole": lambda value: percent(value, 0),
    "points": points,
    "degrees": lambda value: number(value, 1),
    "plain": significant,
    "p": p_value,
}
UNITS = {"points": "points", "degrees": "°"}
BOUND_DIGITS = {"share": 1, "whole": 0, "points": 1, "plain": 2}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        field: the rows' field, also the CSV heading.
        label: the heading that readers see.
        kind: how values are written, a key of `WRITERS`; fractions are shown in per cent or points.
        meaning: one line of explanation, may be empty.
        bounds: the fields of the interval's ends, shown beside the value; columns of their own in CSV.
    """

    field: str
    label: str
    kind: str = "text"
    meaning: str = ""
    bounds: tuple[str, str] | None = None

    @property
    def numeric(self) -> bool:
        """Whether values are numbers: aligned right and sorted by size."""
        return self.kind != "text"

    @property
    def heading(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {UNITS[self.kind]}" if self.kind in UNITS else self.label

    def written(self, row: Row) -> str:
        """Return the row's value as readers see it, with its interval if it has one."""
        text = WRITERS[self.kind](row.get(self.field))
        if self.bounds is None or row.get(self.bounds[0]) is None:
            return text
        ends = [row[bound] for bound in self.bounds]
        scale = 1.0 if self.kind == "plain" else 100.0
        return f"{text} {interval(ends, BOUND_DIGITS[self.kind], scale)}"


@dataclass(frozen=True)
class Table:
    """A named table: `name` is its file stem, `title` its caption."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
