"""Feature tables as Parquet: one row a sample. Needs pyarrow, which is imported only here.

Columns: `label` (integer), the features either as one list column `features` or as `f0`, `f1`, ...; optionally `id`,
`group` and `class_name` (the name of the row's class). The names of all classes may instead stand in the schema's
metadata, as the JSON list `class_names`; that is how `write` does it, with `provenance` beside it.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tailscope.array_files.text import Array, Arrays, arrays_to_header, header_to_arrays, one_line
from tailscope.errors import UserError

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
        table = pa.parquet.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable .parquet, or truncated ({one_line(error)})") from None
    arrays = {}
    if "features" in wanted and (features := _features(path, table)) is not None:
        arrays["features"] = features
    for field, column in _COLUMNS.items():
        if field in wanted and column in table.column_names:
            arrays[field] = _plain(path, column, table[column])
    if "class_names" in wanted and "class_name" in table.column_names and "labels" in arrays:
        arrays["class_names"] = _names_of_rows(path, arrays["labels"], _plain(path, "class_name", table["class_name"]))
    header = {k.decode(): v.decode("utf-8", "replace") for k, v in (table.schema.metadata or {}).items()}
    return arrays | header_to_arrays(path, {k: v for k, v in header.items() if k in wanted})


def write(file: BinaryIO, arrays: Arrays) -> None:
    """Write a table with `features` and whatever else of the fields there is."""
    pa = require_pyarrow(Path(file.name))
    features = np.ascontiguousarray(arrays["features"])
    columns = {column: pa.array(arrays[field]) for field, column in _COLUMNS.items() if field in arrays}
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    pa.parquet.write_table(pa.table(columns).replace_schema_metadata(arrays_to_header(arrays)), file)


def _features(path: Path, table: Any) -> Array | None:
    """Return [N, d] from the list column or from f0 ... f(d-1); None where there is neither."""
    if "features" in table.column_names:
        return _list_column(path, table["features"])
    width = sum(name[0] == "f" and name[1:].isdigit() for name in table.column_names)
    if width == 0:
        return None
    missing = [f"f{i}" for i in range(width) if f"f{i}" not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; the features are f0 to f{width - 1}")
    return np.column_stack([_plain(path, f"f{i}", table[f"f{i}"]) for i in range(width)])


def _list_column(path: Path, column: Any) -> Array:
    if "list" not in str(column.type):
        raise UserError(f"{path}: column 'features' is {column.type}; expected lists of numbers")
    lists = column.combine_chunks()
    values = lists.flatten()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    if lists.null_count or values.null_count or (lengths != lengths[:1]).any():
        raise UserError(f"{path}: the lists in column 'features' have gaps or differ in length")
    array: Array = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(lists), -1) if len(lists) else array.reshape(0, 0)


def _plain(path: Path, name: str, column: Any) -> Array:
    """Return a column without nulls as a plain array; text as a text array."""
    if column.null_count:
        raise UserError(f"{path}: column {name!r} has {column.null_count} empty cells; fill or drop these rows")
    array: Array = column.to_numpy()
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
