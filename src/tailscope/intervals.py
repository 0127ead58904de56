"""Confidence intervals for statistics observed once per (seed, test item).

Two questions, two intervals. *What would other trainings give on this test set?* is answered by Student's t over
the seeds. *What would other trainings give on other test images?* adds the variance between items, by MOVER (the
method of variance estimates recovery: Howe 1974; Zou & Donner 2008), which keeps its coverage at three seeds where
bootstraps, binomial intervals and Satterthwaite's approximation do not.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

FloatArray = NDArray[np.float64]
Bounds = tuple[float, float]
Z = float(special.ndtri(0.975))


class Gap(TypedDict):
    """A difference of accuracies as result files hold it."""

    points: float
    ci95: list[float] | None


@dataclass(frozen=True)
class Interval:
    """An estimate, the mean over seeds and items, with its 95 % intervals; all in the unit of the values.

    Attributes:
        ci95: for new seeds and new test items ("mover"); with one seed, for this very training on new test items
            ("item"); None with two seeds or with a single item.
        ci95_seeds: for new seeds on these test items (t over seeds); None below three seeds.
        kind: how `ci95` was made.
    """

    estimate: float
    ci95: Bounds | None
    ci95_seeds: Bounds | None
    kind: Literal["mover", "item"] | None

    def to_json(self) -> dict[str, Any]:
        """Return `points`, `ci95` and `ci95_seeds` as result files hold them."""
        return {**self.gap(), "ci95_seeds": as_list(self.ci95_seeds)}

    def gap(self) -> Gap:
        """Return the same without the interval over seeds."""
        return {"points": self.estimate, "ci95": as_list(self.ci95)}

    def widened(self, factor: float) -> "Interval":
        """Return the same estimate with intervals `factor` times as wide, for standard errors known to be too small."""

        def widen(bounds: Bounds | None) -> Bounds | None:
            centre = self.estimate
            return bounds and (centre + factor * (bounds[0] - centre), centre + factor * (bounds[1] - centre))

        return Interval(self.estimate, widen(self.ci95), widen(self.ci95_seeds), self.kind)

    def excludes_zero(self) -> bool:
        """Return whether `ci95` exists and lies on one side of 0."""
        return self.ci95 is not None and (self.ci95[0] > 0 or self.ci95[1] < 0)


def as_list(bounds: Bounds | None) -> list[float] | None:
    """Return an interval as JSON has it."""
    return None if bounds is None else list(bounds)


def paired(values: ArrayLike) -> Interval:
    """Estimate the mean of any statistic that has one value per seed and test item, [S, M].

    Differences between models are paired by passing the per-item differences, so `paired(correct_a - correct_b)`
    (as floats) compares two accuracies.

    Raises:
        ValueError: `values` is not a matrix of finite numbers with at least one entry.

    >>> paired([[1, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]).estimate
    0.75
    >>> paired([[1, 0, 1, 1], [1, 0, 0, 1]]).ci95 is None
    True
    """
    matrix = _matrix(values)
    seeds = len(matrix)
    estimate = float(matrix.mean())
    by_seed, by_item = (float(v[0, 0]) for v in variance_components(matrix[None]))
    several = matrix.shape[1] > 1
    if seeds < 3:
        if seeds == 2 or not several:
            return Interval(estimate, None, None, None)
        return Interval(estimate, _around(estimate, Z * by_item**0.5), None, "item")
    t = float(special.stdtrit(seeds - 1, 0.975))
    over_seeds = _around(estimate, t * by_seed**0.5)
    both = _around(estimate, (t**2 * by_seed + Z**2 * by_item) ** 0.5) if several else None
    return Interval(estimate, both, over_seeds, "mover" if several else None)


def proportion(correct: ArrayLike) -> Interval:
    """Estimate an accuracy from 0/1 outcomes [S, M]: `paired`, kept within [0, 1].

    With one seed the item interval is Wilson's (1927), which does not collapse where every item, or none, is right.

    >>> [round(bound, 3) for bound in proportion([[1] * 20]).ci95]
    [0.839, 1.0]
    """
    outcomes = _matrix(correct)
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise ValueError("an accuracy needs outcomes that are 0 or 1")
    interval = paired(outcomes)
    if len(outcomes) > 1:
        return Interval(interval.estimate, _clip(interval.ci95), _clip(interval.ci95_seeds), interval.kind)
    share, extra = interval.estimate, Z**2 / outcomes.size
    middle = (share + extra / 2) / (1 + extra)
    half = Z / (1 + extra) * math.sqrt(share * (1 - share) / outcomes.size + extra / (4 * outcomes.size))
    return Interval(share, _clip(_around(middle, half)), None, "item")


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Bounds | None:
    """Return Fieller's (1954) 95 % interval for mean(numerator) / mean(denominator), or None where it is unbounded.

    The covariance is the total one, of seeds and items, referred to t with S - 1 degrees of freedom (conservative);
    with one seed it is that of the items, referred to the normal distribution. Two seeds have no interval. Both are
    [S, M], of the same seeds and items.
    """
    both = np.stack([_matrix(numerator), _matrix(denominator)])
    seeds, items = both.shape[1:]
    if seeds == 2 or items < 2:
        return None
    squared = Z**2 if seeds == 1 else float(special.stdtrit(seeds - 1, 0.975)) ** 2
    by_seed, by_item = variance_components(both)
    covariance = squared * (by_seed + by_item)
    means = both.mean(axis=(1, 2))
    # The interval is where (R - x G)^2 <= t^2 Var(R - x G): a quadratic a x^2 - 2 b x + c <= 0.
    (c, b), (_, a) = np.outer(means, means) - covariance
    if a <= 0:
        return None
    half_width = max(0.0, b**2 - a * c) ** 0.5
    return float((b - half_width) / a), float((b + half_width) / a)


def variance_components(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Split the covariance of K means, each over S seeds and M items, into seed and item parts.

    The seed part is the covariance of the per-seed means over S; it holds the seed-by-item residual. The item part is
    the covariance of the per-item means over M, less the residual that they too contain; where that correction would
    make it negative it is cut at 0 (its nearest positive semi-definite matrix). With one seed the residual cannot be
    told from the item part and stays in it. From values [K, S, M] come two matrices [K, K]; their sum estimates the
    covariance over new seeds and new items.
    """
    statistics, seeds, items = values.shape
    seed_means, item_means = values.mean(axis=2), values.mean(axis=1)
    none = np.zeros((statistics, statistics))
    by_seed = np.cov(seed_means).reshape(none.shape) / seeds if seeds > 1 else none
    if items < 2:
        return by_seed, none
    by_item = np.cov(item_means).reshape(none.shape) / items
    if seeds > 1:
        centred = values - seed_means[:, :, None] - item_means[:, None, :] + seed_means.mean(axis=1)[:, None, None]
        residual = np.einsum("ksm,lsm->kl", centred, centred) / ((seeds - 1) * (items - 1))
        by_item = by_item - residual / (seeds * items)
    eigenvalues, vectors = np.linalg.eigh(by_item)
    return by_seed, (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T


def _matrix(values: ArrayLike) -> FloatArray:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"expected finite values of shape [seeds, items], got shape {matrix.shape}")
    return matrix


def _around(centre: float, half_width: float) -> Bounds:
    return centre - half_width, centre + half_width


def _clip(bounds: Bounds | None) -> Bounds | None:
    return bounds and (max(0.0, bounds[0]), min(1.0, bounds[1]))
