"""Labelled images, wherever they lie: what all of them have in common, and those in files, decoded when asked for."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tailscope.data.pixels import read_image
from tailscope.errors import plain_name

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

Rows: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = Sequence[int] | Rows | Tensor


class Images(ABC):
    """N labelled images: a subset, a validation cut or a swap is an index operation on them.

    Attributes:
        name: the data set's name.
        labels: int64 [N], 0 to C-1.
        class_names: of the C classes, with or without images here.
        named: whether the class names are names even where they look like 0 to C-1; else those are numbers.
        ids: text [N], different for different images of the data set.
        notes: what a reader of results must know of where the images come from, such as what was left out.
    """

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    named: bool
    ids: Sequence[str]
    notes: tuple[str, ...]

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
    """Image files under one root.

    Attributes:
        root: the directory that `paths` start from.
        paths: relative, with `/`, as the system spells them: bytes that are no UTF-8 are surrogates.
        list_file: the list that names the images, if a list does.
        lines: the line of each image there, counted from 1.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    list_file: Path | None = None
    lines: Rows | None = None
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
        digest.update(np.array([self._size(path) for path in self.paths], dtype="<i8").tobytes())
        return digest.hexdigest()

    def _size(self, path: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except (OSError, ValueError):
            return -1
