"""Measures of one class that compare every training sample with every unseen one, whose value under chance is known.

A centre computed from the training samples is always nearer to them than to others, simply because they are in it.
Leave-one-out and conformal forms (Vovk, Gammerman & Shafer 2005) undo that: each sample is compared with a centre that
either holds both or neither, so that exchangeable training and unseen samples give 0, 1 / (n + 1) and 1/2 exactly,
for every class size. All of it in float64: the comparisons are between nearly equal cosines.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TIE = 1e-12
TRIM = 0.1
BLOCK_PAIRS = 1 << 18


@dataclass(frozen=True)
class Pairs:
    """Matched comparisons of one class; None where undefined."""

    spread_gap_deg: float | None = None
    spread_gap_trimmed_deg: float | None = None
    escape_conformal: float | None = None
    escape_rank: float | None = None


def compare_pairs(train: Tensor, unseen: Tensor) -> Pairs:
    """Return the matched gap and the conformal escape of one class from its rows [n, d] and [m, d].

    - `spread_gap_deg`: mean over unseen u and train j of the angle between u and the mean of the others, minus the
      mean over j of the angle between j and the same mean; 0 by chance. `spread_gap_trimmed_deg` leaves out the
      tenth of either set that is furthest away.
    - `escape_conformal`: u joins the training samples; how often is it the furthest of n + 1 from their common mean?
    - `escape_rank`: the share of training samples nearer to that mean than u, ties counted half; 1/2 by chance.

    Undefined for fewer than two training samples or without unseen ones.

    >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> found = compare_pairs(train, torch.tensor([[-1.0, 1.0]]))
    >>> round(found.spread_gap_deg, 4), found.escape_conformal, found.escape_rank
    (0.0, 0.0, 0.5)
    """
    n, m = len(train), len(unseen)
    if n < 2 or m < 1:
        return Pairs()
    x = train.double()
    total = x.sum(dim=0)
    inner = x @ total  # <x_i, s>
    length = torch.linalg.vector_norm(x, dim=1)
    without = torch.linalg.vector_norm(total - x, dim=1)  # |s - x_i|
    outside, nearer, no_further = [], [], []
    for block in torch.split(unseen, max(1, BLOCK_PAIRS // n)):
        u = block.double()
        dots, sums = u @ x.T, (u @ total)[:, None]
        size = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        angle = (sums - dots).div_(size * without).clamp_(-1, 1).acos_()
        outside.append(angle.mean(dim=1))
        # Cosines with the centre of n + 1, all times |s + u|, which does not change their order.
        lead = dots.add_(inner).div_(length).sub_(sums / size + size)
        margin = TIE * (total @ total + 2 * sums + size * size).clamp(min=0).sqrt()
        nearer.append((lead > margin).sum(dim=1))
        no_further.append((lead >= -margin).sum(dim=1))
    inside = torch.acos(((inner - length * length) / (length * without)).clamp(-1, 1))
    out = np.degrees(torch.cat(outside).cpu().numpy())
    own = np.degrees(inside.cpu().numpy())
    gap = float(out.mean() - own.mean())
    ahead, not_behind = torch.cat(nearer).cpu().numpy(), torch.cat(no_further).cpu().numpy()
    return Pairs(
        spread_gap_deg=gap if math.isfinite(gap) else None,
        spread_gap_trimmed_deg=_trimmed_mean(out) - _trimmed_mean(own) if math.isfinite(gap) else None,
        escape_conformal=float((ahead == n).mean()),
        escape_rank=float((ahead + not_behind).mean()) / (2 * n),
    )


def _trimmed_mean(values: npt.NDArray[np.float64]) -> float:
    """Return the mean without the largest tenth; a fraction of a value is left out by its weight."""
    kept = (1 - TRIM) * len(values)
    whole = int(kept)
    ordered = np.sort(values)
    part = (kept - whole) * ordered[whole] if kept > whole else 0.0
    return float(ordered[:whole].sum() + part) / kept
