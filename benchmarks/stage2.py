"""stage2: fitting classifiers on stored views against running the frozen backbone again for every epoch."""

from dataclasses import dataclass

from benchmarks.measure import Arm, Measured, Spread, interleave, paired
from benchmarks.record import Options, Record, Row, joined

EPOCHS = 10
BATCH = 512
CLASSIFIERS = (2, 4, 8)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    images: int
    model: str
    dimension: int
    rounds: int
    seconds: float
    workers: int


SIZES = {
    "full": Size(5_000, "resnet32", 64, 5, 6.0, 2),
    "quick": Size(512, "resnet32", 64, 2, 1.5, 0),
    "tiny": Size(40, "resnet8(width=8)", 32, 1, 0.0, 0),
}


def run(options: Options) -> Record:
    """Measure extraction, fits and re-runs, and return the rows."""
    size = SIZES[options.size]
    shared = {"data": options.data, "images": size.images, "model": size.model, "device": options.device}
    batch = min(BATCH, size.images)
    fit = {"images": size.images, "dimension": size.dimension, "views": EPOCHS, "epochs": EPOCHS}
    measured = interleave(
        {
            "fit": Arm("benchmarks.arms.ours:fit", {**fit, "device": options.device}, warm_up=1),
            "extract": Arm("benchmarks.arms.ours:extract_views", shared, warm_up=1),
            "rerun": Arm("benchmarks.arms.ours:rerun", {**shared, "batch": batch}),
            "textbook": Arm(
                "benchmarks.arms.rivals:textbook_classifier",
                {**shared, "batch": batch, "workers": size.workers},
                settle=4 if size.workers else 0,
            ),
        },
        rounds=size.rounds,
        seconds=size.seconds,
        inline=options.inline,
    )
    record = Record("stage2", options)
    record.rows = _rows(measured, size, options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    return record


def _rows(measured: dict[str, Measured], size: Size, options: Options) -> list[Row]:
    images = EPOCHS * size.images
    fits = [s * size.images for s in measured["fit"].per_item]
    extraction, rerun, textbook = ([s * images for s in measured[n].per_item] for n in ("extract", "rerun", "textbook"))

    def fraction(name: str) -> str:
        return f"measured on {measured[name].items:,} images, stated for {images:,}; {options.images_note}"

    rows = [
        Row(f"one fit on {EPOCHS} stored views, {EPOCHS} epochs", Spread.of(fits), "s", note=f"{size.images:,} images"),
        Row(f"extracting the {EPOCHS} views, once a backbone", Spread.of(extraction), "s", note=fraction("extract")),
        Row(
            "the backbone run again each epoch, with our kernels",
            Spread.of(rerun),
            "s",
            paired(rerun, fits),
            "this / one fit",
            50.0,
            note=fraction("rerun"),
        ),
        Row(
            "the same through the textbook loop",
            Spread.of(textbook),
            "s",
            paired(textbook, fits),
            "this / one fit",
            note=joined([f"{size.workers} workers", fraction("textbook")]),
        ),
    ]
    for k in CLASSIFIERS:
        stored = [e + k * f for e, f in zip(extraction, fits, strict=True)]
        again = [k * r for r in rerun]
        gain = paired(again, stored)
        per_classifier = Spread(gain.median / k, gain.low / k, gain.high / k)
        note = f"{gain.median:.1f} times {k} re-runs with our kernels"
        what = f"{k} classifiers on one backbone, extraction included"
        rows.append(Row(what, Spread.of(stored), "s", per_classifier, f"{k} re-runs / this / {k}", 0.8, note=note))
    return rows
