"""Angles in degrees between feature vectors and centres, safe where the arc cosine is not.

The arc cosine of a float32 cosine is wrong by up to 0.02 degrees near 0: too coarse for the centres of large
classes. An angle here is the arc tangent of the part across the centre over the part along it, which is accurate
to a few units of rounding at every angle (W. Kahan, "How futile are mindless assessments of roundoff", 2006).
"""

import math

import torch
from torch import Tensor

from tailscope.geometry.parallel import map_parallel
from tailscope.geometry.rows import BLOCK_ELEMENTS, ClassRows


def resolution_deg(dtype: torch.dtype) -> float:
    """Return the angle in degrees below which two directions of this precision count as equal."""
    return math.degrees(8 * torch.finfo(dtype).eps)


def angles_to(rows: Tensor, center: Tensor) -> Tensor:
    """Return the angles in degrees, float64 [n], between rows [n, d] and one centre [d]; NaN for a zero centre.

    Angles of rounding size are 0.

    >>> angles_to(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0])).tolist()
    [0.0, 90.0, 45.0]
    """
    wide = center.double()
    direction = (wide / torch.linalg.vector_norm(wide)).to(rows.dtype)
    found = []
    for block in torch.split(rows, max(1, BLOCK_ELEMENTS // rows.shape[1])):
        along = block @ direction
        across = torch.addmm(block, along[:, None], direction[None, :], alpha=-1)
        found.append(torch.atan2(torch.linalg.vector_norm(across, dim=1).double(), along.double()))
    angle = torch.rad2deg(torch.cat(found)) if found else rows.new_empty(0, dtype=torch.float64)
    return torch.where(angle < resolution_deg(rows.dtype), 0.0, angle)


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Return the angles in degrees, float64 [...], between paired vectors [..., d]; NaN where one is zero.

    >>> angle_between(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).item()
    45.0
    """
    a = torch.nn.functional.normalize(first.double(), dim=-1, eps=0.0)
    b = torch.nn.functional.normalize(second.double(), dim=-1, eps=0.0)
    half = torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))
    return torch.rad2deg(2 * half)


def nearest_center(centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per class, the angle in degrees to the nearest other centre and that centre's class.

    Args:
        centers: [C, d]; rows that are NaN or zero have no direction and take no part.

    Returns:
        Angles, float64 [C], NaN where undefined, and classes, int64 [C], -1 where undefined.

    >>> angles, classes = nearest_center(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    >>> angles.round().tolist(), classes.tolist()
    ([90.0, 45.0, 45.0], [1, 2, 1])
    """
    unit, usable = unit_centers(centers, torch.float32)
    blocks = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine[:, ~usable] = -math.inf
        cosine.diagonal(start).fill_(-math.inf)
        best = cosine.max(dim=1)
        blocks.append(torch.where(torch.isinf(best.values), -1, best.indices))
    nearest = torch.cat(blocks)
    nearest[~usable] = -1
    angle = angle_between(centers, centers[nearest.clamp(min=0)])
    return torch.where(nearest >= 0, angle, math.nan), nearest


def sample_angles(rows: ClassRows, centers: list[Tensor]) -> list[Tensor]:
    """Return, for each set of centres [C, d], the class means of the samples' angle to the nearest wrong centre.

    Each result is float64 [C] in degrees, NaN for a class without samples or without another centre. One matrix
    product finds the nearest centres of all sets; its cosine is used as it is except near 1, where the angle is
    computed again without the arc cosine.
    """
    parts = [unit_centers(c, rows.dtype) for c in centers]
    unusable = [(~usable).nonzero().flatten() for _, usable in parts]
    unit = torch.cat([directions for directions, _ in parts])
    classes = len(centers[0])
    labels = torch.split(rows.labels(), max(512, (1 << 20) // len(unit)))
    order = torch.split(rows.order, max(512, (1 << 20) // len(unit)))

    def one(i: int) -> list[Tensor]:
        block = rows.features.index_select(0, order[i]).to(rows.dtype)
        norm = torch.linalg.vector_norm(block, dim=1)
        cosines = torch.split(block @ unit.T, classes, dim=1)
        angles = []
        for (directions, _), gone, part in zip(parts, unusable, cosines, strict=True):
            part.index_fill_(1, gone, -math.inf)
            part.scatter_(1, labels[i][:, None], -math.inf)
            angles.append(_smallest_angle(block, norm, directions, part))
        return angles

    sums = torch.zeros(len(centers), classes, dtype=torch.float64, device=unit.device)
    for own, angles in zip(labels, map_parallel(one, len(order), unit.device), strict=True):
        sums.index_add_(1, own, torch.stack(angles))
    return list(sums / torch.bincount(rows.labels(), minlength=classes))


def unit_centers(centers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the centres [C, d] at length 1 (0 where they have no direction) and which ones have a direction."""
    wide = centers.double()
    norm = torch.linalg.vector_norm(wide, dim=1)
    usable = torch.isfinite(norm) & (norm > 0)
    unit = torch.where(usable[:, None], wide / norm[:, None], 0.0)
    return unit.to(dtype), usable


def _smallest_angle(rows: Tensor, norm: Tensor, directions: Tensor, dots: Tensor) -> Tensor:
    """Return the angle in degrees, float64 [n], that belongs to the largest of each row's dots [n, C] with directions.

    NaN where every dot is -inf. Near 0 the angle is computed again without the arc cosine.
    """
    largest = dots.amax(dim=1)
    angle = torch.acos((largest.double() / norm).clamp(-1, 1))
    angle[torch.isinf(largest)] = math.nan
    close = (largest > 0.98 * norm).nonzero().flatten()
    if len(close):
        x, nearest = rows[close], directions[dots[close].argmax(dim=1)]
        along = (x * nearest).sum(dim=1)
        across = torch.linalg.vector_norm(x - along[:, None] * nearest, dim=1)
        angle[close] = torch.atan2(across.double(), along.double())
    return torch.rad2deg(angle)
