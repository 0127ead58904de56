"""Named arrays in files of many formats. Nothing is ever unpickled but by PyTorch's restricted reader.

What the formats hold is the same; only text differs. An `.npz` has text arrays. A `.safetensors`, which has none, keeps
`class_names` and `provenance` as JSON in its header, and text of the rows as UTF-8 bytes, uint8 [N, longest], padded
with zeros. `.parquet` and `.csv` have one row a sample (`columns`), `.pt` a dict, `.npy` one array, whose labels lie in
another file beside it.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tailscope.errors import GIT_LFS, UserError, unreadable
from tailscope.store.files import replacing
from tailscope.tables import arrays, columns, pickles
from tailscope.tables.arrays import ALIASES, SINGLE, Array, Arrays, Contents, message_of, parse_json, shown

__all__ = ["Array", "Arrays", "Contents", "check_writable", "message_of", "parse_json", "read", "shown", "write"]


class _Format(NamedTuple):
    """How a format is read, and what its reader raises on a damaged file: nothing else is caught."""

    read: Callable[[Path, Sequence[str], Sequence[str]], Contents]
    unreadable: tuple[type[Exception], ...]
    by_rows: bool = False


_READERS = {
    ".npz": _Format(arrays.read_npz, arrays.UNREADABLE_NPZ),
    ".safetensors": _Format(arrays.read_safetensors, arrays.UNREADABLE_TENSORS),
    ".parquet": _Format(columns.read_parquet, columns.UNREADABLE_PARQUET, by_rows=True),
    ".npy": _Format(arrays.read_single, arrays.UNREADABLE_NPZ),
    ".pt": _Format(pickles.read, pickles.UNREADABLE),
    ".pth": _Format(pickles.read, pickles.UNREADABLE),
    ".csv": _Format(columns.read_delimited, columns.UNREADABLE_TEXT, by_rows=True),
    ".tsv": _Format(columns.read_delimited, columns.UNREADABLE_TEXT, by_rows=True),
}
_WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    ".npz": arrays.write_npz,
    ".safetensors": arrays.write_safetensors,
    ".parquet": columns.write,
}
_WORDS = {
    "missing": "no such file",
    "empty": "the file is empty",
    "may not be read": "may not be read (permission denied)",
}
_LFS_BYTES = 1024


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return the named arrays of a file; fields that are not asked for are not read.

    Raises:
        UserError: the file is missing, damaged or of an unknown format, lacks a field, or holds Python objects.
    """
    contents = _guarded(path, required, optional)
    if SINGLE not in contents.arrays:
        return contents
    features = contents.arrays[SINGLE]
    beside = labels_beside(path, features, required)
    labels = _guarded(beside, (), ()).arrays.get(SINGLE)
    if labels is None:
        raise UserError(f"{beside}: expected the labels of {path.name} alone")
    return Contents({"features": features, "labels": labels})


def _guarded(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Read one file: the one place where what the libraries raise becomes a line."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(_READERS)}")
    problem = unreadable(path)
    if problem:
        raise UserError(f"{path}: {_WORDS.get(problem, problem)}")
    try:
        if path.stat().st_size < _LFS_BYTES and path.read_bytes().startswith(GIT_LFS):
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; fetch it with git lfs pull")
        if reader.by_rows and "features" not in required:
            raise UserError(f"{path}: a table has one row a sample; expected {', '.join(required)} in an .npz")
        return reader.read(path, required, optional)
    except PermissionError:
        raise UserError(f"{path}: {_WORDS['may not be read']}") from None
    except reader.unreadable as error:
        raise UserError(f"{path}: not a readable {path.suffix}, truncated or damaged ({message_of(error)})") from None


def check_writable(path: Path) -> None:
    """Check, before long work, that `write` can write there.

    Raises:
        UserError: the suffix is unknown, its library is not installed, or the folder is not there or not writable.
    """
    if path.suffix not in _WRITERS:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(_WRITERS)}")
    if path.suffix == ".parquet":
        columns.require_pyarrow(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose a file in an existing folder")


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays in the format that the suffix names: the whole file or nothing.

    Raises:
        UserError: as `check_writable`, or the disk refuses.
    """
    check_writable(path)
    with replacing(path, durable=False) as partial:
        _WRITERS[path.suffix](partial, arrays)


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
