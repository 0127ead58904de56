"""The geometry of every class in one call: `describe(train, unseen)`."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tailscope.errors import UserError
from tailscope.geometry.angles import angle_between, nearest_center
from tailscope.geometry.centers import Centers, class_centers, separation_by_chance
from tailscope.geometry.fields import EXCESSES, MEASURES, Entry
from tailscope.geometry.lengths import exponent, median, scaled
from tailscope.geometry.measure import Facts, measure_class
from tailscope.geometry.notes import class_notes, input_notes, undefined_notes, verdict_notes
from tailscope.geometry.parallel import map_mixed
from tailscope.geometry.pooling import pool_groups
from tailscope.geometry.rows import ClassRows, gather, group_rows
from tailscope.geometry.search import NearestWrongCenter
from tailscope.geometry.significance import Chance, ClassTests, UnitMaker
from tailscope.groups import assign_groups
from tailscope.seeds import numpy_stream

MOST_APART = 30  # powers of two between the lengths of train and unseen features
SQUARED = [measure.name for measure in MEASURES.values() if measure.unit == "squared"]


@dataclass(frozen=True)
class GeometryResult:
    """Measurements of every class and group, with the fields of `tailscope.geometry.FIELDS`.

    `centers`, float64 [C, d], are the means of the classes over training and unseen samples, all times one power of
    two that brings them near 1.
    """

    classes: list[Entry]
    groups: dict[str, Entry | None]
    groups_rule: str
    warnings: list[str]
    centers: Tensor = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, dicts, numbers, texts and None; the centres stay out."""
        return {name: value for name, value in vars(self).items() if name != "centers"}


def describe(
    train_features: Tensor,
    train_labels: Tensor,
    unseen_features: Tensor,
    unseen_labels: Tensor,
    class_names: Sequence[str],
    *,
    train_counts: Sequence[int] | None = None,
    permutations: int = 999,
    alpha: float = 0.05,
    seed: int = 0,
    train_bursts: Tensor | None = None,
    unseen_bursts: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GeometryResult:
    """Measure the geometry of every class of features, and how much of it chance explains.

    Args:
        train_features: [n, d], float16 to float64, of the samples that the encoder or its classifier learned from.
        train_labels: [n], integers in 0 ... C-1; every class needs at least one sample.
        unseen_features: [m, d], of samples from the true distribution that had no part in training; may be empty.
        unseen_labels: [m].
        class_names: C names, at least 2.
        train_counts: training images per class, which decide head, body and tail; by default counted from the labels.
        permutations: splits drawn per class (more where BH over many classes needs them); 0 leaves out p-values.
        alpha: false discovery rate at which a class is flagged.
        seed: of the permutations and of the halves in the cross-validated first principal component. A class's
            stream depends on its name, so that the order of the classes does not change a class's result.
        train_bursts: [n] integers; rows of a class with the same number are related and change sides together.
        unseen_bursts: [m], numbered like `train_bursts`.
        progress: called with (classes done, C).

    Returns:
        One entry a class and one a group, with the fields that `FIELDS` defines; undefined ones are None.

    Raises:
        UserError: shapes, dtypes, labels, or values that are not finite; a class without training samples.

    >>> corners = torch.eye(3).repeat_interleave(40, 0) + 0.1 * torch.randn(120, 3, generator=torch.manual_seed(0))
    >>> labels = torch.arange(3).repeat_interleave(40)
    >>> result = describe(corners[::2], labels[::2], corners[1::2], labels[1::2], ["a", "b", "c"], permutations=99)
    >>> 80 < result.classes[0]["nearest_center_true_deg"] < 100
    True
    """
    _check(train_features, unseen_features, class_names, permutations, alpha)
    train = group_rows(train_features, train_labels, class_names, "train")
    unseen = group_rows(unseen_features, unseen_labels, class_names, "unseen")
    _check_lengths(train, unseen)
    power = exponent(train.lengths, unseen.lengths)
    train, unseen = (replace(rows, features=scaled(rows.features, power)) for rows in (train, unseen))
    groups, rule = assign_groups(_training_counts(train, class_names, train_counts))
    keys = _stream_keys(class_names)
    centers = class_centers(train, unseen)
    units = UnitMaker(train, unseen, train_bursts, unseen_bursts)
    tests = ClassTests(train, unseen, units, permutations, alpha, seed, keys)

    def one(k: int) -> tuple[Entry, Facts, Chance]:
        rows = gather(train, unseen, k)
        chance = tests.run(rows, k)
        entry, fact = measure_class(rows, train.count(k), k, centers, numpy_stream(seed, "geometry", "halves", keys[k]))
        return {**entry, **chance.nulls, "index": k, "name": str(class_names[k]), "group": groups[k]}, fact, chance

    searches = NearestWrongCenter(train, [centers.train, centers.true]), NearestWrongCenter(unseen, [centers.true])
    kinds = [(one, len(class_names)), *((search.run, search.blocks) for search in searches)]
    measured: dict[int, tuple[Entry, Facts, Chance]] = {}
    for kind, i, result in map_mixed(kinds, train_features.device):
        if kind:
            searches[kind - 1].add(i, result)
            continue
        measured[i] = result
        if progress is not None:
            progress(len(measured), len(class_names))
    entries, facts, chances = zip(*(measured[k] for k in range(len(class_names))), strict=True)
    stream = numpy_stream(seed, "geometry", "separation")
    chance = separation_by_chance(train, unseen, centers, permutations, stream)
    _separate(entries, centers, chance, train, unseen, torch.cat([search.means() for search in searches]))
    differing = tests.finish(entries, chances)
    _excesses(entries)
    _original_units(entries, power)
    undefined = undefined_notes(entries)
    dropped = [a + b for a, b in zip(train.dropped, unseen.dropped, strict=True)]
    dead = int((~(train.alive | unseen.alive)).sum())
    warnings = [
        *input_notes(train, unseen, dead, units.straddling),
        *class_notes(entries, facts, dropped),
        *verdict_notes(entries, differing),
        *undefined,
    ]
    return GeometryResult(list(entries), pool_groups(entries, tests.group_p, alpha), rule, warnings, centers.true)


def _check(train: Tensor, unseen: Tensor, class_names: Sequence[str], permutations: int, alpha: float) -> None:
    if len(class_names) < 2:
        raise UserError(f"class_names: {len(class_names)} names; geometry compares at least 2 classes")
    if train.ndim == 2 and unseen.ndim == 2 and train.shape[1] != unseen.shape[1]:
        raise UserError(f"unseen features have {unseen.shape[1]} columns, train features have {train.shape[1]}")
    if permutations < 0:
        raise UserError(f"permutations: got {permutations}, expected 0 or more")
    if not 0 < alpha < 1:
        raise UserError(f"alpha: got {alpha}, expected a number between 0 and 1")


def _check_lengths(train: ClassRows, unseen: ClassRows) -> None:
    """Refuse features of which one set is so much longer that the other would vanish beside it."""
    first, second = median(train.lengths), median(unseen.lengths)
    if first is not None and second is not None and abs(first - second) > MOST_APART:
        times = 2.0 ** max(-1000.0, min(1000.0, second - first))
        raise UserError(
            f"unseen features: the median row is {times:.0e} times as long as that of the train features; "
            "extract both with the same encoder and scale both by the same number"
        )


def _training_counts(train: ClassRows, class_names: Sequence[str], given: Sequence[int] | None) -> list[int]:
    """Return training images per class; refuse classes without any."""
    counts = [train.count(k) + train.dropped[k] + train.far[k] for k in range(len(class_names))]
    missing = [str(name) for name, count in zip(class_names, counts, strict=True) if not count]
    if missing:
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise UserError(f"train labels: no samples of class {missing[0]!r}{more}; add some or leave the class out")
    if given is not None and len(given) != len(counts):
        raise UserError(f"train_counts: {len(given)} counts for {len(counts)} classes")
    return counts if given is None else [int(count) for count in given]


def _stream_keys(class_names: Sequence[str]) -> list[str]:
    """Name each class's random stream after the class; a repeated name gets a number."""
    seen: Counter[str] = Counter()
    keys = []
    for name in map(str, class_names):
        keys.append(f"{name}#{seen[name]}")
        seen[name] += 1
    return keys


def _separate(
    entries: Sequence[Entry], centers: Centers, chance: Tensor, train: ClassRows, unseen: ClassRows, to_wrong: Tensor
) -> None:
    """Fill in the angles between centres, and between samples and the nearest wrong centre.

    `to_wrong` [3, C]: from training samples to training and to true centres, from unseen samples to true centres.
    """
    angle_s, class_s = nearest_center(centers.train)
    angle_t, class_t = nearest_center(centers.true)
    n = torch.tensor(train.starts).diff().to(to_wrong.device)
    m = torch.tensor(unseen.starts).diff().to(to_wrong.device)
    to_true = torch.where(n > 0, n * to_wrong[1], 0) + torch.where(m > 0, m * to_wrong[2], 0)
    columns = {
        "center_shift_deg": torch.where(m > 0, angle_between(centers.train, centers.true), torch.nan),
        "center_shift_unseen_deg": angle_between(centers.train, centers.unseen),
        "nearest_center_train_deg": angle_s,
        "nearest_center_train_class": class_s,
        "nearest_center_train_null_deg": chance,
        "nearest_center_true_deg": angle_t,
        "nearest_center_true_class": class_t,
        "nearest_center_sample_train_deg": to_wrong[0],
        "nearest_center_sample_true_deg": to_true / (n + m),
    }
    for name, column in columns.items():
        for entry, value in zip(entries, column.tolist(), strict=True):
            entry[name] = None if value != value or value == -1 else value


def _excesses(entries: Sequence[Entry]) -> None:
    """Fill in raw minus null; a null without a raw value says nothing and is taken back."""
    for entry in entries:
        for raw, null, excess in EXCESSES:
            if entry[raw] is None:
                entry[null] = None
            elif entry[null] is not None:
                entry[excess] = entry[raw] - entry[null]


def _original_units(entries: Sequence[Entry], power: int) -> None:
    """Give squared measures of features that were multiplied by 2 ** power in squared units of the features given."""
    for entry in entries:
        for name in SQUARED:
            if power and entry[name]:
                half = entry[name] * 2.0**-power  # the factor's square may lie outside the range of float64
                entry[name] = half * 2.0**-power or math.nan
