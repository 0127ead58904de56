"""Batch normalisation between the stages: `frozen`, or `shifted` to stage 2's data (MiSLAS: Zhong et al. 2021).

Shifted, the running mean and variance of every batch-norm layer are forgotten and estimated anew; weights and affine
parameters stay. The estimate is one pass over one augmented view of stage 2's data as its sampler draws them, in random
order and in batches as large as those that features are extracted in: each layer normalises by the batch's own
statistics, as in training, and keeps the plain mean over the batches of their means and (unbiased) variances. Then the
layers are frozen again. Everything that stage 2 sees, the test images' features too, is computed with them.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailscope.data import splits
from tailscope.data.streams import Rows
from tailscope.experiments.lab import Backbone, Lab
from tailscope.models.resnet import CifarResNet
from tailscope.seeds import torch_stream
from tailscope.spec import StageSpec, digest


def for_stage2(lab: Lab, backbone: Backbone, stage2: StageSpec, rows: Rows, seed: int) -> Backbone:
    """Return the backbone as stage 2 and the test images see it: itself, or with shifted statistics.

    Args:
        lab: trains, and recalls from its store.
        backbone: trained in stage 1.
        stage2: says whether to shift, and how its samples are drawn and augmented.
        rows: stage 2's training images.
        seed: of the run.
    """
    if stage2.bn_mode == "frozen":
        return backbone
    order = _shuffled_draws(lab, stage2, rows, seed)
    key = digest(
        {
            "backbone": backbone.key,
            "bn_mode": stage2.bn_mode,
            "augment": list(stage2.augment),
            "precision": stage2.train.precision,
            "rows": splits.Subset((order,)).sha256,
            "seed": seed,
            "fingerprint": lab.data.fingerprint,
        }
    )

    def make(_: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        started = time.monotonic()
        model = Estimating(copy.deepcopy(backbone.model))
        lab.imagery.view(cast(CifarResNet, model), stage2, order, 0, seed, lab.runtime)
        return model.statistics(), {"seconds": time.monotonic() - started, "images": len(order)}

    statistics = lab.store.get_or_make("shifted", key, make, lab.runtime.progress)[0].tensors
    model = copy.deepcopy(backbone.model)
    model.load_state_dict({**model.state_dict(), **statistics})
    return replace(backbone, key=key, model=model.eval())


def _shuffled_draws(lab: Lab, stage2: StageSpec, rows: Rows, seed: int) -> Rows:
    """Return the rows of the first view in random order: batches of a single class would hide what separates classes.

    Instance sampling draws every image once.
    """
    drawn = rows if stage2.sampler == "instance" else lab.drawn(stage2, rows, 0, seed)
    order = torch.randperm(len(drawn), generator=torch_stream(seed, "stage2", "bn"))
    shuffled: Rows = drawn[order.numpy()]
    return shuffled


class Estimating(nn.Module):
    """A network that, whatever mode it is set to, normalises by batches and averages their statistics."""

    def __init__(self, model: nn.Module) -> None:
        """Forget the running statistics of `model`, which is changed."""
        super().__init__()
        self.model = model
        for layer in self._layers().values():
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average instead of an exponential one

    def features(self, images: Tensor) -> Tensor:
        """Return the features [n, d] of a normalised batch [n, C, H, W], and count its statistics in."""
        features = cast(CifarResNet, self.model.train()).features(images)
        return features

    def statistics(self) -> dict[str, Tensor]:
        """Return the running statistics under their names in the model's state."""
        return {f"{name}.{k}": tensor for name, layer in self._layers().items() for k, tensor in layer.named_buffers()}

    def _layers(self) -> dict[str, nn.BatchNorm2d]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
