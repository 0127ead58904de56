"""All figures that the results of one folder allow, and the rows that they are drawn from."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import altair as alt

from tailscope.measures.fields import SHOWN
from tailscope.report import marks, rows, story
from tailscope.report.marks import Chart, Figure, Key, Panel, Series, colour_scale, css, rows_of
from tailscope.report.rows import Row, first
from tailscope.report.schema import VARIANTS, Results, Swap
from tailscope.report.text import arrow, number, percent, plural, points, with_interval


def figures(results: Results) -> list[Figure]:
    """Return the figures in the order of the page."""
    found = [_profile(results)]
    if "swap" in results:
        found += [_figure2(results), _by_class(results)]
        if results["swap"]["attribution"] is not None:
            found.insert(0, _attribution(results))
    if "ladder" in results:
        found.append(_figure3(results))
    if "geometry" in results:
        found += [figure for variant in VARIANTS for figure in _geometry(results, variant)]
    return found


def data(results: Results) -> dict[str, list[Row]]:
    """Return the rows of all charts by name."""
    found = {"profile": rows.profile(results)}
    if "swap" in results:
        swap, classes, cells = results["swap"], rows.classes(results), _labelled(rows.cells(results))
        found["attribution"] = _waterfall(rows.attribution(results))
        found["cells"] = [row | {"label": arrow(row["cell"]), "key": _backbone(row["backbone"])} for row in cells]
        found["cell_seeds"] = [
            {"cell": name, "seed": seed, "accuracy": value, "label": arrow(name)}
            for name in rows.ordered_cells(swap)
            for seed, value in zip(swap["seeds"], swap["cells"][name]["accuracy"], strict=True)
        ]
        found["recalls"] = [row | {one.field: row.get(cell) for cell, one in CELL_SERIES.items()} for row in classes]
        found["losses"] = _losses(classes)
    if "ladder" in results:
        found["ladder"] = _labelled(rows.ladder(results))
    if "geometry" in results:
        found |= {f"geometry_{variant}": rows.geometry_classes(results, variant) for variant in VARIANTS}
    return found


# ---- the gap, Figure 2 and Figure 3: horizontal charts of accuracies with intervals

ACCURACY = "accuracy on test images"
PRINTED = " Upright ticks are the numbers that the paper printed."
RUNG_KEYS = (
    Key(rows.STAGES["stage1"], "muted", "circle"),
    Key(rows.STAGES["stage2"], "sky", "square"),
    Key(rows.STAGES["stage2_aa"], "blue", "triangle-up"),
    Key(rows.STAGES["bound"], "green", "diamond"),
)


def _attribution(results: Results) -> Figure:
    """Draw the gap and its two parts as a waterfall with intervals."""
    steps = _waterfall(rows.attribution(results))
    edges = [0.0, *(row[name] for row in steps for name in ("low", "high", "end") if row[name] is not None)]
    low, high = min(edges), max(edges)
    scale = alt.Scale(domain=[low, high + (high - low) * 0.6], nice=False)  # room for the numbers on the right
    ticks = [tick for tick in range(-100, 101, 5 if high - low < 30 else 10) if low <= tick <= high]
    axis = alt.Axis(title="percentage points of accuracy", values=ticks, labelSeparation=8)
    chart = marks.waterfall("attribution", steps, [Key("gap", "muted"), *marks.PART_KEYS.values()], scale, axis)
    return Figure("attribution", [Panel("", chart)], _whiskers(results["swap"]))


def _figure2(results: Results) -> Figure:
    """Draw Figure 2: accuracy of every pair of backbone and classifier, with intervals and single seeds."""
    swap, stored = results["swap"], rows.cells(results)
    present = {row["backbone"] for row in stored}
    printed, several = any(row["paper"] is not None for row in stored), len(swap["seeds"]) > 1
    keys = [Key(_backbone(name), key.colour, "bar") for name, key in marks.BACKBONE_KEYS.items() if name in present]
    keys += [marks.PAPER_KEY] if printed else []
    order = [arrow(row["cell"]) for row in stored]
    y = alt.Y("label:N", sort=order, title="backbone → classifier", axis=alt.Axis(labelFontSize=13, ticks=False))
    base = rows_of("cells").encode(y=y)
    pair = alt.Tooltip("label:N", title="backbone → classifier")
    colour = alt.Color("key:N", scale=colour_scale(keys))
    tooltip = [pair, alt.Tooltip("text:N", title="accuracy")]
    layers = marks.bars(base, _unit, ("mean", None), ("ci_low", "ci_high"), colour, tooltip, 12)
    if printed:
        layers.append(_paper_ticks(base, keys, 30).encode(x=_unit("paper")))
    if several:
        seeds = rows_of("cell_seeds").mark_point(filled=True, size=16, opacity=1, color=css("ink"))
        tooltip = [pair, alt.Tooltip("seed:N"), alt.Tooltip("accuracy:Q", format=".2%")]
        layers.append(seeds.encode(y=y, x=_unit("accuracy"), tooltip=tooltip))
    panel = Panel("", alt.layer(*layers).properties(height=34 * len(stored)), keys)
    note = f"{_whiskers(swap)}{' Dots are single seeds.' if several else ''}{PRINTED if printed else ''}"
    return Figure("fig2", [panel], note, story.swap_reading(swap))


def _figure3(results: Results) -> Figure:
    """Draw Figure 3: accuracy of every rung for every augmentation of stage 1."""
    stored = rows.ladder(results)
    rungs = [key for key in RUNG_KEYS if any(row["rung_label"] == key.label for row in stored)]
    paper = [row["paper"] for row in stored if row["paper"] is not None]
    keys = [*rungs, *([marks.PAPER_KEY] if paper else [])]
    lines = "split(replace(datum.label, ' + ', '|+ '), '|')"  # a narrow chart has no room for long labels
    order = list(dict.fromkeys(row["augmentation_label"] for row in stored))
    axis = alt.Axis(ticks=False, labelExpr=lines)
    base = rows_of("ladder").encode(
        y=alt.Y("augmentation_label:N", sort=order, title="augmentation of stage 1", axis=axis),
        yOffset=alt.YOffset("rung_label:N", sort=[key.label for key in rungs]),
    )
    known = [row[end] for row in stored for end in ("mean", "ci_low", "ci_high") if row[end] is not None]
    x = marks.zoomed([*paper, *known], ACCURACY)
    tooltip = {"augmentation_label": "stage 1", "rung_label": "rung", "text": "accuracy"}
    layers = marks.dots(base, x, "rung_label", keys, tooltip)
    if paper:
        layers.insert(1, _paper_ticks(base, keys, 17).encode(x=x("paper")))
    panel = Panel("", alt.layer(*layers).properties(height=22 * len(stored)), keys)
    return Figure("fig3", [panel], PRINTED if paper else "")


def _unit(field: str) -> alt.X:
    axis = alt.Axis(format=".0%", values=[0, 0.2, 0.4, 0.6, 0.8, 1.0], title=ACCURACY, labelSeparation=8)
    return alt.X(f"{field}:Q", scale=alt.Scale(domain=[0, 1.4], nice=False), axis=axis)


def _paper_ticks(base: alt.Chart, keys: Sequence[Key], height: int) -> alt.Chart:
    """Mark the paper's number of each row that it printed, with an upright line of so many pixels."""
    printed = base.transform_filter("isValid(datum.paper)").mark_point(filled=True, opacity=1, size=height**2)
    colour = alt.ColorDatum(marks.PAPER_KEY.label, scale=colour_scale(keys))
    shape = alt.ShapeDatum(marks.PAPER_KEY.label, scale=marks.shape_scale(keys))
    tooltip = [alt.Tooltip("paper:Q", title=marks.PAPER_KEY.label, format=".2%")]
    return cast(alt.Chart, printed.encode(color=colour, shape=shape, tooltip=tooltip))


def _backbone(name: str) -> str:
    return f"backbone trained on {name}"


def _labelled(stored: list[Row]) -> list[Row]:
    """Add each number as text, with its interval, and where to write it.

    Beside the paper's numbers they form a column: next to the paper's mark, ours would be taken for the paper's.
    """
    found = []
    for row in stored:
        bounds = rows.ci95(row)
        short, paper = percent(row["mean"]), row["paper"]
        text = with_interval(short, bounds) + ("" if paper is None else f", paper {number(100 * paper, 1)}")
        end = max(row["mean"], row["highest"], *(bounds or ()), paper or 0.0)
        found.append(row | {"short": short, "text": text, "label_at": end})
    if any(row["paper"] is not None for row in stored):
        column = max(row["label_at"] for row in found)
        found = [row | {"label_at": column} for row in found]
    return found


def _waterfall(attribution: list[Row]) -> list[Row]:
    """Lay the gap and its two parts end to end, in points; the interaction is no part of the sum."""
    found = []
    start = 0.0
    for row in attribution[:3]:
        part, end = row["part"], start + 100 * row["points"]
        low, high = (None if bound is None else start + 100 * bound for bound in (row["ci_low"], row["ci_high"]))
        share = "" if row["share"] is None else f"  =  {percent(row['share'], 0)}"
        text = {
            "short": points(row["points"]) + share,
            "text": with_interval(points(row["points"]), rows.ci95(row)) + share,
        }
        at = max(start, end, end if high is None else high)
        bar = {"step": part, "part": part, "start": start, "end": end, "low": low, "high": high, "label_at": at}
        found.append(bar | text)
        start = 0.0 if part == "gap" else end
    return found


def _whiskers(swap: Swap) -> str:
    known = any(cell["ci95"] is not None for cell in swap["cells"].values())
    return " Thin lines are 95 % intervals." if known else ""


# ---- class by class

LABELLED = 12  # classes; up to here bars carry their number
BINS = 50  # bars where classes are many: neighbours in frequency are averaged
CELL_SERIES = {
    "lt->lt": Series("recalls", "lt_lt", Key("lt → lt", "vermilion", "circle")),
    "lt->true": Series("recalls", "lt_true", Key("lt → true", "orange", "triangle-up", (6, 3))),
    "true->lt": Series("recalls", "true_lt", Key("true → lt", "sky", "diamond", (6, 3))),
    "true->true": Series("recalls", "true_true", Key("true → true", "green", "square")),
}
RULES = {
    "counts": "Head (many-shot) classes have over 100 images, body (medium-shot) 20 to 100, tail (few-shot) below 20.",
    "thirds": "Head, body and tail (many-, medium- and few-shot) are thirds of the classes by frequency.",
}


def _profile(results: Results) -> Figure:
    """Draw training images a class against frequency rank, by group."""
    classes = rows.profile(results)
    keys = [key for name, key in marks.GROUP_KEYS.items() if any(row["group"] == name for row in classes)]
    half = 0.4 if len(classes) <= 100 else 0.5
    log = marks.log_axis([row["count"] for row in classes], 2, grid=True)
    floor, none = log["scale"]["domain"][0], sum(not row["count"] for row in classes)
    y = alt.Y("top:Q", title="training images", **log)
    base = rows_of("profile").transform_calculate(top=f"max(datum.count, {floor})")
    bars = base.transform_calculate(left=f"datum.rank - {half}", right=f"datum.rank + {half}").mark_bar()
    tooltip = marks.class_tooltip([("rank", "frequency rank", "d")])
    encoded = bars.encode(x=marks.rank_axis(classes, "left"), x2="right:Q", y=y, y2=alt.Y2Datum(floor), tooltip=tooltip)
    if keys:
        encoded = encoded.encode(color=alt.Color("group:N", scale=colour_scale(keys)))
    layers: list[Chart] = [encoded]
    if len(classes) <= LABELLED or none:
        text = base.mark_text(dy=-8, color=css("muted"))
        text = text if len(classes) <= LABELLED else text.transform_filter("!datum.count")
        layers.append(text.encode(x=marks.rank_axis(classes), y=y, text=alt.Text("count:Q", format=",d")))
    rule = RULES.get(first(results)["groups_rule"], "") if keys else "Too few classes for head, body and tail."
    missing = f" {plural(none, 'class')} without images: a 0, for such a scale has none." if none else ""
    note = f"{missing} {rule}"
    return Figure("profile", [Panel("", alt.layer(*layers).properties(height=220), keys)], note)


def _by_class(results: Results) -> Figure:
    """Draw recall by class for the four pairs, and each class's split of the gap."""
    found = rows.profile(results)
    y = {"title": "recall", "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format=".0%", tickCount=6)}
    keys = list(marks.PART_KEYS.values())
    tooltip = [
        alt.Tooltip("label:N", title="class"),
        *(alt.Tooltip(f"{part}:Q", title=f"{part}, points", format=".1f") for part in ("gap", *marks.PART_KEYS)),
    ]
    bars: list[Chart] = [
        rows_of("losses")
        .transform_calculate(series=marks.quoted(key.label))
        .mark_bar()
        .encode(
            x=marks.rank_axis(found, "left"),
            x2="right:Q",
            y=alt.Y(f"{part}_from:Q", title="points lost"),
            y2=f"{part}_to:Q",
            color=alt.Color("series:N", scale=colour_scale(keys)),
            tooltip=tooltip,
        )
        for part, key in marks.PART_KEYS.items()
    ]
    bounds = marks.group_bounds(found)
    series = [one for cell, one in CELL_SERIES.items() if cell in results["swap"]["cells"]]
    recall = alt.layer(*marks.lines(series, found, y, ".0%"), *bounds).properties(height=260)
    panels = [Panel("Recall (backbone → classifier)", recall, [one.key for one in series])]
    meaning = ""
    if results["swap"]["attribution"] is not None:
        meaning = "Its gap, between the full and the long-tailed set, splits into what the representation and what the "
        meaning += "classifier costs the class. "
        panels.append(Panel("Points lost, and to what", alt.layer(*bars, *bounds).properties(height=260), keys))
    return Figure("classes", panels, f" {meaning}{story.noise_of_recall(first(results))}")


def _losses(classes: Sequence[Row]) -> list[Row]:
    """Stack each class's two parts, in points; where classes are many, average neighbours in frequency."""
    known = sorted((row for row in classes if row["gap"] is not None), key=lambda row: row["rank"])
    size = math.ceil(len(known) / BINS) if len(known) > 2 * BINS else 1
    found = []
    for start in range(0, len(known), size):
        members = known[start : start + size]
        means = {part: 100 * sum(row[part] for row in members) / len(members) for part in ("gap", *marks.PART_KEYS)}
        head, tail = members[0], members[-1]
        label = head["name"] if size == 1 else f"ranks {head['rank']} to {tail['rank']}, mean"
        same_sign = means["representation"] * means["classifier"] > 0
        base = means["representation"] if same_sign else 0.0
        half = 0.38 if size == 1 else 0.5
        bar = {"label": label, "left": head["rank"] - half, "right": tail["rank"] + half, **means}
        bar |= {"representation_from": 0.0, "representation_to": means["representation"]}
        found.append(bar | {"classifier_from": base, "classifier_to": base + means["classifier"]})
    return found


# ---- geometry

HEIGHT = 240
SEEN = Key("training samples", "ink", "circle")
ALL = Key("with unseen samples", "blue", "triangle-up", (6, 3))
SHIFT = Key("centre shift", "purple", "diamond", (2, 2))
NEAREST = {
    "nearest_center_train_deg": Key("centre to centre, training", "ink", "circle"),
    "nearest_center_true_deg": Key("centre to centre, with unseen", "blue", "triangle-up", (6, 3)),
    "nearest_center_sample_train_deg": Key("sample to centre, training", "muted", "square", (2, 2)),
    "nearest_center_sample_true_deg": Key("sample to centre, with unseen", "sky", "diamond", (1, 3)),
}
LOCAL = {"center_shift_deg": SHIFT, "spread_train_deg": SEEN, "spread_true_deg": ALL}
GAP_EXTRA = (("spread_gap_q", "q, mean over seeds", ".3f"), ("spread_gap_flags", "seeds with q ≤ 0.05", "d"))
SHIFT_EXTRA = (
    ("center_shift_deg", "raw shift", ".2f"),
    ("center_shift_null_deg", "by chance", ".2f"),
    ("center_shift_q", "q, mean over seeds", ".3f"),
    ("center_shift_flags", "seeds with q ≤ 0.05", "d"),
)


class _Drawing:
    """Draws the panels of one variant; panels of a figure share their scale, so that encoders can be compared."""

    def __init__(self, results: Results, variant: str) -> None:
        self.data = f"geometry_{variant}"
        self.classes = rows.profile(results)
        self.rows = rows.geometry_classes(results, variant)
        self.keys = {name: marks.ENCODER_KEYS.get(name, marks.OTHER) for name in rows.encoders(results)}

    def paper(self) -> dict[str, list[Panel]]:
        return {
            "fig4": [self.encoders("variance"), self.encoders("covariance_norm")],
            "fig5": [self.encoders("first_pc_share", zero=True)],
            "fig6": [*(self.compactness(name) for name in self.keys), self.encoders("escape_rate", zero=True)],
            "fig7": [self.within(name, NEAREST) for name in self.keys],
            "fig8": [self.within(name, LOCAL, zero=True) for name in self.keys],
        }

    def calibrated(self) -> dict[str, list[Panel]]:
        gap = self.encoders("spread_gap_deg", flags="spread_gap_flags", extra=GAP_EXTRA)
        shift = self.encoders("center_shift_excess_deg", flags="center_shift_flags", extra=SHIFT_EXTRA)
        return {
            "fig4": [self.encoders("covariance_norm_unbiased"), self.encoders("variance_ratio")],
            "fig5": [self.brackets(), self.encoders("effective_rank")],
            "fig6": [gap, self.encoders("escape_rank")],
            "fig7": [self.within(name, NEAREST) for name in self.keys],
            "fig8": [shift, self.encoders("displacement")],
        }

    def encoders(self, field: str, *, zero: bool = False, **series: Any) -> Panel:
        """Draw one measure for every encoder, and a line where it means no difference."""
        measure = SHOWN[field]
        drawn = [Series(self.data, field, key, name, ranged=True, **series) for name, key in self.keys.items()]
        y = self._y([field], measure.unit, zero=zero, include=measure.null)
        layers = [*marks.reference(measure.null), *marks.lines(drawn, self.classes, y, marks.FORMATS[measure.unit])]
        return self._panel(measure.title, layers, self.keys.values())

    def within(self, encoder: str, fields: dict[str, Key], *, zero: bool = False) -> Panel:
        y = self._y(fields, "degrees", zero=zero)
        drawn = [Series(self.data, field, key, encoder, ranged=True) for field, key in fields.items()]
        return self._panel(
            f"encoder {encoder}", marks.lines(drawn, self.classes, y, marks.FORMATS["degrees"]), fields.values()
        )

    def compactness(self, encoder: str) -> Panel:
        """Draw the distribution of angles to the training samples' centre, of them alone and with unseen ones."""
        sides = (("train", SEEN, -0.17), ("true", ALL, 0.17))
        y = self._y([f"{side}_{q}" for side, _, _ in sides for q in ("q05", "q95")], "degrees", zero=True)
        layers: list[Chart] = []
        for side, key, offset in sides:
            for low, high, width, opacity in (("q05", "q95", 1.2, 0.9), ("q25", "q75", 5, 0.5)):
                one = Series(self.data, f"{side}_{low}", key, encoder, offset=offset)
                layers.append(marks.span(one, f"{side}_{high}", self.classes, y, width=width, opacity=opacity))
        drawn = [Series(self.data, f"{side}_q50", key, encoder, offset=offset) for side, key, offset in sides]
        layers += marks.lines(drawn, self.classes, y, marks.FORMATS["degrees"])
        return self._panel(f"encoder {encoder}", layers, (SEEN, ALL))

    def brackets(self) -> Panel:
        low, high = "first_pc_share_low", "first_pc_share_high"
        y, middle = self._y((low, high), "share", zero=True), (len(self.keys) - 1) / 2
        layers: list[Chart] = []
        for place, (name, key) in enumerate(self.keys.items()):
            one = Series(self.data, low, key, name, offset=0.2 * (place - middle))
            layers.append(marks.span(one, high, self.classes, y, width=4, opacity=0.9))
        return self._panel("First PC share, between its brackets", layers, self.keys.values())

    def _y(self, fields: Iterable[str], kind: str, *, zero: bool, include: object = None) -> dict[str, Any]:
        """Return a y axis that holds the fields of all encoders with their ranges over seeds."""
        names = [f"{field}{end}" for field in fields for end in ("", "_min", "_max")]
        values = [row[name] for row in self.rows for name in names if row.get(name) is not None]
        values += [include] if isinstance(include, int | float) else []
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        low = min(low, 0.0) if zero else low
        room = 0.05 * (high - low) or 1.0
        scale = alt.Scale(domain=[low if zero and low == 0 else low - room, high + room], nice=False, zero=False)
        axis = alt.Axis(tickCount=6, format=".0%") if kind == "share" else alt.Axis(tickCount=6)
        return {"title": "degrees" if kind == "degrees" else None, "scale": scale, "axis": axis}

    def _panel(self, title: str, layers: Sequence[Chart], keys: Iterable[Key]) -> Panel:
        chart = alt.layer(*marks.group_bounds(self.classes), *layers).properties(height=HEIGHT)
        return Panel(title, chart, tuple(keys))


def _geometry(results: Results, variant: str) -> list[Figure]:
    """Draw Figures 4 to 8 in one variant, "paper" or "calibrated"."""
    drawing = _Drawing(results, variant)
    panels = drawing.paper() if variant == "paper" else drawing.calibrated()
    readings = story.readings(results, variant)
    ranged = len(drawing.classes) <= marks.MANY and len(first(results)["seeds"]) > 1
    note = " Lines join means over seeds; thin strokes at their points are the range over seeds." if ranged else ""
    suffix = "" if variant == "paper" else "-calibrated"
    return [Figure(f"{name}{suffix}", drawn, note, readings[name], variant) for name, drawn in panels.items()]
