"""scaling: time and memory per unit of our engine at 1/16, 1/4 and 1 of the sizes of the other benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.geometry import Shape
from benchmarks.measure import Arm, Spread, interleave, paired
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
    """Measure each task at its three sizes and return the rows."""
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
