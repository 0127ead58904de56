"""Class by class: the long-tailed profile, recall, and where each class's points are lost."""

import math
from collections.abc import Sequence

import altair as alt

from tailscope.report import rows
from tailscope.report.figure import Figure, Panel
from tailscope.report.look import GROUP_KEYS, PART_KEYS, Key, css
from tailscope.report.marks import (
    Chart,
    Series,
    class_tooltip,
    colour_scale,
    group_bounds,
    lines,
    quoted,
    rank_axis,
    rows_of,
)
from tailscope.report.results import Result, Results, first
from tailscope.report.rows import Row
from tailscope.report.text import number, points

LABELLED = 12  # classes; up to here bars carry their number
BINS = 50  # bars where classes are many: neighbours in frequency are averaged
CELL_SERIES = (
    Series("recalls", "lt_lt", Key("lt → lt", "vermilion", "circle")),
    Series("recalls", "lt_true", Key("lt → true", "orange", "triangle-up", (6, 3))),
    Series("recalls", "true_lt", Key("true → lt", "sky", "diamond", (6, 3))),
    Series("recalls", "true_true", Key("true → true", "green", "square")),
)
SPLIT = (
    "Its gap, between the full and the long-tailed set, splits into what the representation and what the classifier "
    "costs the class. "
)
RULES = {
    "counts": "Head classes have more than 100 images, body classes 20 to 100, tail classes fewer than 20.",
    "thirds": "Head, body and tail are thirds of the classes by frequency.",
}


def data(results: Results) -> dict[str, list[Row]]:
    """Return the rows that these charts refer to, by name."""
    found = {"profile": rows.profile(results)}
    if "swap" in results:
        classes = rows.classes(results)
        found["recalls"] = [
            {**row, **{one.field: row.get(one.field.replace("_", "->")) for one in CELL_SERIES}} for row in classes
        ]
        found["losses"] = _losses(classes)
    return found


def profile(results: Results) -> Figure:
    """Draw training images a class against frequency rank, by group."""
    classes = rows.profile(results)
    keys = [key for name, key in GROUP_KEYS.items() if any(row["group"] == name for row in classes)]
    half = 0.4 if len(classes) <= 100 else 0.5
    y = alt.Y("count:Q", title="training images", scale=alt.Scale(type="symlog"), axis=_powers(classes))
    bars = rows_of("profile").transform_calculate(left=f"datum.rank - {half}", right=f"datum.rank + {half}").mark_bar()
    encoded = bars.encode(
        x=rank_axis(classes, "left"),
        x2="right:Q",
        y=y,
        y2=alt.Y2Datum(0),
        tooltip=class_tooltip([("rank", "frequency rank", "d")]),
    )
    if keys:
        encoded = encoded.encode(color=alt.Color("group:N", scale=colour_scale(keys)))
    layers: list[Chart] = [encoded]
    if len(classes) <= LABELLED:
        text = rows_of("profile").mark_text(dy=-8, color=css("muted"))
        layers.append(text.encode(x=rank_axis(classes), y=y, text=alt.Text("count:Q", format=",d")))
    rule = RULES.get(first(results)["groups_rule"], "") if keys else "Too few classes for head, body and tail."
    return Figure(
        "profile",
        "The long-tailed training set",
        f"Training images of each class, on a logarithmic scale. {rule}",
        "",
        [Panel("", alt.layer(*layers).properties(height=220), keys)],
    )


def classes(results: Results) -> Figure:
    """Draw recall by class for the four pairs, and each class's split of the gap."""
    found = rows.profile(results)
    y = {"title": "recall", "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format=".0%", tickCount=6)}
    keys = list(PART_KEYS.values())
    tooltip = [
        alt.Tooltip("label:N", title="class"),
        *(alt.Tooltip(f"{part}:Q", title=f"{part}, points", format=".1f") for part in ("gap", *PART_KEYS)),
    ]
    bars: list[Chart] = [
        rows_of("losses")
        .transform_calculate(series=quoted(key.label))
        .mark_bar()
        .encode(
            x=rank_axis(found, "left"),
            x2="right:Q",
            y=alt.Y(f"{part}_from:Q", title="points lost"),
            y2=f"{part}_to:Q",
            color=alt.Color("series:N", scale=colour_scale(keys)),
            tooltip=tooltip,
        )
        for part, key in PART_KEYS.items()
    ]
    bounds = group_bounds(found)
    series = [one for one in CELL_SERIES if one.field.replace("_", "->") in results["swap"]["cells"]]
    recall = alt.layer(*lines(series, found, y, ".0%"), *bounds).properties(height=260)
    panels = [Panel("Recall (backbone → classifier)", recall, [one.key for one in series])]
    split = results["swap"]["attribution"] is not None
    if split:
        panels.append(Panel("Points lost, and to what", alt.layer(*bars, *bounds).properties(height=260), keys))
    return Figure(
        "classes",
        "Which classes suffer",
        f"Recall is the share of a class's test images that is classified correctly. {SPLIT if split else ''}"
        f"{_noise(first(results))}",
        "",
        panels,
    )


def _powers(classes: Sequence[Row]) -> alt.Axis:
    top = max(row["count"] for row in classes)
    return alt.Axis(values=[10**k for k in range(math.ceil(math.log10(max(top, 1))) + 1)], format=",d")


def _losses(classes: Sequence[Row]) -> list[Row]:
    """Stack each class's two parts, in points; where classes are many, average neighbours in frequency."""
    known = sorted((row for row in classes if row["gap"] is not None), key=lambda row: row["rank"])
    size = math.ceil(len(known) / BINS) if len(known) > 2 * BINS else 1
    found = []
    for start in range(0, len(known), size):
        members = known[start : start + size]
        means = {part: 100 * sum(row[part] for row in members) / len(members) for part in ("gap", *PART_KEYS)}
        head, tail = members[0], members[-1]
        label = head["name"] if size == 1 else f"ranks {head['rank']} to {tail['rank']}, mean"
        same_sign = means["representation"] * means["classifier"] > 0
        base = means["representation"] if same_sign else 0.0
        found.append(
            {
                "label": label,
                "left": head["rank"] - (0.38 if size == 1 else 0.5),
                "right": tail["rank"] + (0.38 if size == 1 else 0.5),
                **means,
                "representation_from": 0.0,
                "representation_to": means["representation"],
                "classifier_from": base,
                "classifier_to": base + means["classifier"],
            }
        )
    return found


def _noise(result: Result) -> str:
    """Return how far chance alone moves one class's recall, at worst: 1.96 sqrt(1/4n)."""
    images = result["dataset"].get("test_images")
    if not images:
        return ""
    each = images / len(result["counts"])
    half = 1.96 * math.sqrt(0.25 / each)
    return f"With {number(each, 0)} test images a class, chance moves a single recall by up to {points(half)} points."
