"""One solver for every classifier that is trained: L-BFGS over all rows, gradients by torch in blocks of rows.

Full-batch L-BFGS (Liu & Nocedal 1989, SciPy's implementation) has no learning rate to choose, and gives the same
answer every time.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional

from tailscope.classifiers.base import Diverged, Floats, IntArray, row_blocks

RowLoss = Callable[[Sequence[Tensor], slice], Tensor]


@dataclass(frozen=True)
class Stopping:
    """When to stop: at an iteration that lowers the objective f by less than tol * max(1, f), or after max_iter."""

    tol: float
    max_iter: int


def minimise(
    start: Sequence[Tensor],
    expand: Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]],
    row_loss: RowLoss,
    rows: int,
    classes: int,
    stopping: Stopping,
) -> tuple[list[Tensor], int]:
    """Minimise penalty(p) + sum over blocks of row_loss(expand(p), block) over the parameters p.

    Args:
        start: initial parameters.
        expand: returns what `row_loss` needs, computed once per evaluation, and the penalty (a scalar).
        row_loss: the loss summed over the rows of a slice (a scalar).
        rows: N.
        classes: C, which sets the size of the blocks.
        stopping: tolerance and limit.

    Returns:
        the expanded parameters at the minimum and the number of iterations; a ConvergenceWarning where the limit
        came first.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    sizes = [p.numel() for p in start]

    def unflatten(flat: NDArray[np.float64]) -> list[Tensor]:
        pieces = torch.split(torch.from_numpy(flat).to(start[0].dtype), sizes)
        return [piece.view_as(p).requires_grad_() for piece, p in zip(pieces, start, strict=True)]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        parameters = unflatten(flat)
        expanded, penalty = expand(parameters)
        leaves = [tensor.detach().requires_grad_() for tensor in expanded]
        total = penalty.item()
        for block in row_blocks(rows, classes):
            loss = row_loss(leaves, block)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.autograd.backward([*expanded, penalty], [*(leaf.grad for leaf in leaves), torch.ones_like(penalty)])
        gradient = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        if not (math.isfinite(total) and gradient.isfinite().all()):
            raise Diverged("the loss or its gradient is not finite")
        return total, gradient.double().numpy()

    options = {"maxiter": stopping.max_iter, "maxfun": 2 * stopping.max_iter, "ftol": stopping.tol, "gtol": 0.0}
    flat = torch.cat([p.detach().reshape(-1) for p in start]).double().numpy()
    found = minimize(objective, flat, jac=True, method="L-BFGS-B", options=options)
    if found.status == 1:
        message = f"stopped after {found.nit} iterations before reaching tol={stopping.tol}: raise max_iter"
        warnings.warn(message, ConvergenceWarning, stacklevel=4)
    return [tensor.detach() for tensor in expand(unflatten(found.x))[0]], int(found.nit)


def fit_softmax(
    X: Floats,
    y: IntArray,
    class_weight: Floats,
    l2: float,
    stopping: Stopping,
    offset: Floats | None = None,
    smoothing: Floats | None = None,
    start: tuple[Floats, Floats] | None = None,
) -> tuple[Floats, Floats, int]:
    """Fit multinomial logistic regression, with what the long-tailed variants add to it.

    Minimises (1/N) sum_i w[y_i] loss_i + (l2/2) v |W|^2, with v the mean feature variance, so that scaling all
    features changes no prediction; the bias is free. With logits z, loss_i is the cross-entropy of softmax(z + offset)
    against the target that has 1 - smoothing[y_i] at y_i and the rest spread over the other classes.

    The search runs in coordinates in which the features are centred and, by a damped whitening, about equally
    spread; the objective stays the one above. Where there are fewer rows than features it runs in the span of the
    centred rows, which holds every iterate that starts there, and the optimum: its cost grows with min(N, d).

    Args:
        X: [N, d].
        y: [N] class indices; every class of 0 ... C-1 occurs.
        class_weight: [C], the mean over samples being 1.
        l2: strength of the penalty, >= 0.
        stopping: tolerance and limit.
        offset: [C] added to the logits in training only.
        smoothing: [C] in [0, 1).
        start: weight [C, d] and bias [C] to begin at instead of 0.

    Returns:
        weight [C, d], bias [C], number of iterations.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    features, span, origin = _row_space(shared_tensor(X))
    labels, width = torch.from_numpy(y), X.shape[1]
    rows, dims = features.shape
    classes = len(class_weight)
    dtype = features.dtype
    sample_weight = torch.tensor(class_weight, dtype=dtype)[labels] / rows
    mean, variance, basis, inverse = _damped_whitening(features, sample_weight, l2, width)
    shift = torch.tensor(np.zeros(classes) if offset is None else offset, dtype=dtype)
    smooth = None if smoothing is None else torch.tensor(smoothing, dtype=dtype)[labels] * classes / (classes - 1)

    def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        coordinates, bias = parameters
        weight = coordinates @ basis.T
        return (weight, bias - weight @ mean), 0.5 * l2 * variance * weight.square().sum()

    def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
        weight, bias = leaves
        logits = torch.addmm(bias + shift, features[block], weight.T)
        target = labels[block]
        loss = functional.cross_entropy(logits, target, reduction="none")
        if smooth is not None:
            loss = loss + smooth[block] * (logits.gather(1, target[:, None])[:, 0] - logits.mean(dim=1))
        return loss @ sample_weight[block]

    first = [torch.zeros(classes, dims, dtype=dtype), torch.zeros(classes, dtype=dtype)]
    if start is not None:
        weight, bias = (torch.tensor(value, dtype=torch.float64) for value in start)
        bias = (bias + weight @ origin).to(dtype)
        weight = (weight if span is None else weight @ span).to(dtype)
        first = [weight @ inverse, bias + weight @ mean]
    (weight, bias), iterations = minimise(first, expand, row_loss, rows, classes, stopping)
    wide = weight.double() if span is None else weight.double() @ span.T
    return wide.to(dtype).numpy(), (bias.double() - wide @ origin).to(dtype).numpy(), iterations


def shared_tensor(X: Floats) -> Tensor:
    """Return features as a tensor on the same memory, copied only where they are read-only or not contiguous."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


def _row_space(features: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return features in coordinates of the span of their centred rows, where N < d; else as they are.

    Returns:
        the coordinates [N, N]; in float64 the span's orthonormal basis [d, N] and the mean [d] from which they count.
        Or the features, None and zeros.
    """
    rows, dims = features.shape
    if rows >= dims:
        return features, None, torch.zeros(dims, dtype=torch.float64)
    wide = features.double()
    origin = wide.mean(dim=0)
    span, coordinates = torch.linalg.qr((wide - origin).T)
    return coordinates.T.to(features.dtype).contiguous(), span, origin


def _damped_whitening(
    features: Tensor, sample_weight: Tensor, l2: float, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weighted mean [d], the mean variance, and [d, d] matrices B and A: W = z B' and z = W A.

    `width` is the number of features before they were turned, over which the variance is averaged.

    Half the covariance bounds the curvature of the cross-entropy (Böhning 1992). A tenth of the mean variance is added
    to it, because full whitening also stretches directions that carry little but noise, which slows the search.
    """
    total = sample_weight.sum()
    mean = sample_weight @ features / total
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in row_blocks(len(features), features.shape[1]):
        centred = features[block] - mean
        covariance += ((centred * sample_weight[block, None]).T @ centred).double()
    covariance /= total
    variance = covariance.trace() / width
    if variance <= 0:  # constant features: any scale does
        variance = torch.ones_like(variance)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scale = (0.5 * eigenvalues.clamp(min=0) + (l2 + 0.1) * variance).rsqrt()
    dtype = features.dtype
    return mean, variance.to(dtype), (vectors * scale).to(dtype), (vectors / scale).to(dtype)
