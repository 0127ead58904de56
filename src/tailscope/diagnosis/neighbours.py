"""The pairs of classes that lie closest to one another, and how often one is taken for the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.geometry.angles import unit_centers

IntArray = npt.NDArray[np.int64]
BLOCK = 512


def confusable_pairs(
    centers: Tensor,
    names: Sequence[str],
    labels: IntArray | None = None,
    predicted: IntArray | None = None,
    most: int = 10,
) -> list[dict[str, Any]]:
    """Return the pairs of classes with the smallest angle between their centres over all samples, closest first.

    Args:
        centers: [C, d], over all samples.
        names: [C].
        labels: [m] classes of scored samples, or None.
        predicted: [m] what the classifier in use takes them for.
        most: how many pairs.

    Returns:
        `first`, `second` (names; indices as `first_index`, `second_index`), `angle_deg`, and the shares of scored
        samples of the first taken for the second, `first_as_second`, and the reverse, `second_as_first`.
    """
    unit = unit_centers(centers.cpu(), torch.float64)[0]
    found = []
    for i, j in closest(unit, most):
        angle = 2 * torch.asin((unit[i] - unit[j]).norm().clamp(max=2) / 2)
        pair: dict[str, Any] = {
            "first": names[i],
            "second": names[j],
            "first_index": i,
            "second_index": j,
            "angle_deg": float(angle.rad2deg()),
            "first_as_second": None,
            "second_as_first": None,
        }
        if labels is not None and predicted is not None:
            pair["first_as_second"] = _taken(labels, predicted, i, j)
            pair["second_as_first"] = _taken(labels, predicted, j, i)
        found.append(pair)
    return found


def closest(unit: Tensor, most: int) -> list[tuple[int, int]]:
    """Return the index pairs i < j of unit vectors [C, d] with the largest cosines; rows of zeros have no partner.

    >>> closest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), 2)
    [(0, 2), (1, 2)]
    """
    classes = len(unit)
    known = unit.norm(dim=1) > 0
    values, pairs = torch.empty(0, dtype=unit.dtype), torch.empty(0, 2, dtype=torch.int64)
    for start in range(0, classes, BLOCK):
        cosine = unit[start : start + BLOCK] @ unit.T
        first = torch.arange(start, start + len(cosine))[:, None]
        allowed = (torch.arange(classes) > first) & known & known[start : start + BLOCK, None]
        cosine[~allowed] = -torch.inf
        top = cosine.flatten().topk(min(most, cosine.numel()))
        real = top.values > -torch.inf
        index = top.indices[real]
        values = torch.cat([values, top.values[real]])
        pairs = torch.cat([pairs, torch.stack([index // classes + start, index % classes], dim=1)])
    best = values.argsort(descending=True, stable=True)[:most]
    return [(int(i), int(j)) for i, j in pairs[best]]


def _taken(labels: IntArray, predicted: IntArray, true: int, other: int) -> float | None:
    members = labels == true
    return float((predicted[members] == other).mean()) if members.any() else None
