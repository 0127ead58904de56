"""Results as text: numbers as readers see them, and tables of them as CSV, Markdown and LaTeX.

Undefined is an en dash, never 0. CSV holds raw numbers in full precision, fractions
as fractions, and leaves undefined cells empty. Markdown and LaTeX hold what a reader sees: rounded numbers with their
intervals.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self

from tailscope.measures.fields import SHOWN
from tailscope.store.files import write as write_file

DASH = "–"
MINUS = "\u2212"
# Control characters, which XML cannot hold, and halves of surrogate pairs, which UTF-8 cannot.
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def writable(value: Any) -> Any:
    r"""Return a JSON value whose texts fit into any file: names of classes may hold anything.

    The library that draws the figures ends the whole process at characters that XML does not know.

    >>> writable({"names": ["a", "b\x1b[31m"], "n": 3})
    {'names': ['a', 'b�[31m'], 'n': 3}
    """
    if isinstance(value, str):
        return UNWRITABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [writable(item) for item in value]
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    return value


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Return `value` with `digits` decimals and a real minus sign; an en dash where it is undefined.

    >>> number(-0.26, 1), number(None), number(-0.01, 1), number(12406, 0), number(0.26, signed=True)
    ('−0.3', '–', '0.0', '12,406', '+0.3')
    """
    if value is None:
        return DASH
    rounded = float(f"{value:.{digits}f}") + 0.0  # which is never -0
    return f"{rounded:{'+' if signed else ''},.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """Return `value` with that many significant digits, for quantities without a natural scale.

    >>> significant(12.3456), significant(0.000123), significant(None)
    ('12.3', '0.000123', '–')
    """
    return DASH if value is None else f"{value:.{digits}g}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in per cent.

    >>> percent(0.7212), percent(None)
    ('72.1 %', '–')
    """
    return DASH if value is None else f"{number(100 * value, digits)} %"


def points(value: float | None, *, signed: bool = False) -> str:
    """Return a difference of fractions in percentage points."""
    return DASH if value is None else number(100 * value, signed=signed)


def with_interval(value: str, bounds: Sequence[float] | None, digits: int = 1, scale: float = 100.0) -> str:
    """Return an already written value, followed by its interval, times `scale`, if it has one.

    >>> with_interval("61 %", [0.52, 0.70], digits=0), with_interval("61 %", None)
    ('61 % [52, 70]', '61 %')
    """
    return value if bounds is None else f"{value} [{', '.join(number(scale * bound, digits) for bound in bounds)}]"


def in_points(value: float | None, ci95: Sequence[float] | None, *, signed: bool = False) -> str:
    """Return a difference of accuracies with its interval.

    >>> in_points(0.209, [0.184, 0.2335]), in_points(0.012, None, signed=True)
    ('20.9 points [18.4, 23.4]', '+1.2 points')
    """
    return with_interval(f"{points(value, signed=signed)} points", ci95)


def accuracy(mean: float | None, ci95: Sequence[float] | None) -> str:
    """Return an accuracy with its interval, 72.1 % [70.0, 74.0]."""
    return with_interval(percent(mean), ci95)


def p_value(value: float | None) -> str:
    """Return a p or q value.

    >>> p_value(0.0004), p_value(0.031)
    ('<0.001', '0.031')
    """
    return DASH if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "seed"), plural(3, "class")
    ('1 seed', '3 classes')
    """
    suffix = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{suffix}"


def listed(items: Sequence[Any]) -> str:
    """Return items as prose.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def arrow(cell: str) -> str:
    """Return the name of a cell as prose: true → lt."""
    return cell.replace("->", " → ")


# -- tables

WRITERS: dict[str, Callable[[Any], str]] = {
    "text": lambda value: DASH if value is None else str(value),
    "count": lambda value: number(value, 0),
    "share": percent,
    "whole": lambda value: percent(value, 0),
    "points": points,
    "degrees": lambda value: number(value, 1),
    "plain": significant,
    "decimal": lambda value: number(value, 2),
    "seconds": lambda value: significant(value) if value is None or value < 10 else number(value, 0),
    "squared": significant,
    "p": p_value,
}
UNITS = {"points": "points", "degrees": "°"}
BOUND_DIGITS = {
    **{"share": (1, 100.0), "whole": (0, 100.0), "points": (1, 100.0)},
    **{"degrees": (1, 1.0), "decimal": (2, 1.0), "plain": (2, 1.0)},
}
"""Decimals of an interval's ends, and what they are multiplied by, by kind of column."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # after a line's end it would open an argument
    "*": "{*}",  # and this would be taken for a part of that
    "✓": r"$\surd$",
    "✗": r"$\times$",
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
    def of(cls, name: str, label: str = "") -> Self:
        """Return the column of a measure, under another label where one is given."""
        measure = SHOWN[name]
        return cls(name, label or measure.label, measure.unit, measure.meaning)

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
        digits, scale = BOUND_DIGITS[self.kind]
        if self.kind == "plain":  # as many as the value has, which would seem to lie outside its interval otherwise
            digits = max(digits, len(text.partition(".")[2]))
        return with_interval(text, [row[bound] for bound in self.bounds], digits, scale)


@dataclass(frozen=True)
class Table:
    """A named table: `name` is its file stem, `title` its caption."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    @property
    def fields(self) -> list[str]:
        """The fields of raw numbers: intervals have two."""
        return [field for column in self.columns for field in (column.field, *(column.bounds or ()))]


def write_tables(folder: Path, tables: Sequence[Table]) -> list[Path]:
    """Write every table into the folder as NAME.csv, NAME.md and NAME.tex, and return the paths."""
    return [
        write_file(folder / f"{table.name}.{suffix}", text)
        for table in tables
        for suffix, text in (("csv", to_csv(table)), ("md", to_markdown(table)), ("tex", to_latex(table)))
    ]


def to_csv(table: Table) -> str:
    """Return a table as CSV (RFC 4180): raw numbers, intervals in columns of their own."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(table.fields)
    writer.writerows([_plain(row.get(field)) for field in table.fields] for row in table.rows)
    return buffer.getvalue()


def to_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown, under its title."""
    headings = [_markdown(column.heading) for column in table.columns]
    rules = ["---:" if column.numeric else ":---" for column in table.columns]
    rows = [[_markdown(column.written(row)) for column in table.columns] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in (headings, rules, *rows))
    return f"**{_markdown(table.title)}**\n\n{body}\n"


def to_html(table: Table) -> str:
    """Return a table as plain HTML, for a notebook."""
    headings = "".join(f"<th>{escape(column.heading)}</th>" for column in table.columns)
    lines = ("".join(f"<td>{escape(column.written(row))}</td>" for column in table.columns) for row in table.rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table>"


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
