"""Stage 2: features of images under a frozen network, wherever the images lie, and a linear classifier on them."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tailscope.data.decoding import decode_drawn
from tailscope.data.images import Images, ImageSet, Rows
from tailscope.device import Runtime, Solo, Team, arithmetic
from tailscope.methods import augmentations
from tailscope.networks import LAST_LAYERS
from tailscope.networks.last_layers import as_linear
from tailscope.progress import Progress, Quiet
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.objective import Objective
from tailscope.training.step import Epochs, Flat, Normalizer, sgd

BATCH, FILES_BATCH = 500, 128
"""Images that a process passes through the network at once: those in memory, and those that are decoded."""

View = tuple[Tensor, Tensor]
"""Features [n, d] and labels int64 [n] of one augmented view of the training data."""


def forward(features: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the features of a batch, on the device of the network, which is in eval mode.

    With another `dtype` than float32 convolutions run under autocast.
    """
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        found = features(images.to(device, non_blocking=True))
    return found.clone()  # made in inference mode it could not take part in autograd later; a clone outside of it can


def extract(
    model: Any, images: Tensor, normalize: Normalizer, dtype: torch.dtype, runtime: Runtime, label: str
) -> Tensor:
    """Return the penultimate features of un-augmented or already augmented images in memory.

    The model runs in eval mode: batch normalisation uses its running statistics and does not move. `normalize` has the
    pixel statistics that it was trained with. Images are uint8 [n, H, W, C], features [n, d] on the CPU and of the
    `dtype` of convolutions: float32 for geometry and test accuracy, the training's for stage 2.
    """
    runtime.progress.safe_point()
    with runtime.threads_for(BATCH * images.shape[1] * images.shape[2]):
        return _pass(model, torch.split(images, BATCH), len(images), BATCH, normalize, dtype, runtime, label, Solo())


@dataclass(frozen=True)
class WantedFeatures:
    """Features that are wanted, of some rows of images in memory or in files.

    Attributes:
        model: the backbone: normalised images [n, C, H, W] -> `features` [n, feature_dim].
        rows: in the order of the features; a row that is given twice is augmented twice.
        augment: call-strings of the training augmentation, whose size the centre crop of files takes too.
        draws: seed and name of the augmentation's stream; None for un-augmented images, of files their centre crop.
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

    Images in files pass in blocks of `FILES_BATCH` a process and are never all in memory. All processes of the team
    must call this together, and all get the features; `workers` processes decode for each of them, None decides.

    Raises:
        UserError: an image cannot be read any more.
    """
    dtype, total, draws = runtime.dtype(wanted.precision), len(wanted.rows), wanted.draws
    if isinstance(wanted.data, ImageSet):
        images = wanted.data.images[torch.from_numpy(wanted.rows)]
        if draws is not None:
            images = augmentations.build(wanted.augment)(images, torch_stream(*draws))
        return extract(wanted.model, images, normalize, dtype, runtime, label)
    transform = augmentations.evaluation if draws is None else augmentations.training
    starts = range(team.rank * FILES_BATCH, total, FILES_BATCH * team.size)
    decoded = decode_drawn(
        wanted.data,
        transform(wanted.augment),
        wanted.rows,
        [slice(start, start + FILES_BATCH) for start in starts],
        workers=workers,
        pin_memory=runtime.device.type == "cuda",
        seed_of=None if draws is None else partial(derive, *draws),
    )
    batches = (batch.images for batch in decoded)
    return _pass(wanted.model, batches, total, FILES_BATCH, normalize, dtype, runtime, label, team)


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


def fit_classifier(
    spec: StageSpec,
    views: Sequence[View],
    counts: Sequence[int],
    seed: int,
    start: tuple[Tensor, Tensor] | None = None,
    label: str = "classifier",
    progress: Progress | None = None,
) -> tuple[Tensors, Meta]:
    """Fit softmax regression by SGD; epoch e sees view e modulo the number of views.

    With a frozen backbone in eval mode this equals training the classifier on top of it, at the cost of one extraction
    a view instead of one an epoch and classifier.

    Args:
        spec: the stage; its sampler has been applied when the views were drawn.
        views: the augmented views, all of n samples.
        counts: images per class of the training data, for losses that need them.
        seed: of initialisation and order.
        start: weight [C, d] and bias [C] to start from; None: new random ones.
        label: what messages call this training.
        progress: gets the numbers of each epoch.

    Returns:
        `weight` float32 [C, d] and `bias` float32 [C], of a linear layer that decides as the trained one does, and a
            description.

    Raises:
        UserError: the training diverged, or the stage's loss does not fit its last layer.
    """
    started, n = time.monotonic(), len(views[0][1])
    epochs, losses, progress = Epochs(spec, n, label), list[float](), progress or Quiet()
    with keyed(derive(seed, "classifier")):
        linear = nn.Linear(views[0][0].shape[1], len(counts))
    if start:
        linear.load_state_dict(dict(zip(("weight", "bias"), start, strict=True)))
    classifier = LAST_LAYERS.make(spec.last_layer, linear)
    objective = Objective(spec, counts, linear.in_features, seed, torch.device("cpu"))
    optimizer = sgd(classifier, objective.own, spec.train, spec.train.learning_rate)
    for epoch in range(epochs.number):
        (features, labels), begun = views[epoch % len(views)], time.monotonic()
        order = torch.randperm(n, generator=torch_stream(seed, "stage2", "order", epoch))
        features, labels, epoch_losses = features[order].float(), labels[order], []
        batches = zip(torch.split(features, spec.train.batch), torch.split(labels, spec.train.batch), strict=True)
        for (x, y), rate, done in zip(batches, epochs.multipliers(epoch), epochs.progress(epoch), strict=False):
            objective.at(done)
            for group in optimizer.param_groups:
                group["lr"] = spec.train.learning_rate * rate
            loss = objective(objective.logits(classifier, x), x, y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            epoch_losses.append(loss.detach())
        losses.append(epochs.mean_loss(epoch, epoch_losses))
        numbers = epochs.numbers(epoch, losses[-1], time.monotonic() - begun)
        progress.log(label, epoch + 1, numbers, last=epoch + 1 == epochs.number)
    epochs.require_finite(epochs.number - 1, Flat(classifier.state_dict()))
    description: Meta = {
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "epochs": epochs.number,
        "steps": epochs.steps,
        "losses": losses,
        "seconds": time.monotonic() - started,
        "bn_mode": spec.bn_mode,
        "arithmetic": arithmetic(torch.device("cpu"), torch.float32),
    }
    return dict(zip(("weight", "bias"), as_linear(classifier), strict=True)), description
