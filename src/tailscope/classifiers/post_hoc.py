"""Re-balancing a trained classifier by a formula: logit adjustment and tau-normalisation.

Each has `base`, the linear classifier that it starts from: a call-string of this package, or an estimator with
`coef_` and `intercept_`. To adjust a classifier of your own without training it again, wrap it in scikit-learn's
`FrozenEstimator`.
"""

from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from tailscope.classifiers.base import (
    CLASSIFIERS,
    Floats,
    IntArray,
    LinearClassifier,
    fit_base,
    row_blocks,
    stratified_holdout,
)

TAUS = np.linspace(0, 2, 21)


@CLASSIFIERS.register("logit_adjustment")
class LogitAdjustment(LinearClassifier):
    """Subtract tau log prior_y from the logits after training (Menon et al. 2021, equation 9).

    Args:
        base: the classifier to adjust.
        tau: 1 makes the rule consistent for the balanced error; 0 leaves the base as it is.
    """

    def __init__(self, *, base: str | LinearClassifier = "softmax", tau: float = 1.0) -> None:
        self.base = base
        self.tau = tau

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        base = fit_base(self.base, features, self.classes_[codes])
        self.coef_ = base.coef_
        self.intercept_ = base.intercept_ - (self.tau * np.log(np.bincount(codes) / len(codes))).astype(features.dtype)
        return self


@CLASSIFIERS.register("tau_norm")
class TauNorm(LinearClassifier):
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

    def __init__(
        self,
        *,
        base: str | LinearClassifier = "softmax",
        tau: float | None = None,
        bias: Literal["centre", "drop", "scale", "keep"] = "centre",
        random_state: int = 0,
    ) -> None:
        self.base = base
        self.tau = tau
        self.bias = bias
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        if self.bias not in ("centre", "drop", "scale", "keep"):
            raise ValueError(f"bias must be 'centre', 'drop', 'scale' or 'keep', got {self.bias!r}")
        self.tau_ = self._choose_tau(features, codes) if self.tau is None else self.tau
        base = fit_base(self.base, features, self.classes_[codes])
        norms, divided, kept = self._parts(base, features)
        self.coef_ = base.coef_ / norms[:, None] ** self.tau_
        self.intercept_ = divided / norms**self.tau_ + kept
        return self

    def _choose_tau(self, features: Floats, codes: IntArray) -> float:
        held_out = stratified_holdout(codes, self.random_state)
        if not held_out.any():
            return 0.0
        base = fit_base(self.base, features[~held_out], self.classes_[codes[~held_out]])
        classes = len(self.classes_)
        norms, divided, kept = self._parts(base, features[~held_out])
        hits = np.zeros((len(TAUS), classes))
        held_out_features, seen = features[held_out], codes[held_out]
        for block in row_blocks(len(seen), classes):
            logits = held_out_features[block] @ base.coef_.T + divided
            for row, tau in zip(hits, TAUS, strict=True):
                right = (logits / norms**tau + kept).argmax(axis=1) == seen[block]
                row += np.bincount(seen[block], weights=right, minlength=classes)
        totals = np.bincount(seen, minlength=classes)
        recall = (hits[:, totals > 0] / totals[totals > 0]).mean(axis=1)
        return float(TAUS[int(recall.argmax())])

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
