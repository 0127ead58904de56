"""concurrent: what several trainings at a time are worth, against one alone on the whole machine."""

from dataclasses import dataclass

from benchmarks.measure import interleave, paired
from benchmarks.record import Options, Record, Row, joined
from benchmarks.workers import Arm


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
GPU_GOAL = 2.5


def run(options: Options) -> Record:
    """Measure each number of trainings and return the rows."""
    size = SIZES[options.size]
    device = options.device.split(":")[0]
    arms = {str(jobs): _arm(jobs, size, options) for jobs in JOBS[device]}
    measured = interleave(arms, rounds=size.rounds, seconds=size.seconds, inline=options.inline)
    record = Record("concurrent", options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    alone = measured["1"]
    record.rows.append(Row("one training alone", alone.rate, "images/s", note=options.images_note))
    for jobs in JOBS[device][1:]:
        several = measured[str(jobs)]
        goal = GPU_GOAL if device == "cuda" and jobs == max(JOBS[device]) else None
        how = "a stream of the GPU each" if device == "cuda" else "a share of the cores each"
        record.rows.append(
            Row(
                f"{jobs} trainings at a time, together",
                several.rate,
                "images/s",
                paired(alone.per_item, several.per_item),
                "this / one alone",
                goal,
                note=joined([how, f"measured on {several.items:,} images", options.images_note]),
            )
        )
    return record


def _arm(jobs: int, size: Size, options: Options) -> Arm:
    settings = {
        "data": options.data, "images": size.images, "batch": size.batch, "model": size.model,
        "device": options.device,
    }  # fmt: skip
    if jobs == 1:  # as it runs without --jobs, in the main thread
        return Arm("benchmarks.arms.ours:train", settings, multiple=size.stretch)
    return Arm("benchmarks.arms.concurrent:train", {**settings, "jobs": jobs, "stretch": size.stretch}, warm_up=1)
