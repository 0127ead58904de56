"""Angles between samples and the nearest centre of a wrong class: the one measurement that meets every class."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tailscope.geometry.angles import unit_centers
from tailscope.geometry.rows import ClassRows


class NearestWrongCenter:
    """The search over all samples: `run` every block of samples, in any thread, `add` the results, read `means`.

    One matrix product finds the nearest centres of all sets of centres; its cosine is used as it is except near 1,
    where the angle is computed again without the arc cosine.
    """

    def __init__(self, rows: ClassRows, centers: Sequence[Tensor]) -> None:
        parts = [unit_centers(c, rows.dtype) for c in centers]
        self._rows = rows
        self._directions = [directions for directions, _ in parts]
        self._unusable = [(~usable).nonzero().flatten() for _, usable in parts]
        self._unit = torch.cat(self._directions)
        self._classes = len(centers[0])
        size = max(512, (1 << 20) // len(self._unit))
        self._labels, self._order = torch.split(rows.labels(), size), torch.split(rows.order, size)
        self._angles: dict[int, Tensor] = {}

    @property
    def blocks(self) -> int:
        """Number of blocks of samples."""
        return len(self._order)

    def run(self, i: int) -> Tensor:
        """Return the angles in degrees of block i's samples, float64 [number of sets of centres, samples]."""
        block = self._rows.features.index_select(0, self._order[i]).to(self._rows.dtype)
        norm = torch.linalg.vector_norm(block, dim=1)
        dots = torch.split(block @ self._unit.T, self._classes, dim=1)
        angles = []
        for directions, unusable, part in zip(self._directions, self._unusable, dots, strict=True):
            part.index_fill_(1, unusable, -math.inf)
            part.scatter_(1, self._labels[i][:, None], -math.inf)
            angles.append(_smallest_angle(block, norm, directions, part))
        return torch.stack(angles)

    def add(self, i: int, angles: Tensor) -> None:
        """Take in block i's angles."""
        self._angles[i] = angles

    def means(self) -> Tensor:
        """Return the class means in degrees, float64 [number of sets, C].

        NaN for a class without samples or without another centre.
        """
        angles = torch.cat([self._angles[i] for i in range(self.blocks)], dim=1)
        sums = angles.new_zeros(len(angles), self._classes).index_add_(1, torch.cat(self._labels), angles)
        return sums / torch.tensor(self._rows.starts, device=sums.device).diff()


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
