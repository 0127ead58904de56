"""Mixings: which images of a batch are mixed with which, where, and how strongly.

A mixing draws a `Mix` for many batches at once, so that the training loop has no randomness of its own: image i of a
batch becomes w * x_i + (1 - w) * x_partner[i], and its loss v * loss(y_i) + (1 - v) * loss(y_partner[i]); w may differ
between images and between pixels, v between images. With `needs` its factory takes the training counts, int64 [C]
("counts"), the number of places between the network's stages where activations can be mixed ("hidden"), or both in
this order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from tailscope.errors import UserError
from tailscope.methods import MIXINGS


class Mix(NamedTuple):
    """How images, labels and activations of batches are mixed, each with its partner's; `Mix()` mixes nothing.

    Attributes:
        images: weight of an image's own pixels, float32, of a shape that broadcasts to [steps, batch, C, H, W].
        labels: weight of an image's own label, float32 [steps, batch] or [steps, 1].
        partner: whom each image is mixed with, int64 [steps, batch].
        hidden: weight of an image's own activations at each place between two stages, float32 [steps, places].
    """

    images: Tensor | None = None
    labels: Tensor | None = None
    partner: Tensor | None = None
    hidden: Tensor | None = None

    def of(self, step: int, device: torch.device) -> "Mix":
        """Return the part of one step, without the first dimension, on a device."""
        return Mix(*(None if t is None else t[step].to(device, non_blocking=True) for t in self))


class Mixing(Protocol):
    """Draws how whole batches are mixed."""

    def draw(self, labels: Tensor, size: tuple[int, int], generator: Generator) -> Mix:
        """Draw for images of `size` (H, W) with labels int64 [steps, batch], which are on the generator's device."""


def _draws(generator: Generator) -> np.random.Generator:
    """Return NumPy's generator with a seed of this stream: torch's public Beta takes none."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    return np.random.default_rng(int(seed))


def _partners(labels: Tensor, generator: Generator) -> Tensor:
    """Return a permutation of each batch, int64 [steps, batch]."""
    return torch.rand(labels.shape, generator=generator, device=generator.device).argsort(1)


def _require_positive(name: str, alpha: float) -> None:
    if not alpha > 0:
        raise UserError(f"{name}(alpha={alpha}): alpha must be positive; for no mixing leave {name} out")


@dataclass(frozen=True)
class _MixUp:
    """MixUp, and what changes its label weights or where it mixes."""

    alpha: float
    label_weight: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    places: int = 0

    def draw(self, labels: Tensor, size: tuple[int, int], generator: Generator) -> Mix:
        device, stream = generator.device, _draws(generator)
        lam = torch.from_numpy(stream.beta(self.alpha, self.alpha, len(labels))).to(device, torch.float32)[:, None]
        partner = _partners(labels, generator)
        weight = self.label_weight(lam, labels, labels.gather(1, partner)) if self.label_weight else lam
        if not self.places:
            return Mix(lam.view(-1, 1, 1, 1, 1), weight, partner)
        drawn = torch.from_numpy(stream.integers(self.places + 1, size=len(labels))).to(device)
        at = torch.where(drawn[:, None] == torch.arange(self.places + 1, device=device), lam, 1.0)
        return Mix(at[:, 0].view(-1, 1, 1, 1, 1), weight, partner, at[:, 1:])


@MIXINGS.register("mixup")
def mixup(alpha: float = 1.0) -> Mixing:
    """MixUp of images and losses, one weight from Beta(alpha, alpha) a batch (Zhang et al. 2018).

    Partners are a permutation of the batch.

    >>> mix = mixup().draw(torch.zeros(3, 128, dtype=torch.int64), (32, 32), torch.Generator().manual_seed(0))
    >>> mix.images.shape, mix.labels.shape, mix.partner.shape
    (torch.Size([3, 1, 1, 1, 1]), torch.Size([3, 1]), torch.Size([3, 128]))

    Raises:
        UserError: `alpha` is not positive.
    """
    _require_positive("mixup", alpha)
    return _MixUp(alpha)


@MIXINGS.register("remix", needs=("counts",))
def remix(counts: Tensor, /, alpha: float = 1.0, kappa: float = 3.0, tau: float = 0.5) -> Mixing:
    """MixUp whose mixtures of a frequent and a rare class take the rare one's label (Chou et al. 2020, equation 7).

    The label of image i, mixed with j at weight lam, weighs 0 where n_i >= kappa n_j and lam < tau, 1 where
    n_j >= kappa n_i and 1 - lam < tau, and lam otherwise.

    Raises:
        UserError: `alpha` is not positive, `kappa` is below 1 or `tau` is not in [0, 1].
    """
    _require_positive("remix", alpha)
    if kappa < 1 or not 0 <= tau <= 1:
        raise UserError(f"remix(kappa={kappa}, tau={tau}): kappa must be at least 1, and tau lie in [0, 1]")

    def label_weight(lam: Tensor, own: Tensor, partners: Tensor) -> Tensor:
        mine, theirs = counts[own].double(), counts[partners].double()
        weight = torch.where((mine >= kappa * theirs) & (lam < tau), 0.0, lam)
        return torch.where((theirs >= kappa * mine) & (1 - lam < tau), 1.0, weight)

    return _MixUp(alpha, label_weight)


@MIXINGS.register("manifold_mixup", needs=("hidden",))
def manifold_mixup(places: int, /, alpha: float = 2.0) -> Mixing:
    """MixUp of the images or of what is between two stages, drawn anew for each batch (Verma et al. 2019).

    At the other places the weight is 1, so that every step computes the same.

    Raises:
        UserError: `alpha` is not positive.
    """
    _require_positive("manifold_mixup", alpha)
    return _MixUp(alpha, places=places)


@dataclass(frozen=True)
class _CutMix:
    alpha: float
    probability: float

    def draw(self, labels: Tensor, size: tuple[int, int], generator: Generator) -> Mix:
        steps, stream = len(labels), _draws(generator)
        side = np.sqrt(1 - stream.beta(self.alpha, self.alpha, steps))
        inside = np.broadcast_to(stream.random(steps) < self.probability, (2, steps))
        within = []
        for length, centre, cut in zip(size, stream.random((2, steps)), inside, strict=True):
            middle, half = np.floor(centre * length), np.floor(side * length) // 2
            place = np.arange(length)
            within.append((place >= (middle - half)[:, None]) & (place < (middle + half)[:, None]) & cut[:, None])
        own = torch.from_numpy(~(within[0][:, :, None] & within[1][:, None, :])).to(generator.device, torch.float32)
        return Mix(own[:, None, None], own.mean((1, 2))[:, None], _partners(labels, generator))


@MIXINGS.register("cutmix")
def cutmix(alpha: float = 1.0, probability: float = 0.5) -> Mixing:
    """CutMix: a box of the partner's pixels, one for all of a batch; labels weigh by area (Yun et al. 2019, section 3).

    The box has the share 1 - lam of the area before it is cut at the borders, lam from Beta(alpha, alpha), and its
    centre lies anywhere. A batch is left as it is with 1 - `probability`, which is 0.5 for the paper's CIFAR runs.

    Raises:
        UserError: `alpha` is not positive, or `probability` no probability.
    """
    _require_positive("cutmix", alpha)
    if not 0 < probability <= 1:
        raise UserError(f"cutmix(probability={probability}): probability must be above 0 and at most 1")
    return _CutMix(alpha, probability)
