"""Augmentations of whole batches of uint8 images, on the images' device.

An augmentation takes (images uint8 [n, H, W, C], generator) and returns images of the same shape. It draws on the
generator's device, in training the CPU, so that a seed means the same everywhere, and moves the draws to the images
without waiting. Every image has draws of its own; nothing loops over images. What an image draws depends on its place
in the call, so a run that is to be repeated must cut its data into the same calls. Normalisation is not an
augmentation.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch.nn.functional import pad

from tailscope.errors import UserError
from tailscope.methods import AUGMENTATIONS

Augmentation: TypeAlias = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@AUGMENTATIONS.register("crop")
def crop(padding: int = 4) -> Augmentation:
    """Random crop of the original size after padding with zeros.

    Args:
        padding: zero pixels added on each side; the crop's offsets are uniform on 0 ... 2 * padding.

    Raises:
        UserError: `padding` is negative.
    """
    if padding < 0:
        raise UserError(f"crop(padding={padding}): padding must be 0 or more")

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        n, height, width, _ = images.shape
        offsets = torch.randint(2 * padding + 1, (2, n), generator=generator, device=generator.device)
        offsets = offsets.to(images.device, non_blocking=True)
        padded = pad(images, (0, 0, padding, padding, padding, padding))
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view [n, y, x, C, H, W]: no copy is made
        crops = windows[torch.arange(n, device=images.device), offsets[0], offsets[1]]
        return crops.permute(0, 2, 3, 1).contiguous()

    return augment


@AUGMENTATIONS.register("flip")
def flip() -> Augmentation:
    """Horizontal flip with probability one half."""

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        flipped = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        flipped = flipped.to(images.device, non_blocking=True)
        return torch.where(flipped[:, None, None, None], images.flip(2), images)

    return augment


def build(calls: Sequence[str]) -> Augmentation:
    """Return one augmentation that applies the named ones in order; none leaves the images as they are.

    >>> images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    >>> build(["crop(padding=1)", "flip"])(images, torch.Generator()).shape
    torch.Size([2, 8, 8, 1])

    Raises:
        UserError: a call-string is malformed or names something unknown.
    """
    steps = [AUGMENTATIONS.make(call) for call in calls]

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment
