"""The figures of a diagnosis, and the rows that they are drawn from."""

from collections.abc import Sequence
from dataclasses import replace

import altair as alt

from tailscope.groups import GROUPS
from tailscope.measures.fields import SHOWN
from tailscope.report import diagnosis, encoders, marks
from tailscope.report.diagnosis_schema import Diagnosis, DrillDown
from tailscope.report.marks import Chart, Figure, Key, Panel, colour_scale, css, rows_of, shape_scale
from tailscope.report.rows import Row
from tailscope.report.text import percent, plural

RIGHT, WRONG = Key("right", "blue", "circle"), Key("wrong", "vermilion", "diamond")
NAMED = 20  # classes; up to here a map names their middles
SHAPES = ("circle", "square", "triangle-up")  # of head, body and tail
MOST_POINTS = 2_000  # classes drawn; each is a shape in four panels of the page and of every file

SCATTERS = {
    "center_shift_excess_deg": f"{SHOWN['center_shift_excess_deg'].title}, degrees",
    "escape_rank": f"{SHOWN['escape_rank'].title}, ½ is no difference",
    "nearest_center_true_deg": f"{SHOWN['nearest_center_true_deg'].title}, degrees",
    "recall_current": "Recall, in use",
}

GROUP_KEYS = {name: Key(name, name, shape) for name, shape in zip(GROUPS, SHAPES, strict=True)}

PLOTS = {
    "shift": "center_shift_excess_deg",
    "escape": "escape_rank",
    "separation": "nearest_center_true_deg",
    "recall": "recall_current",
}


def figures(result: Diagnosis) -> list[Figure]:
    """Return the figures in the order of the page."""
    found = [_scatter(result), *_of_samples(result)]
    steps = [] if result["verdict"] is None else [_steps(result)]
    return [*_encoders(result), *steps, *found]


def plots(result: Diagnosis) -> dict[str, Figure]:
    """Return the figures by name, and each panel that draws the classes by their counts as a figure of its own."""
    found = {figure.name: figure for figure in figures(result)}
    panels = {panel.title: panel for panel in found["scatter"].panels}
    alone = {name: panels[SCATTERS[field]] for name, field in PLOTS.items() if SCATTERS[field] in panels}
    return found | {name: replace(found["scatter"], panels=[panel]) for name, panel in alone.items()}


def data(result: Diagnosis) -> dict[str, list[Row]]:
    """Return the rows of the charts by name."""
    by_rank = diagnosis.by_rank(result)
    names = ("name", "group", "count", *SCATTERS)
    return {
        "by_count": [{name: row[name] for name in names} for row in by_rank[:: _every(len(by_rank))]],
        "steps": diagnosis.steps(result),
        "encoders": encoders.dots(result),
        **_sample_data(result),
    }


def _encoders(result: Diagnosis) -> list[Figure]:
    """Draw each encoder's accuracies with their intervals, the best encoder on top; nothing where there is one."""
    stored = encoders.dots(result)
    if not stored:
        return []
    colours = zip(encoders.KINDS.values(), ("muted", "sky", "blue", "green"), (*SHAPES, "diamond"), strict=True)
    keys = [Key(*about) for about in colours if any(row["kind"] == about[0] for row in stored)]
    order = list(dict.fromkeys(row["encoder"] for row in stored))
    base = rows_of("encoders").encode(
        y=alt.Y("encoder:N", sort=order, title=None, axis=alt.Axis(ticks=False)),
        yOffset=alt.YOffset("kind:N", sort=[key.label for key in keys]),
    )
    x = marks.zoomed([row[end] for row in stored for end in ("mean", "ci_low", "ci_high") if row[end]], "accuracy")
    tooltip = {"encoder": "encoder", "kind": "classifier", "text": "accuracy"}
    layers = marks.dots(base, x, "kind", keys, tooltip)
    chart: Chart = alt.layer(*layers).properties(height=22 * len(stored))
    return [Figure("compared", [Panel("", chart, keys)])]


def _steps(result: Diagnosis) -> Figure:
    """Draw what each step adds, from the current accuracy to the ceiling."""
    bars = diagnosis.steps(result)
    lowest = min(0.0, *(row[end] for row in bars for end in ("start", "end")))
    room = alt.ExprRef(f"width < {marks.NARROW} ? 140 : 118")  # for the numbers on the right
    scale = alt.Scale(domainMin=lowest, domainMax=room, nice=False)
    axis = alt.Axis(title="accuracy, per cent", values=list(range(0, 101, 20)))
    keys = (Key("total", "muted", "bar"), *marks.PART_KEYS.values())
    return Figure("waterfall", [Panel("", marks.waterfall("steps", bars, keys, scale, axis), keys)])


def _scatter(result: Diagnosis) -> Figure:
    """Draw measures of every class against its number of training samples."""
    classes = diagnosis.classes(result)
    keys = tuple(key for name, key in GROUP_KEYS.items() if any(row["group"] == name for row in classes))
    panels = [
        Panel(title, _by_count(field, result["counts"], keys), keys)
        for field, title in SCATTERS.items()
        if any(row[field] is not None for row in classes)
    ]
    every = _every(len(classes))
    left_out = f" Of {len(classes):,} classes one in {every} by count is drawn; the table has all." if every > 1 else ""
    if none := sum(not count for count in result["counts"]):
        left_out += f" {plural(none, 'class')} without training samples: not drawn, for such a scale has no 0."
    return Figure("scatter", panels, left_out)


def _by_count(field: str, counts: Sequence[int], keys: Sequence[Key]) -> Chart:
    """Draw a recall or measure of each class by its count, and a line where a measure means no difference."""
    measure, few = SHOWN.get(field), len(counts) <= marks.MANY
    unit = measure.unit if measure else "share"
    axis = alt.Axis(tickCount=6, format=".0%") if unit == "share" else alt.Axis(tickCount=6)
    scale = alt.Scale(domain=[0, 1]) if unit == "share" else alt.Scale(zero=False, nice=True)
    points = rows_of("by_count").transform_filter("datum.count > 0")
    drawn = points.mark_point(filled=True, size=60 if few else 28, opacity=1 if few else 0.85).encode(
        x=alt.X("count:Q", title="training samples", **marks.log_axis(counts, 1.3, grid=False)),
        y=alt.Y(f"{field}:Q", title=None, scale=scale, axis=axis),
        tooltip=marks.class_tooltip([(field, measure.label if measure else "recall, in use", marks.FORMATS[unit])]),
        color=alt.Color("group:N", scale=colour_scale(keys)) if keys else alt.value(css("blue")),
        shape=alt.Shape("group:N", scale=shape_scale(keys)) if keys else alt.value("circle"),
    )
    chart: Chart = alt.layer(*marks.reference(measure and measure.null), drawn).properties(height=230)
    return chart


def _every(classes: int) -> int:
    """Return which classes by rank are drawn where they are very many: every k-th."""
    return -(-classes // MOST_POINTS)


# ---- samples


def _of_samples(result: Diagnosis) -> list[Figure]:
    """Return the confusion matrix of few classes, and the map; none where nothing was judged."""
    stored = result.get("drilldown")
    if stored is None:
        return []
    found = [_map(stored, result["dataset"]["class_names"])]
    return [_confusion(result["dataset"]["class_names"]), *found] if stored["confusions"]["matrix"] else found


def _sample_data(result: Diagnosis) -> dict[str, list[Row]]:
    """Return the rows of these charts by name."""
    stored, names = result.get("drilldown"), result["dataset"]["class_names"]
    if stored is None:
        return {}
    drawn = stored["map"]
    columns = zip(drawn["x"], drawn["y"], drawn["label"], drawn["predicted"], drawn["sample"], strict=True)
    points: list[Row] = [
        {"x": x, "y": y, "class": names[k], "taken": names[j], "sample": sample, "key": RIGHT.label}
        | ({} if k == j else {"key": WRONG.label})
        for x, y, k, j, sample in columns
    ]
    points.sort(key=lambda row: str(row["key"]))  # mistakes on top
    cells: list[Row] = []
    for k, row in enumerate(stored["confusions"]["matrix"] or []):
        total = sum(row)
        cells += [
            {"true": k, "taken": j, "class": names[k], "named": names[j], "count": n, "share": n / total}
            for j, n in enumerate(row)
            if total and n
        ]
    return {"map": points, "middles": _middles(points), "confusion": cells}


def _middles(points: list[Row]) -> list[Row]:
    """Return the middle of each class on the map."""
    of: dict[str, list[Row]] = {}
    for row in points:
        of.setdefault(row["class"], []).append(row)
    return [
        {"class": name, "x": sum(row["x"] for row in rows) / len(rows), "y": sum(row["y"] for row in rows) / len(rows)}
        for name, rows in of.items()
    ]


def _confusion(names: list[str]) -> Figure:
    """Draw the confusion matrix, a row a true class: the share of its samples that is taken for each class."""
    few = len(names) <= NAMED
    labels = alt.Axis(labels=few, ticks=False, domain=False, labelLimit=90, labelAngle=-40, titlePadding=6)
    upright = alt.Axis(labels=few, ticks=False, domain=False, labelLimit=90, titlePadding=6)
    every = alt.Scale(domain=names)  # of classes that have no samples, or are never named, too
    base = rows_of("confusion").encode(
        x=alt.X("named:N", scale=every, sort=None, title="taken for", axis=labels),
        y=alt.Y("class:N", scale=every, sort=None, title="class", axis=upright),
    )
    tooltip = [
        alt.Tooltip("class:N", title="class"),
        alt.Tooltip("named:N", title="taken for"),
        alt.Tooltip("count:Q", title="samples", format=",d"),
        alt.Tooltip("share:Q", title="share of the class", format=".1%"),
    ]
    opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.08, 1]), legend=None)
    colour = alt.condition("datum.true == datum.taken", alt.value(css("blue")), alt.value(css("vermilion")))
    layers: list[Chart] = [base.mark_rect().encode(opacity=opacity, color=colour, tooltip=tooltip)]
    if few:
        layers.append(base.mark_text(fontSize=10).encode(text=alt.Text("count:Q", format=",d")))
    keys = (Key("right", "blue", "bar"), Key("taken for another class", "vermilion", "bar"))
    chart: Chart = alt.layer(*layers).properties(height=max(160, min(480, 24 * len(names))))
    return Figure("confusion", [Panel("", chart, keys)])


def _map(stored: DrillDown, names: list[str]) -> Figure:
    """Draw the samples on a plane, mistakes on top, and name the middles of few classes."""
    keys = (RIGHT, WRONG)
    scale = alt.Scale(domain=[-1.08, 1.08], nice=False)
    blank = alt.Axis(labels=False, ticks=False, grid=False, title=None)
    x, y = (alt.X("x:Q", scale=scale, axis=blank), alt.Y("y:Q", scale=scale, axis=blank))
    tooltip = [
        alt.Tooltip("sample:N", title="sample"),
        alt.Tooltip("class:N", title="class"),
        alt.Tooltip("taken:N", title="taken for"),
    ]
    points = rows_of("map").mark_point(filled=True, size=30, opacity=0.75)
    layers: list[Chart] = [
        points.encode(
            x=x,
            y=y,
            color=alt.Color("key:N", scale=colour_scale(keys)),
            shape=alt.Shape("key:N", scale=shape_scale(keys)),
            tooltip=tooltip,
        )
    ]
    if len(names) <= NAMED:
        text = rows_of("middles").mark_text(fontSize=13, fontWeight="bold", limit=140)
        layers.append(text.encode(x=x, y=y, text="class:N"))
    drawn, method = stored["map"], stored["map"]["method"]
    kept = "" if drawn["explained"] is None else f", which keep {percent(sum(drawn['explained']), 0)} of the scatter"
    how = f" Drawn: {len(drawn['x']):,} of {plural(stored['scored'], 'scored sample')}, by {method}"
    chart: Chart = alt.layer(*layers).properties(height=440)
    return Figure("map", [Panel("", chart, keys)], f"{how}{kept}.")
