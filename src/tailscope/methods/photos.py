"""Augmentations of single photographs, as worker processes apply them: torchvision's v2 transforms by call-string.

A photograph augmentation takes an RGB image of Pillow and returns one. It draws from torch's default generator, which
`seeds.keyed` seeds for every image, so that neither the process nor the batch that an image falls into changes what it
draws.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, v2

from tailscope.errors import UserError
from tailscope.methods import PHOTO_AUGMENTATIONS, for_photos

Photo: TypeAlias = Callable[[Image.Image], Image.Image]
ToPixels: TypeAlias = Callable[[Image.Image], Tensor]

SMALLEST = 8
"""The shortest side, in pixels, that `resized_crop` may give."""


@PHOTO_AUGMENTATIONS.register("resized_crop")
def resized_crop(size: int = 224) -> Photo:
    """Random crop of 8 to 100 % of the area, aspect 3/4 to 4/3, resized to a square (Szegedy et al. 2015).

    Raises:
        UserError: `size` is below 8.
    """
    if size < SMALLEST:
        raise UserError(f"resized_crop(size={size}): size must be at least {SMALLEST}")
    return cast(Photo, v2.RandomResizedCrop(size, antialias=True))


@PHOTO_AUGMENTATIONS.register("flip")
def flip() -> Photo:
    """Horizontal flip with probability one half."""
    return cast(Photo, v2.RandomHorizontalFlip())


@PHOTO_AUGMENTATIONS.register("color_jitter")
def color_jitter(brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0) -> Photo:
    """Brightness, contrast and saturation times 0.6 to 1.4, as ImageNet-LT's published systems train (Liu et al. 2019).

    Raises:
        UserError: a strength is negative, or `hue` above one half.
    """
    try:
        return cast(Photo, v2.ColorJitter(brightness, contrast, saturation, hue))
    except ValueError as error:
        raise UserError(f"color_jitter: {error}") from None


@PHOTO_AUGMENTATIONS.register("autoaugment_imagenet")
def autoaugment_imagenet() -> Photo:
    """AutoAugment with torchvision's ImageNet policy (Cubuk et al. 2019)."""
    return cast(Photo, v2.AutoAugment(AutoAugmentPolicy.IMAGENET))


def size_of(calls: Sequence[str]) -> int:
    """Return the side in pixels of the images that call-strings for photographs make.

    >>> size_of(["resized_crop(size=32)", "flip"])
    32
    """
    size: int = PHOTO_AUGMENTATIONS.parse(calls[0])[1]["size"]
    return size


def training(calls: Sequence[str]) -> ToPixels:
    """Return the transform of a training image: uint8 [size, size, 3].

    Raises:
        UserError: a call-string is malformed or unknown, or the first is not `resized_crop`.
    """
    if not for_photos(calls):
        raise UserError(f"augmentations {list(calls)}: of images in files the first must be resized_crop")
    return cast(ToPixels, v2.Compose([v2.RGB(), *map(PHOTO_AUGMENTATIONS.make, calls), pixels]))


def evaluation(calls: Sequence[str]) -> ToPixels:
    """Return the transform of an evaluated image: resize to 256/224 of the training size, crop the centre.

    >>> tuple(evaluation(["resized_crop(size=32)"])(Image.new("L", (50, 40))).shape)
    (32, 32, 3)
    """
    size = size_of(calls)
    shorter = round(size * 256 / 224)
    return cast(ToPixels, v2.Compose([v2.RGB(), v2.Resize(shorter, antialias=True), v2.CenterCrop(size), pixels]))


def pixels(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [H, W, 3]."""
    return torch.from_numpy(np.asarray(image).copy())
