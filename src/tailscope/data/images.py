"""Labelled images, in memory or in files, and the one decoding of them, to upright RGB pixels of 8 bits.

The rules: the orientation that EXIF gives is applied. Transparency is dropped, as torchvision's ImageFolder drops it.
Pixels of more than 8 bits are scaled to 0 ... 255 from the range of their own type: 16 bits from 65,535 (12 bits from
4,095), 32 bits from 2^31 - 1 or 2^32 - 1, floating point from 1. What does not lie in that range is refused, and so is
what would be all black, or has 16 bits of which it uses 12 or fewer.
Of several frames the first counts.
"""

import hashlib
import io
import re
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tailscope.errors import plain_name, unreadable

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
"""What is tried on a file, whatever its name: Pillow knows fifty formats, of which some start other programs."""

_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {number: Image.Transpose[turn] for number, turn in enumerate(_TURNS.split(), start=2)}
"""What turns an image upright, by EXIF's number for its orientation."""
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 258, 262, 339
_WHITE_IS_ZERO, _SIGNED, _TWELVE_BITS = 0, 2, 4095

# What Pillow's readers raise for damaged files. It documents no list: the first three are all that 170,000 damaged ones
# brought, the others are what Pillow itself expects of its readers.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageError(Exception):
    """An image that cannot be taken. The message says why in a few words, without the file's name."""


def read_image(source: Path | bytes | Image.Image) -> Image.Image:
    """Decode a file, the bytes of one, or what Pillow has opened, to an upright RGB image without metadata.

    >>> read_image(Image.fromarray(np.array([[0, 257, 65535]], np.uint16))).getpixel((1, 0))
    (1, 1, 1)

    Raises:
        ImageError: it is missing, no regular file, damaged, of another format, too large, or of pixels without a range.
    """
    problem = unreadable(source) if isinstance(source, Path) else "empty" if source == b"" else None
    if problem:
        raise ImageError(problem)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    # Pillow warns of what it gets over, page by page; what it does not get over is an exception.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(file, Image.Image):
                return _to_rgb(file)
            with Image.open(file, formats=FORMATS) as image:
                return _to_rgb(image)
        except UnidentifiedImageError:
            raise ImageError(f"cannot be decoded, no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
        except Image.DecompressionBombError:
            raise ImageError(f"too large, more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
        except _DAMAGED as error:
            text = " ".join(str(error).split())[:100]
            raise ImageError(f"cannot be decoded, {text or type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"too large, {image.width:,} x {image.height:,} pixels; at most {limit:,} are taken")
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _eight_bits(image).convert("RGB")
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # the orientation is used up: whoever looks for it again must find none
    return rgb


def _orientation(image: Image.Image) -> int:
    """Return EXIF's number for the orientation; damaged metadata cost no image."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGED:
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image in a mode of 8 bits a channel that becomes RGB without loss but for transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scaled(image))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        (least, most), *colours = (band.getextrema() for band in reversed(image.convert("RGBA").split()))
        # One plain colour without its transparency: icons and drawings are often saved so.
        if least != most and all(low == high for low, high in colours):
            raise ImageError("its picture is in its transparency alone, which is dropped; save it on a background")
    return image


def _scaled(image: Image.Image) -> npt.NDArray[np.uint8]:
    values, top = _values(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= top):
        raise ImageError(f"its pixels run from {low:g} to {high:g}, where {top:,} is white; save it with 8 bits")
    _refuse_dark(high, top)
    scaled = values.astype(np.float32)  # its 24 bits leave room for the 8 that are wanted
    scaled *= 255 / top
    np.rint(scaled, out=scaled)
    pixels = scaled.astype(np.uint8)
    return 255 - pixels if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO else pixels


def _refuse_dark(high: float, top: int) -> None:
    """Refuse what would be all black, and 8 to 12 bits in the lower part of 16, as many cameras and scanners save."""
    says = f"its pixels run to {high:,.0f}" if high >= 1 else f"its pixels run to {high:.3g}"
    if 0 < high < top / 510:
        raise ImageError(f"all black: {says}, where {top:,} is white; save it with 8 bits")
    if top == 65535 and 0 < high <= _TWELVE_BITS:
        raise ImageError(f"nearly black: {says}, 12 bits or fewer, where {top:,} is white; save it with 8 bits")


def _values(image: Image.Image) -> tuple[npt.NDArray[Any], int]:
    """Return the pixels and the value that is white. Only TIFF says more of its type than the mode does."""
    values = np.asarray(image)
    if image.mode == "F":
        return values, 1
    bits = _tag(image, _BITS, 16 if image.mode != "I" or image.format in ("PNG", "PPM") else 0)
    if image.mode != "I":
        return values, 2**bits - 1
    signed = bits == 0 or _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED
    if not signed and bits == 32:
        values = values.view(np.uint32)
    return values, 2 ** ((bits or 32) - signed) - 1


def _tag(image: Image.Image, number: int, default: int) -> int:
    found = getattr(image, "tag_v2", {}).get(number, default)
    return int(found[0] if isinstance(found, tuple) else found)


SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "held", "heldout", "holdout"),
}
"""What the folder of a split is called: in capitals too, with `-`, `_` or spaces in between, and with `set` behind."""


def split_of(name: str) -> str | None:
    """Return the split that a folder's name means, or None.

    >>> [split_of(name) for name in ("Train", "valid", "held-out", "test_set", "ant")]
    ['train', 'val', 'test', 'test', None]
    """
    word = re.sub(r"[-_ ]", "", name.casefold()).removesuffix("set")
    return next((split for split, names in SPLITS.items() if word in names), None)


PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

Rows: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = Sequence[int] | Rows | Tensor


class Images(ABC):
    """N labelled images: a subset, a validation cut or a swap is an index operation on them."""

    name: str
    """Of the data set."""
    labels: Tensor
    """Int64 [N], 0 to C-1."""
    class_names: tuple[str, ...]
    """Of the C classes, with or without images here."""
    named: bool
    """Whether the class names are names even where they look like 0 to C-1; else those are numbers."""
    ids: Sequence[str]
    """Text [N], different for different images of the data set."""
    notes: tuple[str, ...]
    """What a reader of results must know of where the images come from, such as what was left out."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images here."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return 3

    def counts(self) -> list[int]:
        """Return the number of images of each class."""
        return [int(n) for n in torch.bincount(self.labels, minlength=self.num_classes)]

    @abstractmethod
    def take(self, indices: Indices) -> "Images":
        """Return the images at `indices`, in that order; class names stay."""

    @abstractmethod
    def image(self, row: int) -> Image.Image:
        """Decode an image, perhaps in a worker process; raises `ImageError` where that fails."""

    def where(self, row: int) -> str:
        """Say where an image comes from, such as a line of a list file."""
        return self.ids[row]

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) that changes when the images do."""

    def _digest(self, *content: object) -> "hashlib._Hash":
        """Return the beginning of a fingerprint, which class names and labels are part of."""
        digest = hashlib.sha256(repr((*content, self.class_names)).encode())
        digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        return digest


@dataclass(frozen=True, eq=False)
class ImageFiles(Images):
    """Image files under one root."""

    name: str
    root: Path
    paths: tuple[str, ...]
    """Relative, with `/`, as the system spells them: bytes that are no UTF-8 are surrogates."""
    labels: Tensor
    class_names: tuple[str, ...]
    list_file: Path | None = None
    """The list that names the images, if a list does."""
    lines: Rows | None = None
    """The line of each image there, counted from 1."""
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> bool:  # type: ignore[override]
        """Folders are names, though they may be called 0, 1, ...; in lists these are numbers."""
        return self.list_file is None

    @cached_property
    def ids(self) -> Sequence[str]:  # type: ignore[override]
        """The relative paths, as text that any file can hold."""
        return tuple(plain_name(path) for path in self.paths)

    def take(self, indices: Indices) -> "ImageFiles":
        """Return the images at `indices`, in that order; class names stay."""
        index = np.asarray(indices, dtype=np.int64)
        lines = None if self.lines is None else self.lines[index]
        return replace(self, paths=tuple(self.paths[i] for i in index), labels=self.labels[index], lines=lines)

    def image(self, row: int) -> Image.Image:
        """Decode an image to upright RGB."""
        return read_image(self.root / self.paths[row])

    def where(self, row: int) -> str:
        """Say the path and, where there is one, the list file's line."""
        if self.list_file is None or self.lines is None:
            return self.ids[row]
        return f"{self.list_file.name} line {self.lines[row]}: {self.ids[row]}"

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of paths, file sizes, labels and class names; pixels are not read."""
        digest = self._digest(self.paths)
        digest.update(np.array([_size(self.root / path) for path in self.paths], dtype="<i8").tobytes())
        return digest.hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return -1


@dataclass(frozen=True, eq=False)
class ImageSet(Images):
    """Images with a label each, as tensors: uint8 [N, H, W, C] and int64 [N].

    >>> digits = ImageSet(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1, 1]), ("zero", "one"))
    >>> len(digits), digits.num_classes, digits.counts(), digits.take([2]).labels.tolist()
    (3, 2, [1, 2], [1])
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "images in memory"
    ids: tuple[str, ...] = ()
    named = False
    notes = ()

    def __post_init__(self) -> None:
        """Refuse tensors that are not what the attributes promise (a mistake of the calling code)."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N,H,W,C], not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [N], not {self.labels.dtype} {tuple(self.labels.shape)}")

    def of_split(self, name: str, split: str) -> "ImageSet":
        """Return the images as the split of a named data set: row i of split "train" has the id "train:i"."""
        return replace(self, name=name, ids=tuple(f"{split}:{row}" for row in range(len(self))))

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.images.shape[-1]

    def take(self, indices: Indices) -> "ImageSet":
        """Return the images at `indices`, in that order; class names stay."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        ids = tuple(self.ids[i] for i in index.tolist()) if self.ids else ()
        return replace(self, images=self.images[index], labels=self.labels[index], ids=ids)

    def image(self, row: int) -> Image.Image:
        """Return the pixels as they are, as an image with 1 to 4 channels."""
        pixels = self.images[row].numpy()
        return Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of pixels, labels, shape and class names."""
        digest = self._digest(tuple(self.images.shape))
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()
