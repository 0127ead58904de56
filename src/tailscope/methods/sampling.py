"""Samplers: which training images an epoch sees.

A sampler's factory takes (labels int64 [N], num_classes) and returns `draw(n, generator)`, which gives n indices into
the labels, int64 [n], on the labels' device (the generator's too). Classes without images are never drawn.

One that is registered with `needs=("progress",)` returns `draw(n, generator, progress)`, where `progress` is the share
of the training that is done when the epoch begins.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from tailscope.errors import UserError
from tailscope.methods import SAMPLERS

Sampler: TypeAlias = Callable[..., Tensor]


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


@SAMPLERS.register("drs", needs=("progress",))
def drs(labels: Tensor, num_classes: int, /, start: float = 0.8, then: str = "class_balanced") -> Sampler:
    """Deferred re-sampling: every image equally often, and the sampler `then` from the share `start` of the training.

    Cao et al. (2019) compare deferred re-weighting with it. The change is at the first epoch that begins after `start`.

    Raises:
        UserError: `start` is not in [0, 1), or `then` is no sampler that stays the same.
    """
    if not 0 <= start < 1:
        raise UserError(f"sampler drs(start={start}): start must lie in [0, 1)")
    if SAMPLERS.needs(then):
        raise UserError(f"sampler drs(then={then!r}): takes a sampler that does not change with time")
    before, after = instance(labels, num_classes), SAMPLERS.make(then, labels, num_classes)

    def draw(n: int, generator: Generator, progress: float) -> Tensor:
        return (before if progress < start else after)(n, generator)

    return draw


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
