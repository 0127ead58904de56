"""Mixings: which pairs of images a batch mixes, and how strongly.

A mixing draws for many batches at once, so that the training loop has no randomness of its own: image i of a batch
becomes lam * x_i + (1 - lam) * x_partner[i], and its loss lam * loss(y_i) + (1 - lam) * loss(y_partner[i]).
"""

from typing import Protocol

import numpy as np
import torch

from tailscope.errors import UserError
from tailscope.methods import MIXINGS


class Mixing(Protocol):
    """Draws the weights and partners of whole batches."""

    def draw(self, steps: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights float32 [steps] and the partners int64 [steps, batch], on the generator's device."""


class MixUp:
    """MixUp with one weight a batch, from Beta(alpha, alpha), and partners by a permutation of the batch."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def draw(self, steps: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights float32 [steps] and the partners int64 [steps, batch], on the generator's device.

        >>> lam, partner = MixUp(1.0).draw(3, 128, torch.Generator().manual_seed(0))
        >>> lam.shape, partner.shape
        (torch.Size([3]), torch.Size([3, 128]))
        """
        device = generator.device
        # torch's public Beta takes no generator, so NumPy draws it from a seed of this stream.
        seed = torch.randint(2**62, (), generator=generator, device=device).item()
        lam = np.random.default_rng(int(seed)).beta(self.alpha, self.alpha, steps)
        partner = torch.rand(steps, batch, generator=generator, device=device).argsort(1)
        return torch.from_numpy(lam).to(device, torch.float32), partner


@MIXINGS.register("mixup")
def mixup(alpha: float = 1.0) -> MixUp:
    """MixUp of images and losses, one weight from Beta(alpha, alpha) a batch (Zhang et al. 2018).

    Raises:
        UserError: `alpha` is not positive.
    """
    if not alpha > 0:
        raise UserError(f"mixup(alpha={alpha}): alpha must be positive; for no mixing leave mixup out")
    return MixUp(alpha)
