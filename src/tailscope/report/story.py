"""What the results say, in plain English with numbers and intervals; for the page and for the terminal.

Only stored numbers are put into words. What may not be concluded is said too: no share of a gap that could be 0, no
interval from two seeds, no general claim from one.
"""

from collections.abc import Sequence

from tailscope.report import rows
from tailscope.report.geometry_story import geometry_findings, memorised
from tailscope.report.results import TRAINED, Result, Results, first, mismatches
from tailscope.report.text import (
    arrow,
    listed,
    percent,
    plural,
    points,
    with_interval,
)


def sentences(results: Results) -> list[str]:
    """Return the findings, most important first, then what limits them."""
    return [*findings(results), *caveats(results)]


def headline(results: Results) -> str:
    """Return the verdict in a few words."""
    if "swap" not in results:
        return f"Results for {first(results)['dataset']['name']}"
    attribution = results["swap"]["attribution"]
    scope = " in this pair of trainings" if len(results["swap"]["seeds"]) == 1 else ""
    if attribution is None:
        return f"No verdict yet: the backbone {_missing(results['swap'])} is not trained"
    if attribution["gap_ci95"] is None:
        if attribution["gap"] <= 0:
            return "No long-tail gap, without an interval to back it"
        larger = _larger_points(attribution)
        return f"The {larger} looks like the larger bottleneck, without an interval to back it"
    low, high = attribution["gap_ci95"]
    if high < 0:
        return f"No long-tail gap{scope}: the long-tailed set does better"
    if low <= 0:
        return f"No clear long-tail gap{scope}"
    if order_matters(attribution):
        return f"Both halves cost accuracy{scope}; which costs more depends on the order"
    larger_clearly = clearly_larger(attribution)
    if larger_clearly is None:
        return f"Representation and classifier: too close to call{scope}"
    return f"The {larger_clearly} is the larger bottleneck{scope}"


def findings(results: Results) -> list[str]:
    """Return what was found: the verdict, groups, classes, the ladder, the features."""
    found = []
    if "swap" in results:
        found += [verdict(results["swap"]), *_swap_findings(results)]
    if "ladder" in results:
        found += ladder_findings(results)
    if "geometry" in results:
        found += geometry_findings(results)
    return found


def verdict(swap: Result) -> str:
    """Return the sentence on how the gap splits, as far as its interval allows."""
    attribution, cells = swap["attribution"], swap["cells"]
    if attribution is None:
        return _half(swap)
    gap = with_interval(f"{points(attribution['gap'])} points", attribution["gap_ci95"])
    between = (
        f"between training on the long-tailed set (lt → lt, {percent(cells['lt->lt']['mean'])}) and on the full one "
        f"(true → true, {percent(cells['true->true']['mean'])})"
    )
    parts = listed([f"{_part_points(attribution, part)} for the {part}" for part in ("representation", "classifier")])
    if attribution["gap"] < 0:
        return f"There is no long-tail gap to explain: the difference {between} is {gap}, in points {parts}."
    if attribution["representation"]["share"] is not None:
        return f"The representation accounts for {_share(attribution, 'representation')} of the gap of {gap} {between}."
    if attribution["gap_ci95"] is None:
        return f"The gap is {gap} {between}; it splits into {parts}."
    reason = "the interval includes 0" if attribution["gap_ci95"][0] <= 0 else "the share's interval is unbounded"
    return f"The gap {between} is {gap}, too small to divide: {reason}. In points, it splits into {parts}."


def _half(swap: Result) -> str:
    """Return what the trained backbone alone says."""
    own = [f"with its own classifier {percent(cell['mean'])}" for cell in swap.get("stage1", {}).values()]
    known = listed([*own, *(f"{arrow(name)} {percent(swap['cells'][name]['mean'])}" for name in swap["cells"])])
    return f"Accuracy: {known}. The gap and its two parts need the backbone {_missing(swap)} too."


def _missing(swap: Result) -> str:
    sets = {"lt": "trained on the long-tailed set", "true": "trained on the full set"}
    return listed([words for name, words in sets.items() if f"{name}->{name}" not in swap["cells"]])


def order_matters(attribution: Result | None) -> bool:
    """Return whether the order of replacement decides which part is larger; not where there is no attribution."""
    return attribution is not None and bool(attribution["order_matters"])


def _both_orders(swap: Result) -> str:
    """Return what each part gains when it is replaced first and when it is replaced second."""
    ll, lt, tl, tt = (swap["cells"][name]["mean"] for name in rows.CELLS)
    return (
        f"Order matters: replaced first, the representation gains {points(tl - ll)} points and the classifier then "
        f"{points(tt - tl)}; the other way round, the classifier gains {points(lt - ll)} and the representation then "
        f"{points(tt - lt)}. The parts shown are the means of both orders."
    )


def clearly_larger(attribution: Result) -> str | None:
    """Return the part whose share is more than half with its whole interval, None where that cannot be said."""
    bounds = attribution["representation"]["share_ci95"]
    if bounds is None or bounds[0] <= 0.5 <= bounds[1]:
        return None
    return "representation" if bounds[0] > 0.5 else "classifier"


def caveats(results: Results) -> list[str]:
    """Return what limits the findings: seeds, order, recipe, files that do not belong together."""
    found = []
    if "swap" in results and order_matters(results["swap"]["attribution"]):
        found.append(_both_orders(results["swap"]))
    seeds = len(first(results)["seeds"])
    if seeds == 1:
        found.append("One seed: this pair of trainings only. Intervals cover new test images, not new trainings.")
    if seeds == 2:
        found.append("Two seeds: points only, no intervals. Three or more give intervals.")
    by_verb = {verb: len(results[verb]["seeds"]) for verb in TRAINED if verb in results}
    if len(set(by_verb.values())) > 1:
        counts = listed([f"{verb} has {n}" for verb, n in by_verb.items()])
        found.append(f"The results differ in their number of seeds: {counts}.")
    recipe = first(results)["recipe"]
    if not recipe["converged"]:
        found.append(
            f"Not converged: the recipe “{recipe['name']}” is shortened. Accuracies are lower than full training "
            "gives, and within-class scatter would keep shrinking."
        )
    return found + mismatches(results)


def ladder_findings(results: Results) -> list[str]:
    """Return what re-balancing and augmentation regain."""
    rungs = {(row["augmentation"], row["rung"]): row for row in rows.ladder(results)}
    found = []
    plain = [rungs.get(("none", rung)) for rung in ("stage1", "stage2", "bound")]
    if all(plain):
        before, after, bound = (_accuracy(row) for row in plain if row)
        found.append(
            f"Re-balancing the classifier on the same features takes accuracy from {before} to {after}; a classifier "
            f"fitted to the full set would reach {bound}."
        )
    trained = {key: row for key, row in rungs.items() if key[1] != "bound"}
    if trained:
        augmentation, rung = max(trained, key=lambda key: trained[key]["mean"])
        added = "no augmentation" if augmentation == "none" else rows.AUGMENTATIONS.get(augmentation, augmentation)
        found.append(
            f"Best without more data: {rows.STAGES[rung]} after stage 1 with {added}, "
            f"{_accuracy(trained[augmentation, rung])}; picked among {len(trained)} on these test images, so slightly "
            "flattered."
        )
    return found


def summary_rows(results: Results) -> list[tuple[str, str]]:
    """Return the story as at most ten rows of label and text."""
    result = first(results)
    data = result["dataset"]
    found = [
        (
            "Data",
            f"{data['name']}, {plural(len(result['counts']), 'class')}, {max(result['counts']):,} to "
            f"{min(result['counts']):,} images a class, {plural(sum(result['counts']), 'image')}; "
            f"{plural(len(result['seeds']), 'seed')}; recipe {result['recipe']['name']}",
        ),
        ("Verdict", headline(results)),
    ]
    if "swap" in results:
        found += _swap_rows(results)
    if "ladder" in results:
        found.append(("Ladder", ladder_findings(results)[-1]))
    if "geometry" in results:
        found.append(("Features", memorised(results)))
    limits = [text.split(":")[0].lower() for text in caveats(results)]
    return [*found, *([("Mind", "; ".join(limits))] if limits else [])]


def _swap_rows(results: Results) -> list[tuple[str, str]]:
    attribution = results["swap"]["attribution"]
    stored = results["swap"]["cells"]
    cells = [f"{arrow(name)} {percent(stored[name]['mean'])}" for name in rows.CELLS if name in stored]
    if attribution is None:
        return [("Accuracy", ", ".join(cells))]
    found = [
        ("Accuracy", ", ".join(cells)),
        ("Gap", with_interval(f"{points(attribution['gap'])} points", attribution["gap_ci95"])),
    ]
    for part in ("representation", "classifier"):
        share = f" = {_share(attribution, part)} of the gap" if attribution[part]["share"] is not None else ""
        found.append((part.capitalize(), _part_points(attribution, part) + share))
    worst = _worst_group(results)
    return [*found, *([("Hardest hit", worst)] if worst else [])]


def _swap_findings(results: Results) -> list[str]:
    attribution = results["swap"]["attribution"]
    if attribution is None:
        return []
    found = []
    if attribution["classifier"]["share"] is not None:
        found.append(
            f"That is {_part_points(attribution, 'representation')}; the classifier accounts for "
            f"{_share(attribution, 'classifier')}, {_part_points(attribution, 'classifier')}."
        )
    worst = _worst_group(results)
    if worst:
        found.append(f"Hardest hit: {worst}.")
    losses = [row for row in rows.classes(results) if row["gap"] is not None]
    if losses and not _gap_unclear(attribution):
        row = max(losses, key=lambda r: r["gap"])
        found.append(
            f"The class that loses most is “{row['name']}” ({plural(row['count'], 'training image')}): recall "
            f"{percent(row['true->true'], 0)} with the full set, {percent(row['lt->lt'], 0)} with the long-tailed one."
        )
    return found + _matched_findings(attribution)


def _worst_group(results: Results) -> str | None:
    """Return the group that loses most; None where there is no clear gap, for then it is only noise's favourite."""
    split = rows.groups(results)
    if not split or _gap_unclear(results["swap"]["attribution"]):
        return None
    worst = max(split, key=lambda r: r["gap"])
    return (
        f"{worst['group']} classes, whose recall falls from {percent(worst['true'])} to {percent(worst['lt'])}; of "
        f"these {points(worst['gap'])} points the representation accounts for {points(worst['representation'])}"
    )


def _gap_unclear(attribution: Result) -> bool:
    lowest = attribution["gap"] if attribution["gap_ci95"] is None else attribution["gap_ci95"][0]
    return bool(lowest <= 0)


def _matched_findings(attribution: Result) -> list[str]:
    """Return how the matched set, balanced and as small as lt, splits each part again."""
    found = []
    for part, steps in (attribution.get("matched") or {}).items():
        imbalance, size = (
            with_interval(f"{points(steps[step]['points'])} points", steps[step]["ci95"])
            for step in ("imbalance", "sample_count")
        )
        found.append(f"Of the {part}'s part, {imbalance} come with imbalance and {size} with having fewer images.")
    return found


def _accuracy(row: rows.Row) -> str:
    bounds: Sequence[float] | None = None if row["ci_low"] is None else (row["ci_low"], row["ci_high"])
    return with_interval(percent(row["mean"]), bounds)


def _share(attribution: Result, part: str) -> str:
    return with_interval(percent(attribution[part]["share"], 0), attribution[part]["share_ci95"], digits=0)


def _part_points(attribution: Result, part: str) -> str:
    return with_interval(f"{points(attribution[part]['points'])} points", attribution[part]["ci95"])


def _larger_points(attribution: Result) -> str:
    first_larger = attribution["representation"]["points"] >= attribution["classifier"]["points"]
    return "representation" if first_larger else "classifier"
