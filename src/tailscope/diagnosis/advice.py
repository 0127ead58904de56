"""Advice: what to try for the bottleneck that a verdict names, for which classes, and what it can gain.

Each piece is tied to a number of the verdict; the one for what dominates comes first. Where the verdict is
undecided the best remedy and what it was seen to gain come first, and the last piece says what would decide.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from tailscope.diagnosis.compare import Pair
from tailscope.diagnosis.remedies import POOLED
from tailscope.diagnosis.verdict import UNDECIDED, Verdict, samples_needed, undecide
from tailscope.errors import first_few
from tailscope.intervals import Gap, Interval
from tailscope.measures.fields import Entry
from tailscope.report.text import in_points, number, percent

NAMED = 5
CONFUSED = 0.1
IN_WORDS = {
    "logit_adjustment": "raise the outputs of rare classes by how rare they are",
    "tau_norm": "even out the lengths of its classes' weight vectors",
    "ncm": "name the class whose mean training feature is nearest",
    "lws": "scale the outputs of each class by a trained factor",
    "disalign": "adjust its outputs by a trained calibration",
    "discriminants": "take linear discriminants with every class weighing the same",
    "crt": "train it anew with every class weighing the same",
    "logit_adjusted_loss": "train it anew with a loss that allows for how rare a class is",
    "label_aware_smoothing": "train it anew with every class weighing the same and labels of frequent ones smoothed",
}
COMPARE = "tailscope diagnose --train this.npz --train other.npz --unseen this-unseen.npz --unseen other-unseen.npz"
CEILING = (
    " So might a ceiling below 100 %, where labels allow no more (--ceiling 0.9), or the bound of a better encoder of "
    "the same images (--ceiling-from with its diagnosis.json)."
)


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


def withhold(verdict: Verdict, reasons: Sequence[str]) -> list[Advice]:
    """Take the verdict back, in place: overall, of groups and of classes; return the advice to mend the files."""
    for part in (verdict, *filter(None, verdict["groups"].values()), *verdict["classes"]):
        undecide(part, reasons[0])
    verdict["withheld"] = list(reasons)
    return [_piece("evidence", "No remedy can be advised before the files belong together: see the first warning.")]


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
    return [*found, *_evidence(accuracy, verdict, entries)]


def recommends_another(verdict: Verdict) -> bool:
    """Whether to replace the classifier in use by the best remedy: this clearly gains, and nothing is withheld."""
    return bool(verdict["above_chance"] and not verdict.get("withheld") and _above_zero(verdict["rebalancing_gap"]))


def change_encoder(compared: Mapping[str, Any]) -> list[Advice]:
    """Return the advice to use another encoder than the first, where `compared` found one clearly best."""
    best, first = compared["best"], compared["reference"]
    if best is None or best == first:
        return []
    entry = compared["encoders"][best]
    gain: Gap = {"points": entry["points"], "ci95": entry["ci95"]}
    text = (
        f"Use “{best}” instead of “{first}”: with the best linear classifier on its features, it gains {_points(gain)}."
        " What helps it most is said where it comes first, or alone."
    )
    piece = _piece("representation", text, best, [], gain)
    piece["at_most"] = False
    return [piece]


def _classifier(accuracy: dict[str, Any], verdict: Verdict, entries: Sequence[Entry]) -> list[Advice]:
    remedy: str = accuracy["rebalanced"]["classifier"]
    gain, reach = verdict["rebalancing_gap"], verdict["classifier_gap"]
    if recommends_another(verdict):
        classes = _gaining(accuracy, entries)
        most = f", most for {_names(classes)}" if classes else ""
        text = f"Replace the classifier on these features: {_in_words(remedy)}. That gains {_points(gain)}{most}."
        text += _calibrated(accuracy)
        if accuracy["classifier_bound"]["extrapolated"]:
            text += f" {_ideal(accuracy)} would gain {_points(reach)}."
        return [_piece("classifier", text, remedy, classes, gain)]
    if _above_zero(reach):
        text = (
            f"Collect samples of every class and fit a classifier to them. {_ideal(accuracy)} would gain "
            f"{_points(reach)}; without them nothing gains clearly (best: {_in_words(remedy)}: {_points(gain)})."
        )
        return [_piece("classifier", text, "fit on held-out samples", [], reach)]
    text = (
        f"Leave the classifier as it is: neither the best replacement ({remedy}: {_points(gain)}) nor one fitted to "
        f"the true distribution ({_points(reach)}) gains clearly."
    )
    return [_piece("classifier", text, None, [], reach)]


def _in_words(remedy: str) -> str:
    """Return what a remedy does, and its name.

    >>> _in_words("crt(l2=0.1) on training and unseen samples")
    'train it anew with every class weighing the same, on training and unseen samples together (crt(l2=0.1))'
    """
    pooled = remedy.endswith(POOLED)
    call = remedy.removesuffix(POOLED)
    where = f",{POOLED} together" if pooled else ""
    return f"{IN_WORDS.get(call.partition('(')[0], 'use another')}{where} ({call})"


def _calibrated(accuracy: dict[str, Any]) -> str:
    """Return a sentence on how much truer the remedy's confidence is, where it clearly is."""
    before, after = accuracy["calibration"]["current"], accuracy["calibration"]["rebalanced"]
    if before["ci95"] is None or after["ci95"] is None or before["ci95"][0] <= after["ci95"][1]:
        return ""
    now, then = in_points(before["mean"], before["ci95"]), in_points(after["mean"], after["ci95"])
    return f" Its confidence is then off by {then} on average, instead of {now} (expected calibration error)."


def _ideal(accuracy: dict[str, Any]) -> str:
    found = accuracy["classifier_bound"]["extrapolated"]
    samples = f"{found['bound_at']:,} samples of every class" if found else "the true distribution"
    return f"A classifier fitted to {samples}"


def _representation(verdict: Verdict, entries: Sequence[Entry]) -> list[Advice]:
    gap = verdict["representation_gap"]
    material = (e for e in entries if e["spread_gap_flagged"] and e["spread_gap_material"])
    flagged = sorted(material, key=lambda e: -e["spread_gap_deg"])
    groups = [name for name, part in verdict["groups"].items() if part and part["kind"] == "memorised"]
    classes = [str(e["name"]) for e in flagged]
    if gap["points"] <= 0 or not (classes or groups or verdict["bottleneck"] == "representation"):
        return []
    most = f"can gain at most {_points(gap)} overall; errors that no features avoid are part of that."
    if verdict["bottleneck"] == "representation" and verdict["kind"] != "memorised":
        text = (
            f"Use better features: another or a fine-tuned encoder, or larger images. They {most} To see what another "
            f"encoder gains, extract features of the same images with it and compare: {COMPARE}"
        )
        return [_piece("representation", text, "another or a fine-tuned encoder", [], gap)]
    groups = groups or [verdict["group_tested"] or "rarest"]
    where = _names(classes) if classes else f"the {' and '.join(groups)} classes"
    text = (
        f"Improve the representation of {where}: the encoder has memorised their training samples, and new samples of "
        "these classes get features that are farther from the centre of their class. More or more varied images, "
        f"stronger augmentation or regularisation, or pre-training {most}"
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


def _evidence(accuracy: dict[str, Any], verdict: Verdict, entries: Sequence[Entry]) -> list[Advice]:
    """Return what might decide, where the interval includes 0."""
    difference, bound = verdict["difference"], accuracy["classifier_bound"]
    if verdict["bottleneck"] != UNDECIDED or difference["ci95"] is None or not difference["points"]:
        return []
    low, high = difference["ci95"]
    if low > 0 or high < 0:
        return []
    factor = samples_needed(Interval(difference["points"], (low, high), None, "item"))
    if bound["extrapolated"] is None:
        text = f"More unseen samples of every class would decide which costs more, because {bound['reason']}."
    elif factor is not None:
        now = float(np.median([entry["unseen_count"] for entry in entries if entry["unseen_count"]]))
        tested = ", and as many times the test samples," if len(accuracy["rebalanced"]["chosen"]) == 1 else ""
        needed = f"{float(f'{factor * now:.2g}'):,.0f} unseen samples a class instead of {number(now, 0)}{tested}"
        text = f"About {needed} would decide which costs more, if the difference stays as it is."
    else:
        text = "Classifier and representation cost about as much: expect to need a remedy for each."
    return [_piece("evidence", text + (CEILING if verdict["ceiling"] == 1 else ""))]


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
