"""`features.npy` and `labels.npy`: a file that holds a single array has its labels in another beside it."""

import re
from collections.abc import Sequence
from pathlib import Path

from tailscope.array_files.fields import ALIASES
from tailscope.array_files.text import Array
from tailscope.errors import UserError


def labels_beside(path: Path, array: Array, required: Sequence[str]) -> Path:
    """Return the file of labels beside a file of features.

    Args:
        path: the file of the features.
        array: what it holds.
        required: the fields that are asked for.

    Raises:
        UserError: other fields are asked for, or not exactly one file of labels is there.
    """
    holds = f"{path}: holds a single array, {array.dtype} {list(array.shape)}"
    if "features" not in required:
        raise UserError(f"{holds}; expected the fields {', '.join(required)}: save them with np.savez")
    names = label_names(path.name)
    present = [path.with_name(name) for name in names if path.with_name(name).exists()]
    if not present:
        raise UserError(f"{holds}; its labels are looked for beside it, in {' or '.join(names)}: none is there")
    if len(present) > 1:
        raise UserError(f"{holds}; its labels may be {present[0].name} or {present[1].name}: keep one of them")
    return present[0]


def label_names(name: str) -> list[str]:
    """Return the names that the file of labels may have beside a file of features.

    >>> label_names("X_train.npy")[-1], label_names("train-features.npy")[0], label_names("resnet50.npy")
    ('y_train.npy', 'train-labels.npy', ['resnet50_labels.npy', 'resnet50-labels.npy'])
    """
    stem, suffix = Path(name).stem, Path(name).suffix
    words = "|".join(ALIASES["features"])
    token = re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])")
    if token.search(stem):
        return [token.sub(word, stem, count=1) + suffix for word in ALIASES["labels"]]
    return [f"{stem}_labels{suffix}", f"{stem}-labels{suffix}"]
