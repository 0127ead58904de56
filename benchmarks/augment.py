"""augment: what MixUp and AutoAugment cost our engine, and the textbook loop."""

from dataclasses import dataclass

from benchmarks.measure import interleave, paired
from benchmarks.record import Options, Record, Row, joined
from benchmarks.train import ours, textbook


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    images: int
    batch: int
    model: str
    rounds: int
    seconds: float
    chunk: int
    workers: int


SIZES = {
    "full": Size(49_152, 128, "resnet32", 3, 8.0, 64, 2),
    "quick": Size(512, 128, "resnet32", 1, 1.5, 4, 0),
    "tiny": Size(32, 16, "resnet8(width=8)", 1, 0.0, 2, 0),
}
VARIANTS = {"plain": {}, "mixup": {"mixup": True}, "autoaugment": {"autoaugment": True}}
GOALS = {"mixup": 0.95, "autoaugment": 0.85}
NAMES = {"plain": "crop and flip", "mixup": "with MixUp", "autoaugment": "with AutoAugment"}


def run(options: Options) -> Record:
    """Measure both loops with each augmentation and return the rows."""
    size = SIZES[options.size]
    arms = {f"ours_{name}": ours(size, options, **change) for name, change in VARIANTS.items()}
    arms |= {f"textbook_{name}": textbook(size, options, size.workers, **change) for name, change in VARIANTS.items()}
    measured = interleave(arms, rounds=size.rounds, seconds=size.seconds, inline=options.inline)
    record = Record("augment", options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    for name in VARIANTS:
        mine, rival = measured[f"ours_{name}"], measured[f"textbook_{name}"]
        cost = paired(measured["ours_plain"].per_item, mine.per_item) if name != "plain" else None
        note = joined(["AutoAugment drawn for every image" if name == "autoaugment" else "", options.images_note])
        what = f"tailscope, {NAMES[name]}"
        record.rows.append(Row(what, mine.rate, "images/s", cost, "this / without", GOALS.get(name), note=note))
        record.rows.append(
            Row(
                f"textbook loop, {NAMES[name]}",
                rival.rate,
                "images/s",
                paired(rival.per_item, mine.per_item),
                "ours / this",
                note=joined([f"{size.workers} workers", f"measured on {rival.items:,} images", options.images_note]),
            )
        )
    return record
