"""Features with labels, and the linear layer that turns features into logits: checked once.

A feature file, in any format of `tailscope.tables.files`, has the fields `features` float [N, d], `labels` [N] (whole
numbers or names) and, optionally, `class_names` text [C] (then labels are positions in it), `ids` [N], `groups` [N]
(integers or text) and `provenance` (a JSON object as text: what made the features). A classifier's file has `weight`
[C, d], `bias` [C] and, optionally, `class_names`; a single row, as scikit-learn has it for two classes, is a score for
the second: it becomes two rows, minus and plus half of it, whose softmax gives the same probabilities.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tailscope.errors import UserError, plain_name
from tailscope.tables import checks, columns, files
from tailscope.tables.arrays import Arrays, Header, parse_json, resolve, unread
from tailscope.tables.mapped import map_rows

_REQUIRED = ("features", "labels")
_OPTIONAL = ("class_names", "ids", "groups", "provenance")


class Frame(Protocol):
    """A DataFrame of pandas or polars."""

    columns: Any

    def __getitem__(self, name: Any) -> Any:
        """Return a column."""

    def to_numpy(self) -> Any:
        """Return all of it."""


class LinearEstimator(Protocol):
    """A fitted linear classifier of scikit-learn."""

    coef_: Any
    intercept_: Any
    classes_: Any

    def predict(self, X: Any) -> Any:
        """Return the classes of rows."""


Pair = tuple[npt.ArrayLike | Tensor | Frame, npt.ArrayLike | Tensor]


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of N samples. Build one with `load` or `from_arrays`, which check everything.

    Attributes:
        features: float16, float32 or float64 [N, d], all finite.
        labels: int64 [N]: positions in `class_names` or, without, any whole numbers from 0, each the name of a class.
        class_names: [C] different names, or None where the source has none.
        ids: [N] integers or text that name samples across tables, or None.
        bursts: [N] integers or text: samples of one burst belong together, or None; the field `groups` of a file.
        provenance: what made the features.
        source: what messages call this table: its file.
        named_rows: whether the source's labels are themselves the names, not positions in a list of names.
        notes: what was left out or guessed in reading the source.
        numbers: [N] each sample's row in the source, from 0, where `take` has chosen some; None: all, in order.
    """

    features: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    ids: checks.Keys | None = None
    bursts: checks.Keys | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    source: str = "the table"
    named_rows: bool = False
    notes: tuple[str, ...] = ()
    numbers: npt.NDArray[np.int64] | None = None

    @classmethod
    def from_arrays(
        cls,
        features: npt.ArrayLike | Tensor,
        labels: npt.ArrayLike | Tensor,
        *,
        class_names: npt.ArrayLike | None = None,
        ids: npt.ArrayLike | None = None,
        groups: npt.ArrayLike | None = None,
        provenance: dict[str, Any] | None = None,
        source: str = "the table",
        notes: Sequence[str] = (),
    ) -> "FeatureTable":
        """Check arrays or tensors and make a table of them; features are copied only where they have to be.

        Labels that are names make up the class names, in alphabetical order.

        >>> table = FeatureTable.from_arrays([[0.0], [1.0], [2.0]], ["cat", "ant", "cat"])
        >>> table.labels.tolist(), len(table), table.width, table.num_classes
        ([1, 0, 1], 3, 1, 2)

        Raises:
            UserError: a field has the wrong type, shape or length, a feature is NaN or infinite, a label is negative,
                there are more than 10,000 classes, or two classes share a name.
        """
        rows = checks.to_floats(f"{source}: features", features, "[N, d]")
        names = None if class_names is None else checks.to_names(source, class_names)
        where, named_rows = f"{source}: labels", False
        values = checks.to_labels(where, labels, len(rows), "rows of features")
        if names is not None:
            values = checks.positions(where, values, names)
        elif values.dtype.kind == "U":
            unique, values = np.unique(values, return_inverse=True)
            names, named_rows = tuple(map(str, unique)), True
        checks.check_classes(source, len(np.unique(values)) if names is None else len(names))
        checks.require_finite(f"{source}: features", rows)
        return cls(
            rows,
            torch.from_numpy(values.astype(np.int64)),
            names,
            None if ids is None else checks.to_keys(f"{source}: ids", ids, len(rows)),
            None if groups is None else checks.to_keys(f"{source}: groups", groups, len(rows)),
            provenance or {},
            source,
            named_rows,
            tuple(notes),
        )

    @classmethod
    def of(cls, given: "Source", name: str = "the table") -> "FeatureTable":
        """Return a table of whatever holds features and labels.

        That is a table, a file, a pair (features, labels) of arrays, tensors or lists, a mapping with the fields of a
        file, or a DataFrame with the columns of a `.csv` or `.parquet` file. Messages call what is no file `name`.

        >>> FeatureTable.of(([[0.0], [1.0]], ["ant", "bee"])).class_names
        ('ant', 'bee')
        """
        if isinstance(given, FeatureTable):
            return given
        if isinstance(given, str | os.PathLike):
            return cls.load(Path(given))
        if is_pair(given):
            features, labels = cast(tuple[Any, Any], given)
            return cls.from_arrays(features.to_numpy() if _is_frame(features) else features, labels, source=name)
        if isinstance(given, Mapping):
            return _of_fields(*_fields_of(given, name, _REQUIRED, _OPTIONAL), name)
        if _is_frame(given):
            return _of_frame(cast(Frame, given), name)
        expected = "a file, a pair (features, labels), a mapping of arrays or a DataFrame"
        raise UserError(f"{name}: a {type(given).__name__}; expected {expected}")

    @classmethod
    def load(cls, path: Path | str) -> "FeatureTable":
        """Read a feature file.

        Raises:
            UserError: as `tailscope.tables.files.read` and `from_arrays`; or `save` wrote something else to it.
        """
        arrays, notes = files.read(Path(path), _REQUIRED, _OPTIONAL)
        return _of_fields(arrays, notes, plain_name(str(path)))

    def save(self, path: Path | str) -> None:
        """Write a feature file as `tailscope.tables.files.write`; a provenance gets the digest that `load` checks."""
        arrays: Arrays = {}
        if self.provenance:  # first, so that a directory of files that breaks off after it is noticed
            arrays["provenance"] = np.array(json.dumps({**self.provenance, "sha256": self.digest()}))
        arrays |= {"features": self.features.cpu().numpy(), "labels": self.labels.cpu().numpy()}
        names = None if self.class_names is None else np.array(self.class_names, dtype=np.str_)
        others = {"class_names": names, "ids": self.ids, "groups": self.bursts}
        files.write(Path(path), arrays | {field: array for field, array in others.items() if array is not None})

    def digest(self) -> str:
        """Return the SHA-256 of all fields, whatever format a file has."""
        keys = [None if k is None else (k.dtype.kind, k.tolist()) for k in (self.ids, self.bursts)]
        described = [self.provenance, self.class_names, keys, str(self.features.dtype), list(self.features.shape)]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for numbers in (self.features, self.labels):
            digest.update(numbers.contiguous().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.features.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of class names or, without them, of different labels."""
        return len(self.counts())

    def counts(self) -> list[int]:
        """Return the number of samples of each class, in the order of `class_names` or else of the labels."""
        if self.class_names is None:
            return [int(n) for n in np.unique(self.labels.numpy(), return_counts=True)[1]]
        return [int(n) for n in torch.bincount(self.labels, minlength=len(self.class_names))]

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64] | Tensor) -> "FeatureTable":
        """Return the samples at `rows`, in that order; class names stay."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        picked = index.numpy()
        return replace(
            self,
            features=map_rows(self.features, lambda block: block, index),
            labels=self.labels[index],
            ids=None if self.ids is None else self.ids[picked],
            bursts=None if self.bursts is None else self.bursts[picked],
            numbers=picked.copy() if self.numbers is None else self.numbers[picked],
        )


Source = FeatureTable | str | os.PathLike[str] | Pair | Mapping[str, Any] | Frame


def is_pair(given: Any) -> bool:
    """Return whether this is a tuple (features, labels) or (weight, bias), not two things that each hold both.

    >>> is_pair(([[0.0]], [1])), is_pair(("a.npz", "b.npz")), is_pair([[[0.0]], [1]])
    (True, False, False)
    """
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    whole = (str, os.PathLike, FeatureTable, LinearLayer, nn.Module, Mapping, tuple)
    if any(isinstance(one, whole) or hasattr(one, "coef_") for one in given):
        return False
    return not _is_frame(given[1])


def several(given: Any) -> list[Any]:
    """Return what was given for each encoder as a list, where Python takes one thing, a list of them, or nothing.

    >>> several(None), several("a.npz"), several(["a.npz", "b.npz"]), several(([[0.0]], [1]))
    ([], ['a.npz'], ['a.npz', 'b.npz'], [([[0.0]], [1])])
    """
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) and not is_pair(given) else [given]


def align(*tables: FeatureTable) -> tuple[FeatureTable, ...]:
    """Return the tables with one meaning of every label, and `class_names` filled in.

    Classes are those of the first table, in its order, and are matched by name. Without class names a label is its own
    name: the label 10 is "10" in every table.

    >>> a = FeatureTable.from_arrays([[0.0], [1.0]], [0, 1], class_names=["ant", "bee"])
    >>> b = FeatureTable.from_arrays([[2.0]], [0], class_names=["bee", "ant"])
    >>> [table.labels.tolist() for table in align(a, b)]
    [[0, 1], [1]]

    Raises:
        UserError: the tables differ in width, one has samples of a class that the first does not know, some list names
            and some have bare numbers, or there is a single class.
    """
    first = tables[0]
    for table in tables:
        if table.width != first.width:
            widths = f"d = {table.width} features, but {first.source} has d = {first.width}"
            raise UserError(f"{table.source}: {widths}; extract both with the same encoder")
    classes = _with_names(first)
    if len(classes.class_names or ()) < 2:
        raise UserError(f"{first.source}: a single class; at least two are needed")
    return (classes, *(_matched(table, first, classes.class_names or ()) for table in tables[1:]))


def _with_names(table: FeatureTable) -> FeatureTable:
    """Return the table with labels 0 to C-1 and class names: without a list of them, the digits of its labels."""
    if table.class_names is not None:
        return table
    values, codes = np.unique(table.labels.numpy(), return_inverse=True)
    return replace(table, class_names=tuple(map(str, values)), labels=torch.from_numpy(codes), named_rows=True)


def _matched(table: FeatureTable, first: FeatureTable, names: tuple[str, ...]) -> FeatureTable:
    """Return the table with the first one's class names and numbers."""
    for bare, named in ((table, first), (first, table)):
        # A bare number beside a list of names may be a position in that list, or one of its names.
        listing = None if bare.class_names is not None or named.named_rows else named.class_names
        if listing is not None and listing != tuple(map(str, range(len(listing)))):
            has = f"no class_names, but {named.source} has them"
            raise UserError(f"{bare.source}: {has}; give them in all files or none")
    own = _with_names(table)
    if own.class_names == names:
        return own
    position = {name: k for k, name in enumerate(names)}
    places = torch.tensor([position.get(name, -1) for name in own.class_names or ()])
    labels = places[own.labels]
    if (labels < 0).any():
        surplus = [(own.class_names or ())[k] for k in np.unique(own.labels[labels < 0].numpy())]
        raise UserError(
            f"{table.source}: has samples of {checks.listed(surplus)}, which {first.source} has not among its classes "
            f"({checks.listed(names)}); give it some or leave these out"
        )
    return replace(own, class_names=names, labels=labels)


def _is_frame(given: Any) -> bool:
    return hasattr(given, "columns") and hasattr(given, "to_numpy")


def _of_fields(fields: Mapping[str, Any], notes: Sequence[str], source: str) -> FeatureTable:
    """Return the table that the fields of a file make up, whose digest holds where one was written."""
    provenance = fields.get("provenance")
    if provenance is not None and not isinstance(provenance, Mapping):
        provenance = parse_json(str(provenance))
        if not isinstance(provenance, dict):
            raise UserError(f"{source}: provenance is not a JSON object")
    table = FeatureTable.from_arrays(**{**fields, "provenance": dict(provenance or {})}, source=source, notes=notes)
    written = table.provenance.pop("sha256", None)
    if written is not None and written != table.digest():
        raise UserError(
            f"{source}: does not hold what was written (the digest in its provenance is another): copy it again, or "
            "leave out its provenance if it was changed on purpose"
        )
    return table


def _fields_of(
    given: Mapping[str, Any], name: str, required: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields that a mapping has, found as a file's are, and notes on what else it holds."""
    held = {str(key): Header(type(value).__name__, getattr(value, "shape", None)) for key, value in given.items()}
    found = resolve(name, held, required, optional)
    return {field: given[key] for field, key in found.items()}, unread(name, held, found.values())


def _of_frame(frame: Frame, name: str) -> FeatureTable:
    names = [str(column) for column in frame.columns]
    own = dict(zip(names, frame.columns, strict=True))
    arrays = {} if len(own) < len(names) else {column: np.asarray(frame[key]) for column, key in own.items()}
    types = {column: str(array.dtype) for column, array in arrays.items()} or dict.fromkeys(names, "a column")
    chosen = columns.choose(name, names, {column: columns.kind_of(array) for column, array in arrays.items()}, types)
    picked = {meaning: arrays[column] for meaning, column in chosen.fields.items()}
    for meaning in (meaning for meaning in ("labels", "class_name") if meaning in picked):
        array = picked[meaning]
        picked[meaning] = checks.to_labels(f"{name}: {chosen.fields[meaning]}", array, len(array), "rows")
    parts = [arrays[column] for column in chosen.features]
    try:
        features = np.stack(parts[0].tolist()) if chosen.lists else np.column_stack(parts)
    except (ValueError, TypeError):
        raise UserError(f"{name}: the lists in column {chosen.features[0]!r} have gaps or differ in length") from None
    features = features if features.dtype.kind == "f" or chosen.lists else features.astype(np.float64)
    fields: dict[str, Any] = columns.to_arrays(name, features, picked)
    return FeatureTable.from_arrays(**fields, source=name, notes=chosen.notes)


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """`logits(x) = weight @ x + bias`. Build one with `load` or `from_arrays`, which check everything.

    Attributes:
        weight: floating-point [C, d], finite.
        bias: the same type, [C], finite.
        class_names: [C] names of the rows, or None: then row k is label k.
        source: what messages call this classifier: its file.
        notes: what was left out in reading the source.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...] | None = None
    source: str = "the classifier"
    notes: tuple[str, ...] = ()

    @classmethod
    def from_arrays(
        cls,
        weight: npt.ArrayLike | Tensor,
        bias: npt.ArrayLike | Tensor | None = None,
        *,
        class_names: npt.ArrayLike | None = None,
        source: str = "the classifier",
        notes: Sequence[str] = (),
    ) -> "LinearLayer":
        """Check arrays or tensors and make a classifier of them; no bias is a bias of zero, a single row becomes two.

        >>> LinearLayer.from_arrays([[2.0, 4.0]], [1.0]).weight.tolist()
        [[-1.0, -2.0], [1.0, 2.0]]

        Raises:
            UserError: a field has the wrong type, shape or length, or values are NaN or infinite.
        """
        rows = checks.to_floats(f"{source}: weight", weight, "[C, d]")
        given = rows.new_zeros(len(rows)) if bias is None else checks.to_floats(f"{source}: bias", bias, "[C]")
        offsets = given.to(rows)
        names = None if class_names is None else checks.to_names(source, class_names, numbers=True)
        if len(rows) == len(offsets) == 1:
            rows, offsets = (torch.cat([-half, half]) for half in (rows / 2, offsets / 2))
        for name, length in [("bias", len(offsets)), ("class_names", len(rows) if names is None else len(names))]:
            if length != len(rows):
                raise UserError(f"{source}: {name} has length {length}, but weight has {len(rows)} rows")
        checks.require_finite(f"{source}: weight", rows)
        checks.require_finite(f"{source}: bias", offsets[:, None])
        return cls(rows, offsets, names, source, tuple(notes))

    @classmethod
    def of(cls, given: "LinearSource", source: str = "the classifier") -> "LinearLayer":
        """Return a classifier of whatever holds its weight and bias.

        That is a classifier, a file, a pair (weight, bias) of arrays, tensors or lists, a mapping with the fields of a
        file, a `torch.nn.Linear`, or a fitted linear classifier of scikit-learn. Labels that are the numbers from 0 on
        are positions in the class names; others are names themselves.

        >>> LinearLayer.of(([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.5])).bias.tolist()
        [0.0, 0.5]

        Raises:
            UserError: it is something else, or as `from_arrays`; or an estimator that decides otherwise than by the
                largest of its `coef_ @ x + intercept_`.
        """
        if isinstance(given, LinearLayer):
            return given
        if isinstance(given, str | os.PathLike):
            return cls.load(Path(given))
        if isinstance(given, Mapping):
            fields, notes = _fields_of(given, source, ("weight",), ("bias", "class_names"))
            return cls.from_arrays(**fields, source=source, notes=notes)
        if isinstance(given, nn.Linear):
            bias = None if given.bias is None else given.bias.detach()
            return cls.from_arrays(given.weight.detach(), bias, source=source)
        if is_pair(given):
            weight, bias = cast(tuple[Any, Any], given)
            return cls.from_arrays(weight, bias, source=source)
        if hasattr(given, "coef_") and hasattr(given, "classes_"):
            return _of_estimator(given, source)
        expected = "a file, a pair (weight, bias), a mapping of them, a torch.nn.Linear or a fitted linear classifier"
        raise UserError(f"{source}: a {type(given).__name__}; expected {expected}")

    @classmethod
    def load(cls, path: Path | str) -> "LinearLayer":
        """Read a classifier from a file with the fields of `from_arrays`, or scikit-learn's names for them."""
        arrays, notes = files.read(Path(path), ("weight",), ("bias", "class_names"))
        return cls.from_arrays(**arrays, source=plain_name(str(path)), notes=notes)

    def save(self, path: Path | str) -> None:
        """Write the classifier as `.npz` or `.safetensors`, whole or not at all."""
        arrays: Arrays = {"weight": self.weight.cpu().numpy(), "bias": self.bias.cpu().numpy()}
        if self.class_names is not None:
            arrays["class_names"] = np.array(self.class_names, dtype=np.str_)
        files.write(Path(path), arrays)

    def logits(self, features: Tensor) -> Tensor:
        """Features [n, d] -> logits [n, C], in float32 or the classifier's wider type."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return features.to(dtype) @ self.weight.to(dtype).T + self.bias.to(dtype)

    def aligned(self, class_names: Sequence[str], width: int, source: str) -> "LinearLayer":
        """Return the classifier with row k for `class_names[k]`: by name where it has names, else as it is.

        Raises:
            UserError: d, the number of classes or their names are not those of the features of `source`.
        """
        if self.weight.shape[1] != width:
            raise UserError(f"{self.source}: weight takes d = {self.weight.shape[1]}, but {source} has d = {width}")
        if len(self.weight) != (classes := len(class_names)):
            raise UserError(f"{self.source}: a classifier of {len(self.weight)} classes, but {source} has {classes}")
        if self.class_names is None:
            return replace(self, class_names=tuple(class_names))
        order = torch.from_numpy(checks.match_names(source, class_names, self.source, self.class_names))
        return replace(self, weight=self.weight[order], bias=self.bias[order], class_names=tuple(class_names))


LinearSource = LinearLayer | str | os.PathLike[str] | tuple[Any, Any] | Mapping[str, Any] | nn.Linear | LinearEstimator
_PROBES = 64


def _of_estimator(given: Any, source: str) -> LinearLayer:
    """Return the classifier of a fitted estimator; one that compares classes in pairs decides otherwise."""
    classes = np.asarray(given.classes_)
    names = None if np.array_equal(classes, np.arange(len(classes))) else classes
    rows = np.atleast_2d(given.coef_), np.atleast_1d(given.intercept_)  # some have bare ones for two classes
    made = LinearLayer.from_arrays(*rows, class_names=names, source=source)
    probes = np.random.default_rng(0).normal(size=(_PROBES, made.weight.shape[1]))
    if len(made.weight) != len(classes) or not np.array_equal(
        classes[made.logits(torch.from_numpy(probes)).argmax(dim=1).numpy()], given.predict(probes)
    ):
        kind = type(given).__name__
        raise UserError(f"{source}: {kind} does not choose the class with the largest coef_ @ x + intercept_")
    return made
