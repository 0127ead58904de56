"""Rows that are made of a table's rows, without holding more of them than a table in memory may have.

A table of a folder, or of an `.npy` file, is mapped: the operating system reads of it what is asked for and forgets it
where memory is short. What is made of it (some of its rows, another type, another scale) is written to a file, too,
once it is large: a file without a name, in the cache, which is gone with the array.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.errors import expanded

CACHE = "TAILSCOPE_CACHE"
"""Environment variable: where sorted copies of folders and other large arrays lie, instead of the user's cache."""
HELD = 2**28
"""Bytes of rows from which on they are written to a file instead of being held in memory."""
_BLOCK_VALUES = 2**22
Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of copies that may be deleted at any time, by the user's choice or by default."""
    return expanded(os.environ.get(CACHE) or "~/.cache/tailscope")


def map_rows(features: Tensor, change: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
    """Return what a function of rows [n, d] makes of some rows, or of all, block by block.

    Args:
        features: [N, d], or a single row [d]; on an accelerator all is done at once, and stays there.
        change: from rows [n, d] to rows [n, d], each by itself.
        rows: [m] which rows, in that order.

    >>> map_rows(torch.tensor([[1.0], [2.0], [3.0]]), lambda block: 2 * block, torch.tensor([2, 0])).tolist()
    [[6.0], [2.0]]
    """
    number, width = len(features) if rows is None else len(rows), features.shape[-1]
    kind = change(features[:0]).dtype
    small = features.ndim == 1 or number * width * kind.itemsize <= HELD
    if small or features.device.type != "cpu":
        return change(features if rows is None else features[rows])
    found = empty_rows(number, width, kind)
    step = max(1, _BLOCK_VALUES // width)
    for start in range(0, number, step):
        part = slice(start, start + step)
        found[part] = change(features[part] if rows is None else features[rows[part]])
    return found


def take_rows(features: Floats, rows: npt.NDArray[Any]) -> Floats:
    """Return some rows of features [N, d], a number or a truth each [m] or [N], as `map_rows` does."""
    index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    if np.array_equal(index, np.arange(len(features))):
        return features
    given = torch.from_numpy(np.require(features, requirements=["W"]))
    found: Floats = map_rows(given, lambda block: block, torch.from_numpy(index)).numpy()
    return found


@contextmanager
def held_below(size: int) -> Iterator[None]:
    """Write rows to files from fewer bytes on, within the block."""
    global HELD
    before, HELD = HELD, min(HELD, size)
    try:
        yield
    finally:
        HELD = before


def empty_rows(number: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows to fill, once they are large on disk; in memory where the disk has no room for them."""
    size = number * width * dtype.itemsize
    if size <= HELD:
        return torch.empty(number, width, dtype=dtype)
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _allocate(file.fileno(), size)
            held = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    except OSError as error:
        _log.warning("%.1f GiB are held in memory: no file for them in the cache (%s)", size / 2**30, error)
        return torch.empty(number, width, dtype=dtype)
    return torch.from_numpy(np.asarray(held)).view(dtype).view(number, width)


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size with room on the disk: a full disk would end the process when a page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
