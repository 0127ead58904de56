"""Softmax regression and its long-tailed variants: trained from scratch on the features by one solver."""

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tailscope.classifiers.base import CLASSIFIERS, IntArray, LinearClassifier
from tailscope.classifiers.solver import Stopping, fit_softmax

Counts = NDArray[np.int64]
Vector = NDArray[np.float64]
# On synthetic features (64 to 256 dimensions, 10 to 200 classes, imbalance 100) held-out accuracy at this tolerance
# was within 0.15 points of full convergence, after half the iterations.
TOL = 1e-5


@CLASSIFIERS.register("softmax")
class SoftmaxRegression(LinearClassifier):
    """Multinomial logistic regression: what a re-initialised linear classifier on a frozen backbone converges to.

    Args:
        l2: penalty (l2/2) v |W|^2 on the mean cross-entropy, with v the mean feature variance; the bias is free.
            scikit-learn's `LogisticRegression` has C = 1 / (N l2 v).
        tol: stop when an iteration lowers the objective f by less than tol * max(1, f).
        max_iter: at most so many iterations.

    >>> SoftmaxRegression().fit([[0.0], [1.0], [3.0], [4.0]], ["a", "a", "b", "b"]).predict([[0.5], [3.5]]).tolist()
    ['a', 'b']
    """

    def __init__(self, *, l2: float = 1e-3, tol: float = TOL, max_iter: int = 500) -> None:
        self.l2 = l2
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        variant = self._variant(np.bincount(codes))
        weight = variant.pop("class_weight", np.ones(len(self.classes_)))
        stopping = Stopping(self.tol, self.max_iter)
        self.coef_, self.intercept_, self.n_iter_ = fit_softmax(features, codes, weight, self.l2, stopping, **variant)
        return self

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

    def __init__(self, *, tau: float = 1.0, l2: float = 1e-3, tol: float = TOL, max_iter: int = 500) -> None:
        super().__init__(l2=l2, tol=tol, max_iter=max_iter)
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
        tol: as there.
        max_iter: as there.
    """

    def __init__(
        self,
        *,
        head: float = 0.3,
        tail: float = 0.0,
        shape: Literal["concave", "linear", "convex"] = "concave",
        l2: float = 1e-3,
        tol: float = TOL,
        max_iter: int = 500,
    ) -> None:
        super().__init__(l2=l2, tol=tol, max_iter=max_iter)
        self.head = head
        self.tail = tail
        self.shape = shape

    def _variant(self, counts: Counts) -> dict[str, Any]:
        smoothing = label_aware_smoothing(counts, self.head, self.tail, self.shape)
        return {"class_weight": balanced_weights(counts), "smoothing": smoothing}


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
