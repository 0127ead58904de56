"""What the formats share: types, and text on one line or as JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailscope.errors import UserError

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def header_to_arrays(path: Path, header: dict[str, str]) -> Arrays:
    """Return what a file's header of texts says: `class_names`, a JSON list, and `provenance`, taken as it is.

    Raises:
        UserError: `class_names` is no list of text.
    """
    arrays = {}
    if "provenance" in header:
        arrays["provenance"] = np.array(header["provenance"])
    if "class_names" in header:
        try:
            names = json.loads(header["class_names"])
        except ValueError:
            names = None
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
