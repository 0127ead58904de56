"""`.csv` and `.tsv`: a line of names, then a line a sample, with commas, semicolons, tabs or bars between the cells."""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.array_files import columns
from tailscope.array_files.fields import Array, Contents
from tailscope.errors import UserError

# What decoding, Python's csv and its numbers raise; a number that is none is told apart below.
UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, MemoryError, csv.Error)
_DELIMITERS = ",;\t|"
_ROWS_AT_ONCE = 1024
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.0+)?")
Rows = list[list[str]]


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
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
        chosen = columns.choose(path, names, kinds, kinds)
        return _collect(path, names, chosen, first, blocks)


def _collect(path: Path, names: list[str], chosen: columns.Choice, first: Rows, blocks: Iterator[Rows]) -> Contents:
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
        columns.to_arrays(path, np.concatenate(features), {field: _typed(cells) for field, cells in texts.items()}),
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
    numbered = {name: match[1] for name in names if (match := columns.NUMBERED.fullmatch(name))}
    filled = {name: next((row[i] for row in block if row[i].strip()), "") for i, name in enumerate(names, start=1)}
    prefixes = {prefix for name, prefix in numbered.items() if _is_number(filled[name])}
    lacking = {name for name, cell in cells.items() if not cell.strip() and numbered.get(name) in prefixes}
    return {name: columns.NUMBER if name in lacking else _kind(cell) for name, cell in cells.items()}


def _kind(cell: str) -> str:
    if _is_number(cell):
        return columns.NUMBER
    return columns.LISTS if cell.strip()[:1] in ("[", "(") else columns.OTHER


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
