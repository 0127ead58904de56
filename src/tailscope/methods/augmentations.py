"""Augmentations: of whole batches of images in memory, on their device, and of single photographs, in workers.

An augmentation of a batch takes (images uint8 [n, H, W, C], generator) and returns images of the same shape. It draws
on the generator's device, in training the CPU, so that a seed means the same everywhere, and moves the draws to the
images without waiting. Every image has draws of its own; nothing loops over images. What an image draws depends on its
place in the call, so a run that is to be repeated must cut its data into the same calls. Normalisation is not an
augmentation.

An augmentation of photographs takes an RGB image of Pillow and returns one. It draws from torch's default generator,
which `seeds.keyed` seeds for every image, so that neither the process nor the batch that an image falls into changes
the draws.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide

from tailscope.errors import UserError, unknown
from tailscope.methods import AUGMENTATIONS, PHOTO_AUGMENTATIONS, for_photos

Augmentation: TypeAlias = Callable[[Tensor, Generator], Tensor]


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

    def augment(images: Tensor, generator: Generator) -> Tensor:
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

    def augment(images: Tensor, generator: Generator) -> Tensor:
        flipped = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        flipped = flipped.to(images.device, non_blocking=True)
        return torch.where(flipped[:, None, None, None], images.flip(2), images)

    return augment


@AUGMENTATIONS.register("cutout")
def cutout(share: float = 0.5, fill: int = 0) -> Augmentation:
    """Paint over a square whose centre is any pixel, cut off at the borders (DeVries and Taylor 2017).

    Args:
        share: side of the square, as a share of the images' shorter side: a half is the 16 pixels that are used for
            32 x 32 images. An odd side is one pixel shorter.
        fill: value of the painted pixels, 0 to 255. The paper paints with the mean of all pixels; code for long-tailed
            data that paints before the images are normalised (Ren et al. 2020) with black, which is 0.

    Raises:
        UserError: `share` is outside (0, 1], or `fill` no pixel's value.
    """
    if not 0 < share <= 1 or not 0 <= fill <= 255:
        raise UserError(f"cutout(share={share}, fill={fill}): share must lie in (0, 1] and fill in 0 ... 255")

    def augment(images: Tensor, generator: Generator) -> Tensor:
        sides, half = images.shape[1:3], max(1, round(share * min(images.shape[1:3])) // 2)
        inside = []
        for side in sides:
            centre = torch.randint(side, (len(images), 1), generator=generator, device=generator.device)
            distance = torch.arange(side, device=generator.device) - centre
            inside.append(((distance >= -half) & (distance < half)).to(images.device, non_blocking=True))
        square = inside[0][:, :, None, None] & inside[1][:, None, :, None]
        return images.masked_fill(square, fill)

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

    def augment(images: Tensor, generator: Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment


class Choices(NamedTuple):
    """What happens to each of n images, in two steps one after the other."""

    sub_policy: Tensor  # int64 [n]
    applied: Tensor  # bool [n, 2]: is the step's operation applied
    negative: Tensor  # bool [n, 2]: is its magnitude negated, where the operation has a sign


class _Operation(NamedTuple):
    """One kernel call's settings; the bin is None for an operation without a magnitude."""

    name: str
    bin: int | None
    negative: bool


class _Operations:
    """Operations of one of torchvision's transforms of images, with a choice of its own for every image.

    torchvision's transforms draw once a call, so a batch would share one draw. Here images with the same operation,
    magnitude and sign go through torchvision's kernel together; the pixels are those that it gives each image alone.
    """

    def __init__(self, reference: Any, bins: int) -> None:
        """Take the operations and kernels of `reference`, whose magnitudes come in `bins`."""
        self.reference, self._bins = reference, bins
        self.known: list[_Operation] = []

    def index(self, name: str, magnitude_bin: int | None, *, negative: bool) -> int:
        """Return the number of an operation, which is added where it is new; a sign counts only where it has one."""
        operation = _Operation(name, magnitude_bin, negative and self.reference._AUGMENTATION_SPACE[name][1])
        if operation not in self.known:
            self.known.append(operation)
        return self.known.index(operation)

    def apply(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Return images [n, H, W, C] after the operations of `chosen` [n, steps], one after the other; -1 is none.

        What is chosen may lie on another device.
        """
        # The kernels are vectorised for, and their rounding is defined by, contiguous channels-first images.
        out = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        for step in chosen.unbind(1):
            sizes = torch.bincount(step + 1, minlength=len(self.known) + 1).tolist()
            groups = torch.split(torch.argsort(step, stable=True).to(images.device, non_blocking=True), sizes)
            for operation, members in zip(self.known, groups[1:], strict=True):
                if len(members):
                    out.index_copy_(0, members, self._transform(out.index_select(0, members), operation))
        return out.permute(0, 2, 3, 1).contiguous()

    def _transform(self, images: Tensor, operation: _Operation) -> Tensor:
        """Apply one operation to images [n, C, H, W] with torchvision's magnitudes for this size and its kernel."""
        magnitudes = self.reference._AUGMENTATION_SPACE[operation.name][0](self._bins, *images.shape[-2:])
        magnitude = 0.0 if operation.bin is None else float(magnitudes[operation.bin])
        magnitude = -magnitude if operation.negative else magnitude
        result: Tensor = self.reference._apply_image_or_video_transform(
            images, operation.name, magnitude, self.reference.interpolation, self.reference._fill
        )
        return result


class BatchedAutoAugment:
    """AutoAugment of uint8 images [n, H, W, C], C = 1 or 3, with draws of its own for every image."""

    def __init__(self, policy: AutoAugmentPolicy, excluded: frozenset[str], fill: int | None = None) -> None:
        self._operations = _Operations(AutoAugment(policy, fill=fill), bins=10)
        sub_policies = self._operations.reference._policies
        self._probability = torch.tensor([[p for _, p, _ in steps] for steps in sub_policies])
        self._index = torch.full((len(sub_policies), 2, 2), -1)  # of an operation, by sub-policy, step and sign
        for row, steps in enumerate(sub_policies):
            for step, (name, _, magnitude_bin) in enumerate(steps):
                for negative in (0, 1) if name.lower() not in excluded else ():
                    at = self._operations.index(name, magnitude_bin, negative=bool(negative))
                    self._index[row, step, negative] = at

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Draw and apply; the images are left as they are and a new tensor is returned."""
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, n: int, generator: Generator) -> Choices:
        """Draw sub-policies, uniformly, and for both steps whether it is applied, and its sign."""
        device = generator.device
        sub_policy = torch.randint(len(self._probability), (n,), generator=generator, device=device)
        uniform = torch.rand(2, n, 2, generator=generator, device=device)
        return Choices(sub_policy, uniform[0] < self._probability.to(device)[sub_policy], uniform[1] < 0.5)

    def apply(self, images: Tensor, choices: Choices) -> Tensor:
        """Return the images after both steps of their choices, which may lie on another device."""
        index = self._index.to(choices.sub_policy.device)
        steps = torch.arange(2, device=index.device)
        chosen = index[choices.sub_policy[:, None], steps, choices.negative.long()]
        return self._operations.apply(images, torch.where(choices.applied, chosen, -1))


class BatchedRandomOperations:
    """`steps` operations, one after the other, each drawn uniformly with a magnitude's bin and a sign."""

    def __init__(self, reference: RandAugment | TrivialAugmentWide, steps: int, bins: Sequence[int]) -> None:
        """Take the operations of `reference`, each with one of the `bins` of its magnitudes."""
        self._operations, self._steps = _Operations(reference, reference.num_magnitude_bins), steps
        space = reference._AUGMENTATION_SPACE
        self._index = torch.zeros(len(space), len(bins), 2, dtype=torch.int64)  # by operation, bin and sign
        for row, (name, (magnitudes, _)) in enumerate(space.items()):
            graded = magnitudes(reference.num_magnitude_bins, 1, 1) is not None
            for column, magnitude_bin in enumerate(bins):
                for negative in (0, 1):
                    at = self._operations.index(name, magnitude_bin if graded else None, negative=bool(negative))
                    self._index[row, column, negative] = at

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draw an operation, a bin and a sign for each of n images and steps: their places, int64 [3, n, steps]."""
        shape = {"size": (n, self._steps), "generator": generator, "device": generator.device}
        return torch.stack([torch.randint(high, **shape) for high in self._index.shape])  # type: ignore[call-overload]

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return images [n, H, W, C] after what was drawn for them."""
        return self._operations.apply(images, self._index.to(drawn.device)[tuple(drawn)])

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Draw and apply; the images are left as they are and a new tensor is returned."""
        return self.apply(images, self.draw(len(images), generator))


@AUGMENTATIONS.register("autoaugment")
def autoaugment(policy: str = "cifar10", exclude: Sequence[str] = ()) -> BatchedAutoAugment:
    """AutoAugment with a draw for every image (Cubuk et al. 2019; torchvision's policies).

    No policy flips images, so only `flip` mirrors them. Some change what a digit or a letter is: `exclude=("invert",)`
    keeps dark and light apart. By torchvision's rule Equalize leaves images of fewer than 256 pixels as they are.

    Args:
        policy: "cifar10", "imagenet" or "svhn".
        exclude: operations that do nothing where the policy names them, by torchvision's names in any case, such as
            "invert", "rotate", "shearx"; all else keeps its probability.

    Raises:
        UserError: an unknown policy or operation.
    """
    policies = {p.value: p for p in AutoAugmentPolicy}
    if policy not in policies:
        raise UserError(f"autoaugment(): {unknown('policy', policy, policies)}")
    known = [name.lower() for name in AutoAugment._AUGMENTATION_SPACE]
    if isinstance(exclude, str):
        raise UserError(f"autoaugment(exclude={exclude!r}): give a tuple of operations, like ('invert',)")
    for name in exclude:
        if str(name).lower() not in known:
            raise UserError(f"autoaugment(exclude={exclude!r}): {unknown('operation', str(name), known)}")
    return BatchedAutoAugment(policies[policy], frozenset(str(name).lower() for name in exclude))


@AUGMENTATIONS.register("autoaugment_filled")
def autoaugment_filled(fill: int = 128) -> BatchedAutoAugment:
    """AutoAugment's CIFAR-10 policy where shifts and rotations uncover grey, not black.

    With `cutout` after it, what the code of Balanced Softmax (Ren et al. 2020) trains long-tailed CIFAR with: it fills
    with (128, 128, 128). Its operations are Pillow's; these are torchvision's, which round differently.

    Raises:
        UserError: `fill` is no pixel's value.
    """
    if not 0 <= fill <= 255:
        raise UserError(f"autoaugment_filled(fill={fill}): must lie in 0 ... 255")
    return BatchedAutoAugment(AutoAugmentPolicy.CIFAR10, frozenset(), fill)


@AUGMENTATIONS.register("rand_augment")
def rand_augment(num_ops: int = 2, magnitude: int = 9) -> BatchedRandomOperations:
    """RandAugment with draws for every image (Cubuk et al. 2020; torchvision's operations, 31 magnitudes).

    Raises:
        UserError: `num_ops` is not positive, or `magnitude` outside 0 ... 30.
    """
    _check_rand_augment(num_ops, magnitude)
    return BatchedRandomOperations(RandAugment(num_ops, magnitude), num_ops, [magnitude])


@AUGMENTATIONS.register("trivial_augment")
def trivial_augment() -> BatchedRandomOperations:
    """TrivialAugment, wide: one operation of any magnitude, drawn for every image (Müller and Hutter 2021)."""
    return BatchedRandomOperations(TrivialAugmentWide(), 1, range(31))


def _check_rand_augment(num_ops: int, magnitude: int) -> None:
    if num_ops < 1 or not 0 <= magnitude <= 30:
        raise UserError(
            f"rand_augment(num_ops={num_ops}, magnitude={magnitude}): num_ops must be positive and magnitude lie in"
            " 0 ... 30"
        )


Photo: TypeAlias = Callable[[Image.Image], Image.Image]
ToPixels: TypeAlias = Callable[[Image.Image], Tensor]


@PHOTO_AUGMENTATIONS.register("resized_crop")
def resized_crop(size: int = 224) -> Photo:
    """Random crop of 8 to 100 % of the area, aspect 3/4 to 4/3, resized to a square (Szegedy et al. 2015).

    Raises:
        UserError: `size` is below 8.
    """
    if size < 8:
        raise UserError(f"resized_crop(size={size}): size must be at least 8")
    return cast(Photo, v2.RandomResizedCrop(size, antialias=True))


@PHOTO_AUGMENTATIONS.register("flip")
def flip_photos() -> Photo:
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
    return cast(Photo, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET))


@PHOTO_AUGMENTATIONS.register("rand_augment")
def rand_augment_photos(num_ops: int = 2, magnitude: int = 9) -> Photo:
    """RandAugment (Cubuk et al. 2020; torchvision's operations, 31 magnitudes).

    Raises:
        UserError: `num_ops` is not positive, or `magnitude` outside 0 ... 30.
    """
    _check_rand_augment(num_ops, magnitude)
    return cast(Photo, v2.RandAugment(num_ops, magnitude))


@PHOTO_AUGMENTATIONS.register("trivial_augment")
def trivial_augment_photos() -> Photo:
    """TrivialAugment, wide: one operation of any magnitude (Müller and Hutter 2021)."""
    return cast(Photo, v2.TrivialAugmentWide())


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
    return cast(ToPixels, v2.Compose([v2.RGB(), *map(PHOTO_AUGMENTATIONS.make, calls), _pixels]))


def evaluation(calls: Sequence[str]) -> ToPixels:
    """Return the transform of an evaluated image: resize to 256/224 of the training size, crop the centre.

    >>> tuple(evaluation(["resized_crop(size=32)"])(Image.new("L", (50, 40))).shape)
    (32, 32, 3)
    """
    size = size_of(calls)
    shorter = round(size * 256 / 224)
    return cast(ToPixels, v2.Compose([v2.RGB(), v2.Resize(shorter, antialias=True), v2.CenterCrop(size), _pixels]))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy())
