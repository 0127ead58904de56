"""Pre-training tasks: what a backbone learns from the training images without their labels, before stage 1.

A task is called with augmented images, uint8 [B, H, W, C], and a CPU generator, and returns the images as the network
sees them, of the same shape and type, and what it is to tell of each, int64 [B] in 0...classes - 1. `length` is how
many times as many steps (or epochs) as stage 1 it takes; all else is optimised as in stage 1, with cross-entropy and
images drawn equally often. Stage 1 then starts from these weights, with a new classifier.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from tailscope.errors import UserError
from tailscope.methods import TASKS


class Task(Protocol):
    """Something to learn from images without labels."""

    @property
    def classes(self) -> int:
        """How many answers there are."""

    @property
    def length(self) -> float:
        """How long it is trained, in lengths of stage 1."""

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return images as they are shown, and the answers."""


@dataclass(frozen=True)
class _Rotation:
    length: float
    classes: int = 4

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        if images.shape[1] != images.shape[2]:
            height, width = images.shape[1:3]
            raise UserError(f"rotation: images of {height} x {width} pixels cannot be turned; they must be square")
        drawn = torch.randint(self.classes, (len(images),), generator=generator)
        turns = drawn.to(images.device, non_blocking=True)
        turned = torch.stack([torch.rot90(images, k, (1, 2)) for k in range(self.classes)])
        return turned[turns, torch.arange(len(images), device=images.device)], turns


@TASKS.register("rotation")
def rotation(length: float = 1.0) -> Task:
    """Tell by how many quarters an image was turned (Gidaris et al. 2018, section 2; for long tails Yang and Xu 2020).

    Each image of a batch is turned by one random rotation; the authors show all four of each image at once.

    >>> images = torch.arange(4, dtype=torch.uint8).reshape(1, 2, 2, 1)
    >>> shown, turns = rotation()(images, torch.Generator().manual_seed(0))
    >>> torch.equal(shown[0], torch.rot90(images[0], int(turns)))
    True

    Raises:
        UserError: `length` is not positive.
    """
    if not length > 0:
        raise UserError(f"rotation(length={length}): length must be positive; for no pre-training leave it out")
    return _Rotation(length)
