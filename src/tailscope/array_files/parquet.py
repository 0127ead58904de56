"""Feature tables as Parquet: one row a sample. Needs pyarrow, which is imported only here.

Columns: `label` (integer), the features either as one list column `features` or as `f0`, `f1`, ...; optionally `id`,
`group` and `class_name` (the name of the row's class). The names of all classes may instead stand in the schema's
metadata, as the JSON list `class_names`; that is how `write` does it, with `provenance` beside it.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.array_files.text import Array, Arrays, arrays_to_header, header_to_arrays, message_of
from tailscope.errors import UserError

_ROWS_AT_ONCE = 2**14
_RAGGED = "{}: the lists in column 'features' have gaps or differ in length"
_COLUMNS = {"labels": "label", "ids": "id", "groups": "group"}


def require_pyarrow(path: Path) -> Any:
    """Return pyarrow with its Parquet module loaded.

    Raises:
        UserError: it is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'tailscope[parquet]'") from None


def read(path: Path, wanted: Sequence[str]) -> Arrays:
    """Return those of the wanted fields that the file has.

    Raises:
        UserError: the file is damaged, columns hold nulls or lists of different lengths, or a class has no name.
    """
    pa = require_pyarrow(path)
    try:
        with pa.parquet.ParquetFile(path) as file:
            return _read_open(path, file, wanted)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable .parquet, or truncated ({message_of(error)})") from None


def write(path: Path, arrays: Arrays) -> None:
    """Write a table with `features` and whatever else of the fields there is."""
    pa = require_pyarrow(path)
    features = np.ascontiguousarray(arrays["features"])
    columns = {column: pa.array(arrays[field]) for field, column in _COLUMNS.items() if field in arrays}
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table(columns).replace_schema_metadata(arrays_to_header(arrays))
    # Features do not compress, and a dictionary of them would only take time.
    pa.parquet.write_table(table, path, row_group_size=_ROWS_AT_ONCE, use_dictionary=False, compression="none")


def _read_open(path: Path, file: Any, wanted: Sequence[str]) -> Arrays:
    present = file.schema_arrow.names
    arrays = {}
    if "features" in wanted and (features := _features(path, file)) is not None:
        arrays["features"] = features
    for field, column in _COLUMNS.items():
        if field in wanted and column in present:
            arrays[field] = _column(path, file, column)
    if "class_names" in wanted and "class_name" in present and "labels" in arrays:
        arrays["class_names"] = _names_of_rows(path, arrays["labels"], _column(path, file, "class_name"))
    header = {k.decode(): v.decode("utf-8", "replace") for k, v in (file.schema_arrow.metadata or {}).items()}
    return arrays | header_to_arrays(path, {k: v for k, v in header.items() if k in wanted})


def _features(path: Path, file: Any) -> Array | None:
    """Return [N, d] from the list column or from f0 ... f(d-1), batch by batch; None where there is neither."""
    present = file.schema_arrow.names
    names = ["features"]
    if "features" not in present:
        names = [f"f{i}" for i in range(sum(name[0] == "f" and name[1:].isdigit() for name in present))]
        missing = [name for name in names if name not in present]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; the features are f0 to {names[-1]}")
        if not names:
            return None
    rows, filled = np.empty((0, 0)), 0
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=names):
        if names == ["features"]:
            block = _lists(path, batch.column("features"))
        else:
            block = np.column_stack([_plain(path, name, batch.column(name)) for name in names])
        if filled == 0:
            rows = np.empty((file.metadata.num_rows, block.shape[1]), dtype=block.dtype)
        if block.shape[1] != rows.shape[1]:
            raise UserError(_RAGGED.format(path))
        rows[filled : filled + len(block)] = block
        filled += len(block)
    return rows


def _lists(path: Path, column: Any) -> Array:
    if "list" not in str(column.type):
        raise UserError(f"{path}: column 'features' is {column.type}; expected lists of numbers")
    values = column.flatten()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if column.null_count or values.null_count or (lengths != lengths[:1]).any():
        raise UserError(_RAGGED.format(path))
    array: Array = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), -1)


def _column(path: Path, file: Any, name: str) -> Array:
    return _plain(path, name, file.read([name]).column(name))


def _plain(path: Path, name: str, column: Any) -> Array:
    """Return a column without nulls as a plain array; text as a text array."""
    if column.null_count:
        raise UserError(f"{path}: column {name!r} has {column.null_count} empty cells; fill or drop these rows")
    array: Array = np.asarray(column)
    return array.astype(np.str_) if array.dtype.kind == "O" else array


def _names_of_rows(path: Path, labels: Array, names: Array) -> Array:
    """Return the name of each class 0 ... C-1 from the rows' labels and names [N]."""
    present, first = np.unique(labels, return_index=True)
    by_row = names[first][np.searchsorted(present, labels)]
    if (by_row != names).any():
        row = int((by_row != names).argmax())
        raise UserError(f"{path}: label {labels[row]} is called '{by_row[row]}' and '{names[row]}' in 'class_name'")
    absent = np.setdiff1d(np.arange(len(present)), present)
    if len(absent):
        raise UserError(
            f"{path}: no row names class {absent[0]}; put all names into the schema's metadata as 'class_names'"
        )
    return names[first]
