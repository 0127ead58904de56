"""What figures are made of: colours and shapes, the few forms of charts, and figures as page and as files have them.

Charts name their colours by the page's CSS variables, so light, dark and print need no redrawing; in files the
variables are replaced by the light values. The hues are those of Okabe & Ito (2008), which the common forms of
colour blindness keep apart; shapes and dashes repeat what they say. Charts name their data; rows are added when drawn.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from tailscope.groups import GROUPS
from tailscope.report.rows import Row
from tailscope.store.files import write

Spec = dict[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart

PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
FILE_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
COLUMNS = {1: 1, 2: 2, 4: 2}  # panels side by side in files, by panels in a figure; else three
WIDTH = {1: 620, 2: 340, 3: 260}  # pixels of a panel in files, by columns
PNG_SCALE = 2.0
MANY = 40  # classes; beyond, single points fade and a running mean carries the trend
NARROW = 330  # pixels; narrower charts leave out what the tooltip and the table say too
NAMED = 20  # classes; up to here the axis names them
VEGA_SHAPES = {"bar": "square", "tick": "M-0.1,-1L0.1,-1L0.1,1L-0.1,1Z"}
FORMATS = {"share": ".1%", "degrees": ".2f", "plain": ".3~g", "squared": ".3~g"}  # of measures in tooltips, by unit

# ---- theme

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2329",
    "muted": "#5b6671",
    "line": "#e3e7ea",
    "wash": "#f4f6f8",
    "vermilion": "#d55e00",
    "orange": "#e69f00",
    "green": "#009e73",
    "blue": "#0072b2",
    "sky": "#56b4e9",
    "purple": "#cc79a7",
    "head": "#b9c3cd",
    "body": "#7f8c99",
    "tail": "#2b3540",
}
DARK = LIGHT | {
    "paper": "#14181c",
    "ink": "#e9edf0",
    "muted": "#a3aeb8",
    "line": "#2e363d",
    "wash": "#1d2328",
    "vermilion": "#f2823a",
    "orange": "#f0b429",
    "green": "#2cc196",
    "blue": "#4fa8de",
    "sky": "#8accf2",
    "purple": "#e09cc1",
    "head": "#46515c",
    "body": "#8794a1",
    "tail": "#eef2f5",
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend: what is drawn how.

    Attributes:
        label: the text, also the value that the chart encodes.
        colour: a name in `LIGHT`.
        shape: a Vega symbol, "bar" where the colour fills bars, or "tick" for a short upright line.
        dash: a stroke dash, empty for a solid line.
    """

    label: str
    colour: str
    shape: str = "circle"
    dash: tuple[int, ...] = ()


ENCODER_KEYS = {
    "lt": Key("lt", "vermilion", "circle"),
    "lt+mixup": Key("lt+mixup", "orange", "triangle-up", (6, 3)),
    "true": Key("true", "green", "square", (2, 2)),
}
BACKBONE_KEYS = {
    "lt": Key("lt", "vermilion", "bar"),
    "matched": Key("matched", "sky", "bar"),
    "true": Key("true", "green", "bar"),
}
GROUP_KEYS = {name: Key(name, name, "bar") for name in GROUPS}
PART_KEYS = {
    "representation": Key("representation", "blue", "bar"),
    "classifier": Key("classifier", "purple", "bar"),
}
PAPER_KEY = Key("the paper's number", "ink", "tick")
OTHER = Key("other", "purple", "diamond", (4, 4))


def css(colour: str) -> str:
    """Return a colour as the page's charts name it.

    >>> css("ink")
    'var(--ink)'
    """
    return f"var(--{colour})"


def as_file(spec: Spec) -> Spec:
    """Return a chart description with its CSS variables replaced by the light colours."""
    light = re.sub(r"var\(--(\w+)\)", lambda name: LIGHT[name[1]], json.dumps(spec))
    return dict(json.loads(light))


def config(font: str, *, legend: bool) -> Spec:
    """Return the Vega-Lite configuration shared by all charts."""
    label = {"labelColor": css("muted"), "titleColor": css("muted"), "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {
            **label,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "gridColor": css("line"),
            "domainColor": css("line"),
            "tickColor": css("line"),
            "tickSize": 4,
            "labelPadding": 4,
            "labelLimit": 220,
            "titleLimit": 400,
        },
        "legend": {
            **label,
            "disable": not legend,
            "orient": "bottom",
            "title": None,
            "labelLimit": 300,
            "symbolStrokeWidth": 2,
        },
        "title": {"color": css("ink"), "anchor": "start", "fontSize": 13, "fontWeight": "bold", "offset": 10},
        "rule": {"color": css("ink")},
        "text": {"color": css("ink"), "fontSize": 12},
        "line": {"strokeWidth": 2},
        "point": {"size": 55, "strokeWidth": 1.8},
    }


# ---- marks


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


def bars(
    base: alt.Chart,
    x: Callable[[str], alt.X],
    fields: tuple[str, str | None],
    bounds: tuple[str, str],
    colour: alt.Color,
    tooltip: Sequence[alt.Tooltip],
    size: int,
) -> list[Chart]:
    """Return horizontal bars between two fields, or from 0 to one, with thin rules for intervals, and `numbers`.

    `x` makes the axis of a field, `bounds` are the intervals' ends, `size` is the font of the numbers in pixels.
    """
    start, end = fields
    drawn = base.mark_bar(height=alt.RelativeBandSize(0.55 if end else 0.62))
    drawn = drawn.encode(x=x(start), color=colour, tooltip=tooltip)
    low, high = bounds
    return [
        drawn.encode(x2=end) if end else drawn,
        base.mark_rule(strokeWidth=1.6).encode(x=x(low), x2=high),
        numbers(base, size).encode(x=x("label_at")),
    ]


def numbers(base: alt.Chart, size: int) -> alt.Chart:
    """Write each row's `text` beside its mark; where the chart is narrow, its `short` one."""
    text = alt.ExprRef(f"width < {NARROW} ? datum.short : datum.text")
    written: alt.Chart = base.mark_text(align="left", dx=8, fontSize=size, text=text)
    return written


def waterfall(data: str, rows: Sequence[Row], keys: Sequence[Key], scale: alt.Scale, axis: alt.Axis) -> Chart:
    """Lay bars end to end: rows hold a step, its part, start and end, low and high, and the `numbers`."""
    labels = alt.Axis(labelFontSize=13, domain=False, ticks=False, labelLimit=320)
    base = rows_of(data).encode(y=alt.Y("step:N", sort=[row["step"] for row in rows], title=None, axis=labels))
    layers = bars(
        base,
        lambda field: alt.X(f"{field}:Q", scale=scale, axis=axis),
        ("start", "end"),
        ("low", "high"),
        alt.Color("part:N", scale=colour_scale(keys)),
        [alt.Tooltip("step:N"), alt.Tooltip("text:N", title="points")],
        13,
    )
    chart: Chart = alt.layer(*layers).properties(height=44 * len(rows))
    return chart


# ---- figures


@dataclass(frozen=True)
class Panel:
    """One chart of a figure: its title, empty where the figure has a single panel, and the keys of its legend."""

    title: str
    chart: Chart
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: file stem and anchor.
        title: what it shows.
        how: how to read it, for someone who never saw the paper.
        reading: what these results show there; may be empty.
        panels: the charts, side by side where there is room.
        variant: "paper" or "calibrated" where the figure comes in both, else None.
    """

    name: str
    title: str
    how: str
    reading: str
    panels: Sequence[Panel]
    variant: str | None = None

    @property
    def keys(self) -> list[Key]:
        """The legend of all panels; empty where labels say it all."""
        return list(dict.fromkeys(key for panel in self.panels for key in panel.keys))

    @property
    def shared_keys(self) -> bool:
        """Whether all panels have the same legend."""
        return len({tuple(panel.keys) for panel in self.panels}) == 1

    @property
    def full_title(self) -> str:
        """The title with its variant, for where the figure stands alone."""
        return f"{self.title} ({self.variant})" if self.variant == "calibrated" else self.title


def panel_specs(figure: Figure) -> list[Spec]:
    """Return the panels as Vega-Lite descriptions of no width yet; rows stay references by name."""
    found = []
    for panel in figure.panels:
        spec: Spec = panel.chart.to_dict(validate=False)  # takes as long as the rest; the tests validate
        bare = {key: value for key, value in spec.items() if key not in ("$schema", "config")}
        found.append(bare | {"description": ": ".join(text for text in (figure.title, panel.title) if text)})
    return found


def file_spec(figure: Figure, panels: Sequence[Spec], data: Mapping[str, Sequence[Row]]) -> Spec:
    """Return the whole figure as one self-contained Vega-Lite description in light colours, with its legend."""
    columns = COLUMNS.get(len(panels), 3)
    shared: dict[str, Any] = {}
    charts = []
    for panel, spec in zip(figure.panels, panels, strict=True):
        own = {name: rows for name, rows in data.items() if name in data_names(spec)}
        shared |= spec.get("datasets", {}) | own
        without = {key: value for key, value in spec.items() if key != "datasets"}
        charts.append(without | {"width": WIDTH[columns], "title": panel.title})
    # Panels with different legends each show their own.
    scales = "shared" if figure.shared_keys else "independent"
    spec = {
        "title": {"text": figure.full_title, "fontSize": 15, "offset": 18},
        "concat": charts,
        "columns": columns,
        "spacing": 28,
        "resolve": {"scale": dict.fromkeys(("color", "shape"), scales)},
        "datasets": shared,
        "config": config(FILE_FONT, legend=bool(figure.keys)) | {"background": LIGHT["paper"], "padding": 12},
    }
    return as_file(spec)


def save(figure: Figure, panels: Sequence[Spec], data: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Write the figure as SVG, PNG and PDF into `folder`."""
    svg = vl_convert.vegalite_to_svg(file_spec(figure, panels, data))
    contents: dict[str, str | bytes] = {
        "svg": svg,
        "png": vl_convert.svg_to_png(svg, scale=PNG_SCALE),
        "pdf": vl_convert.svg_to_pdf(svg),
    }
    return [write(folder / f"{figure.name}.{suffix}", content) for suffix, content in contents.items()]


def data_names(spec: Spec) -> set[str]:
    """Return the names of the rows that a chart refers to."""
    return set(re.findall(r'"data": \{"name": "([^"]+)"\}', json.dumps(spec)))
