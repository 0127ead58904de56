"""How long a plan takes on this machine, from a measurement of a few seconds."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.experiments.lab import Lab
from tailscope.features import extract
from tailscope.methods import LOSSES
from tailscope.methods.augmentations import build
from tailscope.paper.plan import Plan
from tailscope.progress import Quiet
from tailscope.seeds import torch_stream
from tailscope.training.recipes import Recipe
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import new_model
from tailscope.training.step import Stepper, loss_function

SECONDS = 8.0
"""How long `measure` takes, unless single operations take longer than their share of it."""

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
    """

    step: float
    augment: dict[tuple[str, ...], float]
    view: float
    clean: float

    def estimate(self, plan: Plan) -> float:
        """Return the seconds that the plan's training and extraction take; geometry's permutations come on top."""
        training = sum(b.images_left * (self.step + self.augment[b.augment]) for b in plan.to_train)
        return training + plan.views * self.view + plan.clean * self.clean


def measure(lab: Lab, recipe: Recipe, plan: Plan, seconds: float | None = None) -> Rates:
    """Time what the plan needs on the first training images: steps, augmentation, extraction.

    Steps are timed without compiling, which would take longer than the measurement may. Where long trainings compile
    theirs, an estimate from these rates errs high.

    Args:
        lab: the data and the runtime.
        recipe: the model, the batches and the precision.
        plan: names the augmentations.
        seconds: how long everything together may take; default `SECONDS`.
    """
    runtime = replace(lab.runtime, progress=Quiet())
    augmentations = {b.augment for b in plan.backbones}
    share = (SECONDS if seconds is None else seconds) / (4 + len(augmentations))
    assert isinstance(lab.data, ImageData)  # files are decoded while training: their rate is not measured here
    images = lab.data.train.images
    model = new_model(recipe.model, images.shape[-1], lab.data.train.num_classes, seed=0).to(runtime.device)
    augmented = images[:AUGMENTED].to(runtime.device)

    def extraction(dtype: torch.dtype) -> float:
        rows = images[:EXTRACTED]
        work = partial(extract, model, rows, lab.normalize, dtype, runtime, "features")
        return _seconds_each(work, len(rows), share)

    return Rates(
        step=_step(lab, recipe, runtime, 2 * share),
        augment={calls: _augmentation(calls, augmented, share) for calls in augmentations},
        view=extraction(runtime.dtype(recipe.stage2.precision)),
        clean=extraction(torch.float32),
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
    assert isinstance(lab.data, ImageData)
    train, classes = recipe.stage1, lab.data.train.num_classes
    images, labels = (t[: train.batch].to(runtime.device) for t in (lab.data.train.images, lab.data.train.labels))
    model = new_model(recipe.model, images.shape[-1], classes, seed=0).to(runtime.device).train()
    loss = LOSSES.make("cross_entropy", torch.bincount(labels, minlength=classes))
    compute = loss_function(model, loss, lab.normalize.to(runtime.device), runtime.dtype(train.precision))
    stepper = Stepper(model, compute, train, compile=False)
    with runtime.threads_for(images, train.batch):
        # Reading the loss waits for the device.
        return _seconds_each(lambda: stepper(images, labels, 0.01).item(), len(labels), seconds)


def _augmentation(calls: tuple[str, ...], images: Tensor, seconds: float) -> float:
    augment, stream = build(calls), torch_stream(0, "measure", device=images.device)
    return _seconds_each(lambda: augment(images, stream).cpu(), len(images), seconds)


def _seconds_each(work: Callable[[], object], images: int, seconds: float) -> float:
    """Return the seconds an image takes: `work` on `images`, repeated for `seconds`.

    The first time warms up and does not count, unless it takes all the time there is.
    """
    begun = time.monotonic()
    work()
    started, times = time.monotonic(), 0
    if started - begun >= seconds:
        return (started - begun) / images
    while time.monotonic() - begun < seconds or not times:
        work()
        times += 1
    return (time.monotonic() - started) / times / images
