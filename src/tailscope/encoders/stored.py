"""Backbones that tailscope trained itself, recalled from a store by key, with the images they were trained on.

A store may come from a stranger. What its descriptions name is looked up among the project's own networks and nowhere
else: nothing is imported, and sizes are bounded by the stored weights, which the network must fit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailscope.errors import UserError
from tailscope.field_checks import listed
from tailscope.methods import for_photos
from tailscope.methods.photos import size_of
from tailscope.models import MODELS
from tailscope.store import Artifact, Store

PREFIX = "store:"
_SHOWN = 12
_LARGEST = 1024
"""Side in pixels beyond which no backbone was trained."""


@dataclass(frozen=True, eq=False)
class StoredBackbone:
    """A trained backbone.

    Attributes:
        model: the call-string of its network.
        checkpoint: its weights.
        rows: of the true training set, which it was trained on.
        counts: [C] of those rows.
        image_size: side of the images that it was trained on where they were cropped from files, None elsewhere.
    """

    model: str
    checkpoint: Path
    rows: npt.NDArray[np.int64]
    counts: tuple[int, ...]
    image_size: int | None


def find(root: Path | None, key: str) -> StoredBackbone:
    """Return the backbone whose key begins with `key`: the `key` in a result's `provenance`.

    Raises:
        UserError: no store is given, it is not there or damaged, or not exactly one backbone has such a key.
    """
    if root is None:
        raise UserError(f"--model {PREFIX}{key}: give the store's folder with --store, OUT/store of the experiment")
    if not root.is_dir():
        raise UserError(f"--store {root}: no such folder")
    store = Store(root)
    keys = store.keys("stage1")
    matching = [known for known in keys if known.startswith(key)]
    if not key or len(matching) != 1:
        what = "no such backbone" if not matching else f"{len(matching)} backbones"
        have = listed([f"{known[:_SHOWN]} ({_describe(store.meta('stage1', known))})" for known in keys])
        raise UserError(f"--model {PREFIX}{key}: {what}; {root} has {have if keys else 'none'}")
    path = store.tensors_file("stage1", matching[0])
    return _checked(store.read("stage1", matching[0]), path)


def _checked(artifact: Artifact, path: Path) -> StoredBackbone:
    """Return the backbone of an entry, of which only what a training of ours may have written is believed.

    Raises:
        UserError: a field is missing, of another kind, or names no network of ours.
    """
    try:
        spec = artifact.meta["spec"]
        model, augment = str(spec["model"]), [str(call) for call in spec["augment"]]
        counts = tuple(int(n) for n in spec["data"]["counts"])
        rows = artifact.tensors["rows"].numpy()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path.parent}: is no backbone that tailscope stored ({type(error).__name__}: {error})"
        ) from None
    try:
        MODELS.parse(model)
        size = size_of(augment) if for_photos(augment) else None
    except UserError as error:
        raise UserError(
            f"{path.parent / 'meta.json'}: {error}; names in a file are only looked up, never run"
        ) from None
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0 or rows.min() < 0:
        raise UserError(f"{path}: its rows {list(rows.shape)} are no row numbers of training images")
    if size is not None and not 1 <= size <= _LARGEST:
        raise UserError(f"{path.parent / 'meta.json'}: images of {size} pixels; at most {_LARGEST} are believed")
    return StoredBackbone(model, path, rows, counts, size)


def _describe(meta: dict[str, Any]) -> str:
    try:
        spec = meta["spec"]
        how = "+".join([*spec["augment"], *([spec["mix"]] if spec["mix"] else [])])
        return f"{spec['data']['name']} {spec['data']['profile']}, {how}, seed {meta['seed']}"
    except (KeyError, TypeError, AttributeError):
        return "no description"
