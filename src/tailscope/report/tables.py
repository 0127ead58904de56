"""Tables: columns that know how their values are written, rows of raw values, and files of CSV, Markdown and LaTeX.

CSV holds raw numbers in full precision, fractions as fractions, and leaves undefined cells empty. Markdown and LaTeX
hold what a reader sees: rounded numbers with their intervals, an en dash where a value is undefined.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tailscope.measures.fields import Measure
from tailscope.report.text import DASH, MINUS, interval, number, p_value, percent, points, significant
from tailscope.store.files import write as write_file

WRITERS: dict[str, Callable[[Any], str]] = {
    "text": lambda value: DASH if value is None else str(value),
    "count": lambda value: number(value, 0),
    "share": percent,
    "whole": lambda value: percent(value, 0),
    "points": points,
    "degrees": lambda value: number(value, 1),
    "plain": significant,
    "squared": significant,
    "p": p_value,
}
UNITS = {"points": "points", "degrees": "°"}
BOUND_DIGITS = {"share": 1, "whole": 0, "points": 1, "plain": 2}


FORMULA = ("=", "+", "-", "@", "\t", "\r")
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # after a line's end it would open an argument
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "→": r"$\to$",
    "≤": r"$\le$",
    "°": r"$^\circ$",
    MINUS: "$-$",
}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        field: the rows' field, also the CSV heading.
        label: the heading that readers see.
        kind: how values are written, a key of `WRITERS` and the unit of a measure; fractions are shown in per cent or
            points.
        meaning: one line of explanation, may be empty.
        bounds: the fields of the interval's ends, shown beside the value; columns of their own in CSV.
    """

    field: str
    label: str
    kind: str = "text"
    meaning: str = ""
    bounds: tuple[str, str] | None = None

    @classmethod
    def of(cls, measure: Measure, label: str = "") -> Self:
        """Return the column of a measure, under another label where one is given."""
        return cls(measure.name, label or measure.label, measure.unit, measure.meaning)

    @property
    def numeric(self) -> bool:
        """Whether values are numbers: aligned right and sorted by size."""
        return self.kind != "text"

    @property
    def heading(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {UNITS[self.kind]}" if self.kind in UNITS else self.label

    def written(self, row: Mapping[str, Any]) -> str:
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
    rows: Sequence[Mapping[str, Any]]


def write(folder: Path, tables: Sequence[Table]) -> list[Path]:
    """Write every table into the folder as NAME.csv, NAME.md and NAME.tex, and return the paths.

    Raises:
        UserError: the folder cannot be written.
    """
    writers: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex}
    return [
        write_file(folder / f"{table.name}.{suffix}", writer(table))
        for table in tables
        for suffix, writer in writers.items()
    ]


def to_csv(table: Table) -> str:
    """Return a table as CSV (RFC 4180): raw numbers, intervals in columns of their own."""
    fields = [field for column in table.columns for field in (column.field, *(column.bounds or ()))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(fields)
    writer.writerows([_plain(row.get(field)) for field in fields] for row in table.rows)
    return buffer.getvalue()


def to_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown, under its title."""
    headings = [_markdown(column.heading) for column in table.columns]
    rules = ["---:" if column.numeric else ":---" for column in table.columns]
    lines = [headings, rules]
    lines += [[_markdown(column.written(row)) for column in table.columns] for row in table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{_markdown(table.title)}**\n\n{body}\n"


def to_latex(table: Table) -> str:
    """Return a table as a LaTeX tabular; the document needs the package booktabs."""
    alignment = "".join("r" if column.numeric else "l" for column in table.columns)
    headings = " & ".join(latex(column.heading) for column in table.columns)
    body = [" & ".join(latex(column.written(row)) for column in table.columns) + r" \\" for row in table.rows]
    lines = [
        f"% {_one_line(table.title)}; needs \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        rf"{headings} \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    r"""Return text with LaTeX's special characters escaped.

    >>> latex("50 % of a_b")
    '50 \\% of a\\_b'
    """
    return "".join(LATEX.get(character, character) for character in _one_line(text))


def _plain(value: Any) -> Any:
    """Return a CSV cell. Text that a spreadsheet would run as a formula gets a leading apostrophe."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return "" if value is None else value


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_|\[\]])", r"\\\1", _one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _one_line(text: str) -> str:
    return " ".join(text.split())
