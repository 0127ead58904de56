"""Named arrays in files of many formats. Nothing is ever unpickled but by PyTorch's restricted reader.

What the formats hold is the same; only text differs. An `.npz` has text arrays. A `.safetensors`, which has none, keeps
`class_names` and `provenance` as JSON in its header, and text of the rows as UTF-8 bytes, uint8 [N, longest], padded
with zeros. `.pt` has a dict, `.npy` one array, whose labels lie in another file beside it.

`.csv`, `.tsv`, `.parquet` and DataFrames have one row a sample, with the columns `label` (a number or a name), `id`,
`group` and `class_name` (the name of the row's class), by any name in `ALIASES`. The features are a column of lists by
one of the names there, else columns numbered from 0 or 1 after a common prefix (`f0`, `f1`, ...), else all other
columns of numbers. What is guessed or left over is said in a note. In `.csv` and `.tsv` commas, semicolons, tabs or
bars part the cells. Parquet needs pyarrow; its schema's metadata may have the names of all classes, as the JSON list
`class_names`, and `provenance`.
"""

import codecs
import csv
import importlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tailscope.errors import GIT_LFS, UserError, first_few, message_of, require_file, unknown
from tailscope.store.files import replacing
from tailscope.tables import arrays
from tailscope.tables.arrays import (
    ALIASES,
    MOST_NAMED,
    SINGLE,
    UNREADABLE,
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

_log = logging.getLogger(__name__)
NUMBER, LISTS, OTHER = "number", "lists", "text"
_ROW_FIELDS = ("labels", "ids", "groups")
_INDEX = ("", "index", "level_0", "__index_level_0__", "Unnamed: 0")
NUMBERED = re.compile(r"(.*?)(\d{1,9})", re.DOTALL)


class Choice(NamedTuple):
    """Which column is which.

    Attributes:
        fields: the column of each of `labels`, `ids`, `groups` and `class_name` that there is.
        features: the columns of the features: one of lists, or one a feature.
        lists: whether the first is the case.
        notes: what was guessed or left out.
    """

    fields: dict[str, str]
    features: list[str]
    lists: bool
    notes: tuple[str, ...]


def choose(where: Path | str, names: Iterable[str], kinds: Mapping[str, str], types: Mapping[str, str]) -> Choice:
    """Return which column is which, given each one's kind (`NUMBER`, `LISTS` or `OTHER`) and its type in words."""
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
    """Return the fields of a feature table from its features [N, d] and the chosen columns [N]."""
    arrays = {"features": features, **{field: columns[field] for field in _ROW_FIELDS if field in columns}}
    if "class_name" in columns and "labels" not in columns:
        arrays["labels"] = columns["class_name"]
    elif "class_name" in columns:
        arrays["labels"], arrays["class_names"] = _named_rows(where, columns["labels"], columns["class_name"])
    return arrays


def _features(
    where: Path | str, rest: list[str], kinds: Mapping[str, str], types: Mapping[str, str]
) -> tuple[list[str], bool, list[str]]:
    named = resolve(where, {name: Header(types[name]) for name in rest}, (), ("features",)).get("features")
    if named is not None:
        if kinds[named] != LISTS:
            raise UserError(f"{where}: column {named!r} is {types[named]}; expected lists of numbers")
        return [named], True, []
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
        first, second, *_ = (next(iter(family.values())) for family in families.values())
        raise UserError(
            f"{where}: the columns from {first!r} and from {second!r} may both be the features; keep one kind"
        )
    for prefix, family in families.items():
        numbers = range(start := 0 if 0 in family else 1, start + len(family))
        if gap := next((number for number in numbers if number not in family), None):
            last = family[max(family)]
            raise UserError(f"{where}: no column '{prefix}{gap}'; the features are {prefix}{start} to {last}")
        return [family[number] for number in numbers]
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


_PARQUET_ROWS_AT_ONCE = 2**14
_RAGGED = "{}: the lists in column {!r} have gaps or differ in length"
_COLUMNS = {"labels": "label", "ids": "id", "groups": "group"}


def _pyarrow(path: Path) -> Any:
    """Return pyarrow with its Parquet module loaded."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'tailscope[parquet]'") from None


def _read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    pa = _pyarrow(path)
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


def _write_parquet(path: Path, arrays: Arrays) -> None:
    pa = _pyarrow(path)
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


_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Contents]] = {
    ".npz": arrays.read_npz,
    ".safetensors": arrays.read_safetensors,
    ".parquet": _read_parquet,
    ".npy": arrays.read_single,
    ".pt": arrays.read_pickled,
    ".pth": arrays.read_pickled,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
}
_WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    ".npz": arrays.write_npz,
    ".safetensors": arrays.write_safetensors,
    ".parquet": _write_parquet,
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
        _pyarrow(path)
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
