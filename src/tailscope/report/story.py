"""What the results say, in plain English with numbers and intervals; for the page and for the terminal.

Only stored numbers are put into words. What may not be concluded is said too: no share of a gap that could be 0, no
interval from two seeds, no general claim from one.
"""

from collections.abc import Callable

from tailscope.intervals import CELLS
from tailscope.report import rows
from tailscope.report.rows import first, mismatches
from tailscope.report.schema import PARTS, TRAINED, Attribution, Part, Points, Results, Swap, Trained
from tailscope.report.text import (
    accuracy,
    arrow,
    in_points,
    listed,
    number,
    percent,
    plural,
    points,
    significant,
    with_interval,
)


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
        points = {part: attribution[part]["points"] for part in PARTS}
        larger = max(points, key=points.__getitem__)
        return f"The {larger} looks like the larger bottleneck, without an interval to back it"
    low, high = attribution["gap_ci95"]
    if high < 0:
        return f"No long-tail gap{scope}: the long-tailed set does better"
    if low <= 0:
        return f"No clear long-tail gap{scope}"
    if attribution["order_matters"]:
        return f"Representation and classifier both cost accuracy{scope}; which costs more depends on the order"
    share = attribution["representation"]["share_ci95"]
    if share is None or share[0] <= 0.5 <= share[1]:
        return f"Representation and classifier: too close to call{scope}"
    return f"The {'representation' if share[0] > 0.5 else 'classifier'} is the larger bottleneck{scope}"


def findings(results: Results) -> list[str]:
    """Return what was found: the verdict, groups, classes, the ladder, the features."""
    found = []
    if "swap" in results:
        found += [verdict(results["swap"]), *_swap_findings(results)]
    if "ladder" in results:
        found += ladder_findings(results)
    if "geometry" in results:
        found += [text for text in (f"{memorised(results)}.", _shift(results)) if text]
    return found


def verdict(swap: Swap) -> str:
    """Return the sentence on how the gap splits, as far as its interval allows."""
    attribution, cells = swap["attribution"], swap["cells"]
    if attribution is None:
        return _half(swap)
    gap = in_points(attribution["gap"], attribution["gap_ci95"])
    between = (
        f"between training on the long-tailed set (lt → lt, {percent(cells['lt->lt']['mean'])}) and on the full one "
        f"(true → true, {percent(cells['true->true']['mean'])})"
    )
    representation = attribution["representation"]
    parts = listed([f"{_size(attribution[part])} for the {part}" for part in PARTS])
    if attribution["gap"] < 0:
        return f"There is no long-tail gap to explain: the difference {between} is {gap}, in points {parts}."
    if representation["share"] is not None:
        return f"The representation accounts for {_share(representation)} of the gap of {gap} {between}."
    if attribution["gap_ci95"] is None:
        return f"The gap is {gap} {between}; it splits into {parts}."
    reason = "the interval includes 0" if attribution["gap_ci95"][0] <= 0 else "the share's interval is unbounded"
    return f"The gap {between} is {gap}, too small to divide: {reason}. In points, it splits into {parts}."


def _half(swap: Swap) -> str:
    """Return what the trained backbone alone says."""
    own = [f"with its own classifier {percent(cell['mean'])}" for cell in swap.get("stage1", {}).values()]
    known = listed([*own, *(f"{arrow(name)} {percent(swap['cells'][name]['mean'])}" for name in swap["cells"])])
    return f"Accuracy: {known}. The gap and its two parts need the backbone {_missing(swap)} too."


def _missing(swap: Swap) -> str:
    sets = {"lt": "trained on the long-tailed set", "true": "trained on the full set"}
    return listed([words for name, words in sets.items() if f"{name}->{name}" not in swap["cells"]])


def _both_orders(swap: Swap) -> str:
    """Return what each part gains when it is replaced first and when it is replaced second."""
    ll, lt, tl, tt = (swap["cells"][name]["mean"] for name in CELLS)
    return (
        f"Order matters: replaced first, the representation gains {points(tl - ll)} points and the classifier then "
        f"{points(tt - tl)}; the other way round, the classifier gains {points(lt - ll)} and the representation then "
        f"{points(tt - lt)}. The parts shown are the means of both orders."
    )


def caveats(results: Results) -> list[str]:
    """Return what limits the findings: seeds, order, recipe, files that do not belong together."""
    found = []
    if "swap" in results and (attribution := results["swap"]["attribution"]) and attribution["order_matters"]:
        found.append(_both_orders(results["swap"]))
    if len(first(results)["seeds"]) == 1:
        found.append("One seed: this pair of trainings only. Intervals cover new test images, not new trainings.")
    if len(first(results)["seeds"]) == 2:
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


def advice(results: Results) -> list[str]:
    """Return what to do first, as far as a clear gap says; nothing where there is none.

    What replacing one half alone by that of the full set gains was measured; the ladder tells what helps without more
    data.
    """
    attribution = results["swap"]["attribution"] if "swap" in results else None
    if attribution is None or attribution["gap_ci95"] is None or _gap_unclear(attribution):
        return []
    ll, lt, tl, _ = (results["swap"]["cells"][name]["mean"] for name in CELLS)
    share = attribution["representation"]["share_ci95"]
    close = attribution["order_matters"] or share is None or share[0] <= 0.5 <= share[1]
    first_half = "representation" if share and share[0] > 0.5 else "classifier"
    opening = "Work on both halves" if close else f"Improve the {first_half} first"
    text = (
        f"{opening}: the full set’s backbone alone gains {points(tl - ll)} points, its classifier alone "
        f"{points(lt - ll)}."
    )
    return [" ".join([text, *(ladder_findings(results)[-1:] if "ladder" in results else [])])]


def class_note(results: Results) -> str:
    """Return what the columns of the class table hold."""
    parts = []
    if "swap" in results:
        parts.append("Recalls are means over seeds; the gap, in points, is true → true minus lt → lt.")
    if "geometry" in results and "lt" in rows.encoders(results):
        parts.append("Spread gap, centre shift and escape rank are the calibrated ones of the encoder lt.")
    return " ".join([*parts, "An en dash means undefined."])


def ladder_findings(results: Results) -> list[str]:
    """Return what re-balancing and augmentation regain."""
    rungs = {(row["augmentation"], row["rung"]): row for row in rows.ladder(results)}
    found = []
    plain = [rungs.get(("none", rung)) for rung in ("stage1", "stage2", "bound")]
    if all(plain):
        before, after, bound = (_reached(row) for row in plain if row)
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
            f"{_reached(trained[augmentation, rung])}; picked among {len(trained)} on these test images, so slightly "
            "flattered."
        )
    return found


def summary_rows(results: Results) -> list[tuple[str, str]]:
    """Return the story as at most ten rows of label and text."""
    result = first(results)
    counts = result["counts"]
    data = (
        f"{result['dataset']['name']}, {plural(len(counts), 'class')}, {max(counts):,} to {min(counts):,} images a "
        f"class, {plural(sum(counts), 'image')}; {plural(len(result['seeds']), 'seed')}; recipe "
        f"{result['recipe']['name']}"
    )
    found = [("Data", data)]
    if "swap" in results:
        found += _swap_rows(results)
    if "ladder" in results:
        found.append(("Ladder", ladder_findings(results)[-1]))
    if "geometry" in results:
        found.append(("Features", memorised(results)))
    limits = [text.split(":")[0].lower() for text in caveats(results)[1:]]  # the first closes
    return [*found, *([("Caveats", "; ".join(limits))] if limits else [])]


def conclusion(results: Results) -> str:
    """Return the verdict in one sentence with its numbers: what a summary ends with."""
    said, swap = headline(results), results.get("swap")
    if swap is None or swap["attribution"] is None or _gap_unclear(swap["attribution"]):
        return f"{said}."
    attribution, cells = swap["attribution"], swap["cells"]
    gap = in_points(attribution["gap"], attribution["gap_ci95"])
    return (
        f"{said.partition('; ')[0]}: of the {gap} that training on the long-tailed set costs "
        f"({percent(cells['lt->lt']['mean'])} right instead of {percent(cells['true->true']['mean'])}), "
        f"{points(attribution['representation']['points'])} are due to the representation and "
        f"{points(attribution['classifier']['points'])} to the classifier."
    )


def _swap_rows(results: Results) -> list[tuple[str, str]]:
    attribution, stored = results["swap"]["attribution"], results["swap"]["cells"]
    cells = [f"{arrow(name)} {percent(stored[name]['mean'])}" for name in CELLS if name in stored]
    found = [("Accuracy", ", ".join(cells))]
    if attribution is None:
        return found
    found.append(("Gap", in_points(attribution["gap"], attribution["gap_ci95"])))
    for name in PARTS:
        part = attribution[name]
        share = f" = {_share(part)} of the gap" if part["share"] is not None else ""
        found.append((name.capitalize(), _size(part) + share))
    worst = _worst_group(results)
    return [*found, *([("Hardest hit", worst)] if worst else [])]


def _swap_findings(results: Results) -> list[str]:
    attribution = results["swap"]["attribution"]
    if attribution is None:
        return []
    found, classifier = [], attribution["classifier"]
    if classifier["share"] is not None:
        found.append(
            f"That is {_size(attribution['representation'])}; the classifier accounts for {_share(classifier)}, "
            f"{_size(classifier)}."
        )
    if worst := _worst_group(results):
        found.append(f"Hardest hit: {worst}.")
    losses = [row for row in rows.classes(results) if row["gap"] is not None]
    if losses and not _gap_unclear(attribution):
        row = max(losses, key=lambda r: r["gap"])
        found.append(
            f"The class that loses most is “{row['name']}” ({plural(row['count'], 'training image')}): recall "
            f"{percent(row['true->true'], 0)} with the full set, {percent(row['lt->lt'], 0)} with the long-tailed one."
        )
    for part, steps in (attribution.get("matched") or {}).items():  # the matched set is balanced, and as small as lt
        imbalance, size = _size(steps["imbalance"]), _size(steps["sample_count"])
        found.append(f"Of the {part}'s part, {imbalance} come with imbalance and {size} with having fewer images.")
    return found


def _worst_group(results: Results) -> str | None:
    """Return the group that loses most; None where there is no clear gap, for then it is only noise's favourite."""
    split, attribution = rows.groups(results), results["swap"]["attribution"]
    if not split or attribution is None or _gap_unclear(attribution):
        return None
    worst = max(split, key=lambda r: r["gap"])
    return (
        f"{worst['group']} classes, whose recall falls from {percent(worst['true'])} to {percent(worst['lt'])}; of "
        f"these {points(worst['gap'])} points the representation accounts for {points(worst['representation'])}"
    )


def _gap_unclear(attribution: Attribution) -> bool:
    lowest = attribution["gap"] if attribution["gap_ci95"] is None else attribution["gap_ci95"][0]
    return bool(lowest <= 0)


def _reached(row: rows.Row) -> str:
    return accuracy(row["mean"], rows.ci95(row))


def _share(part: Part) -> str:
    return with_interval(percent(part["share"], 0), part["share_ci95"], digits=0)


def _size(part: Points) -> str:
    return in_points(part["points"], part["ci95"])


def swap_reading(swap: Swap) -> str:
    """Return what replacing either half alone changes."""
    if swap["attribution"] is None:
        return ""
    ll, lt, tl, _ = (swap["cells"][name]["mean"] for name in CELLS)
    return (
        f"Here, replacing only the backbone changes accuracy by {points(tl - ll)} points, replacing only the "
        f"classifier by {points(lt - ll)}."
    )


def noise_of_recall(result: Trained) -> str:
    """Return how far chance alone moves a class's recall, at worst: 1.96 sqrt(1/4n); files hold the mean of n alone."""
    images = result["dataset"].get("test_images")
    if not images:
        return ""
    each = images / len(result["counts"])
    half = 1.96 * (0.25 / each) ** 0.5
    images_of_it = f"{number(each, 0)} test images, as many as a class has on average"
    return (
        f"Chance moves the recall of a class with {images_of_it}, by up to {points(half)} points; with fewer, by more."
    )


# ---- geometry


def memorised(results: Results) -> str:
    """Return in how many classes unseen samples are farther from the centre than training samples, by encoder."""
    found, entries = [], rows.geometry_classes(results, "calibrated")
    for encoder in rows.encoders(results):
        tested = [row for row in entries if row["encoder"] == encoder and row["spread_gap_q"] is not None]
        hits = [row for row in tested if rows.flagged(row, "spread_gap_q") and (row["spread_gap_deg"] or 0) > 0]
        largest = max(hits, key=lambda row: row["spread_gap_deg"], default=None)
        most = "" if largest is None else f", most for “{largest['name']}” ({number(largest['spread_gap_deg'])}°)"
        found.append(f"{encoder} {len(hits)} of {plural(len(tested), 'testable class')}{most}")
    return (
        "Classes whose training samples look memorised (unseen ones lie clearly farther from the class centre, in most "
        "seeds): "
        f"{'; '.join(found)}"
    )


class _Geometry:
    """What the geometry of one variant comes to, encoder by encoder."""

    def __init__(self, results: Results, variant: str) -> None:
        self.encoders = rows.encoders(results)
        self.classes = rows.geometry_classes(results, variant)
        self.groups = rows.geometry_groups(results, variant)

    def mean(self, encoder: str, field: str) -> float | None:
        values = [row[field] for row in self.classes if row["encoder"] == encoder and row[field] is not None]
        return sum(values) / len(values) if values else None

    def group(self, encoder: str, field: str, group: str = "tail") -> float | None:
        found = (row[field] for row in self.groups if (row["encoder"], row["group"]) == (encoder, group))
        return next(found, None)

    def each(self, opening: str, values: Callable[[str], tuple[float | None, ...]], phrase: Callable[..., str]) -> str:
        """Return a sentence with a phrase of each encoder whose values are known; nothing where there is none."""
        found = [
            f"{phrase(*known)} for {encoder}" for encoder in self.encoders if None not in (known := values(encoder))
        ]
        return f"{opening} {listed(found)}." if found else ""

    def means(self, opening: str, field: str, written: Callable[[float], str]) -> str:
        """Return a measure's mean over the classes where it is defined."""
        return self.each(opening, lambda encoder: (self.mean(encoder, field),), written)

    def tail_to_head(self, opening: str, field: str) -> str:
        """Return how large a measure is in the tail, relative to the head."""

        def ratio(encoder: str) -> tuple[float | None]:
            tail, head = self.group(encoder, field), self.group(encoder, field, "head")
            return (tail / head if tail is not None and head else None,)

        return self.each(opening, ratio, lambda value: f"{significant(value)} times")


def readings(results: Results, variant: str) -> dict[str, str]:
    """Return one sentence a geometry figure, by figure name: what these data show there."""
    seen = _Geometry(results, variant)
    narrowing = seen.each(
        "Once unseen samples count, the nearest wrong centre moves on average",
        lambda one: (seen.mean(one, "nearest_center_train_deg"), seen.mean(one, "nearest_center_true_deg")),
        lambda before, after: f"from {number(before)}° to {number(after)}°",
    )
    if variant == "calibrated":
        return {
            "fig4": seen.tail_to_head("Covariance of tail relative to head classes:", "covariance_norm_unbiased"),
            "fig5": seen.means("A class uses about as many directions, on average, as:", "effective_rank", significant),
            "fig6": f"{memorised(results)}.",
            "fig7": narrowing,
            "fig8": _shift(results),
        }
    return {
        "fig4": seen.tail_to_head("Scatter of tail classes relative to head classes:", "variance"),
        "fig5": seen.means("Mean first PC share:", "first_pc_share", percent),
        "fig6": seen.each(
            "Unseen tail samples beyond the edge that training saw:",
            lambda one: (seen.group(one, "escape_rate"),),
            percent,
        ),
        "fig7": narrowing,
        "fig8": seen.each(
            "Centre shift of tail classes:",
            lambda one: (seen.group(one, "center_shift_deg"), seen.group(one, "spread_train_deg")),
            lambda shift, spread: f"{number(shift)}° against a spread of {number(spread)}°",
        ),
    }


def _shift(results: Results) -> str:
    """Return how far the centres of tail classes shift, and how much of that is chance."""
    seen, found = _Geometry(results, "calibrated"), []
    for encoder in seen.encoders:
        raw, chance = seen.group(encoder, "center_shift_deg"), seen.group(encoder, "center_shift_null_deg")
        if raw is not None and chance is not None:
            found.append(f"{number(raw)}° for {encoder}, where chance alone gives {number(chance)}°")
    return f"Centres of tail classes shift by {'; '.join(found)}." if found else ""
