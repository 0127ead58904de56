"""Error bars, and the division of a gap between representation and classifier with them.

Confidence intervals for statistics observed once per (seed, test item).

Two questions, two intervals. *What would other trainings give on this test set?* is answered by Student's t over
the seeds. *What would other trainings give on other test images?* adds the variance between items, by MOVER (the
method of variance estimates recovery: Howe 1974; Zou & Donner 2008), which keeps its coverage at three seeds where
bootstraps, binomial intervals and Satterthwaite's approximation do not. Accuracies are whole images, so a few seeds can
agree by chance; the spread between them is therefore never taken to be less than what single outcomes alone give it.

How much of the long-tail gap lies in the representation and how much in the classifier.

A(b, c) is the test accuracy of a backbone trained on b under a classifier trained on c, each of `lt` and `true`. The
gap G = A(true, true) - A(lt, lt) is split by the Shapley value of the game whose two players are the backbone and
the classifier (Shapley 1953): each is credited with the mean of what its replacement gains before and after the
other's. Everything is linear in the per-item outcomes, so the parts of classes and groups add up exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.optimize import brentq

from tailscope.groups import GROUPS

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
    parts, several = variance_components(matrix[None]), matrix.shape[1] > 1
    if seeds < 3:
        if seeds == 2 or not several:
            return Interval(estimate, None, None, None)
        return Interval(estimate, _around(estimate, Z * parts.item.item() ** 0.5), None, "item")
    by_seed = parts.over_seeds(0.975).item()
    both = _around(estimate, (by_seed + Z**2 * parts.item.item()) ** 0.5) if several else None
    return Interval(estimate, both, _around(estimate, by_seed**0.5), "mover" if several else None)


def p_of_zero(values: ArrayLike) -> float | None:
    """Return the level at which the interval `ci95` of `paired` would just reach 0; None where there is no interval.

    A test that the mean is 0, two-sided, which says at 0.05 what the interval says.

    >>> round(p_of_zero([[1, 1, 0, 1, -1, 1, 1, 1]]), 4), p_of_zero([[1, -1, 0]])
    (0.0175, 1.0)
    """
    matrix = _matrix(values)
    estimate = float(matrix.mean())
    if paired(matrix).ci95 is None:
        return None
    parts = variance_components(matrix[None])
    if estimate == 0 or not any(part.item() for part in (parts.seed, parts.item, parts.residual)):
        return float(estimate == 0)

    def short(log_p: float) -> float:
        """Return by how much the squared half-width at a level falls short of the squared estimate."""
        half = math.exp(log_p) / 2
        return estimate**2 - parts.over_seeds(half).item() - float(special.ndtri(half)) ** 2 * parts.item.item()

    low, high = math.log(1e-100), 0.0  # below, Student's t is beyond what numbers hold
    return math.exp(float(brentq(short, low, high))) if short(low) < 0 else 0.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values of several tests, adjusted so that the chance of any false alarm keeps to the level (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none is smaller than the one before it. None stays None, and
    does not count.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    order = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    least = 0.0
    for place, (p, k) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - place)))
        found[k] = least
    return found


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
    parts = variance_components(both)
    covariance = parts.over_seeds(0.975) + squared * parts.item
    means = both.mean(axis=(1, 2))
    # The interval is where (R - x G)^2 <= t^2 Var(R - x G): a quadratic a x^2 - 2 b x + c <= 0.
    (c, b), (_, a) = np.outer(means, means) - covariance
    if a <= 0:
        return None
    half_width = max(0.0, b**2 - a * c) ** 0.5
    return float((b - half_width) / a), float((b + half_width) / a)


@dataclass(frozen=True)
class Components:
    """The covariance of K means, each over S seeds and M items, by where it comes from: matrices [K, K].

    Attributes:
        seeds: S.
        seed: the covariance of the per-seed means over S, which holds the seed-by-item residual.
        item: that of the per-item means over M, without the residual.
        residual: what single outcomes alone give `seed`: the covariance of the seed-by-item residuals over S M.
    """

    seeds: int
    seed: FloatArray
    item: FloatArray
    residual: FloatArray

    def over_seeds(self, level: float) -> FloatArray:
        """Return the squared half-widths over new seeds at a quantile of Student's t, with S - 1 degrees of freedom.

        No less than those of `residual` at the normal quantile: that part is known from (S - 1)(M - 1) residuals, where
        `seed` has S - 1, and is 0 as soon as so few means happen to be equal.
        """
        if self.seeds == 1:
            return np.zeros_like(self.seed)
        t, z = float(special.stdtrit(self.seeds - 1, level)), float(special.ndtri(level))
        return _larger(t**2 * self.seed, z**2 * self.residual)


def variance_components(values: FloatArray) -> Components:
    """Split the covariance of K means, each over S seeds and M items, into seed and item parts; values are [K, S, M].

    The item part is cut at 0 where taking off the residual would make it negative (its nearest positive semi-definite
    matrix). With one seed the residual cannot be told from the item part and stays in it; with one item it is unknown.
    `seed` and `item` sum to an estimate of the covariance over new seeds and new items.
    """
    statistics, seeds, items = values.shape
    seed_means, item_means = values.mean(axis=2), values.mean(axis=1)
    none = np.zeros((statistics, statistics))
    by_seed = np.cov(seed_means).reshape(none.shape) / seeds if seeds > 1 else none
    if items < 2:
        return Components(seeds, by_seed, none, none)
    by_item, residual = np.cov(item_means).reshape(none.shape) / items, none
    if seeds > 1:
        centred = values - seed_means[:, :, None] - item_means[:, None, :] + seed_means.mean(axis=1)[:, None, None]
        residual = np.einsum("ksm,lsm->kl", centred, centred) / ((seeds - 1) * (items - 1) * seeds * items)
    return Components(seeds, by_seed, _positive(by_item - residual), residual)


def _larger(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return an upper bound of two covariances: the larger variance of each statistic that is uncorrelated in both.

    It moves with the statistics when they are combined otherwise, whatever their units.
    """
    variances, vectors = np.linalg.eigh(a + b)
    known = variances > 1e-12 * max(0.0, variances[-1])
    scaled, unscaled = vectors[:, known] * variances[known] ** 0.5, vectors[:, known] / variances[known] ** 0.5
    shares, axes = np.linalg.eigh(unscaled.T @ a @ unscaled)  # of a in a + b; those of b are the rest
    found: FloatArray = (scaled @ axes * np.maximum(shares, 1 - shares)) @ (scaled @ axes).T
    return found


def _positive(matrix: FloatArray) -> FloatArray:
    """Return the nearest positive semi-definite matrix to a symmetric one."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    found: FloatArray = (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T
    return found


def _matrix(values: ArrayLike) -> FloatArray:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"expected finite values of shape [seeds, items], got shape {matrix.shape}")
    return matrix


def _around(centre: float, half_width: float) -> Bounds:
    return centre - half_width, centre + half_width


def _clip(bounds: Bounds | None) -> Bounds | None:
    return bounds and (max(0.0, bounds[0]), min(1.0, bounds[1]))


CELLS = ("lt->lt", "lt->true", "true->lt", "true->true")
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Weights = Mapping[str, float]

WEIGHTS: Mapping[str, Weights] = {
    "gap": {"true->true": 1.0, "lt->lt": -1.0},
    "representation": {"true->lt": 0.5, "lt->lt": -0.5, "true->true": 0.5, "lt->true": -0.5},
    "classifier": {"lt->true": 0.5, "lt->lt": -0.5, "true->true": 0.5, "true->lt": -0.5},
}
INTERACTION: Weights = {"true->true": 1.0, "true->lt": -1.0, "lt->true": -1.0, "lt->lt": 1.0}

# The third level: `matched` is class-balanced with as many samples as lt, so the step lt -> matched changes the
# balance alone and the step matched -> true the number of samples alone.
MATCHED: Mapping[str, Mapping[str, Weights]] = {
    "representation": {
        "imbalance": {"matched->lt": 0.5, "lt->lt": -0.5, "matched->true": 0.5, "lt->true": -0.5},
        "sample_count": {"true->lt": 0.5, "matched->lt": -0.5, "true->true": 0.5, "matched->true": -0.5},
    },
    "classifier": {
        "imbalance": {"lt->matched": 0.5, "lt->lt": -0.5, "true->matched": 0.5, "true->lt": -0.5},
        "sample_count": {"lt->true": 0.5, "lt->matched": -0.5, "true->true": 0.5, "true->matched": -0.5},
    },
}


def summarize(correct: BoolArray, labels: IntArray, groups: Sequence[str | None]) -> dict[str, Any]:
    """Return one cell of a result table: accuracy with intervals, recall per class and per group, and their means.

    Recalls are means over seeds; a group's is the mean of its classes'. Both are None without test items. `g_mean` and
    `h_mean` are the geometric and the harmonic mean of the classes' recalls, 0 as soon as one of these is 0.

    Args:
        correct: [S, M] of bool: seeds by test items, whether top-1 was right.
        labels: [M] classes of the test items, below C.
        groups: [C] head, body, tail or None, as `tailscope.groups.assign_groups` gives them.

    >>> cell = summarize(np.array([[True, False, True]]), np.array([0, 0, 1]), [None, None])
    >>> cell["per_class"], cell["ci95_kind"]
    ([0.5, 1.0], 'item')
    """
    _check(correct, labels, groups)
    interval = proportion(correct)
    recall = _class_means(correct.astype(np.float64), labels, len(groups))
    members = {name: [r for r, g in zip(recall, groups, strict=True) if g == name and r is not None] for name in GROUPS}
    return {
        "accuracy": [float(a) for a in correct.mean(axis=1)],
        "mean": interval.estimate,
        "ci95": as_list(interval.ci95),
        "ci95_seeds": as_list(interval.ci95_seeds),
        "ci95_kind": interval.kind,
        "per_class": recall,
        "groups": {name: float(np.mean(found)) if found else None for name, found in members.items()},
        **mean_recalls(recall),
    }


def mean_recalls(recalls: Sequence[float | None]) -> dict[str, float | None]:
    """Return `g_mean`, (r_1 r_2 ... r_C)^(1/C), and `h_mean`, C / (1/r_1 + ... + 1/r_C), of recalls that are not None.

    The first is Kubat and Matwin's (1997). Both are at most the plain mean, and 0 where any recall is 0.

    >>> mean_recalls([0.5, 0.5, None]), mean_recalls([0.5, 0.0]), mean_recalls([None])
    ({'g_mean': 0.5, 'h_mean': 0.5}, {'g_mean': 0.0, 'h_mean': 0.0}, {'g_mean': None, 'h_mean': None})
    """
    known = np.array([recall for recall in recalls if recall is not None])
    if not len(known) or not known.all():
        return dict.fromkeys(("g_mean", "h_mean"), 0.0 if len(known) else None)
    return {"g_mean": float(np.exp(np.log(known).mean())), "h_mean": float(1 / (1 / known).mean())}


def attribute(correct: Mapping[str, BoolArray], labels: IntArray, groups: Sequence[str | None]) -> dict[str, Any]:
    """Split the gap between true->true and lt->lt into representation and classifier.

    Args:
        correct: [S, M] of bool for each of "lt->lt", "lt->true", "true->lt", "true->true" (backbone -> classifier),
            paired by seed and test item. Where a part's `matched` cells are present too ("matched->lt" and
            "matched->true", "lt->matched" and "true->matched"), it is split again into imbalance and sample count.
        labels: [M] classes of the test items.
        groups: [C] head, body, tail or None.

    Returns:
        `gap`, `gap_ci95`, `gap_ci95_seeds`, `ci95_kind`; `representation` and `classifier`: `points`, `ci95`,
        `ci95_seeds`, `share`, `share_ci95`; `interaction`, `interaction_ci95`, `interaction_ci95_seeds`;
        `order_matters`: whether the interaction exceeds the difference of the two parts, so that the order of
        replacement decides which is larger; `groups` and `per_class`: the same points among that group's or class's
        test items, with their `test_share`, by which they are weighted to give the total; `matched`; `notes`.
        All accuracies are fractions. Shares are None unless the gap is positive, its interval excludes 0 and
        Fieller's interval is bounded; they may lie outside [0, 1].

    Raises:
        ValueError: a cell is missing or the shapes disagree.
    """
    missing = [cell for cell in CELLS if cell not in correct]
    if missing:
        raise ValueError(f"attribution needs the cell {missing[0]!r}")
    for outcomes in correct.values():
        _check(outcomes, labels, groups)
    if len({outcomes.shape for outcomes in correct.values()}) > 1:
        raise ValueError("the cells differ in their seeds or test items")
    values = {name: _combine(correct, weights) for name, weights in WEIGHTS.items()}
    gap = paired(values["gap"])
    interaction = paired(_combine(correct, INTERACTION))
    parts = {name: _part(values[name], values["gap"], gap) for name in ("representation", "classifier")}
    difference = abs(parts["representation"]["points"] - parts["classifier"]["points"])
    order_matters = abs(interaction.estimate) > difference + 1e-12  # beyond rounding
    return {
        "gap": gap.estimate,
        "gap_ci95": as_list(gap.ci95),
        "gap_ci95_seeds": as_list(gap.ci95_seeds),
        "ci95_kind": gap.kind,
        **parts,
        "interaction": interaction.estimate,
        "interaction_ci95": as_list(interaction.ci95),
        "interaction_ci95_seeds": as_list(interaction.ci95_seeds),
        "order_matters": order_matters,
        "groups": {name: _group(values, np.array([group == name for group in groups])[labels]) for name in GROUPS},
        "per_class": {
            "test_share": (np.bincount(labels, minlength=len(groups)) / len(labels)).tolist(),
            **{part: _class_means(v, labels, len(groups)) for part, v in values.items()},
        },
        "matched": _matched(correct),
        "notes": _notes(gap, len(values["gap"]), parts["representation"]["share"] is not None, order_matters),
    }


def _combine(correct: Mapping[str, BoolArray], weights: Weights) -> FloatArray:
    """Return the weighted sum of the cells' outcomes, [S, M]."""
    total: FloatArray = np.sum([weight * correct[cell] for cell, weight in weights.items()], axis=0)
    return total


def _part(part: FloatArray, total: FloatArray, gap: Interval) -> dict[str, Any]:
    """Return one player's points and, where the gap can be divided by, its share."""
    points = paired(part)
    share_ci95 = ratio(part, total) if gap.estimate > 0 and gap.excludes_zero() else None
    share = None if share_ci95 is None else points.estimate / gap.estimate
    return {**points.to_json(), "share": share, "share_ci95": as_list(share_ci95)}


def _group(values: Mapping[str, FloatArray], members: BoolArray) -> dict[str, Any] | None:
    """Return a group's points among its own test items, None where it has no test items."""
    if not members.any():
        return None
    parts = {part: paired(v[:, members]).to_json() for part, v in values.items()}
    return {"test_share": float(members.mean()), **parts}


def _matched(correct: Mapping[str, BoolArray]) -> dict[str, Any] | None:
    """Split each part whose `matched` cells are present; None where none are."""
    split = {
        part: {step: paired(_combine(correct, weights)).to_json() for step, weights in steps.items()}
        for part, steps in MATCHED.items()
        if all(cell in correct for weights in steps.values() for cell in weights)
    }
    return split or None


def _class_means(values: FloatArray, labels: IntArray, classes: int) -> list[float | None]:
    """Return the mean over seeds and over each class's items, None for classes without items."""
    counts, sums = (np.bincount(labels, weight, minlength=classes) for weight in (None, values.mean(axis=0)))
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def _notes(gap: Interval, seeds: int, divided: bool, order_matters: bool) -> list[str]:
    """Return what a reader must know before quoting the numbers."""
    notes = {
        "one seed: this pair of trainings only": seeds == 1,
        "two seeds: points only, no intervals and no shares": seeds == 2,
        "no long-tail gap": gap.estimate <= 0,
        "gap too small to divide": gap.estimate > 0 and not divided and seeds != 2,
        "the order of replacement decides which part is larger": order_matters,
    }
    return [note for note, holds in notes.items() if holds]


def _check(correct: BoolArray, labels: IntArray, groups: Sequence[str | None]) -> None:
    if correct.dtype != np.bool_ or correct.ndim != 2 or 0 in correct.shape:
        raise ValueError(f"correct must be bool [seeds, items], got {correct.dtype} {correct.shape}")
    if labels.shape != correct.shape[1:] or labels.min() < 0 or labels.max() >= len(groups):
        raise ValueError(f"labels must be {correct.shape[1]} classes in 0...{len(groups) - 1}")
