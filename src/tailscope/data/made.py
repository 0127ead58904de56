"""Photographs that are made, not taken: for timing, where the real ones are too many, or not at hand.

They are as large as those of ImageNet, in pixels and in bytes, and as dear to decode: a coarse pattern that a class
shares, one of the image's own, and grain. A network can tell the classes apart. Nothing is learnt from them about real
photographs but how long these take.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tailscope.data.images import Images, Indices, read_image
from tailscope.data.sources import ImageData
from tailscope.seeds import numpy_stream

SIZES = ((500, 375), (500, 375), (375, 500), (500, 333))
"""Width and height in pixels: most of ImageNet's photographs are 500 wide or high."""
_PATTERN = (6, 8, 3)
_GRAINS, _QUALITIES = (6.0, 10.0, 14.0, 18.0), (85, 88, 90, 92)
"""Standard deviations of the grain, in grey levels, and JPEG's qualities: together they give 50 to 110 kB."""
_TILE = 800
_KEPT = 32
"""How many photographs stand for all those that are not at hand."""


def photograph(class_number: int, number: int, seed: int = 0) -> bytes:
    """Return a JPEG of about 500 x 375 pixels and 50 to 110 kB, a function of its arguments alone.

    >>> with Image.open(io.BytesIO(photograph(3, 0))) as image:
    ...     image.format, max(image.size)
    ('JPEG', 500)
    >>> photograph(3, 0) == photograph(3, 0), photograph(3, 0) == photograph(3, 1)
    (True, False)
    """
    stream = numpy_stream(seed, "made", class_number, number)
    width, height = SIZES[int(stream.integers(len(SIZES)))]
    own = stream.integers(0, 256, _PATTERN, dtype=np.uint8)
    coarse = ((_pattern(class_number).astype(np.uint16) * 2 + own) // 3).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = _grain()[int(stream.integers(len(_GRAINS)))]
    x, y = (int(stream.integers(_TILE - side)) for side in (width, height))
    pixels = np.clip(smooth + grain[y : y + height, x : x + width], 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITIES[int(stream.integers(len(_QUALITIES)))])
    return file.getvalue()


@cache
def _grain() -> list[npt.NDArray[np.int16]]:
    normal = numpy_stream(0, "made", "grain").standard_normal((_TILE, _TILE, 1), dtype=np.float32)
    return [np.rint(normal * deviation).astype(np.int16) for deviation in _GRAINS]


@cache
def _pattern(class_number: int) -> npt.NDArray[np.uint8]:
    return numpy_stream(0, "made", "pattern", class_number).integers(0, 256, _PATTERN, dtype=np.uint8)


def write_tree(root: Path, counts: Sequence[int], *, split: str, numbers: range | None = None) -> Iterator[int]:
    """Write ROOT/SPLIT/CLASS/NUMBER.jpg, so many of each class, where they are not there; yield the bytes of each file.

    Args:
        root: the folder that then is `folder:ROOT`.
        counts: photographs of each class.
        split: train or test; those of one split are others than those of the other.
        numbers: the classes to write; None: all. Several processes can share the work.
    """
    for k in range(len(counts)) if numbers is None else numbers:
        folder = root / split / f"n{k:05}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(counts[k]):
            file = folder / f"{i:05}.jpg"
            if not file.is_file():
                file.write_bytes(photograph(k, i, seed=int(split != "train")))
            yield file.stat().st_size


@dataclass(frozen=True, eq=False)
class PromisedImages(Images):
    """Images of which only the number in each class is known: a plan needs no more. Those it sees are made."""

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    named: bool = False
    _kept: tuple[bytes, ...] = field(default_factory=lambda: tuple(photograph(k, 0) for k in range(_KEPT)))

    @cached_property
    def ids(self) -> Sequence[str]:  # type: ignore[override]
        """Their numbers."""
        return range_of_text(len(self))

    def take(self, indices: Indices) -> "PromisedImages":
        """Return as many of their classes."""
        return replace(self, labels=self.labels[torch.as_tensor(np.asarray(indices), dtype=torch.int64)])

    def image(self, row: int) -> Image.Image:
        """Decode one of the photographs that stand for all."""
        return read_image(self._kept[row % len(self._kept)])

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of labels and class names: there is nothing else."""
        return self._digest("promised").hexdigest()


def range_of_text(length: int) -> tuple[str, ...]:
    """Return the numbers from 0 on as text."""
    return tuple(map(str, range(length)))


def promised(name: str, train: Sequence[int], test: Sequence[int]) -> ImageData:
    """Return a data set of so many images a class in its two splits, none of them at hand.

    >>> data = promised("imagenet", [3, 2], [1, 1])
    >>> data.train.counts(), data.in_memory, data.train.image(4).mode
    ([3, 2], False, 'RGB')
    """
    names = range_of_text(len(train))

    def images(counts: Sequence[int]) -> PromisedImages:
        return PromisedImages(name, torch.arange(len(names)).repeat_interleave(torch.tensor(list(counts))), names)

    return ImageData(name, images(train), images(test))
