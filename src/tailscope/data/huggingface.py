"""Hugging Face datasets: `hf:NAME:SPLIT`, through the optional package `datasets`."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tailscope.array_files import message_of
from tailscope.errors import UserError


@dataclass(frozen=True, eq=False)
class HuggingFaceImages:
    """A split of a Hugging Face dataset as a stream of images; row i has the id "SPLIT:i"."""

    name: str
    dataset: Any
    column: str
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    ids: tuple[str, ...]

    def take(self, indices: npt.NDArray[np.int64]) -> "HuggingFaceImages":
        """Return the images at `indices`, in that order; they keep their ids."""
        ids = tuple(self.ids[i] for i in indices)
        dataset = self.dataset.select(indices.tolist())
        return HuggingFaceImages(self.name, dataset, self.column, self.labels[indices], self.class_names, ids)

    def image(self, row: int) -> Image.Image:
        """Decode an image."""
        image = self.dataset[row][self.column]
        if not isinstance(image, Image.Image):
            raise ValueError(f"column {self.column!r} holds {type(image).__name__}, no image")
        return image

    def where(self, row: int) -> str:
        """Say the row."""
        return f"hf:{self.name} row {self.ids[row]}"

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the dataset's own fingerprint, the labels and the class names."""
        own = getattr(self.dataset, "_fingerprint", "")  # private, but what `datasets` keys its own cache by
        digest = hashlib.sha256(repr((self.name, own, self.ids, self.class_names)).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def load(source: str) -> dict[str, HuggingFaceImages]:
    """Return the one split that `NAME:SPLIT` names; its image and label columns are found by their types.

    Raises:
        UserError: `datasets` is not installed, the dataset cannot be had, or it has no image or label column.
    """
    name, _, split = source.rpartition(":")
    if not name or not split:
        raise UserError(f"hf:{source}: expected hf:NAME:SPLIT, such as hf:cifar10:train")
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{source}: needs the package datasets; pip install 'tailscope[hf]'") from None
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the package has no common base class for what may go wrong
        raise UserError(f"hf:{source}: cannot be loaded ({message_of(error)})") from None
    image_column = _column_of_type(source, dataset.features, "Image")
    label_column = _column_of_type(source, dataset.features, "ClassLabel")
    labels = np.asarray(dataset[label_column][:], dtype=np.int64)
    names = tuple(str(n) for n in dataset.features[label_column].names)
    if len(labels) == 0 or labels.min() < 0:
        raise UserError(f"hf:{source}: {'no rows' if len(labels) == 0 else 'rows without a label (-1)'}")
    ids = tuple(f"{split}:{row}" for row in range(len(labels)))
    return {split: HuggingFaceImages(name, dataset, image_column, labels, names, ids)}


def _column_of_type(source: str, features: dict[str, Any], kind: str) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if not found:
        raise UserError(f"hf:{source}: no column of type {kind}; its columns are {', '.join(features)}")
    return found[0]
