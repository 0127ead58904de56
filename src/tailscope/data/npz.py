"""Read an image `.npz` and check every field: what is wrong is said in one line, and nothing is ever unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailscope import array_files
from tailscope.data.imageset import ImageSet
from tailscope.errors import UserError
from tailscope.field_checks import Labels, check_classes, listed, positions, to_labels, to_names

FIELDS = ("train_images", "train_labels", "test_images", "test_labels")


def read(path: Path) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set of an image `.npz`.

    The file holds `train_images` and `test_images` uint8 [N,H,W,C] with C from 1 to 4 (or [N,H,W], taken as C = 1),
    `train_labels` and `test_labels` [N] or [N,1], and optionally `class_names` [C], in which the labels are positions.
    Without, a label, whole number or text, is the name of its class.

    Raises:
        UserError: the file is missing, unreadable, or holds something else.
    """
    arrays = array_files.read(path, FIELDS, ("class_names",)).arrays
    images = [_checked_images(f"{path}: {split}_images", arrays[f"{split}_images"]) for split in ("train", "test")]
    shapes = [of_split.shape[1:] for of_split in images]
    if shapes[0] != shapes[1]:
        raise UserError(f"{path}: train_images are {shapes[0]} (height, width, channels), test_images {shapes[1]}")
    train, test = (
        to_labels(f"{path}: {split}_labels", arrays[f"{split}_labels"], len(of_split), "images")
        for split, of_split in zip(("train", "test"), images, strict=True)
    )
    names, *labels = _numbered(path, train, test, arrays.get("class_names"))
    _require_training_images(path, labels[0], names)
    first, second = (
        ImageSet(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(numbers), names)
        for pixels, numbers in zip(images, labels, strict=True)
    )
    return first, second


def _checked_images(where: str, images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the images as [N,H,W,C]."""
    if images.dtype != np.uint8:
        raise UserError(f"{where} is {images.dtype}; expected uint8, 0 to 255")
    if images.ndim not in (3, 4):
        raise UserError(f"{where} has shape {images.shape}; expected [N,H,W,C]")
    images = images[..., None] if images.ndim == 3 else images
    if 0 in images.shape:
        raise UserError(f"{where} is empty: shape {images.shape}")
    if images.shape[3] > 4:
        raise UserError(f"{where} has shape {images.shape}; expected [N,H,W,C] with 1 to 4 channels last")
    return images


def _numbered(
    path: Path, train: Labels, test: Labels, listed_names: npt.NDArray[Any] | None
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the class names and the labels of both splits as positions in them."""
    if train.dtype.kind != test.dtype.kind:
        raise UserError(f"{path}: train_labels is {train.dtype}, test_labels {test.dtype}; give one kind")
    classes, codes = np.unique(train, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"{path}: train_labels holds a single class; at least two are needed")
    if listed_names is not None:
        names = to_names(str(path), listed_names)
        first, second = (
            positions(f"{path}: {split}_labels", labels, names) for split, labels in (("train", train), ("test", test))
        )
        return names, first, second
    surplus = np.setdiff1d(test, classes)
    if len(surplus):
        raise UserError(f"{path}: test_labels has {listed(surplus.astype(np.str_).tolist())}, which train_labels lacks")
    check_classes(str(path), len(classes))
    return tuple(map(str, classes)), codes.astype(np.int64), np.searchsorted(classes, test).astype(np.int64)


def _require_training_images(path: Path, labels: npt.NDArray[np.int64], names: tuple[str, ...]) -> None:
    # A class without test images only has no accuracy; one without training images cannot be learnt.
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty):
        k = int(empty[0])
        raise UserError(f"{path}: class {k} ({names[k]}) of 0 to {len(names) - 1} has no training images")
