"""Decode a stream of images in worker processes, batch by batch, and say which images cannot be read.

Augmentation may be random: `SeedOf` then seeds it for every single image, so that neither the number of workers nor the
batch or process that an image falls into changes what is drawn.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tailscope.data.pixels import ImageError
from tailscope.data.streams import ImageStream, MemoryImages
from tailscope.errors import UserError
from tailscope.progress import Progress
from tailscope.seeds import keyed

_SHOWN = 10
_TOO_FEW_FOR_WORKERS = 256
_VERIFY_BATCH = 64

SeedOf: TypeAlias = Callable[[str, int], int]
"""(the image's id, how often it was drawn before) -> seed; goes to worker processes, so it must pickle."""


class Unreadable(NamedTuple):
    """An image that cannot be decoded."""

    row: int
    where: str
    reason: str


class DecodedBatch(NamedTuple):
    """Images [b, C, H, W] with their rows [b] in the stream, and what could not be read of the batch."""

    images: Tensor
    rows: Tensor
    unreadable: list[Unreadable]


_Item: TypeAlias = tuple[int, Tensor | None, "str | UserError"]
"""A row, its transformed image or None, and why it could not be read, or what the transform refused."""


class _Decoded(Dataset[_Item]):
    """(row, times drawn before) -> `_Item`."""

    def __init__(self, stream: ImageStream, transform: Callable[[Image.Image], Tensor], seed_of: SeedOf | None) -> None:
        self._stream, self._transform, self._seed_of = stream, transform, seed_of

    def __getitem__(self, draw: tuple[int, int]) -> _Item:
        row, repeat = draw
        # Returned, not raised: an exception leaves a worker as a page of text, and would end the whole epoch.
        try:
            image = self._stream.image(row)
        except ImageError as error:
            return row, None, str(error)
        if self._seed_of is None:
            try:
                return row, self._transform(image), ""
            except UserError as error:
                return row, None, error
        with keyed(self._seed_of(self._stream.ids[row], repeat)):
            return row, self._transform(image), ""


def decode(
    stream: ImageStream,
    transform: Callable[[Image.Image], Tensor],
    batches: Sequence[Sequence[int]],
    *,
    workers: int | None = None,
    pin_memory: bool = False,
    seed_of: SeedOf | None = None,
    repeats: Sequence[Sequence[int]] | None = None,
) -> Iterator[DecodedBatch]:
    """Yield the decoded batches, in order.

    Args:
        stream: the images.
        transform: turns each into a tensor; all tensors of a batch have one shape. Random only with `seed_of`.
        batches: the rows of each batch.
        workers: processes that decode; None takes one a core up to 8, none for images in memory or a handful of files.
        pin_memory: whether batches are put where a GPU can fetch them from.
        seed_of: seeds the transform, where it draws.
        repeats: of every drawn row, how often it was drawn before (see `earlier_draws`); None: never.

    Raises:
        UserError: a user's transform fails, or the images of a batch come out in several sizes.
    """
    if workers is None:
        few = sum(map(len, batches)) < _TOO_FEW_FOR_WORKERS
        workers = 0 if few or isinstance(stream, MemoryImages) else min(8, _cores())
    loader: DataLoader[Any] = DataLoader(
        _Decoded(stream, transform, seed_of),
        batch_sampler=[
            list(zip(rows, [0] * len(rows) if repeats is None else repeats[i], strict=True))
            for i, rows in enumerate(batches)
        ],
        num_workers=workers,
        collate_fn=_Collate(stream, str(getattr(transform, "label", "the transform"))),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the default one, which other threads may have seeded
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Collate:
    """Stack what was decoded, and list what was not. A class, because spawned workers need to pickle it."""

    def __init__(self, stream: ImageStream, label: str) -> None:
        self._where, self._label = stream.where, label

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


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_unreadable(stream: ImageStream, *, workers: int | None, progress: Progress) -> list[Unreadable]:
    """Decode every image once and return those that cannot be read: all of them, in the stream's order."""
    rows = range(len(stream.labels))
    batches = [rows[start : start + _VERIFY_BATCH] for start in range(0, len(rows), _VERIFY_BATCH)]
    found = []
    with progress.task("verify the images", len(rows)) as advance:
        for batch, rows_of_batch in zip(decode(stream, _nothing, batches, workers=workers), batches, strict=True):
            found += batch.unreadable
            advance(len(rows_of_batch))
    return found


def refuse(stream: ImageStream, unreadable: Sequence[Unreadable]) -> UserError:
    """Return the error that counts unreadable images and names the first of them."""
    shown = "; ".join(f"{bad.where} ({bad.reason})" for bad in unreadable[:_SHOWN])
    more = f" and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
    plural = "image" if len(unreadable) == 1 else "images"
    return UserError(f"{stream.name}: {len(unreadable)} {plural} cannot be read: {shown}{more}")


def _nothing(_: Image.Image) -> Tensor:
    return torch.empty(0)
