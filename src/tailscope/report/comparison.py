"""A comparison of methods in words and tables: who gains, how sure that is, and which of the two gaps it closes."""

from collections.abc import Sequence
from typing import Any

from tailscope.groups import GROUPS
from tailscope.report.rows import CI, GROUP_RECALLS, Row, ends, ranks
from tailscope.report.schema import PARTS, ComparedMethod, Comparison
from tailscope.report.text import (
    Column,
    Table,
    accuracy,
    in_points,
    listed,
    number,
    p_value,
    percent,
    plural,
    points,
    with_interval,
)

LINE = 0.05
"""Of Holm's p-values: below it a difference is called clear."""


def headline(result: Comparison) -> str:
    """Return what was found in a few words."""
    best, baseline = _recommended(result), result["baseline"]
    scope = " in these trainings" if len(result["seeds"]) == 1 else ""
    if best["difference"] is None:
        return f"Nothing does better than {baseline}{scope}"
    gain = f"{points(best['difference']['points'], signed=True)} points over {baseline}"
    if best["difference"]["p_holm"] is None:
        return f"{best['name']} does best, {gain}, without an interval to back it"
    if best["difference"]["p_holm"] > LINE:
        return f"No method clearly beats {baseline}{scope}; {best['name']} is the most accurate, {gain}"
    most = "does best" if best is _best(result) else f"is clearly better than {baseline}"
    return f"{best['name']} {most}{scope}: {gain}"


def findings(result: Comparison) -> list[str]:
    """Return what was found: the best, who else is better or worse, what happens to the gaps, the rarest classes."""
    best, baseline = _best(result), _baseline(result)
    reached = [f"{one['name']} reaches {accuracy(one['mean'], one['ci95'])}" for one in (best, baseline)]
    found = [f"{', '.join(dict.fromkeys(reached))}{_difference(best)}."]
    found += [text for text in (_clear(result, 1), _clear(result, -1)) if text]
    return [*found, *_gap_findings(result), *_tail(result)]


def _difference(method: ComparedMethod) -> str:
    stored = method["difference"]
    if stored is None:
        return ""
    p = "" if stored["p_holm"] is None else f", p {p_value(stored['p_holm']).replace('<', '< ')} after Holm"
    return f": {in_points(stored['points'], stored['ci95'], signed=True)}{p}"


def _clear(result: Comparison, sign: int) -> str:
    """Return which methods are clearly better (1) or worse (-1) than the baseline."""
    names = [
        f"{method['name']} ({points(stored['points'], signed=True)})"
        for method in _sorted(result)[::sign]
        if _is_clear(method, sign) and (stored := method["difference"])
    ]
    return f"Clearly {'better' if sign > 0 else 'worse'} than {result['baseline']}: {listed(names)}." if names else ""


def _gap_findings(result: Comparison) -> list[str]:
    """Return how the baseline's distance from the full data divides, and who closes most of each part."""
    gaps, own = _baseline(result)["gaps"], _baseline(result)["backbone"]
    if gaps is None:
        return []
    lost = [f"{in_points(one['points'], one['ci95'])} to its {part}" for part in PARTS if (one := gaps[part])]
    found = [f"{result['baseline']} loses {listed(lost)}{_against(result)}."]
    for part in PARTS:
        changed = [
            (one["gaps"]["change"][part], one["name"])
            for one in result["methods"]
            if one["gaps"] is not None and one["gaps"]["change"] is not None
            if part == "classifier" or one["backbone"] != own  # the baseline's features are what they are
        ]
        least = min(changed, key=lambda pair: pair[0]["points"], default=None)
        if least is None:
            continue
        if least[0]["points"] >= 0:
            found.append(f"No method closes any of the {part} gap.")
        else:
            sure = least[0]["p_holm"] is not None and least[0]["p_holm"] <= LINE
            by = in_points(least[0]["points"], least[0]["ci95"], signed=True)
            found.append(
                f"{least[1]} lowers the {part} gap the most: {by}{'' if sure else ', which is not clear after Holm'}."
            )
    return found


def _against(result: Comparison) -> str:
    if result["reference"] is None:
        return ", against a classifier trained on the full set"
    return f", against true → true, {percent(result['reference']['mean'])}"


def _tail(result: Comparison) -> list[str]:
    known = [method for method in result["methods"] if method["groups"].get("tail") is not None]
    if not known:
        return []
    best = max(known, key=lambda method: method["groups"]["tail"] or 0.0)
    own = _baseline(result)["groups"].get("tail")
    if best["name"] == result["baseline"]:
        return [f"No method recognises more of the tail classes' images than {best['name']}, {percent(own)}."]
    head = [percent(method["groups"].get("head")) for method in (best, _baseline(result))]
    few = " (few-shot classes)" if result["groups_rule"] == "counts" else ""  # a third of the classes may have many
    return [
        f"In the tail{few}, {best['name']} reaches {percent(best['groups']['tail'])} instead of"
        f" {percent(own)}; in the head, {head[0]} instead of {head[1]}."
    ]


def caveats(result: Comparison) -> list[str]:
    """Return what limits the findings."""
    found = []
    if len(result["seeds"]) == 1:
        found.append("One seed: these trainings only. Intervals cover new test images, not new trainings.")
    if len(result["seeds"]) == 2:
        found.append("Two seeds: points only, no intervals and no tests. Three or more give them.")
    if not result["recipe"]["converged"]:
        found.append(
            f"Not converged: the recipe “{result['recipe']['name']}” is shortened, which may favour some methods."
        )
    if result["tune"] == "none":
        found.append("Hyper-parameters are published or given values, not chosen for these data.")
    return found


def advice(result: Comparison) -> list[str]:
    """Return what to do first: which method to use, or how to find out, and where to look next."""
    best, baseline = _recommended(result), result["baseline"]
    found = best["difference"]
    again = "the same command with a higher --seeds and --overwrite trains only what is missing"
    if found is None:
        text = f"Keep {baseline}: none of the others does better here."
    elif found["p_holm"] is None:
        text = f"Train three seeds or more before choosing: {again}."
    elif found["p_holm"] > LINE:
        text = f"Keep {baseline}, or train more seeds to see smaller gains: {again}."
    else:
        text = f"Use {best['name']}."
    return [text + _next(best)]


def _next(method: ComparedMethod) -> str:
    """Return a sentence on which of a method's two gaps is clearly the larger; empty where neither is."""
    gaps: Any = method["gaps"] or {}
    known = [(one, part) for part in PARTS if (one := gaps.get(part)) and one["ci95"]]
    if len(known) < len(PARTS):
        return ""
    (large, part), (small, other) = sorted(known, key=lambda pair: -pair[0]["points"])
    if large["ci95"][0] <= small["ci95"][1]:
        return ""
    what = "better features" if part == "representation" else "a better classifier"
    lacks = f"its {part} gap, {points(large['points'])} points, is clearly larger than its {other} gap"
    return f" Then look for {what}: {lacks}, {points(small['points'])}."


def summary_rows(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heading and a line a method, the most accurate first, as a terminal shows them.

    The last columns are the representation gap and the classifier gap, in points, and seconds a seed.
    """
    heading = ["method", "accuracy", "gain", "p (Holm)", *GROUPS, "ECE", "repr. gap", "class. gap", "seconds"]
    lines = [
        [
            row["name"],
            percent(row["mean"]),
            with_interval(
                points(row["difference"], signed=True),
                None if row["difference_low"] is None else (row["difference_low"], row["difference_high"]),
            ),
            p_value(row["p_holm"]),
            *(percent(row[group]) for group in GROUPS),
            percent(row["calibration_error"]),
            *(points(row[part]) for part in PARTS),
            number(row["backbone_seconds"] + row["classifier_seconds"], 0),
        ]
        for row in rows(result)
    ]
    return heading, lines


# -- rows and tables ------------------------------------------------------------------------------------------------


def _baseline(result: Comparison) -> ComparedMethod:
    return next(method for method in result["methods"] if method["name"] == result["baseline"])


def _sorted(result: Comparison) -> list[ComparedMethod]:
    """Return the methods, the most accurate first."""
    return sorted(result["methods"], key=lambda method: -method["mean"])


def _best(result: Comparison) -> ComparedMethod:
    return _sorted(result)[0]


def _recommended(result: Comparison) -> ComparedMethod:
    """Return the most accurate of the methods that are clearly better than the baseline; of all, where none is."""
    return next((one for one in _sorted(result) if _is_clear(one, 1)), _best(result))


def _is_clear(method: ComparedMethod, sign: int) -> bool:
    stored = method["difference"]
    return bool(stored and stored["p_holm"] is not None and stored["p_holm"] <= LINE and sign * stored["points"] > 0)


def rows(result: Comparison) -> list[Row]:
    """Return one row a method, the most accurate first: accuracy, difference, groups, gaps and their changes."""
    own = _baseline(result)["backbone"]
    found = []
    for method in _sorted(result):
        difference: Any = method["difference"] or {}
        row: Row = {
            "name": method["name"],
            "backbone": method["backbone"],
            "kind": _kind(method, result["baseline"], own),
            "mean": method["mean"],
            **ends("ci", method["ci95"]),
            "difference": difference.get("points"),
            **ends("difference", difference.get("ci95")),
            "p": difference.get("p"),
            "p_holm": difference.get("p_holm"),
            **{group: method["groups"].get(group) for group in GROUPS},
            "calibration_error": method["calibration_error"]["mean"],
            **{f"{part}_seconds": seconds for part, seconds in method["seconds"].items()},
        }
        found.append(row | _gap_fields(method))
    return found


BASELINE, SHARED, OWN = "the baseline", "on the baseline's backbone", "on a backbone of its own"


def _kind(method: ComparedMethod, baseline: str, backbone: str) -> str:
    if method["name"] == baseline:
        return BASELINE
    return SHARED if method["backbone"] == backbone else OWN


def _gap_fields(method: ComparedMethod) -> Row:
    gaps: Any = method["gaps"] or {}
    changes: Any = gaps.get("change") or {}
    found: Row = {"bound": gaps.get("bound")}
    for part in PARTS:
        for name, stored in ((part, gaps.get(part)), (f"{part}_change", changes.get(part))):
            found[name] = stored and stored["points"]
            found |= ends(name, stored and stored["ci95"])
    return found


METHOD = Column("name", "method")


def methods_table(result: Comparison) -> Table:
    """Return the table of accuracies."""
    over = f"Paired difference from {result['baseline']}, with its 95 % interval."
    columns = [
        METHOD,
        Column("mean", "accuracy", "share", "Mean over seeds, with its 95 % interval.", CI),
        Column("difference", "gain", "points", over, ("difference_low", "difference_high")),
        Column("p_holm", "p (Holm)", "p", "Of the gain, adjusted for the number of methods (Holm 1979)."),
        *GROUP_RECALLS,
        Column(
            "calibration_error",
            "ECE",
            "share",
            "Expected calibration error: mean distance of confidence from accuracy.",
        ),
        Column(
            "backbone_seconds", "backbone, s", "seconds", "Seconds that training the backbone took; methods share it."
        ),
        Column(
            "classifier_seconds",
            "classifier, s",
            "seconds",
            "Seconds that fitting its own classifier took, on stored features.",
        ),
        Column("backbone", "trained on", "text", "Training set and changes of stage 1."),
    ]
    return Table("compare-methods", "Methods, the most accurate first", columns, rows(result))


def gaps_table(result: Comparison) -> Table:
    """Return the table of gaps; no rows where they were left out."""
    columns = [METHOD, Column("bound", "bound", "share", "Accuracy of its backbone under a classifier trained on D*.")]
    for part, what in zip(PARTS, ("true → true minus its bound", "Its bound minus its accuracy"), strict=True):
        change = f"{part}_change"
        columns += [
            Column(part, f"{part} gap", "points", f"{what}.", (f"{part}_low", f"{part}_high")),
            Column(change, "change", "points", f"From {result['baseline']}.", (f"{change}_low", f"{change}_high")),
        ]
    known = [row for row in rows(result) if row["bound"] is not None]
    return Table("compare-gaps", "What each method does to the two gaps", columns, known)


def tables(result: Comparison) -> list[Table]:
    """Return all tables."""
    names = result["dataset"]["class_names"]
    about = zip(ranks(result["counts"]), names, result["groups"], result["counts"], strict=True)
    classes: list[Row] = [
        {"rank": rank, "name": name, "group": group, "count": count}
        | {f"recall of {method['name']}": method["per_class"][k] for method in result["methods"]}
        for k, (rank, name, group, count) in enumerate(about)
    ]
    columns = [
        Column("name", "class"),
        Column("rank", "rank", "count", "Frequency rank: 1 has the most training images."),
        Column("group", "group"),
        Column("count", "images", "count", "Training images in the long-tailed set."),
        *(Column(f"recall of {m['name']}", m["name"], "share", "Recall.") for m in result["methods"]),
    ]
    by_class = Table("compare-classes", "Recall by class", columns, classes)
    return [methods_table(result), gaps_table(result), by_class]


def facts(result: Comparison) -> list[str]:
    """Return what stands above the headline."""
    counts = result["counts"]
    return [
        plural(len(counts), "class"),
        f"{max(counts):,} to {min(counts):,} training images a class",
        plural(len(result["methods"]), "method"),
        plural(len(result["seeds"]), "seed"),
        f"recipe {result['recipe']['name']}" + ("" if result["recipe"]["converged"] else ", not converged"),
    ]


def settings(result: Comparison) -> Sequence[tuple[str, str]]:
    """Return each method's name, and what it is in full; where values were chosen, for each seed."""
    return [(method["name"], "; ".join(dict.fromkeys(method["calls"]))) for method in result["methods"]]
