"""Classifiers on frozen features: trained from scratch, re-balanced from another one, or without training.

Softmax regression and its long-tailed variants are trained by one solver; LWS and DisAlign train a few parameters on
top of a classifier that stays fixed; logit adjustment and tau-normalisation re-balance one by a formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp
from sklearn.base import clone
from torch import Tensor

from tailscope.classifiers import CLASSIFIERS
from tailscope.classifiers.base import (
    FeatureClassifier,
    Floats,
    IntArray,
    LinearClassifier,
    Rebalanced,
    Stopping,
    WeightedRows,
    fit_softmax,
    minimise,
    row_blocks,
    softmax_path,
    stratified_holdout,
)

Vector = NDArray[np.float64]
# On synthetic features (64 to 256 dimensions, 10 to 200 classes, imbalance 100) held-out accuracy at this tolerance
# was within 0.15 points of full convergence, after half the iterations.
TOL = 1e-5
TAUS = np.linspace(0, 2, 21)
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


class _Softmax(LinearClassifier):
    """What softmax regression and its variants share; each lists its hyperparameters in its own order."""

    l2: float
    choose_l2: bool
    tol: float
    max_iter: int
    random_state: int

    def _fit(self, features: Floats, codes: IntArray) -> None:
        variant = {"class_weight": np.ones(len(self.classes_)), **self._variant(np.bincount(codes))}
        self.l2_, start = self._choose_l2(features, codes, variant) if self.choose_l2 else (self.l2, None)
        stopping = Stopping(self.tol, self.max_iter)
        self.coef_, self.intercept_, self.n_iter_ = fit_softmax(
            features, codes, l2=self.l2_, stopping=stopping, start=start, **variant
        )

    def path(
        self, X: ArrayLike, y: ArrayLike, penalties: Sequence[float], start: tuple[Floats, Floats] | None = None
    ) -> list[Self]:
        """Fit once with each l2 of `penalties`, and return these classifiers.

        The first search begins at `start`, a weight [C, d] and bias [C], the others where the last one ended.
        """
        features, codes = self._training_data(X, y)
        variant = {"class_weight": np.ones(len(self.classes_)), **self._variant(np.bincount(codes))}
        stopping = Stopping(self.tol, self.max_iter)
        found = softmax_path(features, codes, penalties=penalties, stopping=stopping, start=start, **variant)
        models: list[Self] = []
        for l2, fitted in zip(penalties, found, strict=True):
            model = clone(self).set_params(l2=l2, choose_l2=False)
            model.classes_, model.n_features_in_, model.l2_ = self.classes_, features.shape[1], l2
            model.coef_, model.intercept_, model.n_iter_ = fitted
            models.append(model)
        return models

    def _choose_l2(
        self, features: Floats, codes: IntArray, variant: dict[str, Any]
    ) -> tuple[float, tuple[Floats, Floats] | None]:
        """Return the penalty with the lowest held-out loss, and the weight and bias that it gave."""
        held_out = stratified_holdout(codes, self.random_state)
        if not held_out.any():
            return self.l2, None
        training, stopping = (features[~held_out], codes[~held_out]), Stopping(self.tol, self.max_iter)
        best, best_loss, start = L2_GRID[0], np.inf, None
        for l2 in L2_GRID:
            weight, bias, _ = fit_softmax(*training, l2=l2, stopping=stopping, start=start, **variant)
            loss = _held_out_loss(features[held_out], codes[held_out], weight, bias, variant)
            if loss >= best_loss:
                break
            best, best_loss, start = l2, loss, (weight, bias)
        return best, start

    def _variant(self, counts: IntArray) -> dict[str, Any]:
        """Return what this classifier adds to softmax regression: class_weight, offset, smoothing, [C] each."""
        return {}


@CLASSIFIERS.register("softmax")
@dataclass(kw_only=True, eq=False, repr=False)
class SoftmaxRegression(_Softmax):
    """Multinomial logistic regression: what a re-initialised linear classifier on a frozen backbone converges to.

    Args:
        l2: penalty (l2/2) v |W|^2 on the mean cross-entropy, with v the mean feature variance; the bias is free.
            scikit-learn's `LogisticRegression` has C = 1 / (N l2 v).
        choose_l2: choose the penalty instead of taking `l2`: from 1 down to 1e-4 by tens, while the loss falls on a
            fifth of each class held out of training; then train on all samples. `l2_` tells.
        tol: stop when an iteration lowers the objective f by less than tol * max(1, f).
        max_iter: at most so many iterations.
        random_state: seed of the hold-out.

    >>> SoftmaxRegression().fit([[0.0], [1.0], [3.0], [4.0]], ["a", "a", "b", "b"]).predict([[0.5], [3.5]]).tolist()
    ['a', 'b']
    """

    l2: float = 1e-3
    choose_l2: bool = False
    tol: float = TOL
    max_iter: int = 500
    random_state: int = 0


@CLASSIFIERS.register("crt")
class CRT(SoftmaxRegression):
    """Classifier re-training, cRT: softmax regression under class-balanced sampling (Kang et al. 2020, section 4.1).

    Each sample is weighted by N / (C n_y): the expected loss of drawing classes uniformly, without its noise.
    """

    def _variant(self, counts: IntArray) -> dict[str, Any]:
        return {"class_weight": balanced_weights(counts)}


@CLASSIFIERS.register("logit_adjusted_loss")
@dataclass(kw_only=True, eq=False, repr=False)
class LogitAdjustedSoftmax(_Softmax):
    """Softmax regression whose training logits are f_y + tau log prior_y (Menon et al. 2021, equation 10).

    With tau = 1 it is the balanced softmax of Ren et al. (2020). On frozen features, with a free bias, its optimum is
    that of `LogitAdjustment`: only the bias takes up the offset. They differ on networks that are trained through.
    """

    tau: float = 1.0
    l2: float = 1e-3
    choose_l2: bool = False
    tol: float = TOL
    max_iter: int = 500
    random_state: int = 0

    def _variant(self, counts: IntArray) -> dict[str, Any]:
        return {"offset": self.tau * np.log(counts / counts.sum())}


@CLASSIFIERS.register("label_aware_smoothing")
@dataclass(kw_only=True, eq=False, repr=False)
class LabelAwareSmoothing(_Softmax):
    """cRT on targets that are smoothed more for frequent classes (MiSLAS, Zhong et al. 2021, section 3.2).

    A sample of class y has the target 1 - e_y at y and e_y / (C - 1) at each other class, with e between `tail` for
    the rarest and `head` for the most frequent class. This is their loss alone; `mislas` has their stage 2 whole.

    Args:
        head: smoothing of the most frequent class, in [0, 1).
        tail: smoothing of the rarest class, and of all where the counts are equal.
        shape: how e grows with the count: "concave" (a quarter sine wave), "linear" or "convex".
        l2: this and the others, as in `SoftmaxRegression`.
    """

    head: float = 0.3
    tail: float = 0.0
    shape: Literal["concave", "linear", "convex"] = "concave"
    l2: float = 1e-3
    choose_l2: bool = False
    tol: float = TOL
    max_iter: int = 500
    random_state: int = 0

    def _variant(self, counts: IntArray) -> dict[str, Any]:
        smoothing = label_aware_smoothing(counts, self.head, self.tail, self.shape)
        return {"class_weight": balanced_weights(counts), "smoothing": smoothing}


def _held_out_loss(X: Floats, y: IntArray, weight: Floats, bias: Floats, variant: dict[str, Any]) -> float:
    """Return the weighted cross-entropy of the labels, summed over rows, with the variant's weights and offset."""
    total = 0.0
    for block in row_blocks(len(y), len(bias)):
        logits = X[block] @ weight.T + bias + variant.get("offset", 0)
        loss = logsumexp(logits, axis=1) - np.take_along_axis(logits, y[block, None], axis=1)[:, 0]
        total += float(variant["class_weight"][y[block]] @ loss)
    return total


def balanced_weights(counts: IntArray) -> Vector:
    """Return N / (C n_c) for each class, which has mean 1 over the samples.

    >>> balanced_weights(np.array([6, 2])).round(3).tolist()
    [0.667, 2.0]
    """
    weights: Vector = counts.sum() / (len(counts) * counts)
    return weights


def label_aware_smoothing(counts: IntArray, head: float, tail: float, shape: str) -> Vector:
    """Return each class's smoothing, from `tail` at the smallest count to `head` at the largest.

    >>> label_aware_smoothing(np.array([100, 55, 10]), 0.4, 0.1, "linear").round(3).tolist()
    [0.4, 0.25, 0.1]

    Raises:
        ValueError: the shape is unknown, or a smoothing lies outside [0, 1).
    """
    f = (counts - counts.min()) / max(1, counts.max() - counts.min())
    shapes = {"concave": np.sin(f * np.pi / 2), "linear": f, "convex": 1 - np.cos(f * np.pi / 2)}
    if shape not in shapes:
        raise ValueError(f"shape must be one of {', '.join(shapes)}, got {shape!r}")
    if not (0 <= head < 1 and 0 <= tail < 1):
        raise ValueError(f"smoothing must lie in [0, 1), got head {head} and tail {tail}")
    smoothing: Vector = tail + (head - tail) * shapes[shape]
    return smoothing


@CLASSIFIERS.register("lws")
@dataclass(kw_only=True, eq=False, repr=False)
class LWS(Rebalanced, LinearClassifier):
    """Learnable weight scaling: one factor a class, trained with class balance (Kang et al. 2020, section 4.1).

    The logits become s_c (w_c x + b_c) with w and b fixed. The authors stop after a few epochs from s = 1; here the
    penalty (l2/2) mean_c (s_c - 1)^2 holds s near 1, and the optimum is unique.

    Args:
        base: the classifier to scale.
        l2: strength of the penalty, > 0.
        tol: this and `max_iter`, as in `SoftmaxRegression`.
    """

    l2: float = 1e-2
    tol: float = TOL
    max_iter: int = 500

    def _fit(self, features: Floats, codes: IntArray) -> None:
        base = self._fitted_base(features, codes)
        rows = _Rows(features, codes, base, balanced_weights(np.bincount(codes)))

        def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
            return parameters, 0.5 * self.l2 * (parameters[0] - 1).square().mean()

        def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
            return rows.cross_entropy(leaves[0] * rows.logits(block), block)

        start, stopping = [torch.ones_like(rows.bias)], Stopping(self.tol, self.max_iter)
        (scale,), self.n_iter_ = minimise(start, expand, row_loss, len(codes), len(rows.bias), stopping)
        self.scale_ = scale.numpy()
        self.coef_, self.intercept_ = self.scale_[:, None] * base.coef_, self.scale_ * base.intercept_


@CLASSIFIERS.register("disalign")
@dataclass(kw_only=True, eq=False, repr=False)
class DisAlign(Rebalanced):
    """Distribution alignment: a calibration of the logits that each sample's confidence mixes in (Zhang et al. 2021).

    The logits become z + s(x) ((a - 1) z + b) with s(x) = sigmoid(v x + u): the authors' adaptive calibration
    (section 3.2). a, b, v and u are trained, the base stays fixed, under their generalised re-weighting (section
    3.3): class weights in proportion to n_c^-rho. The penalty (l2/2) (mean (a - 1)^2 + mean b^2 + |v|^2 variance)
    stands in for their early stopping; the problem is not convex, and the search starts from a = 1, b = v = u = 0.

    Args:
        base: the classifier to calibrate.
        rho: 0 keeps the training distribution, 1 balances the classes, above 1 favours the tail.
        l2: strength of the penalty, > 0.
        tol: this and `max_iter`, as in `SoftmaxRegression`.
    """

    rho: float = 1.2
    l2: float = 1e-2
    tol: float = TOL
    max_iter: int = 500

    def _fit(self, features: Floats, codes: IntArray) -> None:
        self.base_ = self._fitted_base(features, codes)
        counts = np.bincount(codes)
        weights = counts.astype(np.float64) ** -self.rho
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

        start = [torch.ones_like(rows.bias), *(rows.bias.new_zeros(n) for n in (len(counts), features.shape[1], 1))]
        stopping = Stopping(self.tol, self.max_iter)
        found, self.n_iter_ = minimise(start, expand, row_loss, len(codes), len(counts), stopping)
        self.scale_, self.bias_, self.gate_, self.threshold_ = (tensor.numpy() for tensor in found)

    def _logits(self, X: Floats) -> Floats:
        logits, confidence = self.base_.logits(X), expit(X @ self.gate_ + self.threshold_)[:, None]
        adjusted: Floats = logits + confidence * ((self.scale_ - 1) * logits + self.bias_)
        return adjusted


class _Rows(WeightedRows):
    """Training rows with the fixed logits of a base classifier."""

    def __init__(self, features: Floats, codes: IntArray, base: LinearClassifier, class_weight: Floats) -> None:
        super().__init__(features, codes, class_weight)
        self.weight = torch.tensor(base.coef_, dtype=self.features.dtype)
        self.bias = torch.tensor(base.intercept_, dtype=self.features.dtype)

    def logits(self, block: slice) -> Tensor:
        return torch.addmm(self.bias, self.features[block], self.weight.T)


@CLASSIFIERS.register("logit_adjustment")
@dataclass(kw_only=True, eq=False, repr=False)
class LogitAdjustment(Rebalanced, LinearClassifier):
    """Subtract tau log prior_y from the logits after training (Menon et al. 2021, equation 9).

    Args:
        base: the classifier to adjust.
        tau: 1 makes the rule consistent for the balanced error; 0 leaves the base as it is.
    """

    tau: float = 1.0

    def _fit(self, features: Floats, codes: IntArray) -> None:
        base = self._fitted_base(features, codes)
        self.coef_ = base.coef_
        self.intercept_ = base.intercept_ - (self.tau * np.log(np.bincount(codes) / len(codes))).astype(features.dtype)


@CLASSIFIERS.register("tau_norm")
@dataclass(kw_only=True, eq=False, repr=False)
class TauNorm(Rebalanced, LinearClassifier):
    """Divide each class's weight vector by its norm to the power tau (Kang et al. 2020, section 4.1).

    Args:
        base: the classifier to normalise.
        tau: 0 keeps the weights, 1 gives all classes the same norm. None chooses from 0, 0.1, ... 2 by mean recall on
            a fifth of each class held out of training (classes with one sample have no say; ties go to the
            smallest); then trains on all samples. `tau_` tells. Such a choice is honest only where the encoder was
            not trained on these samples: otherwise choose tau on unseen ones.
        bias: "centre" (ours) writes the base around the mean training feature, then drops its bias there, so that the
            features' origin does not matter. "drop" drops the bias as it is, as the authors' code does: harmless
            where training kept it small, ruinous after a softmax regression with a free bias on features far from
            the origin. "scale" divides it like the weights; "keep" leaves it.
        random_state: seed of the hold-out.
    """

    tau: float | None = None
    bias: Literal["centre", "drop", "scale", "keep"] = "centre"
    random_state: int = 0

    def _fit(self, features: Floats, codes: IntArray) -> None:
        if self.bias not in ("centre", "drop", "scale", "keep"):
            raise ValueError(f"bias must be 'centre', 'drop', 'scale' or 'keep', got {self.bias!r}")
        self.tau_ = self._choose_tau(features, codes) if self.tau is None else self.tau
        base = self._fitted_base(features, codes)
        norms, divided, kept = self._parts(base, features)
        self.coef_ = base.coef_ / norms[:, None] ** self.tau_
        self.intercept_ = divided / norms**self.tau_ + kept

    def _choose_tau(self, features: Floats, codes: IntArray) -> float:
        held_out = stratified_holdout(codes, self.random_state)
        if not held_out.any():
            return 0.0
        base = self._fitted_base(features[~held_out], codes[~held_out])
        norms, divided, kept = self._parts(base, features[~held_out])
        others, seen = features[held_out], codes[held_out]
        weight, recall = 1 / np.bincount(seen)[seen], np.zeros(len(TAUS))  # every class counts once
        for block in row_blocks(len(seen), len(norms)):
            logits = others[block] @ base.coef_.T + divided
            best = np.stack([(logits / norms**tau + kept).argmax(axis=1) for tau in TAUS])
            recall += (best == seen[block]) @ weight[block]
        return float(TAUS[int(recall.round(12).argmax())])  # equal recalls may differ in rounding

    def _parts(self, base: LinearClassifier, features: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the norms, and the biases that are divided by their powers and that are not, [C] each."""
        norms = np.linalg.norm(base.coef_.astype(np.float64), axis=1)  # squares of float32 may overflow
        nothing = np.zeros_like(base.intercept_)
        divided, kept = {
            "centre": (-base.coef_ @ features.mean(axis=0), nothing),
            "drop": (nothing, nothing),
            "scale": (base.intercept_, nothing),
            "keep": (nothing, base.intercept_),
        }[self.bias]
        return np.where(norms > 0, norms, 1).astype(base.coef_.dtype), divided, kept


@CLASSIFIERS.register("ncm")
@dataclass(kw_only=True, eq=False, repr=False)
class NearestClassMean(FeatureClassifier):
    """Predict the class whose mean feature is nearest (NCM: Kang et al. 2020, section 4.1).

    Kang et al. measure Euclidean distance between features that were centred at the mean of all training samples and
    scaled to unit length; the class means are those of the scaled features. The logits are -distance^2 / (2 v) with v
    the pooled within-class variance per dimension: the posterior under equal priors and one spherical covariance.

    Args:
        centre: subtract the mean of the training features.
        normalise: scale each feature vector to unit length; zero vectors stay zero.

    >>> model = NearestClassMean(centre=False, normalise=False).fit([[0.0], [2.0], [9.0]], ["a", "a", "b"])
    >>> model.predict([[4.0], [6.0]]).tolist()
    ['a', 'b']
    """

    centre: bool = True
    normalise: bool = True

    def _fit(self, features: Floats, codes: IntArray) -> None:
        self.origin_ = features.mean(axis=0) if self.centre else np.zeros_like(features[0])
        counts, width = np.bincount(codes), features.shape[1]
        sums, blocks = torch.zeros(len(counts), width, dtype=torch.float64), list(row_blocks(len(codes), width))
        for block in blocks:
            placed = torch.from_numpy(self._place(features[block])).double()
            sums.index_add_(0, torch.from_numpy(codes[block]), placed)
        means = sums.numpy() / counts[:, None]
        within = sum(float(np.square(self._place(features[block]) - means[codes[block]]).sum()) for block in blocks)
        self.means_: Floats = means.astype(features.dtype)
        variance = within / (max(1, len(codes) - len(counts)) * width)
        # No spread, or none that this precision can hold: any temperature orders the classes alike.
        self.variance_ = variance if features.dtype.type(variance) > 0 else 1.0

    def _place(self, X: Floats) -> Floats:
        placed: Floats = X - self.origin_
        if self.normalise:
            norms = np.linalg.norm(placed, axis=1, keepdims=True)
            placed /= np.where(norms > 0, norms, 1)
        return placed

    def _logits(self, X: Floats) -> Floats:
        """Return -|x - mean|^2 / (2 v), without the |x|^2 that all classes share."""
        logits: Floats = self._place(X) @ self.means_.T - 0.5 * np.square(self.means_).sum(axis=1)
        logits /= self.variance_
        return logits
