"""Hugging Face datasets: `hf:NAME`, through the optional package `datasets`, or saved by its `save_to_disk`.

`hf:FOLDER` names a saved one, whose Arrow files pyarrow reads. Behind either, `:SPLIT` takes one of the splits alone,
and `,label=COLUMN` and `,image=COLUMN` say which column is meant where several could be.
"""

import hashlib
import importlib
import json
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailscope.data.images import ImageError, Images, Indices, Rows, read_image
from tailscope.errors import UserError, guess, message_of, unreadable
from tailscope.tables.checks import MAX_CLASSES


@dataclass(frozen=True, eq=False)
class HuggingFaceImages(Images):
    """A split of a Hugging Face dataset; row i has the id "SPLIT:i"."""

    name: str
    dataset: Any
    column: str
    labels: Tensor
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    named = True
    notes = ()

    def take(self, indices: Indices) -> "HuggingFaceImages":
        """Return the images at `indices`, in that order; they keep their ids."""
        rows = np.asarray(indices, dtype=np.int64).tolist()
        ids = tuple(self.ids[i] for i in rows)
        return replace(self, dataset=self.dataset.select(rows), labels=self.labels[rows], ids=ids)

    @cached_property
    def _undecoded(self) -> Any:
        """The dataset with images as their bytes: they are decoded here, by the rules of all sources."""
        if type(self.dataset.features[self.column]).__name__ != "Image" or not hasattr(self.dataset, "cast_column"):
            return self.dataset
        return self.dataset.cast_column(self.column, importlib.import_module("datasets").Image(decode=False))

    def image(self, row: int) -> Image.Image:
        """Decode an image to upright RGB."""
        found = self._undecoded[row][self.column]
        if isinstance(found, dict):
            found = found.get("bytes") or found.get("path")
        if isinstance(found, bytes | Image.Image):
            return read_image(found)
        if not isinstance(found, str):
            raise ImageError(f"column {self.column!r} holds {'nothing' if found is None else type(found).__name__}")
        if isinstance(self.dataset, _Saved):  # anybody may have written it, and its path may lead anywhere
            raise ImageError("its bytes are not in the saved set, only a path")
        return read_image(Path(found))

    def where(self, row: int) -> str:
        """Say the row."""
        return f"hf:{self.name} row {self.ids[row]}"

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the dataset's own fingerprint, the labels and the class names."""
        own = getattr(self.dataset, "_fingerprint", "")  # private, but what `datasets` keys its own cache by
        return self._digest(self.name, own, self.ids).hexdigest()


class _Named(NamedTuple):
    """What `hf:` is followed by, taken apart."""

    source: str
    name: str
    split: str | None
    columns: dict[str, str]

    def wrong(self, what: str) -> UserError:
        """Return the error that names the source."""
        return UserError(f"hf:{self.source}: {what}")


def load(source: str) -> dict[str, HuggingFaceImages]:
    """Return the one split that `NAME:SPLIT` names, or all; columns are found by their types.

    Raises:
        UserError: `datasets` or pyarrow is not installed, the dataset cannot be had, it has not one image and one label
            column, or rows without a label.
    """
    named = _parse(source)
    folder = _folder(named.name)
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    found = _open_saved(named, folder) if saved else _load_by_name(named)
    return {split: _images(named, split, dataset) for split, dataset in found.items()}


def _parse(source: str) -> _Named:
    name, *options = source.split(",")
    columns = dict(option.partition("=")[::2] for option in options)
    if not set(columns) <= {"image", "label"} or not all(columns.values()):
        raise UserError(f"hf:{source}: behind the comma label=COLUMN and image=COLUMN are known")
    found = re.fullmatch(r"(.+):([\w.+-]+(?:\[[^\]]*\])?)", name)  # a split may be a part of one: train[:10%]
    whole, split = found.groups() if found and not _folder(name).is_dir() else (name, None)
    return _Named(source, whole, split, columns)


def _folder(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 -- a name that is no user's is one of the Hub's, or of nothing


def _load_by_name(named: _Named) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise named.wrong("needs the package datasets; pip install 'tailscope[hf]'") from None
    try:
        found = datasets.load_dataset(named.name, split=named.split)
    except Exception as error:  # the package has no common base class for what may go wrong
        raise named.wrong(f"cannot be loaded ({message_of(error)})") from None
    return dict(found) if named.split is None else {named.split: found}


def _images(named: _Named, split: str, dataset: Any) -> HuggingFaceImages:
    image = _column(named, "image", dataset.features, "Image")
    label = _column(named, "label", dataset.features, "ClassLabel")
    labels, names = _labels(f"hf:{named.source}: column {label!r}", dataset[label][:], dataset.features[label])
    ids = tuple(f"{split}:{row}" for row in range(len(labels)))
    name = named.name.rstrip("/").rpartition("/")[2] if isinstance(dataset, _Saved) else named.name
    return HuggingFaceImages(name, dataset, image, labels, names, ids)


def _column(named: _Named, what: str, features: dict[str, Any], kind: str) -> str:
    """Return the column that was asked for, or the only one of its type."""
    wish, known = named.columns.get(what), ", ".join(features)
    if wish is not None and wish not in features:
        raise named.wrong(f"no column {wish!r}; its columns are {known}")
    # A feature is a class of `datasets`, or what a saved set says of it.
    kinds = {name: f.get("_type") if isinstance(f, dict) else type(f).__name__ for name, f in features.items()}
    found = [name for name in features if kinds[name] == kind] if wish is None else [wish]
    if not found:
        raise named.wrong(f"no column of type {kind}; its columns are {known}; choose one with ,{what}=COLUMN")
    if len(found) > 1:
        raise named.wrong(
            f"the columns {', '.join(found)} are all of type {kind}; choose one, with ,{what}={found[0]} for instance"
        )
    return found[0]


def _labels(where: str, values: Any, feature: Any) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels 0 to C-1 and the names of the classes: those of the column's type, or its different values."""
    names = _names(where, feature)
    if not len(values):
        raise UserError(f"{where}: no rows")
    empty = [row for row, value in enumerate(values) if value is None or (names is not None and value == -1)]
    if empty:
        raise UserError(
            f"{where}: {len(empty)} of {len(values)} rows have no label (null or -1), the first is row {empty[0]}; "
            "drop these rows"
        )
    if not all(type(value) is type(values[0]) and isinstance(value, int | str) for value in values):
        raise UserError(
            f"{where}: labels are {', '.join(sorted({type(v).__name__ for v in values}))}; expected integers or text"
        )
    if names is None:
        known = sorted(set(values))
        number = {value: k for k, value in enumerate(known)}
        names, values = [str(value) for value in known], [number[value] for value in values]
    if len(names) > MAX_CLASSES:
        raise UserError(f"{where}: {len(names):,} classes; at most {MAX_CLASSES:,} are supported")
    if isinstance(values[0], str) or not 0 <= min(values) <= max(values) < len(names):
        raise UserError(f"{where}: labels beyond its {len(names)} classes")
    return torch.tensor(values, dtype=torch.int64), tuple(names)


def _names(where: str, feature: Any) -> list[str] | None:
    """Return the names that a column's type lists; None where its labels are their own names."""
    names = feature.get("names") if isinstance(feature, dict) else getattr(feature, "names", None)
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: its names are no list of texts; expected one name a class")
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{where}: its names have {name!r} {times} times; names must differ")
    return list(names)


class _Saved:
    """A split that `save_to_disk` wrote, as the part of `datasets.Dataset` that is used here."""

    def __init__(self, table: Any, features: dict[str, Any], fingerprint: str, rows: Rows) -> None:
        self._table, self.features, self._fingerprint, self._rows = table, features, fingerprint, rows

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            values = self._table.column(key).to_pylist()
            return [values[row] for row in self._rows]
        return self._table.slice(int(self._rows[key]), 1).to_pylist()[0]

    def select(self, indices: list[int]) -> "_Saved":
        """Return these rows; nothing is copied."""
        drawn = hashlib.sha256(repr((self._fingerprint, indices)).encode()).hexdigest()
        return _Saved(self._table, self.features, drawn, self._rows[indices])


def _open_saved(named: _Named, folder: Path) -> dict[str, _Saved]:
    """Return the splits of a folder, or the one that was asked for."""
    if (folder / "dataset_dict.json").is_file():
        names = _json(named, folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names or not all(_stays(name) for name in names):
            raise named.wrong("dataset_dict.json names no splits")
        folders = {name: folder / name for name in names}
    else:
        folders = {str(_json(named, folder / "state.json").get("_split") or named.split or "train"): folder}
    if named.split is not None:
        if named.split not in folders:
            raise named.wrong(f"no split {named.split!r};{guess(named.split, folders)} it has {', '.join(folders)}")
        folders = {named.split: folders[named.split]}
    return {split: _read_saved(named, where) for split, where in folders.items()}


def _read_saved(named: _Named, folder: Path) -> _Saved:
    state, info = (_json(named, folder / file) for file in ("state.json", "dataset_info.json"))
    if state.get("_indices_data_files"):
        raise named.wrong("saved by an old version of datasets; load it there and save it again")
    files, features = state.get("_data_files"), info.get("features")
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or not all(_stays(name) for name in names) or not isinstance(features, dict):
        raise named.wrong("state.json and dataset_info.json do not name Arrow files and features")
    table = _read_arrow(named, [folder / str(name) for name in names])
    features = {name: feature for name, feature in features.items() if name in table.column_names}
    return _Saved(table, features, str(state.get("_fingerprint", "")), np.arange(len(table)))


def _read_arrow(named: _Named, files: list[Path]) -> Any:
    """Return the table that the files hold one after the other, mapped into memory."""
    try:
        pa = importlib.import_module("pyarrow")
    except ImportError:
        raise named.wrong("needs pyarrow; pip install 'tailscope[hf]'") from None
    tables = []
    for file in files:
        if problem := unreadable(file):
            raise named.wrong(f"{file.name}: {problem}")
        try:
            with pa.ipc.open_stream(pa.memory_map(str(file))) as stream:
                tables.append(stream.read_all())
            tables[-1].validate(full=True)
            tables[-1].slice(0, 1).to_pylist()  # finds names of columns that are no text
        except (OSError, ValueError, pa.ArrowException) as error:
            raise named.wrong(f"{file.name}: no readable Arrow file ({message_of(error)})") from None
    try:
        return pa.concat_tables(tables)
    except (ValueError, pa.ArrowException) as error:
        raise named.wrong(f"its Arrow files do not fit together ({message_of(error)})") from None


def _json(named: _Named, path: Path) -> dict[str, Any]:
    problem, found = unreadable(path), None
    with suppress(OSError, ValueError, RecursionError):
        found = None if problem else json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise named.wrong(f"{path.name}: {problem or 'not a JSON object'}")
    return found


def _stays(name: object) -> bool:
    """Whether a name from a file is one, and does not lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
