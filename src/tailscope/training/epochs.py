"""The epochs of a stage: their learning rates, what is made of their losses, and what is kept of them on disk."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tailscope.device import Engine
from tailscope.errors import UserError
from tailscope.progress import Advance
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.store.files import CHECKPOINT, save_tensors, whole_checkpoint
from tailscope.training import SCHEDULES
from tailscope.training.step import Stepper
from tailscope.training.team import Solo, Team

SPACING = 20
"""How many times longer than writing a checkpoint training goes on before the next: writing takes 5 % at most."""


class Epochs:
    """How long a stage trains, at which rates, and whether it still has numbers to train with."""

    def __init__(self, stage: StageSpec, images: int, label: str) -> None:
        """Plan a stage on `images` training images; `label` names it in messages."""
        self._stage, self._label = stage, label
        self.batch = stage.train.batch
        self.number, self.steps = stage.train.lengths(images)
        self.per_epoch = -(-images // self.batch)
        self._multipliers = SCHEDULES.make(stage.train.schedule, self.steps, self.per_epoch)

    def images(self, epochs: int | None = None) -> int:
        """Return how many images `epochs` epochs show in full batches; None: all steps."""
        return (self.steps if epochs is None else epochs * self.per_epoch) * self.batch

    def multipliers(self, epoch: int) -> list[float]:
        """Return the multiplier of the base learning rate for each step of an epoch; the last may be cut short."""
        return self._multipliers[epoch * self.per_epoch : (epoch + 1) * self.per_epoch]

    def mean_loss(self, epoch: int, losses: list[Tensor]) -> float:
        """Return the mean of an epoch's losses; they are read here, all at once, so that no step waits for its own.

        Raises:
            UserError: one of them is not finite; it names the first.
        """
        together = torch.stack(losses)
        mean = float(together.mean())
        if math.isfinite(mean):  # then all of them are
            return mean
        infinite = (~together.isfinite()).nonzero().flatten().tolist()
        step = infinite[0] if infinite else int(together.argmax())
        loss = f"the loss is {float(together[step])}"
        if epoch == step == 0:
            raise UserError(
                f"{self._label}: {loss} at the first step, before anything was learnt, so not by the learning rate;"
                f" look at the loss {self._stage.loss} and at what it is computed from"
            )
        raise self._diverged(loss, epoch, step)

    def require_finite(self, epoch: int, state: "Flat") -> None:
        """Refuse weights that an epoch left without numbers; the loss of its last step does not show what that did.

        Raises:
            UserError: a weight, a running statistic or a momentum is not finite.
        """
        if not state.finite():
            raise self._diverged("weights are no longer finite", epoch, len(self.multipliers(epoch)) - 1)

    def _diverged(self, what: str, epoch: int, step: int) -> UserError:
        rate, multipliers = self._stage.train.learning_rate, self.multipliers(epoch)
        how = f", as in --recipe 'NAME(learning_rate={rate / 10:g})'" if self._stage.model else " for stage 2"
        return UserError(
            f"{self._label}: training diverged, {what} in epoch {epoch + 1} of {self.number}, step {step + 1} of"
            f" {len(multipliers)}, learning rate {rate * multipliers[step]:.3g}; take a lower one{how}"
        )


class Flat:
    """A copy of named tensors, as one buffer a type: copied by one operation, moved to the CPU by one transfer."""

    def __init__(self, tensors: Tensors) -> None:
        """Copy the tensors, on their device."""
        self._layout = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        types = dict.fromkeys(t.dtype for t in tensors.values())
        self._buffers = {
            kind: torch.cat([t.detach().reshape(-1) for t in tensors.values() if t.dtype == kind]) for kind in types
        }

    def finite(self) -> bool:
        """Whether there is neither a NaN nor an infinity."""
        # One NaN or infinity makes the sum one, and it takes a single pass.
        return all(math.isfinite(buffer.sum(dtype=torch.float64)) for buffer in self._buffers.values())

    def tensors(self) -> Tensors:
        """Return the tensors, on the CPU."""
        parts = {
            kind: iter(torch.split(buffer.cpu(), [shape.numel() for t, shape in self._layout.values() if t == kind]))
            for kind, buffer in self._buffers.items()
        }
        return {name: next(parts[kind]).view(shape) for name, (kind, shape) in self._layout.items()}


@dataclass
class History:
    """What grows while training, kept in checkpoints; `engines` took the steps so far, one after the other."""

    epochs: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)

    def go_on_with(self, engine: Engine) -> None:
        """Note which engine takes the next steps."""
        if self.engines[-1:] != [engine]:
            self.engines.append(engine)


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


def resume(scratch: Path | None, stepper: Stepper, team: Team | None = None) -> History:
    """Restore the last checkpoint that is whole and fits, in every process of the team, if its leader has one.

    What does not is named in a warning.
    """
    whole = None if scratch is None else whole_checkpoint(scratch, stepper.shapes())
    found = None if whole is None else (whole[1].tensors, whole[1].meta)
    tensors, meta = (team or Solo()).share(found) or ({}, {})
    if tensors:
        stepper.restore(tensors)
    return History(**meta)


def train_epochs(
    epochs: Epochs,
    history: History,
    stepper: Stepper,
    keeper: Keeper,
    advance: Advance,
    steps: Callable[[int, Sequence[float]], Iterable[Tensor | None]],
) -> None:
    """Train the epochs that the history lacks.

    Args:
        epochs: the plan.
        history: what was done before; grows.
        stepper: whose parameters are trained.
        keeper: gets every finished epoch.
        advance: is told of every step's images.
        steps: takes an epoch's steps, given its number and the multipliers of the learning rate, and yields each
            step's loss; None for one that was left out.

    Raises:
        UserError: the training diverged, or a checkpoint cannot be written.
    """
    for epoch in range(history.epochs, epochs.number):
        started = time.monotonic()
        losses = []
        for loss in steps(epoch, epochs.multipliers(epoch)):
            if loss is not None:
                losses.append(loss)
            advance(epochs.batch)
        state = Flat(stepper.state())  # asked for before the losses, which wait for the device
        mean = epochs.mean_loss(epoch, losses)
        epochs.require_finite(epoch, state)
        history.losses.append(mean)
        history.epochs = epoch + 1
        history.seconds += time.monotonic() - started
        keeper.keep(state, history, last=history.epochs == epochs.number)
