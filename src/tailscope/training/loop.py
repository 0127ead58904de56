"""Stage 1: train a backbone end to end. The test split is never seen here; the last epoch counts.

A batch is cut into the recipe's micro-batches, and batch normalisation works
within each; images in memory are one micro-batch. Images in files are decoded by worker processes, and process r of a
team takes every micro-batch m with m mod size = r. A step sums the gradients of all of them, and keeps the mean of the
running statistics that each alone would lead to. So the number of processes, like the number of workers, changes a
result by rounding at most; the number of micro-batches does change it, and is part of the recipe.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tailscope import device as engines
from tailscope.data.decoding import DecodedBatch, decode_drawn
from tailscope.data.images import Images, ImageSet, Rows
from tailscope.device import Engine, Runtime, Solo, Team, Work, arithmetic, named
from tailscope.errors import UserError
from tailscope.methods import SAMPLERS, TASKS, augmentations
from tailscope.methods.mixing import Mix, Mixing
from tailscope.networks import LAST_LAYERS, MODELS
from tailscope.networks.resnets import CifarResNet, add_branch, count_parameters
from tailscope.registry import split_call
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.store.files import CHECKPOINT, save_tensors, whole_checkpoint
from tailscope.training.objective import NOT_MIXED, Objective, mixing_of
from tailscope.training.step import (
    REPLAYED_AFTER,
    CudaCapture,
    Epochs,
    Flat,
    Normalizer,
    Stepper,
    capturing,
    loss_function,
)

CHUNK_BATCHES = 64
"""How many batches are augmented at once: vectorised, and bounded in memory."""

SPACING = 20
"""How many times longer than writing a checkpoint training goes on before the next: writing takes 5 % at most."""


def new_model(
    call: str, channels: int, num_classes: int, seed: int, last_layer: str = "linear", branches: int = 1
) -> CifarResNet:
    """Build a freshly initialised model in channels-last layout, without touching the global random state.

    Of `branches` there may be two, see `networks.resnets.add_branch`.
    """
    with keyed(derive(seed, "init")):
        model = MODELS.make(call, channels, num_classes)
        if branches == 2:
            add_branch(model, MODELS.make(call, channels, num_classes), call)
        model.classifier = LAST_LAYERS.make(last_layer, model.classifier)
    return model.to(memory_format=torch.channels_last)


@dataclass
class History:
    """What grows while training, kept in checkpoints; `engines` took the steps so far, one after the other."""

    epochs: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)


class Keeper:
    """Keeps the last finished epoch: in memory, and now and then on disk.

    An exception, a limit of time and Ctrl-C among them, leaves the last finished epoch on disk. What ends the process
    at once leaves the last checkpoint. The first finished epoch is written, the last, and each that ends `SPACING`
    times as long after the checkpoint before as writing that one took: where epochs are longer than that, a killed
    run redoes only the epoch that was begun, else also those of that time.
    """

    def __init__(self, folder: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Keep checkpoints in `folder`; None: keep nothing."""
        self._file = None if folder is None else folder / CHECKPOINT
        self._clock, self._written, self._took = clock, -math.inf, 0.0
        self._unwritten: tuple[Flat, Meta] | None = None

    def keep(self, state: Flat, history: History, *, last: bool) -> None:
        """Take in a finished epoch, and write it if it is time."""
        self._unwritten = state, asdict(history)
        if last or self._clock() - self._written >= SPACING * self._took:
            self._write()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Write what is only in memory where the block ends by an exception."""
        try:
            yield
        except BaseException:
            with suppress(UserError, RuntimeError):  # a full disk, or a GPU that has failed: what came first is told
                self._write()
            raise

    def _write(self) -> None:
        if self._file is None or self._unwritten is None:
            return
        started = self._clock()
        state, meta = self._unwritten
        save_tensors(self._file, state.tensors(), meta)
        self._unwritten, self._written = None, self._clock()
        self._took = self._written - started


@dataclass(frozen=True)
class Training:
    """A backbone to train, on images in memory or in files.

    What ends a training early costs the epoch that was begun, or a little more where epochs are short and the process
    is killed (`Keeper`); started again, it ends with the same numbers. The draws come from CPU generators on every
    device, so that a seed means one training.

    Attributes:
        data: the training images, already the subset that `spec.data` names; after them, where `spec.unlabelled` is
            given, those without labels of their own, with the labels that were predicted.
        normalize: pixel statistics, those of the true training set for every backbone.
        scratch: folder for the checkpoint; None keeps none, as in followers.
        label: what progress calls this training.
        team: the processes that share the work on files, which all `run` this together.
        workers: processes that decode files, for each of the team's; None decides.
        start: weights by name that the network starts from, new ones where it names none.
    """

    spec: StageSpec
    data: Images
    normalize: Normalizer
    seed: int
    runtime: Runtime
    scratch: Path | None
    label: str
    team: Team = field(default_factory=Solo)
    workers: int | None = None
    start: Tensors = field(default_factory=dict)

    def run(self) -> tuple[Tensors, Meta]:
        """Train, or go on from the checkpoint; return the model's state on the CPU and a description.

        Raises:
            UserError: the training diverged, an image has become unreadable, or compiled steps were asked for and
                there are none.
        """
        in_memory = isinstance(self.data, ImageSet)
        capture = capturing(self.runtime.device) if in_memory else nullcontext()
        with capture as captured, self.runtime.threads_for(math.prod(self._shape[:3])):
            stepper = self.stepper(captured)
            history = self._resume(stepper)
            stepper.use(history.engines[-1])
            self._train(stepper, history)
            return Flat(stepper.model.state_dict()).tensors(), self._described(stepper, history)

    def stepper(self, capture: CudaCapture | None = None) -> Stepper:
        """Return the model, its loss and its optimiser on the runtime's device, as they begin."""
        spec, device = self.spec, self.runtime.device
        assert spec.model is not None
        model = new_model(spec.model, self.data.channels, self._classes, self.seed, spec.last_layer, spec.branches)
        model.load_state_dict({**model.state_dict(), **self.start})
        model = model.to(device).train()
        objective = Objective(spec, self.data.counts(), model.feature_dim, self.seed, device)
        compute = loss_function(model, objective, self.normalize.to(device), self._precision)
        return Stepper(model, objective, compute, spec.train, capture=capture)

    def engine(self, stepper: Stepper, before: Sequence[Engine] = ()) -> Engine:
        """Return the engine that was asked for, else the last one before if it is still there, else the fastest."""
        # Micro-batches are of several sizes: they are not compiled.
        compiles = isinstance(self.data, ImageSet)
        possible = engines.possible(stepper.model, self.runtime.device, compiles=compiles)
        asked = self.runtime.engine
        if asked == "compiled" and asked not in possible:
            raise UserError("--engine compiled: steps on images in files are not compiled; take auto, eager or fused")
        if asked is not None:
            return asked if asked in possible else "eager"  # a network without anything to fuse
        if before and before[-1] in possible:
            return before[-1]
        train, hardware = self.spec.train, self.runtime.describe()
        parts = (self.spec.loss, self.spec.last_layer, self.spec.mix, self.spec.weights)
        alike = {
            "model": f"{self.spec.model}{' in two branches' * (self.spec.branches - 1)}",
            "images": self._shape,
            "parts": [part and split_call(part)[0] for part in parts],
            "processor": hardware["gpu"] or hardware["cpu"],
            "threads": hardware["threads"],
            "precision": named(self._precision),
            "torch": torch.__version__,
            **({"captured": True} if stepper.capture else {}),
        }
        work = Work(alike, self._shape, train.lengths(self._images)[1] * train.micro_batches)
        return engines.choose(possible, work, partial(self._trial, stepper.capture), self.runtime.progress.note)

    @property
    def _classes(self) -> int:
        return TASKS.make(self.spec.task).classes if self.spec.task else self.data.num_classes

    @property
    def _images(self) -> int:
        """How many make an epoch."""
        return self.spec.epoch(len(self.data))

    @property
    def _precision(self) -> torch.dtype:
        return self.runtime.dtype(self.spec.train.precision)

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """Of a micro-batch of images [B, H, W, C], of all branches."""
        if isinstance(self.data, ImageSet):
            height, width = self.data.images.shape[1:3]
        else:
            height = width = augmentations.size_of(self.spec.augment)
        train = self.spec.train
        return self.spec.branches * -(-train.batch // train.micro_batches), height, width, self.data.channels

    def _trial(self, capture: CudaCapture | None, engine: Engine) -> Callable[[], object]:
        """Return what takes a step of a copy of the network on random images, and waits for it.

        Where steps are captured, it replays: those before, which load, compile and capture, measure no training.
        """
        stepper, device = self.stepper(capture), self.runtime.device
        stepper.use(engine)
        images = torch.randint(256, self._shape, dtype=torch.uint8, generator=torch_stream(0, "trial")).to(device)
        labels = torch.arange(len(images), device=device) % self._classes
        mixing = mixing_of(self.spec, self.data.counts(), stepper.model)
        drawn = mixing.draw(labels[None].cpu(), self._shape[1:3], torch_stream(0, "trial")) if mixing else NOT_MIXED
        mix = drawn.of(0, device)

        def step() -> object:
            return stepper(images, labels, 1e-3, mix).item()

        for _ in range(REPLAYED_AFTER if capture else 0):
            step()
        return step

    def _resume(self, stepper: Stepper) -> History:
        """Restore the leader's last checkpoint that is whole and fits, in every process, and choose the engine."""
        whole = None if self.scratch is None else whole_checkpoint(self.scratch, stepper.shapes())
        tensors, meta = self.team.share(None if whole is None else (whole[1].tensors, whole[1].meta)) or ({}, {})
        if tensors:
            stepper.restore(tensors)
        history = History(**meta)
        if history.epochs < self.spec.train.lengths(self._images)[0] or not history.engines:
            engine = self.team.share(self.engine(stepper, history.engines) if self.team.rank == 0 else None)
            if history.engines[-1:] != [engine]:
                history.engines.append(engine)
        return history

    def _train(self, stepper: Stepper, history: History) -> None:
        """Train the epochs that the history lacks."""
        epochs, keeper = Epochs(self.spec, self._images, self.label or "stage 1"), Keeper(self.scratch)
        mixing = mixing_of(self.spec, self.data.counts(), stepper.model)
        batches = _Batches(self.spec, self.data, mixing, self.seed, self.runtime.device, self.team, self.workers)
        done = epochs.images_before(history.epochs)
        task = self.runtime.progress.task(self.label, epochs.images_before(epochs.number), done)
        with keeper.saving(), task as advance:
            for epoch in range(history.epochs, epochs.number):
                started, losses = time.monotonic(), []
                self.runtime.progress.safe_point()
                multipliers, progress = epochs.multipliers(epoch), epochs.progress(epoch)
                drawn = batches.epoch(epoch, len(multipliers), progress[0])
                for rate, share, (sizes, mine) in zip(multipliers, progress, drawn, strict=True):
                    if sizes:
                        stepper.objective.at(share)
                        losses.append(_take_step(stepper, mine, sizes, rate, self.team))
                    advance(epochs.batch)
                state = Flat(stepper.state())  # asked for before the losses, which wait for the device
                mean = epochs.mean_loss(epoch, losses)
                epochs.require_finite(epoch, state)
                history.losses.append(mean)
                history.epochs = epoch + 1
                history.seconds += (took := time.monotonic() - started)
                last, numbers = history.epochs == epochs.number, epochs.numbers(epoch, mean, took)
                keeper.keep(state, history, last=last)
                self.runtime.progress.log(self.label, history.epochs, numbers, last=last)

    def _described(self, stepper: Stepper, history: History) -> Meta:
        """Return what is told of every trained backbone; its device has the threads that trained."""
        spec, images = self.spec, self._images
        return {
            "spec": spec.model_dump(mode="json"),
            "seed": self.seed,
            "epochs": history.epochs,
            "steps": spec.train.lengths(images)[1],
            "parameters": count_parameters(stepper.model),
            "losses": history.losses,
            "precision": named(self._precision),
            "compiled": "compiled" in history.engines,
            "fused": "fused" in history.engines,
            "arithmetic": arithmetic(self.runtime.device, self._precision, ", then ".join(history.engines)),
            "device": self.runtime.describe(),
            "processes": self.team.size,
            "seconds": history.seconds,
            "images_per_second": spec.branches * spec.train.images(images) / max(history.seconds, 1e-9),
            "selection": "last epoch",
        }


@dataclass(frozen=True)
class Batch:
    """What a step is computed on: uint8 images [B, H, W, C], labels [B], how they are mixed, and their losses' weights.

    Weights are [B], None where all are 1. For two branches the first half of all is the batch of the one, the second
    half that of the other.
    """

    images: Tensor
    labels: Tensor
    mix: Mix = NOT_MIXED
    weights: Tensor | None = None


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


class _Batches:
    """Draws, augments and cuts each epoch's batches, a function of (seed, epoch) alone.

    What is drawn is small and drawn on the CPU, whose generators give the same numbers everywhere. All work on pixels
    in memory is done on their device, a chunk of batches at a time; files are augmented by the workers that decode.
    """

    def __init__(
        self,
        spec: StageSpec,
        data: Images,
        mixing: Mixing | None,
        seed: int,
        device: torch.device,
        team: Team,
        workers: int | None,
    ) -> None:
        self._spec, self._data, self._seed, self._device = spec, data, seed, device
        self._team, self._workers, self._batch = team, workers, spec.branches * spec.train.batch
        self._labels, self._drawn_labels = data.labels.to(device), data.labels.cpu()
        self._images = data.images.to(device) if isinstance(data, ImageSet) else None
        named = {"order": spec.sampler, **({"second order": spec.second_sampler} if spec.second_sampler else {})}
        self._samplers = {
            draws: (SAMPLERS.make(call, self._drawn_labels, data.num_classes), "progress" in SAMPLERS.needs(call))
            for draws, call in named.items()
        }
        self._mixing, self._task = mixing, TASKS.make(spec.task) if spec.task else None
        self._weights = None
        if spec.unlabelled not in (None, 1.0):
            self._weights = torch.ones(len(data), device=device)
            self._weights[spec.epoch(len(data)) :] = spec.unlabelled

    def epoch(self, epoch: int, steps: int, progress: float) -> Iterator[tuple[list[int], Iterator[Batch]]]:
        """Yield for each of the first `steps` batches the sizes of all its micro-batches, and this process's own.

        `progress` is the share of the training that is done before the epoch.
        """
        images, orders = self._spec.epoch(len(self._labels)), []
        for draws, (sampler, moves) in self._samplers.items():
            orders.append(sampler(images, torch_stream(self._seed, draws, epoch), *((progress,) if moves else ())))
        parts = torch.split(torch.stack(orders), self._spec.train.batch, 1)  # one branch's batch, then the other's
        order = torch.cat([part.flatten() for part in parts])[: steps * self._batch]
        if self._images is None:
            yield from self._from_files(order.numpy(), epoch)
        else:
            for batch in self._from_memory(self._images, order, epoch):
                yield [len(batch.labels)], iter([batch])

    def _from_memory(self, pixels: Tensor, order: Tensor, epoch: int) -> Iterator[Batch]:
        augment = augmentations.build(self._spec.augment)
        size = pixels.shape[1], pixels.shape[2]
        stream, asked = torch_stream(self._seed, "augment", epoch), torch_stream(self._seed, "task", epoch)
        mixes = self._mixes(self._drawn_labels[order], size, epoch)
        for rows in torch.split(order.to(self._device, non_blocking=True), CHUNK_BATCHES * self._batch):
            images, labels = augment(pixels[rows], stream), self._labels[rows]
            if self._task is not None:
                images, labels = self._task(images, asked)
            each = (torch.split(tensor, self._batch) for tensor in (images, labels, rows))
            for shown, answers, these in zip(*each, strict=True):
                yield Batch(shown, answers, next(mixes), self._weights_of(these))

    def _mixes(self, labels: Tensor, size: tuple[int, int], epoch: int) -> Iterator[Mix]:
        """Yield how each batch of an epoch is mixed, whose images have these labels and this size."""
        if self._mixing is None:
            yield from itertools.repeat(NOT_MIXED)
            return
        full, stream = len(labels) // self._batch * self._batch, torch_stream(self._seed, "mix", epoch)
        whole, short = labels[:full].view(-1, self._batch), labels[None, full:]
        for several in (whole, short) if full < len(labels) else (whole,):
            drawn = self._mixing.draw(several, size, stream)
            yield from (drawn.of(step, self._device) for step in range(len(several)))

    def _from_files(self, order: Rows, epoch: int) -> Iterator[tuple[list[int], Iterator[Batch]]]:
        rank, size, train = self._team.rank, self._team.size, self._spec.train
        places = []
        for start in range(0, len(order), self._batch):
            halves = np.split(np.arange(start, min(start + self._batch, len(order))), self._spec.branches)
            each = (cut(half, train.batch, train.micro_batches) for half in halves)
            places.append([np.concatenate(parts) for parts in zip(*each, strict=True)])
        decoded = decode_drawn(
            self._data,
            augmentations.training(self._spec.augment),
            order,
            [part for parts in places for part in parts[rank::size]],
            workers=self._workers,
            pin_memory=self._device.type == "cuda",
            seed_of=partial(derive, self._seed, "augment", epoch),
        )
        for step, parts in enumerate(places):
            own = range(rank, len(parts), size)
            yield [len(part) for part in parts], (self._decoded(next(decoded), epoch, step, m) for m in own)

    def _decoded(self, decoded: DecodedBatch, *place: int) -> Batch:
        mix = NOT_MIXED
        if self._mixing is not None:
            labels, size = self._drawn_labels[decoded.rows], (decoded.images.shape[1], decoded.images.shape[2])
            mix = self._mixing.draw(labels[None], size, torch_stream(self._seed, "mix", *place)).of(0, self._device)
        images, answers = decoded.images.to(self._device, non_blocking=True), self._labels[decoded.rows]
        if self._task is not None:
            images, answers = self._task(images, torch_stream(self._seed, "task", *place))
        return Batch(images, answers, mix, self._weights_of(decoded.rows))

    def _weights_of(self, rows: Tensor) -> Tensor | None:
        return None if self._weights is None else self._weights[rows.to(self._device)]


def _take_step(stepper: Stepper, mine: Iterator[Batch], sizes: Sequence[int], rate: float, team: Team) -> Tensor:
    """Take a step on all micro-batches of a batch, here and in other processes; return its mean loss, on the device."""
    if len(sizes) == team.size == 1:
        batch = next(mine)
        return stepper(batch.images, batch.labels, rate, batch.mix, batch.weights)
    trained = (stepper.model, stepper.objective.own)
    parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
    statistics = [b for b in stepper.model.buffers() if b.is_floating_point()]
    counters = [b for b in stepper.model.buffers() if not b.is_floating_point()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    before, steps = [b.clone() for b in statistics], [b + 1 for b in counters]
    after = [torch.zeros_like(b) for b in statistics]
    mean_loss = torch.zeros((), device=parameters[0].device)
    for batch in mine:
        torch._foreach_copy_(statistics, before)
        loss = stepper.compute(batch.images, batch.labels, batch.weights, *batch.mix) * (len(batch.labels) / sum(sizes))
        loss.backward()  # type: ignore[no-untyped-call]
        mean_loss += loss.detach()
        torch._foreach_add_(after, statistics)
    team.sum([mean_loss, *after, *(p.grad for p in parameters if p.grad is not None)])
    torch._foreach_div_(after, len(sizes))
    torch._foreach_copy_(statistics, after)
    torch._foreach_copy_(counters, steps)
    stepper.set_rate(rate)
    stepper.optimizer.step()
    stepper.optimizer.zero_grad(set_to_none=True)
    return mean_loss
