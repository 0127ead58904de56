"""What all classifiers on features share: input checks, prediction, the registry."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from tailscope.registry import Registry

Floats = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]
LOGITS_AT_ONCE = 2**22  # 16 MB in float32: stays near the processor's caches


class Diverged(ValueError):
    """A loss or logit is NaN or infinite: what it led to would be no result."""


class FeatureClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier on features [N, d] that has one logit a class.

    Features of 32 and 64 bits are computed with as they are; integers and 16 bits become float32.

    Attributes:
        classes_: [C] the labels, sorted; every [C] axis is in this order.
        n_features_in_: d.
    """

    @abstractmethod
    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""

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
        best = []
        for rows in row_blocks(len(checked), len(self.classes_)):
            with np.errstate(over="ignore", invalid="ignore"):  # told by the next line
                logits = self._logits(checked[rows])
            if not np.isfinite(logits).all():
                raise Diverged("logits are not finite")
            best.append(logits.argmax(axis=1))
        labels: NDArray[Any] = self.classes_[np.concatenate(best)]
        return labels

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return the softmax of the logits, [N, C]."""
        logits = self.logits(X)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities

    def _checked(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        checked: Floats = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        return checked

    def _training_data(self, X: ArrayLike, y: ArrayLike) -> tuple[Floats, IntArray]:
        """Check what `fit` is given, set `classes_`, and return features and class indices.

        Raises:
            ValueError: NaN or infinite features, unequal lengths, labels that are no classes, a single class.
        """
        features, labels = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two classes, the labels hold one class only")
        return features, codes


class LinearClassifier(FeatureClassifier):
    """A classifier whose logits are `X @ coef_.T + intercept_`.

    Attributes:
        coef_: [C, d].
        intercept_: [C].
    """

    coef_: Floats
    intercept_: Floats

    def _logits(self, X: Floats) -> Floats:
        return X @ self.coef_.T + self.intercept_


CLASSIFIERS: Registry[FeatureClassifier] = Registry("classifier")


def fit_base(base: str | LinearClassifier, X: Floats, y: NDArray[Any]) -> LinearClassifier:
    """Return a new classifier fitted as `base` says: a call-string, or an estimator (frozen ones stay as they are).

    Raises:
        ValueError: `base` has no linear logits, or was fitted on other classes than those in `y`.
    """
    fitted = (CLASSIFIERS.make(base) if isinstance(base, str) else clone(base)).fit(X, y)
    if not (hasattr(fitted, "coef_") and hasattr(fitted, "intercept_")):
        raise ValueError(f"base must be a linear classifier, got {base!r}")
    if not np.array_equal(fitted.classes_, np.unique(y)):
        raise ValueError("base was fitted on other classes than the labels hold")
    linear: LinearClassifier = fitted
    return linear


def row_blocks(rows: int, classes: int) -> Iterator[slice]:
    """Yield slices of rows whose logits fit in a small block of memory."""
    step = max(1, LOGITS_AT_ONCE // classes)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def stratified_holdout(codes: IntArray, seed: int) -> NDArray[np.bool_]:
    """Return which samples to hold out: a fifth of each class, at least one, but none of a class with one sample.

    >>> int(stratified_holdout(np.array([0] * 10 + [1] * 2 + [2]), seed=0).sum())
    3
    """
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(codes), dtype=bool)
    for k in range(codes.max() + 1):
        members = generator.permutation(np.flatnonzero(codes == k))
        if len(members) > 1:
            held_out[members[: max(1, round(0.2 * len(members)))]] = True
    return held_out
