"""Samplers: which training images an epoch sees.

A factory takes (labels int64 [N], num_classes) and returns `draw(n, generator)`, which gives n indices into the
labels, int64 [n], on the labels' device (the generator's too). Classes without images are never drawn.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch

from tailscope.methods import SAMPLERS

Sampler: TypeAlias = Callable[[int, torch.Generator], torch.Tensor]


@SAMPLERS.register("instance")
def instance(labels: torch.Tensor, num_classes: int, /) -> Sampler:
    """Every image equally often: random permutations, one after the other, cut at n indices."""
    size = len(labels)

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        rounds = -(-n // size)
        orders = [torch.randperm(size, generator=generator, device=labels.device) for _ in range(rounds)]
        return torch.cat([*orders, labels.new_empty(0)])[:n]

    return draw


@SAMPLERS.register("class_balanced")
def class_balanced(labels: torch.Tensor, num_classes: int, /) -> Sampler:
    """Every class equally often: a uniform class, then a uniform image of it, with replacement (Kang et al. 2020)."""
    return _class_power(labels, num_classes, power=0.0)


@SAMPLERS.register("square_root")
def square_root(labels: torch.Tensor, num_classes: int, /) -> Sampler:
    """Classes in proportion to the square root of their counts, then a uniform image, with replacement."""
    return _class_power(labels, num_classes, power=0.5)


def _class_power(labels: torch.Tensor, num_classes: int, power: float) -> Sampler:
    """Return a sampler of classes with p_k proportional to n_k ** power (Kang et al. 2020, equation 1)."""
    counts = torch.bincount(labels, minlength=num_classes)
    by_class = torch.argsort(labels, stable=True)
    first = counts.cumsum(0) - counts
    weights = torch.where(counts > 0, counts.double() ** power, 0.0)

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        if n == 0:
            return by_class[:0]
        classes = torch.multinomial(weights, n, replacement=True, generator=generator)
        place = torch.rand(n, generator=generator, device=labels.device, dtype=torch.float64)
        return by_class[first[classes] + (place * counts[classes]).long()]

    return draw
