"""What the formats share: which array is which field, what a file holds in words, whether it fits, text as JSON.

`ALIASES` is the one table of the names that a field may have. The field's own name, the first, wins over the others;
a file that holds two of the others is refused.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tailscope.errors import UserError, first_few

ALIASES: dict[str, tuple[str, ...]] = {
    "features": ("features", "feature", "embeddings", "embedding", "X"),
    "labels": ("labels", "label", "targets", "target", "y"),
    "class_names": ("class_names", "classes_"),
    "ids": ("ids", "id"),
    "groups": ("groups", "group"),
    "weight": ("weight", "coef_", "coef"),
    "bias": ("bias", "intercept_", "intercept"),
}
Array = npt.NDArray[Any]
Arrays = dict[str, Array]
SINGLE = "the array"  # the name of an array that a file holds alone
MOST_NAMED = 8


class Header(NamedTuple):
    """What a file says of an array before it is read: its type, and its shape where it has one."""

    dtype: str
    shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.dtype if self.shape is None else f"{self.dtype} {list(self.shape)}"


def resolve(
    where: Path | str, held: Mapping[str, Header], required: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Return the name in the file of each field that it holds.

    Args:
        where: the file, for messages.
        held: everything that the file holds, by name.
        required: fields that must be there.
        optional: fields that may be there.

    Raises:
        UserError: a required field is not there, or a field is there under two names, neither its own.
    """
    found = {}
    for field in (*required, *optional):
        names = [name for name in ALIASES.get(field, (field,)) if name in held]
        if len(names) > 1 and names[0] != field:
            raise UserError(f"{where}: holds both {names[0]!r} and {names[1]!r}; keep the one that is the {field}")
        if names:
            found[field] = names[0]
    missing = [field for field in required if field not in found]
    if missing:
        raise UserError(f"{where}: no field {missing[0]!r}; needs {', '.join(required)}, and holds {in_words(held)}")
    return found


def in_words(held: Mapping[str, Header]) -> str:
    """Return what a file holds, in words.

    >>> in_words({"feats": Header("float32", (600, 8)), "y": Header("int64", (600,))})
    "'feats' float32 [600, 8], 'y' int64 [600]"
    """
    return first_few([f"{name!r} {header}" for name, header in held.items()], MOST_NAMED) or "nothing"


def unread(where: Path | str, held: Iterable[str], read: Iterable[str]) -> tuple[str, ...]:
    """Return a note on what the file holds besides what was read, if there is such a thing."""
    left = [repr(name) for name in held if name not in set(read)]
    return (f"{where}: not read: {first_few(left, MOST_NAMED)}",) if left else ()


def require_room(where: Path | str, name: str, shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of an array that a file declares, before any is allocated.

    Raises:
        UserError: a dimension is negative, or the machine's memory could not hold the array.
    """
    if any(length < 0 for length in shape):
        raise UserError(f"{where}: {name} declares the shape {list(shape)}: damaged")
    size = math.prod(shape) * max(itemsize, 1)
    if size > _memory():
        raise UserError(f"{where}: {name} declares {size / 2**30:,.0f} GiB, more than this machine's memory")
    return size


def _memory() -> int:
    """Return the machine's memory in bytes; where the system does not tell, what 48 bits address."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**48


class Contents(NamedTuple):
    """What was read of a file.

    Attributes:
        arrays: by the name of the field.
        notes: what was left out or guessed, one line each.
    """

    arrays: Arrays
    notes: tuple[str, ...] = ()


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(path: Path) -> str:
    r"""Return a path as text that any terminal and any file can hold: bytes that are no UTF-8 are replaced.

    >>> shown(Path("caf\udce9.npz"))
    'caf�.npz'
    """
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def parse_json(text: str) -> Any:
    """Return what the text says as JSON, None where it is no JSON or nests deeper than Python follows."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def header_to_arrays(path: Path, header: dict[str, str]) -> Arrays:
    """Return what a file's header of texts says: `class_names`, a JSON list, and `provenance`, taken as it is.

    Raises:
        UserError: `class_names` is no list of text.
    """
    arrays = {}
    if "provenance" in header:
        arrays["provenance"] = np.array(header["provenance"])
    if "class_names" in header:
        names = parse_json(header["class_names"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: class_names in the header is not a JSON list of text")
        arrays["class_names"] = np.array(names, dtype=np.str_)
    return arrays


def arrays_to_header(arrays: Arrays) -> dict[str, str]:
    """Return the header that `header_to_arrays` reads."""
    header = {}
    if "provenance" in arrays:
        header["provenance"] = str(arrays["provenance"])
    if "class_names" in arrays:
        header["class_names"] = json.dumps(arrays["class_names"].tolist())
    return header
