"""Losses for long-tailed classification, and class weights that go with any of them.

A factory takes the training counts (int64 [C], on the device of the logits) and returns `loss(logits, labels)`:
logits [B, C] of any float type, labels int64 [B], result float32 [B]. Nothing is reduced: the mean, MixUp's weights
and any other weighting happen in the caller. All arithmetic is in float32. Classes without training images may have
a column in the logits; they are no one's label.

A loss that asks for more says so where it is registered, `@LOSSES.register("name", needs=("features",))`:

- "features": the factory takes (counts, width of the features), the loss also `features=`, float32 [B, d].
- "progress": the loss also takes `progress=`, the share of the training that is done: float32 [], in [0, 1). A step may
  be captured, so it is a tensor, and what depends on it is `torch.where` and not `if`.
- "cosine": the logits are cosines, and a network whose last layer computes none is refused.
- "distance": the logits are squared distances to a point of each class, likewise.
- "unmixed": the loss means nothing for an image that is a mixture of two; mixings are refused.

A loss may be an `nn.Module`. Its parameters, whose initial values the factory draws from torch's default generator on
the CPU, are trained with the network's, at the same rate and without weight decay: what should hold them in is in the
loss. They and its buffers are kept for resuming, and are no part of the result.

Class weights are a factory that takes the counts and returns `weights(progress)`: float32 [C] from the share of the
training that is done, float32 []. Each label's loss is multiplied by its class's weight; of one that is registered with
`needs=("batch",)`, by that over the mean of the batch's labels.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as softmax_cross_entropy
from torch.nn.functional import log_softmax, logsigmoid

from tailscope.errors import UserError
from tailscope.methods import LOSSES, WEIGHTS

Loss: TypeAlias = Callable[..., Tensor]
ClassWeights: TypeAlias = Callable[[Tensor], Tensor]


@LOSSES.register("cross_entropy")
def cross_entropy(counts: Tensor, /) -> Loss:
    """Softmax cross-entropy, -log p_y."""
    return label_smoothing(counts, epsilon=0.0)


@LOSSES.register("label_smoothing")
def label_smoothing(counts: Tensor, /, epsilon: float = 0.1) -> Loss:
    """Cross-entropy with targets (1 - epsilon) * one-hot + epsilon / C (Szegedy et al. 2016)."""
    require(0 <= epsilon <= 1, f"label_smoothing(epsilon={epsilon}): epsilon must lie in [0, 1]")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return softmax_cross_entropy(logits.float(), labels, reduction="none", label_smoothing=epsilon)

    return loss


@LOSSES.register("label_aware_smoothing")
def label_aware_smoothing(counts: Tensor, /, head: float = 0.4, tail: float = 0.1) -> Loss:
    """Cross-entropy with more smoothing for frequent classes, in the concave form (Zhong et al. 2021, MiSLAS).

    The target of class y is 1 - e_y, that of each other class e_y / (C - 1), where e_y = tail + (head - tail) *
    sin(pi / 2 * (n_y - n_min) / (n_max - n_min)). Where all counts are equal, e_y = tail.

    Args:
        counts: images per class, int64 [C].
        head: smoothing of the most frequent class.
        tail: smoothing of the rarest class.
    """
    require(0 <= tail <= head < 1, f"label_aware_smoothing(head={head}, tail={tail}): need 0 <= tail <= head < 1")
    present = counts[counts > 0]
    position = (counts - present.min()).clamp(min=0) / (present.max() - present.min()).clamp(min=1)
    smoothing = tail + (head - tail) * torch.sin(0.5 * math.pi * position.float())
    others = max(len(counts) - 1, 1)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        negative = -log_softmax(logits.float(), 1)
        own = negative.gather(1, labels[:, None]).squeeze(1)
        share = smoothing[labels]
        return (1 - share) * own + share * (negative.sum(1) - own) / others

    return loss


@LOSSES.register("focal")
def focal(counts: Tensor, /, gamma: float = 2.0) -> Loss:
    """Focal loss on the softmax, -(1 - p_y)^gamma * log p_y (after Lin et al. 2017, who use sigmoids)."""
    require(gamma >= 0, f"focal(gamma={gamma}): gamma must be 0 or more")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = log_softmax(logits.float(), 1)
        own = labels[:, None]
        # log(1 - p_y) from the other classes: 1 - p_y itself vanishes, and so would the gradient's accuracy.
        log_rest = log_p.scatter(1, own, -math.inf).logsumexp(1)
        return -(gamma * log_rest).exp() * log_p.gather(1, own).squeeze(1)

    return loss


@LOSSES.register("class_balanced")
def class_balanced(counts: Tensor, /, beta: float = 0.9999) -> Loss:
    """Cross-entropy weighted by the inverse effective number of images, (1 - beta) / (1 - beta^n_y) (Cui et al. 2019).

    The weights are scaled to a mean of 1 over the classes that have images.
    """
    weights = _by_effective_number(counts, beta, "class_balanced")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return weights[labels] * softmax_cross_entropy(logits.float(), labels, reduction="none")

    return loss


@LOSSES.register("sigmoid_focal")
def sigmoid_focal(counts: Tensor, /, gamma: float = 2.0) -> Loss:
    """Focal loss as published: on a sigmoid a class, sum_k -(1 - p_k)^gamma * log p_k (Lin et al. 2017, equation 4).

    p_y is the sigmoid of the own logit, p_k one minus that of another's. At gamma = 0 it is the sum of binary
    cross-entropies. The authors start the last layer's biases at -log(C - 1), which is not a loss's to do.
    """
    require(gamma >= 0, f"sigmoid_focal(gamma={gamma}): gamma must be 0 or more")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        z, own = logits.float(), labels[:, None]
        right = (-z).scatter(1, own, z.gather(1, own))
        return -((gamma * logsigmoid(-right)).exp() * logsigmoid(right)).sum(1)

    return loss


@LOSSES.register("class_balanced_focal")
def class_balanced_focal(counts: Tensor, /, beta: float = 0.9999, gamma: float = 1.0) -> Loss:
    """Focal loss on sigmoids, weighted by the inverse effective number of images (Cui et al. 2019, section 4.3).

    `sigmoid_focal` times the weights of `class_balanced`, whose mean over classes is 1, as published: a batch of mostly
    frequent classes takes a short step. `sigmoid_focal` with the class weights `effective_number(mean_over='images')`
    or `batch_mean(of='effective_number')` does not.

    Args:
        counts: images per class, int64 [C].
        beta: of the effective number.
        gamma: 0.5, 1 or 2 in the paper, chosen for each data set.
    """
    weights, focal = _by_effective_number(counts, beta, "class_balanced_focal"), sigmoid_focal(counts, gamma=gamma)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return weights[labels] * focal(logits, labels)

    return loss


@LOSSES.register("class_balanced_sigmoid")
def class_balanced_sigmoid(counts: Tensor, /, beta: float = 0.9999) -> Loss:
    """Binary cross-entropies, weighted by the inverse effective number of images (Cui et al. 2019, section 4.2).

    `class_balanced_focal` at gamma = 0.
    """
    return class_balanced_focal(counts, beta=beta, gamma=0.0)


@LOSSES.register("balanced_softmax")
def balanced_softmax(counts: Tensor, /) -> Loss:
    """Cross-entropy of logits + log n (Ren et al. 2020): `logit_adjustment` at tau = 1."""
    return logit_adjustment(counts, tau=1.0)


@LOSSES.register("logit_adjustment")
def logit_adjustment(counts: Tensor, /, tau: float = 1.0) -> Loss:
    """Cross-entropy of logits + tau * log(class share) (Menon et al. 2021, equation 10).

    The model is trained with the adjustment and tested without it. Classes without images are left out of the softmax.
    """
    require(tau >= 0, f"logit_adjustment(tau={tau}): tau must be 0 or more")
    adjustment = torch.where(counts > 0, tau * (counts / counts.sum()).log(), -math.inf)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return softmax_cross_entropy(logits.float() + adjustment, labels, reduction="none")

    return loss


@LOSSES.register("ldam", needs=("cosine",))
def ldam(counts: Tensor, /, max_margin: float = 0.5, scale: float = 30.0) -> Loss:
    """Label-distribution-aware margin loss, margins in proportion to n^-1/4 (Cao et al. 2019).

    Cross-entropy of scale * cosines after the margin of y is taken from the cosine of y; `max_margin` is the rarest
    class's. The scale is the loss's own, whatever the last layer's is.
    """
    require(scale > 0, f"ldam(scale={scale}): scale must be positive")
    require(max_margin >= 0, f"ldam(max_margin={max_margin}): max_margin must be 0 or more")
    margins = torch.where(counts > 0, max_margin * (counts[counts > 0].min() / counts) ** 0.25, 0.0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None]
        lowered = logits.float().scatter_add(1, own, -margins[own])
        return softmax_cross_entropy(scale * lowered, labels, reduction="none")

    return loss


@LOSSES.register("equalization")
def equalization(counts: Tensor, /, gamma: float = 0.95, threshold: float = 0.003) -> Loss:
    """Softmax equalization loss: rare classes are spared as negatives of other classes' images (Tan et al. 2020).

    In the softmax's denominator a class other than y whose share of the training images is below `threshold` gets the
    weight 1 - gamma. The paper drops such a class altogether with probability gamma, for each image anew; the weight is
    the mean of that draw, which keeps the loss deterministic (by Jensen it bounds the drawn loss's mean from above).
    Where no class is rarer than the threshold, this is cross-entropy.

    Args:
        counts: images per class, int64 [C].
        gamma: probability of sparing, in [0, 1).
        threshold: share of the training images below which a class is rare, lambda in the paper.
    """
    require(0 <= gamma < 1, f"equalization(gamma={gamma}): gamma must lie in [0, 1)")
    return _sparing(counts / counts.sum() < threshold, gamma)


@LOSSES.register("equalization_tail")
def equalization_tail(counts: Tensor, /, gamma: float = 0.95, tail_ratio: float = 0.1) -> Loss:
    """Equalization loss whose rare classes are the rarest that hold a share of all images (Tan et al. 2020).

    A class is rare if classes that are no more frequent than it have at most `tail_ratio` of the training images. It is
    `equalization` with the threshold chosen by what the paper calls the tail ratio, so that there is a tail in any
    long-tailed set: of CIFAR-10-LT, whose rarest class has 0.4 % of the images, a threshold of 0.003 spares none. Where
    classes are equally frequent, none is rare, and this is cross-entropy.

    Args:
        counts: images per class, int64 [C].
        gamma: probability of sparing, in [0, 1).
        tail_ratio: the share of images.
    """
    require(0 <= gamma < 1, f"equalization_tail(gamma={gamma}): gamma must lie in [0, 1)")
    require(0 <= tail_ratio < 1, f"equalization_tail(tail_ratio={tail_ratio}): tail_ratio must lie in [0, 1)")
    no_more_frequent = torch.where(counts <= counts[:, None], counts, 0).sum(1)
    return _sparing(no_more_frequent / counts.sum() <= tail_ratio, gamma)


def _sparing(rare: Tensor, gamma: float) -> Loss:
    """Return cross-entropy in which rare classes, bool [C], weigh 1 - gamma as negatives."""
    log_weight = torch.where(rare, math.log1p(-gamma), 0.0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None]
        weighted = logits.float() + log_weight
        weighted = weighted.scatter(1, own, logits.float().gather(1, own))
        return softmax_cross_entropy(weighted, labels, reduction="none")

    return loss


@WEIGHTS.register("inverse")
def inverse(counts: Tensor, /, power: float = 1.0, mean_over: str = "classes") -> ClassWeights:
    """Weights in proportion to n^-power, from the first step on (Huang et al. 2016, for power = 1).

    `mean_over`: what their mean is 1 over, as for `drw`.
    """
    return _from(0.0, counts, counts.double() ** -power, mean_over)


@WEIGHTS.register("effective_number")
def effective_number(counts: Tensor, /, beta: float = 0.9999, mean_over: str = "classes") -> ClassWeights:
    """Weights by the inverse effective number of images, (1 - beta) / (1 - beta^n), from the first step on.

    Cui et al. 2019, equation 4; with `mean_over` as for `drw`. On cross-entropy this is the loss `class_balanced`.
    """
    return drw(counts, start=0.0, beta=beta, mean_over=mean_over)


@WEIGHTS.register("drw")
def drw(counts: Tensor, /, start: float = 0.8, beta: float = 0.9999, mean_over: str = "classes") -> ClassWeights:
    """Deferred re-weighting: no weights before the share `start` of the training (Cao et al. 2019, algorithm 1).

    From then on they are those of Cui et al. (2019), by the inverse effective number, (1 - beta) / (1 - beta^n).

    Args:
        counts: images per class, int64 [C].
        start: share of the training without weights; 160 of 200 epochs in the paper.
        beta: of the effective number.
        mean_over: "classes" scales the weights to a mean of 1 over classes with images, as Cui et al. write; a batch of
            mostly frequent classes then takes a step several times shorter than before. Algorithm 1 of Cao et al.
            divides by the weights of the batch (`batch_mean`), which takes that back; "images" does so for the mean
            batch: the mean over training images is 1.
    """
    require(0 <= start < 1, f"drw(start={start}): start must lie in [0, 1)")
    require(0 <= beta < 1, f"drw(beta={beta}): beta must lie in [0, 1)")
    return _from(start, counts, (1 - beta) / (1 - beta ** counts.double()), mean_over)


@WEIGHTS.register("batch_mean", needs=("batch",))
def batch_mean(counts: Tensor, /, of: str = "drw(start=0.8, beta=0.9999)") -> ClassWeights:
    """Weights `of` another kind, over their mean in each batch: what PyTorch's weighted cross-entropy computes.

    So do re-weighting (Cui et al. 2019) and its deferral (Cao et al. 2019) in the code of the latter: a batch's loss is
    the sum of w_y times each image's over the sum of w_y. On CIFAR-LT, at beta = 0.9999, steps are 5 to 6 times as long
    as with weights whose mean over classes is 1. Processes that train together divide by the
    mean of their own part of the batch.

    Raises:
        UserError: `of` is such a mean itself.
    """
    require(not WEIGHTS.needs(of), f"batch_mean(of={of!r}): takes class weights that do not ask for the batch")
    return WEIGHTS.make(of, counts)


def _by_effective_number(counts: Tensor, beta: float, name: str) -> Tensor:
    """Return (1 - beta) / (1 - beta^n), 0 for classes without images, scaled to a mean of 1 over the others."""
    require(0 <= beta < 1, f"{name}(beta={beta}): beta must lie in [0, 1)")
    inverse = (1 - beta) / (1 - beta ** counts.double())
    inverse = torch.where(counts > 0, inverse, 0.0)
    return (inverse * (counts > 0).sum() / inverse.sum()).float()


def _from(start: float, counts: Tensor, weights: Tensor, mean_over: str) -> ClassWeights:
    """Return weights that are 1 before `start`, and then the given ones (any scale) at a mean of 1."""
    require(mean_over in ("classes", "images"), f"mean_over={mean_over!r}: must be 'classes' or 'images'")
    present = counts > 0
    shares = (present if mean_over == "classes" else counts).double()
    raw = torch.where(present, weights, 0.0)
    scaled = (raw * shares.sum() / (raw * shares).sum()).float()

    def weights_at(progress: Tensor) -> Tensor:
        return torch.where(progress >= start, scaled, 1.0)

    return weights_at


def require(condition: bool, message: str) -> None:
    """Refuse hyperparameters without a meaning.

    Raises:
        UserError: the condition does not hold; `message` names the value and what it must be.
    """
    if not condition:
        raise UserError(message)
