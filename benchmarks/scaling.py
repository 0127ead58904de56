"""scaling and breakdown: how time and memory per unit grow with size, and where each millisecond goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.geometry import Shape
from benchmarks.measure import Arm, Spread, Worker, interleave, paired
from benchmarks.record import Options, Record, Row, joined

PARTS = {1: "all", 4: "a quarter", 16: "a sixteenth"}


@dataclass(frozen=True)
class Size:
    """The full sizes, of which parts are taken."""

    train_images: int
    swap_images: int
    stage2_images: int
    shape: Shape
    batch: int
    model: str
    profile: str
    rounds: int


SIZES = {
    "full": Size(49_152, 5_000, 5_000, Shape(200_000, 512, 1_000, 1), 128, "resnet32", "exp:10", 2),
    "quick": Size(1_024, 480, 960, Shape(20_000, 64, 100, 1), 32, "resnet8", "exp:10", 1),
    "tiny": Size(256, 320, 320, Shape(640, 8, 10, 1), 16, "resnet8(width=2)", "exp:2", 1),
}


def run(options: Options) -> Record:
    """Measure each task at 1/16, 1/4 and 1 of the sizes of the other benchmarks and return the rows."""
    size = SIZES[options.size]
    record = Record("scaling", options)
    images, test_images = options.images_note, max(20, size.swap_images // 5)
    shared = {"data": options.data, "model": size.model, "device": options.device}

    def stage1(n: int) -> Arm:
        settings = {**shared, "images": n, "batch": size.batch}
        return Arm("benchmarks.arms.ours:train", settings, multiple=_chunk(n // size.batch))

    def swaps(n: int) -> Arm:
        settings = {**shared, "train_images": n, "test_images": test_images * n // size.swap_images}
        settings |= {"batch": size.batch, "profile": size.profile}
        return Arm("benchmarks.arms.ours:swap_repeatedly", settings, warm_up=0)

    def views(n: int) -> Arm:
        return Arm("benchmarks.arms.ours:extract_views", {**shared, "images": n}, warm_up=1)

    def fits(n: int) -> Arm:
        settings = {"images": n, "dimension": 64, "views": 10, "epochs": 10, "device": options.device}
        return Arm("benchmarks.arms.ours:fit", settings, warm_up=1)

    def geometry(n: int) -> Arm:
        shape = {"dimension": size.shape.dimension, "classes": size.shape.classes, "permutations": 0}
        return Arm("benchmarks.arms.ours:geometry", {**shape, "rows": n, "device": options.device}, warm_up=1)

    _measure(record, "train", "us/image", size.train_images, stage1, size, images)
    _measure(record, "swap, one epoch and view", "us/image", size.swap_images, swaps, size, images)
    _measure(record, "stage 2, extraction", "us/image", size.stage2_images, views, size, images)
    _measure(record, "stage 2, fit", "us/image", size.stage2_images, fits, size, "random features")
    _measure(record, "geometry", "us/row", size.shape.rows, geometry, size, f"{size.shape.classes:,} classes each")
    return record


def _chunk(steps: int) -> int:
    """Return after how many steps of an epoch of `steps` our engine's work repeats: 64 are augmented at once."""
    return 64 if steps % 64 == 0 else steps


def _measure(record: Record, task: str, unit: str, full: int, arm: Callable[[int], Arm], size: Size, note: str) -> None:
    """Add a task's three rows."""
    arms = {name: arm(full // part) for part, name in PARTS.items()}
    inline = record.options.inline
    measured = interleave(arms, rounds=size.rounds, seconds=0.0 if inline else 1.0, inline=inline)
    for part, name in PARTS.items():
        found = measured[name]
        seconds = found.seconds_per_item
        record.rows.append(
            Row(
                f"{task}: {name}, {full // part:,}",
                Spread(seconds.median * 1e6, seconds.low * 1e6, seconds.high * 1e6),
                unit,
                None if part == 1 else paired(measured["all"].per_item, found.per_item),
                "" if part == 1 else "all / this",
                note=joined([f"process's peak memory {found.peak_bytes / 1e6:,.0f} MB", note]),
            )
        )
    record.raw[task] = {name: m.raw() for name, m in measured.items()}


# -- breakdown ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profiled:
    """What is profiled."""

    images: int
    batch: int
    model: str
    steps: int
    engines: tuple[str, ...]
    shape: Shape
    permutations: tuple[int, ...]


PROFILED = {
    "full": Profiled(2_048, 128, "resnet32", 16, ("fused", "compiled"), Shape(200_000, 512, 1_000, 1), (0, 999)),
    "quick": Profiled(512, 128, "resnet32", 4, ("fused",), Shape(20_000, 64, 100, 1), (0,)),
    "tiny": Profiled(32, 16, "resnet8(width=2)", 2, ("fused",), Shape(200, 8, 10, 1), (0,)),
}


def breakdown(options: Options) -> Record:
    """Profile each part of our training step and of our geometry, and return the rows, largest first."""
    size = PROFILED[options.size]
    record = Record("breakdown", options)
    training = {
        "data": options.data, "images": size.images, "batch": size.batch, "model": size.model, "steps": size.steps,
        "device": options.device,
    }  # fmt: skip
    for engine in size.engines:
        parts = _profile("training", {**training, "engine": engine}, options)
        what = f"training step, engine {engine}"
        record.rows += _parts(what, parts, "whole step", "ms/step", 1.0)
        record.raw[what] = parts
    geometry = {"rows": size.shape.rows, "dimension": size.shape.dimension, "classes": size.shape.classes}
    for permutations in size.permutations:
        settings = {**geometry, "permutations": permutations, "device": options.device}
        parts = _profile("geometry", settings, options)
        what = f"geometry {size.shape}, {permutations} permutations, one thread"
        record.rows += _parts(what, parts, "whole", "ms", 1000.0)
        record.raw[what] = parts
    return record


def _profile(name: str, settings: dict[str, Any], options: Options) -> dict[str, float]:
    arm = Arm(f"benchmarks.arms.ours:profile_{name}", settings)
    with Worker(arm, inline=options.inline) as worker:
        worker.wait_until_ready()
        return worker.run(0.0).result or {}


def _parts(what: str, parts: dict[str, float], whole: str, unit: str, scale: float) -> list[Row]:
    """Return the whole and its parts above one per cent, as shares of the whole; the profiler slows all of them."""
    total = parts[whole]
    rows = [Row(what, Spread.of([total * scale]), unit, note="under the profiler, which slows it")]
    for name, value in sorted(parts.items(), key=lambda part: -part[1]):
        share = value / total
        if name != whole and share >= 0.01:
            rows.append(Row(f"— {name}", Spread.of([value * scale]), unit, Spread.of([share]), "of the whole"))
    return rows
