"""Softmax regressions by mini-batches, for so many rows and classes that a search over all of them takes too long.

A search takes some 40 passes over the rows; here it is a few, in random order, by Adam (Kingma & Ba 2015) with a step
that falls to 0, in the same coordinates: centred features, about equally spread. The order comes from the estimator's
seed: the same rows give the same classifier. An accelerator does the work where one is given.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tailscope.classifiers.base import LOGITS_AT_ONCE, Diverged, Floats, IntArray, damped_whitening, spectrum
from tailscope.classifiers.estimators import SoftmaxRegression
from tailscope.seeds import derive

ROWS = 512  # of a batch, at most
PASSES, LEAST_STEPS = 3, 1000
STEP = 0.03  # of a coordinate of a weight; features have a deviation near 1 there
DECAYS = 0.9, 0.99
Model = TypeVar("Model", bound=SoftmaxRegression)


def fit_by_batches(
    model: Model,
    features: Floats,
    labels: IntArray,
    start: tuple[Floats, Floats] | None = None,
    device: torch.device | None = None,
) -> Model:
    """Fit a softmax regression, or CRT, approximately, and return it.

    Args:
        model: whose l2, seed and class weights count.
        features: [N, d].
        labels: [N], from 0 to C - 1; every class occurs.
        start: weight [C, d] and bias [C] to begin at instead of 0.
        device: where to compute; the CPU by default.

    Raises:
        Diverged: the loss is not finite.

    >>> rows = np.array([[0.0], [1.0], [3.0], [4.0]] * 50, dtype=np.float32)
    >>> labels = np.array([0, 0, 1, 1] * 50)
    >>> fit_by_batches(SoftmaxRegression(), rows, labels).predict([[0.5], [3.5]]).tolist()
    [0, 1]
    """
    counts = np.bincount(labels)
    kind = np.float64 if features.dtype == np.float64 else np.float32  # a copy of all might not find room
    rows = torch.from_numpy(np.require(features, kind, ["C", "W"]))
    codes = torch.from_numpy(labels)
    class_weight = model._variant(counts).get("class_weight", np.ones(len(counts)))
    weights = torch.from_numpy(class_weight).float()[codes]
    mean, variance, axes = spectrum(rows, (weights / len(rows)).to(rows.dtype), rows.shape[1])
    mean = mean.float()
    basis, inverse = damped_whitening(*axes, variance, model.l2, torch.float32)
    first = torch.zeros(len(counts), rows.shape[1] + 1)
    if start is not None:
        weight, bias = (torch.from_numpy(np.asarray(part, np.float32)) for part in start)
        first = torch.cat([weight @ inverse, (bias + weight @ mean)[:, None]], dim=1)
    penalty = torch.cat([model.l2 * variance.float() * basis.square().sum(0), torch.zeros(1)])
    search = _Descent(first.to(device), penalty.to(device))
    order = torch.Generator().manual_seed(derive(model.random_state, "batches") % 2**63)
    size = min(ROWS, max(16, LOGITS_AT_ONCE // len(counts)))
    batches = -(-len(rows) // size)
    passes = max(PASSES, -(-LEAST_STEPS // batches))
    for _ in range(passes):
        for chosen in torch.split(torch.randperm(len(rows), generator=order), size):
            batch = torch.cat([(rows[chosen].float() - mean) @ basis, torch.ones(len(chosen), 1)], dim=1)
            search.step(batch.to(device), codes[chosen].to(device), weights[chosen].to(device), passes * batches)
    placed = search.here.cpu()
    if not placed.isfinite().all():
        raise Diverged("the loss or its gradient is not finite")
    weight = placed[:, :-1] @ basis.T
    model.coef_ = weight.numpy().astype(features.dtype)
    model.intercept_ = (placed[:, -1] - weight @ mean).numpy().astype(features.dtype)
    model.classes_, model.n_features_in_ = np.arange(len(counts)), rows.shape[1]
    model.l2_, model.n_iter_ = model.l2, passes * batches
    return model


class _Descent:
    """Adam's steps on classifiers [C, d + 1] of placed rows, the last of which is the bias."""

    def __init__(self, start: Tensor, penalty: Tensor) -> None:
        self.here, self._penalty, self._taken = start.clone(), penalty, 0
        self._mean, self._square = torch.zeros_like(start), torch.zeros_like(start)

    def step(self, rows: Tensor, labels: Tensor, weights: Tensor, steps: int) -> None:
        """Take one of all steps, on a batch of rows [B, d + 1] with labels and weights [B]."""
        slopes = (rows @ self.here.T).softmax(dim=1)
        slopes[torch.arange(len(labels), device=labels.device), labels] -= 1
        gradient = slopes.T @ (rows * (weights / len(rows))[:, None])
        gradient += self._penalty * self.here
        self._taken += 1
        first, second = DECAYS
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square(), 1 - second)
        mean, square = self._mean / (1 - first**self._taken), self._square / (1 - second**self._taken)
        self.here -= STEP * (1 - (self._taken - 1) / steps) * mean / (square.sqrt() + 1e-8)
