"""The verdict, whether the classifier or the representation costs more, overall, by group and by class; and advice.

With A(current), A(rebalanced) and A(bound) the accuracies on the same samples, the classifier gap is A(bound) -
A(current), the rebalancing gap A(rebalanced) - A(current), and the representation gap ceiling - A(bound). The last is
"at most", because it also holds irreducible error and what a classifier fitted to more samples would regain. Intervals
are 95 % intervals over samples, for this encoder and this classifier; they do not cover other trainings. Each piece of
advice, what to try, for which classes, and what it can gain at most, is tied to a number of the verdict.
"""

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import numpy as np

from tailscope.attribution import summarize
from tailscope.diagnosis.compare import Pair
from tailscope.diagnosis.outcomes import BoolArray, Outcomes, difference
from tailscope.errors import first_few
from tailscope.groups import GROUPS
from tailscope.intervals import FloatArray, Gap, Interval, proportion
from tailscope.measures.chance import VERDICT_SAMPLES
from tailscope.measures.describe import FEW_UNSEEN
from tailscope.measures.fields import Entry
from tailscope.report.text import in_points, number, percent

IntArray = np.ndarray[Any, np.dtype[np.int64]]
UNDECIDED = "undecided"
NEGLIGIBLE = 0.01
NO_INFORMATION = "these features carry no class information"
NAMED = 5
MOST_SAMPLES = 50  # times as many unseen samples: beyond, the difference is too small to care about
CONFUSED = 0.1


class UpperGap(Gap):
    """A gap that may be smaller, for what it holds besides."""

    at_most: bool


class Part(TypedDict, total=False):
    """The bottleneck among all scored samples, or those of a group or class; without samples it has no gaps."""

    index: int
    bottleneck: str
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


class Advice(TypedDict):
    """What to try about `about` ("classifier", "representation", "pairs" or "evidence"), and for which classes.

    `at_most` says whether the gain is an upper limit rather than what was measured.
    """

    about: str
    text: str
    remedy: str | None
    classes: list[str]
    gain: Gap | None
    at_most: bool


def accuracies(outcomes: Outcomes, groups: Sequence[str | None]) -> dict[str, Any]:
    """Return `accuracy` of a diagnosis: current, rebalanced and classifier_bound, each a cell as in `swap.json`."""
    selection, bound = outcomes.rebalanced, outcomes.bound
    current, rebalanced, fitted = (
        summarize(correct[None], outcomes.labels, groups)
        for correct in (outcomes.current, selection.correct, bound.correct)
    )
    chosen = {"classifier": selection.best, "chosen": list(selection.chosen), "remedies": outcomes.remedies}
    fitted |= {
        "classifier": bound.remedy or "softmax regression on unseen samples",
        "ci95": list(_reach(bound.correct, outcomes.inflation)),
        "extrapolated": None if bound.extrapolated is None else bound.extrapolated.gap(),
        "notes": list(bound.notes),
    }
    return {
        "current": current | {"classifier": outcomes.current_name},
        "rebalanced": rebalanced | chosen,
        "classifier_bound": fitted,
    }


def judge(
    outcomes: Outcomes, entries: Sequence[Entry], pooled: dict[str, Entry | None], ceiling: float
) -> tuple[Verdict, list[str]]:
    """Return `verdict` of a diagnosis, and warnings.

    `bottleneck` is "classifier" where the paired interval of classifier gap minus representation gap lies above 0;
    "representation" where it lies below 0 and the permutation test of `spread_gap` rejects: of the group that loses
    most for all samples, of the group or class itself for its own; else "undecided". Features on which the bound is not
    above chance decide nothing. Neither does a current accuracy within a point of the ceiling, and classes with fewer
    than 5 training or 30 scored samples have no verdict of their own.

    `entries` and `pooled` are the geometry of the [C] classes and of the groups; `ceiling` is the accuracy that would
    be perfect.
    """
    group_of = np.array([GROUPS.index(e["group"]) if e["group"] in GROUPS else -1 for e in entries])[outcomes.labels]
    found = {name: np.flatnonzero(group_of == i) for i, name in enumerate(GROUPS)}
    by_group = {
        name: _part(outcomes, rows, ceiling, _flag(pooled.get(name))) for name, rows in found.items() if len(rows)
    }
    losing = min(by_group, key=lambda name: outcomes.current[found[name]].mean()) if by_group else None
    flags = [entry["spread_gap_flagged"] for entry in entries if entry["spread_gap_flagged"] is not None]
    tested = _flag(pooled.get(losing)) if losing else any(flags) if flags else None
    overall = _part(outcomes, np.arange(len(outcomes.labels)), ceiling, tested)
    chance = float(np.bincount(outcomes.labels).max() / len(outcomes.labels))
    informative = _reach(outcomes.bound.correct, outcomes.inflation)[0] > chance
    warnings = [*outcomes.notes]
    if not informative:
        for part in (overall, *by_group.values()):
            _undecide(part, NO_INFORMATION)
        reached = f"reaches {percent(outcomes.bound.accuracy.estimate)}, not above chance ({percent(chance)})"
        warnings.append(f"{NO_INFORMATION}: a classifier fitted to the true distribution {reached}")
    verdict = {
        **overall,
        "ceiling": ceiling,
        "chance": chance,
        "above_chance": informative,
        "group_tested": losing,
        "intervals": "item: for new samples, not for other trainings",
        "groups": {name: by_group.get(name) for name in GROUPS},
        "classes": _classes(outcomes, entries, ceiling, informative),
    }
    return cast(Verdict, verdict), [*warnings, *_caveats(outcomes, overall, ceiling)]


def _part(outcomes: Outcomes, rows: IntArray, ceiling: float, memorised: bool | None) -> Part:
    """Return the gaps and the bottleneck among some of the scored samples."""
    current, bound = (a[rows].astype(np.float64) for a in (outcomes.current, outcomes.bound.correct))
    rebalanced = outcomes.rebalanced.correct[rows]
    inflation = outcomes.inflation
    low, high = _reach(bound, inflation)
    contrast = difference(2 * bound - current, np.full(len(rows), ceiling), inflation)
    bottleneck, reason = decide(contrast, memorised)
    if ceiling - current.mean() < NEGLIGIBLE:
        bottleneck, reason = UNDECIDED, "the current accuracy is within a point of the ceiling: nothing to gain"
    return {
        "bottleneck": bottleneck,
        "reason": reason,
        "scored": len(rows),
        "current": float(current.mean()),
        "classifier_bound": float(bound.mean()),
        "classifier_gap": difference(bound, current, inflation).gap(),
        "rebalancing_gap": difference(rebalanced, current, inflation).gap(),
        "representation_gap": {
            "points": float(ceiling - bound.mean()),
            "ci95": [ceiling - high, ceiling - low],
            "at_most": True,
        },
        "difference": contrast.gap(),
    }


def decide(contrast: Interval, memorised: bool | None) -> tuple[str, str]:
    """Return the bottleneck and why, of the classifier gap minus the representation gap.

    `memorised` says whether the test of `spread_gap` rejects, None where there was none.

    >>> decide(Interval(-0.2, (-0.3, -0.1), None, "item"), True)[0]
    'representation'
    >>> decide(Interval(-0.2, (-0.3, -0.1), None, "item"), None)[1]
    'the representation gap is larger, but its spread gap was not tested'
    """
    if contrast.ci95 is None:
        return UNDECIDED, "too few samples for an interval"
    low, high = contrast.ci95
    if low > 0:
        return "classifier", "the classifier gap is larger than the representation gap"
    if high >= 0:
        return UNDECIDED, "the interval of the gaps' difference includes 0"
    if memorised:
        return "representation", "the representation gap is larger, and unseen samples lie farther out than by chance"
    why = "its spread gap was not tested" if memorised is None else "unseen samples lie no farther out than by chance"
    return UNDECIDED, f"the representation gap is larger, but {why}"


def _classes(outcomes: Outcomes, entries: Sequence[Entry], ceiling: float, informative: bool) -> list[Part]:
    order = np.argsort(outcomes.labels, kind="stable")
    ends = np.cumsum(np.bincount(outcomes.labels, minlength=len(entries)))[:-1]
    found: list[Part] = []
    for entry, rows in zip(entries, np.split(order, ends), strict=True):
        if not len(rows):
            found.append({"index": entry["index"], "bottleneck": UNDECIDED, "reason": "no scored samples", "scored": 0})
            continue
        part = _part(outcomes, rows, ceiling, entry["spread_gap_flagged"])
        if not informative:
            _undecide(part, NO_INFORMATION)
        elif entry["train_count"] < VERDICT_SAMPLES:
            _undecide(part, f"fewer than {VERDICT_SAMPLES} training samples: see the group")
        elif len(rows) < FEW_UNSEEN:
            _undecide(part, f"fewer than {FEW_UNSEEN} scored samples: see the group")
        found.append({"index": entry["index"], **part})
    return found


def _undecide(part: Part, reason: str) -> None:
    part["bottleneck"], part["reason"] = UNDECIDED, reason


def withhold(verdict: Verdict, reasons: Sequence[str]) -> list[Advice]:
    """Take the verdict back, in place: overall, of groups and of classes; return the advice to mend the files."""
    for part in (verdict, *filter(None, verdict["groups"].values()), *verdict["classes"]):
        _undecide(part, reasons[0])
    verdict["withheld"] = list(reasons)
    return [_piece("evidence", "No remedy can be advised before the files belong together: see the first warning.")]


def _caveats(outcomes: Outcomes, verdict: Part, ceiling: float) -> list[str]:
    """Return what limits the verdict: above all that the bound would rise with more unseen samples."""
    found = []
    if few := [note for note in outcomes.bound.notes if "few" in note or "single" in note]:
        found.append(f"the bound may be too low, the representation gap too large: {'; '.join(few)}")
    items: FloatArray | None = outcomes.bound.extrapolated_items
    if items is not None and verdict["bottleneck"] == "representation":
        contrast = difference(2 * items - outcomes.current, np.full(len(items), ceiling), outcomes.inflation)
        if contrast.ci95 is None or contrast.ci95[1] >= 0:
            bound = "the bound extrapolated to many unseen samples (a line in 1/m)"
            found.append(f"with {bound} the verdict would be undecided")
    return found


def _flag(entry: Entry | None) -> bool | None:
    flagged = None if entry is None else entry["spread_gap_flagged"]
    return None if flagged is None else bool(flagged)


def _reach(correct: FloatArray | BoolArray, inflation: float) -> tuple[float, float]:
    """Return the interval of the bound's accuracy: Wilson's, widened about the estimate, within [0, 1]."""
    low, high = proportion(correct[None]).widened(inflation).ci95 or (0.0, 1.0)
    return max(0.0, low), min(1.0, high)


def advise(accuracy: dict[str, Any], verdict: Verdict, entries: Sequence[Entry], pairs: Sequence[Pair]) -> list[Advice]:
    """Return pieces of advice, the one for the bottleneck first."""
    if not verdict["above_chance"]:
        check = "check that features and labels belong together, and that the encoder was in evaluation mode."
        return [_piece("evidence", f"No remedy can be advised: {check}")]
    found = [*_classifier(accuracy, verdict, entries), *_representation(verdict, entries)]
    if verdict["bottleneck"] == "representation":
        found.sort(key=lambda piece: piece["about"] != "representation")
    if verdict["bottleneck"] != "classifier":  # else the classifier confuses more than the features do
        found += _pairs(pairs)
    return [*found, *_evidence(verdict)]


def _classifier(accuracy: dict[str, Any], verdict: Verdict, entries: Sequence[Entry]) -> list[Advice]:
    remedy: str | None = accuracy["rebalanced"]["classifier"]
    gain, reach = verdict["rebalancing_gap"], verdict["classifier_gap"]
    classes: list[str] = []
    if _above_zero(gain):
        classes = _gaining(accuracy, entries)
        most = f", most for {_names(classes)}" if classes else ""
        text = f"Re-balance the classifier: {remedy} gains {_points(gain)} on these features{most}."
        if accuracy["classifier_bound"]["classifier"] != remedy:
            text += f" A classifier fitted to the true distribution would gain {_points(reach)}."
        return [_piece("classifier", text, remedy, classes, gain)]
    if _above_zero(reach):
        text = (
            f"No re-balancing gains clearly (the best, {remedy}: {_points(gain)}), but a classifier fitted to the true "
            f"distribution gains {_points(reach)}: collect held-out samples of every class and fit one to them."
        )
        return [_piece("classifier", text, "fit on held-out samples", [], reach)]
    neither = f"neither re-balancing ({_points(gain)}) nor a classifier fitted to the true distribution"
    text = f"Leave the classifier: {neither} ({_points(reach)}) gains clearly."
    return [_piece("classifier", text, None, [], reach)]


def _representation(verdict: Verdict, entries: Sequence[Entry]) -> list[Advice]:
    gap = verdict["representation_gap"]
    material = (e for e in entries if e["spread_gap_flagged"] and e["spread_gap_material"])
    flagged = sorted(material, key=lambda e: -e["spread_gap_deg"])
    groups = [name for name, part in verdict["groups"].items() if part and part["bottleneck"] == "representation"]
    classes = [str(e["name"]) for e in flagged]
    if not (classes or groups) or gap["points"] <= 0:
        return []
    where = _names(classes) if classes else f"the {' and '.join(groups)} classes"
    text = (
        f"Improve the representation of {where}: unseen samples lie farther out than training samples do, beyond "
        "chance. More or more varied images, stronger augmentation, or pre-training can gain at most "
        f"{_points(gap)} overall, less whatever error is irreducible."
    )
    return [_piece("representation", text, "more or more varied images", classes, gap)]


def _pairs(pairs: Sequence[Pair]) -> list[Advice]:
    shares = [max(pair["first_as_second"] or 0, pair["second_as_first"] or 0) for pair in pairs]
    share = max(shares, default=0)
    if share < CONFUSED:
        return []
    pair = pairs[shares.index(share)]
    text = (
        f"Look at images of “{pair['first']}” and “{pair['second']}”: their centres are {number(pair['angle_deg'])}° "
        f"apart and up to {percent(share, 0)} of one are taken for the other. If labels are sound, a finer input or an "
        "auxiliary loss between such pairs may help."
    )
    return [_piece("pairs", text, None, [pair["first"], pair["second"]])]


def _evidence(verdict: Verdict) -> list[Advice]:
    """Return how many samples might decide, where the interval includes 0."""
    difference = verdict["difference"]
    if verdict["bottleneck"] != "undecided" or difference["ci95"] is None or not difference["points"]:
        return []
    low, high = difference["ci95"]
    if low > 0 or high < 0:
        return []
    factor = ((high - low) / 2 / difference["points"]) ** 2
    if not 1 < factor <= MOST_SAMPLES:
        return [_piece("evidence", "Both gaps are about as large: expect to need both kinds of remedy.")]
    text = f"About {factor * verdict['scored']:,.0f} scored samples would decide, if the difference stays as it is."
    return [_piece("evidence", text)]


def _gaining(accuracy: dict[str, Any], entries: Sequence[Entry]) -> list[str]:
    """Return the classes whose recall the best remedy raises most."""
    recalls = zip(accuracy["current"]["per_class"], accuracy["rebalanced"]["per_class"], entries, strict=True)
    gains = [(b - a, str(e["name"])) for a, b, e in recalls if a is not None and b is not None and b > a]
    return [name for _, name in sorted(gains, key=lambda pair: -pair[0])[:NAMED]]


def _piece(
    about: str, text: str, remedy: str | None = None, classes: Sequence[str] = (), gain: Gap | None = None
) -> Advice:
    return {
        "about": about,
        "text": text,
        "remedy": remedy,
        "classes": list(classes),
        "gain": None if gain is None else {"points": gain["points"], "ci95": gain["ci95"]},
        "at_most": about != "classifier",
    }


def _above_zero(gap: Gap) -> bool:
    return gap["ci95"] is not None and gap["ci95"][0] > 0


def _points(gap: Gap) -> str:
    return in_points(gap["points"], gap["ci95"], signed=True)


def _names(names: Sequence[str]) -> str:
    return first_few([f"“{name}”" for name in names], NAMED)
