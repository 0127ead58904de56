"""Which classes lie closest to one another; and several encoders of the same images side by side.

Accuracies tell which encoder is better (`better`), paired over samples; who localises, separates and compacts more is
told by differences of angles, paired over the classes of a group, whose mean gets a t interval. Compact features may
say nothing of the classes: where accuracies call an encoder worse, measures that favour it are marked. Both are for
these encoders as they are, not for other trainings of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.diagnosis.inputs import Inputs
from tailscope.errors import UserError
from tailscope.groups import GROUPS
from tailscope.measures.angles import unit_centers
from tailscope.measures.fields import Entry
from tailscope.measures.rows import exponent, log2_lengths, scaled
from tailscope.tables.checks import match_names
from tailscope.tables.table import FeatureTable

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

IntArray = npt.NDArray[np.int64]
ROWS_AT_ONCE, CLASSES_AT_ONCE = 4096, 512
ASPECTS = {
    "localises": "spread gap: unseen samples lie where training samples do",
    "separates": "angle to the nearest other class's centre",
    "compacts": "angle of samples to their own centre",
    "margin": "angle to the nearest other centre over the spread, which does not depend on the encoder's own scale",
}
FAVOURED = {
    "localises": "smaller spread gap",
    "separates": "centres farther apart",
    "compacts": "smaller spread",
    "margin": "larger margin",
}
WORSE = "but of features that tell classes apart less"


class Pair(TypedDict):
    """Two classes: the angle between their centres, and the shares of scored samples of one taken for the other."""

    first: str
    second: str
    first_index: int
    second_index: int
    angle_deg: float
    first_as_second: float | None
    second_as_first: float | None


def confusable_pairs(
    centers: Tensor,
    names: Sequence[str],
    labels: IntArray | None = None,
    predicted: IntArray | None = None,
    most: int = 10,
) -> list[Pair]:
    """Return the pairs of classes with the smallest angle between their centres over all samples, closest first.

    `labels` [m] are the classes of scored samples, `predicted` what the classifier in use takes them for.
    """
    unit = unit_centers(centers.cpu(), torch.float64)[0]
    return [
        {
            "first": names[i],
            "second": names[j],
            "first_index": i,
            "second_index": j,
            "angle_deg": float((2 * torch.asin((unit[i] - unit[j]).norm().clamp(max=2) / 2)).rad2deg()),
            "first_as_second": _taken(labels, predicted, i, j),
            "second_as_first": _taken(labels, predicted, j, i),
        }
        for i, j in closest(unit, most)
    ]


def closest(unit: Tensor, most: int) -> list[tuple[int, int]]:
    """Return the index pairs i < j of unit vectors [C, d] with the largest cosines; rows of zeros have no partner.

    >>> closest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), 2)
    [(0, 2), (1, 2)]
    """
    classes = len(unit)
    known = unit.norm(dim=1) > 0
    values, pairs = torch.empty(0, dtype=unit.dtype), torch.empty(0, 2, dtype=torch.int64)
    for start in range(0, classes, CLASSES_AT_ONCE):
        cosine = unit[start : start + CLASSES_AT_ONCE] @ unit.T
        first = torch.arange(start, start + len(cosine))[:, None]
        allowed = (torch.arange(classes) > first) & known & known[start : start + CLASSES_AT_ONCE, None]
        cosine[~allowed] = -torch.inf
        top = cosine.flatten().topk(min(most, cosine.numel()))
        real = top.values > -torch.inf
        index = top.indices[real]
        values = torch.cat([values, top.values[real]])
        pairs = torch.cat([pairs, torch.stack([index // classes + start, index % classes], dim=1)])
    best = values.argsort(descending=True, stable=True)[:most]
    return [(int(i), int(j)) for i, j in pairs[best]]


def _taken(labels: IntArray | None, predicted: IntArray | None, true: int, other: int) -> float | None:
    if labels is None or predicted is None:
        return None
    members = labels == true
    return float((predicted[members] == other).mean()) if members.any() else None


def linear_cka(first: Tensor, second: Tensor) -> float | None:
    """Return the linear centred kernel alignment of two encoders' features of the same samples (Kornblith et al. 2019).

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of centred features [n, d] and [n, e]: 1 where they agree up to rotation and
    scale. With fewer samples than dimensions it comes out too high. None where an encoder gives one vector only.

    >>> x = torch.randn(50, 4, generator=torch.manual_seed(0))
    >>> round(linear_cka(x, 3 * x.flip(1) + 1), 6)
    1.0
    """
    sides = [scaled(x, exponent(log2_lengths(x, "features"))) for x in (first, second)]
    own, other = (_aligned(side, side) for side in sides)
    return _aligned(*sides) / (own**0.5 * other**0.5) if own > 0 and other > 0 else None


def _aligned(x: Tensor, y: Tensor) -> float:
    """Return ||Y'X||_F^2 of centred features, from their kernels where samples are fewer than features."""
    means = [side.mean(dim=0, dtype=torch.float64) for side in (x, y)]
    if len(x) < max(x.shape[1], y.shape[1]):
        k, m = (side @ side.T for side in (x - means[0], y - means[1]))
        return float((k * m).sum())
    product = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64)
    for a, b in zip(*(torch.split(side, ROWS_AT_ONCE) for side in (x, y)), strict=True):
        product += (b - means[1]).T @ (a - means[0])
    return float(product.square().sum())


def paired_inputs(reference: Inputs, inputs: Inputs) -> Inputs:
    """Return another encoder's inputs with the samples in the reference's order: by ids, else as they stand.

    Raises:
        UserError: the classes, or the samples, are not the same.
    """
    if inputs.names != reference.names or (inputs.test is None) != (reference.test is None):
        raise UserError(f"{inputs.train.source}: other classes than {reference.train.source}; compare the same data")
    ordered: dict[str, Any] = {part: _in_order(table, inputs.tables[part]) for part, table in reference.tables.items()}
    return replace(inputs, **ordered)


def _in_order(reference: FeatureTable, other: FeatureTable) -> FeatureTable:
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
    """Return `comparison` of a diagnosis, every encoder against the first, from paired inputs and from their results.

    `outcomes` says who gets which sample right under each, None without a verdict.
    """
    from tailscope.diagnosis.better import rank, which  # here because SciPy takes time, for one encoder in vain

    reference, *others = inputs
    withheld = {name: (result["verdict"] or {}).get("withheld", []) for name, result in results.items()}
    groups = [entry["group"] for entry in results[reference]["classes"]]
    found = {}
    for name in others:
        better = which(reference, name, outcomes, withheld, groups)
        cka = {
            part: linear_cka(inputs[reference].tables[part].features, inputs[name].tables[part].features)
            for part in ("train", "unseen")
        }
        by_group = {group: (part and part["better"]) or better["better"] for group, part in better["by_group"].items()}
        angles = _angles(results[reference]["classes"], results[name]["classes"], {"all": better["better"], **by_group})
        found[name] = {**better, "cka": cka, "groups": angles}
    return {"reference": reference, "aspects": ASPECTS, **rank(outcomes, withheld), "encoders": found}


def _angles(reference: Sequence[Entry], other: Sequence[Entry], better: Mapping[str, str | None]) -> dict[str, Any]:
    """Return, for all classes and each group, every aspect's mean difference over classes and whom it favours.

    `better` says whose accuracies are clearly better there: where an aspect favours the other one, it is marked.
    """
    both = list(zip(reference, other, strict=True))
    members = {group: [pair for pair in both if group in ("all", pair[0]["group"])] for group in ("all", *GROUPS)}
    return {
        group: {aspect: _aspect(aspect, pairs, better.get(group)) for aspect in ASPECTS}
        for group, pairs in members.items()
        if pairs
    }


def _aspect(aspect: str, entries: Sequence[tuple[Entry, Entry]], better: str | None) -> dict[str, Any]:
    pairs = [(_value(aspect, a), _value(aspect, b)) for a, b in entries]
    differences = np.array([b - a for a, b in pairs if a is not None and b is not None])
    number = len(differences)
    found: dict[str, Any] = {"classes": number, "difference": None, "ci95": None, "better": None, "note": None}
    if number:
        found["difference"] = float(differences.mean())
    if number > 1:
        from scipy import special

        half = special.stdtrit(number - 1, 0.975) * differences.std(ddof=1) / number**0.5
        low, high = found["ci95"] = [float(differences.mean() - half), float(differences.mean() + half)]
        if low > 0 or high < 0:
            found["better"] = "other" if (high < 0) == (aspect in ("localises", "compacts")) else "reference"
    if found["better"] and better and found["better"] != better:
        found["note"] = f"{FAVOURED[aspect]}, {WORSE}"
    return found


def _value(aspect: str, entry: Entry) -> float | None:
    apart, spread = entry["nearest_center_true_deg"], entry["spread_true_deg"]
    margin = apart / spread if apart is not None and spread else None
    values = {"localises": entry["spread_gap_deg"], "separates": apart, "compacts": spread, "margin": margin}
    value: float | None = values[aspect]
    return value
