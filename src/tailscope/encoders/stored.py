"""Backbones that tailscope trained itself, recalled from a store by key, with the images they were trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailscope.errors import UserError
from tailscope.field_checks import listed
from tailscope.methods.photos import for_photos, size_of
from tailscope.store import Store

PREFIX = "store:"
_SHOWN = 12


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
    artifact = store.read("stage1", matching[0])
    spec = artifact.meta["spec"]
    return StoredBackbone(
        spec["model"],
        store.tensors_file("stage1", matching[0]),
        artifact.tensors["rows"].numpy(),
        tuple(spec["data"]["counts"]),
        size_of(spec["augment"]) if for_photos(spec["augment"]) else None,
    )


def _describe(meta: dict[str, Any]) -> str:
    spec = meta["spec"]
    how = "+".join([*spec["augment"], *([spec["mix"]] if spec["mix"] else [])])
    return f"{spec['data']['name']} {spec['data']['profile']}, {how}, seed {meta['seed']}"
