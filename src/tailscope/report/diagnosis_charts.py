"""The two figures of a diagnosis: the way from the current accuracy to the ceiling, and every class by its count."""

from typing import Any

import altair as alt

from tailscope.report import diagnosis_rows
from tailscope.report.figure import Figure, Panel
from tailscope.report.look import GROUP_KEYS, PART_KEYS, Key, css
from tailscope.report.marks import MANY, Chart, class_tooltip, colour_scale, reference, rows_of
from tailscope.report.results import Result
from tailscope.report.rows import Row

STEP_KEYS = (Key("total", "muted", "bar"), *PART_KEYS.values())
MOST_POINTS = 2_000  # classes drawn; each is a shape in four panels of the page and of every file
# Field, title, format, and the value that means no difference.
SCATTERS: tuple[tuple[str, str, str, float | None], ...] = (
    ("center_shift_excess_deg", "Centre shift beyond chance, degrees", ".1f", 0.0),
    ("escape_rank", "Escape rank (½: no farther out than training samples)", ".2f", 0.5),
    ("nearest_center_true_deg", "Separation: nearest other centre, degrees", ".1f", None),
    ("recall_current", "Recall, current classifier", ".0%", None),
)


def figures(result: Result) -> list[Figure]:
    """Return the figures in the order of the page."""
    found = [scatter(result)]
    return found if result["verdict"] is None else [waterfall(result), *found]


def data(result: Result) -> dict[str, list[Row]]:
    """Return the rows of the charts by name."""
    names = ["name", "group", "count", *(field for field, *_ in SCATTERS)]
    found: dict[str, list[Row]] = {
        "by_count": [{name: row[name] for name in names} for row in _drawn(diagnosis_rows.classes(result))]
    }
    return found if result["verdict"] is None else found | {"steps": diagnosis_rows.steps(result)}


def waterfall(result: Result) -> Figure:
    """Draw what each step adds, from the current accuracy to the ceiling."""
    bars = diagnosis_rows.steps(result)
    lowest = min(0.0, *(min(bar["from"], bar["to"]) for bar in bars))
    x: dict[str, Any] = {"scale": alt.Scale(domain=[lowest, 118], nice=False)}  # room for the numbers on the right
    axis = alt.Axis(title="accuracy, per cent", values=list(range(0, 101, 20)))
    labels = alt.Axis(labelFontSize=13, domain=False, ticks=False, labelLimit=320)
    base = rows_of("steps").encode(y=alt.Y("step:N", sort=[bar["step"] for bar in bars], title=None, axis=labels))
    layers: list[Chart] = [
        base.mark_bar(height=alt.RelativeBandSize(0.55)).encode(
            x=alt.X("from:Q", axis=axis, **x),
            x2="to:Q",
            color=alt.Color("part:N", scale=colour_scale(STEP_KEYS)),
            tooltip=[alt.Tooltip("step:N"), alt.Tooltip("text:N", title="points")],
        ),
        base.mark_rule(strokeWidth=1.6).encode(x=alt.X("low:Q", **x), x2="high:Q"),
        base.mark_text(align="left", dx=6, fontSize=13).encode(x=alt.X("label_at:Q", **x), text="text:N"),
    ]
    return Figure(
        "waterfall",
        "From the current accuracy to the ceiling",
        "Bars laid end to end: what the classifier in use reaches, what re-balancing adds, what a classifier fitted to "
        "the true distribution adds, and what is left for the representation, at most. Whiskers: 95 % intervals of the "
        "accuracy reached, over samples.",
        "",
        [Panel("", alt.layer(*layers).properties(height=44 * len(bars)), STEP_KEYS)],
    )


def scatter(result: Result) -> Figure:
    """Draw measures of every class against its number of training samples."""
    rows = diagnosis_rows.classes(result)
    keys = tuple(key for name, key in GROUP_KEYS.items() if any(row["group"] == name for row in rows))
    panels = [
        Panel(title, _points(field, style, null, len(rows), keys), keys)
        for field, title, style, null in SCATTERS
        if any(row[field] is not None for row in rows)
    ]
    return Figure(
        "scatter",
        "Every class by its number of training samples",
        "One point a class. How far its centre turns when unseen samples join, beyond what so few training samples "
        "explain; how far out unseen samples lie among training samples; how near the next class is; and how many of "
        f"its samples are recognised. Lines mark no difference.{_left_out(len(rows))}",
        "",
        panels,
    )


def _points(field: str, style: str, null: float | None, classes: int, keys: tuple[Key, ...]) -> Chart:
    few = classes <= MANY
    axis = alt.Axis(tickCount=6, format=".0%") if style.endswith("%") else alt.Axis(tickCount=6)
    scale = alt.Scale(domain=[0, 1]) if style.endswith("%") else alt.Scale(zero=False, nice=True)
    drawn = (
        rows_of("by_count")
        .mark_point(filled=True, size=60 if few else 18, opacity=0.9 if few else 0.55)
        .encode(
            x=alt.X("count:Q", title="training samples", scale=alt.Scale(type="symlog"), axis=_counts()),
            y=alt.Y(f"{field}:Q", title=None, scale=scale, axis=axis),
            tooltip=class_tooltip([(field, field.replace("_", " "), style)]),
        )
    )
    drawn = drawn.encode(color=alt.Color("group:N", scale=colour_scale(keys)) if keys else alt.value(css("blue")))
    layers: list[Chart] = [drawn] if null is None else [reference(null), drawn]
    chart: Chart = alt.layer(*layers).properties(height=230)
    return chart


def _drawn(rows: list[Row]) -> list[Row]:
    """Return all classes, or of very many every k-th by rank."""
    return sorted(rows, key=lambda row: row["rank"])[:: _every(len(rows))]


def _every(classes: int) -> int:
    return -(-classes // MOST_POINTS)


def _left_out(classes: int) -> str:
    every = _every(classes)
    return "" if every == 1 else f" Of {classes:,} classes one in {every} by count is drawn; the table has all."


def _counts() -> alt.Axis:
    return alt.Axis(values=[10**k for k in range(7)], format=",d", grid=False)
