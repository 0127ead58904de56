"""Class centres, and angles in degrees between them and feature vectors, safe where the arc cosine is not.

The arc cosine of a float32 cosine is wrong by up to 0.02 degrees near 0: too coarse for the centres of large
classes. An angle here is the arc tangent of the part across the centre over the part along it, which is accurate
to a few units of rounding at every angle (W. Kahan, "How futile are mindless assessments of roundoff", 2006).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailscope.measures.rows import ClassRows, map_parallel, row_blocks, subsets

REPLICATE_ELEMENTS = 1 << 25


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

    Both are [C], of centres [C, d]. Rows that are NaN or zero have no direction and take no part: NaN and -1.

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


@dataclass(frozen=True)
class Centers:
    """Class means in float64 [C, d]: over training, unseen and all samples; NaN where a class has none.

    `lengths` has the three's lengths, `apart` the squared distances between the first two, by class.
    """

    train: Tensor
    unseen: Tensor
    true: Tensor
    lengths: list[list[float]]
    apart: list[float]


def class_centers(train: ClassRows, unseen: ClassRows) -> Centers:
    """Return the means of every class, summed in float64."""
    sums = [_class_sums(rows) for rows in (train, unseen)]
    counts = [torch.tensor(rows.starts, device=rows.features.device).diff()[:, None] for rows in (train, unseen)]
    s, u, t = sums[0] / counts[0], sums[1] / counts[1], (sums[0] + sums[1]) / (counts[0] + counts[1])
    lengths = torch.stack([torch.linalg.vector_norm(mean, dim=1) for mean in (s, u, t)], dim=1)
    return Centers(s, u, t, lengths.tolist(), (s - u).square().sum(dim=1).tolist())


def _class_sums(rows: ClassRows) -> Tensor:
    sums = torch.empty(rows.classes, rows.features.shape[1], dtype=torch.float64, device=rows.features.device)

    def one(k: int) -> None:
        torch.sum(rows.features.index_select(0, rows.index(k)), dim=0, dtype=torch.float64, out=sums[k])

    map_parallel(one, rows.classes, rows.features.device)
    return sums


def shift_by_chance(n: int, m: int, variance: float, along: float, norm: float, center_norm: float) -> float:
    """Return the angle in degrees between the mean of n samples and that of all n + m, expected by chance alone.

    The squared distance of the two means has expectation (1 - n / N) tr(Sigma) / n exactly; the angle follows with the
    variance along the common mean left out and a second-order factor 1 - 1 / (4 r), r = tr(Sigma)^2 / ||Sigma||_F^2.
    An approximation (within 2 degrees or a tenth), used where no permutations are drawn. `variance` is the trace of the
    covariance over all samples, `norm` its Frobenius norm, `along` the variance along the direction of the common mean.

    >>> round(shift_by_chance(5, 500, 1.0, 0.01, 0.2, 1.0), 1)
    23.6
    """
    across = max(0.0, variance - along)
    tangent = math.sqrt(m / (n + m) * across / n) / center_norm
    rank = variance**2 / norm**2 if norm > 0 else math.inf
    return math.degrees(math.atan(tangent) * (1 - 1 / (4 * rank)))


def separation_by_chance(
    train: ClassRows, unseen: ClassRows, centers: Centers, draws: int, rng: np.random.Generator
) -> Tensor:
    """Return, per class, the mean angle to the nearest other centre when centres are means of unseen samples.

    Each draw takes from every class as many unseen samples as it has training samples (all of them where there are
    fewer), so that the noise of small classes' centres is the same as in training but memorisation has no part in it.
    A class without unseen samples keeps its training centre as the others' rival; its own entry is NaN, as all are for
    0 draws. Degrees, float64 [C].
    """
    classes, d = centers.train.shape
    draws = min(draws, 99, max(9, REPLICATE_ELEMENTS // (classes * d)))
    if not draws:
        return torch.full((classes,), math.nan, dtype=torch.float64)
    replicates = centers.train.to(unseen.dtype).repeat(draws, 1, 1)
    sizes = [min(train.count(k), unseen.count(k)) for k in range(classes)]
    for k, size in enumerate(sizes):
        if size:
            taken = np.concatenate(list(subsets(size, unseen.count(k), draws, rng)))
            member = torch.from_numpy(taken).to(device=replicates.device, dtype=replicates.dtype)
            replicates[:, k] = member @ unseen.features[unseen.index(k)].to(unseen.dtype) / size
    total = torch.zeros(classes, dtype=torch.float64, device=replicates.device)
    for replicate in replicates:
        total += nearest_center(replicate)[0]
    return torch.where(torch.tensor(sizes, device=total.device) > 0, total / draws, math.nan)


class NearestWrongCenter:
    """The search over all samples: `run` every block of samples, in any thread, then read `means`.

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
        angles = rows.order.new_empty(len(centers), len(rows.order), dtype=torch.float64)  # in degrees
        self._angles = torch.split(angles, size, dim=1)
        self.blocks = len(self._order)

    def run(self, i: int) -> None:
        """Measure block i's samples."""
        block = self._rows.features.index_select(0, self._order[i]).to(self._rows.dtype)
        norm = torch.linalg.vector_norm(block, dim=1)
        dots = torch.split(block @ self._unit.T, self._classes, dim=1)
        for found, directions, unusable, part in zip(
            self._angles[i], self._directions, self._unusable, dots, strict=True
        ):
            part.index_fill_(1, unusable, -math.inf)
            part.scatter_(1, self._labels[i][:, None], -math.inf)
            found.copy_(_smallest_angle(block, norm, directions, part))

    def means(self) -> Tensor:
        """Return the class means, [number of sets, C]; NaN for a class without samples or without another centre."""
        angles = torch.cat(self._angles, dim=1)
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
