"""Rows that are copies of one another, within a class: they make training and unseen samples look alike."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tailscope.geometry.parallel import map_parallel
from tailscope.geometry.rows import ClassRows

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
    unseen = torch.arange(count, device=rows.device) >= n
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(d, generator=generator, dtype=torch.float64).to(device=rows.device, dtype=rows.dtype)
    limit = NEAR * math.sqrt(2 * variance)
    key, order = (rows @ direction).sort()
    # Along a direction of standard normal entries a distance shows as that distance times a standard normal number.
    close = (key.diff() < 6 * limit).nonzero().flatten()
    distance = torch.linalg.vector_norm(rows[order[close]] - rows[order[close + 1]], dim=1)
    linked = close[distance < limit]
    if not len(linked):
        return Copies(torch.zeros(count - n, dtype=torch.bool, device=rows.device), 0)
    follows = torch.zeros(count, dtype=torch.long, device=rows.device)
    follows[linked + 1] = 1
    cluster = torch.empty_like(follows)
    cluster[order] = torch.cumsum(1 - follows, 0) - 1
    seen_in = torch.bincount(cluster[~unseen], minlength=count)
    unseen_in = torch.bincount(cluster[unseen], minlength=count)
    repeats = (seen_in - 1).clamp(min=0).sum() + (unseen_in - 1).clamp(min=0).sum()
    return Copies((seen_in[cluster] > 0)[unseen], int(repeats))


def unseen_copies(train: ClassRows, unseen: ClassRows) -> Tensor:
    """Return which unseen rows are copies of a training row of their class, bool [m] in the original row order."""
    found = torch.zeros(len(unseen.features), dtype=torch.bool, device=unseen.features.device)

    def one(k: int) -> None:
        n, m = train.count(k), unseen.count(k)
        if n and m:
            rows = torch.cat([train.features[train.index(k)], unseen.features[unseen.index(k)]]).to(train.dtype)
            centered = rows - rows.mean(dim=0)
            variance = torch.linalg.vector_norm(centered).square().item() / (n + m - 1)
            found[unseen.index(k)] = find_copies(centered, n, variance).unseen

    map_parallel(one, len(train.starts) - 1, unseen.features.device)
    return found
