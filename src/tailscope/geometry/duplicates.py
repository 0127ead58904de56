"""Rows that are copies of one another, within a class: they make training and unseen samples look alike."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tailscope.geometry.parallel import map_parallel
from tailscope.geometry.rows import ClassRows, gather

NEAR = 1e-4


@dataclass(frozen=True)
class Copies:
    """Near-identical rows of one class: which unseen rows copy a training row, and how many rows repeat their own set.

    `unseen` is bool [m].
    """

    unseen: Tensor
    repeats: int


def find_copies(rows: Tensor, n: int, variance: float) -> Copies:
    """Return the copies among a class's rows [n + m, d], training rows first.

    Two rows are copies where their distance is below 1/10,000 of that of two typical samples,
    sqrt(2 * variance). Rows are sorted along one random direction, so that copies become neighbours.
    """
    count, d = rows.shape
    limit = NEAR * math.sqrt(2 * variance)
    key, order = (rows @ _direction(d).to(device=rows.device, dtype=rows.dtype)).sort()
    # Along a direction of standard normal entries a distance shows as that distance times a standard normal number.
    linked = (key.diff() < 6 * limit).nonzero().flatten()
    if len(linked):
        distance = torch.linalg.vector_norm(rows[order[linked]] - rows[order[linked + 1]], dim=1)
        linked = linked[distance < limit]
    if not len(linked):
        return Copies(torch.zeros(count - n, dtype=torch.bool, device=rows.device), 0)
    unseen = torch.arange(count, device=rows.device) >= n
    follows = torch.zeros(count, dtype=torch.long, device=rows.device)
    follows[linked + 1] = 1
    cluster = torch.empty_like(follows)
    cluster[order] = torch.cumsum(1 - follows, 0) - 1
    seen_in = torch.bincount(cluster[~unseen], minlength=count)
    unseen_in = torch.bincount(cluster[unseen], minlength=count)
    repeats = (seen_in - 1).clamp(min=0).sum() + (unseen_in - 1).clamp(min=0).sum()
    return Copies((seen_in[cluster] > 0)[unseen], int(repeats))


@lru_cache(maxsize=1)
def _direction(d: int) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def unseen_copies(train: ClassRows, unseen: ClassRows) -> Tensor:
    """Return which unseen rows are copies of a training row of their class, bool [m] in the original row order."""
    found = torch.zeros(len(unseen.features), dtype=torch.bool, device=unseen.features.device)

    def one(k: int) -> None:
        n, m = train.count(k), unseen.count(k)
        if n and m:
            rows = gather(train, unseen, k)
            rows -= rows.mean(dim=0)
            variance = torch.linalg.vector_norm(rows).square().item() / (n + m - 1)
            found[unseen.index(k)] = find_copies(rows, n, variance).unseen

    map_parallel(one, len(train.starts) - 1, unseen.features.device)
    return found
