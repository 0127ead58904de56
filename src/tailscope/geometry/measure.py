"""All measurements of one class that need only its own samples.

A centre computed from the training samples is always nearer to them than to others, simply because they are in it.
Leave-one-out and conformal forms (Vovk, Gammerman & Shafer 2005) undo that: each sample is compared with a centre that
either holds both or neither, so that exchangeable training and unseen samples give 0, 1 / (n + 1) and 1/2 exactly,
for every class size, in float64: the comparisons are between nearly equal cosines.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.geometry.angles import Centers, angles_to, resolution_deg, shift_by_chance
from tailscope.geometry.fields import Entry, empty_entry
from tailscope.geometry.moments import moments
from tailscope.geometry.rows import find_copies

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TIE = 1e-12
TRIM = 0.1
BLOCK_PAIRS = 1 << 18


@dataclass(frozen=True)
class Facts:
    """What the warnings need to know about one class."""

    collapsed: bool
    centerless: bool
    copies: int
    repeats: int


@dataclass(frozen=True)
class Sample:
    """One class: its rows [n + m, d], training rows first, and its three means in float64 (NaN where empty).

    `lengths` are the means' lengths, `apart` is the squared distance between the first two.
    """

    rows: Tensor
    n: int
    m: int
    mean_s: Tensor
    mean_u: Tensor
    mean_t: Tensor
    lengths: list[float]
    apart: float


def measure_class(rows: Tensor, n: int, k: int, centers: Centers, halves: np.random.Generator) -> tuple[Entry, Facts]:
    """Measure class k; overwrites `rows`.

    Args:
        rows: the class's samples [n + m, d], training samples first.
        n: number of training samples.
        k: the class, a row of the centres.
        centers: means of all classes.
        halves: draws the two halves of the cross-validated first principal component.
    """
    means = centers.train[k], centers.unseen[k], centers.true[k]
    sample = Sample(rows, n, len(rows) - n, *means, centers.lengths[k], centers.apart[k])
    entry = empty_entry()
    entry["train_count"], entry["unseen_count"] = n, sample.m
    entry.update(_compactness(sample))
    if n and sample.m:
        entry.update(_comparison(sample))
    copied = find_copies(rows, n)
    traces = _center_each(sample)  # from here on rows are deviations
    entry.update(_displacement(sample, *traces))
    _center_all(sample)
    order = torch.from_numpy(halves.permutation(len(rows))).to(rows.device)
    found = moments(rows, order)
    if found.variance is not None and 0 < found.variance <= _rounding(rows.dtype, sample.lengths[2]):
        found = moments(rows.zero_(), order)
    entry.update(vars(found), first_pc_share_high=found.first_pc_share)
    variance = found.variance or 0.0
    copies = repeats = 0
    if n and sample.m and variance > 0:
        entry.update(_between(sample, variance, found.covariance_norm or 0.0))
        copies, repeats = int(copied.unseen.sum()), copied.repeats
    collapsed = (n > 1 and traces[0] == 0) or (len(rows) > 1 and variance == 0)
    return entry, Facts(collapsed, 0.0 in sample.lengths[:2], copies, repeats)


def _compactness(sample: Sample) -> Entry:
    """Summarise the angles of S and U to mu_S, and of T to mu_T."""
    entry: Entry = {}
    n = sample.n
    inside, around = (angles_to(sample.rows, mean).cpu().numpy() for mean in (sample.mean_s, sample.mean_t))
    centered = n > 0 and bool(np.isfinite(inside).all())
    if n > 1 and centered:
        width = float(inside[:n].max())
        entry["spread_train_deg"], entry["angular_width_deg"] = float(inside[:n].mean()), width
        entry["angles_train_quantiles_deg"] = _quantiles(inside[:n])
        if sample.m:
            entry["escape_rate"] = float((inside[n:] > width + resolution_deg(sample.rows.dtype)).mean())
    if len(inside) > 1 and centered:
        entry["angles_true_quantiles_deg"] = _quantiles(inside)
    if len(around) > 1:
        spread = float(around.mean())
        entry["spread_true_deg"] = None if math.isnan(spread) else spread
    return entry


def _comparison(sample: Sample) -> Entry:
    """Compare S with U: lengths, matched gap and conformal escape."""
    lengths = torch.linalg.vector_norm(sample.rows, dim=1)
    pairs = compare_pairs(sample.rows[: sample.n], sample.rows[sample.n :])
    return {
        "norm_ratio": (lengths[: sample.n].mean() / lengths[sample.n :].mean()).item(),
        "escape_conformal_null": None if pairs.escape_conformal is None else 1 / (sample.n + 1),
        **vars(pairs),
    }


def _center_each(sample: Sample) -> tuple[float, float]:
    """Subtract each set's own mean in place; return the traces of Sigma_S and Sigma_U, 0 at rounding size."""
    traces = []
    parts = sample.rows[: sample.n], sample.rows[sample.n :]
    for part, mean, length in zip(parts, (sample.mean_s, sample.mean_u), sample.lengths, strict=False):
        part -= mean.to(part.dtype)
        traces.append(_trace(part, length) if len(part) > 1 else math.nan)
    return traces[0], traces[1]


def _center_all(sample: Sample) -> None:
    """Move rows centred on their own set's mean to the common mean in place."""
    if sample.n and sample.m:
        sample.rows[: sample.n] += (sample.mean_s - sample.mean_t).to(sample.rows.dtype)
        sample.rows[sample.n :] += (sample.mean_u - sample.mean_t).to(sample.rows.dtype)


def _displacement(sample: Sample, trace_s: float, trace_u: float) -> Entry:
    """Return Chen & Qin's (2010) distance of the means in units of the unseen samples' spread, and the variances."""
    if sample.m < 2:
        return {}
    entry: Entry = {"variance_unseen": trace_u}
    if sample.n > 1 and trace_u > 0:
        excess = sample.apart - trace_s / sample.n - trace_u / sample.m
        entry["displacement"] = math.copysign(math.sqrt(abs(excess) / trace_u), excess)
        entry["variance_ratio"] = trace_s / trace_u
    return entry


def _between(sample: Sample, variance: float, norm: float) -> Entry:
    """Return the share of T's variance between S and U, and the closed form of the shift by chance."""
    n, m = sample.n, sample.m
    entry: Entry = {
        "between_share": n * m / (n + m) * sample.apart / ((n + m - 1) * variance),
        "between_share_null": 1 / (n + m - 1),
    }
    length = sample.lengths[2]
    if length > 0:
        direction = (sample.mean_t / length).to(sample.rows.dtype)
        along = torch.linalg.vector_norm(sample.rows @ direction).item() ** 2 / (n + m - 1)
        entry["center_shift_null_deg"] = shift_by_chance(n, m, variance, along, norm, length)
    return entry


def _trace(deviations: Tensor, length: float) -> float:
    """Return the trace of the covariance around a mean of this length; 0 where rounding alone explains it."""
    squares = torch.linalg.vector_norm(deviations, dim=1).double().square().sum().item()
    trace = squares / (len(deviations) - 1)
    return 0.0 if trace <= _rounding(deviations.dtype, length) else trace


def _rounding(dtype: torch.dtype, length: float) -> float:
    """Return the variance that rounding alone gives to copies of one vector of this length."""
    return (math.radians(resolution_deg(dtype)) * length) ** 2


def _quantiles(angles: npt.NDArray[np.float64]) -> list[float]:
    """Interpolate linearly between order statistics, as NumPy's `quantile` does, which takes ten times as long."""
    last = len(angles) - 1
    found: list[float] = np.interp([q * last for q in QUANTILES], np.arange(last + 1), np.sort(angles)).tolist()
    return found


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
