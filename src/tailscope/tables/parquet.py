"""Parquet files, and folders of them that are larger than memory. Both need pyarrow.

A schema's metadata may have the names of all classes, as the JSON list `class_names`, and `provenance`.

What works on one class at a time would read a folder many times over. So its rows are put in order once, the classes
ascending and each class's rows as they come in the files (sorted by name), into a NumPy file that is mapped into memory
as it is needed. It lies in a cache, under a name that the files' paths, sizes and times make up: where one of them
changes, it is written anew. The files are read batch by batch; only labels, ids and groups are held in memory.

A folder that `tailscope features` writes (`encoders.parts`) has `extraction.json` too, which says of how many images it
is: one that was not written to its end is refused.
"""

import hashlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tailscope.errors import UserError, message_of
from tailscope.store.files import reading, replacing, writing
from tailscope.tables.arrays import (
    UNREADABLE,
    Array,
    Arrays,
    Contents,
    arrays_to_header,
    header_to_arrays,
    parse_json,
    require_room,
)
from tailscope.tables.columns import LISTS, NUMBER, OTHER, Choice, choose, to_arrays
from tailscope.tables.mapped import CACHE, cache_folder

_log = logging.getLogger(__name__)

EXTRACTION = "extraction.json"
EXTRACTION_SCHEMA = "tailscope.features/1"
UNREADABLE_IMAGES = ".unreadable.json"
"""In place of `.parquet`: which of the images that a file of an extraction is of cannot be read, a list."""

_PARQUET_ROWS_AT_ONCE = 2**14
_RAGGED = "{}: the lists in column {!r} have gaps or differ in length"
_COLUMNS = {"labels": "label", "ids": "id", "groups": "group"}


def pyarrow(path: Path) -> Any:
    """Return pyarrow with its Parquet module loaded."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'tailscope[parquet]'") from None


def read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields of a feature table that a file has."""
    pa = pyarrow(path)
    try:
        with path.open("rb") as opened, pa.parquet.ParquetFile(opened) as file:  # a name that is no UTF-8 opens only so
            return _read(path, file, optional)
    except pa.ArrowException as error:  # which is, of text that is no UTF-8, none of those above
        raise ValueError(str(error)) from error


def rows_in(path: Path) -> int | None:
    """Return how many rows a file says that it has; None where there is none that can be read."""
    try:
        with path.open("rb") as opened:
            return int(pyarrow(path).parquet.read_metadata(opened).num_rows)
    except (OSError, pyarrow(path).ArrowException):
        return None


def _read(path: Path, file: Any, optional: Sequence[str]) -> Contents:
    part = _part(path, file)
    _check_sizes(path, file, part.chosen)
    arrays = to_arrays(path, _parquet_features(path, file, part.chosen), part.rows)
    texts = header_to_arrays(path, {k: v for k, v in part.header.items() if k in optional})
    return Contents(arrays | texts, part.chosen.notes)


def write_parquet(path: Path, arrays: Arrays) -> None:
    """Write the fields of a feature table."""
    pa = pyarrow(path)
    features = np.ascontiguousarray(arrays["features"])
    table_columns = {column: pa.array(arrays[field]) for field, column in _COLUMNS.items() if field in arrays}
    table_columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table(table_columns).replace_schema_metadata(arrays_to_header(arrays))
    # Features do not compress, and a dictionary of them would only take time.
    pa.parquet.write_table(table, path, row_group_size=_PARQUET_ROWS_AT_ONCE, use_dictionary=False, compression="none")


def _parquet_kind(pa: Any, kind: Any) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return LISTS
    return NUMBER if pa.types.is_integer(kind) or pa.types.is_floating(kind) else OTHER


def _check_sizes(path: Path, file: Any, chosen: Choice) -> None:
    """Check what the file declares, by its first row where the features are lists: few bytes may stand for many values.

    Not by the metadata of single columns: where these are damaged, pyarrow ends the process.
    """
    width = len(chosen.features)
    if chosen.lists and (first := next(file.iter_batches(1, columns=chosen.features), None)):
        width = len(first.column(chosen.features[0]).flatten())
    require_room(path, "the table", (file.metadata.num_rows, max(width, 1)), 8)


def _parquet_features(path: Path, file: Any, chosen: Choice) -> Array:
    """Return [N, d] from the column of lists or from a column a feature, batch by batch."""
    rows, filled = np.empty((0, 0)), 0
    for block in _parquet_blocks(path, file, chosen):
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


def _parquet_blocks(path: Path, file: Any, chosen: Choice) -> Iterator[Array]:
    first = chosen.features[0]
    for batch in file.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=chosen.features):
        if chosen.lists:
            column = batch.column(first)
            values, lengths = column.flatten(), column.value_lengths().to_numpy(zero_copy_only=False)
            if column.null_count or values.null_count or (lengths != lengths[:1]).any():
                raise UserError(_RAGGED.format(path, first))
            yield values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
        else:
            parts = [_plain(path, name, batch.column(name)) for name in chosen.features]
            yield np.column_stack([part if part.dtype.kind == "f" else part.astype(np.float64) for part in parts])


def _plain(path: Path, name: str, column: Any) -> Array:
    """Return a column without nulls as a plain array; text as a text array."""
    if column.null_count:
        raise UserError(f"{path}: column {name!r} has {column.null_count} empty cells; fill or drop these rows")
    array: Array = np.asarray(column)
    return array.astype(np.str_) if array.dtype.kind == "O" else array


def read_folder(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return the fields of the feature table that a folder's Parquet files make up; its features are a mapped file.

    Rows are sorted by label. Files in folders further down count too, in the order of their paths.

    Raises:
        UserError: there is none, one cannot be read, they differ in columns or have no rows, the sorted copy finds no
            room, or an extraction was not done.
    """
    sources = sorted(path.rglob("*.parquet"))
    if not sources or "features" not in required:
        raise UserError(f"{path}: a folder, not a file; of folders only those with .parquet files hold features")
    for folder in sorted({path, *(source.parent for source in sources)}):
        _require_done(folder)
    sorted_copy = cache_folder() / "tables" / _key_of(sources)
    said = sorted_copy / "fields.json"
    if not said.exists():
        _sort(path, sources, sorted_copy, optional)
    with reading(said):
        described = json.loads(said.read_text(encoding="utf-8"))
        arrays: Arrays = {field: np.load(sorted_copy / f"{field}.npy") for field in described["fields"]}
        # Copied where it is written to, which is nowhere: PyTorch wants memory that it may write to.
        arrays["features"] = np.load(sorted_copy / "features.npy", mmap_mode="c")
    return Contents(arrays | header_to_arrays(path, described["header"]), tuple(described["notes"]))


def _require_done(folder: Path) -> None:
    """Refuse a folder that `tailscope features` has not written to its end, where it says of how many images it is."""
    said = _json_in(folder / EXTRACTION)
    images = said.get("images") if isinstance(said, dict) and said.get("schema") == EXTRACTION_SCHEMA else None
    if not isinstance(images, int):
        return
    unreadable = [_json_in(file) for file in folder.glob(f"*{UNREADABLE_IMAGES}")]
    rows = sum(rows_in(file) or 0 for file in folder.glob("*.parquet"))
    known = rows + sum(len(found) for found in unreadable if isinstance(found, list))
    if known != images:
        raise UserError(
            f"{folder}: {known:,} of {images:,} images are extracted; run the same `features` command again"
        )


def _json_in(file: Path) -> Any:
    """Return what a file says as JSON; None where there is none that says anything."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _key_of(sources: Sequence[Path]) -> str:
    """Return a name for what files hold, told by their paths, sizes and times."""
    digest = hashlib.sha256()
    for source in sources:
        stat = source.stat()
        digest.update(repr((os.fsencode(source.resolve()), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:24]


class _Part(NamedTuple):
    """What is held of one file: how its columns are used, its rows' fields and the header's texts."""

    chosen: Choice
    rows: Arrays
    header: dict[str, str]


def _sort(path: Path, sources: Sequence[Path], folder: Path, optional: Sequence[str]) -> None:
    """Write the sorted copy; `fields.json`, its table of contents, comes last."""
    _log.info("sorting the rows of %d files of %s by class, to %s", len(sources), path, folder)
    parts = []
    for source in sources:
        with _opened(source) as file:
            parts.append(_of_the_table(_part(source, file), optional))
    _check_alike(sources, parts)
    columns = {field: np.concatenate([part.rows[field] for part in parts]) for field in parts[0].rows}
    counts = [len(next(iter(part.rows.values()))) for part in parts]
    arrays = to_arrays(path, np.empty(0), columns)
    order = np.argsort(arrays["labels"], kind="stable")
    if not len(order):
        raise UserError(f"{path}: none of its {len(sources)} .parquet files has a row")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "features.npy", durable=False) as partial_file:
        blocks = _placed(sources, parts, np.split(place, np.cumsum(counts)[:-1]))
        _write_sorted(path, partial_file, len(order), blocks)
    held = [field for field in ("labels", "ids", "groups", "class_names") if field in arrays]
    for field in held:
        with replacing(folder / f"{field}.npy", durable=False) as partial_file, partial_file.open("wb") as file:
            np.save(file, arrays[field] if field == "class_names" else arrays[field][order], allow_pickle=False)
    notes = list(dict.fromkeys(note.replace(str(sources[0]), str(path)) for note in parts[0].chosen.notes))
    with replacing(folder / "fields.json", durable=False) as partial_file:
        described = {"fields": held, "header": parts[0].header, "notes": notes}
        partial_file.write_text(json.dumps(described), encoding="utf-8")


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    """Open one file of a folder; what pyarrow raises becomes a line."""
    pa = pyarrow(source)
    try:
        with source.open("rb") as opened, pa.parquet.ParquetFile(opened) as file:
            yield file
    except UserError:
        raise
    except (*UNREADABLE, pa.ArrowException) as error:
        raise UserError(f"{source}: not a readable .parquet, truncated or damaged ({message_of(error)})") from None


def _part(source: Path, file: Any) -> _Part:
    """Return all of an open file but its features."""
    pa, schema = pyarrow(source), file.schema_arrow
    types = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    kinds = {name: _parquet_kind(pa, kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    chosen = choose(source, schema.names, kinds, types)
    rows = {field: _plain(source, name, file.read([name]).column(name)) for field, name in chosen.fields.items()}
    return _Part(chosen, rows, {k.decode(): v.decode("utf-8", "replace") for k, v in (schema.metadata or {}).items()})


def _of_the_table(part: _Part, optional: Sequence[str]) -> _Part:
    """Return a part with the texts that are of the whole table: no digest, which is of the rows of one file."""
    header = {k: v for k, v in part.header.items() if k in optional}
    provenance = parse_json(header.get("provenance", ""))
    if isinstance(provenance, dict):
        header["provenance"] = json.dumps({k: v for k, v in provenance.items() if k != "sha256"})
    return part._replace(header=header)


def _check_alike(sources: Sequence[Path], parts: Sequence[_Part]) -> None:
    first = parts[0]
    for source, part in zip(sources, parts, strict=True):
        kinds = [{field: array.dtype.kind for field, array in one.rows.items()} for one in (first, part)]
        same = kinds[0] == kinds[1] and (part.chosen.lists, part.header) == (first.chosen.lists, first.header)
        if not same or (not part.chosen.lists and part.chosen.features != first.chosen.features):
            raise UserError(
                f"{source}: its columns, their types, class names or provenance are not those of {sources[0].name}; the"
                " files of a folder must be parts of one table"
            )


def _placed(
    sources: Sequence[Path], parts: Sequence[_Part], places: Sequence[Array]
) -> Iterator[tuple[Path, Array, Array]]:
    """Yield the features of all files, block by block, with the row of the sorted copy that each belongs to."""
    for source, part, place in zip(sources, parts, places, strict=True):
        done = 0
        with _opened(source) as file:
            for block in _parquet_blocks(source, file, part.chosen):
                yield source, block, place[done : done + len(block)]
                done += len(block)


def _write_sorted(path: Path, target: Path, rows: int, blocks: Iterator[tuple[Path, Array, Array]]) -> None:
    """Write blocks of rows to their places in an `.npy` file; rows that follow each other there go together."""
    shape, kind, start = None, np.dtype(np.float32), 0
    with target.open("wb") as file:
        for source, block, places in blocks:
            if shape is None:
                shape, kind = (rows, block.shape[1]), block.dtype
                _require_disk(path, target, rows * block.shape[1] * kind.itemsize)
                np.lib.format.write_array_header_1_0(file, {"descr": kind.str, "fortran_order": False, "shape": shape})
                start = file.tell()
            if block.shape[1] != shape[1] or block.dtype != kind:
                raise UserError(
                    f"{source}: has rows of {block.shape[1]} features in {block.dtype}, other files of {shape[1]} in"
                    f" {kind}; extract all with the same encoder"
                )
            order = np.argsort(places)
            for run in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1):
                file.seek(start + int(places[run[0]]) * shape[1] * kind.itemsize)
                file.write(np.ascontiguousarray(block[run]).data)


def _require_disk(path: Path, target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(
            f"{path}: its sorted copy takes {size / 2**30:,.1f} GiB, and {target.parent} has {free / 2**30:,.1f} GiB"
            f" free; set {CACHE} to a folder with more"
        )
