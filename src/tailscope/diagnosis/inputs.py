"""What a diagnosis is given: training, unseen and test features with one meaning of every label, checked together."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable, Source, align
from tailscope.field_checks import listed
from tailscope.geometry.duplicates import unseen_copies
from tailscope.geometry.rows import group_rows
from tailscope.linear_layer import LinearLayer

BoolArray = npt.NDArray[np.bool_]
UNEVEN = 2.0


@dataclass(frozen=True)
class Inputs:
    """Everything one encoder is judged by.

    Attributes:
        train: features of samples that the encoder or its classifier learned from; every class has some.
        unseen: features of other samples, from the true distribution.
        test: features that only score, or None: then the unseen samples score, cross-fitted.
        classifier: the classifier in use, or None.
        names: [C] class names.
        warnings: what was found while reading.
    """

    train: FeatureTable
    unseen: FeatureTable
    test: FeatureTable | None
    classifier: LinearLayer | None
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def scored(self) -> FeatureTable:
        """The samples whose accuracy is given: the test samples, else the unseen ones."""
        return self.unseen if self.test is None else self.test

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """The name of each input's file and the SHA-256 of its numbers, for the result's spec.

        Not the folder: the same numbers elsewhere are the same diagnosis, and folders are nobody else's business.
        """
        tables = {"train": self.train, "unseen": self.unseen, "test": self.test}
        found: dict[str, Any] = {
            name: {"source": named(table.source), "sha256": _digest(table.features, table.labels)} if table else None
            for name, table in tables.items()
        }
        linear = self.classifier
        found["classifier"] = (
            None if linear is None else {"source": named(linear.source), "sha256": _digest(linear.weight, linear.bias)}
        )
        return found


def read(
    train: Source,
    unseen: Source,
    test: Source | None = None,
    classifier: LinearLayer | Path | str | None = None,
    *,
    drop_duplicates: bool = False,
) -> Inputs:
    """Read and check what a diagnosis needs.

    Args:
        train: whatever `FeatureTable.of` takes: a table, a file, arrays or a DataFrame.
        unseen: the same.
        test: the same, or None.
        classifier: a linear classifier or its file, or None.
        drop_duplicates: leave out unseen and test samples that are also among the training (or unseen) samples.

    Raises:
        UserError: a file cannot be used, as `FeatureTable.load` and `align` say; a class has no training samples; the
            classifier does not fit; or nothing is left once duplicates are dropped.
    """
    given = {"train": train, "unseen": unseen} | ({} if test is None else {"test": test})
    tables = [FeatureTable.of(source, name) for name, source in given.items()]
    aligned = align(*tables)
    names = aligned[0].class_names or ()
    _require_training_samples(aligned[0], names)
    linear = LinearLayer.load(Path(classifier)) if isinstance(classifier, str | Path) else classifier
    if linear is not None:
        linear = linear.aligned(names, aligned[0].width, aligned[0].source)
    kept, warnings = _without_duplicates(list(aligned), names, drop_duplicates)
    notes = [note for table in tables for note in table.notes] + list(linear.notes if linear else ())
    warnings += [*_uneven(kept), *_absent(kept[1:], names), *notes]
    return Inputs(kept[0], kept[1], kept[2] if test is not None else None, linear, names, tuple(warnings))


def bursts(*tables: FeatureTable) -> list[torch.Tensor | None]:
    """Return each table's bursts as integers with one meaning, None for all where no table has any.

    Samples of a table without bursts are bursts of their own.
    """
    if all(table.groups is None for table in tables):
        return [None] * len(tables)
    texts = [
        np.array([f"{i}:{k}" for k in range(len(table))]) if table.groups is None else table.groups.astype(np.str_)
        for i, table in enumerate(tables)
    ]
    codes = np.unique(np.concatenate(texts), return_inverse=True)[1].reshape(-1)
    ends = np.cumsum([len(table) for table in tables])[:-1]
    return [torch.from_numpy(part.astype(np.int64)) for part in np.split(codes, ends)]


def _require_training_samples(train: FeatureTable, names: tuple[str, ...]) -> None:
    missing = [names[k] for k, count in enumerate(train.counts()) if not count]
    if missing:
        raise UserError(
            f"{train.source}: no training samples of {listed(missing)}; add some, or leave the class out of "
            "class_names and of every file"
        )


def _without_duplicates(
    tables: list[FeatureTable], names: tuple[str, ...], drop: bool
) -> tuple[list[FeatureTable], list[str]]:
    """Return the tables, later ones without samples of earlier ones where `drop` asks for it, and warnings."""
    warnings = []
    for i in range(1, len(tables)):
        for earlier in tables[:i]:
            later = tables[i]
            shared = _shared(earlier, later, names)
            count = int(shared.sum())
            if not count:
                continue
            if count == len(later) and drop:
                raise UserError(f"{later.source}: every sample is also in {earlier.source}; nothing is left to compare")
            effect = "make unseen samples look like training" if earlier is tables[0] else "flatter what was fitted"
            kept = "they were dropped" if drop else f"they {effect}; --drop-duplicates"
            warnings.append(f"{count} of {len(later)} samples of {later.source} are also in {earlier.source}: {kept}")
            if drop:
                tables[i] = later.take(np.flatnonzero(~shared))
    return tables, warnings


def _shared(earlier: FeatureTable, later: FeatureTable, names: tuple[str, ...]) -> BoolArray:
    """Return which samples of the later table are in the earlier one: by id, or as copies within a class."""
    first, second = (group_rows(t.features, t.labels, names, t.source) for t in (earlier, later))
    shared: BoolArray = unseen_copies(first, second).numpy()
    if earlier.ids is not None and later.ids is not None and earlier.ids.dtype.kind == later.ids.dtype.kind:
        shared |= np.isin(later.ids, earlier.ids) & _same_data(earlier, later)
    return shared


def _same_data(a: FeatureTable, b: FeatureTable) -> bool:
    """Whether ids may be compared: those that `features` gives are paths within a data set, or numbers."""
    one, other = ((table.provenance or {}).get("data") for table in (a, b))
    return one is None or other is None or one == other


def named(source: str) -> str:
    """Return a file's name without its folders, which mean nothing on another machine."""
    return Path(source).name or source


def _absent(tables: list[FeatureTable], names: tuple[str, ...]) -> list[str]:
    """Warn where a held-out table has no samples of a class: nothing can be said about it there."""
    found = []
    for table in tables:
        missing = [name for name, count in zip(names, table.counts(), strict=True) if not count]
        if missing:
            found.append(f"{table.source}: no samples of {listed(missing)}, so nothing is said about them there")
    return found


def _uneven(tables: list[FeatureTable]) -> list[str]:
    """Warn where the scored samples are not balanced: their accuracy is an average over samples."""
    scored = tables[-1]
    counts = [count for count in scored.counts() if count]
    if max(counts) <= UNEVEN * min(counts):
        return []
    return [
        f"{scored.source}: {min(counts)} to {max(counts)} samples a class; accuracies weigh classes by these counts, "
        "so read the recalls of groups and classes as well"
    ]


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
