"""A data set whose images stay in their files: `folder:PATH` and `list:TRAIN.txt,TEST.txt`, as experiments take it.

Before anything is trained every image has been decoded once (`readable`). What cannot be read is left out, or refused
with the lines that name it, so that counts, subsets and batches are of images that are there.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.data import folders, listfiles, sources
from tailscope.data.decoding import Unreadable, find_unreadable, refuse
from tailscope.data.sources import ImageData
from tailscope.data.streams import ImageFiles
from tailscope.errors import UserError, expanded
from tailscope.progress import Progress
from tailscope.spec import digest
from tailscope.store import Store

Rows: TypeAlias = npt.NDArray[np.int64]
SPLITS = ("train", "test")
SHOWN = 10
"""How many images that cannot be read a message names."""


@dataclass(frozen=True, eq=False)
class FileSet:
    """A split of images in files, indexed as an `ImageSet` is.

    Attributes:
        files: the images, decoded when asked for.
    """

    files: ImageFiles

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def labels(self) -> Tensor:
        """Labels int64 [N], 0 to num_classes - 1."""
        return torch.from_numpy(self.files.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.files.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images here."""
        return len(self.files.class_names)

    @property
    def channels(self) -> int:
        """Every image becomes RGB."""
        return 3

    def counts(self) -> list[int]:
        """Return the number of images of each class."""
        return self.files.counts()

    def take(self, indices: Sequence[int] | Rows | Tensor) -> "FileSet":
        """Return the images at `indices`, in that order; class names stay."""
        return FileSet(self.files.take(np.asarray(indices, dtype=np.int64)))


@dataclass(frozen=True, eq=False)
class FileData:
    """A data set in files.

    Attributes:
        name: of the data set.
        train: the true training distribution.
        test: its test split.
        skipped: what cannot be read and was left out, as lines for people.
    """

    name: str
    train: FileSet
    test: FileSet
    skipped: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of relative paths, file sizes, labels and class names of both splits."""
        both = self.train.files.fingerprint() + self.test.files.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()

    def notes(self) -> list[str]:
        """Return what a reader of a result must know: what was left out, and how many images cannot be read."""
        found = list(dict.fromkeys((*self.train.files.notes, *self.test.files.notes)))
        if not self.skipped:
            return found
        plural = "image" if len(self.skipped) == 1 else "images"
        more = f" and {len(self.skipped) - SHOWN} more" if len(self.skipped) > SHOWN else ""
        shown = "; ".join(self.skipped[:SHOWN])
        return [*found, f"{len(self.skipped)} {plural} cannot be read and took no part: {shown}{more}"]

    def keep(self, rows: dict[str, Rows], skipped: Sequence[str] = ()) -> "FileData":
        """Return the data set with only these rows of its splits."""
        return replace(
            self, train=self.train.take(rows["train"]), test=self.test.take(rows["test"]), skipped=tuple(skipped)
        )


Data: TypeAlias = ImageData | FileData


def load(source: str, *, data_root: Path | None = None) -> Data:
    """Load anything that an experiment can train on: `folder:PATH`, `list:TRAIN.txt,TEST.txt`, or see `sources.load`.

    Files are listed, not opened. A folder without `test/` is tested on `val/`, as ImageNet is.

    Raises:
        UserError: as the module that loads the source; or there is no test split.
    """
    kind, _, rest = source.partition(":")
    if kind == "folder":
        splits = folders.load(expanded(rest))
    elif kind == "list":
        splits = listfiles.load(rest, data_root)
    else:
        return sources.load(source, data_root=data_root, also=("folder:PATH", "list:TRAIN.txt,TEST.txt"))
    test = splits.get("test", splits.get("val"))
    if "train" not in splits or test is None:
        needs = "folder:PATH with train/ and test/ (or val/)" if kind == "folder" else "list:TRAIN.txt,TEST.txt"
        has = "no splits" if "all" in splits else f"only {', '.join(splits)}"
        raise UserError(
            f"{source}: an experiment needs images to train on and to test on; give {needs}; this has {has}"
        )
    train, test = _without_unused_numbers(splits["train"], test)
    return FileData(train.name, FileSet(train), FileSet(test))


def _without_unused_numbers(train: ImageFiles, test: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
    """Leave out the numbers of classes that lists do not use; each class is still called by its own."""
    used = np.unique(train.labels)
    strange = np.setdiff1d(test.labels, used)
    if len(strange):
        name = test.class_names[strange[0]]
        raise UserError(f"{test.name}: has class {name!r}, of which {train.name} has no image to train on")
    names = tuple(train.class_names[k] for k in used)
    return tuple(  # type: ignore[return-value]
        replace(images, labels=np.searchsorted(used, images.labels), class_names=names) for images in (train, test)
    )


def readable(
    data: FileData,
    store: Store,
    *,
    verify: bool = False,
    workers: int | None = None,
    progress: Progress,
    tell: Callable[[str], object],
) -> FileData:
    """Decode every image once and return the data set without those that cannot be read.

    What was found is kept in the store, under the data set's fingerprint, and not looked for again unless `verify`.

    Args:
        data: the data set.
        store: remembers.
        verify: refuse instead of leaving out; decodes again whatever the store says.
        workers: processes that decode; None decides.
        progress: receives the work done.
        tell: with `verify`, receives a line for every image that cannot be read.

    Raises:
        UserError: with `verify`, an image cannot be read; or a class loses all its training images.
    """

    def find(split: str) -> list[Unreadable]:
        images: FileSet = getattr(data, split)
        return find_unreadable(images.files, workers=workers, progress=progress)

    if verify:
        found = [(split, bad) for split in SPLITS for bad in find(split)]
        for _, bad in found:
            tell(f"{bad.where}: {bad.reason}")
        if found:
            raise refuse(data.train.files, [bad for _, bad in found])
        return data
    key = digest({"checked": data.fingerprint})

    def make(_: Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        bad = {split: find(split) for split in SPLITS}
        rows = {split: torch.tensor([b.row for b in found], dtype=torch.int64) for split, found in bad.items()}
        return rows, {"unreadable": [f"{b.where} ({b.reason})" for found in bad.values() for b in found]}

    checked = store.get_or_make("checked", key, make, progress)[0]
    if not checked.meta["unreadable"]:
        return data
    kept = {
        split: np.setdiff1d(np.arange(len(getattr(data, split))), checked.tensors[split].numpy()) for split in SPLITS
    }
    return _without_empty_classes(data, data.keep(kept, checked.meta["unreadable"]))


def _without_empty_classes(before: FileData, after: FileData) -> FileData:
    """Refuse data that lost all training images of a class."""
    counts = zip(before.train.counts(), after.train.counts(), strict=True)
    lost = [after.train.class_names[k] for k, (had, has) in enumerate(counts) if had and not has]
    if lost:
        raise UserError(f"{after.name}: class {lost[0]} has no training image that can be read; {after.skipped[0]}")
    return after
