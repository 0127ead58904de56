"""What a benchmark leaves behind: rows, with the machine and the versions that gave them, as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import Spread
from benchmarks.workers import Arm, Worker
from tailscope.origin import command_line, versions

PACKAGES = ("tailscope", "torch", "torchvision", "lightning", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Options:
    """How the benchmarks run.

    Attributes:
        size: full is what is published; quick shows in minutes that all works and roughly what comes out; tiny is
            for tests.
        data: an image `.npz` with CIFAR-10, or None for random images of its shape.
        device: cpu or cuda.
    """

    size: Literal["full", "quick", "tiny"] = "full"
    data: str | None = None
    device: str = "cpu"

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
