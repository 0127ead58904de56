"""The verdict, whether the classifier or the representation costs more, overall, by group and by class.

With A(current) and A(rebalanced) the accuracies on the same samples and b the classifier bound, what a linear
classifier would reach with as many samples of every class as the most frequent one has, the classifier gap is
b - A(current), the rebalancing gap A(rebalanced) - A(current), and the representation gap ceiling - b. The last is "at
most", because it also holds irreducible error. b is drawn from what the learning curve says of it: the classifier that
was scored on these samples, plus what more samples would gain. Intervals are 95 % intervals over samples and curves,
for this encoder and this classifier; they do not cover other trainings.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, TypedDict, cast

import numpy as np

from tailscope.diagnosis.learning_curve import DRAWS
from tailscope.diagnosis.outcomes import Outcomes, difference
from tailscope.diagnosis.remedies import BINS, Scored
from tailscope.groups import GROUPS
from tailscope.intervals import FloatArray, Gap, Interval, Z, as_list, summarize
from tailscope.measures.chance import VERDICT_SAMPLES
from tailscope.measures.describe import FEW_UNSEEN
from tailscope.measures.fields import Entry
from tailscope.report.text import percent
from tailscope.seeds import numpy_stream

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Kind = Literal["memorised", "weak features"]
UNDECIDED = "undecided"
NEGLIGIBLE = 0.01
NO_INFORMATION = "these features carry no class information"
UNLIKE = "training samples are unlike unseen ones: the curve is drawn through fits to unseen samples alone"


class UpperGap(Gap):
    """A gap that may be smaller, for what it holds besides."""

    at_most: bool


class Part(TypedDict, total=False):
    """The bottleneck among all scored samples, or those of a group or class; without samples it has no gaps."""

    index: int
    bottleneck: str
    kind: Kind | None
    reason: str
    scored: int
    current: float
    classifier_bound: float
    classifier_gap: Gap
    rebalancing_gap: Gap
    representation_gap: UpperGap
    difference: Gap


class Verdict(Part, total=False):
    """`verdict` of a diagnosis."""

    ceiling: float
    chance: float
    above_chance: bool
    group_tested: str | None
    intervals: str
    groups: dict[str, Part | None]
    classes: list[Part]
    withheld: list[str]


def accuracies(outcomes: Outcomes, groups: Sequence[str | None]) -> dict[str, Any]:
    """Return `accuracy` of a diagnosis: current, rebalanced and classifier_bound, each a cell as in `swap.json`.

    Beside them stands `calibration`, the expected calibration error of the first two.
    """
    selection, bound = outcomes.rebalanced, outcomes.bound
    attained, found = bound.attained, bound.extrapolated
    current, rebalanced, fitted = (
        summarize(correct[None], outcomes.labels, groups)
        for correct in (outcomes.current, selection.correct, attained.correct)
    )
    chosen = {"classifier": selection.best, "chosen": list(selection.chosen), "remedies": selection.tried}
    fitted |= {
        "classifier": attained.classifier,
        "ci95": as_list(attained.accuracy.ci95),
        "attained": {"mean": attained.accuracy.estimate, "ci95": as_list(attained.accuracy.ci95)},
        "extrapolated": found and {"mean": found.mean, "ci95": list(found.ci95), "bound_at": found.bound_at},
        "reason": bound.reason,
        "notes": [*bound.notes, *([] if bound.exchange.alike else [UNLIKE])],
    }
    return {
        "current": current | {"classifier": outcomes.current_name},
        "rebalanced": rebalanced | chosen,
        "classifier_bound": fitted,
        "calibration": {
            "bins": BINS,
            "current": _calibration(outcomes.now),
            "rebalanced": _calibration(selection.scored),
        },
    }


def _calibration(scored: Scored) -> dict[str, Any]:
    found = scored.calibration_error()
    return {"mean": found.estimate, "ci95": as_list(found.ci95)}


def judge(
    outcomes: Outcomes, entries: Sequence[Entry], pooled: dict[str, Entry | None], ceiling: Interval
) -> tuple[Verdict, list[str]]:
    """Return `verdict` of a diagnosis, and warnings.

    `bottleneck` is "classifier" where the paired interval of classifier gap minus representation gap lies above 0,
    "representation" where it lies below 0, else "undecided". Features on which what is attained is not above chance
    decide nothing. Neither does a current accuracy within a point of the ceiling, and classes with fewer than 5
    training or 30 scored samples have no verdict of their own. Of a representation, `kind` is "memorised" where the
    permutation test of `spread_gap` rejects (of the group that loses most for all samples, of the group or class itself
    for its own), "weak features" where it does not, None where there was none, or where a classifier tells
    training from unseen samples nevertheless.

    `entries` and `pooled` are the geometry of the [C] classes and of the groups; `ceiling` is the accuracy that would
    be perfect, with an interval where it was measured.
    """
    group_of = np.array([GROUPS.index(e["group"]) if e["group"] in GROUPS else -1 for e in entries])[outcomes.labels]
    found = {name: np.flatnonzero(group_of == i) for i, name in enumerate(GROUPS)}
    by_group = {
        name: _part(outcomes, rows, ceiling, _flag(pooled.get(name))) for name, rows in found.items() if len(rows)
    }
    losing = min(by_group, key=lambda name: outcomes.current[found[name]].mean()) if by_group else None
    flags = [entry["spread_gap_flagged"] for entry in entries if entry["spread_gap_flagged"] is not None]
    tested = _flag(pooled.get(losing)) if losing else any(flags) if flags else None
    if tested is False and not outcomes.bound.exchange.alike:
        tested = None  # the test of spread lacks power, or training samples differ in another way
    overall = _part(outcomes, np.arange(len(outcomes.labels)), ceiling, tested)
    attained = outcomes.bound.attained
    informative, chance = attained.above_chance, attained.chance
    warnings = [*outcomes.notes]
    if not informative:
        for part in (overall, *by_group.values()):
            undecide(part, NO_INFORMATION)
        reached = f"reaches {percent(attained.accuracy.estimate)}, not above chance ({percent(chance)})"
        warnings.append(f"{NO_INFORMATION}: a classifier fitted to the true distribution {reached}")
    verdict = {
        **overall,
        "ceiling": ceiling.estimate,
        "chance": chance,
        "above_chance": informative,
        "group_tested": losing,
        "intervals": "item: for new samples, not for other trainings",
        "groups": {name: by_group.get(name) for name in GROUPS},
        "classes": _classes(outcomes, entries, ceiling, informative),
    }
    return cast(Verdict, verdict), [*warnings, *_caveats(outcomes)]


def _part(outcomes: Outcomes, rows: IntArray, ceiling: Interval, memorised: bool | None) -> Part:
    """Return the gaps and the bottleneck among some of the scored samples."""
    current, rebalanced = outcomes.current[rows].astype(np.float64), outcomes.rebalanced.correct[rows]
    contrast = _with_bound(outcomes, rows, 2, -current - ceiling.estimate, ceiling)
    missed = _with_bound(outcomes, rows, -1, np.full(len(rows), ceiling.estimate), ceiling)
    bottleneck, kind, reason = decide(contrast, memorised, outcomes.bound.reason)
    if ceiling.estimate - current.mean() < NEGLIGIBLE:
        bottleneck, kind = UNDECIDED, None
        reason = "the current accuracy is within a point of the ceiling: nothing to gain"
    return {
        "bottleneck": bottleneck,
        "kind": kind,
        "reason": reason,
        "scored": len(rows),
        "current": float(current.mean()),
        "classifier_bound": ceiling.estimate - missed.estimate,
        "classifier_gap": _with_bound(outcomes, rows, 1, -current, ceiling).gap(),
        "rebalancing_gap": difference(rebalanced, current, outcomes.inflation).gap(),
        "representation_gap": cast(UpperGap, missed.gap() | {"at_most": True}),
        "difference": contrast.gap(),
    }


def _with_bound(outcomes: Outcomes, rows: IntArray, times: int, others: FloatArray, ceiling: Interval) -> Interval:
    """Return `times` the bound plus the mean of `others`, paired over some of the scored samples.

    The bound is what was attained on them plus a draw of what more samples would gain. Where that is not known, it is
    anything from what was attained to the ceiling, and the point that of what was attained.
    """
    bound = outcomes.bound
    attained = bound.attained.correct[rows]
    items = times * attained + others
    middle, number = float(items.mean()), len(rows)
    if number < 2:
        return Interval(middle, None, None, None)
    # As Agresti and Coull's, with four more samples: not 0 where all are alike.
    error = float(np.sqrt((np.square(items - middle).sum() + times**2) / (number + 4) / number))
    apart, noise, of_ceiling = _draws()
    if bound.extrapolated is None:
        half, reach = Z * bound.attained.inflation * error, max(0.0, _highest(ceiling) - float(attained.mean()))
        low, high = middle - half, middle + half
        ends = (low, max(high, middle + times * reach)) if times > 0 else (min(low, middle + times * reach), high)
        return Interval(middle, ends, None, "item")
    gains = bound.extrapolated.gains
    if number < len(outcomes.labels):  # how the gain is shared among classes is not known
        room, of_all = (1 - float(part.mean()) for part in (attained, bound.attained.correct))
        gains = np.minimum(room, gains * apart * (room / of_all if of_all else 0.0))
    uncertain = 0.0 if ceiling.ci95 is None or times == 1 else (ceiling.ci95[1] - ceiling.ci95[0]) / (2 * Z)
    draws = middle + times * gains + error * noise + uncertain * of_ceiling
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(middle + times * float(gains.mean()), (float(low), float(high)), None, "item")


@cache
def _draws() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return, for each draw of the bound, a class's share of the gain, and noise of the items and of the ceiling."""
    stream = numpy_stream(0, "verdict")
    return stream.uniform(0, 2, DRAWS), stream.normal(size=DRAWS), stream.normal(size=DRAWS)


def _highest(ceiling: Interval) -> float:
    return ceiling.estimate if ceiling.ci95 is None else ceiling.ci95[1]


def decide(contrast: Interval, memorised: bool | None, unknown: str | None = None) -> tuple[str, Kind | None, str]:
    """Return the bottleneck, its kind and why, of the classifier gap minus the representation gap.

    `memorised` says whether the test of `spread_gap` rejects, None where there was none; `unknown` why the bound is
    known as a lower limit only.

    >>> decide(Interval(-0.2, (-0.3, -0.1), None, "item"), True)[:2]
    ('representation', 'memorised')
    >>> decide(Interval(-0.2, (-0.3, -0.1), None, "item"), False)[:2]
    ('representation', 'weak features')
    """
    if contrast.ci95 is None:
        return UNDECIDED, None, "too few samples for an interval"
    low, high = contrast.ci95
    if low > 0:
        return "classifier", None, "the classifier gap is larger than the representation gap"
    larger = "the representation gap is larger"
    if high < 0 and memorised is None:
        return "representation", None, f"{larger}; of which kind is not known"
    if high < 0 and memorised:
        return (
            "representation",
            "memorised",
            f"{larger}: training samples are memorised, unseen ones lie farther from their centres",
        )
    if high < 0:
        why = "the features tell the classes apart too little, on training and unseen samples alike"
        return "representation", "weak features", f"{larger}: {why}"
    if unknown is not None:
        return UNDECIDED, None, f"the classifier bound is known as a lower limit only: {unknown}"
    return UNDECIDED, None, "the interval of the gaps' difference includes 0"


def _classes(outcomes: Outcomes, entries: Sequence[Entry], ceiling: Interval, informative: bool) -> list[Part]:
    order = np.argsort(outcomes.labels, kind="stable")
    ends = np.cumsum(np.bincount(outcomes.labels, minlength=len(entries)))[:-1]
    found: list[Part] = []
    for entry, rows in zip(entries, np.split(order, ends), strict=True):
        if not len(rows):
            empty: Part = {"bottleneck": UNDECIDED, "kind": None, "reason": "no scored samples", "scored": 0}
            found.append({"index": entry["index"], **empty})
            continue
        part = _part(outcomes, rows, ceiling, entry["spread_gap_flagged"])
        if not informative:
            undecide(part, NO_INFORMATION)
        elif entry["train_count"] < VERDICT_SAMPLES:
            undecide(part, f"fewer than {VERDICT_SAMPLES} training samples: see the group")
        elif len(rows) < FEW_UNSEEN:
            undecide(part, f"fewer than {FEW_UNSEEN} scored samples: see the group")
        found.append({"index": entry["index"], **part})
    return found


def undecide(part: Part, reason: str) -> None:
    """Take a verdict back, in place, and say why."""
    part["bottleneck"], part["kind"], part["reason"] = UNDECIDED, None, reason


def _caveats(outcomes: Outcomes) -> list[str]:
    """Return what limits the verdict."""
    bound = outcomes.bound
    if bound.extrapolated is None and bound.attained.above_chance:
        return [f"the classifier bound is known as a lower limit only: {bound.reason}", *bound.notes]
    return list(bound.notes)


def _flag(entry: Entry | None) -> bool | None:
    flagged = None if entry is None else entry["spread_gap_flagged"]
    return None if flagged is None else bool(flagged)
