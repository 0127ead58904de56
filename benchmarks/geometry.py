"""geometry: all measurements of every class against scikit-learn and NumPy per class, and against the machine."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Arm, Measured, Spread, Worker, interleave, paired
from benchmarks.record import Options, Record, Row, joined


@dataclass(frozen=True)
class Shape:
    """Features: rows, dimension, classes, and of how many classes the rival is measured."""

    rows: int
    dimension: int
    classes: int
    measured: int

    def __str__(self) -> str:
        """Name the shape."""
        return f"({self.rows:,}, {self.dimension:,}, {self.classes:,})"

    @property
    def features_bytes(self) -> int:
        """Size of the float32 features."""
        return 4 * self.rows * self.dimension


def train_counts(rows: int, classes: int) -> list[int]:
    """Return a long-tailed training count a class: from half of a class's rows down to a hundredth of that, at least 2.

    The class's other rows are unseen.

    >>> train_counts(50_000, 100)[0], train_counts(50_000, 100)[-1]
    (250, 2)
    """
    most = rows // classes // 2
    return [max(2, int(most * 100 ** (-k / (classes - 1)))) for k in range(classes)]


def flops(shape: Shape) -> float:
    """Return the floating-point operations of the matrix products that the definitions need.

    Per class the smaller of the Gram matrix and the covariance, unseen against training samples for the leave-one-out
    angles, and every sample against the classes' centres: training samples against both kinds.

    >>> flops(Shape(rows=40, dimension=10, classes=2, measured=1))
    12800.0
    """
    d, classes = shape.dimension, shape.classes
    per_class = shape.rows // classes
    total = 0.0
    for n in train_counts(shape.rows, classes):
        total += 2 * per_class * d * min(per_class, d)
        total += 2 * n * (per_class - n) * d
        total += 2 * d * classes * (n + per_class)
    return total


REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 8.0
"""What a whole process may take at the size of the goals, on two cores."""


@dataclass(frozen=True)
class Size:
    """Shapes, the one that the goals are for, and the permutations of the rows that have some."""

    shapes: tuple[Shape, ...]
    goal: int
    permutations: int
    permuted: int
    rounds: int
    gemm: int


SIZES = {
    "full": Size((Shape(50_000, 64, 100, 20), Shape(200_000, 512, 1_000, 20), Shape(115_000, 2_048, 1_000, 10)),
                 1, 999, 2, 3, 3_072),
    "quick": Size((Shape(50_000, 512, 250, 5),), 0, 99, 2, 2, 2_048),
    "tiny": Size((Shape(400, 8, 10, 3),), 0, 19, 2, 1, 64),
}  # fmt: skip


def run(options: Options) -> Record:
    """Measure every shape and return the rows."""
    size = SIZES[options.size]
    record = Record("geometry", options)
    for i, shape in enumerate(size.shapes):
        goals = i == size.goal
        measured = interleave(_arms(shape, size, options), rounds=size.rounds, seconds=0.0, inline=options.inline)
        record.rows += _engine_rows(measured, shape, goals)
        record.rows += _process_rows(shape, goals, size.rounds if goals else 1, options)
        record.raw[str(shape)] = {name: m.raw() for name, m in measured.items()}
    record.rows += _permutation_rows(size.shapes[size.goal], size, options)
    return record


def _arms(shape: Shape, size: Size, options: Options) -> dict[str, Arm]:
    features = {"rows": shape.rows, "dimension": shape.dimension, "classes": shape.classes}
    megabytes = max(1, min(512, shape.features_bytes >> 20))
    device = {"device": options.device}
    return {
        "ours": Arm("benchmarks.arms.ours:geometry", {**features, "permutations": 0, **device}, warm_up=1),
        "rival": Arm(
            "benchmarks.arms.geometry_sklearn:engine",
            {**features, "measured": shape.measured, "permutations": 0},
            warm_up=1,
        ),
        "gemm": Arm("benchmarks.arms.rivals:matrix_product", {"size": size.gemm, **device}),
        "read": Arm("benchmarks.arms.rivals:read_memory", {"megabytes": megabytes, **device}),
    }


def _engine_rows(measured: dict[str, Measured], shape: Shape, goals: bool) -> list[Row]:
    ours = [s * shape.rows for s in measured["ours"].per_item]
    centers = float(measured["rival"].info["centers_seconds"])
    rival = [centers + s * shape.classes for s in measured["rival"].per_item]
    pairs = zip(measured["gemm"].per_item, measured["read"].per_item, strict=True)
    floor = [max(gemm * flops(shape), read * shape.features_bytes) for gemm, read in pairs]
    return [
        Row(f"{shape} tailscope, engine", Spread.of(ours), "s", note="float32 features in memory, no permutations"),
        Row(
            f"{shape} scikit-learn and NumPy per class",
            Spread.of(rival),
            "s",
            paired(rival, ours),
            "this / ours",
            20.0 if goals else None,
            note=f"measured on {shape.measured} of {shape.classes:,} classes; all centres: {centers:.2f} s",
        ),
        Row(
            f"{shape} floor: products at the measured float32 rate, or one read",
            Spread.of(floor),
            "s",
            paired(floor, ours),
            "this / ours",
            0.4 if goals else None,
            note=joined(
                [
                    f"{flops(shape) / 1e9:,.1f} GFLOP at {measured['gemm'].rate.median / 1e9:,.0f} GFLOP/s",
                    f"{shape.features_bytes / 1e9:.2f} GB at {measured['read'].rate.median / 1e9:,.1f} GB/s",
                ]
            ),
        ),
    ]


def _process_rows(shape: Shape, goals: bool, rounds: int, options: Options) -> list[Row]:
    """Measure whole processes: start, imports, reading the features, measuring, end."""
    with tempfile.TemporaryDirectory() as folder:
        features = {"rows": shape.rows, "dimension": shape.dimension, "classes": shape.classes, "folder": folder}
        with Worker(Arm("benchmarks.arms.ours:save_features", features), inline=options.inline) as worker:
            worker.wait_until_ready()
        ours, rival, peaks = [], [], []
        for _ in range(rounds):
            seconds, report = _whole("ours", folder, shape, options)
            ours.append(seconds)
            peaks.append(report["peak_bytes"])
            if goals:
                seconds, report = _whole("sklearn", folder, shape, options)
                rival.append(seconds + report["loop_seconds"] * (shape.classes / shape.measured - 1))
    megabytes = [(peak - shape.features_bytes) / 1e6 for peak in peaks]
    rows = [
        Row(
            f"{shape} tailscope, whole process",
            Spread.of(ours),
            "s",
            paired(ours, [SECONDS] * rounds) if goals else None,
            f"this / {SECONDS:.0f} s" if goals else "",
            1.0 if goals else None,
            at_most=True,
            note="diagnose --no-verdict --permutations 0 --no-report: start, reading, checking, measuring, writing",
        ),
        Row(
            f"{shape} its peak memory beyond the features",
            Spread.of(megabytes),
            "MB",
            paired(megabytes, [1000.0] * rounds),
            "this / 1 GB",
            1.0,
            at_most=True,
            note=f"features {shape.features_bytes / 1e6:,.0f} MB",
        ),
    ]
    if goals:
        note = f"measured on {shape.measured} of {shape.classes:,} classes"
        ratio = paired(rival, ours)
        rows.append(
            Row(f"{shape} scikit-learn, whole process", Spread.of(rival), "s", ratio, "this / ours", 10.0, note=note)
        )
    return rows


def _whole(engine: str, folder: str, shape: Shape, options: Options) -> tuple[float, dict[str, Any]]:
    """Run a process to its end; return its seconds and what it reported."""
    arguments = [engine, folder, str(shape.classes), str(shape.measured)]
    started = time.perf_counter()
    if options.inline:
        from benchmarks.arms.geometry_sklearn import whole

        report: dict[str, Any] = dict(whole(engine, folder, shape.classes, shape.measured))
    else:
        command = [sys.executable, "-m", "benchmarks.arms.geometry_sklearn", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
        report = json.loads(done.stdout)
    return time.perf_counter() - started, report


def _permutation_rows(shape: Shape, size: Size, options: Options) -> list[Row]:
    """Measure the engine with permutations once, against the rival's loop on a few classes."""
    features = {"rows": shape.rows, "dimension": shape.dimension, "classes": shape.classes}
    drawn = {**features, "permutations": size.permutations}
    measured = interleave(
        {
            "ours": Arm("benchmarks.arms.ours:geometry", {**drawn, "device": options.device}, warm_up=0),
            "rival": Arm(
                "benchmarks.arms.geometry_sklearn:engine", {**drawn, "measured": size.permuted}, warm_up=0
            ),
        },
        rounds=1,
        seconds=0.0,
        inline=options.inline,
    )  # fmt: skip
    ours = [s * shape.rows for s in measured["ours"].per_item]
    rival = [float(measured["rival"].info["centers_seconds"]) + s * shape.classes for s in measured["rival"].per_item]
    what = f"{size.permutations} permutations"
    return [
        Row(f"{shape} tailscope, engine, {what}", Spread.of(ours), "s", note="once"),
        Row(
            f"{shape} scikit-learn and NumPy per class, {what}",
            Spread.of(rival),
            "s",
            paired(rival, ours),
            "this / ours",
            note=f"measured on {size.permuted} of {shape.classes:,} classes; leaves out chance separation of centres"
            " and the repetition with unit vectors",
        ),
    ]
