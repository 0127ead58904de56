"""Decode a stream of images in worker processes, batch by batch, and say which images cannot be read."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tailscope.data.streams import UNREADABLE, ImageStream, MemoryImages
from tailscope.errors import UserError
from tailscope.progress import Progress

_SHOWN = 10
_TOO_FEW_FOR_WORKERS = 256
_VERIFY_BATCH = 64


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


class _Decoded(Dataset[tuple[int, Tensor | None, str]]):
    """Row -> (row, transformed image or None, why it could not be read)."""

    def __init__(self, stream: ImageStream, transform: Callable[[Image.Image], Tensor]) -> None:
        self._stream, self._transform = stream, transform

    def __getitem__(self, row: int) -> tuple[int, Tensor | None, str]:
        # Returned, not raised: an exception leaves a worker as a page of text, and would end the whole epoch.
        try:
            image = self._stream.image(row)
        except FileNotFoundError:
            return row, None, "missing"
        except UNREADABLE as error:
            return row, None, f"cannot be decoded, {type(error).__name__}"
        return row, self._transform(image), ""


def decode(
    stream: ImageStream,
    transform: Callable[[Image.Image], Tensor],
    batches: Sequence[Sequence[int]],
    *,
    workers: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return an iterable of `DecodedBatch`, in order.

    Args:
        stream: the images.
        transform: turns each into a tensor; all tensors of a batch have one shape.
        batches: the rows of each batch.
        workers: processes that decode; None takes up to 8, but none for images in memory or a handful of files.
        pin_memory: whether batches are put where a GPU can fetch them from.
    """
    if workers is None:
        few = sum(map(len, batches)) < _TOO_FEW_FOR_WORKERS
        workers = 0 if few or isinstance(stream, MemoryImages) else min(8, os.cpu_count() or 1)
    return DataLoader(
        _Decoded(stream, transform),
        batch_sampler=[list(rows) for rows in batches],
        num_workers=workers,
        collate_fn=_Collate(stream),
        pin_memory=pin_memory,
    )


class _Collate:
    """Stack what was decoded, and list what was not. A class, because spawned workers need to pickle it."""

    def __init__(self, stream: ImageStream) -> None:
        self._where = stream.where

    def __call__(self, items: list[tuple[int, Tensor | None, str]]) -> DecodedBatch:
        good = [(row, image) for row, image, _ in items if image is not None]
        bad = [Unreadable(row, self._where(row), reason) for row, image, reason in items if image is None]
        images = torch.stack([image for _, image in good]) if good else torch.empty(0)
        return DecodedBatch(images, torch.tensor([row for row, _ in good], dtype=torch.int64), bad)


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
