"""Stage 1: train a backbone end to end. The last epoch counts; the test split is never seen here."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tailscope.data.filedata import FileSet
from tailscope.data.imageset import ImageSet
from tailscope.errors import UserError
from tailscope.methods import LOSSES, MIXINGS, SAMPLERS
from tailscope.methods.augmentations import build
from tailscope.models import MODELS, CifarResNet, count_parameters
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training import engine as engines
from tailscope.training.engine import Work
from tailscope.training.epochs import Epochs, Flat, History, Keeper, resume, train_epochs
from tailscope.training.graph import CudaCapture, capturing
from tailscope.training.runtime import Engine, Runtime, arithmetic, named
from tailscope.training.step import Normalizer, Stepper, loss_function
from tailscope.training.team import Solo, Team

TakeSteps = Callable[[Stepper, int, Sequence[float]], Iterable[Tensor | None]]

CHUNK_BATCHES = 64
"""How many batches are augmented at once: vectorised, and bounded in memory."""


def new_model(call: str, channels: int, num_classes: int, seed: int) -> CifarResNet:
    """Build a freshly initialised model in channels-last layout, without touching the global random state."""
    with keyed(derive(seed, "init")):
        model = MODELS.make(call, channels, num_classes)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Training:
    """A backbone to train, wherever its images are.

    Attributes:
        spec: the stage.
        data: the training images, already the subset that `spec.data` names.
        sides: height and width of an image as the network sees it.
        normalize: pixel statistics, those of the true training set for every backbone.
        seed: of initialisation, order and augmentation.
        runtime: device, precision, engine and progress.
        scratch: folder for the checkpoint; None in followers.
        label: what progress calls this training.
        team: the processes that share the work.
        compiles: whether its steps can be compiled.
    """

    spec: StageSpec
    data: ImageSet | FileSet
    sides: tuple[int, int]
    normalize: Normalizer
    seed: int
    runtime: Runtime
    scratch: Path | None
    label: str
    team: Team = field(default_factory=Solo)
    compiles: bool = True

    @property
    def precision(self) -> torch.dtype:
        """The type of convolutions and matrix products."""
        return self.runtime.dtype(self.spec.train.precision)

    def stepper(self, capture: CudaCapture | None = None) -> Stepper:
        """Return the model, its loss and its optimiser on the runtime's device, as they begin."""
        spec, device = self.spec, self.runtime.device
        assert spec.model is not None
        model = new_model(spec.model, self.data.channels, self.data.num_classes, self.seed).to(device).train()
        loss = LOSSES.make(spec.loss, torch.tensor(self.data.counts(), device=device))
        compute = loss_function(model, loss, self.normalize.to(device), self.precision)
        return Stepper(model, compute, spec.train, capture=capture)

    def run(self, take: TakeSteps, capture: CudaCapture | None = None) -> tuple[Tensors, Meta]:
        """Train, or go on from the checkpoint; return the model's state on the CPU and a description.

        Args:
            take: takes an epoch's steps, given the stepper, the epoch and the multipliers of the learning rate.
            capture: of steps.

        Raises:
            UserError: the training diverged, or compiled steps were asked for and there are none.
        """
        epochs, keeper = Epochs(self.spec, len(self.data), self.label or "stage 1"), Keeper(self.scratch)
        stepper = self.stepper(capture)
        history = resume(self.scratch, stepper, self.team)
        if history.epochs < epochs.number or not history.engines:
            history.go_on_with(self.team.share(self.engine(stepper, history.engines) if self.team.rank == 0 else None))
        stepper.use(history.engines[-1])
        task = self.runtime.progress.task(self.label, epochs.images(), epochs.images(history.epochs))
        with keeper.saving(), task as advance:
            train_epochs(epochs, history, stepper, keeper, advance, partial(take, stepper))
        return Flat(stepper.model.state_dict()).tensors(), self._described(stepper, history)

    def engine(self, stepper: Stepper, before: Sequence[Engine] = ()) -> Engine:
        """Return the engine that was asked for, else the last of those before if it is still there, else the fastest.

        Raises:
            UserError: compiled steps were asked for and there are none.
        """
        possible = engines.possible(stepper.model, self.runtime.device, compiles=self.compiles)
        asked = self.runtime.engine
        if asked == "compiled" and asked not in possible:
            raise UserError("--engine compiled: steps on images in files are not compiled; take auto, eager or fused")
        if asked is not None:
            return asked if asked in possible else "eager"  # a network without anything to fuse
        if before and before[-1] in possible:
            return before[-1]
        train, hardware = self.spec.train, self.runtime.describe()
        images = (-(-train.batch // train.micro_batches), *self.sides, self.data.channels)
        alike = {
            "model": self.spec.model,
            "images": images,
            "mix": self.spec.mix is not None,
            "processor": hardware["gpu"] or hardware["cpu"],
            "threads": hardware["threads"],
            "precision": named(self.precision),
            "torch": torch.__version__,
        }
        work = Work(alike, images, train.lengths(len(self.data))[1] * train.micro_batches)
        trial = partial(self._trial, images, stepper.capture)
        return engines.choose(possible, work, trial, self.runtime.progress.note)

    def _trial(self, shape: Sequence[int], capture: CudaCapture | None, engine: Engine) -> Callable[[], object]:
        """Return what takes a step of a copy of the network on random images, and waits for it."""
        stepper, device = self.stepper(capture), self.runtime.device
        stepper.use(engine)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch_stream(0, "trial")).to(device)
        labels = torch.arange(len(images), device=device) % self.data.num_classes
        mix = (torch.tensor(0.5, device=device), labels.argsort()) if self.spec.mix else (None, None)
        return lambda: stepper(images, labels, 1e-3, *mix).item()

    def _described(self, stepper: Stepper, history: History) -> Meta:
        """Return what is told of every trained backbone; its device has the threads that trained."""
        spec, images = self.spec, len(self.data)
        return {
            "spec": spec.model_dump(mode="json"),
            "seed": self.seed,
            "epochs": history.epochs,
            "steps": spec.train.lengths(images)[1],
            "parameters": count_parameters(stepper.model),
            "losses": history.losses,
            "precision": named(self.precision),
            "compiled": "compiled" in history.engines,
            "fused": "fused" in history.engines,
            "arithmetic": arithmetic(self.runtime.device, self.precision, ", then ".join(history.engines)),
            "device": self.runtime.describe(),
            "processes": self.team.size,
            "seconds": history.seconds,
            "images_per_second": spec.train.images(images) / max(history.seconds, 1e-9),
            "selection": "last epoch",
        }


def train_backbone(
    spec: StageSpec, data: ImageSet, normalize: Normalizer, seed: int, runtime: Runtime, scratch: Path, label: str
) -> tuple[Tensors, Meta]:
    """Train a backbone on images in memory; the arguments are `Training`'s, the results those of its `run`.

    What ends a training early costs the epoch that was begun, or a little more where epochs are short and the process
    is killed (`Keeper`); started again, it ends with the same numbers. The draws come from CPU generators on every
    device, so that a seed means one training.
    """
    with capturing(runtime.device) as capture, runtime.threads_for(data.images, spec.train.batch):
        batches = _Batches(spec, data.images.to(runtime.device), data.labels, data.num_classes, seed)

        def take(stepper: Stepper, epoch: int, multipliers: Sequence[float]) -> Iterator[Tensor]:
            runtime.progress.safe_point()
            for multiplier, batch in zip(multipliers, batches.epoch(epoch, len(multipliers)), strict=True):
                yield stepper(batch.images, batch.labels, multiplier, batch.lam, batch.partner)

        height, width = data.images.shape[1:3]
        training = Training(spec, data, (height, width), normalize, seed, runtime, scratch, label)
        return training.run(take, capture)


@dataclass(frozen=True)
class Batch:
    """What a step is computed on: uint8 images [B, H, W, C], labels [B], and MixUp's weight and partners if any."""

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
