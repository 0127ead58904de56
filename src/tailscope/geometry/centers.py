"""Class centres: means, their spread by chance, and how near they lie to one another."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailscope.geometry.angles import nearest_center
from tailscope.geometry.parallel import map_parallel
from tailscope.geometry.permutation import subsets
from tailscope.geometry.rows import ClassRows

REPLICATE_ELEMENTS = 1 << 25


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
    classes, d = len(rows.starts) - 1, rows.features.shape[1]
    sums = torch.empty(classes, d, dtype=torch.float64, device=rows.features.device)

    def one(k: int) -> None:
        torch.sum(rows.features.index_select(0, rows.index(k)), dim=0, dtype=torch.float64, out=sums[k])

    map_parallel(one, classes, rows.features.device)
    return sums


def shift_by_chance(n: int, m: int, variance: float, along: float, norm: float, center_norm: float) -> float:
    """Return the angle in degrees between the mean of n samples and that of all n + m, expected by chance alone.

    The squared distance of the two means has expectation (1 - n / N) tr(Sigma) / n exactly; the angle follows with the
    variance along the common mean left out and a second-order factor 1 - 1 / (4 r), r = tr(Sigma)^2 / ||Sigma||_F^2.
    An approximation (within 2 degrees or a tenth), used where no permutations are drawn.

    Args:
        n: training samples.
        m: unseen samples.
        variance: trace of the class's covariance over all samples.
        along: variance along the direction of the common mean.
        norm: Frobenius norm of the covariance.
        center_norm: length of the common mean.

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

    NaN everywhere for 0 draws.

    Each draw takes from every class as many unseen samples as it has training samples (all of them where there are
    fewer), so that the noise of small classes' centres is the same as in training but memorisation has no part in it.
    A class without unseen samples keeps its training centre as the others' rival; its own entry is NaN.

    Returns:
        Degrees, float64 [C].
    """
    classes, d = centers.train.shape
    draws = min(draws, 99, max(9, REPLICATE_ELEMENTS // (classes * d)))
    if not draws:
        return torch.full((classes,), math.nan, dtype=torch.float64)
    replicates = centers.train.to(unseen.dtype).repeat(draws, 1, 1)
    assessable = torch.zeros(classes, dtype=torch.bool)
    for k in range(classes):
        n, m = train.count(k), unseen.count(k)
        if n and m:
            size = min(n, m)
            taken = np.concatenate(list(subsets(size, m, draws, rng)))
            member = torch.from_numpy(taken).to(device=replicates.device, dtype=replicates.dtype)
            replicates[:, k] = member @ unseen.features[unseen.index(k)].to(unseen.dtype) / size
            assessable[k] = True
    total = torch.zeros(classes, dtype=torch.float64, device=replicates.device)
    for replicate in replicates:
        total += nearest_center(replicate)[0]
    return torch.where(assessable.to(total.device), total / draws, math.nan)
