"""Tables of docs/performance.md, generated from the records; the prose around them is written by hand.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`.
"""

import re
from collections.abc import Mapping
from typing import Any

BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
MISSING = "*Not measured yet: `make bench`.*"


def render(text: str, records: Mapping[str, dict[str, Any]]) -> str:
    r"""Return the document with every block filled from the record of its name.

    >>> render("<!-- bench:x -->\nold\n<!-- /bench -->", {})
    '<!-- bench:x -->\n*Not measured yet: `make bench`.*\n<!-- /bench -->'
    """

    def fill(match: re.Match[str]) -> str:
        record = records.get(match[2])
        return f"{match[1]}{table(record) if record else MISSING}\n{match[3]}"

    return BLOCK.sub(fill, text)


def table(record: dict[str, Any]) -> str:
    """Return a record as a Markdown table with a line about the machine below."""
    lines = ["| | measured | ratio | goal | how |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        ratio = f"{spread(row['ratio'], '×')} {row['ratio_is']}" if row["ratio"] else ""
        cells = [row["what"], f"{spread(row['value'])} {row['unit']}", ratio.strip(), goal(row), row["note"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", caption(record)])


def goal(row: dict[str, Any]) -> str:
    """Return the goal and whether it was reached."""
    if row["goal"] is None:
        return ""
    sign = "≤" if row["at_most"] else "≥"
    return f"{sign} {row['goal']:g}×: {'reached' if row['reached'] else '**missed**'}"


def spread(value: Mapping[str, float], sign: str = "") -> str:
    """Return the median with its range, to three digits; the range only where it shows.

    >>> spread({"median": 3.412, "low": 3.3, "high": 3.5}, "×")
    '3.41× (3.30–3.50)'
    >>> spread({"median": 1234.5, "low": 1234.5, "high": 1234.5})
    '1,234'
    """
    median, low, high = (number(value[name]) for name in ("median", "low", "high"))
    return f"{median}{sign}" if low == high else f"{median}{sign} ({low}–{high})"


def number(value: float) -> str:
    """Return a number with three significant digits, or all before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def caption(record: dict[str, Any]) -> str:
    """Return one line: when, on what, with what."""
    environment = record["environment"]
    hardware, versions = environment["hardware"], environment["versions"]
    machine = f"{hardware['cpu']}, {hardware['threads']} threads" + (f", {hardware['gpu']}" if hardware["gpu"] else "")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "tailscope")
    return (
        f"{record['created'][:10]}, {machine} (load before: {record['load_before']:g}), {packages};"
        f" {record['size']} size, {record['seconds'] / 60:.1f} minutes. Median (lowest–highest) of the rounds."
    )
