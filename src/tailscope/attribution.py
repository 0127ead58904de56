"""How much of the long-tail gap lies in the representation and how much in the classifier.

A(b, c) is the test accuracy of a backbone trained on b under a classifier trained on c, each of `lt` and `true`. The
gap G = A(true, true) - A(lt, lt) is split by the Shapley value of the game whose two players are the backbone and
the classifier (Shapley 1953): each is credited with the mean of what its replacement gains before and after the
other's. Everything is linear in the per-item outcomes, so the parts of classes and groups add up exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailscope.groups import GROUPS
from tailscope.intervals import FloatArray, Interval, as_list, paired, proportion, ratio

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
    """Return one cell of a result table: accuracy with intervals, recall per class and per group.

    Recalls are means over seeds; a group's is the mean of its classes'. Both are None without test items.

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
    }


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
