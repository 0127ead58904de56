"""Checks of what users hand in: each says in one line which source and field is wrong, and how to mend it.

`source` is what messages call the origin of a field: a file, usually.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.errors import UserError, first_few, message_of
from tailscope.tables.arrays import to_array

MAX_CLASSES = 10_000
_MISSING = ("", "nan", "<na>")
_MISSING_BESIDE_NUMBERS = (*_MISSING, "na", "n/a", "none", "null")

Keys = npt.NDArray[np.int64] | npt.NDArray[np.str_]
Labels = Keys


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first few names, quoted, and how many there are beyond.

    >>> listed(["ant", "bee", "cat"], most=2)
    "'ant', 'bee' and 1 more"
    """
    return first_few([repr(name) for name in names], most)


def to_floats(where: str, values: npt.ArrayLike | Tensor, dimensions: str) -> Tensor:
    """Return floating-point values of these dimensions, such as "[N, d]", as a tensor; bfloat16 becomes float32."""
    array = _to_array(where, values)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise UserError(f"{where} is {array.dtype}; expected float16, float32 or float64 {dimensions}")
    if array.ndim != dimensions.count(",") + 1:
        raise UserError(f"{where} has shape {array.shape}; expected {dimensions}")
    if array.size == 0:
        raise UserError(f"{where} is empty: shape {array.shape}")
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))


def require_finite(where: str, rows: Tensor) -> None:
    """Refuse rows [n, d] with NaN or infinity; say how many there are and which is the first, counted from 0."""
    if rows.sum().isfinite():  # a sum with NaN or infinity in it never is; looking at each takes 20 times as long
        return
    found = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten()
    if len(found):
        raise UserError(f"{where}: {len(found)} of {len(rows)} rows hold NaN or infinity, the first is row {found[0]}")


def to_labels(where: str, values: npt.ArrayLike | Tensor, rows: int, of: str) -> Labels:
    """Return labels [rows] as they are meant: whole numbers of at least 0 as int64, names as text.

    Booleans, whole floats and integers of any size are numbers; bytes are text in UTF-8; [rows, 1] and [1, rows] are
    taken as [rows]. Of text, "", "nan" and "<NA>" are no label; nor are "NA", "N/A", "None" and "null" where all others
    are numbers.

    Raises:
        UserError: one is empty, negative, no whole number or of another type, or there are more or fewer than `rows`.
    """
    array = _to_array(where, values)
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1:
        raise UserError(f"{where} has shape {array.shape}; expected one label a row, [N] or [N, 1]")
    if len(array) != rows:
        raise UserError(f"{where}: {len(array)} labels for {rows} {of}")
    array = _plain(where, array) if array.dtype.kind == "O" else array
    if array.dtype.kind in "SUT":
        return _texts(where, array)
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
        _require(where, array, np.isfinite(array) & (array == np.floor(array)), "is no whole number")
        _require(where, array, np.abs(array) < 2**63, "is too large; labels are below 2**63")
    elif array.dtype.kind not in "iub":
        raise UserError(f"{where} is {array.dtype}; expected whole numbers or names")
    _require(where, array, array >= 0, "is negative; leave unlabelled rows out, labels are names or count from 0")
    if array.dtype.kind == "u":
        _require(where, array, array < 2**63, "is too large; labels are below 2**63")
    return array.astype(np.int64)


def positions(where: str, labels: Labels, names: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Return labels as positions in a list of class names: names by name, numbers as they are."""
    if labels.dtype.kind == "U":
        order = np.argsort(names)
        place = np.searchsorted(names, labels, sorter=order).clip(max=len(names) - 1)
        found: npt.NDArray[np.int64] = order[place]
        _require(where, labels, np.array(names)[found] == labels, f"is not in class_names ({listed(names)})")
        return found
    high = int(labels.argmax())
    if labels[high] >= len(names):
        mend = "" if labels.min() == 0 else "; number them from 0 in the order of class_names"
        raise UserError(f"{where}: class_names has {len(names)} names, but row {high} has label {labels[high]}{mend}")
    return labels.astype(np.int64)


def check_classes(source: str, classes: int) -> None:
    """Refuse more classes than every table and plot has room for."""
    if classes > MAX_CLASSES:
        raise UserError(f"{source}: labels of {classes:,} classes; at most {MAX_CLASSES:,} classes are supported")


def _texts(where: str, array: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    text = _decoded(array)
    plain = np.char.lower(np.char.strip(text))
    beside_numbers = np.isin(plain, _MISSING_BESIDE_NUMBERS)
    missing = beside_numbers if _are_numbers(plain[~beside_numbers]) else np.isin(plain, _MISSING)
    _require(where, text, ~missing, "is empty; leave unlabelled rows out")
    return text


def _decoded(array: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    """Return an array of text, or of bytes in UTF-8, as text."""
    return np.char.decode(array, "utf-8", "backslashreplace") if array.dtype.kind == "S" else array.astype(np.str_)


def _are_numbers(text: npt.NDArray[np.str_]) -> bool:
    try:
        text.astype(np.float64)
    except ValueError:
        return False
    return True


def _plain(where: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of Python objects [N] as one of text or of numbers."""
    kinds = np.array([_kind(value) for value in array])
    wrong = np.flatnonzero(kinds == "")
    if len(wrong):
        first = f"the first is row {wrong[0]}"
        raise UserError(f"{where}: {len(wrong)} of {len(array)} rows hold no number or text, {first}")
    found, rows = np.unique(kinds, return_counts=True)
    if len(found) > 1:
        raise UserError(f"{where}: {rows[0]} rows hold a {found[0]}, the others a {found[1]}")
    plain = np.array(array.tolist())
    if plain.dtype.kind == "O":  # integers beyond 64 bits
        raise UserError(f"{where}: a number is too large; labels are below 2**63")
    return plain


def _kind(value: object) -> str:
    """Return what a Python object is as a label; nothing for a missing value of any library, and for other things."""
    if isinstance(value, str | bytes):
        return "name"
    if isinstance(value, int | float | np.number | np.bool_) and not math.isnan(value):
        return "number"
    return ""


def _require(where: str, labels: npt.NDArray[Any], holds: npt.NDArray[np.bool_], what: str) -> None:
    wrong = np.flatnonzero(~holds)
    if len(wrong):
        first, more = str(labels[wrong[0]])[:40], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        first = repr(first) if labels.dtype.kind == "U" else first
        raise UserError(f"{where}: label {first} in row {wrong[0]}{more} {what}")


def to_names(source: str, values: npt.ArrayLike, *, numbers: bool = False) -> tuple[str, ...]:
    """Return class names as text; with `numbers`, also whole numbers of any type, as in scikit-learn's `classes_`."""
    array = _to_array(f"{source}: class_names", values)
    if numbers and array.dtype.kind in "fb" and array.ndim == 1:  # as labels of these types are taken
        array = to_labels(f"{source}: class_names", array, len(array), "classes")
    array = array.astype(np.str_) if numbers and array.dtype.kind in "iu" else array
    if array.dtype.kind == "O" and all(isinstance(name, str) for name in array.flat):
        array = array.astype(np.str_)
    if array.dtype.kind not in "UST" or array.ndim != 1:
        raise UserError(f"{source}: class_names is {array.dtype} {array.shape}; expected text [C]")
    text = _decoded(array)
    unique, times = np.unique(text, return_counts=True)
    if (times > 1).any():
        twice = str(unique[times.argmax()])
        raise UserError(f"{source}: class_names has {twice!r} {times.max()} times; names must differ")
    return tuple(str(name) for name in text)


def to_keys(where: str, values: npt.ArrayLike, rows: int) -> Keys:
    """Return ids or groups as int64 or text [rows]."""
    array = _to_array(where, values)
    if array.shape != (rows,):
        raise UserError(f"{where} has shape {array.shape}; expected [N] with N = {rows}")
    array = _plain(where, array) if array.dtype.kind == "O" else array
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind not in "SUT":
        raise UserError(f"{where} is {array.dtype}; expected integers or text")
    return _decoded(array)


def names_in(content: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """Return the class names that a training script kept beside its weights, at the top or one level below.

    They are a list of texts, or a dictionary from texts to the numbers 0 to C - 1 or back. None where there are none.

    >>> names_in({"epoch": 3, "class_to_idx": {"bee": 1, "ant": 0}})
    ('ant', 'bee')
    """
    for held in [content, *(value for value in content.values() if isinstance(value, Mapping))]:
        for key, value in held.items():
            names: Any = value
            if str(key).casefold() not in ("class_names", "classes", "class_to_idx", "idx_to_class"):
                continue
            if isinstance(value, Mapping):
                turned = all(isinstance(number, int) for number in value.values())
                by_number = {number: name for name, number in value.items()} if turned else value
                names = [by_number.get(number) for number in range(len(value))]
            is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            if is_list and len(set(names)) == len(names) > 1:
                return tuple(names)
    return None


def match_names(source: str, names: Sequence[str], other_source: str, other: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return, for each of `names`, its position [C] in `other`; refuse lists that differ, saying what either lacks."""
    missing, surplus = sorted(set(other) - set(names)), sorted(set(names) - set(other))
    if missing or surplus:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has {listed(surplus)} besides"] if surplus else []
        raise UserError(f"{source}: its class_names are not those of {other_source}: it {' and '.join(parts)}")
    position = {name: k for k, name in enumerate(other)}
    return np.array([position[name] for name in names], dtype=np.int64)


def _to_array(where: str, values: npt.ArrayLike | Tensor) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        try:
            return to_array(values)
        except (RuntimeError, TypeError) as error:  # sparse, quantised, or without values (meta)
            raise UserError(f"{where} is no plain dense tensor ({message_of(error)})") from None
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        masked = np.ma.getmaskarray(values).sum()
        raise UserError(f"{where}: {masked} values are masked; leave these rows out or fill them")
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:  # lists of different lengths, or tensors on a GPU in a list
        raise UserError(f"{where} is no array ({message_of(error)})") from None
