"""Angles in degrees between feature vectors and centres, safe where the arc cosine is not.

The arc cosine of a float32 cosine is wrong by up to 0.02 degrees near 0: too coarse for the centres of large
classes. An angle here is the arc tangent of the part across the centre over the part along it, which is accurate
to a few units of rounding at every angle (W. Kahan, "How futile are mindless assessments of roundoff", 2006).
"""

import math

import torch
from torch import Tensor

from tailscope.geometry.lengths import row_blocks


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
    for block in row_blocks(rows):
        along = block @ direction
        across = torch.addr(block, along, direction, alpha=-1)
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


def unit_centers(centers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the centres [C, d] at length 1 (0 where they have no direction) and which ones have a direction."""
    wide = centers.double()
    norm = torch.linalg.vector_norm(wide, dim=1)
    usable = torch.isfinite(norm) & (norm > 0)
    unit = torch.where(usable[:, None], wide / norm[:, None], 0.0)
    return unit.to(dtype), usable
