"""From a decoded image to a network's input: mode, size, normalisation; and the one net under what is not ours.

A user's module, factory, transform and network may fail in any way. Everything else in the project catches a short list
of documented exceptions; in `errors.foreign_code`, and only there, all of them become one line that says what failed
and where in the user's own file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tailscope.data.images import PIL_MODES
from tailscope.errors import UserError, foreign_code, unknown

SMALL = 128
"""Up to this side, images that are all of one size are small ones, which networks for them take as they are."""


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
        owner: the factory that brought a transform of its own, which may then fail in any way; else empty.
    """

    transform: Callable[[Image.Image], Any]
    channels: int = 3
    one_size: bool = True
    owner: str = ""

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert and transform; a user's transform that fails, or gives no tensor of floats [C, H, W], is one line."""
        mode = PIL_MODES[self.channels]
        image = image if image.mode == mode else image.convert(mode)
        if not self.owner:
            made: Tensor = self.transform(image)
            return made
        with foreign_code(f"{self.owner}: its transform fails on an image of {image.width} x {image.height} pixels"):
            return _as_input(self.owner, self.transform(image))

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.owner}: its transform" if self.owner else "the preprocessing"

    def describe(self) -> str:
        """Return the transform's text, the same in every process."""
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform))
        return f"{PIL_MODES[self.channels]}: {' '.join(text.split())}"

    def in_words(self) -> str:
        """Return the transform for people: what it does to sizes and values, other steps as they call themselves.

        >>> whole_image(Wishes(image_size=32), Normalization((0.5,), (0.25,)), 1).in_words()
        'L, size 32 x 32, mean 0.5, deviation 0.25'
        """
        if self.owner:
            return f"the transform of {self.owner}"
        steps = getattr(self.transform, "transforms", [self.transform])
        return ", ".join([PIL_MODES[self.channels], *(said for step in steps if (said := _in_words(step)))])


def _in_words(step: Any) -> str:
    kind = type(step).__name__
    if kind in ("Resize", "CenterCrop"):
        sizes = [step.size] if isinstance(step.size, int) else list(step.size)
        what = "centre" if kind == "CenterCrop" else "size" if len(sizes) > 1 else "shorter side"
        return f"{what} {' x '.join(map(str, sizes))}"
    if kind == "Normalize":
        mean, std = (", ".join(f"{float(value):.4g}" for value in values) for values in (step.mean, step.std))
        return f"mean {mean}, deviation {std}"
    return "" if kind in ("ToImage", "ToDtype", "ToPureTensor", "ToTensor", "MaybeToTensor") else type(step).__name__


def _as_input(owner: str, made: Any) -> Tensor:
    """Return what a user's transform made as a plain float32 tensor [C, H, W]."""
    if not isinstance(made, Tensor):
        what = f"a {type(made).__name__}"
    elif made.ndim != 3 or 0 in made.shape or made.is_meta:
        what = f"a {'meta ' if made.is_meta else ''}tensor {list(made.shape)}"
    elif not made.is_floating_point():
        what = f"a tensor of {str(made.dtype).removeprefix('torch.')}"
    else:
        return made.detach().as_subclass(Tensor).to("cpu", torch.float32)
    raise UserError(f"{owner}: its transform returns {what}; it must return a tensor of floats [C, H, W] for an image")


@dataclass(frozen=True)
class Wishes:
    """What the user asks of the preprocessing, and what the data say; None leaves it to the model.

    Attributes:
        normalize: `imagenet`, `cifar`, `data`, `none`, or means and deviations such as "0.5,0.5,0.5/0.25,0.25,0.25".
        image_size: height and width of the input.
        resize: what the shorter side becomes before the centre is cropped, or `none`: images keep their own size.
        statistics: those of the data's training split, for `data`.
        data_size: height and width of the data's images where all have the same.
    """

    normalize: str | None = None
    image_size: int | None = None
    resize: int | str | None = None
    statistics: Normalization | None = None
    data_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse a size below 1, or a crop that is larger than what it is cropped from."""
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: must be at least 1")
        if self.resize is None or self.resize == "none":
            return
        if not str(self.resize).isdecimal() or int(self.resize) < 1:
            raise UserError(f"--resize {self.resize}: expected the pixels of the shorter side, or none")
        object.__setattr__(self, "resize", int(self.resize))

    @property
    def given(self) -> list[str]:
        """The options of these that the user gave, as on the command line."""
        options = {"--normalize": self.normalize, "--image-size": self.image_size, "--resize": self.resize}
        return [f"{option} {value}" for option, value in options.items() if value is not None]

    @property
    def mend(self) -> str:
        """What to do about a model that fails on its input, which is not what was done already."""
        used = [option for option in self.given if not option.startswith("--normalize")]
        return f"leave out {' and '.join(used)}" if used else "try --image-size"

    def sizes(self, crop: int | None, resize: int | None) -> tuple[int | None, int | None]:
        """Return (crop, resize) as wished; a model's own are the arguments, None for as the images are.

        >>> [w.sizes(224, 232) for w in (Wishes(resize=256), Wishes(image_size=112), Wishes(resize="none"))]
        [(224, 256), (112, 116), (None, None)]
        """
        if self.resize == "none":
            return self.image_size, None
        if self.resize is not None:
            shorter = int(self.resize)
            crop = self.image_size or (shorter if crop is None else crop)
            if crop > shorter:
                mend = "make it smaller" if self.image_size else f"give --image-size {shorter} or less"
                raise UserError(f"--resize {shorter}: the crop of {crop} pixels is larger; {mend}")
            return crop, shorter
        if self.image_size is None or crop is None or resize is None:
            return self.image_size or crop, self.image_size or resize
        return self.image_size, round(resize / crop * self.image_size)

    def normalization(self, default: Normalization | str, channels: int) -> Normalization:
        """Resolve `normalize`, or `default` where it is None."""
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
                why = "these images are not in memory, so their own mean and deviation are not known"
                raise UserError(f"--normalize: {why}; give cifar, imagenet, none or MEANS/DEVIATIONS")
            return self.statistics
        known = {"imagenet": IMAGENET, "cifar": CIFAR, "none": Normalization((0.0,) * channels, (1.0,) * channels)}
        if wish in known:
            return known[wish]
        try:
            mean, std = (tuple(float(v) for v in part.split(",")) for part in wish.split("/"))
        except ValueError:
            mean, std = (), ()
        if not mean or len(mean) != len(std) or not min(std) > 0:
            raise unknown("--normalize", wish, ["data", *known, "MEAN,...,MEAN/STD,...,STD"])
        return Normalization(mean, std)


def centre_crop(
    crop: int | None,
    resize: int | None,
    interpolation: InterpolationMode,
    normalization: Normalization,
    channels: int = 3,
) -> Preprocessing:
    """Resize the shorter side, crop the centre, normalise: how networks for ImageNet are evaluated.

    None leaves a step out; without a crop, images keep sizes of their own.
    """
    steps: list[v2.Transform] = [] if resize is None else [v2.Resize(resize, interpolation)]
    steps += [] if crop is None else [v2.CenterCrop(crop)]
    return Preprocessing(v2.Compose([*steps, *_to_normalised(normalization)]), channels, crop is not None)


def whole_image(wishes: Wishes, normalization: Normalization, channels: int) -> Preprocessing:
    """Normalise; resize to a square of `--image-size`, or as `--resize` says, else keep every image's own size."""
    if wishes.resize is not None:
        return centre_crop(*wishes.sizes(None, None), InterpolationMode.BILINEAR, normalization, channels)
    size = wishes.image_size
    resize = [] if size is None else [v2.Resize((size, size))]
    return Preprocessing(v2.Compose([*resize, *_to_normalised(normalization)]), channels, size is not None)


def by_imagenet(wishes: Wishes, channels: int) -> Preprocessing:
    """Return how networks for ImageNet see images, where nothing better is known: 256, then the centre 224."""
    normalization = wishes.normalization(IMAGENET, channels)
    crop, resize = wishes.sizes(224, 256)
    return centre_crop(crop, resize, InterpolationMode.BILINEAR, normalization, channels)


def by_data(wishes: Wishes, channels: int) -> tuple[Preprocessing, str]:
    """Return how a network is fed of which nothing is known, by the size of the data, and that in words.

    Small images, all of one size, stay as they are: a network for 32 pixels that is shown 224 gives wrong numbers
    without a word. All others go the way of ImageNet's.
    """
    size, crop, resize = wishes.data_size, wishes.image_size, wishes.resize
    if size is not None and max(size) <= SMALL and crop is None and resize in (None, "none"):
        default: Normalization | str = IMAGENET if wishes.statistics is None else "data"
        name = "ImageNet" if wishes.statistics is None else "the data"
        if size == (32, 32) and channels == 3:
            default, name = CIFAR, "CIFAR"
        made = Preprocessing(v2.Compose(_to_normalised(wishes.normalization(default, channels))), channels)
        seen = f"stay {size[1]} x {size[0]} pixels, as all are,"
    else:
        made, name = by_imagenet(wishes, channels), "ImageNet"
        crop, resize = wishes.sizes(224, 256)
        seen = f"are resized to {resize} and cropped to {crop}" if resize else f"are cropped to {crop}, not resized"
        seen = seen if crop else "keep their sizes"
    by = f"by --normalize {wishes.normalize}" if wishes.normalize else f"with the mean and deviation of {name}"
    return made, f"the images {seen} and are normalised {by}"


def _to_normalised(normalization: Normalization) -> list[v2.Transform]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(normalization.mean), list(normalization.std)),
        v2.ToPureTensor(),
    ]
