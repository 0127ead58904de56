"""The verdict, whether the classifier or the representation costs more, overall, by group and by class.

With A(current) and A(rebalanced) the accuracies on the same samples and b the classifier bound, what a linear
classifier would reach with as many samples of every class as the most frequent one has, the classifier gap is
b - A(current), the rebalancing gap A(rebalanced) - A(current), and the representation gap ceiling - b. The last is "at
most", because it also holds irreducible error. b is drawn from what the learning curve says of it: the classifier that
was scored on these samples, plus what more samples would gain. Intervals are 95 % intervals over samples and curves,
for this encoder and this classifier; they do not cover other trainings.

How classes share the gain of more samples is not known. Where the classifier that was scored is fitted to training
samples too, frequent classes had most of theirs already, and rare ones gain most; about that share, each draw gives a
group or class as much more or less as every class would gain on average. Many classes are judged at once, so that a
class has a verdict only where it is also sure among all of them (Benjamini-Hochberg); the three groups stand alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypedDict, cast

import numpy as np
from scipy.special import stdtr

from tailscope.diagnosis.learning_curve import DRAWS, KINDS, OF_UNSEEN
from tailscope.diagnosis.outcomes import OWN_CLASSIFIER, Outcomes, difference
from tailscope.diagnosis.remedies import BINS, POOLED, Scored
from tailscope.groups import GROUPS, SHOTS, shots
from tailscope.intervals import BoolArray, FloatArray, Gap, Interval, Z, as_list, summarize
from tailscope.measures.chance import VERDICT_SAMPLES, false_discovery
from tailscope.measures.fields import FEW_UNSEEN, Entry
from tailscope.report.text import number, percent
from tailscope.seeds import numpy_stream

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Kind = Literal["memorised", "weak features"]
UNDECIDED = "undecided"
NEGLIGIBLE = 0.01
WRONG = 0.05  # of the classes that have a verdict, at most
MOST_SAMPLES = 50  # times as many held-out samples: beyond, the difference is too small to care about
NO_INFORMATION = "no classifier does better than guessing on these features"
UNLIKE = (
    "the encoder treats its training samples unlike held-out ones: how well a classifier could do is estimated from "
    "held-out samples alone"
)
INTERVALS = (
    "95 % intervals over samples like these, for this encoder and this classifier as they are; another training of the "
    "same network may differ"
)


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
    difference_q: float | None


class Verdict(Part, total=False):
    """`verdict` of a diagnosis."""

    ceiling: float
    chance: float
    above_chance: bool
    group_tested: str | None
    intervals: str
    caveats: list[str]
    groups: dict[str, Part | None]
    classes: list[Part]
    withheld: list[str]


def accuracies(outcomes: Outcomes, groups: Sequence[str | None], counts: Sequence[int]) -> dict[str, Any]:
    """Return `accuracy` of a diagnosis: current, rebalanced and classifier_bound, each a cell as in `swap.json`.

    Each has `shots` too, the mean recall of classes with many, medium and few training samples, by the [C] `counts`.
    Beside them stands `calibration`, the expected calibration error of the first two.
    """
    selection, bound = outcomes.rebalanced, outcomes.bound
    attained, found = bound.attained, bound.extrapolated
    current, rebalanced, fitted = (
        _cell(correct, outcomes.labels, groups, counts)
        for correct in (outcomes.current, selection.correct, attained.correct)
    )
    chosen: dict[str, Any] = {
        "classifier": selection.best,
        "chosen": list(selection.chosen),
        "remedies": selection.tried,
    }
    chosen["layer"] = outcomes.layer and outcomes.layer.name
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


def _cell(correct: BoolArray, labels: IntArray, groups: Sequence[str | None], counts: Sequence[int]) -> dict[str, Any]:
    cell = summarize(correct[None], labels, groups)
    of = {name: [r for r, shot in zip(cell["per_class"], shots(counts), strict=True) if shot == name] for name in SHOTS}
    known = {name: [recall for recall in some if recall is not None] for name, some in of.items()}
    return cell | {"shots": {name: float(np.mean(some)) if some else None for name, some in known.items()}}


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
    training or 30 scored samples have no verdict of their own, nor have those that might be decided by chance among so
    many. Of a representation, `kind` is "memorised" where the permutation test of `spread_gap` rejects (of the group
    that loses most for all samples, of the group or class itself for its own), "weak features" where it does not, None
    where there was none, or where a classifier tells training from unseen samples nevertheless.

    `entries` and `pooled` are the geometry of the [C] classes and of the groups; `ceiling` is the accuracy that would
    be perfect, with an interval where it was measured.
    """
    court = _Court(outcomes, ceiling, shares(outcomes, entries))
    group_of = np.array([GROUPS.index(e["group"]) if e["group"] in GROUPS else -1 for e in entries])[outcomes.labels]
    found = {name: np.flatnonzero(group_of == i) for i, name in enumerate(GROUPS)}
    by_group = {name: court.part(rows, _flag(pooled.get(name))) for name, rows in found.items() if len(rows)}
    losing = min(by_group, key=lambda name: outcomes.current[found[name]].mean()) if by_group else None
    flags = [entry["spread_gap_flagged"] for entry in entries if entry["spread_gap_flagged"] is not None]
    tested = _flag(pooled.get(losing)) if losing else any(flags) if flags else None
    overall = court.part(np.arange(len(outcomes.labels)), tested)
    attained = outcomes.bound.attained
    informative, chance = attained.above_chance, attained.chance
    warnings = [*outcomes.notes]
    if not informative:
        for part in (overall, *by_group.values()):
            undecide(part, NO_INFORMATION)
        reached = f"the best gets {percent(attained.accuracy.estimate)} right"
        warnings.append(f"{NO_INFORMATION}: {reached}, always naming the most frequent class {percent(chance)}")
    verdict = {
        **overall,
        "ceiling": ceiling.estimate,
        "chance": chance,
        "above_chance": informative,
        "group_tested": losing,
        "intervals": INTERVALS,
        "groups": {name: by_group.get(name) for name in GROUPS},
        "classes": _classes(court, entries, informative),
        "caveats": _caveats(outcomes, overall, ceiling) if informative else [],
    }
    return cast(Verdict, verdict), [*warnings, *_known_from_below(outcomes), *outcomes.bound.notes]


def shares(outcomes: Outcomes, entries: Sequence[Entry]) -> FloatArray:
    """Return between which shares of the gain, relative to their share of what is missed, classes get: [2, C].

    The gain of a class goes with the logarithm of how many times as many samples it gets as were fitted to, 1 on
    average over classes. Where the encoder has memorised its training samples, they may also count for nothing: then
    every class gains alike.
    """
    bound, even = outcomes.bound, np.ones(len(entries))
    fitted = bound.attained.classifier
    trained = np.array([0 if fitted in OF_UNSEEN else entry["train_count"] for entry in entries])
    held = np.array([entry["unseen_count"] if fitted in KINDS or fitted.endswith(POOLED) else 0 for entry in entries])
    more = np.log(np.maximum(1.0, bound.bound_at / np.maximum(1, trained + held)))
    own = more / more.mean() if more.any() else even
    low, high = (own, own) if bound.exchange.alike else (np.minimum(own, even), np.maximum(own, even))
    return np.stack([low - 1, high + 1])


def gains_among(outcomes: Outcomes, rows: IntArray, between: FloatArray | None = None) -> FloatArray | None:
    """Draw what more samples would gain among some of the scored samples, [D]; None where the bound is not known.

    Each draw gives them a share of the gain between two limits a class, [2, C]; without, between none and twice what
    they would have if classes gained in proportion to what is missed.
    """
    attained, found = outcomes.bound.attained.correct, outcomes.bound.extrapolated
    if found is None:
        return None
    if len(rows) == len(outcomes.labels):
        return found.gains
    room, of_all = (1 - float(part.mean()) for part in (attained[rows], attained))
    apart, _, _ = _draws()
    low, high = (0.0, 2.0) if between is None else between[:, outcomes.labels[rows]].mean(axis=1)
    return np.minimum(room, found.gains * (low + (high - low) * apart) * (room / of_all if of_all else 0.0))


@dataclass(frozen=True)
class _Court:
    """What every part is judged by: the outcomes, the ceiling, and limits of the classes' shares of the gain [2, C]."""

    outcomes: Outcomes
    ceiling: Interval
    between: FloatArray

    def part(self, rows: IntArray, memorised: bool | None) -> Part:
        """Return the gaps and the bottleneck among some of the scored samples."""
        outcomes, ceiling = self.outcomes, self.ceiling
        current, rebalanced = outcomes.current[rows].astype(np.float64), outcomes.rebalanced.correct[rows]
        contrast = self.with_bound(rows, 2, -current - ceiling.estimate)
        missed = self.with_bound(rows, -1, np.full(len(rows), ceiling.estimate))
        gain = self.with_bound(rows, 1, -current)
        if memorised is False and not outcomes.bound.exchange.alike:
            memorised = None  # the test of spread lacks power, or training samples differ in another way
        bottleneck, kind, reason = decide(contrast, memorised, outcomes.bound.reason)
        if bottleneck != "classifier" and outcomes.bound.attained.above_chance:
            reason += _no_better(float(current.mean()), gain)
        if ceiling.estimate - current.mean() < NEGLIGIBLE:
            bottleneck, kind = UNDECIDED, None
            reason = "the classifier in use is within a point of the ceiling: there is nothing to gain"
        elif len(rows) < len(outcomes.labels) and outcomes.bound.attained.classifier == outcomes.current_name:
            bottleneck, kind = UNDECIDED, None
            reason = (
                "the classifier in use does better than any that was fitted to held-out samples, so that for some of "
                "the classes alone it is not known how one would do that treats all classes alike"
            )
        return {
            "bottleneck": bottleneck,
            "kind": kind,
            "reason": reason,
            "scored": len(rows),
            "current": float(current.mean()),
            "classifier_bound": ceiling.estimate - missed.estimate,
            "classifier_gap": gain.gap(),
            "rebalancing_gap": difference(rebalanced, current, outcomes.inflation).gap(),
            "representation_gap": cast(UpperGap, missed.gap() | {"at_most": True}),
            "difference": contrast.gap(),
        }

    def with_bound(self, rows: IntArray, times: int, others: FloatArray) -> Interval:
        """Return `times` the bound plus the mean of `others`, paired over some of the scored samples.

        The bound is what was attained on them plus a draw of what more samples would gain. Where that is not known, it
        is anything from what was attained to the ceiling, and the point that of what was attained.
        """
        attained, ceiling = self.outcomes.bound.attained, self.ceiling
        middle, error = self._items(rows, times, others)
        if len(rows) < 2:
            return Interval(middle, None, None, None)
        _, noise, of_ceiling = _draws()
        gains = gains_among(self.outcomes, rows, self.between)
        if gains is None:
            half = Z * attained.inflation * error
            reach = max(0.0, _highest(ceiling) - float(attained.correct[rows].mean()))
            low, high = middle - half, middle + half
            ends = (low, max(high, middle + times * reach)) if times > 0 else (min(low, middle + times * reach), high)
            return Interval(middle, ends, None, "item")
        uncertain = 0.0 if times == 1 else self._of_ceiling
        draws = middle + times * gains + error * noise + uncertain * of_ceiling
        low, high = np.quantile(draws, (0.025, 0.975))
        return Interval(middle + times * float(gains.mean()), (float(low), float(high)), None, "item")

    def p(self, rows: IntArray) -> float | None:
        """Return the two-sided p-value of the difference of both gaps among some samples; None with fewer than two."""
        if len(rows) < 2:
            return None
        middle, error = self._items(rows, 2, -self.outcomes.current[rows].astype(np.float64) - self.ceiling.estimate)
        gains, freedom = gains_among(self.outcomes, rows, self.between), len(rows) - 1  # in far tails t is not normal
        if gains is None:  # anything up to the ceiling is possible
            return min(1.0, 2 * float(stdtr(freedom, -middle / (self.outcomes.inflation * error))))
        below = float(stdtr(freedom, -(middle + 2 * gains) / np.hypot(error, self._of_ceiling)).mean())
        return 2 * min(below, 1 - below)

    def _items(self, rows: IntArray, times: int, others: FloatArray) -> tuple[float, float]:
        """Return the mean of `times` what was attained plus `others`, and its standard error."""
        items = times * self.outcomes.bound.attained.correct[rows] + others
        middle, number = float(items.mean()), len(rows)
        # As Agresti and Coull's, with four more samples: not 0 where all are alike.
        return middle, float(np.sqrt((np.square(items - middle).sum() + times**2) / (number + 4) / number))

    @property
    def _of_ceiling(self) -> float:
        """Standard error of the ceiling."""
        return 0.0 if self.ceiling.ci95 is None else (self.ceiling.ci95[1] - self.ceiling.ci95[0]) / (2 * Z)


@cache
def _draws() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return, for each draw of the bound, where in its limits a share is, and noise of the items and of the ceiling."""
    stream = numpy_stream(0, "verdict")
    return stream.uniform(0, 1, DRAWS), stream.normal(size=DRAWS), stream.normal(size=DRAWS)


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
        return UNDECIDED, None, "a single sample was scored, which is too few"
    low, high = contrast.ci95
    if low > 0:
        return "classifier", None, "more is lost by the classifier than by the features"
    lost = "more is lost by the features than by the classifier"
    if high < 0 and memorised is None:
        why = "whether they are weak, or the encoder has memorised its training samples, is not known"
        return "representation", None, f"{lost}; {why}"
    if high < 0 and memorised:
        why = "held-out samples lie farther from the centre of their class than training samples do"
        return "representation", "memorised", f"{lost}: the encoder has memorised its training samples, for {why}"
    if high < 0:
        why = "they tell the classes apart too little, in training and held-out samples alike"
        return "representation", "weak features", f"{lost}: {why}"
    if unknown is not None:
        return UNDECIDED, None, f"how much a better classifier would gain is known only from below, because {unknown}"
    return UNDECIDED, None, f"classifier and features may cost equally much; {_would_decide(contrast)}"


def samples_needed(contrast: Interval) -> float | None:
    """Return how many times as many scored samples would decide, should the difference of the gaps stay as it is.

    None where the interval excludes 0, or where it would take over 50 times as many.

    >>> samples_needed(Interval(0.125, (-0.125, 0.375), None, "item"))
    4.0
    """
    if contrast.ci95 is None or not contrast.estimate or contrast.excludes_zero():
        return None
    low, high = contrast.ci95
    factor = ((high - low) / 2 / contrast.estimate) ** 2
    return factor if 1 < factor <= MOST_SAMPLES else None


def _would_decide(contrast: Interval) -> str:
    factor = samples_needed(contrast)
    if factor is None:
        return "more held-out samples are unlikely to decide"
    return f"about {number(factor, 1 if factor < 2 else 0)} times as many held-out samples of every class would decide"


def _no_better(current: float, gain: Interval) -> str:
    """Return what explains a bound below the current accuracy, among some samples or all; nothing where it is not."""
    if gain.estimate >= 0:
        return ""
    reached = f"(about {percent(current + gain.estimate, 0)} right instead of {percent(current, 0)})"
    if gain.ci95 is not None and gain.ci95[1] < 0:
        return f"; the classifier in use favours these classes, and one that treats all alike would do worse {reached}"
    return f"; a classifier that treats all classes alike would not do better here {reached}"


def _classes(court: _Court, entries: Sequence[Entry], informative: bool) -> list[Part]:
    """Return the part of every class: decided where its own samples and all classes together leave no doubt."""
    labels = court.outcomes.labels
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels, minlength=len(entries))
    places = np.split(order, np.cumsum(counts)[:-1])
    found = [_class(court, entry, rows, informative) for entry, rows in zip(entries, places, strict=True)]
    told = [
        e["train_count"] >= VERDICT_SAMPLES and len(rows) >= FEW_UNSEEN for e, rows in zip(entries, places, strict=True)
    ]
    several = false_discovery([court.p(rows) if enough else None for rows, enough in zip(places, told, strict=True)])
    for part, q in zip(found, several, strict=True):
        part["difference_q"] = q
        if q is not None and q > WRONG and part["bottleneck"] != UNDECIDED:
            alone, among = part["bottleneck"], f"of {sum(told)} classes some look like this by chance"
            undecide(part, f"by itself this class points to the {alone}, but {among}: see its group")
    return found


def _class(court: _Court, entry: Entry, rows: IntArray, informative: bool) -> Part:
    if not len(rows):
        why = "no samples of this class were scored"
        return {"index": entry["index"], "bottleneck": UNDECIDED, "kind": None, "reason": why, "scored": 0}
    part = court.part(rows, entry["spread_gap_flagged"])
    if not informative:
        undecide(part, NO_INFORMATION)
    elif entry["train_count"] < VERDICT_SAMPLES:
        undecide(part, f"fewer than {VERDICT_SAMPLES} training samples: see its group")
    elif len(rows) < FEW_UNSEEN:
        undecide(part, f"fewer than {FEW_UNSEEN} scored samples: see its group")
    return {"index": entry["index"], **part}


def undecide(part: Part, reason: str) -> None:
    """Take a verdict back, in place, and say why."""
    part["bottleneck"], part["kind"], part["reason"] = UNDECIDED, None, reason


def _caveats(outcomes: Outcomes, overall: Part, ceiling: Interval) -> list[str]:
    """Return what limits the verdict, first what could overturn it."""
    bound, kind = outcomes.bound, overall["kind"]
    found, stand_in, interval = [*_known_from_below(outcomes)], None, overall["difference"]["ci95"]
    if outcomes.current_name == OWN_CLASSIFIER:
        stand_in = (
            "No classifier was given: the one judged is a softmax regression fitted to the training features. Give the "
            "network's own as --classifier."
        )
    reachable = ceiling.estimate if interval is None else ceiling.estimate + interval[1]
    if overall["bottleneck"] == "classifier":
        found += [stand_in] if stand_in else []
        if bound.extrapolated is not None and bound.extrapolated.mean - bound.attained.accuracy.estimate > NEGLIGIBLE:
            needed = f"{bound.extrapolated.bound_at:,} samples of every class"
            reached = f"{percent(bound.attained.accuracy.estimate)} (a {bound.attained.classifier})"
            found.append(f"That takes {needed}; with the samples there are, {reached} is reached.")
    elif ceiling.ci95 is None and ceiling.estimate == 1 and overall["bottleneck"] == "representation":
        found.append(
            "This takes for granted that 100 % can be right. If labels are wrong or images cannot be told apart, so "
            f"that no features get over {percent(reachable, 0)} right, the classifier may cost as much: give that"
            " share as --ceiling."
        )
    elif ceiling.ci95 is None and ceiling.estimate == 1:
        found.append(
            "This takes for granted that 100 % can be right. Where wrong labels or images that cannot be told apart "
            "leave less, give that as --ceiling: the classifier then counts for more."
        )
    if kind == "memorised" or not bound.exchange.alike:
        found.append(
            "Held-out samples of another source than the training samples (camera, year, transform) look the same as "
            "memorised training samples."
        )
    if overall["bottleneck"] != "classifier" and stand_in:
        found.append(stand_in)
    found.append("This holds for one encoder and classifier as they are: another training of them may differ.")
    found.append(
        "What is put down to the representation is an upper limit: errors that no features avoid, and what only a "
        "classifier that is not linear would get right, are in it."
    )
    return [
        *found,
        *([] if bound.exchange.alike else [f"{_sentence(UNLIKE)}."]),
        *(f"{_sentence(n)}." for n in bound.notes),
    ]


def _known_from_below(outcomes: Outcomes) -> list[str]:
    bound = outcomes.bound
    if bound.extrapolated is not None or not bound.attained.above_chance:
        return []
    return [f"How much a better classifier would gain is known only from below: {bound.reason}."]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _flag(entry: Entry | None) -> bool | None:
    flagged = None if entry is None else entry["spread_gap_flagged"]
    return None if flagged is None else bool(flagged)
