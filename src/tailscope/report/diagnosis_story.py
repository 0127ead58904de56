"""What a diagnosis says, in sentences: the verdict first."""

from collections.abc import Sequence

from tailscope.groups import GROUPS
from tailscope.report import diagnosis_rows
from tailscope.report.results import Result
from tailscope.report.text import listed, percent, plural, points, with_interval


def headline(result: Result) -> str:
    """Return the verdict in one sentence."""
    verdict = result["verdict"]
    if verdict is None:
        return "Measured, without a verdict"
    if verdict["bottleneck"] == "classifier":
        return (
            f"The classifier is the bottleneck: on these features a better one gains {_gap(verdict['classifier_gap'])}"
        )
    if verdict["bottleneck"] == "representation":
        gap = _gap(verdict["representation_gap"])
        return f"The representation is the bottleneck: even the best classifier found misses {gap}"
    reason = verdict["reason"]
    return f"Undecided: {reason.partition(': ')[0] if verdict.get('withheld') else reason}"  # the first caveat has all


def findings(result: Result) -> list[str]:
    """Return what was found: accuracies, gaps, groups, classes, encoders; the first is the lead."""
    found = []
    if result["verdict"] is not None:
        found += [_lead(result), *([] if result["verdict"].get("withheld") else [_gaps(result), *_by_group(result)])]
    return [*found, _memorised(result), *_encoders(result)]


def caveats(result: Result) -> list[str]:
    """Return what limits the findings."""
    withheld = (result["verdict"] or {}).get("withheld") or []
    found = [f"No verdict: {reason}." for reason in withheld]
    found.append("One encoder as it is: intervals cover new samples, not new trainings.")
    if result["verdict"] is not None:
        ceiling = percent(result["verdict"]["ceiling"], 0)
        found.append(
            f"The representation gap is at most what is given: up to a ceiling of {ceiling} it also holds irreducible "
            "error. The classifier bound is no upper bound: more unseen samples may raise it."
        )
    if not result["spec"]["permutations"]:
        found.append("No permutations: nothing was tested against chance.")
    return found


def accuracy_rows(result: Result) -> list[tuple[str, ...]]:
    """Return the accuracies as lines of text: name, accuracy with interval, head, body, tail."""
    return [
        (
            row["label"],
            with_interval(percent(row["mean"]), None if row["ci_low"] is None else (row["ci_low"], row["ci_high"])),
            *(percent(row[group], 0) for group in GROUPS),
        )
        for row in diagnosis_rows.accuracies(result)
    ]


def _lead(result: Result) -> str:
    cells = {name: _accuracy(result["accuracy"][name]) for name in diagnosis_rows.ACCURACIES}
    remedy, bound = (result["accuracy"][name]["classifier"] for name in ("rebalanced", "classifier_bound"))
    text = f"Now: {cells['current']}. Re-balanced by {remedy}: {cells['rebalanced']}. "
    if bound == remedy:
        return text + "A classifier fitted to the unseen samples reaches less."
    return text + f"A classifier fitted to the true distribution: {cells['classifier_bound']}."


def _gaps(result: Result) -> str:
    verdict = result["verdict"]
    return (
        f"The classifier costs {_gap(verdict['classifier_gap'])}, of which re-balancing regains "
        f"{_gap(verdict['rebalancing_gap'])}; the representation at most {_gap(verdict['representation_gap'])}."
    )


def _by_group(result: Result) -> list[str]:
    parts = {name: part for name, part in result["verdict"]["groups"].items() if part}
    if not parts:
        return []
    texts = [f"{name} {part['bottleneck']} ({percent(part['current'], 0)} correct)" for name, part in parts.items()]
    return [f"Bottleneck by group: {listed(texts)}."]


def _memorised(result: Result) -> str:
    """Return which classes lie farther out than by chance."""
    tested = [entry for entry in result["classes"] if entry["spread_gap_flagged"] is not None]
    if not tested:
        return "No class was tested against chance."
    flagged = [e for e in tested if e["spread_gap_flagged"] and e["spread_gap_material"]]
    count = f"{len(flagged)} of {plural(len(tested), 'tested class')}"
    if not flagged:
        return f"Spread gap: none of {plural(len(tested), 'tested class')} is farther out than chance explains."
    worst = max(flagged, key=lambda entry: entry["spread_gap_deg"])
    return (
        f"Spread gap: in {count} unseen samples lie farther from the centre than chance explains, most in "
        f"“{worst['name']}” ({worst['spread_gap_deg']:.1f}°, {plural(worst['train_count'], 'training sample')})."
    )


def _encoders(result: Result) -> list[str]:
    """Return who localises, separates and compacts the tail better."""
    rows = [row for row in diagnosis_rows.comparisons(result) if row["of"] == "tail" and row["better"]]
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["better"], []).append(row["aspect"])
    return [f"In the tail, {encoder} is better: it {_aspects(aspects)}." for encoder, aspects in found.items()]


def _aspects(aspects: Sequence[str]) -> str:
    words = {
        "localises": "localises unseen samples better",
        "separates": "separates classes more",
        "compacts": "keeps classes more compact",
        "margin": "has the larger margin for its spread",
    }
    return listed([words[aspect] for aspect in dict.fromkeys(aspects)])


def _accuracy(cell: Result) -> str:
    return with_interval(percent(cell["mean"]), cell["ci95"])


def _gap(gap: Result) -> str:
    return with_interval(f"{points(gap['points'])} points", gap["ci95"])
