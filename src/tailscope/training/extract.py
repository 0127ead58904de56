"""Features of images under a frozen network: one forward pass, whatever the network and wherever the images lie."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tailscope.data.decoding import decode, earlier_draws, refuse
from tailscope.data.images import Images, ImageSet, Rows
from tailscope.device import Runtime
from tailscope.methods import augmentations
from tailscope.methods.augmentations import build
from tailscope.seeds import derive, torch_stream
from tailscope.training.step import Normalizer
from tailscope.training.team import Solo, Team

BATCH, FILES_BATCH = 500, 128
"""Images that a process passes through the network at once: those in memory, and those that are decoded."""


def forward(features: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the features of a batch, on the device.

    Args:
        features: of a network in eval mode, on the device.
        images: what it takes.
        device: where it is.
        dtype: of convolutions: with another than float32 they run under autocast.
    """
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        found = features(images.to(device, non_blocking=True))
    return found.clone()  # made in inference mode it could not take part in autograd later; a clone outside of it can


def extract(
    model: Any, images: Tensor, normalize: Normalizer, dtype: torch.dtype, runtime: Runtime, label: str
) -> Tensor:
    """Return the penultimate features of un-augmented or already augmented images in memory.

    The model runs in eval mode: batch normalisation uses its running statistics and does not move.

    Args:
        model: the backbone.
        images: uint8 [n, H, W, C].
        normalize: the pixel statistics that the backbone was trained with.
        dtype: of convolutions: float32 for geometry and test accuracy, the training's for stage 2.
        runtime: device and progress.
        label: what progress calls this.

    Returns:
        Features [n, d] on the CPU: float32, or bfloat16 as computed (no bits are lost).
    """
    runtime.progress.safe_point()
    with runtime.threads_for(images, BATCH):
        return _pass(model, torch.split(images, BATCH), len(images), BATCH, normalize, dtype, runtime, label, Solo())


@dataclass(frozen=True)
class WantedFeatures:
    """Features that are wanted.

    Attributes:
        model: the backbone: normalised images [n, C, H, W] -> `features` [n, feature_dim].
        data: the images.
        rows: those to extract, in the order of the features; a row that is given twice is augmented twice.
        augment: call-strings of the training augmentation, whose size the centre crop of files takes too.
        draws: seed and name of the augmentation's stream; None for un-augmented images, of files their centre crop.
        precision: of convolutions.
    """

    model: Any
    data: Images
    rows: Rows
    augment: tuple[str, ...]
    draws: tuple[int, str, str, int] | None
    precision: Literal["auto", "fp32"]


def extract_wanted(
    wanted: WantedFeatures,
    normalize: Normalizer,
    runtime: Runtime,
    label: str,
    *,
    team: Team,
    workers: int | None = None,
) -> Tensor:
    """Return the features [n, d] that are wanted, as `extract` does.

    Images in files pass in blocks of `FILES_BATCH` a process and are never all in memory.

    Args:
        wanted: which features of which images.
        normalize: the pixel statistics that the backbone was trained with.
        runtime: device, precision and progress.
        label: what progress calls this.
        team: the processes that share the work on files; all of them must call this together, and all get the features.
        workers: processes that decode for each of them; None decides.

    Raises:
        UserError: an image cannot be read any more.
    """
    dtype = runtime.dtype(wanted.precision)
    if isinstance(wanted.data, ImageSet):
        images = wanted.data.images[torch.from_numpy(wanted.rows)]
        if wanted.draws is not None:
            images = build(wanted.augment)(images, torch_stream(*wanted.draws))
        return extract(wanted.model, images, normalize, dtype, runtime, label)
    decoded = _decoded(wanted, runtime, team, workers)
    return _pass(wanted.model, decoded, len(wanted.rows), FILES_BATCH, normalize, dtype, runtime, label, team)


def _decoded(wanted: WantedFeatures, runtime: Runtime, team: Team, workers: int | None) -> Iterator[Tensor]:
    """Yield the batches that fall to this process."""
    repeats = earlier_draws(wanted.rows)
    starts = range(team.rank * FILES_BATCH, len(wanted.rows), FILES_BATCH * team.size)
    parts = [slice(start, start + FILES_BATCH) for start in starts]
    transform = augmentations.evaluation if wanted.draws is None else augmentations.training
    for decoded in decode(
        wanted.data,
        transform(wanted.augment),
        [wanted.rows[part].tolist() for part in parts],
        workers=workers,
        pin_memory=runtime.device.type == "cuda",
        seed_of=None if wanted.draws is None else partial(derive, *wanted.draws),
        repeats=[repeats[part].tolist() for part in parts],
    ):
        if decoded.unreadable:
            raise refuse(wanted.data, decoded.unreadable)
        yield decoded.images


def _pass(
    model: Any,
    batches: Iterable[Tensor],
    total: int,
    batch: int,
    normalize: Normalizer,
    dtype: torch.dtype,
    runtime: Runtime,
    label: str,
    team: Team,
) -> Tensor:
    """Pass this process's batches of uint8 images through the model; return the features of all processes' images."""
    device, mine = runtime.device, iter(batches)
    model, normalize = model.to(device).eval(), normalize.to(device)

    def compute(images: Tensor) -> Tensor:
        features: Tensor = model.features(normalize(images))
        return features

    blocks = []
    with runtime.progress.task(label, total) as advance:
        for start in range(0, total, batch * team.size):
            size = min(batch * team.size, total - start)
            first, last = (min(size, rank * batch) for rank in (team.rank, team.rank + 1))
            features = forward(compute, next(mine), device, dtype) if first < last else torch.empty(0)
            if team.size > 1:
                whole = torch.zeros(size, model.feature_dim, device=device)
                whole[first:last] = features.view(last - first, model.feature_dim)
                team.sum([whole])
                features = whole.to(dtype)
            blocks.append(features.cpu())
            advance(size)
    return torch.cat(blocks)
