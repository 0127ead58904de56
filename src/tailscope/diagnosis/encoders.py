"""Several encoders of the same images side by side: who localises, separates and compacts better, by paired intervals.

Differences of accuracies are paired over samples; differences of angles over the classes of a group, whose
mean gets a t interval. Both are for these encoders as they are, not for other trainings of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tailscope.diagnosis.inputs import Inputs
from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable
from tailscope.field_checks import match_names
from tailscope.geometry.fields import Entry
from tailscope.geometry.lengths import exponent, log2_lengths, scaled
from tailscope.groups import GROUPS

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

ROWS_AT_ONCE = 4096
# What is compared, from which field, and whether less is better.
ASPECTS = {
    "localises": ("spread_gap_deg", True),
    "separates": ("nearest_center_true_deg", False),
    "compacts": ("spread_true_deg", True),
    "margin": ("margin", False),
}
MEANINGS = {
    "localises": "spread gap: unseen samples lie where training samples do",
    "separates": "angle to the nearest other class's centre",
    "compacts": "angle of samples to their own centre",
    "margin": "angle to the nearest other centre over the spread, which does not depend on the encoder's own scale",
}


def linear_cka(first: Tensor, second: Tensor) -> float | None:
    """Return the linear centred kernel alignment of two encoders' features of the same samples (Kornblith et al. 2019).

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of centred features: 1 where they agree up to rotation and scale. With fewer
    samples than dimensions it comes out too high. None where an encoder gives one vector only.

    Args:
        first: [n, d].
        second: [n, e], the same samples in the same order.

    >>> x = torch.randn(50, 4, generator=torch.manual_seed(0))
    >>> round(linear_cka(x, 3 * x.flip(1) + 1), 6)
    1.0
    """
    sides = [scaled(x, exponent(log2_lengths(x, "features"))) for x in (first, second)]
    cross, own, other = _by_samples(*sides) if len(first) < max(x.shape[1] for x in sides) else _by_features(*sides)
    return cross / (own**0.5 * other**0.5) if own > 0 and other > 0 else None


def _by_samples(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Return ||Y'X||_F^2, ||X'X||_F^2 and ||Y'Y||_F^2 of centred features from n x n kernels, where n is small."""
    k, m = (side @ side.T for side in (x.double() - x.mean(dim=0, dtype=torch.float64) for x in (first, second)))
    return float((k * m).sum()), float(k.square().sum()), float(m.square().sum())


def _by_features(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Return the same from products over the features."""
    means = [x.mean(dim=0, dtype=torch.float64) for x in (first, second)]
    d, e = first.shape[1], second.shape[1]
    products = [torch.zeros(a, b, dtype=torch.float64) for a, b in ((e, d), (d, d), (e, e))]
    for start in range(0, len(first), ROWS_AT_ONCE):
        x, y = (
            side[start : start + ROWS_AT_ONCE].double() - mean
            for side, mean in zip((first, second), means, strict=True)
        )
        for product, left, right in zip(products, (y, x, y), (x, x, y), strict=True):
            product += left.T @ right
    cross, own, other = (float(product.square().sum()) for product in products)
    return cross, own, other


def pair_up(reference: FeatureTable, other: FeatureTable) -> FeatureTable:
    """Return the other encoder's table with its samples in the reference's order: by ids, else as they stand.

    Raises:
        UserError: the samples are not the same.
    """
    where = f"{other.source}: its samples are not those of {reference.source}"
    if reference.ids is not None and other.ids is not None:
        first, second = (np.argsort(ids, kind="stable") for ids in (reference.ids, other.ids))
        if not np.array_equal(reference.ids[first], other.ids[second]):
            raise UserError(f"{where}: their ids differ; extract both from the same images")
        order = np.empty(len(first), dtype=np.int64)
        order[first] = second
        other = other.take(order)
    if not torch.equal(reference.labels, other.labels):
        raise UserError(f"{where}: their labels differ; give ids in both, or the same images in the same order")
    return other


def same_names(reference: FeatureTable, other: FeatureTable) -> FeatureTable:
    """Return the other encoder's table with the reference's numbers for its class names.

    Raises:
        UserError: the names differ.
    """
    if reference.class_names is None or other.class_names is None or reference.class_names == other.class_names:
        return other
    position = match_names(other.source, other.class_names, reference.source, reference.class_names)
    return replace(other, class_names=reference.class_names, labels=torch.from_numpy(position)[other.labels])


def compare(
    inputs: Mapping[str, Inputs], results: Mapping[str, dict[str, Any]], outcomes: "Mapping[str, Outcomes | None]"
) -> dict[str, Any]:
    """Return `comparison` of a diagnosis: every encoder against the first.

    Args:
        inputs: by encoder's name, paired by `pair_up`.
        results: diagnosis of each.
        outcomes: who gets which sample right under each, None without a verdict.
    """
    reference, *others = inputs
    return {
        "reference": reference,
        "aspects": MEANINGS,
        "encoders": {
            name: {
                "cka": {
                    "train": linear_cka(inputs[reference].train.features, inputs[name].train.features),
                    "unseen": linear_cka(inputs[reference].unseen.features, inputs[name].unseen.features),
                },
                "accuracy": _accuracies(outcomes[reference], outcomes[name]),
                "groups": _angles(results[reference]["classes"], results[name]["classes"]),
            }
            for name in others
        },
    }


def _accuracies(reference: "Outcomes | None", other: "Outcomes | None") -> dict[str, Any] | None:
    """Return the other encoder's accuracies minus the reference's, paired over samples."""
    if reference is None or other is None:
        return None
    from tailscope.intervals import as_list, paired  # here because SciPy takes time to import, for one encoder in vain

    rows = {
        "current": (reference.current, other.current),
        "rebalanced": (reference.rebalanced.correct, other.rebalanced.correct),
        "classifier_bound": (reference.bound.correct, other.bound.correct),
    }
    found = {}
    for name, (before, after) in rows.items():
        factor = 1.0 if name == "current" else max(reference.inflation, other.inflation)
        interval = paired(after.astype(float)[None] - before.astype(float)[None]).widened(factor)
        found[name] = {"points": interval.estimate, "ci95": as_list(interval.ci95)}
    return found


def _angles(reference: Sequence[Entry], other: Sequence[Entry]) -> dict[str, Any]:
    """Return, for all classes and each group, every aspect's mean difference over classes and who is better."""
    found: dict[str, Any] = {}
    for group in ("all", *GROUPS):
        members = [k for k, entry in enumerate(reference) if group in ("all", entry["group"])]
        if members:
            found[group] = {aspect: _aspect(aspect, reference, other, members) for aspect in ASPECTS}
    return found


def _aspect(aspect: str, reference: Sequence[Entry], other: Sequence[Entry], members: Sequence[int]) -> dict[str, Any]:
    field, less = ASPECTS[aspect]
    pairs = [(_value(reference[k], field), _value(other[k], field)) for k in members]
    differences = np.array([b - a for a, b in pairs if a is not None and b is not None])
    found: dict[str, Any] = {"classes": len(differences), "difference": None, "ci95": None, "better": None}
    if len(differences):
        found["difference"] = float(differences.mean())
    if len(differences) > 1:
        from scipy import special

        half = special.stdtrit(len(differences) - 1, 0.975) * differences.std(ddof=1) / len(differences) ** 0.5
        low, high = float(differences.mean() - half), float(differences.mean() + half)
        found["ci95"] = [low, high]
        if low > 0 or high < 0:
            found["better"] = "other" if (high < 0) == less else "reference"
    return found


def _value(entry: Entry, field: str) -> float | None:
    if field != "margin":
        value: float | None = entry[field]
        return value
    apart, spread = entry["nearest_center_true_deg"], entry["spread_true_deg"]
    return apart / spread if apart is not None and spread else None
