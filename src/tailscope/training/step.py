"""A step from uint8 images to moved parameters, on a GPU captured as a CUDA graph; and how many make a training.

A small network spends its time on launching kernels; a graph launches all of a step's at once. It goes on using the
memory that it found: its own, and the workspaces that cuBLAS keeps for a stream. Two graphs of one stream share these,
and in some versions of PyTorch the end of one frees them for both. So every training has a stream that no other has at
the same time: all of its work runs there, and its graphs end together, when the last of them has been replayed.
"""

import logging
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailscope.device import Engine
from tailscope.errors import UserError
from tailscope.methods.mixing import Mix
from tailscope.networks import norm_act
from tailscope.networks.resnets import CifarResNet
from tailscope.seeds import alone
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store import Tensors
from tailscope.training import SCHEDULES
from tailscope.training.objective import NOT_MIXED, Objective

WARM_UP = 3
"""Steps before the capture: they compile, choose algorithms and create what the optimiser remembers."""

REPLAYED_AFTER = WARM_UP + 2
"""After so many steps those that follow do the same: the first replay may still load what it needs."""

GRAPHS = "TAILSCOPE_GRAPHS"
"""Environment variable; 0 captures no step, for a machine on which captures go wrong."""

_log = logging.getLogger(__name__)

Step = Callable[..., Tensor]
Replay = Callable[[], None]

_PREPARING = threading.Lock()
"""Compiling, capturing and dealing out streams are done for one thread at a time; replaying is not."""

_IDLE: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)
"""Streams that no training has now. PyTorch deals out the same 32 in turn: two trainings could get one otherwise."""


@contextmanager
def capturing(device: torch.device) -> Iterator["CudaCapture | None"]:
    """Give the block, a whole training, a CUDA stream of its own and what captures steps on it.

    There is nothing on a CPU, nor where the environment variable `GRAPHS` is 0. What was captured ends with the block.
    """
    if device.type != "cuda" or os.environ.get(GRAPHS) == "0":
        yield None
        return
    with _PREPARING:
        stream = _IDLE[device].pop() if _IDLE[device] else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
    capture = CudaCapture(stream)
    try:
        with torch.cuda.stream(stream):
            yield capture
    finally:
        with _PREPARING:
            stream.synchronize()
            capture.release()
            _IDLE[device].append(stream)


class CudaCapture:
    """How steps run before a capture, and how one is captured, on the current stream: as PyTorch's notes ask for."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, step: Step, *given: Tensor | None) -> Tensor:
        """Run a step, while no other thread compiles or captures."""
        with _PREPARING, alone():  # the compiler saves and restores the default generator's state
            return step(*given)

    def record(self, work: Callable[[], None]) -> Replay:
        """Capture `work`, which computes nothing meanwhile, and return what runs it."""
        graph = torch.cuda.CUDAGraph()
        # Another training may use the GPU from another thread of this process.
        with _PREPARING, torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        return graph.replay

    def release(self) -> None:
        """Free what was captured; none of it can be replayed any more."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class GraphedStep:
    """A step that is captured once and replayed; the tensors' shapes, and which are None, are the same every time.

    A graph reads and writes fixed places in memory: what is given is copied to them, and the loss from them. All that
    changes from step to step has to come in a tensor, the learning rate too. Where the capture fails, steps go on as
    they are, after a warning.
    """

    def __init__(self, step: Step, capture: CudaCapture) -> None:
        self._step, self._capture, self._calls = step, capture, 0
        self._replay: Replay | None = None
        self._inputs: tuple[Tensor | None, ...] = ()
        self._loss = torch.empty(0)

    def __call__(self, *given: Tensor | None) -> Tensor:
        """Take a step; return its loss."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._capture.warm_up(self._step, *given)
        if self._calls == WARM_UP + 1:
            self._record(given)
        if self._replay is None:
            return self._step(*given)
        for place, new in zip(self._inputs, given, strict=True):
            if place is not None and new is not None:
                place.copy_(new)
        self._replay()
        return self._loss.clone()

    def _record(self, given: tuple[Tensor | None, ...]) -> None:
        self._inputs = tuple(None if tensor is None else tensor.clone() for tensor in given)

        def work() -> None:
            self._loss = self._step(*self._inputs)

        try:
            self._replay = self._capture.record(work)
        except RuntimeError as error:
            _log.warning("the step is not captured as a CUDA graph, training will be slower: %s", error)


@dataclass(frozen=True)
class Normalizer:
    """Per-channel mean and standard deviation of pixels, float32 [C], in units of 0...255."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Normalizer":
        """Measure uint8 images [N, H, W, C]; constant channels get a standard deviation of 1."""
        # A histogram is exact and needs no floating copy of the data set.
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([torch.bincount(c.reshape(-1).cpu(), minlength=256) for c in images.unbind(-1)]).double()
        mean, square = (counts @ values**power / counts.sum(1) for power in (1, 2))
        std = (square - mean**2).clamp(min=0).sqrt()
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def to(self, device: torch.device) -> "Normalizer":
        """Move to a device."""
        return Normalizer(self.mean.to(device), self.std.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Uint8 [B, H, W, C] -> float32 [B, C, H, W], channels-last in memory."""
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


LossFunction = Callable[..., Tensor]


def loss_function(model: CifarResNet, objective: Objective, normalize: Normalizer, dtype: torch.dtype) -> LossFunction:
    """Return (images uint8 [B, H, W, C], labels [B], weights [B], the four parts of a step's `Mix`) -> mean loss."""
    device_type = normalize.mean.device.type

    def compute(images: Tensor, labels: Tensor, weights: Tensor | None = None, *parts: Tensor | None) -> Tensor:
        mix = Mix(*parts)
        x = _mixed(normalize(images), mix.images, mix.partner)
        # Weights are cast once a step in any case; the cache would keep stale casts alive across compiled steps.
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
            features = model.features(x) if mix.hidden is None else model.features(x, _mixing_between(mix))
            features = objective.weighed(features)
            logits = objective.logits(model.classifier, features)
        return objective(logits, features, labels, mix, weights)

    return compute


def _mixed(x: Tensor, own: Tensor | None, partner: Tensor | None) -> Tensor:
    return x if own is None or partner is None else own * x + (1 - own) * x[partner]


def _mixing_between(mix: Mix) -> Callable[[int, Tensor], Tensor]:
    """Return what mixes the activations between two stages of a network."""

    def between(place: int, x: Tensor) -> Tensor:
        return x if mix.hidden is None else _mixed(x, mix.hidden[place], mix.partner)

    return between


def _step(optimizer: torch.optim.Optimizer, compute: LossFunction, *batch: Any) -> Tensor:
    """Move the parameters once; return the detached loss."""
    try:
        loss = compute(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    finally:
        # After a capture that failed on its way, gradients lie in memory that nothing wrote: no step may add to them.
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def sgd(model: nn.Module, own: nn.Module, train: TrainSpec, rate: float | Tensor) -> torch.optim.SGD:
    """Return the optimiser of a stage: of a network or classifier, and of the parameters that its loss has of its own.

    Weight decay is for what computes the logits: a loss's class centres, say, are no worse for being far from zero.
    """
    groups: list[dict[str, Any]] = [{"params": [*model.parameters()]}]
    if of_the_loss := [*own.parameters()]:
        groups.append({"params": of_the_loss, "weight_decay": 0.0})
    return torch.optim.SGD(
        groups,
        lr=rate,
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
        fused=True,
    )


def _compiling(step: Step) -> Step:
    """Keep other threads from drawing in the first step: the compiler puts back the default generator's state."""
    first = [alone()]

    def take(*given: Tensor | None) -> Tensor:
        with first.pop() if first else nullcontext():
            return step(*given)

    return take


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


class Stepper:
    """Runs steps of a model; the short last batch of an epoch is not compiled, and captured by itself."""

    def __init__(
        self,
        model: CifarResNet,
        objective: Objective,
        compute: LossFunction,
        train: TrainSpec,
        *,
        capture: CudaCapture | None = None,
    ) -> None:
        """Prepare the optimiser of a model in training mode, and steps with the engine `fused`.

        `compute` returns the mean loss of a batch, from the objective. `capture` captures the steps, of full and of
        short batches; without, they are launched kernel by kernel.
        """
        self.model, self.objective, self.compute, self.capture = model, objective, compute, capture
        self._batch = objective.branches * train.batch
        self._learning_rate = train.learning_rate
        device = next(model.parameters()).device
        # A captured step reads the rate from memory.
        rate = torch.tensor(train.learning_rate, device=device) if capture else train.learning_rate
        self.optimizer = sgd(model, objective.own, train, rate)
        self.use("fused")

    def use(self, engine: Engine) -> None:
        """Take steps with an engine; what is not compiled uses our kernel where it fits, unless that is `eager`."""
        norm_act.switch(self.model, on=engine != "eager")
        capture = self.capture
        # Nothing of this refers back to the stepper: a graph must not wait for the garbage collector to find a cycle.
        full: Step = partial(_step, self.optimizer, self.compute)
        short = full
        if engine == "compiled":
            full = _compiling(partial(_step, self.optimizer, torch.compile(self.compute, dynamic=False)))
        self._full, self._short = (GraphedStep(s, capture) if capture else s for s in (full, short))

    def __call__(
        self, images: Tensor, labels: Tensor, multiplier: float, mix: Mix = NOT_MIXED, weights: Tensor | None = None
    ) -> Tensor:
        """Take one step at `multiplier` times the base learning rate; return the detached loss, still on the device."""
        self.set_rate(multiplier)
        # Batches that are not full are all of one size: an epoch's last one.
        step = self._full if len(labels) == self._batch else self._short
        return step(images, labels, weights, *mix)

    def set_rate(self, multiplier: float) -> None:
        """Learn at `multiplier` times the base learning rate from now on."""
        value = self._learning_rate * multiplier
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers, of the network and of the loss, by the names that checkpoints know."""
        for kind, module in (("model", self.model), ("loss", self.objective.own)):
            yield from ((f"{kind}.{name}", tensor) for name, tensor in module.state_dict().items())

    def _momenta(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name of each parameter's momentum, and the parameter."""
        for kind, module in (("momentum", self.model), ("loss_momentum", self.objective.own)):
            yield from ((f"{kind}.{name}", parameter) for name, parameter in module.named_parameters())

    def state(self) -> Tensors:
        """Return parameters, buffers and momentum as named tensors."""
        known = self.optimizer.state
        return {**dict(self._named()), **{n: known[p]["momentum_buffer"] for n, p in self._momenta() if p in known}}

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of what `state` returns after a step, by name."""
        momenta = self._momenta() if self.optimizer.param_groups[0]["momentum"] else ()
        return {name: tensor.shape for name, tensor in (*self._named(), *momenta)}

    def restore(self, state: Tensors) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            for name, tensor in self._named():
                tensor.copy_(state[name])
        for name, p in self._momenta():
            if name in state:  # there is none without momentum
                # The fused optimiser pairs elements by their place in memory: the layout must be the parameter's.
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(state[name])


class Epochs:
    """How long a stage trains, at which rates, and whether it still has numbers to train with."""

    def __init__(self, stage: StageSpec, images: int, label: str) -> None:
        """Plan a stage on `images` training images; `label` names it in messages."""
        self._stage, self._label, self._images = stage, label, images
        self.batch = stage.train.batch
        self.number, self.steps = stage.train.lengths(images)
        self._per_epoch = -(-images // self.batch)
        self._multipliers = SCHEDULES.make(stage.train.schedule, self.steps, self._per_epoch)

    def images_before(self, epoch: int) -> int:
        """Return how many images the epochs before show, in full batches."""
        return min(self.steps, epoch * self._per_epoch) * self.batch

    def multipliers(self, epoch: int) -> list[float]:
        """Return the multiplier of the base learning rate for each step of an epoch; the last may be cut short."""
        return self._multipliers[epoch * self._per_epoch : (epoch + 1) * self._per_epoch]

    def progress(self, epoch: int) -> list[float]:
        """Return the share of all steps that are done before each step of an epoch."""
        first = epoch * self._per_epoch
        return [step / self.steps for step in range(first, first + len(self.multipliers(epoch)))]

    def numbers(self, epoch: int, loss: float, seconds: float) -> dict[str, float]:
        """Return what loggers get of an epoch: its loss, the learning rate of its last step, and how fast it was."""
        multipliers = self.multipliers(epoch)
        return {
            "loss": loss,
            "learning_rate": self._stage.train.learning_rate * multipliers[-1],
            "images_per_second": min(self._images, len(multipliers) * self.batch) / max(seconds, 1e-9),
        }

    def mean_loss(self, epoch: int, losses: list[Tensor]) -> float:
        """Return the mean of an epoch's losses; they are read here, all at once, so that no step waits for its own.

        Raises:
            UserError: one of them is not finite; the first is named.
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

    def require_finite(self, epoch: int, state: Flat) -> None:
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
