"""Named arrays in files of many formats. Nothing is ever unpickled but by PyTorch's restricted reader.

What the formats hold is the same; only text differs. An `.npz` has text arrays. A `.safetensors`, which has none, keeps
`class_names` and `provenance` as JSON in its header, and text of the rows as UTF-8 bytes, uint8 [N, longest], padded
with zeros. `.pt` has a dict, `.npy` one array, whose labels lie in another file beside it.

`.csv`, `.tsv` and `.parquet` have one row a sample, in `tailscope.tables.columns`. In `.csv` and `.tsv` commas,
semicolons, tabs or bars part the cells.
"""

import codecs
import csv
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.errors import GIT_LFS, UserError, message_of, require_file, unknown
from tailscope.store.files import replacing
from tailscope.tables import arrays, parquet
from tailscope.tables.arrays import ALIASES, SINGLE, UNREADABLE, Array, Arrays, Contents
from tailscope.tables.columns import LISTS, NUMBER, OTHER, Choice, choose, to_arrays

_log = logging.getLogger(__name__)

_DELIMITERS = ",;\t|"
_ROWS_AT_ONCE = 1024
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.0+)?")
Rows = list[list[str]]


def _read_delimited(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    with path.open(encoding=_encoding(path), newline="") as file:
        head = file.readline()
        delimiter = max(_DELIMITERS, key=head.count)
        file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(lines, [])]
        blocks = _blocks(path, names, lines)
        first = next(blocks, [])
        if not first or all(map(_is_number, names)):
            found = "no names" if first else "no samples"
            raise UserError(
                f"{path}: {found}; the first line names the columns (f0,f1,label), then comes a line a sample"
            )
        kinds = _kinds(names, first)
        chosen = choose(path, names, kinds, kinds)
        return _collect(path, names, chosen, first, blocks)


def _collect(path: Path, names: list[str], chosen: Choice, first: Rows, blocks: Iterator[Rows]) -> Contents:
    place = {name: i + 1 for i, name in enumerate(names)}
    wanted = [place[name] for name in chosen.features]
    features: list[Array] = []
    texts: dict[str, list[str]] = {field: [] for field in chosen.fields}
    for block in chain([first], blocks):
        rows = [_lists(path, row, wanted[0]) if chosen.lists else _numbers(path, names, row, wanted) for row in block]
        widths = {len(row) for row in rows} | {block.shape[1] for block in features[:1]}
        if len(widths) > 1:
            raise UserError(f"{path}: the lists in column {chosen.features[0]!r} differ in length")
        features.append(np.array(rows, dtype=np.float64))
        for field, name in chosen.fields.items():
            texts[field].extend(row[place[name]] for row in block)
    columns = {field: _typed(cells) for field, cells in texts.items()}
    return Contents(to_arrays(path, np.concatenate(features), columns), chosen.notes)


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _blocks(path: Path, names: list[str], lines: Any) -> Iterator[Rows]:
    """Yield the samples' cells, block by block, each after the number of its line."""
    while batch := list(islice(lines, _ROWS_AT_ONCE)):
        rows = []
        for line, cells in enumerate(batch, start=lines.line_num - len(batch) + 1):
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != len(names):
                raise UserError(f"{path}: line {line} has {len(cells)} cells, but the first line names {len(names)}")
            rows.append([str(line), *cells])
        if rows:
            yield rows


def _numbers(path: Path, names: list[str], row: list[str], wanted: list[int]) -> list[float]:
    try:
        return [float(row[i]) for i in wanted]
    except ValueError:
        wrong = next(i for i in wanted if not _is_number(row[i]))
        raise UserError(f"{path}: line {row[0]}, column {names[wrong - 1]!r}: {row[wrong]!r} is no number") from None


def _lists(path: Path, row: list[str], column: int) -> list[float]:
    """Return the numbers of a cell such as `[0.1, 0.2]`, with commas or, as NumPy prints them, without."""
    try:
        return [float(number) for number in row[column].strip().strip("[]()").replace(",", " ").split()]
    except ValueError:
        raise UserError(f"{path}: line {row[0]}: {row[column][:40]!r} is no list of numbers") from None


def _typed(cells: list[str]) -> Array:
    """Return int64 where every cell is a whole number, as it is written or as 3.0, else text."""
    stripped = [cell.strip() for cell in cells]
    if all(map(_WHOLE.fullmatch, stripped)):
        return np.array([int(cell.partition(".")[0]) for cell in stripped], dtype=np.int64)
    return np.array(stripped, dtype=np.str_)


def _kinds(names: list[str], block: Rows) -> dict[str, str]:
    """Return what each column holds by its first cell that is not empty."""
    cells = zip(*(row[1:] for row in block), strict=True)
    return {name: _kind(next(filter(str.strip, column), "")) for name, column in zip(names, cells, strict=True)}


def _kind(cell: str) -> str:
    if _is_number(cell):
        return NUMBER
    return LISTS if cell.strip()[:1] in ("[", "(") else OTHER


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Contents]] = {
    ".npz": arrays.read_npz,
    ".safetensors": arrays.read_safetensors,
    ".parquet": parquet.read_parquet,
    ".npy": arrays.read_single,
    ".pt": arrays.read_pickled,
    ".pth": arrays.read_pickled,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
}
_WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    ".npz": arrays.write_npz,
    ".safetensors": arrays.write_safetensors,
    ".parquet": parquet.write_parquet,
}
_BY_ROWS = (".parquet", ".csv", ".tsv")
_LFS_BYTES = 1024


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return the named arrays of a file; fields that are not asked for are not read.

    Raises:
        UserError: the file is missing, damaged or of an unknown format, lacks a field, or holds Python objects.
    """
    contents = _guarded(path, required, optional)
    shapes = {name: list(array.shape) for name, array in contents.arrays.items()}
    _log.info("read %s: %s", path, ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    if SINGLE not in contents.arrays:
        return contents
    features = contents.arrays[SINGLE]
    beside = _labels_beside(path, features, required)
    labels = _guarded(beside, (), ()).arrays.get(SINGLE)
    if labels is None:
        raise UserError(f"{beside}: expected the labels of {path.name} alone")
    return Contents({"features": features, "labels": labels})


def _guarded(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Read one file: the one place where what the libraries raise becomes a line."""
    reader = _READERS.get(path.suffix.lower())
    if reader in (None, parquet.read_parquet) and os.path.isdir(path):  # noqa: PTH112 - Path's raises where a name is too long
        return parquet.read_folder(path, required, optional)
    if reader is None:
        raise UserError(f"{path}: {unknown('format', path.suffix, _READERS)}")
    require_file(path)
    try:
        if path.stat().st_size < _LFS_BYTES and path.read_bytes().startswith(GIT_LFS):
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; fetch it with git lfs pull")
        if path.suffix.lower() in _BY_ROWS and "features" not in required:
            raise UserError(f"{path}: a table has one row a sample; expected {', '.join(required)} in an .npz")
        return reader(path, required, optional)
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path}: may not be read (permission denied)") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable {path.suffix}, truncated or damaged ({message_of(error)})") from None


def check_writable(path: Path) -> None:
    """Check, before long work, that `write` can write there.

    Raises:
        UserError: the suffix is unknown, its library is not installed, or the folder is not there or not writable.
    """
    if path.suffix not in _WRITERS:
        raise UserError(f"{path}: {unknown('format', path.suffix, _WRITERS)}")
    if path.suffix == ".parquet":
        parquet.pyarrow(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose a file in an existing folder")


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays in the format that the suffix names: the whole file or nothing."""
    check_writable(path)
    with replacing(path, durable=False) as partial:
        _WRITERS[path.suffix](partial, arrays)


def _labels_beside(path: Path, array: Array, required: Sequence[str]) -> Path:
    """Return the file of labels beside a file of features, which holds the array alone."""
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
