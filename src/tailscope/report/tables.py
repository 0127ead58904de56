"""The tables as CSV, Markdown and LaTeX files.

CSV holds raw numbers in full precision, fractions as fractions, and leaves undefined cells empty. Markdown and LaTeX
hold what a reader sees: rounded numbers with their intervals, an en dash where a value is undefined.
"""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tailscope.report.files import write as write_file
from tailscope.report.results import Results
from tailscope.report.table_contents import tables
from tailscope.report.table_model import Table
from tailscope.report.text import MINUS

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


def write(out: Path | str, results: Results) -> list[Path]:
    """Write every table to `out`/tables as NAME.csv, NAME.md and NAME.tex, and return the paths.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(out) / "tables"
    writers: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex}
    return [
        write_file(folder / f"{table.name}.{suffix}", writer(table))
        for table in tables(results)
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
