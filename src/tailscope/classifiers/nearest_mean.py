"""The nearest class mean: a classifier without training, in which class frequencies play no part."""

from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike

from tailscope.classifiers.base import CLASSIFIERS, FeatureClassifier, Floats, row_blocks


@CLASSIFIERS.register("ncm")
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

    def __init__(self, *, centre: bool = True, normalise: bool = True) -> None:
        self.centre = centre
        self.normalise = normalise

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on features [N, d] with labels [N]."""
        features, codes = self._training_data(X, y)
        self.origin_ = features.mean(axis=0) if self.centre else np.zeros_like(features[0])
        labels, counts = torch.from_numpy(codes), np.bincount(codes)
        sums = torch.zeros(len(counts), features.shape[1], dtype=torch.float64)
        blocks = list(row_blocks(len(codes), features.shape[1]))
        for block in blocks:
            sums.index_add_(0, labels[block], torch.from_numpy(self._place(features[block])).double())
        means = sums.numpy() / counts[:, None]
        within = sum(float(np.square(self._place(features[block]) - means[codes[block]]).sum()) for block in blocks)
        freedom = max(1, len(codes) - len(counts)) * features.shape[1]
        self.means_: Floats = means.astype(features.dtype)
        variance = within / freedom
        # No spread, or none that this precision can hold: any temperature orders the classes alike.
        self.variance_ = variance if features.dtype.type(variance) > 0 else 1.0
        return self

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
