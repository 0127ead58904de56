"""Stage 1 on images in files: decoded by worker processes, and shared out among the processes of a team.

A batch is cut into the recipe's micro-batches, a function of the seed, the epoch and nothing else; process r of a team
takes every micro-batch m with m mod size = r. Batch normalisation works within a micro-batch. A step sums what all of
them give: the gradients, and the running statistics that each alone would lead to, whose mean is kept. So the number of
processes, like the number of workers, changes a result by rounding at most; the number of micro-batches does change
it, and is part of the recipe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tailscope.data.decoding import DecodedBatch, decode, earlier_draws, refuse
from tailscope.data.streams import Images, Rows
from tailscope.methods import LOSSES, MIXINGS, SAMPLERS, photos
from tailscope.seeds import derive, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.epochs import Epochs, Flat, Keeper, resume, train_epochs
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import described, new_model
from tailscope.training.step import LossFunction, Normalizer, Stepper, loss_function
from tailscope.training.team import Team


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
    """Train the backbone that `spec` describes on `data` (already the subset that `spec.data` names).

    All processes of the team call this together. The last epoch counts. What ends a training early costs the epoch that
    was begun, or a little more where epochs are short and the process is killed (`Keeper`); started again, with any
    number of processes, it goes on from there.

    Args:
        spec: the stage; its first augmentation is `resized_crop`.
        data: the images.
        normalize: pixel statistics.
        seed: of initialisation, order and augmentation.
        runtime: device, precision, progress.
        scratch: folder for the checkpoint, None in followers.
        label: what progress calls this training.
        team: the processes that share the work.
        workers: processes that decode for each of them; None decides.

    Returns:
        The model's state, and a description, as `train_backbone` does.

    Raises:
        UserError: an image has become unreadable, the team does not divide the micro-batches evenly, or the training
            diverged.
    """
    epochs, keeper = Epochs(spec, len(data), label or "stage 1"), Keeper(scratch)
    assert spec.model is not None
    model = new_model(spec.model, data.channels, data.num_classes, seed).to(runtime.device).train()
    loss = LOSSES.make(spec.loss, torch.tensor(data.counts(), device=runtime.device))
    compute = loss_function(model, loss, normalize.to(runtime.device), runtime.dtype(spec.train.precision))
    stepper = Stepper(model, compute, spec.train, compile=False)
    step = _SharedStep(stepper, compute, spec.train.learning_rate, team)
    batches = _Batches(spec, data, seed, runtime, team, workers)
    history = resume(scratch, stepper, team)

    def steps(epoch: int, multipliers: Sequence[float]) -> Iterator[Tensor | None]:
        for rate, (sizes, mine) in zip(multipliers, batches.epoch(epoch, len(multipliers)), strict=True):
            yield step(mine, sizes, rate) if sizes else None

    task = runtime.progress.task(label, epochs.images(), epochs.images(history.epochs))
    with keeper.saving(), task as advance:
        train_epochs(epochs, history, stepper, keeper, advance, steps)
    state = Flat(model.state_dict()).tensors()
    how = {"device": runtime.describe(), "processes": team.size}
    return state, {**described(spec, len(data), seed, runtime, stepper, history), **how}


@dataclass(frozen=True)
class _Piece:
    """A decoded micro-batch: uint8 images [b, H, W, C], labels [b], MixUp's weight and partners if any."""

    images: Tensor
    labels: Tensor
    lam: Tensor | None
    partner: Tensor | None


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
        self, spec: StageSpec, data: Images, seed: int, runtime: Runtime, team: Team, workers: int | None
    ) -> None:
        self._train, self._data, self._seed, self._team = spec.train, data, seed, team
        self._device, self._workers = runtime.device, workers
        self._sampler = SAMPLERS.make(spec.sampler, data.labels, data.num_classes)
        self._transform = photos.training(spec.augment)
        self._mixing = MIXINGS.make(spec.mix) if spec.mix else None

    def epoch(self, epoch: int, steps: int) -> Iterator[tuple[list[int], Iterator[_Piece]]]:
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

    def _piece(self, decoded: DecodedBatch, epoch: int, step: int, micro_batch: int) -> _Piece:
        if decoded.unreadable:
            raise refuse(self._data, decoded.unreadable)
        lam = partner = None
        if self._mixing is not None:
            stream = torch_stream(self._seed, "mix", epoch, step, micro_batch)
            lams, partners = self._mixing.draw(1, len(decoded.rows), stream)
            lam, partner = lams[0].to(self._device), partners[0].to(self._device)
        images = decoded.images.to(self._device, non_blocking=True)
        return _Piece(images, self._data.labels[decoded.rows].to(self._device), lam, partner)


class _SharedStep:
    """One optimisation step on a batch that is cut into micro-batches, here and in other processes."""

    def __init__(self, stepper: Stepper, compute: LossFunction, learning_rate: float, team: Team) -> None:
        self._optimizer, self._compute = stepper.optimizer, compute
        self._learning_rate, self._team = learning_rate, team
        self._parameters = [p for p in stepper.model.parameters() if p.requires_grad]
        self._statistics = [b for b in stepper.model.buffers() if b.is_floating_point()]
        self._counters = [b for b in stepper.model.buffers() if not b.is_floating_point()]

    def __call__(self, mine: Iterator[_Piece], sizes: Sequence[int], rate: float) -> Tensor:
        """Take a step at `rate` times the base learning rate; return the batch's mean loss, still on the device."""
        for p in self._parameters:
            p.grad = torch.zeros_like(p)
        before, steps = [b.clone() for b in self._statistics], [b + 1 for b in self._counters]
        after = [torch.zeros_like(b) for b in self._statistics]
        mean_loss = torch.zeros((), device=self._parameters[0].device)
        for piece in mine:
            _restore(self._statistics, before)
            loss = self._compute(piece.images, piece.labels, piece.lam, piece.partner)
            loss = loss * (len(piece.labels) / sum(sizes))
            loss.backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
            torch._foreach_add_(after, self._statistics)
        self._team.sum([mean_loss, *after, *(p.grad for p in self._parameters if p.grad is not None)])
        torch._foreach_div_(after, len(sizes))
        _restore(self._statistics, after)
        _restore(self._counters, steps)
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * rate
        self._optimizer.step()
        return mean_loss


def _restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
