"""All measurements of one class that need only its own samples."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailscope.geometry.angles import angles_to, resolution_deg
from tailscope.geometry.centers import Centers, shift_by_chance
from tailscope.geometry.conformal import compare_pairs
from tailscope.geometry.duplicates import find_copies
from tailscope.geometry.fields import Entry, empty_entry
from tailscope.geometry.moments import moments

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Facts:
    """What the warnings need to know about one class."""

    collapsed: bool
    centerless: bool
    copies: int
    repeats: int


@dataclass(frozen=True)
class Sample:
    """One class: its rows [n + m, d], training rows first, and its three means in float64 (NaN where empty)."""

    rows: Tensor
    n: int
    m: int
    mean_s: Tensor
    mean_u: Tensor
    mean_t: Tensor


def measure_class(rows: Tensor, n: int, k: int, centers: Centers, halves: np.random.Generator) -> tuple[Entry, Facts]:
    """Measure class k; overwrites `rows`.

    Args:
        rows: the class's samples [n + m, d], training samples first.
        n: number of training samples.
        k: the class, a row of the centres.
        centers: means of all classes.
        halves: draws the two halves of the cross-validated first principal component.
    """
    sample = Sample(rows, n, len(rows) - n, centers.train[k], centers.unseen[k], centers.true[k])
    entry = empty_entry()
    entry["train_count"], entry["unseen_count"] = n, sample.m
    entry.update(_compactness(sample))
    if n and sample.m:
        entry.update(_comparison(sample))
    traces = _center_each(sample)  # from here on rows are deviations
    entry.update(_displacement(sample, *traces))
    _center_all(sample)
    order = torch.from_numpy(halves.permutation(len(rows))).to(rows.device)
    found = moments(rows, order)
    entry.update(vars(found), first_pc_share_high=found.first_pc_share)
    variance = found.variance or 0.0
    copies = repeats = 0
    if n and sample.m and variance > 0:
        entry.update(_between(sample, variance, found.covariance_norm or 0.0))
        copied = find_copies(rows, n, variance)
        copies, repeats = int(copied.unseen.sum()), copied.repeats
    means = [mean for mean, count in ((sample.mean_s, n), (sample.mean_u, sample.m)) if count]
    collapsed = (n > 1 and traces[0] == 0) or (len(rows) > 1 and variance == 0)
    return entry, Facts(collapsed, any(not bool(mean.any()) for mean in means), copies, repeats)


def _compactness(sample: Sample) -> Entry:
    """Summarise the angles of S and U to mu_S, and of T to mu_T."""
    entry: Entry = {}
    n = sample.n
    inside, around = angles_to(sample.rows, sample.mean_s), angles_to(sample.rows, sample.mean_t)
    centered = n > 0 and bool(torch.isfinite(inside).all())
    if n > 1 and centered:
        width = inside[:n].max()
        entry["spread_train_deg"], entry["angular_width_deg"] = inside[:n].mean().item(), width.item()
        entry["angles_train_quantiles_deg"] = _quantiles(inside[:n])
        if sample.m:
            beyond = inside[n:] > width + resolution_deg(sample.rows.dtype)
            entry["escape_rate"] = beyond.double().mean().item()
    if len(inside) > 1 and centered:
        entry["angles_true_quantiles_deg"] = _quantiles(inside)
    if len(around) > 1:
        entry["spread_true_deg"] = _number(around.mean())
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
    for part, mean in ((sample.rows[: sample.n], sample.mean_s), (sample.rows[sample.n :], sample.mean_u)):
        part -= mean.to(part.dtype)
        traces.append(_trace(part, mean) if len(part) > 1 else math.nan)
    return traces[0], traces[1]


def _center_all(sample: Sample) -> None:
    """Move rows centred on their own set's mean to the common mean in place; rows of rounding size become 0."""
    if sample.n and sample.m:
        sample.rows[: sample.n] += (sample.mean_s - sample.mean_t).to(sample.rows.dtype)
        sample.rows[sample.n :] += (sample.mean_u - sample.mean_t).to(sample.rows.dtype)
    if len(sample.rows) > 1 and _trace(sample.rows, sample.mean_t) == 0:
        sample.rows.zero_()


def _displacement(sample: Sample, trace_s: float, trace_u: float) -> Entry:
    """Return Chen & Qin's (2010) distance of the means in units of the unseen samples' spread, and the variances."""
    if sample.m < 2:
        return {}
    entry: Entry = {"variance_unseen": trace_u}
    if sample.n > 1 and trace_u > 0:
        distance = (sample.mean_s - sample.mean_u).square().sum().item()
        excess = distance - trace_s / sample.n - trace_u / sample.m
        entry["displacement"] = math.copysign(math.sqrt(abs(excess) / trace_u), excess)
        entry["variance_ratio"] = trace_s / trace_u
    return entry


def _between(sample: Sample, variance: float, norm: float) -> Entry:
    """Return the share of T's variance between S and U, and the closed form of the shift by chance."""
    n, m = sample.n, sample.m
    distance = (sample.mean_s - sample.mean_u).square().sum().item()
    entry: Entry = {
        "between_share": n * m / (n + m) * distance / ((n + m - 1) * variance),
        "between_share_null": 1 / (n + m - 1),
    }
    length = torch.linalg.vector_norm(sample.mean_t)
    if length > 0:
        direction = (sample.mean_t / length).to(sample.rows.dtype)
        along = (sample.rows @ direction).double().square().sum().item() / (n + m - 1)
        entry["center_shift_null_deg"] = shift_by_chance(n, m, variance, along, norm, length.item())
    return entry


def _trace(deviations: Tensor, mean: Tensor) -> float:
    """Return the trace of the covariance; 0 where rounding alone explains it."""
    squares = torch.linalg.vector_norm(deviations, dim=1).double().square().sum().item()
    trace = squares / (len(deviations) - 1)
    limit = (math.radians(resolution_deg(deviations.dtype)) * torch.linalg.vector_norm(mean).item()) ** 2
    return 0.0 if trace <= limit else trace


def _quantiles(angles: Tensor) -> list[float]:
    """Interpolate linearly between order statistics, as NumPy's `quantile` does, which takes ten times as long."""
    ordered = angles.sort().values.cpu().numpy()
    last = len(ordered) - 1
    found: list[float] = np.interp([q * last for q in QUANTILES], np.arange(last + 1), ordered).tolist()
    return found


def _number(value: Tensor) -> float | None:
    number = value.item()
    return None if math.isnan(number) else number
