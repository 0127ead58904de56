"""What a benchmark leaves behind: rows with the machine and the versions that gave them, as JSON and as tables.

A table of docs/performance.md stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; the prose around is written
by hand.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import Arm, Spread, Worker
from tailscope.results import command_line, versions

# -- records ----------------------------------------------------------------------------------------------------------


PACKAGES = ("tailscope", "torch", "torchvision", "lightning", "ray", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Options:
    """How the benchmarks run.

    Attributes:
        size: full is what is published; quick shows in minutes that all works and roughly what comes out; tiny is
            for tests.
        data: an image `.npz` with CIFAR-10, or None for random images of its shape.
        device: cpu or cuda.
        cache: a folder for what may be used again, if any.
    """

    size: Literal["full", "quick", "tiny"] = "full"
    data: str | None = None
    device: str = "cpu"
    cache: str | None = None

    @property
    def inline(self) -> bool:
        """Whether arms run in threads of this process instead of processes of their own."""
        return self.size == "tiny"

    @property
    def images_note(self) -> str:
        """What the images were."""
        return "CIFAR-10" if self.data else "random images of CIFAR-10's shape"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: the arm, with what it was measured on.
        value: the measurement.
        unit: of the value.
        ratio: a comparison, paired by rounds.
        ratio_is: what was divided by what.
        goal: what the ratio should reach; at most, where `at_most`.
        note: anything a reader must know to judge the number.
    """

    what: str
    value: Spread
    unit: str
    ratio: Spread | None = None
    ratio_is: str = ""
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the median ratio reaches the goal; None without a goal."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio.median <= self.goal if self.at_most else self.ratio.median >= self.goal


@dataclass
class Record:
    """A benchmark's result file."""

    name: str
    options: Options
    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def to_json(self, hardware: dict[str, Any], load_before: float, seconds: float) -> dict[str, Any]:
        """Return the file's content.

        Args:
            hardware: what `hardware` returned.
            load_before: the machine's load average before; a busy machine's numbers are worth little.
            seconds: how long the benchmark took.
        """
        return {
            "benchmark": self.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(sys.argv[1:]).replace("tailscope", "python -m benchmarks", 1),
            "size": self.options.size,
            "images": self.options.images_note,
            "seconds": round(seconds, 1),
            "load_before": round(load_before, 2),
            "environment": {"versions": versions(PACKAGES), "hardware": hardware},
            "rows": [{**asdict(row), "reached": row.reached} for row in self.rows],
            "raw": self.raw,
        }


def document(name: str, options: Options, load_before: float, seconds: float, **content: Any) -> dict[str, Any]:
    """Return the content of results/NAME.json: a result that is no timing, and where it comes from."""
    return {
        "schema": f"tailscope.{name}/1",
        "benchmark": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]).replace("tailscope", "python -m benchmarks", 1),
        "size": options.size,
        "seconds": round(seconds),
        "load_before": round(load_before, 2),
        "environment": {"versions": versions(PACKAGES), "hardware": hardware(options)},
        **content,
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['benchmark']}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every record in a folder by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def hardware(options: Options) -> dict[str, Any]:
    """Return the machine, asked in a process of its own: this one stays free of PyTorch and small."""
    with Worker(Arm("benchmarks.arms.common:machine", {"device": options.device}), inline=options.inline) as worker:
        return worker.wait_until_ready()


def joined(parts: Sequence[str]) -> str:
    """Join the parts of a note that are not empty."""
    return "; ".join(part for part in parts if part)


# -- tables -----------------------------------------------------------------------------------------------------------


BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
MISSING = "*Not measured yet.*"


def render(text: str, tables: Mapping[str, str]) -> str:
    r"""Return the document with every block filled with the table of its name.

    >>> render("<!-- bench:x -->\nold\n<!-- /bench -->", {})
    '<!-- bench:x -->\n*Not measured yet.*\n<!-- /bench -->'
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{tables.get(match[2], MISSING)}\n{match[3]}"

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
    return f"{origin(record)}; {record['size']} size, {minutes(record)}. Median (lowest–highest) of the rounds."


def minutes(record: dict[str, Any]) -> str:
    """Return how long it took."""
    return f"{record['seconds'] / 60:.1f} minutes"


def origin(record: dict[str, Any]) -> str:
    """Return when, on what and with what a result came."""
    environment = record["environment"]
    hardware, versions = environment["hardware"], environment["versions"]
    machine = f"{hardware['cpu']}, {hardware['threads']} threads" + (f", {hardware['gpu']}" if hardware["gpu"] else "")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "tailscope")
    return f"{record['created'][:10]}, {machine} (load before: {record['load_before']:g}), {packages}"
