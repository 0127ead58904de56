"""One optimisation step: uint8 images in, a loss out, parameters moved."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tailscope.kernels import norm_act
from tailscope.methods.losses import Loss
from tailscope.models import CifarResNet
from tailscope.seeds import alone
from tailscope.spec import TrainSpec
from tailscope.training.graph import CudaCapture, GraphedStep, Step
from tailscope.training.runtime import Engine


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
        channels = [torch.bincount(c.reshape(-1).cpu(), minlength=256).double() for c in images.unbind(-1)]
        mean = torch.stack([(h @ values) / h.sum() for h in channels])
        square = torch.stack([(h @ values**2) / h.sum() for h in channels])
        std = (square - mean**2).clamp(min=0).sqrt()
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def to(self, device: torch.device) -> "Normalizer":
        """Move to a device."""
        return Normalizer(self.mean.to(device), self.std.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Uint8 [B, H, W, C] -> float32 [B, C, H, W], channels-last in memory."""
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


LossFunction = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def loss_function(model: CifarResNet, loss: Loss, normalize: Normalizer, dtype: torch.dtype) -> LossFunction:
    """Return (images uint8 [B,H,W,C], labels [B], lam, partner [B]) -> mean loss.

    With `lam` (a scalar tensor) the batch is mixed: x = lam x + (1-lam) x[partner], and the loss is the same mixture
    of the two labels' losses (Zhang et al. 2018, equation 1).
    """
    device_type = normalize.mean.device.type

    def compute(images: Tensor, labels: Tensor, lam: Tensor | None, partner: Tensor | None) -> Tensor:
        x = normalize(images)
        if lam is not None and partner is not None:
            x = lam * x + (1 - lam) * x[partner]
        # Weights are cast once a step in any case; the cache would keep stale casts alive across compiled steps.
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
            logits = model(x)
        losses = loss(logits, labels)
        if lam is not None and partner is not None:
            losses = lam * losses + (1 - lam) * loss(logits, labels[partner])
        return losses.mean()

    return compute


def _step(
    optimizer: torch.optim.Optimizer,
    compute: LossFunction,
    images: Tensor,
    labels: Tensor,
    lam: Tensor | None,
    partner: Tensor | None,
) -> Tensor:
    """Move the parameters once; return the detached loss."""
    try:
        loss = compute(images, labels, lam, partner)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    finally:
        # After a capture that failed on its way, gradients lie in memory that nothing wrote: no step may add to them.
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def sgd(model: nn.Module, train: TrainSpec, rate: float | Tensor) -> torch.optim.SGD:
    """Return the optimiser of a stage."""
    return torch.optim.SGD(
        model.parameters(),
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


class Stepper:
    """Runs steps of a model; the short last batch of an epoch is not compiled, and captured by itself."""

    def __init__(
        self, model: CifarResNet, compute: LossFunction, train: TrainSpec, *, capture: CudaCapture | None = None
    ) -> None:
        """Prepare the optimiser, and steps with the engine `fused`.

        Args:
            model: in training mode, on its device.
            compute: the mean loss of a batch.
            train: batch size and optimiser.
            capture: what captures the steps, of full and of short batches; None: they are launched kernel by kernel.
        """
        self.model, self.compute, self.capture = model, compute, capture
        self._batch = train.batch
        self._learning_rate = train.learning_rate
        device = next(model.parameters()).device
        # A captured step reads the rate from memory.
        rate = torch.tensor(train.learning_rate, device=device) if capture else train.learning_rate
        self.optimizer = sgd(model, train, rate)
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
        self,
        images: Tensor,
        labels: Tensor,
        multiplier: float,
        lam: Tensor | None = None,
        partner: Tensor | None = None,
    ) -> Tensor:
        """Take one step at `multiplier` times the base learning rate; return the detached loss, still on the device.

        Batches that are not full are all of one size: an epoch's last one.
        """
        self.set_rate(multiplier)
        step = self._full if len(labels) == self._batch else self._short
        return step(images, labels, lam, partner)

    def set_rate(self, multiplier: float) -> None:
        """Learn at `multiplier` times the base learning rate from now on."""
        group, value = self.optimizer.param_groups[0], self._learning_rate * multiplier
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value

    def state(self) -> dict[str, Tensor]:
        """Return parameters, buffers and momentum as named tensors."""
        momentum = {
            f"momentum.{name}": self.optimizer.state[p]["momentum_buffer"]
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
        }
        return {**{f"model.{k}": v for k, v in self.model.state_dict().items()}, **momentum}

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of what `state` returns after a step, by name."""
        momentum = self.optimizer.param_groups[0]["momentum"]
        return {
            **{f"model.{name}": tensor.shape for name, tensor in self.model.state_dict().items()},
            **{f"momentum.{name}": p.shape for name, p in self.model.named_parameters() if momentum},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        model = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        self.model.load_state_dict(model)
        for name, p in self.model.named_parameters():
            if f"momentum.{name}" in state:  # there is none without momentum
                # The fused optimiser pairs elements by their place in memory: the layout must be the parameter's.
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(state[f"momentum.{name}"])
