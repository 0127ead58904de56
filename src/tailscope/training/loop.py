"""The two stages of decoupled training. The test split is never seen here; the last epoch counts.

Stage 1: train a backbone end to end. The last epoch counts; the test split is never seen here.

Stage 1 on images in files: decoded by worker processes, and shared out among the processes of a team.

A batch is cut into the recipe's micro-batches, a function of the seed, the epoch and nothing else; process r of a team
takes every micro-batch m with m mod size = r. Batch normalisation works within a micro-batch. A step sums what all of
them give: the gradients, and the running statistics that each alone would lead to, whose mean is kept. So the number of
processes, like the number of workers, changes a result by rounding at most; the number of micro-batches does change
it, and is part of the recipe.

Stage 2: a new linear classifier on features of a frozen backbone.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tailscope import device as engines
from tailscope.data.decoding import DecodedBatch, decode, earlier_draws, refuse
from tailscope.data.images import Images, ImageSet, Rows
from tailscope.device import Engine, Runtime, Work, arithmetic, named
from tailscope.errors import UserError
from tailscope.methods import LOSSES, MIXINGS, SAMPLERS, augmentations
from tailscope.methods.augmentations import build
from tailscope.networks import MODELS
from tailscope.networks.resnets import CifarResNet, count_parameters
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.epochs import Epochs, Flat, History, Keeper, resume, train_epochs
from tailscope.training.step import CudaCapture, Normalizer, Stepper, capturing, loss_function, sgd
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
    data: Images
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


def train_on_files(
    spec: StageSpec,
    data: Images,
    normalize: Normalizer,
    seed: int,
    runtime: Runtime,
    scratch: Path | None,
    label: str,
    *,
    team: Team,
    workers: int | None = None,
) -> tuple[Tensors, Meta]:
    """Train a backbone on images in files; the arguments are `Training`'s, the results those of its `run`.

    All processes of the team call this together. What ends a training early costs the epoch that was begun, or a little
    more where epochs are short and the process is killed (`Keeper`); started again, with any number of processes, it
    goes on from there. `workers` processes decode for each of the team's; None decides.

    Raises:
        UserError: an image has become unreadable, the team does not divide the micro-batches evenly, or the training
            diverged.
    """
    batches = _FileBatches(spec, data, seed, runtime, team, workers)

    def take(stepper: Stepper, epoch: int, multipliers: Sequence[float]) -> Iterator[Tensor | None]:
        step = _SharedStep(stepper, team)
        for rate, (sizes, mine) in zip(multipliers, batches.epoch(epoch, len(multipliers)), strict=True):
            yield step(mine, sizes, rate) if sizes else None

    sides = (augmentations.size_of(spec.augment),) * 2
    # Micro-batches are of several sizes: they are not compiled.
    return Training(spec, data, sides, normalize, seed, runtime, scratch, label, team, compiles=False).run(take)


def cut(rows: Rows, batch: int, micro_batches: int) -> list[Rows]:
    """Cut one batch's rows into micro-batches of equal size, as far as that goes.

    A short batch gives fewer of them, none of a single image, which has no statistics to normalise by: only an epoch
    whose last batch is one image leaves it out.

    >>> [len(part) for part in cut(np.arange(8), 8, 2)], [len(part) for part in cut(np.arange(5), 8, 2)]
    ([4, 4], [3, 2])
    >>> [len(part) for part in cut(np.arange(3), 8, 2)], cut(np.arange(1), 8, 2)
    ([3], [])
    """
    if len(rows) < 2:
        return []
    size = -(-batch // micro_batches)
    return np.array_split(rows, min(-(-len(rows) // size), len(rows) // 2))


class _FileBatches:
    """Draws an epoch's rows, cuts them, and decodes what falls to this process."""

    def __init__(
        self, spec: StageSpec, data: Images, seed: int, runtime: Runtime, team: Team, workers: int | None
    ) -> None:
        self._train, self._data, self._seed, self._team = spec.train, data, seed, team
        self._device, self._workers = runtime.device, workers
        self._sampler = SAMPLERS.make(spec.sampler, data.labels, data.num_classes)
        self._transform = augmentations.training(spec.augment)
        self._mixing = MIXINGS.make(spec.mix) if spec.mix else None

    def epoch(self, epoch: int, steps: int) -> Iterator[tuple[list[int], Iterator[Batch]]]:
        """Yield for each of the first `steps` batches the sizes of all its micro-batches, and this process's own."""
        batch = self._train.batch
        order = self._sampler(len(self._data), torch_stream(self._seed, "order", epoch)).numpy()[: steps * batch]
        repeats = earlier_draws(order)
        places = [
            cut(np.arange(start, min(start + batch, len(order))), batch, self._train.micro_batches)
            for start in range(0, len(order), batch)
        ]
        mine = [part for parts in places for part in parts[self._team.rank :: self._team.size]]
        loader = iter(
            decode(
                self._data,
                self._transform,
                [order[part].tolist() for part in mine],
                workers=self._workers,
                pin_memory=self._device.type == "cuda",
                seed_of=partial(derive, self._seed, "augment", epoch),
                repeats=[repeats[part].tolist() for part in mine],
            )
        )
        for step, parts in enumerate(places):
            own = range(self._team.rank, len(parts), self._team.size)
            yield [len(part) for part in parts], (self._piece(next(loader), epoch, step, m) for m in own)

    def _piece(self, decoded: DecodedBatch, epoch: int, step: int, micro_batch: int) -> Batch:
        if decoded.unreadable:
            raise refuse(self._data, decoded.unreadable)
        lam = partner = None
        if self._mixing is not None:
            stream = torch_stream(self._seed, "mix", epoch, step, micro_batch)
            lams, partners = self._mixing.draw(1, len(decoded.rows), stream)
            lam, partner = lams[0].to(self._device), partners[0].to(self._device)
        images = decoded.images.to(self._device, non_blocking=True)
        return Batch(images, self._data.labels[decoded.rows].to(self._device), lam, partner)


class _SharedStep:
    """One optimisation step on a batch that is cut into micro-batches, here and in other processes."""

    def __init__(self, stepper: Stepper, team: Team) -> None:
        self._stepper, self._team = stepper, team
        self._parameters = [p for p in stepper.model.parameters() if p.requires_grad]
        self._statistics = [b for b in stepper.model.buffers() if b.is_floating_point()]
        self._counters = [b for b in stepper.model.buffers() if not b.is_floating_point()]

    def __call__(self, mine: Iterator[Batch], sizes: Sequence[int], rate: float) -> Tensor:
        """Take a step at `rate` times the base learning rate; return the batch's mean loss, still on the device."""
        for p in self._parameters:
            p.grad = torch.zeros_like(p)
        before, steps = [b.clone() for b in self._statistics], [b + 1 for b in self._counters]
        after = [torch.zeros_like(b) for b in self._statistics]
        mean_loss = torch.zeros((), device=self._parameters[0].device)
        for piece in mine:
            _restore(self._statistics, before)
            loss = self._stepper.compute(piece.images, piece.labels, piece.lam, piece.partner)
            loss = loss * (len(piece.labels) / sum(sizes))
            loss.backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
            torch._foreach_add_(after, self._statistics)
        self._team.sum([mean_loss, *after, *(p.grad for p in self._parameters if p.grad is not None)])
        torch._foreach_div_(after, len(sizes))
        _restore(self._statistics, after)
        _restore(self._counters, steps)
        self._stepper.set_rate(rate)
        self._stepper.optimizer.step()
        return mean_loss


def _restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


View = tuple[Tensor, Tensor]
"""Features [n, d] and labels int64 [n] of one augmented view of the training data."""


def fit_classifier(
    spec: StageSpec,
    views: Sequence[View],
    counts: Sequence[int],
    seed: int,
    start: tuple[Tensor, Tensor] | None = None,
    label: str = "classifier",
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

    Returns:
        `weight` float32 [C, d] and `bias` float32 [C], and a description.

    Raises:
        UserError: the training diverged.
    """
    started = time.monotonic()
    n = len(views[0][1])
    epochs = Epochs(spec, n, label)
    with keyed(derive(seed, "classifier")):
        classifier = nn.Linear(views[0][0].shape[1], len(counts))
    if start:
        classifier.load_state_dict(dict(zip(("weight", "bias"), start, strict=True)))
    loss_of = LOSSES.make(spec.loss, torch.tensor(counts))
    optimizer = sgd(classifier, spec.train, spec.train.learning_rate)
    losses = []
    for epoch in range(epochs.number):
        features, labels = views[epoch % len(views)]
        order = torch.randperm(n, generator=torch_stream(seed, "stage2", "order", epoch))
        features, labels = features[order].float(), labels[order]
        epoch_losses = []
        batches = zip(torch.split(features, spec.train.batch), torch.split(labels, spec.train.batch), strict=True)
        for (x, y), rate in zip(batches, epochs.multipliers(epoch), strict=False):
            optimizer.param_groups[0]["lr"] = spec.train.learning_rate * rate
            loss = loss_of(classifier(x), y).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            epoch_losses.append(loss.detach())
        losses.append(epochs.mean_loss(epoch, epoch_losses))
    epochs.require_finite(epochs.number - 1, Flat(classifier.state_dict()))
    meta: Meta = {
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "epochs": epochs.number,
        "steps": epochs.steps,
        "losses": losses,
        "seconds": time.monotonic() - started,
        "bn_mode": spec.bn_mode,
        "arithmetic": arithmetic(torch.device("cpu"), torch.float32),
    }
    return {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()}, meta
