"""The verdict: whether the classifier or the representation costs more, overall, by group and by class.

With A(current), A(rebalanced) and A(bound) the accuracies on the same samples, the classifier gap is A(bound) -
A(current), the rebalancing gap A(rebalanced) - A(current), and the representation gap ceiling - A(bound). The last is
"at most", because it also holds irreducible error and what a classifier fitted to more samples would regain. Intervals
are 95 % intervals over samples, for this encoder and this classifier; they do not cover other trainings.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailscope.attribution import summarize
from tailscope.bounds import difference
from tailscope.diagnosis.outcomes import BoolArray, Outcomes
from tailscope.geometry.calibration import VERDICT_SAMPLES
from tailscope.geometry.fields import Entry
from tailscope.geometry.notes import FEW_UNSEEN
from tailscope.groups import GROUPS
from tailscope.intervals import FloatArray, Interval, as_list, proportion
from tailscope.report.text import percent

IntArray = np.ndarray[Any, np.dtype[np.int64]]
UNDECIDED = "undecided"
NEGLIGIBLE = 0.01
NO_INFORMATION = "these features carry no class information"


def accuracies(outcomes: Outcomes, groups: Sequence[str | None]) -> dict[str, Any]:
    """Return `accuracy` of a diagnosis: current, rebalanced and classifier_bound, each a cell as in `swap.json`."""
    selection, bound = outcomes.rebalanced, outcomes.bound
    cells = {
        name: summarize(correct[None], outcomes.labels, groups)
        for name, correct in (
            ("current", outcomes.current),
            ("rebalanced", selection.correct),
            ("classifier_bound", bound.correct),
        )
    }
    cells["current"]["classifier"] = outcomes.current_name
    cells["rebalanced"] |= {
        "classifier": selection.best,
        "chosen": list(selection.chosen),
        "remedies": outcomes.remedies,
    }
    cells["classifier_bound"] |= {
        "classifier": bound.remedy or "softmax regression on unseen samples",
        "ci95": list(_reach(bound.correct, outcomes.inflation)),
        "extrapolated": None if bound.extrapolated is None else _gap(bound.extrapolated),
        "notes": list(bound.notes),
    }
    return cells


def judge(
    outcomes: Outcomes,
    entries: Sequence[Entry],
    pooled: dict[str, Entry | None],
    ceiling: float,
) -> tuple[dict[str, Any], list[str]]:
    """Return `verdict` of a diagnosis, and warnings.

    `bottleneck` is "classifier" where the paired interval of classifier gap minus representation gap lies above 0;
    "representation" where it lies below 0 and the permutation test of `spread_gap` rejects: of the group that loses
    most for all samples, of the group or class itself for its own; else "undecided". Features on which the bound is not
    above chance decide nothing. Neither does a current accuracy within a point of the ceiling, and classes with fewer
    than 5 training or 30 scored samples have no verdict of their own.

    Args:
        outcomes: who gets which sample right.
        entries: geometry of the [C] classes.
        pooled: geometry of the groups.
        ceiling: the accuracy that would be perfect, in (0, 1].
    """
    group_of = np.array([GROUPS.index(e["group"]) if e["group"] in GROUPS else -1 for e in entries])[outcomes.labels]
    found = {name: np.flatnonzero(group_of == i) for i, name in enumerate(GROUPS)}
    by_group = {
        name: _part(outcomes, rows, ceiling, _flag(pooled.get(name))) for name, rows in found.items() if len(rows)
    }
    losing = min(by_group, key=lambda name: outcomes.current[found[name]].mean()) if by_group else None
    tested = _flag(pooled.get(losing)) if losing else _any_flag(entries)
    every = np.arange(len(outcomes.labels))
    verdict = _part(outcomes, every, ceiling, tested)
    chance = float(np.bincount(outcomes.labels).max() / len(outcomes.labels))
    informative = _reach(outcomes.bound.correct, outcomes.inflation)[0] > chance
    warnings = [*outcomes.notes]
    if not informative:
        for part in (verdict, *by_group.values()):
            part |= {"bottleneck": UNDECIDED, "reason": NO_INFORMATION}
        reached = f"reaches {percent(outcomes.bound.accuracy.estimate)}, not above chance ({percent(chance)})"
        warnings.append(f"{NO_INFORMATION}: a classifier fitted to the true distribution {reached}")
    warnings += _caveats(outcomes, verdict, ceiling)
    verdict |= {
        "ceiling": ceiling,
        "chance": chance,
        "above_chance": informative,
        "group_tested": losing,
        "intervals": "item: for new samples, not for other trainings",
        "groups": {name: by_group.get(name) for name in GROUPS},
        "classes": _classes(outcomes, entries, ceiling, informative),
    }
    return verdict, warnings


def _part(outcomes: Outcomes, rows: IntArray, ceiling: float, memorised: bool | None) -> dict[str, Any]:
    """Return the gaps and the bottleneck among some of the scored samples."""
    current, bound = (a[rows].astype(np.float64) for a in (outcomes.current, outcomes.bound.correct))
    rebalanced = outcomes.rebalanced.correct[rows]
    low, high = _reach(bound, outcomes.inflation)
    inflation = outcomes.inflation
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
        "classifier_gap": _gap(difference(bound, current, inflation)),
        "rebalancing_gap": _gap(difference(rebalanced, current, inflation)),
        "representation_gap": {
            "points": float(ceiling - bound.mean()),
            "ci95": [ceiling - high, ceiling - low],
            "at_most": True,
        },
        "difference": _gap(contrast),
    }


def decide(contrast: Interval, memorised: bool | None) -> tuple[str, str]:
    """Return the bottleneck and why.

    Args:
        contrast: classifier gap minus representation gap.
        memorised: whether the test of `spread_gap` rejects; None where there was none.

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


def _classes(outcomes: Outcomes, entries: Sequence[Entry], ceiling: float, informative: bool) -> list[dict[str, Any]]:
    order = np.argsort(outcomes.labels, kind="stable")
    ends = np.cumsum(np.bincount(outcomes.labels, minlength=len(entries)))[:-1]
    found = []
    for entry, rows in zip(entries, np.split(order, ends), strict=True):
        if not len(rows):
            found.append({"index": entry["index"], "bottleneck": UNDECIDED, "reason": "no scored samples", "scored": 0})
            continue
        part = _part(outcomes, rows, ceiling, entry["spread_gap_flagged"])
        if not informative:
            part |= {"bottleneck": UNDECIDED, "reason": NO_INFORMATION}
        elif entry["train_count"] < VERDICT_SAMPLES:
            part |= {
                "bottleneck": UNDECIDED,
                "reason": f"fewer than {VERDICT_SAMPLES} training samples: see the group",
            }
        elif len(rows) < FEW_UNSEEN:
            part |= {"bottleneck": UNDECIDED, "reason": f"fewer than {FEW_UNSEEN} scored samples: see the group"}
        found.append({"index": entry["index"], **part})
    return found


def _caveats(outcomes: Outcomes, verdict: dict[str, Any], ceiling: float) -> list[str]:
    """Return what limits the verdict: above all that the bound would rise with more unseen samples."""
    found = []
    few = [note for note in outcomes.bound.notes if "few" in note or "single" in note]
    if few:
        found.append(f"the bound may be too low, the representation gap too large: {'; '.join(few)}")
    items: FloatArray | None = outcomes.bound.extrapolated_items
    if items is not None and verdict["bottleneck"] == "representation":
        contrast = difference(2 * items - outcomes.current, np.full(len(items), ceiling), outcomes.inflation)
        if contrast.ci95 is None or contrast.ci95[1] >= 0:
            found.append(
                "with the bound extrapolated to many unseen samples (a line in 1/m) the verdict would be undecided"
            )
    return found


def _flag(entry: Entry | None) -> bool | None:
    flagged = None if entry is None else entry["spread_gap_flagged"]
    return None if flagged is None else bool(flagged)


def _any_flag(entries: Sequence[Entry]) -> bool | None:
    """Return whether any class rejects, where there are too few classes for groups."""
    flags = [entry["spread_gap_flagged"] for entry in entries if entry["spread_gap_flagged"] is not None]
    return any(flags) if flags else None


def _gap(interval: Interval) -> dict[str, Any]:
    return {"points": interval.estimate, "ci95": as_list(interval.ci95)}


def _reach(correct: FloatArray | BoolArray, inflation: float) -> tuple[float, float]:
    """Return the interval of the bound's accuracy: Wilson's, widened about the estimate, within [0, 1]."""
    low, high = proportion(correct[None]).widened(inflation).ci95 or (0.0, 1.0)
    return max(0.0, low), min(1.0, high)
