"""Stage 1: train a backbone end to end. The last epoch counts; the test split is never seen here."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tailscope.data.imageset import ImageSet
from tailscope.methods import LOSSES, MIXINGS, SAMPLERS
from tailscope.methods.augmentations import build
from tailscope.models import MODELS
from tailscope.models.resnet import CifarResNet, count_parameters
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.epochs import Epochs, Flat, History, Keeper, resume, train_epochs
from tailscope.training.graph import Capture, capturing
from tailscope.training.runtime import Runtime, arithmetic
from tailscope.training.step import Normalizer, Stepper, loss_function

CHUNK_BATCHES = 64
"""How many batches are augmented at once: vectorised, and bounded in memory."""


def new_model(call: str, channels: int, num_classes: int, seed: int) -> CifarResNet:
    """Build a freshly initialised model in channels-last layout, without touching the global random state."""
    with keyed(derive(seed, "init")):
        model = MODELS.make(call, channels, num_classes)
    return model.to(memory_format=torch.channels_last)


def train_backbone(
    spec: StageSpec, data: ImageSet, normalize: Normalizer, seed: int, runtime: Runtime, scratch: Path, label: str
) -> tuple[Tensors, Meta]:
    """Train the backbone that `spec` describes on `data` (already the subset that `spec.data` names).

    What ends a training early costs the epoch that was begun, or a little more where epochs are short and the process
    is killed (`Keeper`); started again, it ends with the same numbers. The draws come from CPU generators on every
    device, so that a seed means one training.

    Args:
        spec: the stage.
        data: uint8 images on any device; moved to the runtime's.
        normalize: pixel statistics, of the true training set for every backbone.
        seed: of initialisation, order and augmentation.
        runtime: device, precision, progress.
        scratch: folder for the checkpoint.
        label: what progress calls this training.

    Returns:
        The model's state on the CPU, and a description: losses per epoch, seconds, images/s and how it ran.

    Raises:
        UserError: the training diverged.
    """
    epochs, keeper = Epochs(spec, len(data), label), Keeper(scratch)
    with capturing(runtime.device) as capture:
        stepper = _stepper(spec, data, normalize, seed, runtime, capture)
        images = data.images.to(runtime.device)
        batches = _Batches(spec, images, data.labels, data.num_classes, seed)
        history = resume(scratch, stepper)

        def steps(epoch: int, multipliers: Sequence[float]) -> Iterator[Tensor]:
            runtime.progress.safe_point()
            for multiplier, batch in zip(multipliers, batches.epoch(epoch, len(multipliers)), strict=True):
                yield stepper(batch.images, batch.labels, multiplier, batch.lam, batch.partner)

        threads = runtime.threads_for(images, spec.train.batch)
        task = runtime.progress.task(label, epochs.images(), epochs.images(history.epochs))
        with keeper.saving(), threads, task as advance:
            device = runtime.describe()  # here, where its threads are those that train
            train_epochs(epochs, history, stepper, keeper, advance, steps)
        state = Flat(stepper.model.state_dict()).tensors()
    how = {"fused": stepper.fused, "device": device}
    return state, {**described(spec, len(data), seed, runtime, stepper, history), **how}


def described(spec: StageSpec, images: int, seed: int, runtime: Runtime, stepper: Stepper, history: History) -> Meta:
    """Return what is told of every trained backbone."""
    precision = runtime.dtype(spec.train.precision)
    return {
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "epochs": history.epochs,
        "steps": spec.train.lengths(images)[1],
        "parameters": count_parameters(stepper.model),
        "losses": history.losses,
        "precision": str(precision).removeprefix("torch."),
        "compiled": stepper.compiled,
        "arithmetic": arithmetic(runtime.device, precision, compiled=stepper.compiled, fused=stepper.fused),
        "seconds": history.seconds,
        "images_per_second": spec.train.images(images) / max(history.seconds, 1e-9),
        "selection": "last epoch",
    }


def _stepper(
    spec: StageSpec, data: ImageSet, normalize: Normalizer, seed: int, runtime: Runtime, capture: Capture | None
) -> Stepper:
    """Build the model, its loss and its optimiser on the runtime's device."""
    assert spec.model is not None
    model = new_model(spec.model, data.images.shape[-1], data.num_classes, seed).to(runtime.device).train()
    loss = LOSSES.make(spec.loss, torch.tensor(data.counts(), device=runtime.device))
    compute = loss_function(model, loss, normalize.to(runtime.device), runtime.dtype(spec.train.precision))
    _, steps = spec.train.lengths(len(data))
    return Stepper(model, compute, spec.train, compile=runtime.should_compile(steps), capture=capture)


@dataclass(frozen=True)
class Batch:
    """What a step eats: uint8 images [B, H, W, C], labels [B], and MixUp's weight and partners if any."""

    images: Tensor
    labels: Tensor
    lam: Tensor | None
    partner: Tensor | None


class _Batches:
    """Draws, augments and cuts each epoch's batches, a function of (seed, epoch) alone.

    What is drawn is small and drawn on the CPU, whose generators give the same numbers everywhere; it goes to the
    images' device a chunk at a time, without waiting for it, and all work on pixels is done there.
    """

    def __init__(self, spec: StageSpec, images: Tensor, labels: Tensor, num_classes: int, seed: int) -> None:
        self._images, self._labels = images, labels.to(images.device)
        self._batch, self._seed = spec.train.batch, seed
        self._sampler = SAMPLERS.make(spec.sampler, labels.cpu(), num_classes)
        self._augment = build(spec.augment)
        self._mixing = MIXINGS.make(spec.mix) if spec.mix else None
        self.per_epoch = -(-len(labels) // spec.train.batch)

    def epoch(self, epoch: int, steps: int) -> Iterator[Batch]:
        """Yield the first `steps` batches of an epoch."""
        order = self._sampler(len(self._labels), torch_stream(self._seed, "order", epoch))[: steps * self._batch]
        augment_stream = torch_stream(self._seed, "augment", epoch)
        mixes = self._mixes(len(order), torch_stream(self._seed, "mix", epoch))
        for rows in torch.split(order.to(self._images.device, non_blocking=True), CHUNK_BATCHES * self._batch):
            images, labels = self._augment(self._images[rows], augment_stream), self._labels[rows]
            for batch in zip(torch.split(images, self._batch), torch.split(labels, self._batch), strict=True):
                yield Batch(*batch, *next(mixes))

    def _mixes(self, images: int, stream: torch.Generator) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Yield MixUp's weight and partners for each batch of an epoch of `images`; None without mixing."""
        if self._mixing is None:
            yield from itertools.repeat((None, None))
            return
        full, rest = divmod(images, self._batch)
        for steps, batch in [(full, self._batch), (1, rest)] if rest else [(full, self._batch)]:
            drawn = self._mixing.draw(steps, batch, stream)
            yield from zip(*(t.to(self._images.device, non_blocking=True) for t in drawn), strict=True)
