"""Features with a label each, as users hand them in: checked once, so that nothing after it has to.

`load` and `save` read and write `.npz`, `.safetensors` and `.parquet` (`tailscope.array_files`) with the fields
`features` float [N, d], `labels` integer [N] and, optionally, `class_names` text [C], `ids` [N], `groups` [N] (integers
or text) and `provenance` (a JSON object as text: what made the features).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope import array_files
from tailscope.errors import UserError
from tailscope.field_checks import (
    Keys,
    match_names,
    require_finite,
    to_floats,
    to_keys,
    to_labels,
    to_names,
    to_provenance,
)

_REQUIRED = ("features", "labels")
_OPTIONAL = ("class_names", "ids", "groups", "provenance")


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of N samples. Build one with `load` or `from_arrays`, which check everything.

    Attributes:
        features: float16, float32 or float64 [N, d], all finite.
        labels: int64 [N], 0 to C-1.
        class_names: [C] different names, or None where the source has none.
        ids: [N] integers or text that name samples across tables, or None.
        groups: [N] integers or text: samples of one group (a burst) belong together, or None.
        provenance: what made the features.
        source: what messages call this table: its file.
    """

    features: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    ids: Keys | None = None
    groups: Keys | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    source: str = "the table"

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
    ) -> "FeatureTable":
        """Check arrays or tensors and make a table of them; features are copied only where they have to be.

        >>> table = FeatureTable.from_arrays([[0.0, 1.0], [1.0, 0.0]], [0, 1], class_names=["ant", "bee"])
        >>> len(table), table.width, table.num_classes
        (2, 2, 2)

        Raises:
            UserError: a field has the wrong type, shape or length, a feature is NaN or infinite, a label is negative,
                there are more than 10,000 classes, or two classes share a name.
        """
        rows = to_floats(f"{source}: features", features, "[N, d]")
        names = None if class_names is None else to_names(source, class_names)
        checked_labels = to_labels(source, labels, len(rows), names)
        require_finite(f"{source}: features", rows)
        return cls(
            rows,
            checked_labels,
            names,
            None if ids is None else to_keys(f"{source}: ids", ids, len(rows)),
            None if groups is None else to_keys(f"{source}: groups", groups, len(rows)),
            provenance or {},
            source,
        )

    @classmethod
    def load(cls, path: Path) -> "FeatureTable":
        """Read a feature file.

        Raises:
            UserError: the file is missing, empty, truncated or of an unknown format, lacks a field or holds Python
                objects (nothing is ever unpickled), or as `from_arrays`. The message names the file. Or it was written
                by `save` and holds something else by now.
        """
        arrays = array_files.read(path, _REQUIRED, _OPTIONAL)
        provenance = arrays.get("provenance")
        table = cls.from_arrays(
            arrays["features"],
            arrays["labels"],
            class_names=arrays.get("class_names"),
            ids=arrays.get("ids"),
            groups=arrays.get("groups"),
            provenance=None if provenance is None else to_provenance(str(path), str(provenance)),
            source=str(path),
        )
        written = table.provenance.pop("sha256", None)
        if written not in (None, table.digest()):
            raise UserError(
                f"{path}: does not hold what was written (the digest in its provenance is another): copy it again, or "
                "leave out its provenance if it was changed on purpose"
            )
        return table

    def save(self, path: Path) -> None:
        """Write a feature file in the format that the suffix names, whole or not at all.

        Where there is a provenance, it gets the digest that `load` checks.

        Raises:
            UserError: the format is unknown or the file cannot be written.
        """
        arrays: array_files.Arrays = {}
        if self.provenance:  # first, so that a directory of files that breaks off after it is noticed
            arrays["provenance"] = np.array(json.dumps({**self.provenance, "sha256": self.digest()}))
        arrays |= {"features": self.features.cpu().numpy(), "labels": self.labels.cpu().numpy()}
        if self.class_names is not None:
            arrays["class_names"] = np.array(self.class_names, dtype=np.str_)
        if self.ids is not None:
            arrays["ids"] = self.ids
        if self.groups is not None:
            arrays["groups"] = self.groups
        array_files.write(path, arrays)

    def digest(self) -> str:
        """Return the SHA-256 of all fields, whatever format a file has."""
        keys = [None if k is None else (k.dtype.kind, k.tolist()) for k in (self.ids, self.groups)]
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
        """Number of class names or, without them, the largest label plus one."""
        return int(self.labels.max()) + 1 if self.class_names is None else len(self.class_names)

    def counts(self) -> list[int]:
        """Return the number of samples of each class."""
        return [int(n) for n in torch.bincount(self.labels, minlength=self.num_classes)]

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64] | Tensor) -> "FeatureTable":
        """Return the samples at `rows`, in that order; class names stay."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        picked = index.numpy()
        return replace(
            self,
            features=self.features[index],
            labels=self.labels[index],
            ids=None if self.ids is None else self.ids[picked],
            groups=None if self.groups is None else self.groups[picked],
        )


def align(*tables: FeatureTable) -> tuple[FeatureTable, ...]:
    """Return the tables with one meaning of every label, and `class_names` filled in.

    With class names, labels are matched by name and follow the first table's order. Without, labels mean the same
    everywhere and classes are called "0", "1", ... up to the largest label of all tables.

    >>> a = FeatureTable.from_arrays([[0.0], [1.0]], [0, 1], class_names=["ant", "bee"])
    >>> b = FeatureTable.from_arrays([[2.0]], [0], class_names=["bee", "ant"])
    >>> [table.labels.tolist() for table in align(a, b)]
    [[0, 1], [1]]

    Raises:
        UserError: the tables differ in width or in their sets of names, some have names and some have not, or there is
            a single class.
    """
    first = tables[0]
    for table in tables:
        if table.width != first.width:
            raise UserError(
                f"{table.source}: d = {table.width} features, but {first.source} has d = {first.width}; "
                "extract both with the same encoder"
            )
    names = first.class_names
    if names is None:
        names = tuple(str(k) for k in range(max(table.num_classes for table in tables)))
    if len(names) < 2:
        raise UserError(f"{first.source}: a single class; at least two are needed")
    return tuple(_with_names(table, names, first) for table in tables)


def _with_names(table: FeatureTable, names: tuple[str, ...], first: FeatureTable) -> FeatureTable:
    if (table.class_names is None) != (first.class_names is None):
        named, bare = (first, table) if table.class_names is None else (table, first)
        raise UserError(f"{bare.source}: no class_names, but {named.source} has them; give them in all files or none")
    if table.class_names is None or table.class_names == names:
        return replace(table, class_names=names)
    position = match_names(table.source, table.class_names, first.source, names)
    return replace(table, class_names=names, labels=torch.from_numpy(position)[table.labels])
