"""What a diagnosis is given: training, unseen and test features with one meaning of every label, checked together."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailscope.errors import UserError, first_few
from tailscope.measures.rows import FAR, ClassRows, exponent, far, group_rows, median, unseen_copies
from tailscope.tables.checks import listed
from tailscope.tables.table import FeatureTable, LinearLayer, LinearSource, Source, align

PARTS = ("train", "unseen", "test")
UNEVEN = 2.0


@dataclass(frozen=True)
class Inputs:
    """Everything one encoder is judged by.

    Attributes:
        train: features of samples that the encoder or its classifier learned from; every class has some.
        unseen: features of other samples, from the true distribution.
        test: features that only score, or None: then the unseen samples score, cross-fitted.
        classifier: the classifier in use, or None.
        names: [C] of the classes.
        warnings: what was found while reading.
        copied: the share of a held-out file's samples that are training samples too; of the file that has most.
    """

    train: FeatureTable
    unseen: FeatureTable
    test: FeatureTable | None
    classifier: LinearLayer | None
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    copied: float = 0.0

    @property
    def scored(self) -> FeatureTable:
        """The samples whose accuracy is given: the test samples, else the unseen ones."""
        return self.unseen if self.test is None else self.test

    @cached_property
    def tables(self) -> dict[str, FeatureTable]:
        """The files that there are, by the option that gives them."""
        return {part: table for part in PARTS if (table := getattr(self, part)) is not None}

    @cached_property
    def rows(self) -> dict[str, ClassRows]:
        """Each file's rows by class: checked, measured and sorted once."""
        return {
            part: group_rows(table.features, table.labels, self.names, f"{table.source}:")
            for part, table in self.tables.items()
        }

    @cached_property
    def power(self) -> int:
        """The power of two that brings features to a size that is well computed with."""
        return exponent(self.rows["train"].lengths, self.rows["unseen"].lengths)

    def option(self, part: str) -> str:
        """Return what messages call a file: its option and its name."""
        return f"--{part} ({named(self.tables[part].source)})"

    def keep(self, part: str, rows: npt.NDArray[np.int64] | torch.Tensor) -> "Inputs":
        """Return the inputs with these rows of a file only."""
        change: dict[str, Any] = {part: self.tables[part].take(rows)}
        return replace(self, **change)

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """The name of each input's file and the SHA-256 of its numbers, and of what it has of `_keys`, for the spec.

        Not the folder: the same numbers elsewhere are the same diagnosis, and folders are nobody else's business.
        """
        numbers = {part: (table.source, table.features, table.labels) for part, table in self.tables.items()}
        if (linear := self.classifier) is not None:
            numbers["classifier"] = linear.source, linear.weight, linear.bias
        found = {name: {"source": named(source), "sha256": digest(*two)} for name, (source, *two) in numbers.items()}
        for part, table in self.tables.items():
            found[part] |= _keys(table)
        return dict.fromkeys((*PARTS, "classifier")) | found


def read(
    train: Source,
    unseen: Source,
    test: Source | None = None,
    classifier: LinearSource | None = None,
    *,
    drop_duplicates: bool = False,
) -> Inputs:
    """Read, check and settle what a diagnosis of one encoder needs: as `read_files` and `settle`."""
    return settle({"": read_files(train, unseen, test, classifier)}, drop_duplicates)[""]


def read_files(
    train: Source, unseen: Source, test: Source | None = None, classifier: LinearSource | None = None
) -> Inputs:
    """Read and check the files of one encoder; what is to be said of them, `settle` adds once encoders are paired.

    Raises:
        UserError: a file cannot be used, as `FeatureTable.load` and `align` say; a class has no training samples; or
            the classifier does not fit.
    """
    given = zip(PARTS, (train, unseen, test), strict=True)
    first, second, *third = align(*(FeatureTable.of(source, part) for part, source in given if source is not None))
    names = first.class_names or ()
    if missing := [name for name, count in zip(names, first.counts(), strict=True) if not count]:
        raise UserError(
            f"{first.source}: no training samples of {listed(missing)}; add some, or leave the class out of "
            "class_names and of every file"
        )
    linear = None if classifier is None else LinearLayer.of(classifier)
    if linear is not None:
        linear = linear.aligned(names, first.width, first.source)
    inputs = Inputs(first, second, third[0] if third else None, linear, names)
    # Here, for it tells row numbers as the files have them.
    return replace(inputs, warnings=tuple(note for part in inputs.tables for note in far_notes(inputs, part)))


def bursts(*tables: FeatureTable) -> list[torch.Tensor | None]:
    """Return each table's bursts as integers with one meaning, None for all where no table has any.

    Samples of a table without bursts are bursts of their own.
    """
    if all(table.bursts is None for table in tables):
        return [None] * len(tables)
    texts = [
        np.array([f"{i}:{k}" for k in range(len(table))]) if table.bursts is None else table.bursts.astype(np.str_)
        for i, table in enumerate(tables)
    ]
    codes = np.unique(np.concatenate(texts), return_inverse=True)[1].reshape(-1)
    ends = np.cumsum([len(table) for table in tables])[:-1]
    return [torch.from_numpy(part.astype(np.int64)) for part in np.split(codes, ends)]


def settle(encoders: Mapping[str, Inputs], drop_duplicates: bool) -> dict[str, Inputs]:
    """Return all encoders' inputs with their warnings, of samples of later files that earlier ones have among others.

    `drop_duplicates` leaves such samples out: what is one with any encoder goes with all, so that they stay paired.

    Raises:
        UserError: nothing is left.
    """
    found, copied = dict(encoders), dict.fromkeys(encoders, 0.0)
    said: dict[str, list[str]] = {name: [] for name in encoders}
    for i, part in enumerate(next(iter(found.values())).tables):
        for first in PARTS[:i]:
            copies = {name: _copies(one, first, part) for name, one in found.items()}
            dropped = np.any(list(copies.values()), axis=0) & drop_duplicates
            for name, one in found.items():
                said[name] += _copies_told(one, first, part, copies[name], dropped)
                if dropped.any():
                    found[name] = one.keep(part, np.flatnonzero(~dropped))
                elif first == "train":
                    copied[name] = max(copied[name], float(copies[name].mean()))
    return {name: replace(one, copied=copied[name], warnings=_warnings(one, said[name])) for name, one in found.items()}


def _copies(inputs: Inputs, first: str, part: str) -> npt.NDArray[np.bool_]:
    """Return which samples of a file are also in an earlier one: by their features, or by ids that mean the same."""
    earlier, later = inputs.tables[first], inputs.tables[part]
    shared: npt.NDArray[np.bool_] = unseen_copies(inputs.rows[first], inputs.rows[part]).numpy()
    if earlier.ids is not None and later.ids is not None and _comparable(earlier, later):
        shared |= np.isin(later.ids, earlier.ids)
    return shared


def _copies_told(
    inputs: Inputs, first: str, part: str, copies: npt.NDArray[np.bool_], dropped: npt.NDArray[np.bool_]
) -> list[str]:
    """Return a warning of a file's copies, or of those that were dropped, if there are any."""
    earlier, later = inputs.tables[first], inputs.tables[part]
    count = int((copies | dropped).sum())
    if not count:
        return []
    if dropped.all():
        raise UserError(f"{later.source}: every sample is also in {earlier.source}; nothing is left to compare")
    where = " with this or another encoder" if count > copies.sum() else ""
    effect = "make held-out samples look like training ones" if first == "train" else "flatter what was fitted"
    kept = "they were dropped" if dropped.any() else f"they {effect}; --drop-duplicates leaves them out"
    return [f"{count} of {len(later)} samples of {later.source} are also in {earlier.source}{where}: {kept}"]


def _warnings(inputs: Inputs, duplicates: list[str]) -> tuple[str, ...]:
    """Return what is to be said of inputs, in order."""
    notes = [note for table in inputs.tables.values() for note in table.notes]
    notes += [] if inputs.classifier is None else inputs.classifier.notes
    return (*inputs.warnings, *duplicates, *_uneven(inputs), *_absent(inputs), *notes)


def _comparable(*tables: FeatureTable) -> bool:
    """Whether ids mean the same: those that `features` gives are paths within a data set, or numbers."""
    kinds = {table.ids.dtype.kind for table in tables if table.ids is not None}
    return len(kinds) == 1 and len({(table.provenance or {}).get("data") for table in tables} - {None}) < 2


def named(source: str) -> str:
    """Return a file's name without its folders, which mean nothing on another machine."""
    return Path(source).name or source


def far_notes(inputs: Inputs, part: str) -> list[str]:
    """Return a warning that names a file's rows over 100 times as long as the median one, by number and id."""
    table, lengths = inputs.tables[part], inputs.rows[part].lengths
    beyond = far(lengths)
    found = beyond.nonzero().flatten().tolist()
    if not found:
        return []
    rows = first_few([f"{row}" if table.ids is None else f"{row} (id {table.ids[row]})" for row in found])
    times = 2.0 ** min(1000.0, lengths.max().item() - (median(lengths[~beyond]) or 0.0))
    what, are = ("row", "is") if len(found) == 1 else ("rows", "are up to")
    return [
        f"{table.source}: {what} {rows} {are} {times:,.0f} times as long as the median row, over "
        f"{FAR:.0f} times: left out of fits, measures and scores"
    ]


def without_far_rows(encoders: Mapping[str, Inputs]) -> dict[str, Inputs]:
    """Return all encoders' inputs without the rows that are far too long in any of them, so that they stay paired.

    Raises:
        UserError: a class, or a file, has no other rows.
    """
    found = dict(encoders)
    for part in next(iter(found.values())).tables:
        while (beyond := torch.stack([far(one.rows[part].lengths) for one in found.values()]).any(dim=0)).any():
            kept = (~beyond).nonzero().flatten()
            for name, one in found.items():
                fewer = one.keep(part, kept)
                empty = [k for k, count in enumerate(fewer.tables[part].counts()) if part == "train" and not count]
                if empty or not len(kept):
                    which = f"class {one.names[empty[0]]!r}" if empty else "the file"
                    notes = [note for other in encoders.values() for note in far_notes(other, part)]
                    raise UserError(f"{notes[0]}; {which} has no other rows: mend or remove them")
                found[name] = fewer
    return found


def _absent(inputs: Inputs) -> list[str]:
    """Warn where a held-out table has no samples of a class: nothing can be said about it there."""
    return [
        f"{table.source}: no samples of {listed(missing)}, so nothing is said about them there"
        for table in inputs.tables.values()
        if (missing := [name for name, count in zip(inputs.names, table.counts(), strict=True) if not count])
    ]


def _uneven(inputs: Inputs) -> list[str]:
    """Warn where the scored samples are not balanced: their accuracy is an average over samples."""
    scored = inputs.scored
    counts = [count for count in scored.counts() if count]
    if max(counts) <= UNEVEN * min(counts):
        return []
    return [
        f"{scored.source}: {min(counts)} to {max(counts)} samples a class; accuracies weigh classes by these counts, "
        "so read the recalls of groups and classes as well"
    ]


def _keys(table: FeatureTable) -> dict[str, str]:
    """Return the SHA-256 of class names, bursts and ids, which change results as numbers do; left out where absent.

    Names that are the numbers from 0 on count as absent: files without names have these.
    """
    names = table.class_names or ()
    given = {"class_names": names if names != tuple(map(str, range(len(names)))) else None}
    kept = given | {"groups": table.bursts, "ids": table.ids}
    texts = {field: json.dumps(np.asarray(keys).tolist()) for field, keys in kept.items() if keys is not None}
    return {field: hashlib.sha256(text.encode()).hexdigest() for field, text in texts.items()}


def digest(*tensors: torch.Tensor) -> str:
    """Return the SHA-256 of tensors' types, shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
