"""Losses on angles, distances and features: margins between classes, and pulls towards the centre of a class.

What a loss takes and may ask for is said in `methods.losses`. Those on angles work on the cosines between a feature and
the weight vector of each class, without the last layer's scale, and write s for a scale of their own. Libraries of
margin losses own the weight vectors, which here are the network's last layer; so the formulas stand here, and the tests
compare them with PyTorch Metric Learning where it is installed.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from tailscope.methods import LOSSES
from tailscope.methods.losses import Loss, require

_SMALL = 1e-6
"""How near to 1 a cosine may come where its angle has a gradient: at 1 that of the angle itself is infinite."""


# -- margins ---------------------------------------------------------------------------------------------------------


@LOSSES.register("cosface", needs=("cosine",))
def cosface(counts: Tensor, /, margin: float = 0.35, scale: float = 64.0) -> Loss:
    """CosFace: a margin is taken from the own class's cosine, s (cos t_y - m) (Wang et al. 2018, equation 4).

    Counts mean nothing to it: it is `ldam` with one margin for all.
    """
    require(scale > 0, f"cosface(scale={scale}): scale must be positive")
    require(0 <= margin <= 2, f"cosface(margin={margin}): margin must lie in [0, 2]")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return _with_own(logits.float(), labels, _own(logits, labels) - margin, scale)

    return loss


@LOSSES.register("arcface", needs=("cosine",))
def arcface(counts: Tensor, /, margin: float = 0.5, scale: float = 64.0) -> Loss:
    """ArcFace: a margin is added to the own class's angle, s cos(t_y + m) (Deng et al. 2019, equation 3).

    Where t_y + m exceeds pi, the cosine would rise again; the authors' code goes on with cos t_y - m sin m there, and
    so does this. Counts mean nothing to it.

    Args:
        counts: images per class, int64 [C].
        margin: m, in radians.
        scale: s.
    """
    require(scale > 0, f"arcface(scale={scale}): scale must be positive")
    require(0 <= margin <= math.pi / 2, f"arcface(margin={margin}): margin must lie in [0, pi / 2]")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own = _own(logits, labels)
        turned = own * math.cos(margin) - (1 - own.square()).clamp(min=_SMALL).sqrt() * math.sin(margin)
        beyond = own - margin * math.sin(margin)
        return _with_own(logits.float(), labels, torch.where(own >= -math.cos(margin), turned, beyond), scale)

    return loss


@LOSSES.register("sphereface", needs=("cosine", "progress"))
def sphereface(counts: Tensor, /, margin: float = 4.0, scale: float = 30.0, least: float = 5.0) -> Loss:
    """SphereFace: the own class's angle is multiplied by a margin, s psi(m t_y) (Liu et al. 2017, equation 7).

    psi continues cos(m t) downwards where this would rise again: (-1)^k cos(m t) - 2k from m t = k pi on. The paper
    scales each image by the length of its feature, and so lets it choose how hard it is; here all have the scale s, as
    Deng et al. (2019, equation 4) write the three margins. As in the authors' code, training begins with next to no
    margin: the own score is s (a cos t_y + psi) / (1 + a), where a = 1000 / (1 + 0.12 i) falls with the step i of their
    28,000, here with the share of the training that is done, and not below `least`. Counts mean nothing to it.

    Args:
        counts: images per class, int64 [C].
        margin: m, 1 or more.
        scale: s.
        least: what a falls to. At 0 the end of the training has the margin whole, which few networks learn with.
    """
    require(margin >= 1, f"sphereface(margin={margin}): margin must be 1 or more")
    require(scale > 0, f"sphereface(scale={scale}): scale must be positive")
    require(least >= 0, f"sphereface(least={least}): least must be 0 or more")

    def loss(logits: Tensor, labels: Tensor, *, progress: Tensor) -> Tensor:
        own, a = _own(logits, labels), (1000 / (1 + 0.12 * 28_000 * progress)).clamp(min=least)
        score = (a * own + _multiplied(own, torch.full_like(own, margin))) / (1 + a)
        return _with_own(logits.float(), labels, score, scale)

    return loss


@LOSSES.register("uncertainty_margin", needs=("cosine", "unmixed"))
def uncertainty_margin(counts: Tensor, /, strength: float = 1.0, scale: float = 30.0, rate: float = 0.1) -> Loss:
    """Multiply the own class's angle by a margin that grows with the class's uncertainty (after Khan et al. 2019).

    The own score is s psi(m_y t_y), with psi as in `sphereface` and m_y = 1 + strength * u_y. The paper measures u_y as
    the spread of predictions under dropout, which takes many passes through the network. This is a simplification: u_y
    is the entropy of the softmax of s cos t over log C, from 0 to 1, averaged over the class's images as they come.
    It starts at 0, and rises most where images are few. The paper's second part, which gives each image a Gaussian in
    the place of a point, is left out. An image that is a mixture of two says nothing of either class's uncertainty.

    Args:
        counts: images per class, int64 [C].
        strength: margin of a class of which nothing is certain, beyond 1.
        scale: s.
        rate: weight of a batch's images of a class in the running mean of u_y.
    """
    require(strength >= 0, f"uncertainty_margin(strength={strength}): strength must be 0 or more")
    require(scale > 0, f"uncertainty_margin(scale={scale}): scale must be positive")
    require(0 < rate <= 1, f"uncertainty_margin(rate={rate}): rate must lie in (0, 1]")
    return _UncertaintyMargin(len(counts), strength, scale, rate).to(counts.device)


class _UncertaintyMargin(nn.Module):
    """Scaled cosines with a margin by the running mean entropy of each class's predictions, `uncertainty` [C]."""

    uncertainty: Tensor

    def __init__(self, classes: int, strength: float, scale: float, rate: float) -> None:
        super().__init__()
        self.register_buffer("uncertainty", torch.zeros(classes))
        self.strength, self.scale, self.rate = strength, scale, rate

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return losses, float32 [B]; in training, whose cosines have gradients, the batch is measured first."""
        if logits.requires_grad:
            self._measure(logits.detach().float(), labels)
        margin = 1 + self.strength * self.uncertainty[labels]
        return _with_own(logits.float(), labels, _multiplied(_own(logits, labels), margin), self.scale)

    def _measure(self, cosines: Tensor, labels: Tensor) -> None:
        known, classes = self.uncertainty, len(self.uncertainty)
        log_p = log_softmax(self.scale * cosines, 1)
        entropy = -(log_p.exp() * log_p).sum(1) / math.log(max(classes, 2))
        of_class = (labels[:, None] == torch.arange(classes, device=labels.device)).to(entropy.dtype)
        images = of_class.sum(0)
        mean = (entropy @ of_class) / images.clamp(min=1)
        known.copy_(torch.where(images > 0, known + self.rate * (mean - known), known))


def _own(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each sample's own class, float32 [B]."""
    return scores.float().gather(1, labels[:, None]).squeeze(1)


def _with_own(scores: Tensor, labels: Tensor, own: Tensor, scale: float) -> Tensor:
    """Return cross-entropies [B] of scores [B, C] times the scale, those of the own classes replaced by `own` [B]."""
    return cross_entropy(scale * scores.scatter(1, labels[:, None], own[:, None]), labels, reduction="none")


def _multiplied(cosines: Tensor, margin: Tensor) -> Tensor:
    """Return psi(margin * angle) of cosines [B] and margins [B]: falling in the angle, and 1 at 0."""
    angle = margin * cosines.clamp(-1 + _SMALL, 1 - _SMALL).acos()
    turns = (angle.detach() / math.pi).floor()
    return (1 - 2 * (turns % 2)) * angle.cos() - 2 * turns


# -- centres ---------------------------------------------------------------------------------------------------------


@LOSSES.register("center", needs=("features",))
def center(counts: Tensor, width: int, /, weight: float = 0.003) -> Loss:
    """Cross-entropy, and a pull of each feature to its class's centre, w / 2 |x - c_y|^2 (Wen et al. 2016, equation 5).

    Centres follow the features by themselves, whatever the weight of the pull: each is moved towards the sum of its
    batch's images less it, over 1 + their number (equation 4), at the network's rate and not at the paper's fixed 0.5.
    They start at 0. In stage 2 features stay where they are, and this is cross-entropy.

    Args:
        counts: images per class, int64 [C].
        width: of the features.
        weight: lambda in the paper, which chose 0.003 for faces.
    """
    require(weight >= 0, f"center(weight={weight}): weight must be 0 or more")
    return _Centers(len(counts), width, weight)


class _Centers(nn.Module):
    """Cross-entropy and the pull to `centers` [C, d]."""

    def __init__(self, classes: int, width: int, weight: float) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(classes, width))
        self.weight = weight

    def forward(self, logits: Tensor, labels: Tensor, *, features: Tensor) -> Tensor:
        """Return losses, float32 [B]."""
        centers = self.centers[labels]
        pull = self.weight / 2 * (features - centers.detach()).square().sum(1)
        # Of value 0: the gradient of the mean over the batch is the step of equation 4.
        images = (labels[:, None] == labels).sum(1)
        follow = (features.detach() - centers).square().sum(1) / 2 * len(labels) / (1 + images)
        return cross_entropy(logits.float(), labels, reduction="none") + pull + (follow - follow.detach())


@LOSSES.register("convolutional_prototypes", needs=("distance",))
def convolutional_prototypes(counts: Tensor, /, gamma: float = 1.0, weight: float = 0.001) -> Loss:
    """Cross-entropy of -gamma d^2, and a pull w d_y^2, for the distances d to prototypes (Yang et al. 2018, section 3).

    The prototypes, one a class, are the last layer `prototypes`; gamma is the loss's own, whatever that layer's is.
    Their distance-based cross-entropy and their prototype loss, with the values of the authors' code.

    Args:
        counts: images per class, int64 [C].
        gamma: hardness of the assignment to prototypes.
        weight: of the prototype loss.
    """
    require(gamma > 0, f"convolutional_prototypes(gamma={gamma}): gamma must be positive")
    require(weight >= 0, f"convolutional_prototypes(weight={weight}): weight must be 0 or more")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        told = cross_entropy(-gamma * logits.float(), labels, reduction="none")
        return told + weight * _own(logits, labels)

    return loss
