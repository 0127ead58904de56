"""Named arrays in files: `.npz`, `.safetensors` or `.parquet`. Nothing is ever unpickled.

What the formats hold is the same; only text differs. An `.npz` has text arrays. A `.safetensors`, which has none, keeps
`class_names` and `provenance` as JSON in its header, and text of the rows as UTF-8 bytes, uint8 [N, longest], padded
with zeros. A `.parquet` has one row a sample (`tailscope.array_files.parquet`).
"""

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from tailscope.array_files import npz, parquet, tensors
from tailscope.array_files.text import Array, Arrays, message_of
from tailscope.errors import UserError

__all__ = ["Array", "Arrays", "check_writable", "message_of", "read", "write"]

_READERS: dict[str, Callable[[Path, Sequence[str]], Arrays]] = {
    ".npz": npz.read,
    ".safetensors": tensors.read,
    ".parquet": parquet.read,
}
_WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    ".npz": npz.write,
    ".safetensors": tensors.write,
    ".parquet": parquet.write,
}


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Arrays:
    """Return the named arrays of a file; fields that are not asked for are not read.

    Raises:
        UserError: the file is missing, damaged or of an unknown format, lacks a field, or holds Python objects.
    """
    if path.suffix not in _READERS:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(_READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    arrays = _READERS[path.suffix](path, [*required, *optional])
    missing = [name for name in required if name not in arrays]
    if missing:
        raise UserError(f"{path}: no field {missing[0]!r}; needs {', '.join(required)}")
    return arrays


def check_writable(path: Path) -> None:
    """Check, before long work, that `write` can write there.

    Raises:
        UserError: the suffix is unknown, its library is not installed, or the folder is not there or not writable.
    """
    if path.suffix not in _WRITERS:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(_WRITERS)}")
    if path.suffix == ".parquet":
        parquet.require_pyarrow(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose a file in an existing folder")


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays in the format that the suffix names: the whole file or nothing.

    Raises:
        UserError: as `check_writable`, or the disk refuses.
    """
    check_writable(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _WRITERS[path.suffix](partial, arrays)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or message_of(error)})") from error
    finally:
        partial.unlink(missing_ok=True)
