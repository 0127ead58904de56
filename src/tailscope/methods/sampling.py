"""Samplers: which training images an epoch sees. Mixings: which of a batch are mixed, and how strongly.

A sampler's factory takes (labels int64 [N], num_classes) and returns `draw(n, generator)`, which gives n indices into
the labels, int64 [n], on the labels' device (the generator's too). Classes without images are never drawn.

A mixing draws for many batches at once, so that the training loop has no randomness of its own: image i of a batch
becomes lam * x_i + (1 - lam) * x_partner[i], and its loss lam * loss(y_i) + (1 - lam) * loss(y_partner[i]).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor

from tailscope.errors import UserError
from tailscope.methods import MIXINGS, SAMPLERS

Sampler: TypeAlias = Callable[[int, Generator], Tensor]


@SAMPLERS.register("instance")
def instance(labels: Tensor, num_classes: int, /) -> Sampler:
    """Every image equally often: random permutations, one after the other, cut at n indices."""
    size = len(labels)

    def draw(n: int, generator: Generator) -> Tensor:
        rounds = -(-n // size)
        orders = [torch.randperm(size, generator=generator, device=labels.device) for _ in range(rounds)]
        return torch.cat([*orders, labels.new_empty(0)])[:n]

    return draw


@SAMPLERS.register("class_balanced")
def class_balanced(labels: Tensor, num_classes: int, /) -> Sampler:
    """Every class equally often: a uniform class, then a uniform image of it, with replacement (Kang et al. 2020)."""
    return _class_power(labels, num_classes, power=0.0)


@SAMPLERS.register("square_root")
def square_root(labels: Tensor, num_classes: int, /) -> Sampler:
    """Classes in proportion to the square root of their counts, then a uniform image, with replacement."""
    return _class_power(labels, num_classes, power=0.5)


def _class_power(labels: Tensor, num_classes: int, power: float) -> Sampler:
    """Return a sampler of classes with p_k proportional to n_k ** power (Kang et al. 2020, equation 1)."""
    counts = torch.bincount(labels, minlength=num_classes)
    by_class = torch.argsort(labels, stable=True)
    first = counts.cumsum(0) - counts
    weights = torch.where(counts > 0, counts.double() ** power, 0.0)

    def draw(n: int, generator: Generator) -> Tensor:
        if n == 0:
            return by_class[:0]
        classes = torch.multinomial(weights, n, replacement=True, generator=generator)
        place = torch.rand(n, generator=generator, device=labels.device, dtype=torch.float64)
        return by_class[first[classes] + (place * counts[classes]).long()]

    return draw


class Mixing(Protocol):
    """Draws the weights and partners of whole batches."""

    def draw(self, steps: int, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return the weights float32 [steps] and the partners int64 [steps, batch], on the generator's device."""


@dataclass(frozen=True)
class _MixUp:
    alpha: float

    def draw(self, steps: int, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        device = generator.device
        # torch's public Beta takes no generator, so NumPy draws it from a seed of this stream.
        seed = torch.randint(2**62, (), generator=generator, device=device).item()
        lam = np.random.default_rng(int(seed)).beta(self.alpha, self.alpha, steps)
        partner = torch.rand(steps, batch, generator=generator, device=device).argsort(1)
        return torch.from_numpy(lam).to(device, torch.float32), partner


@MIXINGS.register("mixup")
def mixup(alpha: float = 1.0) -> Mixing:
    """MixUp of images and losses, one weight from Beta(alpha, alpha) a batch (Zhang et al. 2018).

    Partners are a permutation of the batch.

    >>> lam, partner = mixup().draw(3, 128, torch.Generator().manual_seed(0))
    >>> lam.shape, partner.shape
    (torch.Size([3]), torch.Size([3, 128]))

    Raises:
        UserError: `alpha` is not positive.
    """
    if not alpha > 0:
        raise UserError(f"mixup(alpha={alpha}): alpha must be positive; for no mixing leave mixup out")
    return _MixUp(alpha)
