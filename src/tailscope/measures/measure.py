"""All measurements of one class that need only its own samples.

Second moments of one class: size, shape and dimension of its cloud of features.

Raw moments of few samples in many dimensions are biased: the Frobenius norm of the sample covariance and the share
of its first principal component are both far too large. Beside the raw values stand the unbiased estimators of
Himeno & Yamada (2014), the noise-reduced first eigenvalue of Yata & Aoshima (2012) and a cross-validated one, which
errs low where the raw one errs high.

A centre computed from the training samples is always nearer to them than to others, simply because they are in it.
Leave-one-out and conformal forms (Vovk, Gammerman & Shafer 2005) undo that: each sample is compared with a centre that
either holds both or neither, so that exchangeable training and unseen samples give 0, 1 / (n + 1) and 1/2 exactly,
for every class size, in float64: the comparisons are between nearly equal cosines.
"""

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.measures.angles import Centers, angles_to, resolution_deg, shift_by_chance
from tailscope.measures.fields import Entry, empty_entry
from tailscope.measures.rows import find_copies

FloatArray = npt.NDArray[np.float64]
FEW = 128
EXACT_ORDER = 128  # up to which LAPACK is faster than Lanczos iterations
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TIE = 1e-12
TRIM = 0.1
BLOCK_PAIRS = 1 << 18


def moments(centered: Tensor, order: Tensor) -> Entry:
    """Return the second moments of a class from its centred rows [n, d], float32 or float64; None where undefined.

    With the sample covariance S (denominator n - 1) and its largest eigenvalue l: `variance` = tr S,
    `covariance_norm` = ||S||_F, `first_pc_share` = l / tr S, `first_pc_share_noise_reduced` =
    (l - (tr S - l) / (n - 2)) / tr S. `first_pc_share_low` finds the first direction on one half of the rows and
    measures the variance along it on the other half, both ways round; its expectation is at most the true value.
    `covariance_norm_unbiased` and `effective_rank` = (tr Sigma)^2 / ||Sigma||_F^2 use unbiased estimators of the
    squares and need 4 rows. `order` is a random permutation of the rows; its first half is one half of the
    cross-validation.

    >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    >>> found = moments(rows, torch.tensor([0, 2, 1, 3]))
    >>> round(found["variance"], 4), round(found["first_pc_share"], 4)
    (6.6667, 0.9)
    """
    n, d = centered.shape
    if n < 2:
        return {}
    if n <= FEW:
        centered = centered.double()  # the unbiased estimators of few samples are small differences of large numbers
    squares = torch.linalg.vector_norm(centered, dim=1).double().cpu().numpy() ** 2
    trace = float(squares.sum()) / (n - 1)
    spectrum = _from_gram if n <= d else _from_covariance
    norm, first, low = spectrum(centered.index_select(0, order))
    norm_squared, trace_squared = _unbiased_squares(n, trace, norm, float(squares @ squares) / (n - 1))
    positive = trace > 0
    return {
        "variance": trace,
        "covariance_norm": norm,
        "covariance_norm_unbiased": None if norm_squared is None else math.sqrt(norm_squared),
        "effective_rank": trace_squared / norm_squared if norm_squared and trace_squared is not None else None,
        "first_pc_share": first / trace if positive else None,
        "first_pc_share_high": first / trace if positive else None,
        "first_pc_share_low": low / trace if positive and low is not None else None,
        "first_pc_share_noise_reduced": (first - (trace - first) / (n - 2)) / trace if positive and n > 2 else None,
    }


def _unbiased_squares(n: int, trace: float, norm: float, fourth: float) -> tuple[float | None, float | None]:
    """Return unbiased estimates of ||Sigma||_F^2 and (tr Sigma)^2 (Himeno & Yamada 2014, distribution-free)."""
    if n < 4:
        return None, None
    scale = (n - 1) / (n * (n - 2) * (n - 3))
    norm_squared = scale * ((n - 1) * (n - 2) * norm**2 + trace**2 - n * fourth)
    trace_squared = scale * (2 * norm**2 + (n * n - 3 * n + 1) * trace**2 - n * fourth)
    return max(0.0, norm_squared), max(0.0, trace_squared)  # both are means of squares: below 0 only by rounding


def _from_gram(rows: Tensor) -> tuple[float, float, float | None]:
    """Return ||S||_F, the first eigenvalue and its cross-validated estimate from the n x n matrix of inner products.

    S and the Gram matrix of the rows over n - 1 have the same non-zero eigenvalues.
    """
    n = len(rows)
    gram = (rows @ rows.T).double().cpu().numpy()
    norm = float(np.linalg.norm(gram)) / (n - 1)
    first = top_eigenpair(gram)[0] / (n - 1)
    if n < 4:
        return norm, first, None
    half = (n + 1) // 2
    estimates = []
    for a, b in ((slice(half), slice(half, n)), (slice(half, n), slice(half))):
        own = gram[a, a]
        mean = own.mean(axis=0)
        value, vector = top_eigenpair(own - (mean[:, None] + (mean - mean.mean())))
        along = gram[b, a] @ (vector - vector.mean())
        estimates.append(float(along.var(ddof=1)) / value if value > 0 else 0.0)
    return norm, first, sum(estimates) / 2


def _from_covariance(rows: Tensor) -> tuple[float, float, float | None]:
    """Return the same three numbers from the d x d covariances of the two halves; their sum gives the whole."""
    n = len(rows)
    scatters, covariances = [], []
    for half in torch.split(rows, (n + 1) // 2):
        mean = half.mean(dim=0, dtype=torch.float64)
        scatters.append(_scatter(half))
        covariance = (scatters[-1] - len(half) * torch.outer(mean, mean)) / max(1, len(half) - 1)
        covariances.append(covariance.cpu().numpy())
    whole = ((scatters[0] + scatters[1]) / (n - 1)).cpu().numpy()
    norm = float(np.linalg.norm(whole))
    first = top_eigenpair(whole)[0]
    if n < 4:
        return norm, first, None
    estimates = []
    for a, b in (covariances, covariances[::-1]):
        vector = top_eigenpair(a)[1]
        estimates.append(float(vector @ b @ vector))
    return norm, first, sum(estimates) / 2


def _scatter(rows: Tensor) -> Tensor:
    """Return rows' rows in float64: products in the rows' own precision over 1,024 rows at a time, sums in float64."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in torch.split(rows, 1024):
        total += block.T @ block
    return total


def top_eigenpair(matrix: FloatArray) -> tuple[float, FloatArray]:
    """Return the largest eigenvalue and its unit eigenvector of a symmetric positive semi-definite matrix.

    >>> value, vector = top_eigenpair(np.diag([1.0, 3.0, 2.0]))
    >>> round(value, 6), np.abs(vector).tolist()
    (3.0, [0.0, 1.0, 0.0])
    """
    import scipy.linalg  # here because both take a tenth of a second to import
    from scipy.sparse.linalg import ArpackError, eigsh

    order, power = len(matrix), math.frexp(float(matrix.trace()))[1]
    matrix = np.ldexp(matrix, -power)  # solvers judge rounding by fixed sizes
    if order > EXACT_ORDER:
        start = np.random.default_rng(0).standard_normal(order)
        with suppress(ArpackError):  # no convergence, as for evenly spaced eigenvalues, or nothing but zeros
            values, vectors = eigsh(matrix, k=1, which="LA", v0=start, tol=1e-9, maxiter=20)
            return math.ldexp(float(values[0]), power), vectors[:, 0]
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=[order - 1, order - 1], check_finite=False)
    return math.ldexp(float(values[0]), power), vectors[:, 0]


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
    """Measure class k from its rows [n + m, d], training samples first, which are overwritten.

    `halves` draws the two halves of the cross-validated first principal component.
    """
    means = centers.train[k], centers.unseen[k], centers.true[k]
    sample = Sample(rows, n, len(rows) - n, *means, centers.lengths[k], centers.apart[k])
    entry = empty_entry()
    entry["train_count"], entry["unseen_count"] = n, sample.m
    entry.update(_compactness(sample))
    if n and sample.m:
        entry.update(_comparison(sample))
    copied, repeated = find_copies(rows, n)
    traces = _center_each(sample)  # from here on rows are deviations
    entry.update(_displacement(sample, *traces))
    _center_all(sample)
    order = torch.from_numpy(halves.permutation(len(rows))).to(rows.device)
    entry.update(moments(rows, order))
    if 0 < (entry["variance"] or 0.0) <= _rounding(rows.dtype, sample.lengths[2]):
        entry.update(moments(rows.zero_(), order))
    variance = entry["variance"] or 0.0
    copies = repeats = 0
    if n and sample.m and variance > 0:
        entry.update(_between(sample, variance, entry["covariance_norm"]))
        copies, repeats = int(copied.sum()), repeated
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
    ratio = (lengths[: sample.n].mean() / lengths[sample.n :].mean()).item()
    return {"norm_ratio": ratio, **_pairs(sample.rows[: sample.n], sample.rows[sample.n :])}


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


def _quantiles(angles: FloatArray) -> list[float]:
    """Interpolate linearly between order statistics, as NumPy's `quantile` does, which takes ten times as long."""
    last = len(angles) - 1
    found: list[float] = np.interp([q * last for q in QUANTILES], np.arange(last + 1), np.sort(angles)).tolist()
    return found


def _pairs(train: Tensor, unseen: Tensor) -> Entry:
    """Return the matched gap and the conformal escape of one class from its rows [n, d] and [m, d].

    - `spread_gap_deg`: mean over unseen u and train j of the angle between u and the mean of the others, minus the
      mean over j of the angle between j and the same mean; 0 by chance. `spread_gap_trimmed_deg` leaves out the
      tenth of either set that is furthest away.
    - `escape_conformal`: u joins the training samples; how often is it the furthest of n + 1 from their common mean?
    - `escape_rank`: the share of training samples nearer to that mean than u, ties counted half; 1/2 by chance.

    Undefined for fewer than two training samples.
    """
    n = len(train)
    if n < 2:
        return {}
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
    gap, trimmed = float(out.mean() - own.mean()), _trimmed_mean(out) - _trimmed_mean(own)
    furthest, not_behind = torch.cat(nearer).cpu().numpy(), torch.cat(no_further).cpu().numpy()
    return {
        "spread_gap_deg": gap if math.isfinite(gap) else None,
        "spread_gap_trimmed_deg": trimmed if math.isfinite(gap) else None,
        "escape_conformal": float((furthest == n).mean()),
        "escape_conformal_null": 1 / (n + 1),
        "escape_rank": float((furthest + not_behind).mean()) / (2 * n),
    }


def _trimmed_mean(values: FloatArray) -> float:
    """Return the mean without the largest tenth; a fraction of a value is left out by its weight."""
    kept = (1 - TRIM) * len(values)
    whole = int(kept)
    ordered = np.sort(values)
    part = (kept - whole) * ordered[whole] if kept > whole else 0.0
    return float(ordered[:whole].sum() + part) / kept
