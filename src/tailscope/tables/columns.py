"""Which column of a table is what: its features, and the labels, ids and groups of its rows.

`.csv`, `.tsv`, `.parquet` and DataFrames have one row a sample, with the columns `label` (a number or a name), `id`,
`group` and `class_name` (the name of the row's class), by any name in `ALIASES`. The features are a column of lists by
one of the names there, else columns numbered from 0 or 1 after a common prefix (`f0`, `f1`, ...), else all other
columns of numbers. What is guessed or left over is said in a note.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tailscope.errors import UserError, first_few
from tailscope.tables.arrays import ALIASES, MOST_NAMED, Array, Arrays, Header, in_words, resolve, unread

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
