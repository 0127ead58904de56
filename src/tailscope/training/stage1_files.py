"""Stage 1 on images in files: decoded by worker processes, and shared out among the processes of a team.

A batch is cut into the recipe's micro-batches, a function of the seed, the epoch and nothing else; process r of a team
takes every micro-batch m with m mod size = r. Batch normalisation works within a micro-batch. A step sums what all of
them give: the gradients, and the running statistics that each alone would lead to, whose mean is kept. So the number of
processes, like the number of workers, changes a result by rounding at most; the number of micro-batches does change
it, and is part of the recipe.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tailscope.data.decoding import DecodedBatch, decode, earlier_draws, refuse
from tailscope.data.filedata import FileSet, Rows
from tailscope.methods import MIXINGS, SAMPLERS, photos
from tailscope.seeds import derive, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import Batch, Training
from tailscope.training.step import Normalizer, Stepper
from tailscope.training.team import Team


def train_on_files(
    spec: StageSpec,
    data: FileSet,
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
    batches = _Batches(spec, data, seed, runtime, team, workers)

    def take(stepper: Stepper, epoch: int, multipliers: Sequence[float]) -> Iterator[Tensor | None]:
        step = _SharedStep(stepper, team)
        for rate, (sizes, mine) in zip(multipliers, batches.epoch(epoch, len(multipliers)), strict=True):
            yield step(mine, sizes, rate) if sizes else None

    sides = (photos.size_of(spec.augment),) * 2
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


class _Batches:
    """Draws an epoch's rows, cuts them, and decodes what falls to this process."""

    def __init__(
        self, spec: StageSpec, data: FileSet, seed: int, runtime: Runtime, team: Team, workers: int | None
    ) -> None:
        self._train, self._data, self._seed, self._team = spec.train, data, seed, team
        self._device, self._workers = runtime.device, workers
        self._sampler = SAMPLERS.make(spec.sampler, data.labels, data.num_classes)
        self._transform = photos.training(spec.augment)
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
                self._data.files,
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
            raise refuse(self._data.files, decoded.unreadable)
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
