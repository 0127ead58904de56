"""NumPy's `.npz`, read without pickle."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.array_files.text import Array, Arrays, message_of
from tailscope.errors import UserError

_UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def read(path: Path, wanted: Sequence[str]) -> Arrays:
    """Return those of the wanted fields that the file has.

    Raises:
        UserError: the file is damaged, or a wanted field holds Python objects.
    """
    with path.open("rb") as file:  # opened here because np.load leaves a file that is no zip open
        try:
            loaded = np.load(file, allow_pickle=False)
        except _UNREADABLE as error:
            # What is no zip may be a pickle to NumPy, which then tells how to load it unsafely.
            detail = "no zip archive; write it with np.savez" if "pickle" in str(error) else message_of(error)
            raise UserError(f"{path}: not a readable .npz, or truncated ({detail})") from None
        if isinstance(loaded, np.ndarray):
            raise UserError(f"{path}: holds a single array; save the fields with np.savez")
        with loaded:
            return {name: _field(path, loaded, name) for name in wanted if name in loaded}


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays, uncompressed: features do not compress."""
    with path.open("wb") as file:  # to a path, np.savez would append ".npz"
        np.savez(file, allow_pickle=False, **arrays)


def _field(path: Path, loaded: Any, name: str) -> Array:
    try:
        array = loaded[name]
    except _UNREADABLE as error:
        if "Object arrays" in str(error):
            raise UserError(
                f"{path}: {name} holds Python objects, which are never unpickled; save plain arrays"
            ) from None
        raise UserError(f"{path}: {name} cannot be read, truncated or damaged ({message_of(error)})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: {name} is not an array")
    return array
