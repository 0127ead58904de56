"""images: files decoded and augmented against torchvision's own loader, and a whole swap on a tree of them.

hours: what a plan of ImageNet-LT says here, of this machine and of one, four and eight GPUs.

The tree is made (`tailscope.data.made`) in a temporary folder and removed at the end: 20,000 JPEGs of 200 classes.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Arm, Measured, Spread, interleave, paired
from benchmarks.record import Options, Record, Row, joined

GOAL = 0.85
"""Of what torchvision's own loader does on the same files."""


@dataclass(frozen=True)
class Size:
    """How many images of how many classes, and what is done with them; `crops`: sides, and whether colours jitter."""

    classes: int
    train: int
    test: int
    recipe: str
    profile: str
    rounds: int
    seconds: float
    workers: int
    batch: int
    crops: tuple[tuple[int, bool], ...]


_CROPS = ((224, False), (224, True), (64, True))
SIZES = {
    "full": Size(200, 90, 10, "imagenet(size=64, width=16, epochs=1)", "exp:20", 7, 3.0, 2, 32, _CROPS),
    "quick": Size(20, 45, 5, "imagenet(size=64, width=16, epochs=1, views=2)", "exp:20", 2, 1.0, 2, 32, _CROPS[:1]),
    "tiny": Size(
        4, 8, 4, "imagenet(size=24, width=4, epochs=1, batch=16, learning_rate=0.01, views=1)", "exp:2", 1, 0.0, 0, 8,
        ((24, True),)
    ),
}  # fmt: skip


def run(options: Options) -> Record:
    """Make the tree, measure both loaders on it in turn, run the swap, and return the rows."""
    size, record = SIZES[options.size], Record("images", options)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(options.cache or folder, f"tree-{options.size}")
        record.raw["tree"] = made = make_tree(tree, size)
        for crop, jitter in size.crops:
            record.rows += _loaders(tree, size, crop, options, record.raw, jitter=jitter)
        record.raw["swap"] = swapped = swap(tree, Path(folder, "out"), size)
        record.rows += _swap_rows(swapped, made, size)
    return record


# -- the tree ---------------------------------------------------------------------------------------------------------


def make_tree(root: Path, size: Size) -> dict[str, Any]:
    """Make the tree, or what a tree kept by `--cache` lacks, with a process a core; return what it is."""
    cores = os.cpu_count() or 1
    parts = [range(k, size.classes, cores) for k in range(cores)]
    sizes: list[int] = []
    for split, images in (("train", size.train), ("test", size.test)):
        write = partial(_write, root, [images] * size.classes, split)
        if size.workers:
            with ProcessPoolExecutor(cores) as pool:
                found = list(pool.map(write, parts))
        else:
            found = list(map(write, parts))
        sizes += [n for part in found for n in part]
    ordered = sorted(sizes)
    kilobytes = {name: round(ordered[int(q * (len(ordered) - 1))] / 1e3, 1) for name, q in _QUANTILES.items()}
    return {
        "images": len(sizes),
        "classes": size.classes,
        "bytes": sum(sizes),
        "kilobytes": kilobytes,
    }


_QUANTILES = {"least": 0.0, "median": 0.5, "most": 1.0}


def _write(root: Path, counts: list[int], split: str, numbers: range) -> list[int]:
    from tailscope.data.made import write_tree  # here because it imports PyTorch

    return list(write_tree(root, counts, split=split, numbers=numbers))


# -- decoding ---------------------------------------------------------------------------------------------------------


def _loaders(tree: Path, size: Size, crop: int, options: Options, raw: dict[str, Any], *, jitter: bool) -> list[Row]:
    """Measure both loaders with the same augmentation, in turn, each with the same number of workers."""
    given = {"tree": str(tree), "crop": crop, "batch": size.batch, "workers": size.workers, "jitter": jitter}
    settle = 3 * size.workers  # a worker has two batches in hand
    measured = interleave(
        {name: Arm(f"benchmarks.arms.files:{name}", given, settle, warm_up=2) for name in ("ours", "torchvision")},
        rounds=size.rounds,
        seconds=size.seconds,
        inline=options.inline,
    )
    what = f"{crop} pixels{', with colour jitter' if jitter else ''}"
    raw[f"loaders {what}"] = {name: m.raw() for name, m in measured.items()}
    ours, theirs = measured["ours"], measured["torchvision"]
    ratio = paired(theirs.per_item, ours.per_item)
    alone = interleave(
        {name: Arm(f"benchmarks.arms.files:{name}", {**given, "workers": 0}, warm_up=1) for name in measured},
        rounds=size.rounds,
        seconds=size.seconds / 3,
        inline=options.inline,
    )
    own = {name: _by_processor(m) for name, m in alone.items()}
    raw[f"loaders {what}, seconds of the processor an image"] = own
    return [
        Row(f"tailscope's loader, crops of {what}", ours.rate, "images/s", ratio, "ours / torchvision", GOAL,
            note=_seen(ours, size)),
        Row(f"torchvision's own, crops of {what}", theirs.rate, "images/s",
            note=joined(["ImageFolder, DataLoader, ToTensor, Normalize", _seen(theirs, size)])),
        Row(f"tailscope's, by the processor's own time, {what}", Spread.of([1 / s for s in own["ours"]]), "images/s",
            paired(own["torchvision"], own["ours"]), "ours / torchvision", GOAL,
            note="one process without workers; what else runs does not count"),
    ]  # fmt: skip


def _by_processor(measured: Measured) -> list[float]:
    """Return the seconds of the processor that an image took in each slice, of an arm without workers."""
    told = [measured.warm_up.told, *(s.told for s in measured.slices)]
    return [(b["cpu"] - a["cpu"]) / (b["seen"] - a["seen"]) for a, b in itertools.pairwise(told)]


def _seen(measured: Measured, size: Size) -> str:
    return f"{size.workers} workers; measured on {measured.items:,} images"


# -- the swap ---------------------------------------------------------------------------------------------------------


def swap(tree: Path, out: Path, size: Size) -> dict[str, Any]:
    """Run the swap on two processes that share the work, to its report; return what it took."""
    command = [
        "swap", "--data", f"folder:{tree}", "--profile", size.profile, "--recipe", size.recipe, "--devices", "2",
        "--device", "cpu", "--seeds", "1", "--out", str(out),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    started, load = time.monotonic(), os.getloadavg()[0]
    with out.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tailscope", *command], env={**os.environ, **threads}, stdout=log, stderr=log
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"the swap ended with {process.returncode}: {log.read()}")
    if not (out / "report.html").is_file():
        raise RuntimeError("the swap left no report")
    seconds, result = time.monotonic() - started, json.loads((out / "swap.json").read_text())
    shown = " ".join(f'"{word}"' if "(" in word else word for word in command[:-2]).replace(str(tree), "TREE")
    return {
        "command": f"tailscope {shown}",
        "seconds": seconds,
        "load_before": load,
        "phases": _phases(out / "store", seconds),
        "cpu_seconds": used.ru_utime + used.ru_stime,  # of all its processes
        "peak_bytes": used.ru_maxrss * 1024,  # of the largest of its processes
        "disk_bytes": {name: _bytes(out / name) for name in ("store", "report.html")},
        "accuracy": {name: cell["accuracy"][0] for name, cell in result["cells"].items()},
        "stage1": {name: cell["accuracy"][0] for name, cell in result["stage1"].items()},
        "warnings": result["warnings"],
    }


_KINDS = {
    "checked": "every image decoded once",
    "stage1": "backbones trained",
    "views": "augmented views for stage 2",
    "features": "test features",
    "stage2": "classifiers fitted",
}


def _phases(store: Path, seconds: float) -> list[dict[str, Any]]:
    """Return of each phase what it was, its seconds and its images, by what the stored stages say; last, the rest."""
    phases = []
    for kind, what in _KINDS.items():
        metas = [json.loads(path.read_text()) for path in sorted((store / kind).glob("*/meta.json"))]
        timed = [meta for meta in metas if "seconds" in meta]
        if timed:
            images = sum(_images(meta) for meta in timed)
            phases.append({"what": what, "seconds": sum(meta["seconds"] for meta in timed), "images": images})
    rest = seconds - sum(phase["seconds"] for phase in phases)
    return [*phases, {"what": "the rest: start, check of the files, report", "seconds": rest, "images": None}]


def _images(meta: dict[str, Any]) -> int:
    if "images" in meta:
        return int(meta["images"])
    if "images_per_second" in meta:
        return round(float(meta["images_per_second"]) * float(meta["seconds"]))
    images: int = meta["epochs"] * sum(meta["spec"]["data"]["counts"])
    return images


def _bytes(path: Path) -> int:
    found: list[int] = [p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file()]
    return sum(found)


def _swap_rows(swapped: dict[str, Any], made: dict[str, Any], size: Size) -> list[Row]:
    tree = f"{made['images']:,} images of {made['classes']} classes, {made['bytes'] / 1e9:.2f} GB"
    disk = swapped["disk_bytes"]
    rows = [
        Row("the whole swap, report included", Spread.of([swapped["seconds"]]), "s",
            note=joined(["two processes (gloo) on two cores", size.recipe, size.profile, tree])),
        *(Row(f"of it: {phase['what']}", Spread.of([phase["seconds"]]), "s",
              note=f"{phase['images']:,} images, {phase['images'] / max(phase['seconds'], 1e-9):,.0f} a second"
              if phase["images"] else "")
          for phase in swapped["phases"]),
        Row("the processor's time for the whole, both cores", Spread.of([swapped["cpu_seconds"]]), "s"),
        Row("peak memory of its largest process", Spread.of([swapped["peak_bytes"] / 1e9]), "GB"),
        Row("its store and report on disk", Spread.of([sum(disk.values()) / 1e6]), "MB"),
    ]  # fmt: skip
    return rows


# -- the plan ---------------------------------------------------------------------------------------------------------

WORKERS = 8
"""Cores that decode for each GPU, in the plan."""


def hours(options: Options) -> Record:
    """Plan Table 1 of ImageNet-LT, as the command line does, and return what it says."""
    recipe = ["--recipe", "imagenet(size=24, width=4, epochs=1)"] if options.size == "tiny" else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "reproduce", "table1", "--dataset", "imagenet-lt", "--plan", "--seeds", "1", "--device", options.device,
            "--workers", str(WORKERS), *recipe, "--json", "--out", folder,
        ]  # fmt: skip
        ended = subprocess.run([sys.executable, "-m", "tailscope", *command], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"the plan ended with {ended.returncode}: {ended.stderr}")
    found = json.loads(ended.stdout)
    rates, record = found["rates"], Record("hours", options)
    one = {"augmented": "decodes and augments", "cropped": "decodes and crops", "read": "decodes, no more"}
    for name, what in one.items():
        record.rows.append(Row(f"a core {what}", Spread.of([rates[name]]), "images/s"))
    speed = rates["trained"] or rates["step"]
    record.rows.append(Row(f"trained by {rates['processor']}", Spread.of([speed]), "images/s", note=rates["origin"]))
    record.rows += [_machine(estimate, rates) for estimate in found["estimates"]]
    for what, size in (("disk", sum(found["disk_bytes"].values())), ("memory", found["memory_bytes"])):
        record.rows.append(Row(f"{what} of features and networks", Spread.of([size / 1e9]), "GB"))
    record.raw = found
    return record


def _machine(estimate: dict[str, Any], rates: dict[str, Any]) -> Row:
    number, known = estimate["devices"], estimate["seconds"] is not None
    name = f"{number} GPU{'s' if number > 1 else ''}" if estimate["gpu"] else f"this CPU, {rates['cores']} cores"
    bound = f"bound by {estimate['bound']}" if known else "at least: no rate of a GPU is known here"
    cores = f"{number * WORKERS} cores decode" if estimate["gpu"] else ""
    return Row(name, Spread.of([estimate["at_least"] / 3600]), "h", note=joined([bound, cores]))
