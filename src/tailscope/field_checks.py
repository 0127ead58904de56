"""Checks of what users hand in: each says in one line which source and field is wrong, and how to mend it.

`source` is what messages call the origin of a field: a file, usually.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.errors import UserError

MAX_CLASSES = 10_000
_BLOCK_ELEMENTS = 2**22

Keys = npt.NDArray[np.int64] | npt.NDArray[np.str_]
Floats = npt.NDArray[np.floating[Any]]


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first few names, quoted, and how many there are beyond.

    >>> listed(["ant", "bee", "cat"], most=2)
    "'ant', 'bee' and 1 more"
    """
    text = ", ".join(repr(name) for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def to_floats(where: str, values: npt.ArrayLike | Tensor, dimensions: str) -> Tensor:
    """Return floating-point values as a tensor in memory of its own order; bfloat16 becomes float32.

    Args:
        where: source and field, for messages.
        values: an array or tensor.
        dimensions: the shape expected, such as "[N, d]".

    Raises:
        UserError: another type, another number of dimensions, or no values.
    """
    if isinstance(values, Tensor) and values.dtype == torch.bfloat16:
        values = values.float()
    array: npt.NDArray[Any] = _to_array(values)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise UserError(f"{where} is {array.dtype}; expected float16, float32 or float64 {dimensions}")
    if array.ndim != dimensions.count(",") + 1:
        raise UserError(f"{where} has shape {array.shape}; expected {dimensions}")
    if array.size == 0:
        raise UserError(f"{where} is empty: shape {array.shape}")
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))


def require_finite(where: str, rows: Tensor) -> None:
    """Check a matrix [n, d].

    Raises:
        UserError: rows hold NaN or infinity; says how many and which is the first, counted from 0.
    """
    if rows.sum().isfinite():  # a sum with NaN or infinity in it never is; looking at each takes 20 times as long
        return
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    wrong = [~torch.isfinite(rows[start : start + step]).all(dim=1) for start in range(0, len(rows), step)]
    found = torch.cat(wrong).nonzero().flatten()
    if len(found):
        raise UserError(f"{where}: {len(found)} of {len(rows)} rows hold NaN or infinity, the first is row {found[0]}")


def to_labels(source: str, values: npt.ArrayLike | Tensor, rows: int, names: tuple[str, ...] | None) -> Tensor:
    """Return labels as int64 [rows].

    Raises:
        UserError: they are no integers, not [rows], negative, beyond the names, or of too many classes.
    """
    array: npt.NDArray[Any] = _to_array(values)
    check_labels(f"{source}: labels", array, rows, "rows of features")
    high = int(array.argmax())
    if names is not None and array[high] >= len(names):
        raise UserError(f"{source}: class_names has {len(names)} names, but row {high} has label {array[high]}")
    if max(int(array[high]) + 1, len(names or ())) > MAX_CLASSES:
        raise UserError(f"{source}: labels run to {array[high]}; at most {MAX_CLASSES:,} classes are supported")
    return torch.from_numpy(array.astype(np.int64))


def check_labels(where: str, labels: npt.NDArray[Any], rows: int, of: str) -> None:
    """Check that there is a label for each of `rows`, at least one; `of` is what messages call these.

    Raises:
        UserError: they are no integers, not [rows], or negative.
    """
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where} is {labels.dtype}; expected integers 0 to C-1")
    if labels.ndim != 1:
        raise UserError(f"{where} has shape {labels.shape}; expected [N]")
    if len(labels) != rows:
        raise UserError(f"{where}: {len(labels)} labels for {rows} {of}")
    low = int(labels.argmin())
    if labels[low] < 0:
        raise UserError(f"{where}: label {labels[low]} in row {low} is negative; labels run 0 to C-1")


def to_names(source: str, values: npt.ArrayLike) -> tuple[str, ...]:
    """Return class names as text.

    Raises:
        UserError: they are not text [C], or two are equal.
    """
    array: npt.NDArray[Any] = np.asarray(values)
    if array.dtype.kind not in "US" or array.ndim != 1:
        raise UserError(f"{source}: class_names is {array.dtype} {array.shape}; expected text [C]")
    text = np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array
    unique, times = np.unique(text, return_counts=True)
    if (times > 1).any():
        twice = str(unique[times.argmax()])
        raise UserError(f"{source}: class_names has {twice!r} {times.max()} times; names must differ")
    return tuple(str(name) for name in text)


def to_keys(where: str, values: npt.ArrayLike, rows: int) -> Keys:
    """Return ids or groups as int64 or text [rows].

    Raises:
        UserError: they are neither integers nor text, or not [rows].
    """
    array: npt.NDArray[Any] = np.asarray(values)
    if array.shape != (rows,):
        raise UserError(f"{where} has shape {array.shape}; expected [N] with N = {rows}")
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind != "U":
        raise UserError(f"{where} is {array.dtype}; expected integers or text")
    return array


def to_provenance(source: str, text: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        UserError: the text is none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{source}: provenance is not a JSON object")
    return value


def match_names(source: str, names: Sequence[str], other_source: str, other: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return, for each of `names`, its position [C] in `other`.

    Raises:
        UserError: the sets differ; the message names what either side lacks.
    """
    missing, surplus = sorted(set(other) - set(names)), sorted(set(names) - set(other))
    if missing or surplus:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has {listed(surplus)} besides"] if surplus else []
        raise UserError(f"{source}: its class_names are not those of {other_source}: it {' and '.join(parts)}")
    position = {name: k for k, name in enumerate(other)}
    return np.array([position[name] for name in names], dtype=np.int64)


def _to_array(values: npt.ArrayLike | Tensor) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
