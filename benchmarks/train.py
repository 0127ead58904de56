"""train: images a second of the stage-1 step, everything included, against the loops people write and the limit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Measured, fastest, interleave, paired
from benchmarks.record import Options, Record, Row, joined
from benchmarks.workers import Arm


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
    """Return our engine as an arm; its slices hold whole chunks, since a chunk is augmented at once."""
    settings = {
        "data": options.data, "images": size.images, "batch": size.batch, "model": size.model,
        "device": options.device,
    }  # fmt: skip
    return Arm("benchmarks.arms.ours:train", {**settings, **changes}, multiple=size.chunk)


def textbook(size: Any, options: Options, workers: int, **changes: Any) -> Arm:
    """Return the textbook loop as an arm."""
    settings = {
        "data": options.data, "images": size.images, "batch": size.batch, "model": size.model,
        "workers": workers, "device": options.device,
    }  # fmt: skip
    return Arm("benchmarks.arms.textbook:train", {**settings, **changes}, settle=SETTLE if workers else 0)


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
    shared = {"batch": size.batch, "model": size.model, "device": options.device}
    tuned = {**shared, "data": options.data, "images": size.images, "compile": size.compile}
    return {
        "ours": ours(size, options),
        **({"ours_compiled": ours(size, options, compile=True)} if size.compile else {}),
        "tuned": Arm("benchmarks.arms.tuned:train", {**tuned, "keep_memory": False}),
        "tuned_kept": Arm("benchmarks.arms.tuned:train", {**tuned, "keep_memory": True}),
        "limit": Arm("benchmarks.arms.limits:convolutions", shared),
    }


def _rows(measured: dict[str, Measured], workers: dict[str, int], size: Size, options: Options) -> list[Row]:
    how = "compiled" if size.compile else "eager"
    images = options.images_note

    def row(name: str, what: str, note: str, goal: float | None = None) -> Row:
        arm = measured[name]
        seen = f"measured on {arm.items:,} images"
        ratio = paired(arm.per_item, measured["ours"].per_item)
        return Row(what, arm.rate, "images/s", ratio, "ours / this", goal, note=joined([note, seen, images]))

    def loader(name: str) -> str:
        return f"best of {' and '.join(map(str, size.workers))} workers: {workers[name]}"

    return [
        Row("tailscope", measured["ours"].rate, "images/s", note=joined(["fused batch norm, not compiled", images])),
        row("textbook", "textbook loop: PIL, DataLoader, fp32, eager", loader("textbook"), 3.0),
        row("lightning", "the same in Lightning", loader("lightning"), 3.0),
        row("tuned", f"tuned loop: bf16, channels-last, {how}, batched augmentation", "glibc's default allocator", 1.2),
        row("tuned_kept", "the tuned loop with our allocator setting", "keeps freed memory"),
        row("limit", "limit: the step's convolutions and products alone", "keeps freed memory", 0.7),
        *([_compiled(measured, row)] if size.compile else []),
    ]


def _compiled(measured: dict[str, Measured], row: Callable[[str, str, str], Row]) -> Row:
    """Return our step compiled by PyTorch, in place of the fused kernel."""
    arm = measured["ours_compiled"]
    warm_up = arm.warm_up.seconds - arm.warm_up.items * arm.seconds_per_item.median
    return row("ours_compiled", "tailscope, compiled by PyTorch instead", f"compiling took {warm_up:.0f} s")
