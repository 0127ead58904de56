"""The few chart forms that the figures are made of. Charts name their data; rows are added when drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from tailscope.report.look import Key, css
from tailscope.report.rows import Row

Chart = alt.Chart | alt.LayerChart | alt.FacetChart
MANY = 40  # classes; beyond, single points fade and a running mean carries the trend
VEGA_SHAPES = {"bar": "square", "tick": "M-0.1,-1L0.1,-1L0.1,1L-0.1,1Z"}
NAMED = 20  # classes; up to here the axis names them


@dataclass(frozen=True)
class Series:
    """One field drawn as a line with points.

    Attributes:
        data: name of the rows.
        field: the rows' field on the y axis.
        key: its entry in the legend.
        encoder: keeps the rows of this encoder, None all.
        flags: field that counts the seeds in which a class was found significant; other points are hollow.
        extra: (field, title, format) of further tooltip lines.
        ranged: whether the rows hold the field's range over seeds, drawn as a thin rule.
        offset: where the points stand beside their rank, in ranks; such series have no line unless classes are many.
    """

    data: str
    field: str
    key: Key
    encoder: str | None = None
    flags: str | None = None
    extra: Sequence[tuple[str, str, str]] = ()
    ranged: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Span:
    """The range between the fields `low` and `high`; `offset`, in ranks, keeps neighbours from hiding each other."""

    data: str
    encoder: str
    key: Key
    low: str
    high: str
    offset: float
    width: float
    opacity: float


def colour_scale(keys: Sequence[Key]) -> alt.Scale:
    """Return the scale from the keys' labels to their colours."""
    return alt.Scale(domain=[key.label for key in keys], range=[css(key.colour) for key in keys])


def shape_scale(keys: Sequence[Key]) -> alt.Scale:
    """Return the scale from the keys' labels to their shapes as Vega knows them."""
    shapes = [VEGA_SHAPES.get(key.shape, key.shape) for key in keys]
    return alt.Scale(domain=[key.label for key in keys], range=shapes)


def rank_axis(classes: Sequence[Row], field: str = "rank") -> alt.X:
    """Return the x axis of class frequency ranks, most frequent first; few classes are named on it."""
    count = len(classes)
    scale = alt.Scale(domain=[0.5, count + 0.5], nice=False, zero=False)
    if count > NAMED:
        axis = alt.Axis(title="class frequency rank, most frequent first", grid=False, format="d")
        return alt.X(f"{field}:Q", scale=scale, axis=axis)
    names = [row["name"] for row in sorted(classes, key=lambda row: row["rank"])]
    array = "[" + ",".join(quoted(name) for name in names) + "]"
    long = max(len(name) for name in names) > 3
    axis = alt.Axis(
        title="class, most frequent first",
        values=list(range(1, count + 1)),
        labelExpr=f"{array}[datum.value - 1]",
        labelAngle=-40 if long else 0,
        labelLimit=90,
        labelOverlap=False,
        grid=False,
    )
    return alt.X(f"{field}:Q", scale=scale, axis=axis)


def group_bounds(classes: Sequence[Row]) -> list[Chart]:
    """Return thin rules between the groups with their names on top, where groups follow frequency."""
    ordered = [row["group"] for row in sorted(classes, key=lambda row: row["rank"])]
    changes = [k for k in range(1, len(ordered)) if ordered[k] != ordered[k - 1]]
    if None in ordered or len(changes) != len(set(ordered)) - 1:
        return []
    starts = [0, *changes]
    labels = [{"at": start + 0.5, "group": ordered[start]} for start in starts]
    base = alt.Chart(alt.InlineData(values=labels))
    text = base.mark_text(align="left", dx=4, dy=-8, fontSize=11, color=css("muted"))
    found: list[Chart] = [text.encode(x=rank_axis(classes, "at"), y=alt.value(0), text="group:N")]
    if changes:
        rules = alt.Chart(alt.InlineData(values=[{"at": k + 0.5} for k in changes]))
        found.append(rules.mark_rule(color=css("line"), strokeDash=[2, 3]).encode(x=rank_axis(classes, "at")))
    return found


def reference(value: float) -> Chart:
    """Return a horizontal line at the value that means "no difference"."""
    drawn: alt.Chart = alt.Chart(alt.InlineData(values=[{"y": value}])).mark_rule(strokeWidth=1).encode(y="y:Q")
    return drawn


def class_tooltip(fields: Sequence[tuple[str, str, str]]) -> list[alt.Tooltip]:
    """Return a tooltip that names the class, then the given (field, title, format)."""
    about = [
        alt.Tooltip("name:N", title="class"),
        alt.Tooltip("group:N", title="group"),
        alt.Tooltip("count:Q", title="training images", format=",d"),
    ]
    return [*about, *(alt.Tooltip(f"{field}:Q", title=title, format=style) for field, title, style in fields)]


def lines(series: Sequence[Series], classes: Sequence[Row], y: dict[str, Any], style: str = ".1f") -> list[Chart]:
    """Return each series as a line with points by rank; beyond `MANY` classes as faint points and a running mean.

    Args:
        series: what to draw, in the order of the legend.
        classes: one row a class, for the axis.
        y: arguments of the y axis, shared by the series.
        style: number format of the tooltip.
    """
    keys = list({one.key.label: one.key for one in series}.values())
    shape = alt.Shape("series:N", scale=shape_scale(keys))
    trends: list[Chart] = []
    points: list[Chart] = []
    for one in series:
        offset = one.offset if len(classes) <= MANY else 0.0
        base = rows_of(one.data, one.encoder).transform_calculate(series=quoted(one.key.label))
        encoded = placed(base, classes, offset).encode(
            y=alt.Y(f"{one.field}:Q", **y), color=alt.Color("series:N", scale=colour_scale(keys))
        )
        if not offset:
            trends.append(_trend(encoded, one, len(classes)))
        if one.ranged and len(classes) <= MANY:
            trends.append(encoded.mark_rule(opacity=0.7).encode(y=f"{one.field}_min:Q", y2=f"{one.field}_max:Q"))
        tooltip = class_tooltip([(one.field, one.key.label, style), *one.extra])
        points += [spot.encode(shape=shape, tooltip=tooltip) for spot in _spots(encoded, one.flags, len(classes))]
    return [*trends, *points]


def rows_of(data: str, encoder: str | None = None) -> alt.Chart:
    """Return an empty chart of the named rows, of one encoder where it is given."""
    base = alt.Chart(alt.NamedData(name=data))
    return base if encoder is None else base.transform_filter(alt.FieldEqualPredicate(equal=encoder, field="encoder"))


def placed(base: alt.Chart, classes: Sequence[Row], offset: float = 0.0) -> alt.Chart:
    """Put a chart's marks at the classes' ranks, `offset` ranks to the right so that neighbours do not hide."""
    if not offset:
        return base.encode(x=rank_axis(classes))
    return base.transform_calculate(at=f"datum.rank + {offset}").encode(x=rank_axis(classes, "at"))


def smoothed(base: alt.Chart, classes: int, **fields: str) -> alt.Chart:
    """Add running means over 5 % of the classes, by rank: new name = field."""
    half = max(1, classes // 40)
    means: list[Any] = [{"op": "mean", "field": field, "as": name} for name, field in fields.items()]
    return base.transform_window(means, frame=[-half, half], sort=[alt.SortField("rank")])


def span(one: Span, classes: Sequence[Row], y: dict[str, Any]) -> alt.Chart:
    """Return the range between two fields: a rule a class, beyond `MANY` classes a band of running means."""
    base = rows_of(one.data, one.encoder)
    colour = css(one.key.colour)
    drawn: alt.Chart
    if len(classes) > MANY:
        band = smoothed(base, len(classes), low=one.low, high=one.high).mark_area(opacity=0.16, color=colour)
        drawn = band.encode(x=rank_axis(classes), y=alt.Y("low:Q", **y), y2="high:Q")
    else:
        rule = placed(base, classes, one.offset).mark_rule(color=colour, strokeWidth=one.width, opacity=one.opacity)
        drawn = rule.encode(y=alt.Y(f"{one.low}:Q", **y), y2=f"{one.high}:Q")
    return drawn


def _trend(encoded: alt.Chart, one: Series, classes: int) -> alt.Chart:
    dash = list(one.key.dash) or [1, 0]
    drawn: alt.Chart
    if classes <= MANY:
        drawn = encoded.mark_line(strokeWidth=1.6, opacity=0.75, strokeDash=dash)
    else:
        drawn = smoothed(encoded, classes, smoothed=one.field).mark_line(strokeDash=dash).encode(y="smoothed:Q")
    return drawn


def _spots(encoded: alt.Chart, flags: str | None, classes: int) -> list[Chart]:
    """Return a series' points; those without a flag in most seeds are hollow. Many are small and faint."""
    if classes > MANY:
        return [encoded.mark_point(filled=True, size=8, opacity=0.3)]
    solid = encoded.mark_point(filled=True, opacity=1)
    if flags is None:
        return [solid]
    hollow = encoded.mark_point(filled=False, fill=css("paper"), opacity=1)
    return [hollow, solid.transform_filter(f"2 * datum.{flags} > datum.seeds")]


def quoted(name: str) -> str:
    """Return a string literal of Vega's expression language."""
    escaped = name.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ").replace("\r", " ")
    return f"'{escaped}'"
