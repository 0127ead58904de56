"""The figures of a comparison of methods: accuracies, and the plane of the two gaps."""

from collections.abc import Sequence

import altair as alt

from tailscope.report import comparison, marks
from tailscope.report.comparison import BASELINE, OWN, SHARED
from tailscope.report.marks import Chart, Figure, Key, Panel, colour_scale, css, rows_of
from tailscope.report.rows import Row, ci95
from tailscope.report.schema import PARTS, Comparison
from tailscope.report.text import percent, points, with_interval

KEYS = {
    BASELINE: Key(BASELINE, "ink", "diamond"),
    SHARED: Key(SHARED, "sky", "circle"),
    OWN: Key(OWN, "vermilion", "square"),
}
WIDTH, HEIGHT, LETTER, LINE, BESIDE = 620, 420, 6.4, 13, 9
"""Of the plane, of its names' letters and lines, and between a point and its name: pixels, in files."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


def figures(result: Comparison) -> list[Figure]:
    """Return the figures in the order of the page."""
    found = [_accuracies(result)]
    return [_plane(result), *found] if comparison.gaps_table(result).rows else found


def data(result: Comparison) -> dict[str, list[Row]]:
    """Return the rows of all charts by name."""
    found = []
    for row in comparison.rows(result):
        gain = "" if row["difference"] is None else f", {points(row['difference'], signed=True)}"
        text = with_interval(percent(row["mean"]), ci95(row)) + gain
        at = row["mean"] if row["ci_high"] is None else row["ci_high"]
        found.append(row | {"short": percent(row["mean"]), "text": text, "label_at": at})
    return {"compared": found, "plane": _in_points(found)}


def _in_points(rows: Sequence[Row]) -> list[Row]:
    """Return the methods with known gaps, in points, and where their names stand: on which side, how many pixels up."""
    known = [_against_baseline(row) for row in rows if row["bound"] is not None]
    scaled = [row | {part: 100 * row[part] for part in PARTS} for row in known]
    spots = [_in_pixels(row, scaled) for row in scaled]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    found = []
    for row, (x, y) in zip(scaled, spots, strict=True):
        side, rise = _free(x, y, LETTER * len(row["name"]), taken)
        taken.append(_box(x, y - rise, side, LETTER * len(row["name"])))
        found.append(row | {"side": side, "rise": rise, "sum": row["representation"] + row["classifier"]})
    return found


def _in_pixels(row: Row, rows: Sequence[Row]) -> tuple[float, float]:
    (left, right), (low, high) = (_range(rows, part) for part in PARTS)
    across, up = (row["representation"] - left) / (right - left), (row["classifier"] - low) / (high - low)
    return WIDTH * across, HEIGHT * (1 - up)


def _box(x: float, y: float, side: str, width: float) -> Box:
    left = x + BESIDE if side == "right" else x - BESIDE - width
    return left, y - LINE / 2, left + width, y + LINE / 2


def _free(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[str, int]:
    """Return the place for a name that hides least: beside its point, else a little above or below."""

    def hidden(place: tuple[str, int]) -> float:
        left, top, right, bottom = _box(x, y - place[1], place[0], width)
        outside = max(0.0, -left) + max(0.0, right - WIDTH)
        across = (
            max(0.0, min(right, other[2]) - max(left, other[0])) * max(0.0, min(bottom, other[3]) - max(top, other[1]))
            for other in taken
        )
        return LINE * outside + sum(across)

    places = [(side, rise) for rise in (0, 7, -7, 13, -13, 20, -20) for side in ("right", "left")]
    return min(places, key=hidden)  # the first of those that hide nothing


def _against_baseline(row: Row) -> Row:
    """Return a method's row; without true -> true its representation gap is the difference from the baseline's."""
    if row["representation"] is not None:
        return row
    return row | {"representation": row["representation_change"] or 0.0}


def _range(rows: Sequence[Row], part: str) -> tuple[float, float]:
    """Return the ends of an axis of the plane, in points."""
    known = [row[part] for row in rows]
    room = 0.12 * (max(known) - min(known)) or 1.0
    return min(known) - room, max(known) + room


def _keys(rows: Sequence[Row]) -> list[Key]:
    return [key for kind, key in KEYS.items() if any(row["kind"] == kind for row in rows)]


def _plane(result: Comparison) -> Figure:
    """Draw the methods by what their representation and their classifier lack."""
    rows = data(result)["plane"]
    keys = _keys(rows)
    domains: dict[str, list[float]] = {part: list(_range(rows, part)) for part in PARTS}
    titles: dict[str, str] = {part: f"{part} gap, points" for part in PARTS}
    if result["reference"] is None:
        titles["representation"] = f"representation gap less that of {result['baseline']}, points"

    def axis(kind: type[alt.X] | type[alt.Y], field: str, part: str) -> alt.X | alt.Y:
        scale = alt.Scale(domain=domains[part], nice=False, zero=False)
        return kind(f"{field}:Q", title=titles[part], scale=scale, axis=alt.Axis(tickCount=6))

    at = {"x": axis(alt.X, "representation", "representation"), "y": axis(alt.Y, "classifier", "classifier")}
    base, colour = rows_of("plane"), alt.Color("kind:N", scale=colour_scale(keys))
    written = {"name": "method", "text": "accuracy", "backbone": "trained on"}
    tooltip = [alt.Tooltip(f"{field}:N", title=title) for field, title in written.items()]
    tooltip += [alt.Tooltip(f"{part}:Q", title=titles[part], format=".1f") for part in PARTS]
    layers: list[Chart] = [
        _equal_sums(rows, domains, axis),
        base.mark_point(filled=True, opacity=1, size=90).encode(
            **at, color=colour, shape=alt.Shape("kind:N", scale=marks.shape_scale(keys)), tooltip=tooltip
        ),
        *(
            base.transform_filter(f"datum.side == '{side}' && datum.rise == {rise}")
            .mark_text(align="left" if side == "right" else "right", dx=dx, dy=-rise, fontSize=11)
            .encode(**at, text="name:N")
            for side, dx in (("right", BESIDE), ("left", -BESIDE))
            for rise in sorted({row["rise"] for row in rows if row["side"] == side})
        ),
    ]
    return Figure("plane", [Panel("", alt.layer(*layers).properties(height=HEIGHT), keys)], " The table has intervals.")


def _equal_sums(rows: Sequence[Row], domains: dict[str, list[float]], axis: object) -> alt.Chart:
    """Draw the line of all pairs of gaps that leave the baseline's accuracy."""
    assert callable(axis)
    total = next(row["sum"] for row in rows if row["kind"] == BASELINE)
    low, high = domains["classifier"]
    first, last = (min(max(end, total - high), total - low) for end in domains["representation"])
    line = alt.Chart(alt.InlineData(values=[{"x": x, "y": total - x} for x in (first, last)]))
    drawn = line.mark_line(strokeDash=[4, 4], strokeWidth=1.2, color=css("muted"), clip=True)
    encoded: alt.Chart = drawn.encode(x=axis(alt.X, "x", "representation"), y=axis(alt.Y, "y", "classifier"))
    return encoded


def _accuracies(result: Comparison) -> Figure:
    """Draw each method's accuracy with its interval, the most accurate first."""
    rows = data(result)["compared"]
    keys = _keys(rows)
    low = min(row["mean"] if row["ci_low"] is None else row["ci_low"] for row in rows)
    high = max(row["label_at"] for row in rows)
    scale = alt.Scale(domain=[low - 0.02, high + 0.6 * (high - low) + 0.02], nice=False, zero=False)
    title = "accuracy on test images"
    ticks = [tick / 20 for tick in range(21) if low - 0.02 <= tick / 20 <= high + 0.05]
    axis = alt.Axis(format=".0%", title=title, values=ticks, labelSeparation=8)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", scale=scale, axis=axis)

    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None, axis=alt.Axis(ticks=False, labelFontSize=13))
    base, colour = rows_of("compared").encode(y=y), alt.Color("kind:N", scale=colour_scale(keys))
    tooltip = [alt.Tooltip("name:N", title="method"), alt.Tooltip("text:N", title="accuracy")]
    layers: list[Chart] = [
        base.mark_rule(strokeWidth=1.4, color=css("muted")).encode(x=x("ci_low"), x2="ci_high"),
        base.mark_point(filled=True, opacity=1, size=80).encode(
            x=x("mean"), color=colour, shape=alt.Shape("kind:N", scale=marks.shape_scale(keys)), tooltip=tooltip
        ),
        marks.numbers(base, 12).encode(x=x("label_at")),
    ]
    whiskers = " Thin lines are 95 % intervals." if any(row["ci_low"] is not None for row in rows) else ""
    return Figure("methods", [Panel("", alt.layer(*layers).properties(height=26 * len(rows)), keys)], whiskers)
