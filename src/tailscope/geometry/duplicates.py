"""Rows that are copies of one another, within a class: they make training and unseen samples look alike."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tailscope.geometry.lengths import row_blocks
from tailscope.geometry.parallel import map_parallel
from tailscope.geometry.rows import ClassRows, gather


@dataclass(frozen=True)
class Copies:
    """Equal rows of one class: which unseen rows copy a training row, and how many rows repeat their own set.

    `unseen` is bool [m].
    """

    unseen: Tensor
    repeats: int


def find_copies(rows: Tensor, n: int) -> Copies:
    """Return the copies among a class's rows [n + m, d], training rows first.

    Copies are rows whose bytes are the same: rows that are only close are neighbours, at whatever scale.

    >>> find_copies(torch.tensor([[1.0, 2.0], [1.0, 2.5], [1.0, 2.0]]), 2).unseen.tolist()
    [True]
    """
    count = len(rows)
    bits = rows.contiguous().view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    key, order = _digest(bits).sort()
    linked = (key.diff() == 0).nonzero().flatten()
    linked = linked[(bits[order[linked]] == bits[order[linked + 1]]).all(dim=1)]
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


def _digest(bits: Tensor) -> Tensor:
    """Return a number for each row of integers, int64 [n], by which equal rows become neighbours."""
    factors = _factors(bits.shape[1]).to(bits.device)
    return torch.cat([(block * factors).sum(dim=1) for block in row_blocks(bits)])  # both wrap round


@lru_cache(maxsize=1)
def _factors(d: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (d,), generator=torch.Generator().manual_seed(0))


def unseen_copies(train: ClassRows, unseen: ClassRows) -> Tensor:
    """Return which unseen rows are copies of a training row of their class, bool [m] in the original row order."""
    found = torch.zeros(len(unseen.features), dtype=torch.bool, device=unseen.features.device)

    def one(k: int) -> None:
        n, m = train.count(k), unseen.count(k)
        if n and m:
            found[unseen.index(k)] = find_copies(gather(train, unseen, k), n).unseen

    map_parallel(one, len(train.starts) - 1, unseen.features.device)
    return found
