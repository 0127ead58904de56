"""breakdown: where each millisecond goes in our training step and in our geometry."""

from dataclasses import dataclass
from typing import Any

from benchmarks.geometry import Shape
from benchmarks.measure import Arm, Spread, Worker
from benchmarks.record import Options, Record, Row


@dataclass(frozen=True)
class Size:
    """What is profiled."""

    images: int
    batch: int
    model: str
    steps: int
    engines: tuple[str, ...]
    shape: Shape
    permutations: tuple[int, ...]


SIZES = {
    "full": Size(2_048, 128, "resnet32", 16, ("fused", "compiled"), Shape(200_000, 512, 1_000, 1), (0, 999)),
    "quick": Size(512, 128, "resnet32", 4, ("fused",), Shape(20_000, 64, 100, 1), (0,)),
    "tiny": Size(32, 16, "resnet8(width=2)", 2, ("fused",), Shape(200, 8, 10, 1), (0,)),
}


def run(options: Options) -> Record:
    """Profile each part and return the rows, largest first."""
    size = SIZES[options.size]
    record = Record("breakdown", options)
    training = {
        "data": options.data, "images": size.images, "batch": size.batch, "model": size.model, "steps": size.steps,
        "device": options.device,
    }  # fmt: skip
    for engine in size.engines:
        parts = _profile("training", {**training, "engine": engine}, options)
        what = f"training step, engine {engine}"
        record.rows += _rows(what, parts, "whole step", "ms/step", 1.0)
        record.raw[what] = parts
    geometry = {"rows": size.shape.rows, "dimension": size.shape.dimension, "classes": size.shape.classes}
    for permutations in size.permutations:
        settings = {**geometry, "permutations": permutations, "device": options.device}
        parts = _profile("geometry", settings, options)
        what = f"geometry {size.shape}, {permutations} permutations, one thread"
        record.rows += _rows(what, parts, "whole", "ms", 1000.0)
        record.raw[what] = parts
    return record


def _profile(name: str, settings: dict[str, Any], options: Options) -> dict[str, float]:
    arm = Arm(f"benchmarks.arms.ours:profile_{name}", settings)
    with Worker(arm, inline=options.inline) as worker:
        worker.wait_until_ready()
        return worker.run(0.0).result or {}


def _rows(what: str, parts: dict[str, float], whole: str, unit: str, scale: float) -> list[Row]:
    """Return the whole and its parts above one per cent, as shares of the whole; the profiler slows all of them."""
    total = parts[whole]
    rows = [Row(what, Spread.of([total * scale]), unit, note="under the profiler, which slows it")]
    for name, value in sorted(parts.items(), key=lambda part: -part[1]):
        share = value / total
        if name != whole and share >= 0.01:
            rows.append(Row(f"— {name}", Spread.of([value * scale]), unit, Spread.of([share]), "of the whole"))
    return rows
