"""Tiny trainings that several test files run."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tailscope.data.images import ImageSet
from tailscope.data.sources import load
from tailscope.device import Runtime
from tailscope.methods import LOSSES
from tailscope.spec import DataSpec, StageSpec, TrainSpec
from tailscope.training.loop import Training
from tailscope.training.step import Normalizer

CPU = Runtime(torch.device("cpu"), torch.float32)


@cache
def digits(images: int = 300) -> ImageSet:
    """The first training images of the digits."""
    return load("digits").train.take(range(images))


def activations(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, mean: float = 0.0
) -> torch.Tensor:
    """Random ones, channels-last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    return x.to(dtype).to(memory_format=torch.channels_last)


def made_loss(call: str, counts: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return (logits, labels) -> losses; what the loss needs besides is made up, the same for the same labels."""
    needs, width, progress = LOSSES.needs(call), 6, torch.tensor(0.5)
    features = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = LOSSES.make(call, counts, *((width,) if "features" in needs else ()))

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        given = {"features": features[: len(labels)], "progress": progress}
        return loss(logits, labels, **{name: value for name, value in given.items() if name in needs})

    return losses


def data_spec(images: ImageSet) -> DataSpec:
    return DataSpec(
        name="tiny",
        fingerprint=images.fingerprint(),
        profile="full",
        protocol="nested",
        subset_seed=0,
        indices_sha256="",
        counts=tuple(images.counts()),
    )


def stage1_spec(images: ImageSet, *, steps: int = 12, batch: int = 64, **changes: Any) -> StageSpec:
    """ResNet-8 with crops and a one-cycle schedule; 300 images are five steps an epoch, the last one short."""
    train = {"learning_rate": 0.1, "nesterov": True, "weight_decay": 5e-4, "schedule": "onecycle"}
    train |= changes.pop("train", {})
    values = {"model": "resnet8", "augment": ("crop(padding=1)",), **changes}
    return StageSpec(data=data_spec(images), train=TrainSpec(steps=steps, batch=batch, **train), **values)


def train_stage1(
    spec: StageSpec, images: ImageSet, scratch: Path, *, seed: int = 0, runtime: Runtime = CPU
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train as an experiment does."""
    scratch.mkdir(parents=True, exist_ok=True)
    return Training(spec, images, Normalizer.of(images.images), seed, runtime, scratch, "tiny").run()


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Every tensor is equal to the bit."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert differing == []
