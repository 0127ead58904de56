"""Features of images in files under a frozen backbone: decoded by workers, shared out among the processes of a team."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tailscope.data.decoding import DecodedBatch, decode, earlier_draws, refuse
from tailscope.data.filedata import FileSet, Rows
from tailscope.methods import photos
from tailscope.seeds import derive
from tailscope.training.runtime import Runtime
from tailscope.training.step import Normalizer
from tailscope.training.team import Team

BATCH = 128
"""Images that a process passes through the network at once."""


@dataclass(frozen=True)
class WantedFeatures:
    """Features that are wanted.

    Attributes:
        model: the backbone: normalised images [n, 3, H, W] -> `features` [n, feature_dim].
        data: the images.
        rows: those to extract, in the order of the features; a row that is given twice is augmented twice.
        augment: call-strings of the training augmentation, whose size the centre crop takes too.
        draws: seed and name of the augmentation's stream; None for the centre crop.
        low_precision: whether convolutions may run in the runtime's low precision.
    """

    model: Any
    data: FileSet
    rows: Rows
    augment: tuple[str, ...]
    draws: tuple[int, str, str, int] | None
    low_precision: bool


def extract_files(
    wanted: WantedFeatures,
    normalize: Normalizer,
    runtime: Runtime,
    label: str,
    *,
    team: Team,
    workers: int | None = None,
) -> Tensor:
    """Return the features [n, d] on the CPU: float32 or, as computed, bfloat16 (no bits are lost).

    Images pass in blocks of `BATCH` a process and are never all in memory.

    Args:
        wanted: which features of which images.
        normalize: the pixel statistics that the backbone was trained with.
        runtime: device, precision and progress.
        label: what progress calls this.
        team: the processes that share the work; all of them must call this together, and all get the features.
        workers: processes that decode for each of them; None decides.

    Raises:
        UserError: an image cannot be read any more.
    """
    total, block = len(wanted.rows), BATCH * team.size
    model, normalize = wanted.model.to(runtime.device).eval(), normalize.to(runtime.device)
    dtype = runtime.dtype("auto" if wanted.low_precision else "fp32")
    loader = _decoded(wanted, runtime, team, workers)
    blocks = []
    with runtime.progress.task(label, total) as advance:
        for start in range(0, total, block):
            size = min(block, total - start)
            first = min(size, team.rank * BATCH)
            own = min(size, first + BATCH) - first
            features = _forward(model, next(loader), normalize, dtype, wanted) if own else None
            if team.size > 1:
                whole = torch.zeros(size, model.feature_dim, device=runtime.device)
                if features is not None:
                    whole[first : first + own] = features
                team.sum([whole])
                features = whole
            assert features is not None
            blocks.append(features.to("cpu", dtype))
            advance(size)
    return torch.cat(blocks)


def _decoded(wanted: WantedFeatures, runtime: Runtime, team: Team, workers: int | None) -> Iterator[DecodedBatch]:
    """Return the batches that fall to this process."""
    repeats = earlier_draws(wanted.rows)
    starts = range(team.rank * BATCH, len(wanted.rows), BATCH * team.size)
    parts = [slice(start, start + BATCH) for start in starts]
    transform = photos.evaluation if wanted.draws is None else photos.training
    loader = decode(
        wanted.data.files,
        transform(wanted.augment),
        [wanted.rows[part].tolist() for part in parts],
        workers=workers,
        pin_memory=runtime.device.type == "cuda",
        seed_of=None if wanted.draws is None else partial(derive, *wanted.draws),
        repeats=[repeats[part].tolist() for part in parts],
    )
    return iter(loader)


def _forward(
    model: Any, decoded: DecodedBatch, normalize: Normalizer, dtype: torch.dtype, wanted: WantedFeatures
) -> Tensor:
    """Return the features of a batch, on the device."""
    if decoded.unreadable:
        raise refuse(wanted.data.files, decoded.unreadable)
    device, low = normalize.mean.device, dtype != torch.float32
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=dtype, enabled=low),
    ):
        features = model.features(normalize(decoded.images.to(device, non_blocking=True)))
    cloned: Tensor = features.clone()  # made in inference mode it could not take part in autograd later
    return cloned
