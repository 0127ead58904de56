"""The geometry of every class and group in one call, `describe(train, unseen)`, and warnings about the features."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from tailscope.errors import UserError, first_few
from tailscope.groups import GROUPS, assign_groups
from tailscope.measures.angles import (
    Centers,
    NearestWrongCenter,
    angle_between,
    class_centers,
    nearest_center,
    separation_by_chance,
)
from tailscope.measures.chance import TESTS, VERDICT_SAMPLES, Chance, ClassTests, false_discovery
from tailscope.measures.fields import EXCESSES, FEW_UNSEEN, MEASURES, MOST, NUMBERS, Entry
from tailscope.measures.measure import Facts, measure_class
from tailscope.measures.rows import FAR, ClassRows, exponent, gather, group_rows, map_mixed, median, scaled
from tailscope.seeds import numpy_stream
from tailscope.tables.mapped import map_rows

TRIMMED_FROM = 20  # training samples: of fewer the trimmed gap lies below the gap by chance, 0.5 degrees at 5
MOST_APART = 30  # powers of two between the lengths of train and unseen features
SQUARED = [measure.name for measure in MEASURES.values() if measure.unit == "squared"]
_AVERAGED = {*NUMBERS, "quantiles"} - {"p"}


@dataclass(frozen=True)
class GeometryResult:
    """Measurements of every class and group, with the fields of `tailscope.measures.FIELDS`.

    `centers`, float64 [C, d], are the classes' means over all samples, times one power of two that brings them near 1.
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
        seed: of all draws. A class's stream depends on its name, so that the order of classes does not change results.
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
    if power:
        train, unseen = (
            replace(rows, features=map_rows(rows.features, lambda block: scaled(block, power)))
            for rows in (train, unseen)
        )
    groups, rule = assign_groups(_training_counts(train, class_names, train_counts))
    keys = _stream_keys(class_names)
    centers = class_centers(train, unseen)
    tests = ClassTests(train, unseen, (train_bursts, unseen_bursts), permutations, alpha, seed, keys)

    def one(k: int) -> tuple[Entry, Facts, Chance]:
        rows = gather(train, unseen, k)
        chance = tests.run(rows, k)
        entry, fact = measure_class(rows, train.count(k), k, centers, numpy_stream(seed, "geometry", "halves", keys[k]))
        return {**entry, **chance.nulls, "index": k, "name": str(class_names[k]), "group": groups[k]}, fact, chance

    searches = NearestWrongCenter(train, [centers.train, centers.true]), NearestWrongCenter(unseen, [centers.true])
    jobs = [(one, len(class_names)), *((search.run, search.blocks) for search in searches)]
    measured: dict[int, tuple[Entry, Facts, Chance]] = {}
    for kind, i, result in map_mixed(jobs, train_features.device):
        if kind == 0:
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
    undefined = _undefined_notes(entries)
    warnings = [
        *_input_notes(train, unseen, tests.straddling),
        *_undrawn_note(tests.undrawn, permutations),
        *_class_notes(entries, facts, [a + b > 0 for a, b in zip(train.dropped, unseen.dropped, strict=True)]),
        *_verdict_notes(entries, differing),
        *undefined,
    ]
    return GeometryResult(list(entries), _pool_groups(entries, tests.group_p, alpha), rule, warnings, centers.true)


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
        longer = f"{2.0 ** max(-1000.0, min(1000.0, second - first)):.0e} times as long as that of the train features"
        mend = "extract both with the same encoder and scale both by the same number"
        raise UserError(f"unseen features: the median row is {longer}; {mend}")


def _training_counts(train: ClassRows, class_names: Sequence[str], given: Sequence[int] | None) -> list[int]:
    """Return training images per class; refuse classes without any."""
    counts = [train.count(k) + train.dropped[k] + train.far[k] for k in range(len(class_names))]
    if missing := [str(name) for name, count in zip(class_names, counts, strict=True) if not count]:
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
    n, m = (torch.tensor(side.starts).diff().to(to_wrong.device) for side in (train, unseen))
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


def _pool_groups(
    entries: Sequence[Entry], p_values: Callable[[str, Sequence[int]], float | None], alpha: float
) -> dict[str, Entry | None]:
    """Return one pooled entry for head, body and tail; None for each where there are no groups.

    Counts are summed; every other number is the mean over the classes where it is defined, each class counting once;
    lists are averaged place by place. `p_values` gives the p-value of one test over some classes, however small.
    """
    members = {group: [e for e in entries if e["group"] == group] for group in GROUPS}
    found = {group: _pool(group, some) for group, some in members.items() if some}
    for name, _, _ in TESTS:
        values = [p_values(name, [e["index"] for e in members[group]]) for group in found]
        for entry, p, q in zip(found.values(), values, false_discovery(values), strict=True):
            entry[f"{name}_p"], entry[f"{name}_q"] = p, q
            entry[f"{name}_flagged"] = None if q is None else q <= alpha
    return {group: found.get(group) for group in GROUPS}


def _pool(group: str, members: Sequence[Entry]) -> Entry:
    entry: Entry = {"group": group, "classes": len(members)}
    for name, measure in MEASURES.items():
        if measure.unit == "count":
            entry[name] = sum(member[name] for member in members)
        elif measure.unit in _AVERAGED:
            entry[name] = _mean([member[name] for member in members if member[name] is not None])
    return entry


def _mean(values: Sequence[Any]) -> Any:
    if values and isinstance(values[0], list):
        return [_mean(place) for place in zip(*values, strict=True)]
    return sum(values) / len(values) if values else None


def _input_notes(train: ClassRows, unseen: ClassRows, straddling: int) -> list[str]:
    """Return warnings about the feature matrices as a whole."""
    zeros, distant = (sum(train.dropped), sum(unseen.dropped)), (sum(train.far), sum(unseen.far))
    rows, dead = len(train.features) + len(unseen.features), int((~(train.alive | unseen.alive)).sum())
    width = train.features.shape[1]
    share = 100 * sum(zeros) / max(1, rows)
    many = f"; that is {share:.1f} % of all, check the features" if share > 1 else ""
    notes = {
        f"{sum(zeros)} feature vectors of length 0 have no direction and were left out ({zeros[0]} training, "
        f"{zeros[1]} unseen){many}": sum(zeros),
        f"{sum(distant)} feature vectors are over {FAR:.0f} times as long as the median one and were left out "
        f"({distant[0]} training, {distant[1]} unseen)": sum(distant),
        f"{dead} of {width} features are 0 in every row: read effective_rank, not the dimension": dead,
        f"{straddling} bursts have rows both in train and in unseen: each side is permuted by itself": straddling,
    }
    return [note for note, count in notes.items() if count]


def _undrawn_note(classes: int, permutations: int) -> list[str]:
    few = (
        f"would need more permutations than there is time for: their p-values are those of {permutations} permutations"
    )
    return [f"{classes} of so many classes {few}"] if classes else []


def _class_notes(entries: Sequence[Entry], facts: Sequence[Facts], dropped: Sequence[bool]) -> list[str]:
    """Return warnings about what could not be measured, or only badly, each naming its classes."""
    n, m = ([entry[name] for entry in entries] for name in ("train_count", "unseen_count"))
    copies, repeats = sum(f.copies for f in facts), sum(f.repeats for f in facts)
    few = f"fewer than {VERDICT_SAMPLES} training samples: estimates without a verdict, see the group"
    holds = {
        "some vectors of length 0 were left out": dropped,
        "no training vector with a direction and an ordinary length: nothing about training can be measured": [
            x == 0 for x in n
        ],
        "no unseen samples: shift, gap and escape not assessable": [x == 0 for x in m],
        f"fewer than {FEW_UNSEEN} unseen samples: comparisons are imprecise": [0 < x < FEW_UNSEEN for x in m],
        "1 training sample: spread, width, gap and escape undefined, see the group": [x == 1 for x in n],
        few: [1 < x < VERDICT_SAMPLES for x in n],
        "collapsed: all training vectors are one, shapes and ratios undefined": [f.collapsed for f in facts],
        "a class mean is 0: angles to it are undefined": [f.centerless for f in facts],
        "training samples are over 80 % of the pool: chance values contain memorisation, read gap and displacement": [
            a > 4 * b > 0 for a, b in zip(n, m, strict=True)
        ],
        f"{copies} unseen vectors copy a training vector of their class: gap and escape come out too small": [
            f.copies > 0 for f in facts
        ],
        f"{repeats} vectors repeat another of their set and class: related rows make p-values too small unless they "
        "are permuted together as bursts": [f.repeats > 0 for f in facts],
    }
    return _naming_classes(entries, holds)


def _verdict_notes(entries: Sequence[Entry], differing: Sequence[bool]) -> list[str]:
    """Return warnings about verdicts that depend on a convention, on label noise, or on the sheer number of samples."""
    holds = {
        "the gap halves without the furthest tenth of samples: it may be label noise among the unseen": [
            e["spread_gap_flagged"]
            and e["train_count"] >= TRIMMED_FROM
            and e["spread_gap_trimmed_deg"] < e["spread_gap_deg"] / 2
            for e in entries
        ],
        "significant but small gap (below 2 degrees, rank below 0.6)": [
            e["spread_gap_flagged"] and not e["spread_gap_material"] for e in entries
        ],
        "the verdict on the gap changes when centres average unit vectors instead of raw ones": differing,
    }
    return _naming_classes(entries, holds)


def _undefined_notes(entries: Sequence[Entry]) -> list[str]:
    """Make NaN, and what is beyond `MOST`, None, in place, and return a warning for each field that held any."""
    found: dict[str, list[bool]] = {}
    for k, entry in enumerate(entries):
        for name, value in entry.items():
            if not all(abs(v) <= MOST for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)):
                entry[name] = None
                note = f"{name} lies outside the range of numbers and is left undefined"
                found.setdefault(note, [False] * len(entries))[k] = True
    return _naming_classes(entries, found)


def _naming_classes(entries: Sequence[Entry], holds: Mapping[str, Sequence[bool]]) -> list[str]:
    """Return the notes that hold for any class, each with the names of these classes."""
    names = [entry["name"] for entry in entries]
    return [f"{note}: {first_few([*compress(names, which)])}" for note, which in holds.items() if any(which)]
