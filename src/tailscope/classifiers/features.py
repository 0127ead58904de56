"""Classifiers on frozen features that are more than a softmax regression: on directions, memories, clouds and scales.

`mislas` and `feature_clouds` end in a linear layer, which may take the place of a network's last one; `cosine` and
`oltr` divide by the length of each sample's features, so that no linear layer does what they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tailscope.classifiers import CLASSIFIERS
from tailscope.classifiers.base import (
    FeatureClassifier,
    Floats,
    IntArray,
    LinearClassifier,
    Rebalanced,
    Stopping,
    WeightedRows,
    fit_scaled_softmax,
    fit_softmax,
    minimise,
    row_blocks,
    shared_tensor,
)
from tailscope.classifiers.estimators import TOL, Vector, balanced_weights, label_aware_smoothing
from tailscope.groups import assign_groups


@CLASSIFIERS.register("mislas")
@dataclass(kw_only=True, eq=False, repr=False)
class MiSLAS(Rebalanced, LinearClassifier):
    """MiSLAS's stage 2: the base's weights and a scale a class, trained on smoothed targets (Zhong et al. 2021).

    The logits are s_c ((w_c + d_c) x + b_c + e_c): w and b are the base, stage 1's classifier; the scale s, as in
    `lws`, and the change d and e are trained under class balance on targets that are smoothed more for frequent
    classes (their section 3.2). Theirs change at a lower learning rate than the scale, and stop early; here the
    penalties (l2/2) v |d|^2, with v the mean feature variance, and (scale_l2/2) mean_c (s_c - 1)^2 stand in for that;
    e is free. The problem is not convex; the search starts at the base.

    Shifted batch-norm statistics, the third part (their section 3.3), change the features, not the classifier: extract
    these after the shift, as `--bn-mode shifted` does in stage 2 of `swap` and `ladder`, and fit this to them.

    Args:
        base: the classifier to start from.
        head: smoothing of the most frequent class; this, `tail` and `shape` are as in `label_aware_smoothing`.
        tail: smoothing of the rarest class.
        shape: "concave", "linear" or "convex".
        l2: how strongly the change is held near 0, > 0.
        scale_l2: how strongly the scale is held near 1, > 0.
        tol: this and `max_iter`, as in `SoftmaxRegression`.
    """

    head: float = 0.3
    tail: float = 0.0
    shape: Literal["concave", "linear", "convex"] = "concave"
    l2: float = 1e-2
    scale_l2: float = 1e-2
    tol: float = TOL
    max_iter: int = 500

    def _fit(self, features: Floats, codes: IntArray) -> None:
        base, counts = self._fitted_base(features, codes), np.bincount(codes)
        smoothing = label_aware_smoothing(counts, self.head, self.tail, self.shape)
        self.coef_, self.intercept_, self.scale_, self.n_iter_ = fit_scaled_softmax(
            features,
            codes,
            balanced_weights(counts),
            smoothing,
            (base.coef_, base.intercept_),
            (self.l2, self.scale_l2),
            Stopping(self.tol, self.max_iter),
        )


@CLASSIFIERS.register("feature_clouds")
@dataclass(kw_only=True, eq=False, repr=False)
class FeatureClouds(LinearClassifier):
    """cRT on samples of body and tail in clouds that are as wide as head classes (after LEAP, Liu et al. 2020).

    Every sample of a class other than the head's stands for itself and for `cloud` virtual ones: itself, turned by an
    angle drawn from N(0, s_head^2 - s_class^2) in a random direction, its length kept. s^2 is the mean squared angle of
    a class's samples to their mean, s_head^2 its mean over the head classes: so the cloud of a class that is wider than
    these is the sample itself. What is fitted is class-balanced softmax regression.

    Theirs trains the encoder through, with a new draw at every step, and its s^2 is the variance of those angles, which
    leaves out the distance from the mean that all samples of a class have in common.

    Args:
        cloud: virtual samples for each.
        l2: this, `tol` and `max_iter`, as in `SoftmaxRegression`.
        random_state: seed of the draws.
    """

    cloud: int = 10
    l2: float = 1e-3
    tol: float = TOL
    max_iter: int = 500
    random_state: int = 0

    def _fit(self, features: Floats, codes: IntArray) -> None:
        self.angular_variance_ = angular_variances(features, codes)
        rows, labels = feature_clouds(features, codes, self.cloud, self.random_state)
        stopping = Stopping(self.tol, self.max_iter)
        self.coef_, self.intercept_, self.n_iter_ = fit_softmax(
            rows, labels, balanced_weights(np.bincount(labels)), self.l2, stopping
        )


def angular_variances(features: Floats, codes: IntArray) -> Vector:
    """Return the mean squared angle of each class's samples to their mean, in square radians, [C]; 0 for one sample.

    It is multiplied by n / (n - 1), since a mean is nearer to the samples that it is of than to others.

    >>> angular_variances(np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), np.array([0, 0, 1])).round(4).tolist()
    [1.2337, 0.0]
    """
    found = np.zeros(int(codes.max()) + 1)
    for k in range(len(found)):
        rows = features[codes == k].astype(np.float64)
        if len(rows) > 1:
            unit, center = _directions(rows), _directions(rows.mean(axis=0, keepdims=True))
            chords = np.linalg.norm(unit - center, axis=1)  # exact for small angles, as an arc cosine is not
            found[k] = np.square(2 * np.arcsin(np.minimum(chords / 2, 1))).sum() / (len(rows) - 1)
    return found


def feature_clouds(features: Floats, codes: IntArray, cloud: int, seed: int) -> tuple[Floats, IntArray]:
    """Return features [N, d] and codes [N] followed by their virtual samples, as `FeatureClouds` says.

    Head classes are those of `assign_groups`; of two classes, the more frequent one.
    """
    counts, spread = np.bincount(codes), angular_variances(features, codes)
    groups = assign_groups(counts.tolist())[0]
    head = np.array([group == "head" for group in groups])
    if not head.any():
        head = counts == counts.max()
    missing = np.where(head, 0, np.maximum(0, spread[head].mean() - spread))
    chosen = np.flatnonzero(missing[codes] > 0).repeat(cloud)
    generator, virtual = np.random.default_rng(seed), np.empty((len(chosen), features.shape[1]), features.dtype)
    for block in row_blocks(len(chosen), features.shape[1]):
        rows = features[chosen[block]].astype(np.float64)
        angle = generator.normal(size=len(rows)) * np.sqrt(missing[codes[chosen[block]]])
        virtual[block] = _turned(rows, generator.normal(size=rows.shape), angle)
    return np.concatenate([features, virtual]), np.concatenate([codes, codes[chosen]])


def _turned(rows: Floats, towards: Floats, angle: Floats) -> Floats:
    """Return rows [n, d] turned by angles [n], in radians, towards other vectors; as they are where these are along."""
    unit = _directions(rows)
    across = towards - (towards * unit).sum(axis=1, keepdims=True) * unit
    sizes = np.linalg.norm(across, axis=1, keepdims=True)
    free = sizes > 1e-9 * np.linalg.norm(towards, axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    turned = np.cos(angle)[:, None] * rows + np.sin(angle)[:, None] * lengths * across / np.where(free, sizes, 1)
    found: Floats = np.where(free, turned, rows)
    return found


def _directions(rows: Floats) -> Floats:
    """Return rows at unit length; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.where(lengths > 0, lengths, 1)
    return found


@dataclass(kw_only=True, eq=False, repr=False)
class _Placed(FeatureClassifier):
    """A classifier on features that were moved and scaled as a whole, so that their origin and unit do not matter."""

    centre: bool = True

    def _place_all(self, features: Floats) -> Floats:
        """Set origin and unit from training features, and return these placed: their mean squared length is 1."""
        self.origin_ = features.mean(axis=0) if self.centre else np.zeros_like(features[0])
        lengths = torch.linalg.vector_norm(shared_tensor(features - self.origin_), dim=1, dtype=torch.float64)
        self.unit_ = features.dtype.type(lengths.square().mean().sqrt().item() or 1.0)
        return self._place(features)

    def _place(self, X: Floats) -> Floats:
        placed: Floats = (X - self.origin_) / self.unit_
        return placed


@CLASSIFIERS.register("cosine")
@dataclass(kw_only=True, eq=False, repr=False)
class CosineClassifier(_Placed):
    """Softmax regression on cosines, scale * cos(w_c, x): neither a class's weight nor a sample has a length.

    The field's plain answer to weights that grow with the count (Gidaris & Komodakis 2018, section 3.2; a baseline of
    Liu et al. 2019). The directions w start at the class means of unit features; without a penalty, for the scale
    bounds the logits. Zero vectors have the same logit, 0, for every class.

    Args:
        centre: subtract the mean of the training features first; False is the published form, for an encoder that was
            trained with such a classifier.
        scale: by which cosines are multiplied.
        balanced: weight classes equally, as stage 2 does; False trains on samples as they come.
        tol: this and `max_iter`, as in `SoftmaxRegression`.

    >>> model = CosineClassifier(centre=False).fit([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]], ["a", "a", "b"])
    >>> model.predict([[9.0, 1.0], [0.1, 0.2]]).tolist()
    ['a', 'b']
    """

    scale: float = 16.0
    balanced: bool = True
    tol: float = TOL
    max_iter: int = 500

    def _fit(self, features: Floats, codes: IntArray) -> None:
        unit, counts = _directions(self._place_all(features)), np.bincount(codes)
        weights = balanced_weights(counts) if self.balanced else np.ones(len(counts))
        rows = WeightedRows(unit, codes, weights)

        def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
            return _on_sphere(parameters[0])

        def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
            return rows.cross_entropy(self.scale * rows.features[block] @ leaves[0].T, block)

        start, stopping = [functional.normalize(_class_means(rows.features, codes))], Stopping(self.tol, self.max_iter)
        (directions,), self.n_iter_ = minimise(start, expand, row_loss, len(codes), len(counts), stopping)
        self.directions_: Floats = directions.numpy()

    def _logits(self, X: Floats) -> Floats:
        logits: Floats = self.scale * _directions(self._place(X)) @ self.directions_.T
        return logits


@CLASSIFIERS.register("oltr")
@dataclass(kw_only=True, eq=False, repr=False)
class OLTR(_Placed, Rebalanced):
    """Dynamic meta-embedding: what a memory of class centres adds to each sample (Liu et al. 2019, section 3.1).

    With M [C, d] the class means, o = softmax(H x + h) the soft attention to them, e = tanh(S x + t) the concept
    selector and g the distance from x to the nearest class mean, the meta-embedding is
    v = (reach / g) (x + e * (o M)), and the logits are scale * |v| / (1 + |v|) * cos(w_c, v). H, h, S, t and w are
    trained under class balance. The attention starts as the base's probabilities, S and t at 0, w at the class means;
    (l2/2d) (|H - H_base|^2 + |S|^2) stands in for their early stopping. The problem is not convex.

    What trains the encoder is left out, for features are given: modulated attention over feature maps, and the loss
    that moves class centres. So is the rejection of classes that were never seen. Time grows with d^2.

    Args:
        base: the classifier whose probabilities the attention starts from.
        centre: as in `CosineClassifier`. Features are also scaled, to a mean squared length of 1.
        scale: this and `reach` are the authors' 16 and 10.
        reach: how far from the class means a sample still counts in full.
        l2: strength of the penalty, > 0.
        tol: this and `max_iter`, as in `SoftmaxRegression`.
    """

    scale: float = 16.0
    reach: float = 10.0
    l2: float = 1e-3
    tol: float = TOL
    max_iter: int = 500

    def _fit(self, features: Floats, codes: IntArray) -> None:
        base, counts = self._fitted_base(features, codes), np.bincount(codes)
        rows, width = WeightedRows(self._place_all(features), codes, balanced_weights(counts)), features.shape[1]
        self.memory_ = _class_means(rows.features, codes)
        attention = torch.from_numpy(np.asarray(base.coef_ * self.unit_, dtype=features.dtype))
        threshold = torch.from_numpy(np.asarray(base.logits(self.origin_[None])[0], dtype=features.dtype))

        def expand(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
            pull = (parameters[0] - attention).square().sum() + parameters[2].square().sum()
            directions, rest = _on_sphere(parameters[4])
            return [*parameters[:4], *directions], rest + 0.5 * self.l2 / width * pull

        def row_loss(leaves: Sequence[Tensor], block: slice) -> Tensor:
            return rows.cross_entropy(self._meta_logits(rows.features[block], leaves), block)

        selector = attention.new_zeros(width, width), attention.new_zeros(width)
        start = [attention, threshold, *selector, functional.normalize(self.memory_)]
        stopping = Stopping(self.tol, self.max_iter)
        self.found_, self.n_iter_ = minimise(start, expand, row_loss, len(codes), max(width, len(counts)), stopping)

    def _meta_logits(self, x: Tensor, found: Sequence[Tensor]) -> Tensor:
        attention, threshold, selector, lift, directions = found
        nearest = torch.cdist(x, self.memory_).amin(dim=1, keepdim=True).clamp(min=0.01)
        memory = torch.softmax(torch.addmm(threshold, x, attention.T), dim=1) @ self.memory_
        embedding = self.reach / nearest * (x + torch.tanh(torch.addmm(lift, x, selector.T)) * memory)
        lengths = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        logits: Tensor = self.scale * embedding / (1 + lengths) @ directions.T
        return logits

    def _logits(self, X: Floats) -> Floats:
        x = shared_tensor(self._place(X)).to(self.memory_.dtype)
        logits: Floats = self._meta_logits(x, self.found_).numpy()
        return logits


def _on_sphere(parameters: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return rows at unit length, and a penalty that keeps their lengths, which change nothing else, near 1."""
    return [functional.normalize(parameters)], (torch.linalg.vector_norm(parameters, dim=1) - 1).square().mean()


def _class_means(features: Tensor, codes: IntArray) -> Tensor:
    """Return each class's mean, [C, d]."""
    counts = torch.from_numpy(np.bincount(codes))
    sums = torch.zeros(len(counts), features.shape[1], dtype=torch.float64)
    for block in row_blocks(len(codes), features.shape[1]):
        sums.index_add_(0, torch.from_numpy(codes[block]), features[block].double())
    return (sums / counts[:, None]).to(features.dtype)
