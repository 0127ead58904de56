"""What the formats share: types, and text on one line or as JSON."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tailscope.errors import UserError

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
SINGLE = "the array"  # the name of an array that a file holds alone


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
