"""train: images a second of the stage-1 step, everything included, against the loops people write and the limit."""

from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Arm, Measured, fastest, interleave, paired
from benchmarks.record import Options, Record, Row, joined
from tailscope.networks.norm_act import cpu_field


@dataclass(frozen=True)
class Size:
    """How much is measured; `chunk` is how many steps our engine augments at once, `compile` is for the rivals."""

    images: int
    batch: int
    model: str
    rounds: int
    seconds: float
    compile: bool
    chunk: int
    workers: tuple[int, ...]


SIZES = {
    "full": Size(49_152, 128, "resnet32", 6, 4.0, True, 64, (0, 2)),
    "quick": Size(512, 128, "resnet32", 2, 1.5, False, 4, (0,)),
    "tiny": Size(32, 16, "resnet8(width=8)", 1, 0.0, False, 2, (0,)),
}
SETTLE = 4
PLAIN_GOAL = 0.97
"""Never slower than PyTorch alone, but for what two measurements of the same differ by."""
TUNED_GOAL, TUNED_GOAL_AMX = 1.0, 1.3
"""Of the tuned loop; where the convolutions are fast, what is between them counts for more."""


def run(options: Options) -> Record:
    """Measure all arms and return the rows."""
    size = SIZES[options.size]
    record = Record("train", options)
    rivals = {name: _choose(_loop(name, size, options), size, options) for name in ("textbook", "lightning")}
    measured = interleave(
        {**_arms(size, options), **{name: arm for name, (arm, _) in rivals.items()}},
        rounds=size.rounds,
        seconds=size.seconds,
        inline=options.inline,
    )
    record.rows = _rows(measured, {name: workers for name, (_, workers) in rivals.items()}, size, options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    return record


def ours(size: Any, options: Options, **changes: Any) -> Arm:
    """Return our training as an arm; its slices hold whole chunks, since a chunk is augmented at once."""
    return Arm("benchmarks.arms.ours:train", {**settings(size, options), **changes}, multiple=size.chunk)


def textbook(size: Any, options: Options, workers: int, **changes: Any) -> Arm:
    """Return the textbook loop as an arm."""
    given = {**settings(size, options), "workers": workers, **changes}
    return Arm("benchmarks.arms.rivals:textbook", given, settle=SETTLE if workers else 0)


def settings(size: Any, options: Options) -> dict[str, Any]:
    """Return what every arm that trains is given."""
    return {
        "data": options.data, "images": size.images, "batch": size.batch, "model": size.model, "device": options.device,
    }  # fmt: skip


def _loop(name: str, size: Size, options: Options) -> dict[int, Arm]:
    """Return a loop with each number of workers."""
    arms = {workers: textbook(size, options, workers) for workers in size.workers}
    if name == "textbook":
        return arms
    return {w: Arm("benchmarks.arms.lightning_loop:train", a.settings, a.settle) for w, a in arms.items()}


def _choose(arms: dict[int, Arm], size: Size, options: Options) -> tuple[Arm, int]:
    """Return the loop with the better number of workers, and that number."""
    by_name = {str(workers): arm for workers, arm in arms.items()}
    best = int(fastest(by_name, seconds=size.seconds / 2, inline=options.inline))
    return arms[best], best


def _arms(size: Size, options: Options) -> dict[str, Arm]:
    tuned = {**settings(size, options), "compile": size.compile}
    limit = {"batch": size.batch, "model": size.model, "device": options.device}
    return {
        **{engine: ours(size, options, engine=engine) for engine in _plain(size)},
        "ours": ours(size, options),
        "tuned": Arm("benchmarks.arms.rivals:tuned", {**tuned, "keep_memory": False}),
        "tuned_kept": Arm("benchmarks.arms.rivals:tuned", {**tuned, "keep_memory": True}),
        "limit": Arm("benchmarks.arms.rivals:convolutions", limit),
    }


def _plain(size: Size) -> tuple[str, ...]:
    """Return the engines that are PyTorch alone."""
    return ("eager", "compiled") if size.compile else ("eager",)


def _rows(measured: dict[str, Measured], workers: dict[str, int], size: Size, options: Options) -> list[Row]:
    how = "compiled" if size.compile else "eager"
    images, mine = options.images_note, measured["ours"]

    def row(name: str, what: str, note: str, goal: float | None = None) -> Row:
        arm = measured[name]
        seen = f"measured on {arm.items:,} images"
        return Row(
            what, arm.rate, "images/s", paired(arm.per_item, mine.per_item), "ours / this", goal,
            note=joined([note, seen, images]),
        )  # fmt: skip

    def loader(name: str) -> str:
        return f"best of {' and '.join(map(str, size.workers))} workers: {workers[name]}"

    return [
        Row("tailscope", mine.rate, "images/s", note=joined([f"engine {mine.info['engine']}, by itself", images])),
        *(row(e, f"the same path by PyTorch alone, {e}", _warm_up(measured[e]), PLAIN_GOAL) for e in _plain(size)),
        row("textbook", "textbook loop: PIL, DataLoader, fp32, eager", loader("textbook"), 3.0),
        row("lightning", "the same in Lightning", loader("lightning"), 3.0),
        row(
            "tuned", f"tuned loop: bf16, channels-last, {how}, batched augmentation", "glibc's default allocator",
            TUNED_GOAL_AMX if "amx_bf16" in cpu_field("flags").split() else TUNED_GOAL,
        ),
        row("tuned_kept", "the tuned loop with our allocator setting", "keeps freed memory"),
        row("limit", "limit: the step's convolutions and products alone", "keeps freed memory", 0.7),
    ]  # fmt: skip


def _warm_up(arm: Measured) -> str:
    """Return how long a compiled arm's first steps took beyond what steps take."""
    seconds = arm.warm_up.seconds - arm.warm_up.items * arm.seconds_per_item.median
    return f"compiling took {seconds:.0f} s" if arm.info["engine"] == "compiled" else ""


# -- augmentation ---------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, bool]] = {"plain": {}, "mixup": {"mixup": True}, "autoaugment": {"autoaugment": True}}
AUGMENT_GOALS = {"mixup": 0.95, "autoaugment": 0.85}
AUGMENT_NAMES = {"plain": "crop and flip", "mixup": "with MixUp", "autoaugment": "with AutoAugment"}


def augment(options: Options) -> Record:
    """Measure what MixUp and AutoAugment cost our engine, and the textbook loop with its largest number of workers."""
    size = SIZES[options.size]
    workers = size.workers[-1]
    arms = {f"ours_{name}": ours(size, options, **change) for name, change in VARIANTS.items()}
    arms |= {f"textbook_{name}": textbook(size, options, workers, **change) for name, change in VARIANTS.items()}
    measured = interleave(arms, rounds=size.rounds, seconds=size.seconds, inline=options.inline)
    record = Record("augment", options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    for name, title in AUGMENT_NAMES.items():
        mine, rival = measured[f"ours_{name}"], measured[f"textbook_{name}"]
        cost = paired(measured["ours_plain"].per_item, mine.per_item) if name != "plain" else None
        note = joined(["AutoAugment drawn for every image" if name == "autoaugment" else "", options.images_note])
        goal = AUGMENT_GOALS.get(name)
        record.rows.append(Row(f"tailscope, {title}", mine.rate, "images/s", cost, "this / without", goal, note=note))
        ratio = paired(rival.per_item, mine.per_item)
        note = joined([f"{workers} workers", f"measured on {rival.items:,} images", options.images_note])
        record.rows.append(Row(f"textbook loop, {title}", rival.rate, "images/s", ratio, "ours / this", note=note))
    return record


# -- several trainings at a time ------------------------------------------------------------------------------------

JOBS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8)}
JOBS_GOALS = {"cpu": 1.1, "cuda": 2.5}
"""Of the most trainings at a time."""


def concurrent(options: Options) -> Record:
    """Measure what several trainings at a time are worth, against one alone on the whole machine."""
    size, device = SIZES[options.size], options.device.split(":")[0]
    arms = {str(jobs): _together(jobs, size, options) for jobs in JOBS[device]}
    rounds = max(1, size.rounds // 2)
    measured = interleave(arms, rounds=rounds, seconds=2 * size.seconds, inline=options.inline)
    record = Record("concurrent", options)
    record.raw = {name: m.raw() for name, m in measured.items()}
    alone = measured["1"]
    note = joined([f"engine {alone.info['engine']}", options.images_note])
    record.rows.append(Row("one training alone", alone.rate, "images/s", note=note))
    how = "a stream of the GPU each" if device == "cuda" else "a share of the cores each"
    for jobs in JOBS[device][1:]:
        several = measured[str(jobs)]
        ratio = paired(alone.per_item, several.per_item)
        seen = f"measured on {several.items:,} images"
        note = joined([f"engine {several.info['engine']}", how, seen, options.images_note])
        goal = JOBS_GOALS[device] if jobs == max(JOBS[device]) else None
        name = f"{jobs} trainings at a time, together"
        record.rows.append(Row(name, several.rate, "images/s", ratio, "this / one alone", goal, note=note))
    return record


def _together(jobs: int, size: Size, options: Options) -> Arm:
    """Return so many trainings as an arm; they wait for one another after every chunk."""
    if jobs == 1:  # as it runs without --jobs, in the main thread
        return ours(size, options)
    given = {**settings(size, options), "jobs": jobs, "stretch": size.chunk}
    return Arm("benchmarks.arms.ours:train_together", given, warm_up=1)
