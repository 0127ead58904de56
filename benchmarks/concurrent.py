"""concurrent: what several trainings at a time are worth, against one alone on the whole machine."""

from dataclasses import dataclass

from benchmarks.measure import Arm, interleave, paired
from benchmarks.record import Options, Record, Row, joined
from benchmarks.train import settings


@dataclass(frozen=True)
class Size:
    """How much is measured; the trainings wait for one another every `stretch` steps."""

    images: int
    batch: int
    model: str
    rounds: int
    seconds: float
    stretch: int


SIZES = {
    "full": Size(49_152, 128, "resnet32", 3, 8.0, 64),
    "quick": Size(512, 128, "resnet32", 1, 1.5, 4),
    "tiny": Size(32, 16, "resnet8(width=8)", 1, 0.0, 2),
}
JOBS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8)}
GOALS = {"cpu": 1.1, "cuda": 2.5}
"""Of the most trainings at a time."""


def run(options: Options) -> Record:
    """Measure each number of trainings and return the rows."""
    size = SIZES[options.size]
    device = options.device.split(":")[0]
    arms = {str(jobs): _arm(jobs, size, options) for jobs in JOBS[device]}
    measured = interleave(arms, rounds=size.rounds, seconds=size.seconds, inline=options.inline)
    record = Record("concurrent", options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    alone, most = measured["1"], max(JOBS[device])
    engine = f"engine {alone.info['engine']}"
    record.rows.append(Row("one training alone", alone.rate, "images/s", note=joined([engine, options.images_note])))
    how = "a stream of the GPU each" if device == "cuda" else "a share of the cores each"
    for jobs in JOBS[device][1:]:
        several = measured[str(jobs)]
        ratio = paired(alone.per_item, several.per_item)
        note = joined([
            f"engine {several.info['engine']}", how, f"measured on {several.items:,} images", options.images_note,
        ])  # fmt: skip
        goal = GOALS[device] if jobs == most else None
        name = f"{jobs} trainings at a time, together"
        record.rows.append(Row(name, several.rate, "images/s", ratio, "this / one alone", goal, note=note))
    return record


def _arm(jobs: int, size: Size, options: Options) -> Arm:
    given = settings(size, options)
    if jobs == 1:  # as it runs without --jobs, in the main thread
        return Arm("benchmarks.arms.ours:train", given, multiple=size.stretch)
    return Arm("benchmarks.arms.ours:train_together", {**given, "jobs": jobs, "stretch": size.stretch}, warm_up=1)
