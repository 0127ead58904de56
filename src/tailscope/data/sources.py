"""Data sets by name: `digits`, `cifar10`, `cifar100`, or the path of an image `.npz`."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from tailscope import seeds
from tailscope.data import npz, splits
from tailscope.data.imageset import ImageSet
from tailscope.errors import UserError, expanded

DIGITS_TEST_PER_CLASS = 50
DIGITS_SPLIT_SEED = 0
_CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: the true training distribution and its test split."""

    name: str
    train: ImageSet
    test: ImageSet

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content of both splits, never of paths."""
        return hashlib.sha256((self.train.fingerprint() + self.test.fingerprint()).encode()).hexdigest()


def load(source: str, *, data_root: Path | None = None, also: tuple[str, ...] = ()) -> ImageData:
    """Load a data set into memory.

    Args:
        source: `"digits"`, `"cifar10"`, `"cifar100"` or `"PATH.npz"` (fields: see `tailscope.data.npz.read`).
        data_root: for CIFAR, a directory with torchvision's official layout or `NAME.npz`; default `$TAILSCOPE_DATA`,
            else `~/.cache/tailscope/data`. What is missing is downloaded there by torchvision, checksums verified.
        also: other forms of `source` that the caller knows, for the message about unknown ones.

    >>> digits = load("digits")
    >>> tuple(digits.train.images.shape), min(digits.train.counts()), set(digits.test.counts())
    ((1297, 8, 8, 1), 124, {50})

    Raises:
        UserError: unknown data set, or data that are missing, damaged or of another form.
    """
    if source in _LOADERS:
        train, test = _LOADERS[source](data_root)
        return ImageData(source, train, test)
    if source.endswith(".npz"):
        path = expanded(source)
        return ImageData(path.stem, *npz.read(path))
    raise UserError(f"unknown data set {source!r}; known: {', '.join((*sorted(_LOADERS), 'PATH.npz', *also))}")


def _digits(_: Path | None) -> tuple[ImageSet, ImageSet]:
    """Return scikit-learn's 8x8 digits, 50 test images a class, the rest training, both in the original order.

    Pixels 0 to 16 become 0 to 255: 255/16 times the value, rounded to the nearest, ties to even.
    """
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    everything = ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(str(k) for k in range(10)))
    drawn = splits.subset(labels, [DIGITS_TEST_PER_CLASS] * 10, seed=seeds.derive(DIGITS_SPLIT_SEED, "digits", "test"))
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[drawn.flat] = True
    return everything.take(np.flatnonzero(~is_test)), everything.take(np.flatnonzero(is_test))


def _cifar(name: str, data_root: Path | None) -> tuple[ImageSet, ImageSet]:
    root = expanded(data_root) if data_root else _default_root()
    if (root / f"{name}.npz").is_file():
        return npz.read(root / f"{name}.npz")
    if data_root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such directory")
    return _official(name, root, train=True), _official(name, root, train=False)


def _official(name: str, root: Path, *, train: bool) -> ImageSet:
    """Return a split of torchvision's official CIFAR, downloaded when missing; its checksums precede any reading."""
    from torchvision import datasets  # here because it takes seconds to import, and few need it

    dataset_class = getattr(datasets, _CIFAR[name])
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


def _default_root() -> Path:
    named = os.environ.get("TAILSCOPE_DATA")
    return expanded(named or "~/.cache/tailscope/data")


_LOADERS: dict[str, Callable[[Path | None], tuple[ImageSet, ImageSet]]] = {
    "digits": _digits,
    "cifar10": lambda root: _cifar("cifar10", root),
    "cifar100": lambda root: _cifar("cifar100", root),
}
