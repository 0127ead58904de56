"""Open what `--data` names, in memory or in files: one way for every verb; and divide it for a diagnosis.

`digits`, `cifar10`, `cifar100`, `PATH.npz`, `folder:PATH`, `list:TRAIN.txt[,TEST.txt]`, `hf:NAME[:SPLIT]`.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from tailscope import seeds
from tailscope.data import folders, huggingface, subsets
from tailscope.data.images import Images, ImageSet, Rows, split_of
from tailscope.errors import UserError, expanded, guess
from tailscope.tables import files
from tailscope.tables.checks import Labels, check_classes, listed, positions, to_labels, to_names


def read(path: Path) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set of an image `.npz`; nothing in it is ever unpickled.

    The file holds `train_images` and `test_images` uint8 [N,H,W,C] with C from 1 to 4 (or [N,H,W], taken as C = 1),
    `train_labels` and `test_labels` [N] or [N,1], and optionally `class_names` [C], in which the labels are positions.
    Without, a label, whole number or text, is the name of its class.

    Raises:
        UserError: the file is missing, unreadable, or holds something else.
    """
    fields = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
    arrays = files.read(path, fields, ("class_names",)).arrays
    images = [_checked_images(f"{path}: {split}_images", arrays[f"{split}_images"]) for split in ("train", "test")]
    shapes = [of_split.shape[1:] for of_split in images]
    if shapes[0] != shapes[1]:
        raise UserError(f"{path}: train_images are {shapes[0]} (height, width, channels), test_images {shapes[1]}")
    train, test = (
        to_labels(f"{path}: {split}_labels", arrays[f"{split}_labels"], len(of_split), "images")
        for split, of_split in zip(("train", "test"), images, strict=True)
    )
    names, *labels = _numbered(path, train, test, arrays.get("class_names"))
    # A class without test images only has no accuracy; one without training images cannot be learnt.
    for k in np.flatnonzero(np.bincount(labels[0], minlength=len(names)) == 0):
        raise UserError(f"{path}: class {k} ({names[k]}) of 0 to {len(names) - 1} has no training images")
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


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set that an experiment can train on: the true training distribution, and its test split.

    `skipped` is what cannot be read and was left out, as lines for people.
    """

    name: str
    train: Images
    test: Images
    skipped: tuple[str, ...] = ()

    @property
    def in_memory(self) -> bool:
        """Whether the images are tensors; else they are decoded from files."""
        return isinstance(self.train, ImageSet)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of both splits: of pixels in memory, of relative paths and sizes of files; never of places."""
        return hashlib.sha256((self.train.fingerprint() + self.test.fingerprint()).encode()).hexdigest()

    def notes(self) -> list[str]:
        """Return what a reader of a result must know: what was left out, and how many images cannot be read."""
        found = list(dict.fromkeys((*self.train.notes, *self.test.notes)))
        return [*found, cannot_be_read(self.skipped, " and took no part")] if self.skipped else found


def cannot_be_read(images: Sequence[str], more: str = "") -> str:
    """Return a line that counts images that cannot be read and names the first of them.

    >>> cannot_be_read(["a.png (missing)"], " and took no part")
    '1 image cannot be read and took no part: a.png (missing)'
    """
    rest = f" and {len(images) - 10} more" if len(images) > 10 else ""
    plural = "image" if len(images) == 1 else "images"
    return f"{len(images)} {plural} cannot be read{more}: {'; '.join(images[:10])}{rest}"


@dataclass(frozen=True, eq=False)
class OpenedImages:
    """The splits that a source has, by name. Files are listed, not opened."""

    source: str
    name: str
    splits: Mapping[str, Images]

    @property
    def in_memory(self) -> ImageSet | None:
        """The training split where it is in memory."""
        train = self.splits.get("train")
        return train if isinstance(train, ImageSet) else None

    def split(self, name: str | None) -> tuple[str, Images]:
        """Return a split with its name, which any of `images.SPLITS` may call; None takes the only one there is.

        Raises:
            UserError: there is no such split, or None does not say which.
        """
        known = ", ".join(self.splits)
        if name is None and len(self.splits) > 1:
            raise UserError(f"{self.source} has the splits {known}; say which with --split")
        name = next(iter(self.splits)) if name is None else name
        found = name if name in self.splits else self.by_meaning.get(split_of(name) or name)
        if found is None:
            raise UserError(f"--split {name}: {self.source} has {known};{guess(name, self.splits)}".rstrip(";"))
        return found, self.splits[found]

    @property
    def by_meaning(self) -> dict[str, str]:
        """The splits' names by what they mean: `train`, `val` and `test`, or themselves."""
        return {split_of(split) or split: split for split in self.splits}

    def for_experiment(self) -> ImageData:
        """Return the splits to train on and to test on; without a test split `val` stands in, as of ImageNet.

        Raises:
            UserError: one of them is missing, or the test split has a class without training images.
        """
        by_meaning = {meaning: self.splits[split] for meaning, split in self.by_meaning.items()}
        train, test = by_meaning.get("train"), by_meaning.get("test", by_meaning.get("val"))
        if train is None or test is None:
            has = "no splits" if "all" in by_meaning else f"only {', '.join(self.splits)}"
            raise UserError(
                f"{self.source}: an experiment needs images to train on and to test on; give"
                f" {_NEEDED[self.source.partition(':')[0]]}; this has {has}"
            )
        if not isinstance(train, ImageSet):
            train, test = _with_common_classes(train, test)
        return ImageData(self.name, train, test)


_NEEDED = {
    "folder": "folder:PATH with train/ and test/ (or val/)",
    "list": "list:TRAIN.txt,TEST.txt",
    "hf": "hf:NAME with the splits train and test (or validation)",
}


def _with_common_classes(train: Images, test: Images) -> tuple[Images, Images]:
    """Leave out classes without training images, such as numbers that lists do not use, and number the rest alike."""
    names = tuple(train.class_names[k] for k in np.unique(train.labels))
    number = {name: k for k, name in enumerate(names)}
    strange = [name for k in np.unique(test.labels) if (name := test.class_names[k]) not in number]
    if strange:
        raise UserError(f"{test.name}: has class {strange[0]!r}, of which {train.name} has no image to train on")

    def renumbered(images: Images) -> Images:
        new = torch.tensor([number.get(name, -1) for name in images.class_names])
        return replace(images, labels=new[images.labels], class_names=names)  # type: ignore[type-var]

    return renumbered(train), renumbered(test)


def load(source: str | Path | ImageData, *, data_root: Path | str | None = None) -> ImageData:
    """Open a data set to run experiments on; one that is open already is returned as it is.

    >>> digits = load("digits")
    >>> tuple(digits.train.images.shape), min(digits.train.counts()), set(digits.test.counts())
    ((1297, 8, 8, 1), 124, {50})

    Raises:
        UserError: as `open_images`; or there is nothing to train on, or to test on.
    """
    if isinstance(source, ImageData):
        return source
    root = None if data_root is None else Path(data_root)
    return open_images(str(source), data_root=root).for_experiment()


def open_images(source: str, *, data_root: Path | None = None) -> OpenedImages:
    """Open a source of images.

    Args:
        source: `digits`, `cifar10`, `cifar100`; `PATH.npz` (see `read`); `folder:PATH` or
            `list:TRAIN.txt[,TEST.txt]` (see `folders`) or `hf:NAME[:SPLIT]` (see `huggingface`).
        data_root: where the images of lists lie, by default beside the list; for CIFAR, a directory with torchvision's
            official layout or `NAME.npz`, by default `$TAILSCOPE_DATA`, else `~/.cache/tailscope/data`. CIFAR that is
            missing is downloaded there by torchvision, checksums verified.

    Raises:
        UserError: unknown data set, or data that are missing, damaged or of another form.
    """
    kind, _, rest = source.partition(":")
    if kind in _IN_FILES:
        found = _IN_FILES[kind](rest, data_root)
        return OpenedImages(source, next(iter(found.values())).name, found)
    if source in _LOADERS:
        name, pair = source, _LOADERS[source](data_root)
    elif source.endswith(".npz"):
        path = expanded(source)
        name, pair = path.stem, read(path)
    else:
        folder = os.path.isdir(source)  # noqa: PTH112 -- pathlib's raises for names that cannot be
        meant = f" did you mean folder:{source}?" if folder else _meant(kind, source, rest)
        raise UserError(f"unknown data set {source!r};{meant} known: {', '.join((*sorted(_LOADERS), *_KNOWN))}")
    in_memory = zip(("train", "test"), pair, strict=True)
    return OpenedImages(source, name, {split: images.of_split(name, split) for split, images in in_memory})


def _meant(kind: str, source: str, rest: str) -> str:
    """Return the question for a source that is none: the nearest name, or the nearest kind of files."""
    return guess(kind, _IN_FILES) if rest else guess(source, _LOADERS)


def _digits(_: Path | None) -> tuple[ImageSet, ImageSet]:
    """Return scikit-learn's 8x8 digits, 50 test images a class, the rest training, both in the original order."""
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # 0 to 16 become 0 to 255
    labels = bunch.target.astype(np.int64)
    everything = ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(str(k) for k in range(10)))
    drawn = subsets.subset(labels, [50] * 10, seed=seeds.derive(0, "digits", "test"))
    test = np.sort(drawn.flat)
    return everything.take(np.setdiff1d(np.arange(len(labels)), test)), everything.take(test)


def _cifar(name: str, data_root: Path | None) -> tuple[ImageSet, ImageSet]:
    root = expanded(data_root or os.environ.get("TAILSCOPE_DATA") or "~/.cache/tailscope/data")
    if (root / f"{name}.npz").is_file():
        return read(root / f"{name}.npz")
    if data_root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such directory")
    return _official(name, root, train=True), _official(name, root, train=False)


def _official(name: str, root: Path, *, train: bool) -> ImageSet:
    """Return a split of torchvision's official CIFAR, downloaded when missing; its checksums precede any reading."""
    from torchvision import datasets  # here because it takes seconds to import, and few need it

    dataset_class = getattr(datasets, name.upper())
    try:
        dataset = dataset_class(root, train=train, download=False)
    except RuntimeError:  # torchvision's "not found or corrupted"
        try:
            dataset = dataset_class(root, train=train, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{name}: neither {name}.npz nor torchvision's intact {dataset_class.base_folder} in {root}, and the "
                f"download failed ({reason}); give --data-root DIR"
            ) from None
    labels = torch.tensor(dataset.targets, dtype=torch.int64)
    return ImageSet(torch.from_numpy(dataset.data), labels, tuple(dataset.classes))


_LOADERS: dict[str, Callable[[Path | None], tuple[ImageSet, ImageSet]]] = {
    "digits": _digits,
    **{name: partial(_cifar, name) for name in ("cifar10", "cifar100")},
}
_IN_FILES: dict[str, Callable[[str, Path | None], Mapping[str, Images]]] = {
    "folder": lambda rest, _: folders.load_folder(expanded(rest)),
    "list": folders.load_lists,
    "hf": lambda rest, _: huggingface.load(rest),
}
_KNOWN = ("PATH.npz", "folder:PATH", "list:TRAIN.txt[,TEST.txt]", "hf:NAME[:SPLIT]")


# -- training, unseen and test images of a diagnosis ----------------------------------------------------------------

UNSEEN = "--unseen SOURCE, or set a share of every class aside by --holdout 0.2, if the network was not trained on it"


@dataclass(frozen=True)
class Division:
    """How a source's images are divided for a diagnosis.

    Attributes:
        unseen: a source of images that had no part in training; None takes what `data` has.
        test: a source of images that only score.
        holdout: the share of every class that is unseen, of images that the network was not trained on.
        seed: of that draw.
    """

    unseen: str | None = None
    test: str | None = None
    holdout: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout:g}: expected a share above 0 and below 1")
        if self.holdout is not None and self.unseen is not None:
            raise UserError("--holdout and --unseen: give one of them")


@dataclass(frozen=True)
class Parts:
    """What a diagnosis takes, by name of the part: images and where they are from, then their features.

    Attributes:
        images: of `train`, `unseen` and perhaps `test`.
        origins: the data, split and part of each.
        notes: what a reader must know of the division.
    """

    images: dict[str, Images] = field(default_factory=dict)
    origins: dict[str, dict[str, str | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, images: Images, data: str, split: str, part: str | None = None) -> None:
        """Add a part, with where it is from."""
        self.images[name], self.origins[name] = images, {"data": data, "split": split, "part": part}


def divide(
    opened: OpenedImages, trained_on: Callable[[Tensor], Rows | None], wanted: Division, data_root: Path | None = None
) -> Parts:
    """Divide a source into training, unseen and test images.

    Unseen are, in this order: the source that `wanted` names; the training split without the images that were trained
    on, where these are known; the split val, or test where there is one of both; the hold-out.

    Raises:
        UserError: nothing says which images are unseen, or two things do; or another source cannot be used.
    """
    splits, source, parts = opened.by_meaning, opened.source, Parts()
    if "train" not in splits and len(splits) > 1:
        raise UserError(f"{source}: has no split to train on, only {', '.join(opened.splits)}")
    name = splits.get("train") or next(iter(opened.splits))
    images = opened.splits[name]
    known = trained_on(images.labels)
    others = [splits[meaning] for meaning in ("val", "test") if splits.get(meaning, name) != name]
    if wanted.holdout is not None and (known is not None or others):
        has = f"has {' and '.join(others)}" if known is None else "has images that are known not to be trained on"
        raise UserError(f"--holdout: {source} {has}; leave it out")
    if known is None:
        parts.add("train", images, source, name)
    else:
        parts.add("train", images.take(known), source, name, "train")
    rest = np.setdiff1d(np.arange(len(images)), np.arange(len(images)) if known is None else known)
    if wanted.unseen is not None:
        parts.add("unseen", *_other(wanted.unseen, "--unseen", data_root))
    elif len(rest):
        parts.add("unseen", images.take(rest), source, name, "unseen")
    elif wanted.holdout is not None:
        _hold_out(parts, images, wanted, source, name)
    elif others:
        parts.add("unseen", opened.splits[others[0]], source, others.pop(0))
    else:
        raise UserError(f"{source}: nothing says which of its images are unseen; give others by {UNSEEN}")
    if wanted.test is not None:
        parts.add("test", *_other(wanted.test, "--test", data_root))
    elif others:
        parts.add("test", opened.splits[others[-1]], source, others.pop())
    parts.notes.extend(f"{source}: its split {split} takes no part" for split in others)
    return parts


def _other(source: str, option: str, data_root: Path | None) -> tuple[Images, str, str]:
    """Return the images of another source, with its name and split: its only one, or the only one held out."""
    opened = open_images(source, data_root=data_root)
    found = list(opened.splits)
    if len(found) > 1:
        found = [split for meaning, split in opened.by_meaning.items() if meaning in ("val", "test")]
    if len(found) != 1:
        raise UserError(f"{option} {source}: has the splits {', '.join(opened.splits)}; give one of them by itself")
    return opened.splits[found[0]], source, found[0]


def _hold_out(parts: Parts, images: Images, wanted: Division, source: str, split: str) -> None:
    """Divide images into training and unseen ones: a share of every class, at least one of two or more."""
    order, unseen = np.argsort(images.labels.numpy(), kind="stable"), []
    for k, members in enumerate(np.split(order, np.cumsum(images.counts())[:-1])):
        number = min(len(members) - 1, max(1, round((wanted.holdout or 0) * len(members))))
        shuffled = seeds.numpy_stream(wanted.seed, "holdout", k).permutation(members)
        unseen.append(shuffled[: max(0, number)])
    rows = np.sort(np.concatenate(unseen))
    if not len(rows):
        raise UserError(f"--holdout: {source} has no class with two images; give unseen images by --unseen SOURCE")
    parts.add("train", images.take(np.setdiff1d(np.arange(len(images)), rows)), source, split, "train")
    parts.add("unseen", images.take(rows), source, split, "unseen")
    parts.notes.append(
        f"--holdout {wanted.holdout:g}: {len(rows):,} of {len(images):,} images of {source} count as unseen; the "
        "verdict holds only if the network was not trained on them"
    )
