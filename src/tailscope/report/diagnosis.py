"""A stored diagnosis as rows, tables and sentences: what its page and the terminal show."""

from collections.abc import Sequence
from typing import Any, Literal

from tailscope.groups import GROUPS, SHOTS
from tailscope.measures.fields import COLLAPSE, SHOWN
from tailscope.report import drilldown, encoders
from tailscope.report.diagnosis_schema import ACCURACIES, Accuracy, Diagnosis, Judged, Recalls, Verdict
from tailscope.report.rows import CI, GROUP, GROUP_RECALLS, MEASURES, RECALL_MEANS, Row, ends, ranks
from tailscope.report.schema import Points
from tailscope.report.text import Column, Table, accuracy, in_points, number, percent, plural, with_interval

PARTS: tuple[Literal["train"], Literal["unseen"]] = ("train", "unseen")
GAPS = ("classifier_gap", "representation_gap")
STEPS = {
    "current": ("in use", "total"),
    "rebalanced": ("re-balanced", "classifier"),
    "classifier_bound": ("best fitted", "classifier"),
}
BOUND = "classifier bound"
BLAMED = {
    "classifier": "The classifier is the bottleneck",
    "representation": "The representation is the bottleneck",
}
KINDS = {
    "memorised": "The encoder has memorised its training samples.",
    "weak features": "The features are weak: they tell the classes apart too little, in training and held-out samples.",
}
WIDE = 0.04  # of an interval: from there a sentence needs no decimals


# ---- rows


def classes(result: Diagnosis) -> list[Row]:
    """Return one row a class: its geometry, rank, recalls and verdict."""
    names, counts = result["dataset"]["class_names"], result["counts"]
    parts: Sequence[Judged | None] = result["verdict"]["classes"] if result["verdict"] else [None] * len(counts)
    found, scores = [], drilldown.scores(result.get("drilldown"), len(counts))
    for k, (rank, entry, part) in enumerate(zip(ranks(counts), result["classes"], parts, strict=True)):
        recalls = {
            f"recall_{name}": result["accuracy"][name]["per_class"][k] if result["accuracy"] else None
            for name in ACCURACIES
        }
        nearest = entry["nearest_center_true_class"]
        about = {"rank": rank, "count": counts[k], "nearest": None if nearest is None else names[nearest]}
        found.append({**dict.fromkeys(SHOWN), **entry, **about, **recalls, **scores[k], **_judged(part)})
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
        | {"g_mean": cell.get("g_mean"), "h_mean": cell.get("h_mean")}
        | ends("ci", cell["ci95"])
        | cell["groups"]
        | {**dict.fromkeys(SHOTS), **cell.get("shots", {})}
        for name, cell in _cells(result).items()
    ]
    if (bound := _extrapolated(result)) is not None:
        at, mean, ci95 = bound
        what = f"softmax regression, extrapolated to {at:,} samples a class"
        row: Row = {"label": BOUND, "what": what, "mean": mean}
        found.append(row | ends("ci", ci95) | dict.fromkeys((*GROUPS, *SHOTS, "g_mean", "h_mean")))
    return found


def _extrapolated(result: Diagnosis) -> tuple[int, float, Sequence[float] | None] | None:
    """Return at how many samples a class the classifier bound is, with its interval; None where it is not known."""
    cell = _cells(result).get("classifier_bound")
    found = cell and cell.get("extrapolated")
    if not found or "mean" not in found or "bound_at" not in found:
        return None
    return found["bound_at"], found["mean"], found["ci95"]


def steps(result: Diagnosis) -> list[Row]:
    """Return the waterfall from the current accuracy to the ceiling, in per cent: one row a bar."""
    bars: list[tuple[str, str, float, Sequence[float] | None]] = [
        (*STEPS[name], cell["mean"], cell["ci95"]) for name, cell in _cells(result).items()
    ]
    if (bound := _extrapolated(result)) is not None:
        bars.append((BOUND, "classifier", *bound[1:]))
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


OF_SHOTS = {
    "many": "Mean recall of classes with over 100",
    "medium": "Mean recall of classes with 20 to 100",
    "few": "Mean recall of classes with fewer than 20",
}
ACCURACY = (
    Column("label", "classifier"),
    Column("what", "which"),
    Column("mean", "accuracy", "share", "Share of scored samples that are right, with its 95 % interval.", CI),
    *GROUP_RECALLS,
    *(Column(shot, f"{shot} recall", "share", f"{text} training samples.") for shot, text in OF_SHOTS.items()),
    *RECALL_MEANS,
)
COLLAPSED = (
    Column("measure", "measure"),
    Column("train", "training", "plain", "Of training samples."),
    Column("unseen", "unseen", "plain", "Of unseen samples."),
    Column("meaning", "in words"),
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
    Column("recall_current", "recall, in use", "whole", "Recall of the classifier in use."),
    Column("recall_rebalanced", "recall, re-balanced", "whole", "Recall of the best remedy."),
    Column(
        "recall_classifier_bound", "recall, best fitted", "whole", "Recall of the best classifier that could be fitted."
    ),
    Column("bottleneck", "bottleneck", "text", "What costs this class more, where its own samples can tell."),
    _gap_column("classifier_gap", "", "Recall that a classifier fitted to as many samples of every class gains."),
    _gap_column("representation_gap", ", at most", "What even that classifier misses, up to the ceiling."),
)
SCORES = (
    Column("precision", "precision", "whole", "Of the samples that the classifier in use takes for this class: right."),
    Column("f1", "F1", "whole", "Harmonic mean of precision and recall of the classifier in use."),
)
LOCAL = tuple(
    Column.of(name)
    for name in ("spread_gap_deg", "spread_gap_q", "center_shift_excess_deg", "center_shift_q", "escape_rank")
)
NEAREST = (
    Column.of("nearest_center_true_deg"),
    Column("nearest", "which class", "text", "The class whose centre is nearest."),
)
PAIR = (
    Column("first", "class"),
    Column("second", "and"),
    Column("angle_deg", "angle between centres", "degrees", "Centres over training and unseen samples."),
    Column("first_as_second", "first taken for second", "share", "By the classifier in use."),
    Column("second_as_first", "second taken for first", "share", "By the classifier in use."),
)


def tables(result: Diagnosis) -> list[Table]:
    """Return every table, in the order of the page."""
    verdict = VERDICT if result["accuracy"] is not None else ()
    scores = SCORES if result.get("drilldown") else ()
    tested = Column("spread_gap_p", "p of the spread gap", "p", "Test of the whole group.")
    of_groups = [GROUP, Column("classes", "classes", "count"), *COUNTS, *verdict, tested, *LOCAL]
    found, ranked = classes(result), by_rank(result)
    made = [
        Table("diagnosis-groups", "By group of classes", of_groups, groups(result)),
        Table("diagnosis-classes", "Class by class", [*CLASS, *scores, *verdict, *LOCAL, *NEAREST], ranked),
        Table("diagnosis-pairs", "The ten closest pairs of classes", PAIR, result["pairs"]),
        Table("diagnosis-measures", "Every measure of every class", [*CLASS, *MEASURES], found),
    ]
    if (collapsed := result.get("collapse")) is not None:
        rows = [
            {"measure": measure.title, "meaning": measure.meaning} | {part: collapsed[part].get(name) for part in PARTS}
            for name, measure in COLLAPSE.items()
        ]
        made.append(Table("diagnosis-collapse", "How far the features have collapsed", COLLAPSED, rows))
    if result["accuracy"] is not None:
        made.insert(0, Table("diagnosis-accuracy", "The accuracies behind the verdict", ACCURACY, _accuracies(result)))
    return [*made, *drilldown.tables(result), *encoders.tables(result)]


# ---- sentences


def headline(result: Diagnosis) -> str:
    """Return the verdict in one sentence, without a full stop; of several encoders, which is better."""
    stored = result.get("comparison")
    return (stored and encoders.headline(stored)) or verdict_of(result)


def verdict_of(result: Diagnosis) -> str:
    """Return the verdict in one sentence, without a full stop."""
    verdict = result["verdict"]
    if verdict is None:
        return "Measured, without a verdict"
    if verdict.get("withheld"):
        return f"No verdict: {verdict['reason'].partition(': ')[0]}"  # the first caveat has all of it
    if verdict["bottleneck"] not in BLAMED:
        return f"Not decided: {verdict['reason']}"
    opening, current = BLAMED[verdict["bottleneck"]], _cells(result)["current"]["mean"]
    if verdict["classifier_gap"]["points"] <= 0:
        better = f"no linear classifier on these features would do better than the {percent(current)} of the one in use"
        return f"{opening}: {better}"
    which, only = ("a better", "") if verdict["bottleneck"] == "classifier" else ("even the best", " only")
    reach, digits = _reach(result)
    would = f"on these features {which} linear classifier would reach{only} {reach}"
    return f"{opening}: {would}; the one in use reaches {percent(current, digits)}"


def findings(result: Diagnosis) -> list[str]:
    """Return what was found: encoders, what costs how much, groups, classes; the first is the lead."""
    verdict, found = result["verdict"], encoders.findings(result)
    if (stored := result.get("comparison")) is not None:
        found.append(f"“{stored['reference']}” by itself: {verdict_of(result)}.")
    if verdict is not None and (verdict.get("withheld") or not verdict.get("above_chance", True)):
        found.append(_measured(result))
    elif verdict is not None:
        found += [_costs(verdict), *_by_group(verdict)]
    return [*found, _memorised(result)]


def caveats(result: Diagnosis) -> list[str]:
    """Return what limits the findings, first what could overturn them."""
    verdict, found = result["verdict"], []
    if verdict is None:
        found.append("This holds for one encoder as it is: another training of it may differ.")
    elif withheld := verdict.get("withheld"):
        found += [f"No verdict: {reason}." for reason in withheld]
    else:
        found += verdict.get("caveats") or []
    if not result["spec"]["permutations"]:
        found.append("Without permutations nothing was tested against chance.")
    return found


def closing(result: Diagnosis) -> list[str]:
    """Return how the terminal ends: the verdict, what limits it most, and what to do first."""
    limits, advice = caveats(result), result["advice"]
    found = [f"{headline(result)}."]
    found += [f"Keep in mind: {limits[0]}"] if limits else []
    return found + ([f"What to do: {advice[0]['text']}"] if advice else [])


def accuracy_rows(result: Diagnosis) -> list[tuple[str, ...]]:
    """Return the accuracies as lines of text: name, accuracy with interval, head, body, tail."""
    found = [
        (ACCURACIES[name], accuracy(cell["mean"], cell["ci95"]), *(percent(cell["groups"][g], 0) for g in GROUPS))
        for name, cell in _cells(result).items()
    ]
    if (bound := _extrapolated(result)) is not None:
        found.append((BOUND, accuracy(*bound[1:]), *(percent(None) for _ in GROUPS)))
    return found


def _reach(result: Diagnosis) -> tuple[str, int]:
    """Return what a linear classifier would reach, with as many samples of every class as the most frequent one has.

    With it comes the number of decimals that its interval allows.
    """
    found = _extrapolated(result)
    cell = _cells(result)["classifier_bound"]
    mean, ci95 = (cell["mean"], cell["ci95"]) if found is None else found[1:]
    digits = 0 if ci95 is None or ci95[1] - ci95[0] >= WIDE else 1
    text = with_interval(percent(mean, digits), ci95, digits)
    return (f"{text} or more" if found is None else f"about {text}"), digits


def _measured(result: Diagnosis) -> str:
    now, rebalanced, best = (accuracy(cell["mean"], cell["ci95"]) for cell in _cells(result).values())
    fitted = f"the best that could be fitted to the samples there are {best}"
    return f"The classifier in use gets {now} right, re-balanced {rebalanced}, and {fitted}."


def _costs(verdict: Verdict) -> str:
    """Return what each half costs, and what kind of fault a representation has."""
    gain, regained = verdict["classifier_gap"], verdict["rebalancing_gap"]
    text = f"The classifier in use costs {_gap(gain)}" if gain["points"] > 0 else "The classifier in use costs nothing"
    if min(gain["points"], regained["points"]) > 0:
        part = ", of which" if regained["points"] <= gain["points"] else ";"
        text += f"{part} re-balancing regains {_gap(regained)}"
    text += f"; the representation costs at most {_gap(verdict['representation_gap'])}."
    kind = KINDS.get(verdict.get("kind") or "")
    return f"{text} {kind}" if kind else text


def _by_group(verdict: Verdict) -> list[str]:
    """Return a sentence a group: what holds it back, or why that is not decided."""
    found = []
    for name, part in verdict["groups"].items():
        if part is None:
            continue
        text = f"{name.capitalize()} classes ({percent(part['current'], 0)} right): "
        if part["bottleneck"] in BLAMED:
            text += f"the {part['bottleneck']} is the bottleneck"
        else:
            text += f"not decided; {part.get('reason')}"
        gain = part.get("classifier_gap")
        if part["bottleneck"] in BLAMED and gain and gain["ci95"] and gain["ci95"][1] < 0:
            alike = percent(part["current"] + gain["points"], 0)
            text += f". The classifier in use favours them: one that treats all classes alike would get {alike} right"
        found.append(f"{text}.")
    return found


def _memorised(result: Diagnosis) -> str:
    """Return in how many classes held-out samples lie farther from the centre than training samples do."""
    tested = [entry for entry in result["classes"] if entry["spread_gap_flagged"] is not None]
    if not tested:
        return "No class was tested for memorised training samples."
    farther = "held-out samples lie clearly farther from the centre of their class than training samples do"
    flagged = [entry for entry in tested if entry["spread_gap_flagged"] and entry["spread_gap_material"]]
    if not flagged:
        number_tested = plural(len(tested), "tested class")
        return f"No sign of memorised training samples: in none of {number_tested} do {farther.removesuffix(' do')}."
    worst = max(flagged, key=lambda entry: entry.get("spread_gap_deg") or 0.0)
    return (
        f"Memorised training samples: in {len(flagged)} of {plural(len(tested), 'tested class')} {farther}, most in "
        f"“{worst['name']}” (by {number(worst.get('spread_gap_deg'))}°, with "
        f"{plural(worst['train_count'], 'training sample')})."
    )


def _gap(gap: Points) -> str:
    return in_points(gap["points"], gap["ci95"])
