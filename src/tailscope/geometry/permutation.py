"""Permutation of training and unseen samples within a class: what chance alone gives at this class's size.

Under exchangeability the n training samples are a uniform n-subset of the class's n + m samples, so that every
statistic may be compared with its values over random subsets; p = (1 + #{as large or larger}) / (B + 1) is exact for
any dimension and distribution (Phipson & Smyth 2010). Samples that belong together (bursts of one scene, frames of one
video) change sides together. All subsets of a chunk are evaluated at once: two matrix products and elementwise maps.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailscope.geometry.angles import resolution_deg

CHUNK_ELEMENTS = 1 << 18
STATISTICS = ("shift", "gap", "spread", "escape", "log_variance_ratio")


@dataclass(frozen=True)
class Pool:
    """All n + m samples of a class in coordinates along and across their mean direction.

    Subtracting the common mean before the products keeps small angles accurate in float32: squared chords come out
    as sums of small squares instead of as 1 minus a cosine.
    """

    along: Tensor  # [N] part of each sample along the mean's direction
    radius: Tensor  # [N] length of each sample
    across: Tensor  # [N, d] the rest
    unit_across: Tensor  # [N, d] the rest over the length
    height: Tensor  # [N] squared length of unit_across
    square: Tensor  # [N] squared distance from the mean
    gram: Tensor | None  # [N, N] across @ unit_across.T, where that saves work
    mean_length: float


def make_pool(rows: Tensor) -> Pool:
    """Return the pool of a class's rows [N, d], training samples first."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    mean_length = torch.linalg.vector_norm(mean).item()
    direction = (mean / mean_length if mean_length > 0 else mean).to(rows.dtype)
    along = rows @ direction
    across = torch.addmm(rows, along[:, None], direction[None, :], alpha=-1)
    rest = torch.linalg.vector_norm(across, dim=1)
    radius = torch.hypot(along, rest)
    square = rest.square() + (along - mean_length).square()
    unit_across = across / radius[:, None]
    gram = across @ unit_across.T if len(rows) < 2 * rows.shape[1] else None
    height = (rest / radius).square()
    return Pool(along, radius, across, unit_across, height, square, gram, mean_length)


def subsets(seen: int, units: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield random subsets of `seen` out of `units`, bool [<= chunk, units], `draws` in all.

    A row takes the units with the `seen` smallest of as many random numbers; rows whose boundary is tied are drawn
    again, which keeps every subset equally likely.
    """
    chunk = max(1, CHUNK_ELEMENTS // units)
    for start in range(0, draws, chunk):
        keys = rng.integers(0, 1 << 32, (min(chunk, draws - start), units), dtype=np.uint32)
        while True:
            taken = keys <= np.partition(keys, seen - 1, axis=1)[:, seen - 1 : seen]
            tied = np.flatnonzero(taken.sum(axis=1) != seen)
            if not len(tied):
                break
            keys[tied] = rng.integers(0, 1 << 32, (len(tied), units), dtype=np.uint32)
        yield taken


def all_subsets(seen: int, units: int) -> np.ndarray:
    """Return every subset of `seen` out of `units`, bool [number, units], the first `seen` units first."""
    rows = list(itertools.combinations(range(units), seen))
    taken = np.zeros((len(rows), units), dtype=bool)
    np.put_along_axis(taken, np.array(rows), True, axis=1)
    return taken


def statistics(pool: Pool, member: Tensor) -> Tensor:
    """Return the statistics of subsets of a class: float64 [len(STATISTICS), L]; NaN where undefined.

    Args:
        pool: the class's N samples.
        member: 0 or 1 in the pool's dtype [L, N]; 1 marks a subset's members.

    Rows, with M the mean of a subset: angle between M and the mean of all; mean angle of the other samples to M minus
    mean leave-one-out angle of the members; mean angle of the members to M; share of the others further from M than
    every member; log of the ratio of the members' variance to the others'. Angles in degrees.
    """
    size = member.sum(dim=1, keepdim=True)
    rest = len(pool.along) - size
    dots = member @ pool.gram if pool.gram is not None else (member @ pool.across) @ pool.unit_across.T
    along = (member @ pool.along)[:, None]
    across_squared = ((dots * member) @ pool.radius).clamp(min=0)[:, None]
    length = torch.sqrt(along.square() + across_squared)  # of the subset's sum
    shift = torch.atan2(across_squared.sqrt(), along)
    chord = _squared_chord(pool, dots, along / length, across_squared / length.square(), length)
    angle = 2 * torch.asin(chord.sqrt() / 2)
    # Taking sample j out of the sum moves the sum along j only.
    alone = torch.atan2(length * torch.sqrt(chord * (1 - chord / 4)), length * (1 - chord / 2) - pool.radius)
    inside = (angle * member).sum(dim=1, keepdim=True)
    spread = inside / size
    outside = (angle.sum(dim=1, keepdim=True) - inside) / rest
    width = (angle * member).amax(dim=1, keepdim=True)
    beyond = angle > width + math.radians(resolution_deg(angle.dtype))
    escape = beyond.sum(dim=1, keepdim=True) / rest
    gap = outside - (alone * member).sum(dim=1, keepdim=True) / size
    gap = torch.where(size > 1, gap, math.nan)
    ratio = _log_variance_ratio(pool, member, along, across_squared)
    parts = [torch.rad2deg(shift), torch.rad2deg(gap), torch.rad2deg(spread), escape, ratio]
    result = torch.stack([part.squeeze(1).double() for part in parts])
    return torch.where(rest.squeeze(1) > 0, result, math.nan)


def _squared_chord(pool: Pool, dots: Tensor, cosine: Tensor, height: Tensor, length: Tensor) -> Tensor:
    """Return |x/|x| - M/|M||^2 for every subset's M and every sample x, [L, N]."""
    chord = dots * (-2 / length)
    chord += pool.height
    chord += height
    difference = pool.along / pool.radius - cosine
    return chord.addcmul_(difference, difference).clamp_(0, 4)


def _log_variance_ratio(pool: Pool, member: Tensor, along: Tensor, across_squared: Tensor) -> Tensor:
    size = member.sum(dim=1, keepdim=True).double()
    rest = len(pool.along) - size
    within = (member @ pool.square)[:, None].double()
    offset = (along.double() / size - pool.mean_length).square() + across_squared.double() / size.square()
    inside = (within - size * offset) / (size - 1)
    outside = (pool.square.sum(dtype=torch.float64) - within - size.square() / rest * offset) / (rest - 1)
    valid = (size > 1) & (rest > 1) & (inside > 0) & (outside > 0)
    return torch.where(valid, inside / outside, math.nan).log()
