"""Re-balancing a trained classifier by training a few parameters on top of it: LWS and DisAlign.

`base` is the linear classifier that stays fixed: a call-string of this package, or an estimator with `coef_` and
`intercept_` (in scikit-learn's `FrozenEstimator`, if it is not to be trained again).
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from tailscope.classifiers.base import CLASSIFIERS, FeatureClassifier, Floats, IntArray, LinearClassifier, fit_base
from tailscope.classifiers.softmax import TOL, balanced_weights
from tailscope.classifiers.solver import Stopping, minimise, shared_tensor


@CLASSIFIERS.register("lws")
class LWS(LinearClassifier):
    """Learnable weight scaling: one factor a class, trained with class balance (Kang et al. 2020, section 4.1).

    The logits become s_c (w_c x + b_c) with w and b fixed. The authors stop after a few epochs from s = 1; here the
    penalty (l2/2) mean_c (s_c - 1)^2 holds s near 1, and the optimum is unique.

    Args:
        base: the classifier to scale.
        l2: strength of the penalty, > 0.
        tol: as in `SoftmaxRegression`.
        max_iter: as there.
    """

    def __init__(
        self,
        *,
        base: str | LinearClassifier = "softmax",
        l2: float = 1e-2,
        tol: float = TOL,
        max_iter: int = 500,
    ) -> None:
        self.base = base
        self.l2 = l2
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        base = fit_base(self.base, features, self.classes_[codes])
        rows = _Rows(features, codes, base, balanced_weights(np.bincount(codes)))

        def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
            return parameters, 0.5 * self.l2 * (parameters[0] - 1).square().mean()

        def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
            return rows.cross_entropy(leaves[0] * rows.logits(block), block)

        start = [torch.ones(len(self.classes_), dtype=rows.features.dtype)]
        stopping = Stopping(self.tol, self.max_iter)
        (scale,), self.n_iter_ = minimise(start, expand, row_loss, len(codes), len(self.classes_), stopping)
        self.scale_ = scale.numpy()
        self.coef_, self.intercept_ = self.scale_[:, None] * base.coef_, self.scale_ * base.intercept_
        return self


@CLASSIFIERS.register("disalign")
class DisAlign(FeatureClassifier):
    """Distribution alignment: a calibration of the logits that each sample's confidence mixes in (Zhang et al. 2021).

    The logits become z + s(x) ((a - 1) z + b) with s(x) = sigmoid(v x + u): the authors' adaptive calibration
    (section 3.2). a, b, v and u are trained, the base stays fixed, under their generalised re-weighting (section
    3.3): class weights in proportion to n_c^-rho. The penalty (l2/2) (mean (a - 1)^2 + mean b^2 + |v|^2 variance)
    stands in for their early stopping; the problem is not convex, and the search starts from a = 1, b = v = u = 0.

    Args:
        base: the classifier to calibrate.
        rho: 0 keeps the training distribution, 1 balances the classes, above 1 favours the tail.
        l2: strength of the penalty, > 0.
        tol: as in `SoftmaxRegression`.
        max_iter: as there.
    """

    def __init__(
        self,
        *,
        base: str | LinearClassifier = "softmax",
        rho: float = 1.2,
        l2: float = 1e-2,
        tol: float = TOL,
        max_iter: int = 500,
    ) -> None:
        self.base = base
        self.rho = rho
        self.l2 = l2
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        self.base_ = fit_base(self.base, features, self.classes_[codes])
        counts = np.bincount(codes)
        weights = counts**-self.rho
        rows = _Rows(features, codes, self.base_, weights * len(codes) / (weights @ counts))
        mean, variance = rows.features.mean(dim=0), rows.features.var(dim=0).mean().clamp(min=1e-12)

        def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
            scale, bias, direction, threshold = parameters  # the direction acts on centred features of unit spread
            pull = (scale - 1).square().mean() + bias.square().mean() + direction.square().sum()
            gate = direction / variance.sqrt()
            return (scale, bias, gate, threshold - gate @ mean), 0.5 * self.l2 * pull

        def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
            scale, bias, gate, threshold = leaves
            confidence = torch.sigmoid(rows.features[block] @ gate + threshold)[:, None]
            logits = rows.logits(block)
            return rows.cross_entropy(logits + confidence * ((scale - 1) * logits + bias), block)

        dtype, classes = rows.features.dtype, len(counts)
        zeros = [torch.zeros(n, dtype=dtype) for n in (classes, features.shape[1], 1)]
        start = [torch.ones(classes, dtype=dtype), *zeros]
        stopping = Stopping(self.tol, self.max_iter)
        found, self.n_iter_ = minimise(start, expand, row_loss, len(codes), classes, stopping)
        self.scale_, self.bias_, self.gate_, self.threshold_ = (tensor.numpy() for tensor in found)
        return self

    def _logits(self, X: Floats) -> Floats:
        logits = self.base_.logits(X)
        confidence = 1 / (1 + np.exp(-(X @ self.gate_ + self.threshold_)))[:, None]
        adjusted: Floats = logits + confidence * ((self.scale_ - 1) * logits + self.bias_)
        return adjusted


class _Rows:
    """Training rows as tensors, with the fixed logits of a base classifier and the weights of their classes."""

    def __init__(self, features: Floats, codes: IntArray, base: LinearClassifier, class_weight: NDArray[Any]) -> None:
        self.features = shared_tensor(features)
        self.labels = torch.from_numpy(codes)
        self.weight = torch.tensor(base.coef_, dtype=self.features.dtype)
        self.bias = torch.tensor(base.intercept_, dtype=self.features.dtype)
        self.sample_weight = torch.tensor(class_weight, dtype=self.features.dtype)[self.labels] / len(codes)

    def logits(self, block: slice) -> Tensor:
        return torch.addmm(self.bias, self.features[block], self.weight.T)

    def cross_entropy(self, logits: Tensor, block: slice) -> Tensor:
        losses = functional.cross_entropy(logits, self.labels[block], reduction="none")
        return losses @ self.sample_weight[block]
