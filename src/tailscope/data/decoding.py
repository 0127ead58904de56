"""Decode images in worker processes, batch by batch, and say which of them cannot be read.

Augmentation may be random: `SeedOf` then seeds it for every single image, so that neither the number of workers nor the
batch or process that an image falls into changes the draws.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tailscope.data.images import ImageError, Images, ImageSet, Rows
from tailscope.data.sources import ImageData, cannot_be_read
from tailscope.errors import UserError
from tailscope.progress import Progress, Quiet
from tailscope.seeds import keyed
from tailscope.spec import digest
from tailscope.store import Store

SeedOf: TypeAlias = Callable[[str, int], int]
"""(the image's id, how often it was drawn before) -> seed; goes to worker processes, so it must pickle."""


class Unreadable(NamedTuple):
    """An image that cannot be decoded."""

    row: int
    where: str
    reason: str


class DecodedBatch(NamedTuple):
    """Images [b, C, H, W] with their rows [b] among all, and what could not be read of the batch."""

    images: Tensor
    rows: Tensor
    unreadable: list[Unreadable]


_Item: TypeAlias = tuple[int, Tensor | None, "str | UserError"]
"""A row, its transformed image or None, and why it could not be read, or what the transform refused."""


class _Decoded(Dataset[_Item]):
    """(row, times drawn before) -> `_Item`."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], seed_of: SeedOf | None) -> None:
        self._images, self._transform, self._seed_of = images, transform, seed_of

    def __getitem__(self, draw: tuple[int, int]) -> _Item:
        row, repeat = draw
        # Returned, not raised: an exception leaves a worker as a page of text, and would end the whole epoch.
        try:
            image = self._images.image(row)
        except ImageError as error:
            return row, None, str(error)
        seed_of = self._seed_of
        try:
            with nullcontext() if seed_of is None else keyed(seed_of(self._images.ids[row], repeat)):
                return row, self._transform(image), ""
        except UserError as error:
            return row, None, error


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(
    images: Images,
    transform: Callable[[Image.Image], Tensor],
    batches: Sequence[Sequence[int]],
    *,
    workers: int | None = None,
    pin_memory: bool = False,
    seed_of: SeedOf | None = None,
    repeats: Sequence[Sequence[int]] | None = None,
) -> Iterator[DecodedBatch]:
    """Yield batches of decoded and transformed images, given the rows of each, in order.

    Args:
        images: of which rows are decoded.
        transform: random only with `seed_of`.
        batches: rows.
        workers: processes that decode; None takes one a core up to 8, none for images in memory or a handful of files.
        pin_memory: whether batches are put where a GPU can fetch them from.
        seed_of: seeds the transform, where it draws.
        repeats: of every drawn row, how often it was drawn before (see `earlier_draws`); None: never.

    Raises:
        UserError: a user's transform fails, or the images of a batch come out in several sizes.
    """
    if workers is None:
        few = sum(map(len, batches)) < 256
        workers = 0 if few or isinstance(images, ImageSet) else min(8, usable_cores())
    repeats = [[0] * len(rows) for rows in batches] if repeats is None else repeats
    loader: DataLoader[Any] = DataLoader(
        _Decoded(images, transform, seed_of),
        batch_sampler=[list(zip(*drawn, strict=True)) for drawn in zip(batches, repeats, strict=True)],
        num_workers=workers,
        collate_fn=_Collate(images, str(getattr(transform, "label", "the transform"))),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the default one, which other threads may have seeded
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def decode_drawn(
    images: Images,
    transform: Callable[[Image.Image], Tensor],
    drawn: Rows,
    parts: Sequence["Rows | slice"],
    **options: Any,
) -> Iterator[DecodedBatch]:
    """Yield the parts of the drawn rows, decoded with the options of `decode`; a row drawn again is augmented anew.

    Raises:
        UserError: as `decode`; or an image has become unreadable.
    """
    repeats = earlier_draws(drawn)
    batches = [drawn[part].tolist() for part in parts]
    for batch in decode(images, transform, batches, repeats=[repeats[part].tolist() for part in parts], **options):
        if batch.unreadable:
            raise refuse(images, batch.unreadable)
        yield batch


class _Collate:
    """Stack what was decoded, and list what was not. A class, because spawned workers need to pickle it."""

    def __init__(self, images: Images, label: str) -> None:
        self._where, self._label = images.where, label

    def __call__(self, items: list[_Item]) -> DecodedBatch | UserError:
        for row, _, reason in items:
            if isinstance(reason, UserError):
                return UserError(f"{reason}: {self._where(row)}")
        good = [(row, image) for row, image, _ in items if image is not None]
        bad = [Unreadable(row, self._where(row), str(reason)) for row, image, reason in items if image is None]
        sizes = {tuple(image.shape): row for row, image in reversed(good)}
        if len(sizes) > 1:
            shown = ", ".join(f"{list(size)} of {self._where(row)}" for size, row in list(sizes.items())[:3])
            return UserError(f"{self._label} makes inputs of several sizes: {shown}; resize and crop to one size")
        images = torch.stack([image for _, image in good]) if good else torch.empty(0)
        return DecodedBatch(images, torch.tensor([row for row, _ in good], dtype=torch.int64), bad)


def earlier_draws(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return of every drawn row how often it was drawn before.

    >>> earlier_draws(np.array([4, 2, 4, 4, 2])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(rows, kind="stable")
    drawn = rows[order]
    first = np.searchsorted(drawn, drawn, side="left")
    earlier = np.empty(len(rows), dtype=np.int64)
    earlier[order] = np.arange(len(rows)) - first
    return earlier


def from_all_over(total: int, some: int = 16) -> list[int]:
    """Return a few rows, the first and the last among them.

    >>> from_all_over(100, 4), from_all_over(2), from_all_over(0)
    ([0, 33, 66, 99], [0, 1], [])
    """
    return sorted({i * (total - 1) // (some - 1) for i in range(some)}) if total else []


def find_unreadable(
    images: Images, *, workers: int | None, progress: Progress, tell: Callable[[str], object] = str
) -> list[Unreadable]:
    """Decode every image once; tell and return those that cannot be read: all of them, in the images' order."""
    batches = [range(len(images))[start : start + 64] for start in range(0, len(images), 64)]
    found = []
    with progress.task("verify the images", len(images)) as advance:
        for decoded, batch in zip(decode(images, _nothing, batches, workers=workers), batches, strict=True):
            found += decoded.unreadable
            advance(len(batch))
    for bad in found:
        tell(f"{bad.where}: {bad.reason}")
    return found


def still_unreadable(images: Images, rows: Rows) -> list[Unreadable]:
    """Return which of some rows, once unreadable, cannot be read now: a mended copy may be as long as the damaged one.

    So no fingerprint tells it, and whoever remembers such rows asks again.
    """
    found = find_unreadable(images.take(rows), workers=None, progress=Quiet())
    return [bad._replace(row=int(rows[bad.row])) for bad in found]


def refuse(images: Images, unreadable: Sequence[Unreadable]) -> UserError:
    """Return the error that counts unreadable images and names the first of them."""
    return UserError(f"{images.name}: {cannot_be_read([f'{bad.where} ({bad.reason})' for bad in unreadable])}")


def _nothing(_: Image.Image) -> Tensor:
    return torch.empty(0)


def readable(
    data: ImageData,
    store: Store,
    *,
    verify: bool = False,
    workers: int | None = None,
    progress: Progress,
    tell: Callable[[str], object],
) -> ImageData:
    """Decode every image in a file once and return the data set without those that cannot be read.

    What was found is kept in the store, under the data set's fingerprint, and of all images only these are decoded
    again. With `verify` all are decoded whatever the store says, and none is left out: `tell` receives a line for each
    that cannot be read.

    Raises:
        UserError: with `verify`, an image cannot be read; or a class loses all its training images.
    """
    splits = {"train": data.train, "test": data.test}

    def find(tell: Callable[[str], object] = str) -> dict[str, list[Unreadable]]:
        return {k: find_unreadable(v, workers=workers, progress=progress, tell=tell) for k, v in splits.items()}

    if verify:
        if unreadable := list(chain.from_iterable(find(tell).values())):
            raise refuse(data.train, unreadable)
        return data

    def make(_: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        started, found = time.monotonic(), find()
        rows = {k: torch.tensor([one.row for one in of_split], dtype=torch.int64) for k, of_split in found.items()}
        unreadable = [f"{one.where} ({one.reason})" for one in chain.from_iterable(found.values())]
        took = {"seconds": time.monotonic() - started, "images": sum(map(len, splits.values()))}
        return rows, {"unreadable": unreadable, **took}

    checked = store.get_or_make("checked", _key(data), make, progress)[0]
    bad = {k: still_unreadable(v, checked.tensors[k].numpy()) for k, v in splits.items() if len(checked.tensors[k])}
    skipped = [f"{one.where} ({one.reason})" for one in chain.from_iterable(bad.values())]
    if not skipped:
        return data
    rows = {k: [one.row for one in bad.get(k, ())] for k in splits}
    train, test = (v.take(np.setdiff1d(np.arange(len(v)), rows[k])) for k, v in splits.items())
    for name, had, has in zip(train.class_names, data.train.counts(), train.counts(), strict=True):
        if had > has == 0:
            raise UserError(f"{data.name}: class {name} has no training image that can be read; {skipped[0]}")
    return replace(data, train=train, test=test, skipped=tuple(skipped))


def was_checked(data: ImageData, store: Store) -> bool:
    """Whether the store knows which images can be read, so that `readable` decodes only those that could not be."""
    return store.has("checked", _key(data))


def _key(data: ImageData) -> str:
    return digest({"checked": data.fingerprint})
