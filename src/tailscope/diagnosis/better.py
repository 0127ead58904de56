"""Which of several encoders of the same images is better: differences of accuracies, paired over samples.

An encoder is worth what a linear classifier can get out of its features. That is the classifier bound, where it is
known of both, and what is attained with the samples that are there. The first of these two differences whose interval
excludes 0 decides, unless the other one clearly says the opposite. What the classifiers in use get right, or the best
remedies of them, decides nothing: they can be changed, while the features stay. Neither does geometry.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, TypedDict

import numpy as np

from tailscope.classifiers.base import IntArray
from tailscope.diagnosis.curve_fits import BoolArray
from tailscope.diagnosis.learning_curve import DRAWS
from tailscope.diagnosis.outcomes import Outcomes, difference
from tailscope.diagnosis.verdict import gains_among
from tailscope.errors import first_few
from tailscope.groups import GROUPS
from tailscope.intervals import FloatArray, Gap
from tailscope.measures.fields import FEW_UNSEEN
from tailscope.report.text import in_points, listed, plural
from tailscope.seeds import numpy_stream

Side = Literal["other", "reference"]
NAMED = 5
NOT_MEASURED = "no accuracies were measured, and geometry alone does not say it"
NO_INFORMATION = "the features of neither carry class information"


class Differences(TypedDict):
    """Accuracies of one encoder minus those of the reference, among the `scored` samples that both have.

    `classifier_bound` is `attained` under the name that it had before there were two; `extrapolated` is None where
    `reason` says why. `better` is who is clearly better, `by` which difference decided, None where none did.
    """

    scored: int
    current: Gap
    rebalanced: Gap
    attained: Gap
    classifier_bound: Gap
    extrapolated: Gap | None
    reason: str | None
    better: Side | None
    by: Literal["extrapolated", "attained"] | None


class Which(TypedDict):
    """Who of two encoders is better, by which difference, how much, and the same in words; and all differences.

    `reason` is why nothing may be said, None where it may; `accuracy` is among all shared samples, None where nothing
    was scored, `by_group` among those of each group.
    """

    better: Side | None
    by: str | None
    points: float | None
    ci95: list[float] | None
    text: str
    reason: str | None
    accuracy: Differences | None
    by_group: dict[str, Differences | None]


def which(
    reference: str,
    other: str,
    outcomes: Mapping[str, Outcomes | None],
    withheld: Mapping[str, Sequence[str]],
    groups: Sequence[str | None] = (),
) -> Which:
    """Return which of two encoders is better, by the differences of the other's accuracies from the reference's.

    `outcomes` are None without a verdict, `withheld` has the reasons where one is withheld, `groups` [C] are those of
    the classes; without them nothing is said by group.
    """
    first, second = outcomes[reference], outcomes[other]
    why = _unsaid((first, second), [*withheld[reference], *withheld[other]])
    overall, by_group, every = None, {}, ""
    if first is not None and second is not None:
        _, *rows = np.intersect1d(first.rows, second.rows, return_indices=True)
        group_of = np.array([*groups, None])[first.labels[rows[0]]] if groups else None
        overall = _differences(first, second, *rows, decide=why is None)
        for name in GROUPS if groups else ():
            members = (of[group_of == name] for of in rows)
            by_group[name] = _differences(first, second, *members, decide=why is None)
        every = f"{first.bound.bound_at:,} samples of every class"
    if why is None and (overall is None or overall["scored"] < FEW_UNSEEN):
        why = f"they share only {plural(overall['scored'] if overall else 0, 'scored sample')}"
    if why is not None or overall is None:
        text = f"Which of “{reference}” and “{other}” is better cannot be said: {why}."
    else:
        text = _told(reference, other, overall, every)
    by = overall and overall["by"]
    gap: Any = (overall[by] if overall and by else None) or {"points": None, "ci95": None}
    return {
        "better": overall and overall["better"],
        "by": by,
        "points": gap["points"],
        "ci95": gap["ci95"],
        "text": text,
        "reason": why,
        "accuracy": overall,
        "by_group": by_group,
    }


def _differences(
    reference: Outcomes, other: Outcomes, first: IntArray, second: IntArray, *, decide: bool
) -> Differences | None:
    """Return the differences on these rows of the one, and of the other the rows of the same samples."""
    if not len(first):
        return None

    def paired(right: Callable[[Outcomes], BoolArray], inflation: float = 1.0) -> Gap:
        return difference(right(other)[second], right(reference)[first], inflation).gap()

    factor = max(reference.inflation, other.inflation)
    attained = paired(_attained, factor)
    extrapolated, reason = _extrapolated(reference, other, first, second)
    better, by = _decide(extrapolated, attained) if decide and len(first) >= FEW_UNSEEN else (None, None)
    return {
        "scored": len(first),
        "current": paired(lambda one: one.current),
        "rebalanced": paired(lambda one: one.rebalanced.correct, factor),
        "attained": attained,
        "classifier_bound": attained,
        "extrapolated": extrapolated,
        "reason": reason,
        "better": better,
        "by": by,
    }


def _attained(one: Outcomes) -> BoolArray:
    return one.bound.attained.correct


def _extrapolated(
    reference: Outcomes, other: Outcomes, first: IntArray, second: IntArray
) -> tuple[Gap | None, str | None]:
    """Return the difference of the bounds, or None and why it is not known.

    It is that of what is attained, paired, plus that of what more samples would gain, whose draws are taken to be
    independent: curves that err in the same direction would give a narrower interval.
    """
    before, after = gains_among(reference, first), gains_among(other, second)
    if before is None or after is None:
        unknown = [one.bound.reason for one in (reference, other) if one.bound.extrapolated is None]
        return None, listed(list(dict.fromkeys(unknown)))
    stream = numpy_stream(0, "better")
    gains: FloatArray = after - before[stream.permutation(DRAWS)]
    items = _attained(other)[second].astype(np.float64) - _attained(reference)[first]
    middle, scored = float(items.mean()), len(items)
    points = middle + float(gains.mean())
    if scored < 2:
        return {"points": points, "ci95": None}, None
    # As Agresti and Coull's, with four more samples: not 0 where all are alike.
    error = ((np.square(items - middle).sum() + 1) / (scored + 4) / scored) ** 0.5
    low, high = np.quantile(middle + gains + error * stream.normal(size=DRAWS), (0.025, 0.975))
    return {"points": points, "ci95": [float(low), float(high)]}, None


def _decide(extrapolated: Gap | None, attained: Gap) -> tuple[Side | None, Literal["extrapolated", "attained"] | None]:
    """Return who is better, and which difference says so."""
    bound, reached = side(extrapolated), side(attained)
    if bound and reached and bound != reached:
        return None, None
    if bound:
        return bound, "extrapolated"
    return (reached, "attained") if reached else (None, None)


def side(gap: Gap | None) -> Side | None:
    """Return who has more, where the interval excludes 0.

    >>> side({"points": 0.1, "ci95": [0.05, 0.15]}), side({"points": 0.1, "ci95": [-0.05, 0.25]})
    ('other', None)
    """
    if gap is None or gap["ci95"] is None:
        return None
    low, high = gap["ci95"]
    return "other" if low > 0 else "reference" if high < 0 else None


def _unsaid(outcomes: Sequence[Outcomes | None], reasons: Sequence[str]) -> str | None:
    """Return why nothing can be said of some encoders, given why their verdicts are withheld; None where it can."""
    if any(one is None for one in outcomes):
        return NOT_MEASURED
    if reasons:
        return reasons[0]
    return None if any(one and one.bound.attained.above_chance for one in outcomes) else NO_INFORMATION


def _told(reference: str, other: str, found: Differences, every: str) -> str:
    if found["better"] is None:
        return _undecided(reference, other, found, every)
    best, worse = (other, reference) if found["better"] == "other" else (reference, other)
    return _decided(best, worse, found, every) + _in_use(best, worse, found)


def _decided(best: str, worse: str, found: Differences, every: str) -> str:
    attained, bound = (_towards(found["better"], gap) for gap in (found["attained"], found["extrapolated"]))
    if found["by"] == "extrapolated":
        there = f"{_more(attained)} more" if side(attained) else f"the difference is {_signed(attained)}"
        return (
            f"“{best}” is better than “{worse}”: with {every}, a linear classifier on its features would reach "
            f"{_more(bound)} more; with the samples that are there, {there}."
        )
    open_ = f"not known: {found['reason']}" if bound is None else f"open: {_signed(bound)}"
    return (
        f"With the samples that are there, “{best}” is better than “{worse}”: the best classifier of them reaches "
        f"{_more(attained)} more on its features. With {every} the difference is {open_}."
    )


def _in_use(best: str, worse: str, found: Differences) -> str:
    """Return a sentence where the classifiers in use say the opposite."""
    if side(found["current"]) in (None, found["better"]):
        return ""
    gap = _towards("reference" if found["better"] == "other" else "other", found["current"])
    return f" Its classifier in use reaches {_more(gap)} less than that of “{worse}”: “{best}” needs another one."


def _undecided(reference: str, other: str, found: Differences, every: str) -> str:
    attained, bound, now = found["attained"], found["extrapolated"], found["current"]
    name = {"other": other, "reference": reference}
    if (near := side(attained)) and (far := side(bound)):
        return (
            f"Which encoder is better depends on the number of samples: with those that are there, “{name[near]}” "
            f"reaches {_more(_towards(near, attained))} more; with {every}, “{name[far]}” would reach "
            f"{_more(_towards(far, bound))} more."
        )
    known = "" if bound is None else f", and by {_signed(bound)} with {every}"
    text = (
        f"No clear difference between “{reference}” and “{other}”: what the best classifier reaches on “{other}” "
        f"differs by {_signed(attained)} with the samples that are there{known}."
    )
    if ahead := side(now):
        gap = _more(_towards(ahead, now))
        text += f" The classifier in use on “{name[ahead]}” reaches {gap} more; its features are not clearly better."
    return text


def _towards(better: Side | None, gap: Gap | None) -> Gap | None:
    """Return a difference as that of the better one minus the other."""
    if gap is None or better != "reference":
        return gap
    ends = gap["ci95"]
    return {"points": -gap["points"], "ci95": ends and [-ends[1], -ends[0]]}


def _more(gap: Gap | None) -> str:
    return in_points(gap and gap["points"], gap and gap["ci95"])


def _signed(gap: Gap | None) -> str:
    return in_points(gap and gap["points"], gap and gap["ci95"], signed=True)


class Ranking(TypedDict):
    """Encoders, the best first; `best` is clearly better than every other, `leaders` are clearly worse than none."""

    ranking: list[str]
    leaders: list[str]
    best: str | None
    text: str


def rank(outcomes: Mapping[str, Outcomes | None], withheld: Mapping[str, Sequence[str]]) -> Ranking:
    """Compare every two encoders, and rank them by how many each is better and worse than, then by what is attained.

    The arguments are those of `which`.
    """
    names, lost, won = list(outcomes), dict.fromkeys(outcomes, 0), dict.fromkeys(outcomes, 0)
    text = ""
    for first, second in combinations(names, 2):
        found = which(first, second, outcomes, withheld)
        text = found["text"]
        if found["better"] is not None:
            winner, loser = (second, first) if found["better"] == "other" else (first, second)
            won[winner], lost[loser] = won[winner] + 1, lost[loser] + 1
    reached = {name: one.bound.attained.accuracy.estimate if one else 0.0 for name, one in outcomes.items()}
    ranking = sorted(names, key=lambda name: (lost[name] - won[name], -reached[name]))
    leaders = [name for name in ranking if not lost[name]]
    best = next((name for name in leaders if won[name] == len(names) - 1), None)
    if len(names) > 2:
        why = _unsaid(list(outcomes.values()), [reason for name in names for reason in withheld[name]])
        text = _ranked(ranking, leaders, best, why)
    return {"ranking": ranking, "leaders": leaders, "best": best, "text": text}


def _ranked(ranking: Sequence[str], leaders: Sequence[str], best: str | None, why: str | None) -> str:
    number = len(ranking)
    if why is not None:
        return f"Which of the {number} encoders is best cannot be said: {why}."
    if best is not None:
        return f"“{best}” is the best of {number} encoders: clearly better than {_names(ranking[1:])}."
    rest = [name for name in ranking if name not in leaders]
    if not rest or not leaders:
        return f"None of the {number} encoders is clearly the best."
    first = f"{_names(leaders)} come first, with no clear difference between them"
    if len(leaders) == 1:
        first = f"{_names(leaders)} comes first, but is not clearly better than each of the others"
    verb = "is" if len(rest) == 1 else "are"
    return f"Of {number} encoders, {first}: {_names(rest)} {verb} clearly worse than at least one encoder."


def _names(names: Sequence[str]) -> str:
    quoted = [f"“{name}”" for name in names]
    return listed(quoted) if len(quoted) <= NAMED else first_few(quoted, NAMED)
