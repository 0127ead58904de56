"""What all classifiers on features share: input checks, prediction, the registry, and one solver.

Whatever is trained is found by full-batch L-BFGS (Liu & Nocedal 1989, SciPy's implementation), gradients by torch in
blocks of rows: there is no learning rate to choose, and the same answer every time.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional

from tailscope.classifiers import CLASSIFIERS

Floats = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]
RowLoss = Callable[[Sequence[Tensor], slice], Tensor]
Linear = tuple[Floats, Floats, int]
"""Weight [C, d], bias [C], and the number of iterations that found them."""
LOGITS_AT_ONCE = 2**22  # 16 MB in float32: stays near the processor's caches


class Diverged(ValueError):
    """A loss or logit is NaN or infinite: what it led to would be no result."""


class FeatureClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier on features [N, d] that has one logit a class; `classes_` [C] are the labels, sorted.

    Features of 32 and 64 bits are computed with as they are; integers and 16 bits become float32.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        self._fit(*self._training_data(X, y))
        return self

    @abstractmethod
    def _fit(self, features: Floats, codes: IntArray) -> None:
        """Fit on checked features [N, d] and class indices [N]."""

    @abstractmethod
    def _logits(self, X: Floats) -> Floats:
        """Return the logits [N, C] of checked features."""

    def logits(self, X: ArrayLike) -> Floats:
        """Return the logits [N, C] of features [N, d]."""
        return self._logits(self._checked(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most likely label of each row, [N]; ties go to the first.

        Raises:
            Diverged: a logit is NaN or infinite.
        """
        checked = self._checked(X)
        best = np.empty(len(checked), dtype=np.int64)
        for rows in row_blocks(len(checked), len(self.classes_)):
            with np.errstate(over="ignore", invalid="ignore"):  # told by the next line
                logits = self._logits(checked[rows])
            if not np.isfinite(logits).all():
                raise Diverged("logits are not finite")
            best[rows] = logits.argmax(axis=1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return the softmax of the logits, [N, C]."""
        probabilities: Floats = softmax(self.logits(X), axis=1)
        return probabilities

    def _checked(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        checked: Floats = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        return checked

    def _training_data(self, X: ArrayLike, y: ArrayLike) -> tuple[Floats, IntArray]:
        """Check what `fit` is given, set `classes_`, and return features and class indices."""
        features, labels = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two classes, the labels hold one class only")
        return features, codes


class LinearClassifier(FeatureClassifier):
    """A classifier whose logits are `X @ coef_.T + intercept_`, of `coef_` [C, d] and `intercept_` [C]."""

    coef_: Floats
    intercept_: Floats

    def _logits(self, X: Floats) -> Floats:
        return X @ self.coef_.T + self.intercept_


@dataclass(kw_only=True, eq=False, repr=False)
class Rebalanced(FeatureClassifier):
    """A classifier that is made from another, `base`: a call-string of this package, or a linear estimator.

    An estimator is one with `coef_`, `intercept_` and `classes_`, scikit-learn's `LogisticRegression` for instance.

    scikit-learn's `FrozenEstimator` keeps an estimator with `coef_` and `intercept_` from being trained again.
    """

    base: str | LinearClassifier = "softmax"

    def _fitted_base(self, X: Floats, codes: IntArray) -> LinearClassifier:
        """Return a new classifier fitted as `base` says; a frozen one stays as it is."""
        y = self.classes_[codes]
        fitted = (CLASSIFIERS.make(self.base) if isinstance(self.base, str) else clone(self.base)).fit(X, y)
        if not all(hasattr(fitted, name) for name in ("coef_", "intercept_", "classes_")):
            raise ValueError(f"base must be a linear classifier, got {self.base!r}")
        if not np.array_equal(fitted.classes_, np.unique(y)):
            raise ValueError("base was fitted on other classes than the labels hold")
        if isinstance(fitted, LinearClassifier):
            return fitted
        weight, bias = np.atleast_2d(fitted.coef_).astype(X.dtype), np.atleast_1d(fitted.intercept_).astype(X.dtype)
        if len(weight) == 1:  # scikit-learn has one logit for two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return fixed(weight, np.broadcast_to(bias, len(weight)), fitted.classes_)


class _Given(LinearClassifier):
    """A linear classifier that is there already: `fit` leaves it as it is."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        return self

    def __sklearn_clone__(self) -> Self:
        return self


def take_base(model: FeatureClassifier, current: LinearClassifier) -> bool:
    """Have a classifier that is made from another one take `current`; return False if it names one, or needs none."""
    if getattr(model, "base", None) != Rebalanced.base:
        return False
    model.set_params(base=current)
    return True


def fixed(weight: Floats, bias: Floats, classes: NDArray[Any] | None = None) -> LinearClassifier:
    """Return a classifier [C, d] and [C] that `fit` leaves as it is, so that others are made from it."""
    model = _Given()
    model.coef_, model.intercept_ = weight, bias
    model.classes_ = np.arange(len(weight)) if classes is None else classes
    model.n_features_in_ = weight.shape[1]
    return model


class WeightedRows:
    """Training rows as tensors, each weighted by its class; the mean of these weights is to be 1."""

    def __init__(self, features: Floats, codes: IntArray, class_weight: Floats) -> None:
        self.features = shared_tensor(features)
        self.labels = torch.from_numpy(codes)
        self.sample_weight = torch.tensor(class_weight, dtype=self.features.dtype)[self.labels] / len(codes)

    def cross_entropy(self, logits: Tensor, block: slice) -> Tensor:
        """Return the weighted cross-entropy of a slice of the rows from their logits [n, C], summed."""
        losses = functional.cross_entropy(logits, self.labels[block], reduction="none")
        return losses @ self.sample_weight[block]


def row_blocks(rows: int, classes: int) -> Iterator[slice]:
    """Yield slices of rows whose logits fit in a small block of memory."""
    step = max(1, LOGITS_AT_ONCE // classes)
    yield from (slice(start, start + step) for start in range(0, rows, step))


def stratified_holdout(codes: IntArray, seed: int) -> NDArray[np.bool_]:
    """Return which samples to hold out: a fifth of each class, at least one, but none of a class with one sample.

    >>> int(stratified_holdout(np.array([0] * 10 + [1] * 2 + [2]), seed=0).sum())
    3
    """
    generator, held_out = np.random.default_rng(seed), np.zeros(len(codes), dtype=bool)
    for k in range(codes.max() + 1):
        members = generator.permutation(np.flatnonzero(codes == k))
        held_out[members[: max(len(members) > 1, round(0.2 * len(members)))]] = True
    return held_out


class Stopping(NamedTuple):
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
    """Minimise penalty(p) + sum over blocks of row_loss(expand(p), block) over the parameters p, from `start` on.

    `expand` returns what `row_loss` needs, computed once per evaluation, and the penalty; `row_loss` the loss summed
    over a slice of the N rows. Returned are the expanded parameters at the minimum and the number of iterations, with a
    ConvergenceWarning where the limit came first.

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
        warnings.warn(message, ConvergenceWarning, stacklevel=5)
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
) -> Linear:
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
        l2: >= 0.
        stopping: tolerance and limit.
        offset: [C] added to the logits in training only.
        smoothing: [C] in [0, 1).
        start: weight [C, d] and bias [C] to begin at instead of 0; as is returned, with the number of iterations.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    return softmax_path(X, y, class_weight, (l2,), stopping, offset, smoothing, start)[0]


def softmax_path(
    X: Floats,
    y: IntArray,
    class_weight: Floats,
    penalties: Sequence[float],
    stopping: Stopping,
    offset: Floats | None = None,
    smoothing: Floats | None = None,
    start: tuple[Floats, Floats] | None = None,
) -> list[Linear]:
    """Do as `fit_softmax` with each of several l2; each search begins where the last one ended.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    features, span, origin = _row_space(shared_tensor(X))
    (rows, dims), classes, dtype = features.shape, len(class_weight), features.dtype
    sample_weight = torch.tensor(class_weight, dtype=dtype)[torch.from_numpy(y)] / rows
    mean, variance, axes = spectrum(features, sample_weight, X.shape[1])
    row_loss = _row_loss(features, torch.from_numpy(y), sample_weight, offset, smoothing)
    found: list[Linear] = []
    for l2 in penalties:
        basis, inverse = damped_whitening(*axes, variance, l2, dtype)
        first = [torch.zeros(classes, dims, dtype=dtype), torch.zeros(classes, dtype=dtype)]
        if start is not None:
            weight, bias = _narrowed(*_doubles(start), span, origin, dtype)
            first = [weight @ inverse, bias + weight @ mean]
        expand = _expansion(basis, mean, 0.5 * l2 * variance.to(dtype))
        (weight, bias), iterations = minimise(first, expand, row_loss, rows, classes, stopping)
        wide = weight.double() if span is None else weight.double() @ span.T
        start = wide.to(dtype).numpy(), (bias.double() - wide @ origin).to(dtype).numpy()
        found.append((*start, iterations))
    return found


def fit_scaled_softmax(
    X: Floats,
    y: IntArray,
    class_weight: Floats,
    smoothing: Floats,
    fixed: tuple[Floats, Floats],
    penalties: tuple[float, float],
    stopping: Stopping,
) -> tuple[Floats, Floats, Floats, int]:
    """Fit a change to a linear classifier, and one scale a class, on smoothed targets.

    The logits are s ((W + D) x + b + c), with W [C, d] and b [C] fixed. Minimises (1/N) sum_i w[y_i] loss_i
    + (l/2) v |D|^2 + (m/2) mean_c (s_c - 1)^2 from D = 0, c = 0 and s = 1 on; (l, m) are the penalties, the rest is as
    `fit_softmax` has it. Returned are the whole weight s (W + D) and bias s (b + c), s, and the number of iterations.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    features, span, origin = _row_space(shared_tensor(X))
    (rows, dims), classes, dtype = features.shape, len(class_weight), features.dtype
    sample_weight = torch.tensor(class_weight, dtype=dtype)[torch.from_numpy(y)] / rows
    mean, variance, axes = spectrum(features, sample_weight, X.shape[1])
    basis, _ = damped_whitening(*axes, variance, penalties[0], dtype)
    changed = _expansion(basis, mean, 0.5 * penalties[0] * variance.to(dtype))
    loss_of = _row_loss(features, torch.from_numpy(y), sample_weight, None, smoothing)
    weight, bias = _doubles(fixed)
    narrow = _narrowed(weight, bias, span, origin, dtype)

    def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        expanded, penalty = changed(parameters[:2])
        return (*expanded, parameters[2]), penalty + 0.5 * penalties[1] * (parameters[2] - 1).square().mean()

    def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
        change, shift, scale = leaves
        return loss_of((scale[:, None] * (narrow[0] + change), scale * (narrow[1] + shift)), block)

    start = [torch.zeros(classes, dims, dtype=dtype), torch.zeros(classes, dtype=dtype), torch.ones_like(narrow[1])]
    found, iterations = minimise(start, expand, row_loss, rows, classes, stopping)
    change, shift, scale = (tensor.double() for tensor in found)
    wide = change if span is None else change @ span.T
    wide_bias = scale * (bias + shift - wide @ origin)
    whole = [tensor.to(dtype).numpy() for tensor in (scale[:, None] * (weight + wide), wide_bias, scale)]
    return whole[0], whole[1], whole[2], iterations


def _row_loss(
    features: Tensor, labels: Tensor, sample_weight: Tensor, offset: Floats | None, smoothing: Floats | None
) -> RowLoss:
    """Return the loss of rows as `minimise` asks for it, of weight [C, d] and bias [C]."""
    dtype = features.dtype
    shift = 0 if offset is None else torch.tensor(offset, dtype=dtype)
    smooth = None
    if smoothing is not None:
        smooth = torch.tensor(smoothing, dtype=dtype)[labels] * len(smoothing) / (len(smoothing) - 1)

    def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
        weight, bias = leaves
        logits = torch.addmm(bias + shift, features[block], weight.T)
        target = labels[block]
        loss = functional.cross_entropy(logits, target, reduction="none")
        if smooth is not None:
            loss = loss + smooth[block] * (logits.gather(1, target[:, None])[:, 0] - logits.mean(dim=1))
        return loss @ sample_weight[block]

    return row_loss


def _expansion(
    basis: Tensor, mean: Tensor, strength: Tensor
) -> Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]]:
    """Return what makes weight, bias and the penalty of whitened coordinates."""

    def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        coordinates, bias = parameters
        weight = coordinates @ basis.T
        return (weight, bias - weight @ mean), strength * weight.square().sum()

    return expand


def shared_tensor(X: Floats) -> Tensor:
    """Return features as a tensor on the same memory, copied only where they are read-only or not contiguous."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


def _row_space(features: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return features in coordinates of the span of their centred rows, where N < d; else as they are, None and zeros.

    The coordinates are [N, N]; beside them, in float64, the span's orthonormal basis [d, N] and the mean [d].
    """
    rows, dims = features.shape
    if rows >= dims:
        return features, None, torch.zeros(dims, dtype=torch.float64)
    wide = features.double()
    origin = wide.mean(dim=0)
    span, coordinates = torch.linalg.qr((wide - origin).T)
    return coordinates.T.to(features.dtype).contiguous(), span, origin


def _doubles(layer: tuple[Floats, Floats]) -> tuple[Tensor, Tensor]:
    weight, bias = (torch.tensor(value, dtype=torch.float64) for value in layer)
    return weight, bias


def _narrowed(
    weight: Tensor, bias: Tensor, span: Tensor | None, origin: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return weight [C, d] and bias [C] of features as they are, in float64, for those of `_row_space`."""
    return (weight if span is None else weight @ span).to(dtype), (bias + weight @ origin).to(dtype)


def spectrum(features: Tensor, sample_weight: Tensor, width: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the weighted mean [d], the variance averaged over `width` features, and the covariance's eigenvectors.

    Variance, eigenvalues [d] and eigenvectors [d, d] are in float64.
    """
    total = sample_weight.sum()
    mean = sample_weight @ features / total
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in row_blocks(len(features), features.shape[1]):
        centred = features[block] - mean
        covariance += ((centred * sample_weight[block, None]).T @ centred).double()
    covariance /= total
    variance = covariance.trace() / width
    variance = torch.where(variance > 0, variance, 1)  # of constant features any scale does
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return mean, variance, (eigenvalues, vectors)


def damped_whitening(
    eigenvalues: Tensor, vectors: Tensor, variance: Tensor, l2: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return [d, d] B and A: W = z B', z = W A.

    Half the covariance bounds the curvature of the cross-entropy (Böhning 1992). A tenth of the mean variance is added
    to it, because full whitening also stretches directions that carry little but noise, which slows the search.
    """
    scale = (0.5 * eigenvalues.clamp(min=0) + (l2 + 0.1) * variance).rsqrt()
    return (vectors * scale).to(dtype), (vectors / scale).to(dtype)
