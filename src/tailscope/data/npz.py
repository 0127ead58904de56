"""Read an image `.npz` and check every field: what is wrong is said in one line, and nothing is ever unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailscope import array_files
from tailscope.data.imageset import ImageSet
from tailscope.errors import UserError
from tailscope.field_checks import check_labels, to_names

FIELDS = ("train_images", "train_labels", "test_images", "test_labels")


def read(path: Path) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set of an image `.npz`.

    The file holds `train_images` and `test_images` uint8 [N,H,W,C] with C from 1 to 4 (or [N,H,W], taken as C = 1),
    `train_labels` and `test_labels` integers [N], and optionally `class_names` [C].

    Raises:
        UserError: the file is missing, unreadable, or holds something else.
    """
    arrays = array_files.read(path, FIELDS, ("class_names",))
    for split in ("train", "test"):
        name = f"{split}_images"
        arrays[name] = _checked_images(f"{path}: {name}", arrays[name])
        check_labels(f"{path}: {split}_labels", arrays[f"{split}_labels"], len(arrays[name]), "images")
    shapes = [arrays[f"{split}_images"].shape[1:] for split in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise UserError(f"{path}: train_images are {shapes[0]} (height, width, channels), test_images {shapes[1]}")
    names = _class_names(path, arrays)
    _check_range(path, arrays, names)
    return _image_set(arrays, "train", names), _image_set(arrays, "test", names)


def _image_set(arrays: dict[str, npt.NDArray[Any]], split: str, names: tuple[str, ...]) -> ImageSet:
    images = torch.from_numpy(np.ascontiguousarray(arrays[f"{split}_images"]))
    return ImageSet(images, torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64)), names)


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


def _class_names(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> tuple[str, ...]:
    """Return one name a class; without `class_names` the largest training label gives the number of classes."""
    classes = int(arrays["train_labels"].max()) + 1
    if classes < 2:
        raise UserError(f"{path}: train_labels holds a single class; at least two are needed")
    if "class_names" not in arrays:
        if classes > len(arrays["train_labels"]):
            absent = int(np.setdiff1d(np.arange(len(arrays["train_labels"])), arrays["train_labels"])[0])
            raise UserError(
                f"{path}: class {absent} of 0 to {classes - 1} has no training images; number them 0 to C-1"
            )
        return tuple(str(k) for k in range(classes))
    names = to_names(str(path), arrays["class_names"])
    if len(names) < classes:
        raise UserError(f"{path}: class_names has {len(names)} names, but train_labels run to {classes - 1}")
    return names


def _check_range(path: Path, arrays: dict[str, npt.NDArray[Any]], names: tuple[str, ...]) -> None:
    for field in ("train_labels", "test_labels"):
        if int(arrays[field].max()) >= len(names):
            raise UserError(f"{path}: {field}: label {arrays[field].max()} is outside 0 to {len(names) - 1}")
    # A class without test images only has no accuracy; one without training images cannot be learnt.
    empty = np.flatnonzero(np.bincount(arrays["train_labels"].astype(np.int64), minlength=len(names)) == 0)
    if len(empty):
        k = int(empty[0])
        raise UserError(f"{path}: class {k} ({names[k]}) of 0 to {len(names) - 1} has no training images")
