"""How long a plan takes on this machine: from what its store remembers, else from a measurement of a few seconds."""

import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from tailscope.data.imageset import ImageSet
from tailscope.errors import UserError
from tailscope.experiments.lab import Lab
from tailscope.features import extract
from tailscope.methods import LOSSES
from tailscope.methods.augmentations import build
from tailscope.paper.plan import Plan
from tailscope.progress import Quiet
from tailscope.seeds import torch_stream
from tailscope.training.recipes import Recipe
from tailscope.training.runtime import Runtime, arithmetic_of
from tailscope.training.stage1 import new_model
from tailscope.training.step import Stepper, loss_function

SECONDS = 8.0
"""How long `measure` takes, unless single operations take longer than their share of it."""

FEWEST = 5
"""How often each operation is timed at least: on a busy machine a single time may be anything."""

AUGMENTED, EXTRACTED = 1_024, 256
"""How many images the measurement augments at once, and extracts features of."""


@dataclass(frozen=True)
class Rates:
    """Seconds that an image takes on this machine.

    Attributes:
        step: in a training step that is not compiled.
        augment: in each way of augmenting stage 1, by its call-strings.
        view: in extracting a feature in the training's precision.
        clean: in extracting a feature in float32.
        remembered: in a whole training, by its augmentation, where the store knows one.
    """

    step: float
    augment: dict[tuple[str, ...], float]
    view: float
    clean: float
    remembered: dict[tuple[str, ...], float] = field(default_factory=dict)

    def estimate(self, plan: Plan) -> float:
        """Return the seconds that the plan's training and extraction take; geometry's permutations come on top."""
        training = sum(b.images_left * self._training(b.augment) for b in plan.to_train)
        return training + plan.views * self.view + plan.clean * self.clean

    def sources(self, plan: Plan) -> str:
        """Return where the rates of the plan's trainings come from, in words."""
        known = [b.augment in self.remembered for b in plan.to_train]
        measured = "measured on single steps, not compiled"
        if not any(known):
            return measured
        remembered = "by trainings that the store remembers from this machine"
        return remembered if all(known) else f"{remembered}, where it knows such ones ({sum(known)}), else {measured}"

    def _training(self, augment: tuple[str, ...]) -> float:
        return self.remembered[augment] if augment in self.remembered else self.step + self.augment[augment]


def remembered(lab: Lab, recipe: Recipe, plan: Plan) -> dict[tuple[str, ...], float]:
    """Return the seconds an image took in stored trainings like the plan's: the median, by augmentation.

    Alike are the data set, the network, the batch, the precision, the engine if one was asked for, and the hardware
    with its number of threads. Descriptions that cannot be read say nothing.
    """
    hardware = _hardware(lab, recipe.stage1.batch)
    alike = (lab.data.fingerprint, recipe.model, recipe.stage1.batch, _precision(lab.runtime, recipe), *hardware)
    wanted, asked = {b.augment for b in plan.to_train}, lab.runtime.engine
    found: dict[tuple[str, ...], list[float]] = {}
    for key in lab.store.keys("stage1"):
        try:
            meta = lab.store.meta("stage1", key)
            spec, device = meta["spec"], meta["device"]
            augment = tuple(spec["augment"])
            stage = (spec["data"]["fingerprint"], spec["model"], spec["train"]["batch"], meta["precision"])
            told = (*stage, device["gpu"], device["cpu"], device["threads"])
            engine = arithmetic_of(meta)["engine"]
            rate = float(meta["images_per_second"])
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if augment in wanted and told == alike and asked in (None, engine) and rate > 0:
            found.setdefault(augment, []).append(1 / rate)
    return {augment: statistics.median(seconds) for augment, seconds in found.items()}


def _hardware(lab: Lab, batch: int) -> tuple[str | int | None, ...]:
    """Return the GPU, the processor and the threads that a training here would have."""
    assert isinstance(lab.data.train, ImageSet)
    with lab.runtime.threads_for(lab.data.train.images, batch):
        device = lab.runtime.describe()
    return device["gpu"], device["cpu"], device["threads"]


def _precision(runtime: Runtime, recipe: Recipe) -> str:
    return str(runtime.dtype(recipe.stage1.precision)).removeprefix("torch.")


def other_work() -> str:
    """Return a warning where other processes keep the processor busy, else nothing."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load < max(1.0, cores / 4):
        return ""
    return f"other work is running here (load {load:.1f} on {cores} cores): without it this may take a fraction"


def measure(lab: Lab, recipe: Recipe, plan: Plan, seconds: float | None = None) -> Rates:
    """Time what the plan needs on the first training images: steps, augmentation, extraction.

    Steps are timed without compiling, which would take longer than the measurement may. Where long trainings compile
    theirs, an estimate from these rates errs high.

    Args:
        lab: the data, the runtime, and the store that may remember faster and better.
        recipe: the model, the batches and the precision.
        plan: names the augmentations.
        seconds: how long everything together may take; default `SECONDS`.
    """
    runtime = replace(lab.runtime, progress=Quiet())
    known = remembered(lab, recipe, plan)
    augmentations = {b.augment for b in plan.to_train if b.augment not in known}
    share = (SECONDS if seconds is None else seconds) / (4 + len(augmentations))
    assert isinstance(lab.data.train, ImageSet)  # files are decoded while training: their rate is not measured here
    images = lab.data.train.images
    model = new_model(recipe.model, images.shape[-1], lab.data.train.num_classes, seed=0).to(runtime.device)
    augmented = images[:AUGMENTED].to(runtime.device)

    def extraction(dtype: torch.dtype) -> float:
        rows = images[:EXTRACTED]
        work = partial(extract, model, rows, lab.normalize, dtype, runtime, "features")
        return _seconds_each(work, len(rows), share)

    return Rates(
        step=_step(lab, recipe, runtime, 2 * share) if augmentations else 0.0,
        augment={calls: _augmentation(calls, augmented, share) for calls in augmentations},
        view=extraction(runtime.dtype(recipe.stage2.precision)),
        clean=extraction(torch.float32),
        remembered=known,
    )


def duration(seconds: float) -> str:
    """Return a time as people say it, rounded up.

    >>> duration(5), duration(100), duration(20_000)
    ('less than a minute', '2 minutes', '5 h 34 min')
    """
    minutes = -int(-seconds // 60)
    if seconds < 60:
        return "less than a minute"
    return f"{minutes} minutes" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def parse_duration(text: str) -> float:
    """Return the seconds that a time such as `9m`, `90s` or `1h30m` means; a bare number is minutes.

    >>> parse_duration("9m"), parse_duration("1h30m"), parse_duration("90s"), parse_duration("2.5")
    (540.0, 5400.0, 90.0, 150.0)

    Raises:
        UserError: it is no time, or none at all.
    """
    written = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", written):
        written += "m"
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", written)
    seconds = sum(float(n or 0) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0
    if seconds <= 0:
        raise UserError(f"--time-limit {text}: expected a time like 9m, 90s or 1h30m")
    return float(seconds)


def _step(lab: Lab, recipe: Recipe, runtime: Runtime, seconds: float) -> float:
    assert isinstance(lab.data.train, ImageSet)
    train, classes = recipe.stage1, lab.data.train.num_classes
    images, labels = (t[: train.batch].to(runtime.device) for t in (lab.data.train.images, lab.data.train.labels))
    model = new_model(recipe.model, images.shape[-1], classes, seed=0).to(runtime.device).train()
    loss = LOSSES.make("cross_entropy", torch.bincount(labels, minlength=classes))
    compute = loss_function(model, loss, lab.normalize.to(runtime.device), runtime.dtype(train.precision))
    stepper = Stepper(model, compute, train)
    with runtime.threads_for(images, train.batch):
        # Reading the loss waits for the device.
        return _seconds_each(lambda: stepper(images, labels, 0.01).item(), len(labels), seconds)


def _augmentation(calls: tuple[str, ...], images: Tensor, seconds: float) -> float:
    augment, stream = build(calls), torch_stream(0, "measure", device=images.device)
    return _seconds_each(lambda: augment(images, stream).cpu(), len(images), seconds)


def _seconds_each(work: Callable[[], object], images: int, seconds: float) -> float:
    """Return the median of the seconds an image takes: `work` on `images`, for `seconds` and `FEWEST` times at least.

    The first time warms up, or builds kernels, and does not count.
    """
    work()
    begun, times = time.monotonic(), list[float]()
    while time.monotonic() - begun < seconds or len(times) < FEWEST:
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return statistics.median(times) / images
