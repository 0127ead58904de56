"""Tables with one row a sample: `.csv`, `.tsv`, `.parquet` and DataFrames.

Which columns of a table with one row a sample are which: shared by `.csv`, `.parquet` and DataFrames.

`label` (a number or a name), `id`, `group` and `class_name` (the name of the row's class), by any name in
`fields.ALIASES`. The features are a column of lists by one of the names there, else columns numbered from 0 or 1 after
a common prefix (`f0`, `f1`, ...), else all other columns of numbers. What is guessed or left over is said in a note.

`.csv` and `.tsv`: a line of names, then a line a sample, with commas, semicolons, tabs or bars between the cells.

Feature tables as Parquet: one row a sample. Needs pyarrow, which is imported only here.

The columns are those of `tailscope.tables.columns`. The names of all classes may instead stand in the schema's
metadata, as the JSON list `class_names`; that is how `write` does it, with `provenance` beside it.
"""

import codecs
import csv
import importlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tailscope.errors import UserError, first_few
from tailscope.tables.arrays import (
    ALIASES,
    MOST_NAMED,
    Array,
    Arrays,
    Contents,
    Header,
    arrays_to_header,
    header_to_arrays,
    in_words,
    require_room,
    resolve,
    unread,
)

NUMBER, LISTS, OTHER = "number", "lists", "text"
_ROW_FIELDS = ("labels", "ids", "groups")
_INDEX = ("", "index", "level_0", "__index_level_0__", "Unnamed: 0")
NUMBERED = re.compile(r"(.*?)(\d{1,9})", re.DOTALL)


class Choice(NamedTuple):
    """Which column is which.

    Attributes:
        fields: the column of each field that is one column: `labels`, `ids`, `groups`, `class_name`.
        features: the columns of the features: one of lists, or one a feature.
        lists: whether the first is the case.
        notes: what was guessed or left out.
    """

    fields: dict[str, str]
    features: list[str]
    lists: bool
    notes: tuple[str, ...]


def choose(where: Path | str, names: Iterable[str], kinds: Mapping[str, str], types: Mapping[str, str]) -> Choice:
    """Return which column is which.

    Args:
        where: the file, for messages.
        names: of the columns, in their order.
        kinds: `NUMBER`, `LISTS` or `OTHER` for each column.
        types: how messages describe each column.

    Raises:
        UserError: two columns share a name or a meaning, there are no labels or no features, or numbers are missing.
    """
    names = list(names)
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{where}: {Counter(names)[twice[0]]} columns are called {twice[0]!r}; names must differ")
    held = {name: Header(types[name]) for name in names}
    fields = resolve(where, held, (), _ROW_FIELDS)
    if "class_name" in names:
        fields["class_name"] = "class_name"
    rest = [name for name in names if name not in fields.values()]
    other_labels = {alias for field in _ROW_FIELDS for alias in ALIASES[field]}  # beside `labels`: no features
    features, lists, notes = _features(where, [name for name in rest if name not in other_labels], kinds, types)
    for field, found in (("features", features), ("labels", "labels" in fields or "class_name" in fields)):
        if not found:
            raise UserError(f"{where}: no field {field!r}; needs features, labels, and holds {in_words(held)}")
    return Choice(fields, features, lists, (*notes, *unread(where, rest, features)))


def to_arrays(where: Path | str, features: Array, columns: Mapping[str, Array]) -> Arrays:
    """Return the fields of a feature table from its features [N, d] and the chosen columns [N].

    Raises:
        UserError: a label has two names in `class_name`.
    """
    arrays = {"features": features, **{field: columns[field] for field in _ROW_FIELDS if field in columns}}
    if "class_name" in columns and "labels" not in columns:
        arrays["labels"] = columns["class_name"]
    elif "class_name" in columns:
        arrays["labels"], arrays["class_names"] = _named_rows(where, columns["labels"], columns["class_name"])
    return arrays


def _features(
    where: Path | str, rest: list[str], kinds: Mapping[str, str], types: Mapping[str, str]
) -> tuple[list[str], bool, list[str]]:
    named = [name for name in ALIASES["features"] if name in rest]
    if len(named) > 1 and named[0] != "features":
        raise UserError(f"{where}: holds both {named[0]!r} and {named[1]!r}; keep the one that is the features")
    if named:
        if kinds[named[0]] != LISTS:
            raise UserError(f"{where}: column {named[0]!r} is {types[named[0]]}; expected lists of numbers")
        return named[:1], True, []
    numbered = _numbered(where, [name for name in rest if kinds[name] == NUMBER])
    if numbered:
        return numbered, False, []
    plain = [name for name in rest if kinds[name] == NUMBER and name not in _INDEX]
    shown = first_few([repr(name) for name in plain], MOST_NAMED)
    return plain, False, [f"{where}: taken as the features: {len(plain)} columns, {shown}"] if plain else []


def _numbered(where: Path | str, names: list[str]) -> list[str]:
    """Return the columns PREFIX0, PREFIX1, ... in the order of their numbers; none where there are no such columns."""
    families: dict[str, dict[int, str]] = {}
    for name in names:
        if match := NUMBERED.fullmatch(name):
            families.setdefault(match[1], {})[int(match[2])] = name
    families = {prefix: family for prefix, family in families.items() if len(family) > 1 or prefix == "f"}
    if len(families) > 1:
        first, second = (next(iter(family.values())) for family in [*families.values()][:2])
        raise UserError(
            f"{where}: the columns from {first!r} and from {second!r} may both be the features; keep one kind"
        )
    for prefix, family in families.items():
        start = 0 if 0 in family else 1
        for number in range(start, start + len(family)):
            if number not in family:
                last = family[max(family)]
                raise UserError(f"{where}: no column '{prefix}{number}'; the features are {prefix}{start} to {last}")
        return [family[number] for number in sorted(family)]
    return []


def _named_rows(where: Path | str, labels: Array, names: Array) -> tuple[Array, Array]:
    """Return the rows' classes, numbered in the order of their labels, and the name of each class."""
    _, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    by_row = names[first][codes]
    if (by_row != names).any():
        row = int((by_row != names).argmax())
        raise UserError(f"{where}: label {labels[row]} is called '{by_row[row]}' and '{names[row]}' in 'class_name'")
    return codes, names[first]


def kind_of(array: Array) -> str:
    """Return what a column of a DataFrame holds."""
    if array.dtype.kind in "iuf":
        return NUMBER
    return LISTS if array.dtype.kind == "O" and len(array) and np.ndim(array[0]) == 1 else OTHER


# What decoding, Python's csv and its numbers raise; a number that is none is told apart below.
UNREADABLE_TEXT: tuple[type[Exception], ...] = (OSError, ValueError, MemoryError, csv.Error)
_DELIMITERS = ",;\t|"
_ROWS_AT_ONCE = 1024
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.0+)?")
Rows = list[list[str]]


def read_delimited(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return the features, labels and what else of the fields a table has; numbers are float64.

    Raises:
        UserError: a column is missing, or a cell or a line is not what it should be.
        Exception: one of `UNREADABLE`, where the file is no text.
    """
    with path.open(encoding=_encoding(path), newline="") as file:
        head = file.readline()
        delimiter = max(_DELIMITERS, key=head.count)
        file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(lines, [])]
        blocks = _blocks(path, names, lines)
        first = next(blocks, [])
        if not first or all(map(_is_number, names)):
            found = "no samples" if not first else "no names"
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
    block: Rows = first
    while block:
        rows = [_lists(path, row, wanted[0]) if chosen.lists else _numbers(path, names, row, wanted) for row in block]
        widths = {len(row) for row in rows} | ({features[0].shape[1]} if features else set())
        if len(widths) > 1:
            raise UserError(f"{path}: the lists in column {chosen.features[0]!r} differ in length")
        features.append(np.array(rows, dtype=np.float64))
        for field, name in chosen.fields.items():
            texts[field].extend(row[place[name]] for row in block)
        block = next(blocks, [])
    return Contents(
        to_arrays(path, np.concatenate(features), {field: _typed(cells) for field, cells in texts.items()}),
        chosen.notes,
    )


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _blocks(path: Path, names: list[str], lines: Any) -> Iterator[Rows]:
    """Yield the samples' cells, block by block, each after the number of its line."""
    while batch := list(islice(lines, _ROWS_AT_ONCE)):
        rows = []
        for k, cells in enumerate(batch):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                line = lines.line_num - len(batch) + k + 1
                raise UserError(f"{path}: line {line} has {len(cells)} cells, but the first line names {len(names)}")
            rows.append([str(lines.line_num - len(batch) + k + 1), *cells])
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
    """Return what each column holds by its first cell; where that is empty among numbered columns, a number lacks."""
    cells = dict(zip(names, block[0][1:], strict=True))
    numbered = {name: match[1] for name in names if (match := NUMBERED.fullmatch(name))}
    filled = {name: next((row[i] for row in block if row[i].strip()), "") for i, name in enumerate(names, start=1)}
    prefixes = {prefix for name, prefix in numbered.items() if _is_number(filled[name])}
    lacking = {name for name, cell in cells.items() if not cell.strip() and numbered.get(name) in prefixes}
    return {name: NUMBER if name in lacking else _kind(cell) for name, cell in cells.items()}


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


# What pyarrow raises on damaged files: its own errors derive from these.
UNREADABLE_PARQUET: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, LookupError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip
_PARQUET_ROWS_AT_ONCE = 2**14
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


def read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
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
    kinds = {name: _parquet_kind(pa, kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    chosen = choose(path, schema.names, kinds, types)
    _check_sizes(path, file, chosen)
    rows = {field: _plain(path, name, file.read([name]).column(name)) for field, name in chosen.fields.items()}
    arrays = to_arrays(path, _parquet_features(path, file, chosen), rows)
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
    for first in file.iter_batches(1, columns=chosen.features) if chosen.lists else ():
        width = len(first.column(chosen.features[0]).flatten())
        break
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
    for batch in file.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=chosen.features):
        if chosen.lists:
            yield _parquet_lists(path, chosen.features[0], batch.column(chosen.features[0]))
        else:
            parts = [_plain(path, name, batch.column(name)) for name in chosen.features]
            yield np.column_stack([part if part.dtype.kind == "f" else part.astype(np.float64) for part in parts])


def _parquet_lists(path: Path, name: str, column: Any) -> Array:
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
