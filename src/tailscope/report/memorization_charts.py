"""The figures of memorisation: what networks get right with and without an image, and the spread gap beside it."""

from typing import Any

import altair as alt

from tailscope.report import marks, memorization
from tailscope.report.marks import Chart, Figure, Key, Panel, Series, css, rows_of
from tailscope.report.rows import Row
from tailscope.report.schema import Memorization

KEPT = Key("trained on them", "green", "circle")
LEFT_OUT = Key("not trained on them", "vermilion", "diamond", (6, 3))
MEMORISED = Key("memorisation", "purple", "square")
GAP = Key("spread gap", "blue", "triangle-up")
HEIGHT = 250


def figures(result: Memorization) -> list[Figure]:
    """Return the figures in the order of the page."""
    return [_memorised(result), _beside(result)]


def data(result: Memorization) -> dict[str, list[Row]]:
    """Return the rows of the charts by name; the ends of intervals are `_min` and `_max`."""
    return {
        "memorized": [
            row
            | {"memorization_min": row["ci_low"], "memorization_max": row["ci_high"]}
            | {"spread_gap_deg_min": row["gap_low"], "spread_gap_deg_max": row["gap_high"]}
            for row in memorization.rows(result)
        ]
    }


def _memorised(result: Memorization) -> Figure:
    """Draw recall with and without an image, and their difference, class by class."""
    classes = data(result)["memorized"]
    unit = {"title": "right", "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format=".0%", tickCount=6)}
    recalls = [Series("memorized", name, key) for name, key in (("recall_kept", KEPT), ("recall_left_out", LEFT_OUT))]
    panels = [
        _panel("Right among a class’s images", recalls, classes, unit, ".0%"),
        _panel(
            "Memorisation: the difference",
            [Series("memorized", "memorization", MEMORISED, ranged=True)],
            classes,
            _axis(classes, "memorization", None),
            ".2f",
        ),
    ]
    several = any(row["ci_low"] is not None for row in classes)
    return Figure("memorised", panels, " Thin strokes are 95 % intervals, for other trainings." if several else "")


def _beside(result: Memorization) -> Figure:
    """Draw the spread gap of each class, and against it how much is memorised."""
    classes = data(result)["memorized"]
    y = _axis(classes, "spread_gap_deg", "degrees")
    gaps = [Series("memorized", "spread_gap_deg", GAP, ranged=True)]
    panels = [_panel("Spread gap", gaps, classes, y, ".2f"), Panel("Memorisation against it", _scatter(classes))]
    known = any(row["gap_low"] is not None for row in classes)
    return Figure("beside-gap", panels, " Thin strokes are 95 % intervals, for other seeds." if known else "")


def _panel(title: str, series: list[Series], classes: list[Row], y: dict[str, Any], style: str) -> Panel:
    layers = [*marks.lines(series, classes, y, style), *marks.group_bounds(classes)]
    keys = [one.key for one in series] if len(series) > 1 else []
    return Panel(title, alt.layer(*layers).properties(height=HEIGHT), keys)


def _axis(classes: list[Row], field: str, title: str | None) -> dict[str, Any]:
    """Return an axis that holds a field and its interval, and 0."""
    names = (field, f"{field}_min", f"{field}_max")
    values = [row[name] for row in classes for name in names if row[name] is not None] or [0.0, 1.0]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.05 * (high - low) or 1.0
    scale = alt.Scale(domain=[low - room, high + room], nice=False, zero=False)
    return {"title": title, "scale": scale, "axis": alt.Axis(tickCount=6)}


def _scatter(classes: list[Row]) -> Chart:
    x = alt.X("spread_gap_deg:Q", **_axis(classes, "spread_gap_deg", "spread gap, degrees"))
    y = alt.Y("memorization:Q", **_axis(classes, "memorization", "memorisation"))
    known = "isValid(datum.spread_gap_deg) && isValid(datum.memorization)"
    base = rows_of("memorized").transform_filter(known).encode(x=x, y=y)
    tooltip = marks.class_tooltip(
        [("memorization", "memorisation", ".2f"), ("spread_gap_deg", "spread gap, degrees", ".1f")]
    )
    few = len(classes) <= marks.NAMED
    points = base.mark_point(filled=True, opacity=1 if few else 0.5, size=55 if few else 20, color=css("purple"))
    layers: list[Chart] = [points.encode(tooltip=tooltip)]
    if few:
        layers.append(base.mark_text(align="left", dx=7, dy=-5, fontSize=11, limit=90).encode(text="name:N"))
    drawn: Chart = alt.layer(*layers).properties(height=HEIGHT)
    return drawn
