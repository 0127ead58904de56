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


@SAMPLERS.register("reverse")
def reverse(labels: Tensor, num_classes: int, /) -> Sampler:
    """Classes in inverse proportion to their counts, then a uniform image, with replacement (Zhou et al. 2020, BBN)."""
    return _class_power(labels, num_classes, power=-1.0)


@SAMPLERS.register("effective_number")
def effective_number(labels: Tensor, num_classes: int, /, beta: float = 0.9999) -> Sampler:
    """Images in proportion to their class's 1 / E, E = (1 - beta^n) / (1 - beta), with replacement (Cui et al. 2019).

    The effective number E grows from 1, of a class with one image, to n as beta nears 1: beta = 0 draws as `instance`
    does, but with replacement, beta near 1 as `class_balanced`.

    Raises:
        UserError: `beta` is outside [0, 1).
    """
    if not 0 <= beta < 1:
        raise UserError(f"effective_number(beta={beta}): beta must lie in [0, 1)")
    counts = torch.bincount(labels, minlength=num_classes)
    effective = (1 - beta ** counts.double()) / (1 - beta)
    return _by_class(labels, counts, torch.where(counts > 0, counts / effective.clamp(min=1e-12), 0.0))


@SAMPLERS.register("class_aware")
def class_aware(labels: Tensor, num_classes: int, /) -> Sampler:
    """Every class in turn, and within a class every image in turn, both in shuffled order (Shen et al. 2016).

    Lists of classes and of a class's images are shuffled anew each time they are used up. So classes differ by one draw
    at most, and so do the images of a class; `class_balanced` has the same mean, but draws each time anew.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    present = counts.nonzero().squeeze(1)
    members = [(labels == k).nonzero().squeeze(1) for k in present.tolist()]

    def draw(n: int, generator: Generator) -> Tensor:
        rounds = -(-n // len(present))
        orders = [_shuffles(members_of, rounds, generator) for members_of in members]
        classes = [torch.randperm(len(present), generator=generator, device=labels.device) for _ in range(rounds)]
        places = [torch.stack(orders, 1)[at, order] for at, order in enumerate(classes)] if rounds else []
        return torch.cat([*places, labels.new_empty(0)])[:n]

    return draw


def _shuffles(values: Tensor, n: int, generator: Generator) -> Tensor:
    """Return n of the values: shuffled, all of them before one comes again."""
    rounds = -(-n // len(values))
    orders = [torch.randperm(len(values), generator=generator, device=values.device) for _ in range(rounds)]
    return values[torch.cat([*orders, values.new_empty(0)])[:n]]


def _class_power(labels: Tensor, num_classes: int, power: float) -> Sampler:
    """Return a sampler of classes with p_k proportional to n_k ** power (Kang et al. 2020, equation 1)."""
    counts = torch.bincount(labels, minlength=num_classes)
    return _by_class(labels, counts, torch.where(counts > 0, counts.double() ** power, 0.0))


def _by_class(labels: Tensor, counts: Tensor, weights: Tensor) -> Sampler:
    """Return a sampler of a class in proportion to its weight, float64 [C], then of a uniform image of it."""
    by_class = torch.argsort(labels, stable=True)
    first = counts.cumsum(0) - counts

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
