"""From a decoded image to a network's input: mode, size, normalisation."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tailscope.data.streams import PIL_MODES
from tailscope.errors import UserError


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation, in units of pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""What LDAM-DRW, MiSLAS and their descendants train with, on CIFAR-10 and CIFAR-100 alike (the deviations are not those
of the pixels)."""


@dataclass(frozen=True)
class Preprocessing:
    """Turns one image into an input [C, H, W]; goes to worker processes, so it must pickle.

    Attributes:
        transform: image in the mode of `channels` -> float32 tensor.
        channels: 1 to 4.
        one_size: whether images of different sizes come out equal.
    """

    transform: Callable[[Image.Image], Tensor]
    channels: int = 3
    one_size: bool = True

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert and transform."""
        mode = PIL_MODES[self.channels]
        return self.transform(image if image.mode == mode else image.convert(mode))

    def describe(self) -> str:
        """Return the transform's text, the same in every process."""
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform))
        return f"{PIL_MODES[self.channels]}: {' '.join(text.split())}"


@dataclass(frozen=True)
class Wishes:
    """What the user asks of the preprocessing; None leaves it to the model.

    Attributes:
        normalize: `imagenet`, `cifar`, `data`, `none`, or means and deviations such as "0.5,0.5,0.5/0.25,0.25,0.25".
        image_size: height and width of the input.
        statistics: those of the data's training split, for `data`.
    """

    normalize: str | None = None
    image_size: int | None = None
    statistics: Normalization | None = None

    def __post_init__(self) -> None:
        """Refuse a size below 1."""
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: must be at least 1")

    def normalization(self, default: Normalization | str, channels: int) -> Normalization:
        """Resolve `normalize`, or `default` where it is None.

        Raises:
            UserError: unknown, malformed, for another number of channels, or `data` without statistics.
        """
        wish = default if self.normalize is None else self.normalize
        found = wish if isinstance(wish, Normalization) else self._named(wish, channels)
        if len(found.mean) == 1:
            found = Normalization(found.mean * channels, found.std * channels)
        if len(found.mean) != channels:
            what = wish if isinstance(wish, str) else "is needed: the usual one"
            raise UserError(f"--normalize {what}: is for {len(found.mean)} channels, the model takes {channels}")
        return found

    def _named(self, wish: str, channels: int) -> Normalization:
        if wish == "data":
            if self.statistics is None:
                raise UserError(
                    "--normalize: these images are not in memory, so their own mean and deviation are not known; give "
                    "cifar, imagenet, none or MEANS/DEVIATIONS"
                )
            return self.statistics
        known = {"imagenet": IMAGENET, "cifar": CIFAR, "none": Normalization((0.0,) * channels, (1.0,) * channels)}
        if wish in known:
            return known[wish]
        try:
            mean, std = (tuple(float(v) for v in part.split(",")) for part in wish.split("/"))
        except ValueError:
            mean, std = (), ()
        if not mean or len(mean) != len(std) or not min(std) > 0:
            raise UserError(f"--normalize {wish}: known are data, cifar, imagenet, none and MEAN,...,MEAN/STD,...,STD")
        return Normalization(mean, std)


def centre_crop(
    crop: int, resize: int, interpolation: InterpolationMode, normalization: Normalization, channels: int = 3
) -> Preprocessing:
    """Resize the shorter side, crop the centre, normalise: how networks for ImageNet are evaluated."""
    return Preprocessing(
        v2.Compose([v2.Resize(resize, interpolation), v2.CenterCrop(crop), *_to_normalised(normalization)]), channels
    )


def whole_image(size: int | None, normalization: Normalization, channels: int) -> Preprocessing:
    """Normalise; resize to a square if `size` is given, else keep every image's own size."""
    resize = [] if size is None else [v2.Resize((size, size))]
    return Preprocessing(v2.Compose([*resize, *_to_normalised(normalization)]), channels, size is not None)


def _to_normalised(normalization: Normalization) -> list[v2.Transform]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(normalization.mean), list(normalization.std)),
        v2.ToPureTensor(),
    ]
