"""Stage 1: train a backbone end to end. The last epoch counts; the test split is never seen here."""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tailscope.data.imageset import ImageSet
from tailscope.methods import LOSSES, MIXINGS, SAMPLERS
from tailscope.methods.augmentations import build
from tailscope.models import MODELS, CifarResNet, count_parameters
from tailscope.seeds import derive, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import CHECKPOINT, Meta, Tensors, load_checkpoint, save_tensors
from tailscope.training.graph import CudaCapture
from tailscope.training.runtime import Runtime, arithmetic
from tailscope.training.schedules import SCHEDULES
from tailscope.training.step import Normalizer, Stepper, loss_function

CHUNK_BATCHES = 64
"""How many batches are augmented at once: vectorised, and bounded in memory."""

_GLOBAL_RANDOM_STATE = threading.Lock()
"""Layers are initialised from it, and the threads of a process have one in common."""


def new_model(call: str, channels: int, num_classes: int, seed: int) -> CifarResNet:
    """Build a freshly initialised model in channels-last layout, without touching the global random state."""
    with _GLOBAL_RANDOM_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        model = MODELS.make(call, channels, num_classes)
    return model.to(memory_format=torch.channels_last)


@dataclass
class History:
    """What grows while training, kept in checkpoints."""

    epochs: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def train_backbone(
    spec: StageSpec, data: ImageSet, normalize: Normalizer, seed: int, runtime: Runtime, scratch: Path, label: str
) -> tuple[Tensors, Meta]:
    """Train the backbone that `spec` describes on `data` (already the subset that `spec.data` names).

    A checkpoint after every epoch lets a killed run redo at most one; it ends with the same numbers.

    Args:
        spec: the stage.
        data: uint8 images on any device; moved to the runtime's.
        normalize: pixel statistics, of the true training set for every backbone.
        seed: of initialisation, order and augmentation.
        runtime: device, precision, progress.
        scratch: folder for the checkpoint.
        label: what progress calls this training.

    Returns:
        The model's state, and a description: losses per epoch, seconds, images/s and how it ran.
    """
    images, labels = data.images.to(runtime.device), data.labels.to(runtime.device)
    epochs, steps = spec.train.lengths(len(labels))
    stepper = _stepper(spec, data, normalize, seed, runtime)
    batches = _Batches(spec, images, labels, data.num_classes, seed)
    multipliers = SCHEDULES.make(spec.train.schedule, steps, batches.per_epoch)
    history = _resume(scratch, stepper)
    planned, done = (n * spec.train.batch for n in (steps, history.epochs * batches.per_epoch))
    threads = runtime.threads_for(images, spec.train.batch)
    with threads, runtime.progress.task(label, planned, done) as advance:
        device = runtime.describe()  # here, where its threads are those that train
        for epoch in range(history.epochs, epochs):
            runtime.progress.safe_point()
            started = time.monotonic()
            losses = []
            rates = multipliers[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
            for rate, batch in zip(rates, batches.epoch(epoch, len(rates)), strict=True):
                losses.append(stepper(batch.images, batch.labels, rate, batch.lam, batch.partner))
                advance(spec.train.batch)
            history.losses.append(float(torch.stack(losses).mean()))
            history.epochs = epoch + 1
            history.seconds += time.monotonic() - started
            save_tensors(scratch / CHECKPOINT, stepper.state(), vars(history))
    return stepper.model.state_dict(), {
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "parameters": count_parameters(stepper.model),
        "losses": history.losses,
        "precision": str(runtime.dtype(spec.train.precision)).removeprefix("torch."),
        "compiled": stepper.compiled,
        "fused": stepper.fused,
        "device": device,
        "arithmetic": arithmetic(
            runtime.device, runtime.dtype(spec.train.precision), compiled=stepper.compiled, fused=stepper.fused
        ),
        "seconds": history.seconds,
        "images_per_second": spec.train.images(len(labels)) / max(history.seconds, 1e-9),
        "selection": "last epoch",
    }


def _stepper(spec: StageSpec, data: ImageSet, normalize: Normalizer, seed: int, runtime: Runtime) -> Stepper:
    """Build the model, its loss and its optimiser on the runtime's device."""
    assert spec.model is not None
    model = new_model(spec.model, data.images.shape[-1], data.num_classes, seed).to(runtime.device).train()
    loss = LOSSES.make(spec.loss, torch.tensor(data.counts(), device=runtime.device))
    compute = loss_function(model, loss, normalize.to(runtime.device), runtime.dtype(spec.train.precision))
    _, steps = spec.train.lengths(len(data))
    capture = CudaCapture() if runtime.device.type == "cuda" else None
    return Stepper(model, compute, spec.train, compile=runtime.should_compile(steps), capture=capture)


@dataclass(frozen=True)
class Batch:
    """What a step eats: uint8 images [B, H, W, C], labels [B], and MixUp's weight and partners if any."""

    images: Tensor
    labels: Tensor
    lam: Tensor | None
    partner: Tensor | None


class _Batches:
    """Draws, augments and cuts each epoch's batches, a function of (seed, epoch) alone."""

    def __init__(self, spec: StageSpec, images: Tensor, labels: Tensor, num_classes: int, seed: int) -> None:
        self._images, self._labels, self._batch, self._seed = images, labels, spec.train.batch, seed
        self._sampler = SAMPLERS.make(spec.sampler, labels, num_classes)
        self._augment = build(spec.augment)
        self._mixing = MIXINGS.make(spec.mix) if spec.mix else None
        self.per_epoch = -(-len(labels) // spec.train.batch)

    def epoch(self, epoch: int, steps: int) -> Iterator[Batch]:
        """Yield the first `steps` batches of an epoch."""
        device = self._images.device
        order = self._sampler(len(self._labels), torch_stream(self._seed, "order", epoch, device=device))
        order = order[: steps * self._batch]
        augment_stream = torch_stream(self._seed, "augment", epoch, device=device)
        mixes = self._mixes(len(order), torch_stream(self._seed, "mix", epoch, device=device))
        for rows in torch.split(order, CHUNK_BATCHES * self._batch):
            images, labels = self._augment(self._images[rows], augment_stream), self._labels[rows]
            for batch in zip(torch.split(images, self._batch), torch.split(labels, self._batch), strict=True):
                yield Batch(*batch, *next(mixes))

    def _mixes(self, images: int, stream: torch.Generator) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Yield MixUp's weight and partners for each batch of an epoch of `images`; None without mixing."""
        if self._mixing is None:
            yield from itertools.repeat((None, None))
            return
        full, rest = divmod(images, self._batch)
        yield from zip(*self._mixing.draw(full, self._batch, stream), strict=True)
        if rest:
            lam, partner = self._mixing.draw(1, rest, stream)
            yield lam[0], partner[0]


def _resume(scratch: Path, stepper: Stepper) -> History:
    """Restore the last checkpoint, if there is one."""
    path = scratch / CHECKPOINT
    if not path.is_file():
        return History()
    checkpoint = load_checkpoint(path)
    stepper.restore(checkpoint.tensors)
    return History(**checkpoint.meta)
