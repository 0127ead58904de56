"""p-values and null values from permutations: per class, over many classes, and pooled over groups of classes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tailscope.geometry.permutation import STATISTICS, Pool, all_subsets, statistics, subsets

EXCEEDANCES = 20
VERDICT_SAMPLES = 5  # training samples below which a class gets no verdict of its own
SHIFT, GAP = STATISTICS.index("shift"), STATISTICS.index("gap")


@dataclass(frozen=True)
class Units:
    """What changes sides together: the unit of each of a class's samples, training units numbered first."""

    index: np.ndarray
    seen: int
    count: int

    def members(self, taken: np.ndarray, like: Tensor) -> Tensor:
        """Turn chosen units, bool [L, count], into the 0/1 matrix of chosen samples [L, N]."""
        samples = taken if self.count == len(self.index) else taken[:, self.index]
        return torch.from_numpy(samples).to(device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class Draws:
    """Statistics of one class: float64 [len(STATISTICS), 1 + B], the observed split first.

    With `complete`, the columns are all possible splits, each once.
    """

    values: Tensor
    complete: bool
    tolerance: float

    def null(self, statistic: str) -> float | None:
        """Return the statistic's mean over permutations, None where undefined."""
        row = self.values[STATISTICS.index(statistic)]
        mean = (row if self.complete else row[1:]).nanmean().item()
        return mean if math.isfinite(mean) else None

    def count(self, statistic: int) -> "Count | None":
        """Compare the observed split with the permutations; None where the statistic is undefined."""
        observed, drawn = self.values[statistic, 0].item(), self.values[statistic, 1:]
        if math.isnan(observed):
            return None
        high, low = _exceeds(drawn, observed, self.tolerance)
        return Count(observed, int(high.sum()), int(low.sum()), len(drawn), self.complete, self.tolerance)


@dataclass(frozen=True)
class Count:
    """How many of `draws` permutations of one class are as large (`high`) and as small (`low`) as the observed."""

    observed: float
    high: int
    low: int
    draws: int
    complete: bool
    tolerance: float

    def p(self, two_sided: bool) -> float:
        """Return (1 + #) / (B + 1), of the upper tail or twice the smaller tail.

        >>> count = Count(1.0, 4, 999, 999, False, 0.0)
        >>> count.p(two_sided=False), count.p(two_sided=True)
        (0.005, 0.01)
        """
        upper, lower = (1 + self.high) / (self.draws + 1), (1 + self.low) / (self.draws + 1)
        return min(1.0, 2 * min(upper, lower)) if two_sided else upper

    def is_open(self, two_sided: bool) -> bool:
        """Say whether more permutations could make p much smaller."""
        fewest = min(self.high, self.low) if two_sided else self.high
        return not self.complete and fewest < EXCEEDANCES


def draw(pools: Sequence[Pool], units: Units, draws: int, rng: np.random.Generator, tolerance: float) -> list[Draws]:
    """Evaluate the observed split and `draws` random ones on each pool, the same splits for all pools.

    All splits are listed instead where there are no more than `draws`.
    """
    observed = (np.arange(units.count) < units.seen)[None]
    complete = units.count <= draws + 1 and math.comb(units.count, units.seen) <= draws + 1
    masks: Iterator[np.ndarray]
    if complete:
        masks = iter(np.array_split(all_subsets(units.seen, units.count), 1))
    else:
        masks = chain([observed], subsets(units.seen, units.count, draws, rng))
    found: list[list[Tensor]] = [[] for _ in pools]
    for taken in masks:
        member = units.members(taken, pools[0].along)
        for values, pool in zip(found, pools, strict=True):
            values.append(statistics(pool, member).cpu())
    return [Draws(torch.cat(values, dim=1), complete, tolerance) for values in found]


def needs_more(p: Sequence[float | None], floor: float, alpha: float) -> bool:
    """Say whether the number of permutations alone keeps the smallest p-values from being flagged among so many.

    >>> needs_more([0.001] + [0.5] * 99, 0.001, 0.05), needs_more([0.001] * 20 + [0.5] * 80, 0.001, 0.05)
    (True, False)
    """
    family = [value for value in p if value is not None]
    lowest = sum(value <= floor for value in family)
    return lowest > 0 and floor * len(family) / lowest > alpha


def continue_draws(
    pool: Pool, units: Units, count: Count, statistic: int, limit: int, two_sided: bool, rng: np.random.Generator
) -> tuple[float, int]:
    """Draw on until 20 permutations exceed the observed split, or up to `limit` in all (Besag & Clifford 1991).

    Returns:
        The sequential p-value (20 over the number of draws at which the twentieth occurred; where it never does, one
        more than the count over one more than `limit`), doubled over two sides, and the number of draws.
    """
    drawn, counts = count.draws, [count.high, count.low]
    p = [(1 + number) / (drawn + 1) if number >= EXCEEDANCES else None for number in counts]
    sides = (0, 1) if two_sided else (0,)
    for taken in subsets(units.seen, units.count, limit - drawn, rng):
        values = statistics(pool, units.members(taken, pool.along))[statistic].cpu()
        for side in sides:
            if p[side] is None:
                hits = _exceeds(values, count.observed, count.tolerance)[side].cumsum(0) + counts[side]
                counts[side] = int(hits[-1])
                if counts[side] >= EXCEEDANCES:
                    p[side] = EXCEEDANCES / (drawn + int(torch.searchsorted(hits, EXCEEDANCES)) + 1)
        drawn += len(values)
        if all(p[side] is not None for side in sides):
            break
    smallest = min(p[side] or (1 + counts[side]) / (drawn + 1) for side in sides)
    return (min(1.0, 2 * smallest) if two_sided else smallest), drawn


def false_discovery(p: Sequence[float | None]) -> list[float | None]:
    """Return Benjamini-Hochberg q-values; undefined p-values leave the family.

    >>> false_discovery([0.01, None, 0.04])
    [0.02, None, 0.04]
    """
    known = [value for value in p if value is not None]
    if not known:
        return list(p)
    from scipy import stats  # here because it takes half a second to import, and without permutations has no use

    q = iter(stats.false_discovery_control(known).tolist())
    return [None if value is None else float(next(q)) for value in p]


def standardize(draws: Draws, statistic: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Return a class's statistic at mean 0 and deviation 1 over the observed split and `number` others, [1 + number].

    NaN where any is undefined. A class with too few splits for so many different ones has splits drawn among them.
    """
    values: np.ndarray = draws.values[statistic].numpy()
    if not np.isfinite(values).all():
        return np.full(1 + number, np.nan)
    if draws.complete:
        values = np.concatenate([values[:1], rng.choice(values, number)])
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > draws.tolerance else np.zeros_like(values)


def group_p(standardized: np.ndarray, two_sided: bool) -> float | None:
    """Return the permutation p-value of the sum of classes' statistics [classes, 1 + B], the same draw in every class.

    Classes where the statistic is NaN are left out; None where no class is left or there are no permutations.
    """
    defined = standardized[np.isfinite(standardized[:, 0])]
    if not len(defined) or defined.shape[1] < 2:
        return None
    total = torch.from_numpy(defined.sum(axis=0))
    high, low = _exceeds(total[1:], total[0].item(), 1e-9)
    return Count(0.0, int(high.sum()), int(low.sum()), len(total) - 1, False, 0.0).p(two_sided)


def _exceeds(values: Tensor, observed: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return where values are at least, and at most, the observed one; undefined values count as both."""
    return ~(values < observed - tolerance), ~(values > observed + tolerance)
