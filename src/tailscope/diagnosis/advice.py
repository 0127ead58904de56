"""What to try, for which classes, and what it can gain at most: each piece tied to a number of the diagnosis."""

from collections.abc import Sequence
from typing import Any

from tailscope.geometry.fields import Entry
from tailscope.report.text import in_points, number, percent

NAMED = 5
MOST_SAMPLES = 50  # times as many unseen samples: beyond, the difference is too small to care about
CONFUSED = 0.1

Advice = dict[str, Any]


def advise(
    accuracy: dict[str, Any],
    verdict: dict[str, Any],
    entries: Sequence[Entry],
    pairs: Sequence[dict[str, Any]],
) -> list[Advice]:
    """Return pieces of advice, the one for the bottleneck first.

    Each has `about` ("classifier", "representation", "pairs" or "evidence"), `text`, `remedy`, `classes` (names), and
    `gain` (`points`, `ci95`) with `at_most`: whether the gain is an upper limit rather than what was measured.
    """
    if not verdict["above_chance"]:
        return [
            _piece(
                "evidence",
                "No remedy can be advised: check that features and labels belong together, and that the encoder was "
                "in evaluation mode.",
            )
        ]
    found = [*_classifier(accuracy, verdict, entries), *_representation(verdict, entries)]
    if verdict["bottleneck"] == "representation":
        found.sort(key=lambda piece: piece["about"] != "representation")
    if verdict["bottleneck"] != "classifier":  # else the classifier confuses more than the features do
        found += _pairs(pairs)
    return [*found, *_evidence(verdict)]


def _classifier(accuracy: dict[str, Any], verdict: dict[str, Any], entries: Sequence[Entry]) -> list[Advice]:
    remedy = accuracy["rebalanced"]["classifier"]
    gain, reach = verdict["rebalancing_gap"], verdict["classifier_gap"]
    if _above_zero(gain):
        classes = _gaining(accuracy, entries)
        most = f", most for {_names(classes)}" if classes else ""
        text = f"Re-balance the classifier: {remedy} gains {_points(gain)} on these features{most}."
        if accuracy["classifier_bound"]["classifier"] != remedy:
            text += f" A classifier fitted to the true distribution would gain {_points(reach)}."
        return [_piece("classifier", text, remedy, classes, gain, at_most=False)]
    if _above_zero(reach):
        text = (
            f"No re-balancing gains clearly (the best, {remedy}: {_points(gain)}), but a classifier fitted to the true "
            f"distribution gains {_points(reach)}: collect held-out samples of every class and fit one to them."
        )
        return [_piece("classifier", text, "fit on held-out samples", [], reach, at_most=False)]
    text = (
        f"Leave the classifier: neither re-balancing ({_points(gain)}) nor a classifier fitted to the true "
        f"distribution ({_points(reach)}) gains clearly."
    )
    return [_piece("classifier", text, None, [], reach, at_most=False)]


def _representation(verdict: dict[str, Any], entries: Sequence[Entry]) -> list[Advice]:
    gap = verdict["representation_gap"]
    flagged = [e for e in entries if e["spread_gap_flagged"] and e["spread_gap_material"]]
    flagged.sort(key=lambda e: -e["spread_gap_deg"])
    groups = [name for name, part in verdict["groups"].items() if part and part["bottleneck"] == "representation"]
    classes = [str(e["name"]) for e in flagged]
    if (not classes and not groups) or gap["points"] <= 0:
        return []
    where = _names(classes) if classes else f"the {' and '.join(groups)} classes"
    text = (
        f"Improve the representation of {where}: unseen samples lie farther out than training samples do, beyond "
        "chance. More or more varied images, stronger augmentation, or pre-training can gain at most "
        f"{_points(gap)} overall, less whatever error is irreducible."
    )
    return [_piece("representation", text, "more or more varied images", classes, gap, at_most=True)]


def _pairs(pairs: Sequence[dict[str, Any]]) -> list[Advice]:
    confused = [p for p in pairs if max(p["first_as_second"] or 0, p["second_as_first"] or 0) >= CONFUSED]
    if not confused:
        return []
    pair = max(confused, key=lambda p: max(p["first_as_second"] or 0, p["second_as_first"] or 0))
    share = max(pair["first_as_second"] or 0, pair["second_as_first"] or 0)
    text = (
        f"Look at images of “{pair['first']}” and “{pair['second']}”: their centres are {number(pair['angle_deg'])}° "
        f"apart and up to {percent(share, 0)} of one are taken for the other. If labels are sound, a finer input or an "
        "auxiliary loss between such pairs may help."
    )
    return [_piece("pairs", text, None, [pair["first"], pair["second"]])]


def _evidence(verdict: dict[str, Any]) -> list[Advice]:
    """Return how many samples might decide, where the interval includes 0."""
    difference = verdict["difference"]
    if verdict["bottleneck"] != "undecided" or difference["ci95"] is None or not difference["points"]:
        return []
    low, high = difference["ci95"]
    if not low <= 0 <= high:
        return []
    factor = ((high - low) / 2 / difference["points"]) ** 2
    if not 1 < factor <= MOST_SAMPLES:
        return [_piece("evidence", "Both gaps are about as large: expect to need both kinds of remedy.")]
    text = f"About {factor * verdict['scored']:,.0f} scored samples would decide, if the difference stays as it is."
    return [_piece("evidence", text)]


def _gaining(accuracy: dict[str, Any], entries: Sequence[Entry]) -> list[str]:
    """Return the classes whose recall the best remedy raises most."""
    before, after = accuracy["current"]["per_class"], accuracy["rebalanced"]["per_class"]
    gains = [
        (b - a, str(e["name"]))
        for a, b, e in zip(before, after, entries, strict=True)
        if a is not None and b is not None and b > a
    ]
    return [name for _, name in sorted(gains, key=lambda pair: -pair[0])[:NAMED]]


def _piece(
    about: str,
    text: str,
    remedy: str | None = None,
    classes: Sequence[str] = (),
    gain: dict[str, Any] | None = None,
    *,
    at_most: bool = True,
) -> Advice:
    return {
        "about": about,
        "text": text,
        "remedy": remedy,
        "classes": list(classes),
        "gain": None if gain is None else {"points": gain["points"], "ci95": gain["ci95"]},
        "at_most": at_most,
    }


def _above_zero(gap: dict[str, Any]) -> bool:
    return gap["ci95"] is not None and gap["ci95"][0] > 0


def _points(gap: dict[str, Any]) -> str:
    return in_points(gap["points"], gap["ci95"], signed=True)


def _names(names: Sequence[str]) -> str:
    quoted = [f"“{name}”" for name in names[:NAMED]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(quoted) + more
