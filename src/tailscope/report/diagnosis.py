"""A stored diagnosis as rows, tables and sentences: what its page and the terminal show."""

from collections.abc import Sequence
from typing import Any

from tailscope.groups import GROUPS
from tailscope.measures.fields import SHOWN
from tailscope.report.rows import CI, GROUP, GROUP_RECALLS, MEASURES, Row, ends, ranks
from tailscope.report.schema import ACCURACIES, Accuracy, Diagnosis, Judged, Points, Recalls, Verdict
from tailscope.report.text import Column, Table, accuracy, in_points, listed, number, percent, plural

ASPECTS = {
    "localises": "localises unseen samples better",
    "separates": "separates classes more",
    "compacts": "keeps classes more compact",
    "margin": "has the larger margin for its spread",
}
GAPS = ("classifier_gap", "representation_gap")
STEPS = {
    "current": ("current", "total"),
    "rebalanced": ("re-balancing", "classifier"),
    "classifier_bound": ("what held-out samples attain", "classifier"),
}
KINDS = {
    "memorised": ", which has memorised its training samples",
    "weak features": ", whose features are too weak",
}


# ---- rows


def classes(result: Diagnosis) -> list[Row]:
    """Return one row a class: its geometry, rank, recalls and verdict."""
    names, counts = result["dataset"]["class_names"], result["counts"]
    parts: Sequence[Judged | None] = result["verdict"]["classes"] if result["verdict"] else [None] * len(counts)
    found = []
    for k, (rank, entry, part) in enumerate(zip(ranks(counts), result["classes"], parts, strict=True)):
        recalls = {
            f"recall_{name}": result["accuracy"][name]["per_class"][k] if result["accuracy"] else None
            for name in ACCURACIES
        }
        nearest = entry["nearest_center_true_class"]
        about = {"rank": rank, "count": counts[k], "nearest": None if nearest is None else names[nearest]}
        found.append({**dict.fromkeys(SHOWN), **entry, **about, **recalls, **_judged(part)})
    return found


def by_rank(result: Diagnosis) -> list[Row]:
    """Return the rows of the classes, the most frequent first."""
    return sorted(classes(result), key=lambda row: row["rank"])


def groups(result: Diagnosis) -> list[Row]:
    """Return one row a group: its pooled geometry, mean recalls and gaps."""
    judged = result["verdict"]["groups"] if result["verdict"] else {}
    found = []
    for name in GROUPS:
        entry = result["groups"].get(name)
        if entry is None:
            continue
        row: Row = {**dict.fromkeys(SHOWN), **entry, "count": entry["train_count"]}
        if result["accuracy"]:
            row |= {f"recall_{key}": result["accuracy"][key]["groups"][name] for key in ACCURACIES}
        found.append(row | _judged(judged.get(name)))
    return found


def _accuracies(result: Diagnosis) -> list[Row]:
    """Return one row a classifier: what it is, accuracy with its interval, mean recall of each group."""
    found = [
        {"label": ACCURACIES[name], "what": cell["classifier"], "mean": cell["mean"]}
        | ends("ci", cell["ci95"])
        | cell["groups"]
        for name, cell in _cells(result).items()
    ]
    if (bound := _extrapolated(result)) is not None:
        label, mean, ci95 = bound
        row: Row = {"label": label, "what": "softmax regression, extrapolated", "mean": mean}
        found.append(row | ends("ci", ci95) | dict.fromkeys(GROUPS))
    return found


def _extrapolated(result: Diagnosis) -> tuple[str, float, Sequence[float] | None] | None:
    """Return what the classifier bound is extrapolated to, with its name and interval; None where it is not known."""
    cell = _cells(result).get("classifier_bound")
    found = cell and cell.get("extrapolated")
    if not found or "mean" not in found or "bound_at" not in found:
        return None
    return f"bound at {found['bound_at']:,} a class", found["mean"], found["ci95"]


def steps(result: Diagnosis) -> list[Row]:
    """Return the waterfall from the current accuracy to the ceiling, in per cent: one row a bar."""
    bars: list[tuple[str, str, float, Sequence[float] | None]] = [
        (*STEPS[name], cell["mean"], cell["ci95"]) for name, cell in _cells(result).items()
    ]
    if (bound := _extrapolated(result)) is not None:
        bars.append((bound[0], "classifier", *bound[1:]))
    if result["verdict"] is not None:
        bars.append(("representation, at most", "representation", result["verdict"]["ceiling"], None))
    found, start = [], 0.0
    for step, part, reached, ci95 in bars:
        end = 100 * reached
        low, high = (None, None) if ci95 is None else (100 * bound for bound in ci95)
        text = percent(reached) if part == "total" else number(end - start, signed=True)
        row = {"step": step, "part": part, "start": start, "end": end, "low": low, "high": high}
        found.append(row | {"text": text, "short": text, "label_at": max(start, end, high or 0.0)})
        start = end
    return found


def comparisons(result: Diagnosis) -> list[Row]:
    """Return one row an encoder, group and aspect: its difference from the reference, and which is better."""
    if (stored := result.get("comparison")) is None:
        return []
    found: list[Row] = []
    for encoder, entry in stored["encoders"].items():
        names: dict[str | None, str] = {"reference": stored["reference"], "other": encoder}
        for kind, gap in (entry["accuracy"] or {}).items():
            points, ci95 = (gap["points"], gap["ci95"]) if gap else (None, None)
            better = "reference" if ci95 and ci95[1] < 0 else "other" if ci95 and ci95[0] > 0 else None
            about = {"encoder": encoder, "of": "all", "aspect": f"accuracy, {ACCURACIES[kind]} (points)"}
            found.append(about | _difference(points, ci95, 100) | {"better": names.get(better)})
        for group, aspects in entry["groups"].items():
            for aspect, one in aspects.items():
                about = {"encoder": encoder, "of": group, "aspect": aspect}
                found.append(about | _difference(one["difference"], one["ci95"]) | {"better": names.get(one["better"])})
    return found


def _difference(value: float | None, ci95: Sequence[float] | None, scale: float = 1.0) -> Row:
    found = zip(("difference", "low", "high"), (value, *(ci95 or (None, None))), strict=True)
    return {name: None if number is None else scale * number for name, number in found}


def _cells(result: Diagnosis) -> dict[Accuracy, Recalls]:
    """Return the accuracies that the verdict compares, in order; none where nothing was scored."""
    stored = result["accuracy"]
    return {} if stored is None else {name: stored[name] for name in ACCURACIES}


def _judged(part: Judged | None) -> Row:
    """Return the verdict on a class or group, undefined where there is none."""
    found: Row = {"bottleneck": part and part["bottleneck"], "reason": part and part.get("reason")}
    for gap in GAPS:
        points: Any = part and part.get(gap)
        found |= {gap: points and points["points"], **ends(gap, points and points["ci95"])}
    return found


# ---- tables


def _gap_column(field: str, limit: str, meaning: str) -> Column:
    return Column(field, field.replace("_", " ") + limit, "points", meaning, (f"{field}_low", f"{field}_high"))


ACCURACY = (
    Column("label", "classifier"),
    Column("what", "which"),
    Column("mean", "accuracy", "share", "Share of scored samples that are right, with its 95 % interval.", CI),
    *GROUP_RECALLS,
)
COUNTS = (
    Column("count", "training", "count", "Training samples."),
    Column("unseen_count", "unseen", "count", "Unseen samples."),
)
CLASS = (
    Column("name", "class"),
    Column("rank", "rank", "count", "Frequency rank: 1 has the most training samples."),
    GROUP,
    *COUNTS,
)
VERDICT = (
    Column("recall_current", "recall now", "whole", "Recall of the classifier in use."),
    Column("recall_rebalanced", "re-balanced", "whole", "Recall of the best remedy."),
    Column("recall_classifier_bound", "attained", "whole", "Recall of the best classifier of what is there."),
    Column("bottleneck", "bottleneck", "text", "What costs this class more, where its own samples can tell."),
    _gap_column("classifier_gap", "", "Recall that a classifier fitted to as many samples of every class gains."),
    _gap_column("representation_gap", ", at most", "What even that classifier misses, up to the ceiling."),
)
LOCAL = tuple(
    Column.of(name)
    for name in ("spread_gap_deg", "spread_gap_q", "center_shift_excess_deg", "center_shift_q", "escape_rank")
)
NEAREST = (
    Column.of("nearest_center_true_deg", "nearest centre"),
    Column("nearest", "which class", "text", "The class whose centre is nearest."),
)
PAIR = (
    Column("first", "class"),
    Column("second", "and"),
    Column("angle_deg", "angle between centres", "degrees", "Centres over training and unseen samples."),
    Column("first_as_second", "first taken for second", "share", "By the classifier in use."),
    Column("second_as_first", "second taken for first", "share", "By the classifier in use."),
)
COMPARISON = (
    Column("encoder", "encoder"),
    Column("of", "classes"),
    Column("aspect", "aspect"),
    Column("difference", "difference", "plain", "From the first encoder, with its paired 95 % interval."),
    Column("low", "from", "plain"),
    Column("high", "to", "plain"),
    Column("better", "better", "text", "Where the interval excludes 0."),
)


def tables(result: Diagnosis) -> list[Table]:
    """Return every table, in the order of the page."""
    verdict = VERDICT if result["accuracy"] is not None else ()
    tested = Column("spread_gap_p", "p of the spread gap", "p", "Test of the whole group.")
    of_groups = [GROUP, Column("classes", "classes", "count"), *COUNTS, *verdict, tested, *LOCAL]
    found, ranked = classes(result), by_rank(result)
    made = [
        Table("diagnosis-groups", "By group of classes", of_groups, groups(result)),
        Table("diagnosis-classes", "Class by class", [*CLASS, *verdict, *LOCAL, *NEAREST], ranked),
        Table("diagnosis-pairs", "The ten closest pairs of classes", PAIR, result["pairs"]),
        Table("diagnosis-measures", "Every measure of every class", [*CLASS, *MEASURES], found),
    ]
    if result["accuracy"] is not None:
        made.insert(0, Table("diagnosis-accuracy", "The accuracies behind the verdict", ACCURACY, _accuracies(result)))
    if (stored := result.get("comparison")) is not None:
        title = f"Encoders against {stored['reference']}"
        made.append(Table("diagnosis-comparison", title, COMPARISON, comparisons(result)))
    return made


# ---- sentences


def headline(result: Diagnosis) -> str:
    """Return the verdict in one sentence."""
    verdict = result["verdict"]
    if verdict is None:
        return "Measured, without a verdict"
    if verdict["bottleneck"] == "classifier":
        return (
            f"The classifier is the bottleneck: on these features a better one gains {_gap(verdict['classifier_gap'])}"
        )
    if verdict["bottleneck"] == "representation":
        missed = _gap(verdict["representation_gap"])
        kind = KINDS.get(verdict.get("kind") or "", "")
        return f"The representation is the bottleneck{kind}: even the best classifier misses {missed}"
    reason = verdict["reason"]
    return f"Undecided: {reason.partition(': ')[0] if verdict.get('withheld') else reason}"  # the first caveat has all


def findings(result: Diagnosis) -> list[str]:
    """Return what was found: accuracies, gaps, groups, classes, encoders; the first is the lead."""
    verdict, found = result["verdict"], []
    if verdict is not None:
        found += [_lead(result), *([] if verdict.get("withheld") else [_gaps(verdict), *_by_group(verdict)])]
    return [*found, _memorised(result), *_encoders(result)]


def caveats(result: Diagnosis) -> list[str]:
    """Return what limits the findings."""
    verdict = result["verdict"]
    found = [f"No verdict: {reason}." for reason in (verdict and verdict.get("withheld")) or []]
    found.append("One encoder as it is: intervals cover new samples, not new trainings.")
    if verdict is not None:
        found.append(
            f"The representation gap is at most what is given: up to a ceiling of {percent(verdict['ceiling'], 0)} it "
            "also holds irreducible error, and what a classifier that is not linear would find."
        )
    if not result["spec"]["permutations"]:
        found.append("No permutations: nothing was tested against chance.")
    return found


def accuracy_rows(result: Diagnosis) -> list[tuple[str, ...]]:
    """Return the accuracies as lines of text: name, accuracy with interval, head, body, tail."""
    found = [
        (ACCURACIES[name], accuracy(cell["mean"], cell["ci95"]), *(percent(cell["groups"][g], 0) for g in GROUPS))
        for name, cell in _cells(result).items()
    ]
    if (bound := _extrapolated(result)) is not None:
        found.append((bound[0], accuracy(*bound[1:]), *(percent(None) for _ in GROUPS)))
    return found


def _lead(result: Diagnosis) -> str:
    cells = _cells(result)
    now, rebalanced, bound = (accuracy(cell["mean"], cell["ci95"]) for cell in cells.values())
    remedy = cells["rebalanced"]["classifier"]
    text = f"Now: {now}. Re-balanced by {remedy}: {rebalanced}. "
    if cells["classifier_bound"]["classifier"] != remedy:
        text += f"The best classifier of what is there: {bound}. "
    found = _extrapolated(result)
    return text + ("More samples may raise it." if found is None else f"The {found[0]}: {accuracy(*found[1:])}.")


def _gaps(verdict: Verdict) -> str:
    return (
        f"The classifier costs {_gap(verdict['classifier_gap'])}, of which re-balancing regains "
        f"{_gap(verdict['rebalancing_gap'])}; the representation at most {_gap(verdict['representation_gap'])}."
    )


def _by_group(verdict: Verdict) -> list[str]:
    parts = {name: part for name, part in verdict["groups"].items() if part}
    texts = [f"{name} {part['bottleneck']} ({percent(part['current'], 0)} correct)" for name, part in parts.items()]
    return [f"Bottleneck by group: {listed(texts)}."] if texts else []


def _memorised(result: Diagnosis) -> str:
    """Return which classes' unseen samples are farther from the centre than chance explains."""
    tested = [entry for entry in result["classes"] if entry["spread_gap_flagged"] is not None]
    if not tested:
        return "No class was tested against chance."
    flagged = [entry for entry in tested if entry["spread_gap_flagged"] and entry["spread_gap_material"]]
    if not flagged:
        return f"Spread gap: none of {plural(len(tested), 'tested class')} is farther out than chance explains."
    worst = max(flagged, key=lambda entry: entry.get("spread_gap_deg") or 0.0)
    return (
        f"Spread gap: in {len(flagged)} of {plural(len(tested), 'tested class')} unseen samples lie farther from the "
        f"centre than chance explains, most in “{worst['name']}” ({number(worst.get('spread_gap_deg'))}°, "
        f"{plural(worst['train_count'], 'training sample')})."
    )


def _encoders(result: Diagnosis) -> list[str]:
    """Return which encoder localises, separates and compacts the tail better."""
    found: dict[str, list[str]] = {}
    for row in comparisons(result):
        if row["of"] == "tail" and row["better"] and ASPECTS[row["aspect"]] not in found.get(row["better"], []):
            found.setdefault(row["better"], []).append(ASPECTS[row["aspect"]])
    return [f"In the tail, {encoder} is better: it {listed(does)}." for encoder, does in found.items()]


def _gap(gap: Points) -> str:
    return in_points(gap["points"], gap["ci95"])
