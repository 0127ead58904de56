"""Second moments of one class: size, shape and dimension of its cloud of features.

Raw moments of few samples in many dimensions are biased: the Frobenius norm of the sample covariance and the share
of its first principal component are both far too large. Beside the raw values stand the unbiased estimators of
Himeno & Yamada (2014), the noise-reduced first eigenvalue of Yata & Aoshima (2012) and a cross-validated one, which
errs low where the raw one errs high.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FEW = 128
FloatArray = npt.NDArray[np.float64]
EXACT_ORDER = 32
STEPS = 80


@dataclass(frozen=True)
class Moments:
    """Second moments of one class; None where undefined."""

    variance: float | None = None
    covariance_norm: float | None = None
    covariance_norm_unbiased: float | None = None
    effective_rank: float | None = None
    first_pc_share: float | None = None
    first_pc_share_low: float | None = None
    first_pc_share_noise_reduced: float | None = None


def moments(centered: Tensor, order: Tensor) -> Moments:
    """Return the second moments of a class from its centred rows [n, d].

    With the sample covariance S (denominator n - 1) and its largest eigenvalue l: `variance` = tr S,
    `covariance_norm` = ||S||_F, `first_pc_share` = l / tr S, `first_pc_share_noise_reduced` =
    (l - (tr S - l) / (n - 2)) / tr S. `first_pc_share_low` finds the first direction on one half of the rows and
    measures the variance along it on the other half, both ways round; its expectation is at most the true value.
    `covariance_norm_unbiased` and `effective_rank` = (tr Sigma)^2 / ||Sigma||_F^2 use unbiased estimators of the
    squares and need 4 rows.

    Args:
        centered: rows minus their mean, float32 or float64.
        order: a random permutation of 0 ... n-1; its first half is one half of the cross-validation.

    >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    >>> found = moments(rows, torch.tensor([0, 2, 1, 3]))
    >>> round(found.variance, 4), round(found.first_pc_share, 4)
    (6.6667, 0.9)
    """
    n, d = centered.shape
    if n < 2:
        return Moments()
    if n <= FEW:
        centered = centered.double()  # the unbiased estimators of few samples are small differences of large numbers
    squares = torch.linalg.vector_norm(centered, dim=1).double().cpu().numpy() ** 2
    trace = float(squares.sum()) / (n - 1)
    spectrum = _from_gram if n <= d else _from_covariance
    norm, first, low = spectrum(centered.index_select(0, order))
    norm_squared, trace_squared = _unbiased_squares(n, trace, norm, float(squares @ squares) / (n - 1))
    positive = trace > 0
    return Moments(
        variance=trace,
        covariance_norm=norm,
        covariance_norm_unbiased=None if norm_squared is None else math.sqrt(norm_squared),
        effective_rank=trace_squared / norm_squared if norm_squared and trace_squared is not None else None,
        first_pc_share=first / trace if positive else None,
        first_pc_share_low=low / trace if positive and low is not None else None,
        first_pc_share_noise_reduced=(first - (trace - first) / (n - 2)) / trace if positive and n > 2 else None,
    )


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

    Small matrices go to LAPACK, larger ones to Lanczos iterations whose residual is checked; where they do not
    converge, LAPACK decides.

    >>> value, vector = top_eigenpair(np.diag([1.0, 3.0, 2.0]))
    >>> round(value, 6), np.abs(vector).tolist()
    (3.0, [0.0, 1.0, 0.0])
    """
    order = len(matrix)
    if order <= EXACT_ORDER:
        values, vectors = np.linalg.eigh(matrix)
        return float(values[-1]), vectors[:, -1]
    pair = lanczos(matrix)
    if pair is None:
        import scipy.linalg  # here because it takes a tenth of a second to import and is hardly ever needed

        values, vectors = scipy.linalg.eigh(matrix, subset_by_index=[order - 1, order - 1], check_finite=False)
        pair = values[0], vectors[:, 0]
    return float(pair[0]), pair[1]


def lanczos(matrix: FloatArray) -> tuple[float, FloatArray] | None:
    """Return the largest eigenvalue and its eigenvector, or None without convergence in 80 steps.

    Every step is made orthogonal to the whole basis (Parlett 1980); a random start, the same every time, has a part
    in every eigenvector's direction. About 12 steps are enough where the first eigenvalue stands apart, 50 for noise.
    """
    basis = np.empty((STEPS, len(matrix)))
    projected = np.zeros((STEPS + 1, STEPS + 1))
    vector = _start(len(matrix))
    for j in range(STEPS):
        basis[j], known = vector, basis[: j + 1]
        image = matrix @ vector
        along = known @ image
        image -= along @ known
        if image @ image < 1e-4 * (along @ along):  # little is left of it, which rounding has turned: once more
            image -= (known @ image) @ known
        length = np.sqrt(image @ image)
        projected[j, j] = along[j]
        invariant = length <= 1e-12 * projected[0, 0]
        if invariant or j % 4 == 3:
            values, weights = np.linalg.eigh(projected[: j + 1, : j + 1])  # reads the lower triangle
            if invariant or length * abs(weights[j, j]) <= 1e-9 * values[j]:
                found = weights[:, j] @ known
                residual = matrix @ found - values[j] * found
                return (values[j], found) if np.sqrt(residual @ residual) <= 1e-7 * values[j] else None
        projected[j + 1, j] = length
        vector = image / length
    return None


@lru_cache(maxsize=256)
def _start(order: int) -> FloatArray:
    vector = np.random.default_rng(0).standard_normal(order)
    return vector / np.sqrt(vector @ vector)
