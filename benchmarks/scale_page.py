"""The tables of docs/scale.md on rows, and on what all of it costs: from results/bench/scale.json and other results.

What was not measured is extrapolated from what was, and says how. Prices are not known here: hours of a processor are
given as so many times P, the price of one processor for an hour.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.record import number, origin
from benchmarks.scale import GIB
from tailscope.diagnosis.memory import Shape, in_words, needed

RESULTS = Path(__file__).resolve().parents[1] / "results"
IMAGENET_21K = {"rows": 14_000_000, "width": 1_024, "classes": 21_841}
SWEEPS = {"fast": "cifar10-fast", "paper": "cifar10-paper"}
RUNS = 1_000
Found = dict[str, Any]


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables, by the names of their blocks."""
    found = sorted(record["raw"].values(), key=lambda one: one["train"])
    return {
        "scale-rows": f"{_measured(found)}\n\n{origin(dict(record))}.",
        "scale-growth": _growth(found),
        "scale-21k": _extrapolated(found[-1]),
        "scale-cost": _cost(found),
    }


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measured(found: Sequence[Found]) -> str:
    head = ["training and held-out rows", "processor", "by the clock", "a row", "memory held at most", "load"]
    return _markdown(
        head,
        [
            [
                f"{one['train']:,} + {one['unseen']:,}",
                f"{one['cpu_seconds'] / 60:.1f} min",
                f"{one['seconds'] / 60:.0f} min",
                f"{number(1e3 * one['cpu_seconds'] / _rows(one))} ms",
                f"{one['peak_bytes'] / GIB:.2f} GiB of {one['memory_option']}",
                " to ".join(f"{load:g}" for load in one["load"]),
            ]
            for one in found
        ],
    )


def _rows(one: Found) -> int:
    return int(one["train"] + one["unseen"])


def _growth(found: Sequence[Found]) -> str:
    """Return what the rows between two sizes cost, each."""
    rows = []
    for one, other in pairwise(found):
        more = other["train"] - one["train"]
        seconds, held = (other[name] - one[name] for name in ("cpu_seconds", "peak_bytes"))
        per_row = [part["cpu_seconds"] / _rows(part) for part in (one, other)]
        rows.append(
            [
                f"{one['train']:,} to {other['train']:,}",
                f"{number(1e3 * seconds / more)} ms",
                f"{held / more:,.0f} bytes",
                f"{100 * (per_row[1] / per_row[0] - 1):+.0f} %",
            ]
        )
    return _markdown(["from … to … training rows", "a row more takes", "and holds", "time per row of all rows"], rows)


def _extrapolated(largest: Found) -> str:
    """Return what the largest measured size becomes with the rows, features and classes of ImageNet-21k."""
    rows, width, classes = IMAGENET_21K.values()
    by_rows = rows / _rows(largest)
    by_width = by_rows * width / largest["width"]
    by_logits = by_width * classes / largest["classes"]
    hours = largest["cpu_seconds"] / 3600
    shape = Shape(rows, width, classes, rows // classes * 10)
    memory = sum(needed(shape, True, 999, 2**27).values())
    measured = f"{_rows(largest):,} × {largest['width']:,}, {largest['classes']:,} classes"
    head = ["", f"measured: {measured}", f"ImageNet-21k: {rows:,} × {width:,}, {classes:,} classes", "how"]
    time = f"{hours:.1f} hours of a processor"
    disk = [f"{4 * values / 1e9:.1f} GB" for values in (_rows(largest) * largest["width"], rows * width)]
    held = f"{largest['peak_bytes'] / GIB:.1f} GiB"
    lines = [
        ["disk, features", *disk, "rows × features; as much again for the sorted copy"],
        ["time, at least", time, f"{hours * by_width:.0f} hours", "as rows × features"],
        ["time, at most", time, f"{hours * by_logits:,.0f} hours", "as rows × features × classes"],
        ["memory", held, in_words(memory), "what `--memory` asks for, the libraries apart"],
    ]
    return _markdown(head, lines)


def _cost(found: Sequence[Found]) -> str:
    """Return hours of a processor, as multiples of its price."""
    rows = [(f"a diagnosis of {_rows(one):,} rows", one["cpu_seconds"] / 3600, "measured") for one in found]
    largest = found[-1]
    ratio = IMAGENET_21K["rows"] * IMAGENET_21K["width"] / (_rows(largest) * largest["width"])
    least = ratio * largest["cpu_seconds"] / 3600
    rows += [
        ("the same of ImageNet-21k, at least", least, "extrapolated"),
        ("at most", least * IMAGENET_21K["classes"] / largest["classes"], "extrapolated"),
    ]
    for recipe, folder in SWEEPS.items():
        hours = _training_hours(RESULTS / folder / "swap.json")
        rows.append((f"{RUNS:,} backbones of CIFAR-10-LT, recipe `{recipe}`", RUNS * hours, f"{RUNS:,} times one"))
    cells = [[what, f"{number(hours)} h", f"{number(hours)} × P", how] for what, hours, how in rows]
    return _markdown(["", "of a processor", "at P an hour", ""], cells)


def _training_hours(path: Path) -> float:
    """Return how long a backbone took, the median of a result's."""
    provenance = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    return float(statistics.median({one["key"]: one["seconds"] for one in provenance}.values())) / 3600
