"""Softmax regression and its long-tailed variants: trained from scratch on the features by one solver."""

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from tailscope.classifiers.base import CLASSIFIERS, Floats, IntArray, LinearClassifier, row_blocks, stratified_holdout
from tailscope.classifiers.solver import Stopping, fit_softmax

Counts = NDArray[np.int64]
Vector = NDArray[np.float64]
# On synthetic features (64 to 256 dimensions, 10 to 200 classes, imbalance 100) held-out accuracy at this tolerance
# was within 0.15 points of full convergence, after half the iterations.
TOL = 1e-5
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


@CLASSIFIERS.register("softmax")
class SoftmaxRegression(LinearClassifier):
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

    def __init__(
        self,
        *,
        l2: float = 1e-3,
        choose_l2: bool = False,
        tol: float = TOL,
        max_iter: int = 500,
        random_state: int = 0,
    ) -> None:
        self.l2 = l2
        self.choose_l2 = choose_l2
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        variant = {"class_weight": np.ones(len(self.classes_)), **self._variant(np.bincount(codes))}
        self.l2_, start = self._choose_l2(features, codes, variant) if self.choose_l2 else (self.l2, None)
        stopping = Stopping(self.tol, self.max_iter)
        self.coef_, self.intercept_, self.n_iter_ = fit_softmax(
            features, codes, l2=self.l2_, stopping=stopping, start=start, **variant
        )
        return self

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
            loss = held_out_loss(features[held_out], codes[held_out], weight, bias, variant)
            if loss >= best_loss:
                break
            best, best_loss, start = l2, loss, (weight, bias)
        return best, start

    def _variant(self, counts: Counts) -> dict[str, Any]:
        """Return what this classifier adds to softmax regression: class_weight, offset, smoothing, [C] each."""
        return {}


@CLASSIFIERS.register("crt")
class CRT(SoftmaxRegression):
    """Classifier re-training, cRT: softmax regression under class-balanced sampling (Kang et al. 2020, section 4.1).

    Each sample is weighted by N / (C n_y): the expected loss of drawing classes uniformly, without its noise.
    """

    def _variant(self, counts: Counts) -> dict[str, Any]:
        return {"class_weight": balanced_weights(counts)}


@CLASSIFIERS.register("logit_adjusted_loss")
class LogitAdjustedSoftmax(SoftmaxRegression):
    """Softmax regression whose training logits are f_y + tau log prior_y (Menon et al. 2021, equation 10).

    With tau = 1 it is the balanced softmax of Ren et al. (2020). On frozen features, with a free bias, its optimum is
    that of `LogitAdjustment`: only the bias takes up the offset. They differ on networks that are trained through.
    """

    def __init__(
        self,
        *,
        tau: float = 1.0,
        l2: float = 1e-3,
        choose_l2: bool = False,
        tol: float = TOL,
        max_iter: int = 500,
        random_state: int = 0,
    ) -> None:
        super().__init__(l2=l2, choose_l2=choose_l2, tol=tol, max_iter=max_iter, random_state=random_state)
        self.tau = tau

    def _variant(self, counts: Counts) -> dict[str, Any]:
        return {"offset": self.tau * np.log(counts / counts.sum())}


@CLASSIFIERS.register("label_aware_smoothing")
class LabelAwareSmoothing(SoftmaxRegression):
    """cRT on targets that are smoothed more for frequent classes (MiSLAS, Zhong et al. 2021, section 3.2).

    A sample of class y has the target 1 - e_y at y and e_y / (C - 1) at each other class, with e between `tail` for
    the rarest and `head` for the most frequent class. Only the loss is theirs; their stage 2 also starts from the
    trained classifier and shifts batch-norm statistics, neither of which exists for given features.

    Args:
        head: smoothing of the most frequent class, in [0, 1).
        tail: smoothing of the rarest class, and of all where the counts are equal.
        shape: how e grows with the count: "concave" (a quarter sine wave), "linear" or "convex".
        l2: as in `SoftmaxRegression`.
        choose_l2: as there.
        tol: as there.
        max_iter: as there.
        random_state: as there.
    """

    def __init__(
        self,
        *,
        head: float = 0.3,
        tail: float = 0.0,
        shape: Literal["concave", "linear", "convex"] = "concave",
        l2: float = 1e-3,
        choose_l2: bool = False,
        tol: float = TOL,
        max_iter: int = 500,
        random_state: int = 0,
    ) -> None:
        super().__init__(l2=l2, choose_l2=choose_l2, tol=tol, max_iter=max_iter, random_state=random_state)
        self.head = head
        self.tail = tail
        self.shape = shape

    def _variant(self, counts: Counts) -> dict[str, Any]:
        smoothing = label_aware_smoothing(counts, self.head, self.tail, self.shape)
        return {"class_weight": balanced_weights(counts), "smoothing": smoothing}


def held_out_loss(X: Floats, y: IntArray, weight: Floats, bias: Floats, variant: dict[str, Any]) -> float:
    """Return the weighted cross-entropy of the labels, summed over rows, with the variant's weights and offset."""
    total = 0.0
    for block in row_blocks(len(y), len(bias)):
        logits = X[block] @ weight.T + bias + variant.get("offset", 0)
        loss = logsumexp(logits, axis=1) - np.take_along_axis(logits, y[block, None], axis=1)[:, 0]
        total += float(variant["class_weight"][y[block]] @ loss)
    return total


def balanced_weights(counts: Counts | IntArray) -> Vector:
    """Return N / (C n_c) for each class, which has mean 1 over the samples.

    >>> balanced_weights(np.array([6, 2])).round(3).tolist()
    [0.667, 2.0]
    """
    weights: Vector = counts.sum() / (len(counts) * counts)
    return weights


def label_aware_smoothing(counts: Counts, head: float, tail: float, shape: str) -> Vector:
    """Return each class's smoothing, from `tail` at the smallest count to `head` at the largest.

    >>> label_aware_smoothing(np.array([100, 55, 10]), 0.4, 0.1, "linear").round(3).tolist()
    [0.4, 0.25, 0.1]

    Raises:
        ValueError: the shape is unknown, or a smoothing lies outside [0, 1).
    """
    shapes = {
        "concave": lambda f: np.sin(f * np.pi / 2),
        "linear": lambda f: f,
        "convex": lambda f: 1 - np.cos(f * np.pi / 2),
    }
    if shape not in shapes:
        raise ValueError(f"shape must be one of {', '.join(shapes)}, got {shape!r}")
    if not (0 <= head < 1 and 0 <= tail < 1):
        raise ValueError(f"smoothing must lie in [0, 1), got head {head} and tail {tail}")
    fraction = (counts - counts.min()) / max(1, counts.max() - counts.min())
    smoothing: Vector = tail + (head - tail) * shapes[shape](fraction)
    return smoothing
