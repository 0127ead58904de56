"""The largest eigenvalue of a symmetric matrix, without computing the others."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
EXACT_ORDER = 32
STEPS = 80


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
