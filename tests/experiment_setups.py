"""Experiments small enough for tests: a recipe of a few steps, and results without what differs between two runs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tailscope.data.images import ImageSet
from tailscope.data.sources import ImageData, load
from tailscope.device import Runtime
from tailscope.experiments.plans import geometry, ladder, swap
from tailscope.experiments.runs import Settings
from tailscope.experiments.stages import Stages
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store import Store
from tailscope.training.loop import Training
from tailscope.training.recipes import Recipe

CPU = Runtime(torch.device("cpu"), torch.float32)
EXPERIMENTS = {"swap": swap, "ladder": ladder, "geometry": geometry}
TINY = Recipe(
    name="demo",
    card="A few steps.",
    converged=False,
    model="resnet8(width=4)",
    stage1=TrainSpec(steps=12, batch=64, learning_rate=0.1, schedule="onecycle", precision="fp32"),
    stage2=TrainSpec(steps=20, batch=64, learning_rate=0.1, precision="fp32"),
    views=1,
    augment=("crop(padding=1)",),
    autoaugment="autoaugment(exclude=('invert',))",
)


def settings(**changes: Any) -> Settings:
    values = {"profile": "exp:20", "protocol": "nested", "recipe": TINY, "seeds": (0, 1), "permutations": 9}
    return Settings(**{**values, **changes})


def lab(folder: Path, data: ImageData | None = None) -> Stages:
    return Stages(data or small_digits(), Store(folder), CPU)


def small_digits() -> ImageData:
    """500 training and 200 test digits."""
    data = load("digits")
    return ImageData("digits", data.train.take(range(500)), data.test.take(range(200)))


def random_images(counts: list[int], shape: tuple[int, int, int], names: tuple[str, ...]) -> ImageSet:
    """Noise whose mean brightness tells the class."""
    stream = torch.Generator().manual_seed(sum(counts))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noise = torch.randint(0, 100, (len(labels), *shape), generator=stream)
    return ImageSet((noise + labels[:, None, None, None] * 150 // len(counts)).to(torch.uint8), labels, names)


def entries(store: Store, kind: str) -> int:
    """Return how many complete entries of a kind the store holds."""
    return len(list(store.root.glob(f"{kind}/*/DONE")))


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without times, speeds and the command that made it."""
    result = copy.deepcopy(result)
    for field in ("created", "command", "environment"):
        del result[field]
    for row in result["provenance"]:
        del row["seconds"], row["images_per_second"]
        row.pop("pretraining_seconds", None)
    return result


def compared_plainly(result: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison as its file holds it, without times."""
    plain = timeless(json.loads(json.dumps(result)))
    for method in plain["methods"]:
        del method["seconds"]
    return plain


def gone_on(
    root: Path, compared: Callable[[Stages], dict[str, Any]], ends: Callable[[StageSpec], object]
) -> tuple[Stages, dict[str, Any]]:
    """Interrupt a comparison where a training that `ends` begins; return the stages and the result of going on."""
    run = Training.run

    def interrupted(self: Training) -> Any:
        if ends(self.spec):
            raise KeyboardInterrupt
        return run(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(lab(root))
    again = lab(root)
    return again, compared(again)
