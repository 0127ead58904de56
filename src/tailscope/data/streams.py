"""Labelled images that are decoded when asked for: what does not fit, or need not lie, in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tailscope.data.imageset import ImageSet
from tailscope.data.pixels import read_image
from tailscope.errors import plain_name

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class ImageStream(Protocol):
    """N labelled images with a name each. `image` may run in a worker process.

    Attributes:
        name: the data set's name.
        labels: int64 [N], 0 to C-1.
        class_names: one name a class.
        named: whether the class names are names even where they look like 0 to C-1; else those are numbers.
        ids: text [N], different for different images of the data set.
        notes: what a reader of results must know of where the images come from, such as what was left out.
    """

    @property
    def name(self) -> str:
        """The data set's name."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels [N]."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""

    @property
    def named(self) -> bool:
        """Whether the classes have names."""

    @property
    def ids(self) -> Sequence[str]:
        """One name an image."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for people."""

    def take(self, indices: npt.NDArray[np.int64]) -> "ImageStream":
        """Return the images at `indices`, in that order; class names stay."""

    def image(self, row: int) -> Image.Image:
        """Decode an image; raises `ImageError` where that fails."""

    def where(self, row: int) -> str:
        """Say where the image comes from, such as a line of a list file."""

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) that changes when the images do."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files under one root.

    Attributes:
        name: the data set's name.
        root: the directory that `paths` start from.
        paths: relative, with `/`, as the system spells them: bytes that are no UTF-8 are surrogates.
        labels: int64 [N], 0 to C-1.
        class_names: one name a class.
        list_file: the list that names the images, if a list does.
        lines: the line of each image there, counted from 1.
        notes: what was left out, and what else a reader of results must know; lines for people.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    list_file: Path | None = None
    lines: npt.NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def named(self) -> bool:
        """Folders are names, though they may be called 0, 1, ...; in lists these are numbers."""
        return self.list_file is None

    @cached_property
    def ids(self) -> Sequence[str]:
        """The relative paths, as text that any file can hold."""
        return tuple(plain_name(path) for path in self.paths)

    def counts(self) -> list[int]:
        """Return the number of images of each class."""
        return [int(n) for n in np.bincount(self.labels, minlength=len(self.class_names))]

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "ImageFiles":
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
        digest = hashlib.sha256(repr((self.paths, self.class_names)).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(np.array([self._size(path) for path in self.paths], dtype="<i8").tobytes())
        return digest.hexdigest()

    def _size(self, path: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except (OSError, ValueError):
            return -1


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """A split of an `ImageSet` as a stream; row i of split "train" has the id "train:i"."""

    name: str
    images: ImageSet
    ids: tuple[str, ...]
    notes: tuple[str, ...] = ()
    named = False

    @classmethod
    def of(cls, name: str, split: str, images: ImageSet) -> "MemoryImages":
        """Name the rows of a split by their numbers."""
        return cls(name, images, tuple(f"{split}:{row}" for row in range(len(images))))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels [N]."""
        labels: npt.NDArray[np.int64] = self.images.labels.numpy()
        return labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.images.class_names

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "MemoryImages":
        """Return the images at `indices`, in that order; they keep their ids."""
        index = np.asarray(indices, dtype=np.int64)
        return replace(self, images=self.images.take(index), ids=tuple(self.ids[i] for i in index))

    def image(self, row: int) -> Image.Image:
        """Return the pixels as they are, as an image with 1 to 4 channels."""
        pixels = self.images.images[row]
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        return Image.fromarray(torch.as_tensor(pixels).numpy())

    def where(self, row: int) -> str:
        """Say the row."""
        return self.ids[row]

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the content."""
        return self.images.fingerprint()
