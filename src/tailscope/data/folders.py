"""Image folders: `folder:PATH`, where each class is a sub-folder.

Either PATH itself holds the class folders (one split, "all"), or PATH holds `train/` and nothing but `train/`, `val/`
and `test/`, and those hold the class folders. Files below a class folder count at any depth; the suffix makes an image.
"""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from tailscope.data.streams import ImageFiles
from tailscope.errors import UserError
from tailscope.field_checks import listed

SPLITS = ("train", "val", "test")


def load(root: Path) -> dict[str, ImageFiles]:
    """Return the splits of an image folder: {"all"}, or those of "train", "val" and "test" that are there.

    Classes are the folders of `train/` (or of PATH) in alphabetical order. A class may lack images in `val/` and
    `test/`; ids are paths relative to PATH.

    Raises:
        UserError: the folder is not there or holds no class folders, a class has no images to train on, or a split has
            a class that `train/` has not.
    """
    if not root.is_dir():
        raise UserError(f"folder:{root}: no such directory")
    inside = _folders(root)
    if "train" in inside and set(inside) <= set(SPLITS):
        classes = _folders(root / "train")
        splits = {split: _split(root, split, classes) for split in SPLITS if split in inside}
    else:
        splits = {"all": _split(root, "", inside)}
    first = next(iter(splits.values()))
    empty = [first.class_names[k] for k, n in enumerate(first.counts()) if n == 0]
    if empty:
        raise UserError(f"folder:{root}: no images ({', '.join(IMG_EXTENSIONS)}) in class folder {listed(empty)}")
    return splits


def _folders(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _split(root: Path, split: str, classes: list[str]) -> ImageFiles:
    directory = root / split
    if not classes:
        raise UserError(f"folder:{directory}: no class folders in it")
    present = _folders(directory)
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise UserError(f"folder:{directory}: has class {listed(unknown)}, which train/ has not")
    index = {name: k for k, name in enumerate(classes) if name in present}
    found = make_dataset(directory, index, extensions=IMG_EXTENSIONS, allow_empty=True)
    paths = tuple(os.path.relpath(path, root).replace(os.sep, "/") for path, _ in found)
    labels = np.array([label for _, label in found], dtype=np.int64)
    return ImageFiles(root.resolve().name, root, paths, labels, tuple(classes))
