"""Feature tables as Parquet: one row a sample. Needs pyarrow, which is imported only here.

The columns are those of `tailscope.array_files.columns`. The names of all classes may instead stand in the schema's
metadata, as the JSON list `class_names`; that is how `write` does it, with `provenance` beside it.
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.array_files import columns
from tailscope.array_files.fields import Array, Arrays, Contents, arrays_to_header, header_to_arrays, require_room
from tailscope.errors import UserError

# What pyarrow raises on damaged files: its own errors derive from these.
UNREADABLE: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, LookupError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip
_ROWS_AT_ONCE = 2**14
_RAGGED = "{}: the lists in column {!r} have gaps or differ in length"
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


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return the features, labels and what else of the fields a table has.

    Raises:
        UserError: columns are missing or hold nulls or lists of different lengths.
        Exception: one of `UNREADABLE`, where the file is damaged.
    """
    pa = require_pyarrow(path)
    try:
        with path.open("rb") as opened, pa.parquet.ParquetFile(opened) as file:  # a name that is no UTF-8 opens only so
            return _read(pa, path, file, optional)
    except pa.ArrowException as error:  # which is, of text that is no UTF-8, none of those above
        raise ValueError(str(error)) from error


def _read(pa: Any, path: Path, file: Any, optional: Sequence[str]) -> Contents:
    schema = file.schema_arrow
    types = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    kinds = {name: _kind(pa, kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    chosen = columns.choose(path, schema.names, kinds, types)
    _check_sizes(path, file, chosen)
    rows = {field: _plain(path, name, file.read([name]).column(name)) for field, name in chosen.fields.items()}
    arrays = columns.to_arrays(path, _features(path, file, chosen), rows)
    header = {k.decode(): v.decode("utf-8", "replace") for k, v in (schema.metadata or {}).items()}
    texts = header_to_arrays(path, {k: v for k, v in header.items() if k in optional})
    return Contents(arrays | texts, chosen.notes)


def write(path: Path, arrays: Arrays) -> None:
    """Write a table with `features` and whatever else of the fields there is."""
    pa = require_pyarrow(path)
    features = np.ascontiguousarray(arrays["features"])
    table_columns = {column: pa.array(arrays[field]) for field, column in _COLUMNS.items() if field in arrays}
    table_columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table(table_columns).replace_schema_metadata(arrays_to_header(arrays))
    # Features do not compress, and a dictionary of them would only take time.
    pa.parquet.write_table(table, path, row_group_size=_ROWS_AT_ONCE, use_dictionary=False, compression="none")


def _kind(pa: Any, kind: Any) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return columns.LISTS
    return columns.NUMBER if pa.types.is_integer(kind) or pa.types.is_floating(kind) else columns.OTHER


def _check_sizes(path: Path, file: Any, chosen: columns.Choice) -> None:
    """Check what the file declares, by its first row where the features are lists: few bytes may stand for many values.

    Not by the metadata of single columns: where these are damaged, pyarrow ends the process.
    """
    width = len(chosen.features)
    for first in file.iter_batches(1, columns=chosen.features) if chosen.lists else ():
        width = len(first.column(chosen.features[0]).flatten())
        break
    require_room(path, "the table", (file.metadata.num_rows, max(width, 1)), 8)


def _features(path: Path, file: Any, chosen: columns.Choice) -> Array:
    """Return [N, d] from the column of lists or from a column a feature, batch by batch."""
    rows, filled = np.empty((0, 0)), 0
    for block in _blocks(path, file, chosen):
        if filled == 0:
            shape = (file.metadata.num_rows, block.shape[1])
            require_room(path, "the table", shape, block.dtype.itemsize)
            rows = np.empty(shape, dtype=block.dtype)
        if block.shape[1] != rows.shape[1]:
            raise UserError(_RAGGED.format(path, chosen.features[0]))
        rows[filled : filled + len(block)] = block
        filled += len(block)
    if filled != len(rows):
        raise ValueError(f"declares {len(rows)} rows, but has {filled}")
    return rows


def _blocks(path: Path, file: Any, chosen: columns.Choice) -> Iterator[Array]:
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=chosen.features):
        if chosen.lists:
            yield _lists(path, chosen.features[0], batch.column(chosen.features[0]))
        else:
            parts = [_plain(path, name, batch.column(name)) for name in chosen.features]
            yield np.column_stack([part if part.dtype.kind == "f" else part.astype(np.float64) for part in parts])


def _lists(path: Path, name: str, column: Any) -> Array:
    values = column.flatten()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if column.null_count or values.null_count or (lengths != lengths[:1]).any():
        raise UserError(_RAGGED.format(path, name))
    array: Array = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), -1)


def _plain(path: Path, name: str, column: Any) -> Array:
    """Return a column without nulls as a plain array; text as a text array."""
    if column.null_count:
        raise UserError(f"{path}: column {name!r} has {column.null_count} empty cells; fill or drop these rows")
    array: Array = np.asarray(column)
    return array.astype(np.str_) if array.dtype.kind == "O" else array
