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
    places = torch.arange(len(labels), device=labels.device)

    def draw(n: int, generator: Generator) -> Tensor:
        return _shuffles(places, n, generator)

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


@SAMPLERS.register("progressive", needs=("progress",))
def progressive(labels: Tensor, num_classes: int, /) -> Sampler:
    """From every image equally often to every class equally often: (1 - t) n_k / N + t / C (Kang et al. 2020, eq. 2).

    The share of class k among the draws, where t is the share of the training that is done when the epoch begins; then
    a uniform image of it, with replacement. C counts the classes that have images.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    present = (counts > 0).double()

    def draw(n: int, generator: Generator, progress: float) -> Tensor:
        shares = (1 - progress) * counts / counts.sum() + progress * present / present.sum()
        return _by_class(labels, counts, shares)(n, generator)

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
