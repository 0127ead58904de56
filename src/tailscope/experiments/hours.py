"""How long training on images in files takes on one, four or eight GPUs, how much it leaves on disk, and what binds it.

Every image passes two stations, which work at the same time: cores decode it, and a processor (a GPU, or the CPU
itself) computes on it. So a phase takes as long as its slower station; on a CPU, whose cores do both, as long as both
together. The rates of the stations are measured in a few seconds, on the images themselves; or the processor's comes
from trainings that the store remembers, or from `--rate`. Where no rate of a GPU is known, hours are not made up: what
decoding alone takes is told, and that no number of GPUs does it faster.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailscope.data.decoding import from_all_over, readable, usable_cores, was_checked
from tailscope.data.images import ImageError, Images
from tailscope.data.made import PromisedImages
from tailscope.data.sources import ImageData, load
from tailscope.device import Runtime, Solo, cpu_name, named
from tailscope.errors import UserError
from tailscope.experiments.options import Planning, Request
from tailscope.experiments.planned import Plan, other_work, planned
from tailscope.experiments.plans import check_file_options, waves_of
from tailscope.experiments.runs import Settings, require_parts, store_root
from tailscope.experiments.stages import Stages, require_trainable
from tailscope.methods import augmentations
from tailscope.networks.resnets import count_parameters
from tailscope.progress import Quiet, duration
from tailscope.seeds import torch_stream
from tailscope.store import Store
from tailscope.training.extract import fit_classifier, forward
from tailscope.training.loop import Training, new_model
from tailscope.training.recipes import Recipe

S = TypeVar("S", bound=Settings)

SECONDS = 8.0
"""How long all measurements take together, more or less."""
FEWEST = 3
"""How often a step is timed at least."""
SAMPLE = 256
"""Images that are decoded, from all over the training set, each once, at most."""
AT_ONCE = 32
"""Images of a timed step on a CPU: a whole batch of ImageNet's size would take it most of a minute."""
GPUS = (1, 4, 8)
"""The machines that a plan tells of."""


@dataclass(frozen=True)
class FileRates:
    """Images a second: those that one core decodes, and those that one GPU, or the CPU as a whole, computes on.

    Attributes:
        read: decoded by a core, and no more.
        augmented: decoded and augmented by a core, as for stage 1 and views.
        cropped: decoded and cropped by a core, as for evaluation.
        step: steps of stage 1; None where no rate of the processor is known.
        trained: whole trainings that the store remembers, decoding counted in; None where it knows none.
        view: passed through the network in the training's precision.
        clean: the same in float32.
        fitted: rows of features that pass when a classifier is fitted, on the CPU.
        cores: of the machine that decodes.
        processor: what computes.
        gpu: whether that is a GPU.
        kilobytes: of an image's file, the mean; None where there are no files.
        origin: where the processor's rates come from.
    """

    read: float
    augmented: float
    cropped: float
    step: float | None
    trained: float | None
    view: float | None
    clean: float | None
    fitted: float
    cores: int
    processor: str
    gpu: bool
    kilobytes: float | None
    origin: str


# -- from a request to a plan -----------------------------------------------------------------------------------------


def plan_swap(request: Planning) -> dict[str, Any]:
    """Return the plan of a swap: what it trains, and of images in files how long that takes and how much it leaves.

    Nothing is trained and nothing written. Raises `UserError` where an option or the data is not usable.
    """
    stages, settings = opened_for(request, Settings.of(request))
    if request.rate is not None and stages.data.in_memory:
        raise UserError("--rate: only with --plan, of images in files")
    runs = next(waves_of(["swap"])(stages, settings))
    require_parts(stages.data, runs)
    plan = planned(stages, {"swap": runs})
    estimated = {} if stages.data.in_memory else estimate(stages, settings.recipe, plan, request)
    told = [*plan.lines(), *(lines(estimated) if estimated else ["hours are told of images in files alone"])]
    return {"plan": asdict(plan), **estimated, "told": told}


def opened_for(request: Request, settings: S) -> tuple[Stages, S]:
    """Return `opened` for the plan of an experiment; where its stages would be made does not matter.

    Raises:
        UserError: the data is not usable, or options that do not go together.
    """
    request.check_place()
    data = load(request.data, data_root=request.data_root)
    check_file_options(data, request)
    return opened(data, settings, request)


def opened(data: ImageData, settings: S, request: Any) -> tuple[Stages, S]:
    """Return the stages on a data set, and the settings as a run has them; no process is started, no image checked.

    Images that the store knows to be unreadable are left out.
    """
    recipe = settings.recipe
    if not data.in_memory:
        recipe = recipe.with_micro_batches(request.micro_batches or (request.devices or 1) * request.num_nodes)
    require_trainable(data, Solo(), recipe.stage1, recipe.augment)
    store = Store(store_root(request.out, request.store), create=False)
    if not data.in_memory and not isinstance(data.train, PromisedImages) and was_checked(data, store):
        data = readable(data, store, progress=Quiet(), tell=str)
    runtime = Runtime.choose(request.device, engine=request.engine)
    return Stages(data, store, runtime), settings.model_copy(update={"recipe": recipe})


def estimate(stages: Stages, recipe: Recipe, plan: Plan, request: Any) -> dict[str, Any]:
    """Return `rates`, `estimates` (a list over machines), `disk_bytes` and `memory_bytes` of a plan on files.

    Raises:
        UserError: `--rate` is no rate.
    """
    busy = other_work()  # before we add to it
    rates = rates_of(request.rate, lambda: measure(stages, recipe))
    phases = _phases(stages, plan)
    machines = [(n, True) for n in sorted({*GPUS, *([request.devices] if request.devices else [])})]
    if not rates.gpu:
        machines.insert(0, (1, False))
    found = [
        {"devices": n, "gpu": gpu, "phases": [_timed(phase, rates, n, gpu, request.workers) for phase in phases]}
        for n, gpu in machines
    ]
    width, images, low = stages_width(stages, recipe), len(stages.data.train), 2 if rates.gpu else _low(stages, recipe)
    parameters = count_parameters(_model(stages, recipe))
    views = recipe.views if recipe.stage2_augment else 1
    return {
        "rates": asdict(rates),
        "busy": busy,
        "estimates": [{**one, **_total(one["phases"])} for one in found],
        "disk_bytes": {
            "views": plan.views * width * low,
            "features": plan.clean * width * 4,
            "backbones": len(plan.to_train) * parameters * 4,
        },
        # Of the process that leads: all views of a backbone, and one more in float32 as it is shuffled.
        "memory_bytes": (views * images * low + 2 * images * 4) * width if plan.classifiers else 0,
    }


def stages_width(stages: Stages, recipe: Recipe) -> int:
    """Return the number of features that a recipe's network has."""
    return int(_model(stages, recipe).feature_dim)


def _model(stages: Stages, recipe: Recipe) -> Any:
    with torch.device("meta"):
        return new_model(recipe.model, stages.data.train.channels, stages.data.train.num_classes, 0)


def _low(stages: Stages, recipe: Recipe) -> int:
    return stages.runtime.dtype(recipe.stage2.precision).itemsize


# -- rates ------------------------------------------------------------------------------------------------------------


def rates_of(given: str | None, measured: Callable[[], FileRates]) -> FileRates:
    """Return the rates that `--rate` gives: none, those of a file, or the measured ones with a number for a GPU's.

    A number stands for the forward pass too, which is faster: what comes of it errs high.

    Raises:
        UserError: it is neither a positive number nor a file that a plan has written.
    """
    if given is None:
        return measured()
    try:
        rate = float(given)
    except ValueError:
        return _read(given)
    if not 0 < rate < math.inf:
        raise UserError(f"--rate {given}: expected a positive number of images a second")
    gpu = {"step": rate, "trained": None, "view": rate, "clean": rate, "gpu": True}
    return replace(measured(), **gpu, processor="GPU", origin="given by --rate")  # type: ignore[arg-type]


def _read(name: str) -> FileRates:
    wrong = f"--rate {name}: expected images a second, or a file that `--plan --json` has written on another machine"
    try:
        held = json.loads(Path(name).read_text(encoding="utf-8"))["rates"]
        values = {field.name: held[field.name] for field in fields(FileRates)}
        speeds = [values[name] for name in ("read", "augmented", "cropped", "fitted", "cores")]
        if not all(isinstance(v, int | float) and 0 < v < math.inf for v in speeds):
            raise UserError(wrong)
    except OSError as error:
        raise UserError(f"{wrong} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(wrong) from None
    return replace(FileRates(**values), origin=f"read from {Path(name).name}")


def measure(stages: Stages, recipe: Recipe, seconds: float | None = None) -> FileRates:
    """Measure every rate in about `seconds`, by default `SECONDS`, in this process.

    What a core decodes is counted by the core's own time, so that other work does not count; nor does waiting for a
    disk. What a processor computes is counted by the clock.

    Raises:
        UserError: no image of the sample can be read.
    """
    runtime, share = replace(stages.runtime, progress=Quiet()), (SECONDS if seconds is None else seconds) / 7
    images, gpu = stages.data.train, runtime.device.type == "cuda"
    decoded = partial(_decoding, images, seconds=share)
    step = _step(stages, recipe, runtime, 2 * share)
    trained = remembered(stages, recipe)
    model = new_model(recipe.model, images.channels, images.num_classes, 0).to(runtime.device).eval()
    passed = partial(_passing, model, stages, recipe, runtime, seconds=share)
    return FileRates(
        read=decoded(lambda image: image),
        augmented=decoded(augmentations.training(recipe.augment)),
        cropped=decoded(augmentations.evaluation(recipe.augment)),
        step=step,
        trained=trained,
        view=passed(runtime.dtype(recipe.stage2.precision)),
        clean=passed(torch.float32),
        fitted=_fitting(stages, recipe, model.feature_dim, share),
        cores=usable_cores(),
        processor=torch.cuda.get_device_name(runtime.device) if gpu else cpu_name(),
        gpu=gpu,
        kilobytes=_kilobytes(images),
        origin="measured here" if trained is None else "by trainings that the store remembers",
    )


def _sample(images: Images) -> list[int]:
    return from_all_over(len(images), SAMPLE)


def _kilobytes(images: Images) -> float | None:
    """Return the mean size of the sample's files; None where the images are no files."""
    root, paths = getattr(images, "root", None), getattr(images, "paths", None)
    if root is None or paths is None:
        return None
    sizes = [Path(root, paths[row]).stat().st_size for row in _sample(images) if Path(root, paths[row]).is_file()]
    return sum(sizes) / len(sizes) / 1e3 if sizes else None


def _decoding(images: Images, transform: Callable[[Image.Image], object], seconds: float) -> float:
    """Return how many images a core decodes in a second, each of the sample once, as far as the time goes."""
    order = np.random.default_rng(0).permutation(_sample(images)).tolist()
    began, done, taken = time.monotonic(), 0, 0.0
    for row in order:
        started = time.thread_time()
        try:
            transform(images.image(row))
        except ImageError:
            continue
        taken += time.thread_time() - started
        done += 1
        if time.monotonic() - began > seconds and done >= FEWEST:
            break
    if not done:
        raise UserError(f"{images.name}: none of {len(order)} images, from all over, can be read; --verify lists them")
    return done / max(taken, 1e-9)


def _per_second(work: Callable[[], object], images: int, seconds: float) -> float:
    """Return the images a second of `work` on so many: the median, without the first time, which warms up."""
    work()
    began, times = time.monotonic(), list[float]()
    while len(times) < FEWEST or time.monotonic() - began < seconds:
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return images / median(times)


def _random(recipe: Recipe, stages: Stages, device: torch.device) -> Tensor:
    """Return a batch of random pixels, as large as a micro-batch on a GPU, uint8 [B, H, W, C]."""
    size, train = augmentations.size_of(recipe.augment), recipe.stage1
    whole = -(-train.batch // train.micro_batches)
    batch = whole if device.type == "cuda" else min(whole, AT_ONCE)
    shape = (batch, size, size, stages.data.train.channels)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch_stream(0, "measure")).to(device)


def _step(stages: Stages, recipe: Recipe, runtime: Runtime, seconds: float) -> float:
    pixels = _random(recipe, stages, runtime.device)
    labels = torch.arange(len(pixels), device=runtime.device) % stages.data.train.num_classes
    stage, data = recipe.backbone(stages.true().spec), stages.data.train
    stepper = Training(stage, data, stages.normalize, 0, runtime, None, "timing").stepper()
    return _per_second(lambda: stepper(pixels, labels, 1e-3).item(), len(pixels), seconds)


def _passing(model: Any, stages: Stages, recipe: Recipe, runtime: Runtime, dtype: torch.dtype, seconds: float) -> float:
    pixels, normalize = _random(recipe, stages, runtime.device), stages.normalize.to(runtime.device)

    def features(images: Tensor) -> Tensor:
        found: Tensor = model.features(normalize(images))
        return found

    return _per_second(lambda: forward(features, pixels, runtime.device, dtype).cpu(), len(pixels), seconds)


def _fitting(stages: Stages, recipe: Recipe, width: int, seconds: float) -> float:
    """Return how many rows of features a second pass in the fit of a classifier."""
    steps, classes = 4, stages.data.train.num_classes
    stage = recipe.classifier(stages.true().spec)
    stage = stage.model_copy(update={"train": stage.train.model_copy(update={"epochs": None, "steps": steps})})
    rows = steps * stage.train.batch
    view = torch.randn(rows, width, generator=torch_stream(0, "fit")), torch.arange(rows) % classes
    counts = [max(1, n) for n in stages.data.train.counts()]
    return _per_second(lambda: fit_classifier(stage, [view], counts, 0), rows, seconds)


def remembered(stages: Stages, recipe: Recipe) -> float | None:
    """Return the images a second of stored trainings like the recipe's on this hardware: the median, of one GPU each.

    Alike are the network, the augmentation, the batch, the precision and the hardware; the data need not be the same.
    A CPU's rate is that of all processes together. Descriptions that cannot be read say nothing.
    """
    here, found = stages.runtime.describe(), list[float]()
    precision = named(stages.runtime.dtype(recipe.stage1.precision))
    alike = (recipe.model, list(recipe.augment), recipe.stage1.batch, precision, here["gpu"], here["cpu"])
    for key in stages.store.keys("stage1"):
        try:
            meta = stages.store.meta("stage1", key)
            spec, device = meta["spec"], meta["device"]
            known = (spec["model"], list(spec["augment"]), spec["train"]["batch"], meta["precision"])
            rate = float(meta["images_per_second"]) / (int(meta["processes"]) if device["gpu"] else 1)
            same = (*known, device["gpu"], device["cpu"]) == alike
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if same and rate > 0:
            found.append(rate)
    return median(found) if found else None


# -- hours ------------------------------------------------------------------------------------------------------------


def _phases(stages: Stages, plan: Plan) -> list[tuple[str, int]]:
    """Return what is done to how many images."""
    data = stages.data
    promised = isinstance(data.train, PromisedImages)
    checked = not promised and was_checked(data, stages.store)
    everything = 0 if checked or plan.complete else len(data.train) + len(data.test)
    return [
        ("check", everything),
        ("backbones", sum(b.images_left for b in plan.to_train)),
        ("views", plan.views),
        ("features", plan.clean),
        ("classifiers", plan.fitted),
    ]


_STATIONS = {"check": ("read", None), "views": ("augmented", "view"), "features": ("cropped", "clean")}


def _timed(phase: tuple[str, int], rates: FileRates, devices: int, gpu: bool, workers: int | None) -> dict[str, Any]:
    """Return a phase with its seconds on a machine and what binds it: decoding, the GPU, or the CPU, which does both.

    Where the GPU's rate is not known seconds are None, and `at_least` says what decoding takes.
    """
    what, images = phase
    if what == "classifiers":
        return _phase(what, images, images / rates.fitted, "the CPU")
    decode, compute = _STATIONS.get(what, ("augmented", "step"))
    core, decoders = getattr(rates, decode), _decoders(what, rates.cores, devices if gpu else 1, workers)
    if compute is None:
        return _phase(what, images, images / (core * decoders), "decoding")
    if not gpu:
        whole = rates.trained if what == "backbones" else None
        both = 1 / whole if whole else 1 / getattr(rates, compute) + 1 / (core * rates.cores)
        return _phase(what, images, images * both, "the CPU")
    if not rates.gpu:
        return {**_phase(what, images, None, None), "at_least": images / (core * decoders)}
    computed = devices * ((rates.trained if what == "backbones" else None) or getattr(rates, compute))
    fed = core * decoders
    return _phase(what, images, images / min(computed, fed), "decoding" if fed < computed else "the GPU")


def _decoders(what: str, cores: int, devices: int, workers: int | None) -> int:
    """Return how many cores decode: those here, as far as processes ask for them, or as many as `--workers` says."""
    each = min(8, cores) if workers is None else max(1, workers)
    if what == "check":  # the process that leads does it alone
        return each
    return min(devices * each, cores) if workers is None else devices * each


def _phase(what: str, images: int, seconds: float | None, bound: str | None) -> dict[str, Any]:
    return {"what": what, "images": images, "seconds": seconds, "at_least": seconds, "bound": bound}


def _total(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the seconds of all phases, or at least how many; what binds is what the longest waits for."""
    known = all(phase["seconds"] is not None for phase in phases)
    least = sum(phase["at_least"] for phase in phases)
    longest = max(phases, key=lambda phase: phase["at_least"])
    return {"seconds": least if known else None, "at_least": least, "bound": longest["bound"] if known else None}


# -- in words ---------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what people are told of `estimate`."""
    rates = FileRates(**found["rates"])
    size = "" if rates.kilobytes is None else f", of {rates.kilobytes:.0f} kB each"
    yield (
        f"a core decodes and augments {_rate(rates.augmented)} images a second{size}; {rates.cores} cores here,"
        " without what the disk takes"
    )
    computes = rates.trained or rates.step
    if computes is not None:
        counted = ", decoding counted in" if rates.trained else ", decoding apart"
        yield f"{rates.processor} trains {_rate(computes)} images a second ({rates.origin}{counted})"
    for one in found["estimates"]:
        yield _machine(one, rates)
    disk = sum(found["disk_bytes"].values())
    yield f"disk: {_gigabytes(disk)} in the store, most of it views for stage 2, beside the images"
    yield f"memory: {_gigabytes(found['memory_bytes'])} in the process that leads, for the features of stage 2"
    if not rates.gpu:
        yield (
            "no rate of a GPU is known here: run this with --plan --json on a machine that has one and give what it"
            " prints as --rate FILE.json, or give the images a second that one GPU trains as --rate NUMBER"
        )
    elif rates.step is not None:
        yield f"decoding keeps up with one GPU from {math.ceil(rates.step / rates.augmented)} cores on"
    if found["busy"]:
        yield found["busy"]


def _machine(one: dict[str, Any], rates: FileRates) -> str:
    many = f"{one['devices']} GPU{'s' if one['devices'] > 1 else ''}"
    name = many if one["gpu"] else f"this CPU ({rates.cores} cores)"
    parts = [f"{p['what']} {duration(p['at_least'])}" for p in one["phases"] if p["images"]]
    if one["seconds"] is None:
        return f"{name}: at least {duration(one['at_least'])}, which decoding takes on the cores here, whatever the GPU"
    return f"{name}: {duration(one['seconds'])} ({', '.join(parts)}); bound by {one['bound']}"


def _rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 10 else f"{images:.1f}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
