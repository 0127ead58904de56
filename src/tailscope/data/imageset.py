"""Labelled images in memory."""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from tailscope.data.streams import Images, Indices


@dataclass(frozen=True, eq=False)
class ImageSet(Images):
    """Images with a label each, as tensors.

    Attributes:
        images: uint8 [N, H, W, C], 0 to 255.
        labels: int64 [N], 0 to num_classes - 1.
        class_names: one name a class.
        name, ids: where a data set's source names them.

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
