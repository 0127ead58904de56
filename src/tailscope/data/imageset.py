"""Labelled images in memory: a subset, a validation cut or a swap is an index operation on an `ImageSet`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with a label each.

    Attributes:
        images: uint8 [N, H, W, C], 0 to 255.
        labels: int64 [N], 0 to num_classes - 1.
        class_names: one name a class.

    >>> digits = ImageSet(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1, 1]), ("zero", "one"))
    >>> len(digits), digits.num_classes, digits.counts(), digits.take([2]).labels.tolist()
    (3, 2, [1, 2], [1])
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse tensors that are not what the attributes promise (a mistake of the calling code)."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N,H,W,C], not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [N], not {self.labels.dtype} {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images here."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.images.shape[-1]

    def counts(self) -> list[int]:
        """Return the number of images of each class."""
        return [int(n) for n in torch.bincount(self.labels, minlength=self.num_classes)]

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64] | Tensor) -> "ImageSet":
        """Return the images at `indices`, in that order; class names stay."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return ImageSet(self.images[index], self.labels[index], self.class_names)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of pixels, labels, shape and class names; computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        digest.update(self.labels.cpu().numpy().astype("<i8").data)
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()
