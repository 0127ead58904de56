"""What figures are made of: colours and shapes, the few forms of charts, and figures as page and as files have them.

Charts name their colours by the page's CSS variables, so light, dark and print need no redrawing; in files the
variables are replaced by the light values. The hues are those of Okabe & Ito (2008), which the common forms of
colour blindness keep apart; shapes and dashes repeat what they say. Charts name their data; rows are added when drawn.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

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

_FIGURES: dict[str, dict[str, str]] = tomllib.loads(
    files(__package__).joinpath("figures.toml").read_text(encoding="utf-8")
)
_STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
_LIGHT = dict(re.findall(r"--(\w+): (#\w+);", _STYLE.partition("@media")[0]))
"""The colours of the style sheet by name, as charts in files have them."""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: what is drawn how.

    The colour is a name in page.css, the shape a Vega symbol, "bar" where the colour fills bars, or "tick" for a short
    upright line; an empty dash is a solid line.
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
PART_KEYS = {"representation": Key("representation", "blue", "bar"), "classifier": Key("classifier", "purple", "bar")}
PAPER_KEY = Key("the paper's number", "ink", "tick")
OTHER = Key("other", "purple", "diamond", (4, 4))


def css(colour: str) -> str:
    """Return a colour as the page's charts name it."""
    return f"var(--{colour})"


def config(font: str, *, legend: bool) -> Spec:
    """Return the Vega-Lite configuration shared by all charts."""
    label = {"labelColor": css("muted"), "titleColor": css("muted"), "labelFontSize": 12, "titleFontSize": 12}
    axis = {"titleFontWeight": "normal", "titlePadding": 8, "tickSize": 4, "labelPadding": 4}
    axis |= {
        "labelLimit": 220,
        "titleLimit": 400,
        **dict.fromkeys(("gridColor", "domainColor", "tickColor"), css("line")),
    }
    entries = {"orient": "bottom", "title": None, "labelLimit": 300, "symbolStrokeWidth": 2}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": label | axis,
        "legend": {**label, **entries, "disable": not legend},
        "title": {"color": css("ink"), "anchor": "start", "fontSize": 13, "fontWeight": "bold", "offset": 10},
        "rule": {"color": css("ink")},
        "text": {"color": css("ink"), "fontSize": 12},
        "line": {"strokeWidth": 2},
        "point": {"size": 55, "strokeWidth": 1.8},
    }


# ---- marks


@dataclass(frozen=True)
class Series:
    """One field of the rows named `data`, drawn as a line with points.

    Attributes:
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
    axis = alt.Axis(title="class frequency rank, most frequent first", grid=False, format="d")
    if count <= NAMED:
        names = [row["name"] for row in sorted(classes, key=lambda row: row["rank"])]
        axis = alt.Axis(
            title="class, most frequent first",
            values=list(range(1, count + 1)),
            labelExpr=f"[{','.join(map(quoted, names))}][datum.value - 1]",
            labelAngle=-40 if max(map(len, names)) > 3 else 0,
            labelLimit=90,
            labelOverlap=False,
            grid=False,
        )
    return alt.X(f"{field}:Q", scale=alt.Scale(domain=[0.5, count + 0.5], nice=False, zero=False), axis=axis)


def group_bounds(classes: Sequence[Row]) -> list[Chart]:
    """Return thin rules between the groups with their names on top, where groups follow frequency."""
    ordered = [row["group"] for row in sorted(classes, key=lambda row: row["rank"])]
    changes = [k for k in range(1, len(ordered)) if ordered[k] != ordered[k - 1]]
    if None in ordered or len(changes) != len(set(ordered)) - 1:
        return []
    starts = (0, *changes)
    labels = [{"at": k + 0.5, "group": ordered[k], "classes": ordered.count(ordered[k])} for k in starts]
    base = alt.Chart(alt.InlineData(values=labels))
    fits = alt.ExprRef(f"width * datum.classes / {len(classes)} > 34 ? datum.group : ''")
    text = base.mark_text(align="left", dx=4, dy=-12, fontSize=11, color=css("muted"), text=fits)
    found: list[Chart] = [text.encode(x=rank_axis(classes, "at"), y=alt.value(0))]
    if changes:
        rules = alt.Chart(alt.InlineData(values=[{"at": k + 0.5} for k in changes]))
        found.append(
            rules.mark_rule(color=css("line"), strokeDash=[2, 3], aria=False).encode(x=rank_axis(classes, "at"))
        )
    return found


def log_axis(counts: Sequence[int], below: float, *, grid: bool) -> dict[str, Any]:
    """Return scale and axis of counts on a logarithmic scale: it has no 0, and begins `below` times under the smallest.

    Ticks are powers of ten; where these would be few, 2 and 5 times them too.
    """
    known = [count for count in counts if count] or [1]
    low, high = min(known) / below, max(known) * 1.3
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [step * 10**k for k in range(16) for step in steps if low <= step * 10**k <= high]
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return {"scale": scale, "axis": alt.Axis(values=ticks, format=",d", grid=grid)}


def reference(value: object) -> list[Chart]:
    """Return a horizontal line at the value that means "no difference"; none where it is no number."""
    if not isinstance(value, int | float):
        return []
    return [alt.Chart(alt.InlineData(values=[{"y": value}])).mark_rule(strokeWidth=1, aria=False).encode(y="y:Q")]


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

    `classes` are the rows of the axis, `y` the arguments of the y axis, `style` is the tooltips' number format.
    """
    keys = list({one.key.label: one.key for one in series}.values())
    shape = alt.Shape("series:N", scale=shape_scale(keys))
    trends: list[Chart] = []
    points: list[Chart] = []
    for one in series:
        offset = one.offset if len(classes) <= MANY else 0.0
        base = rows_of(one.data, one.encoder).transform_calculate(series=quoted(one.key.label))
        encoded = _placed(base, classes, offset).encode(
            y=alt.Y(f"{one.field}:Q", **y), color=alt.Color("series:N", scale=colour_scale(keys))
        )
        if not offset:
            trends.append(_trend(encoded, one, len(classes)))
        if one.ranged and len(classes) <= MANY:
            trends.append(
                encoded.mark_rule(opacity=0.7, aria=False).encode(y=f"{one.field}_min:Q", y2=f"{one.field}_max:Q")
            )
        tooltip = class_tooltip([(one.field, one.key.label, style), *one.extra])
        points += [spot.encode(shape=shape, tooltip=tooltip) for spot in _spots(encoded, one.flags, len(classes))]
    return [*trends, *points]


def rows_of(data: str, encoder: str | None = None) -> alt.Chart:
    """Return an empty chart of the named rows, of one encoder where it is given."""
    base = alt.Chart(alt.NamedData(name=data))
    return base if encoder is None else base.transform_filter(alt.FieldEqualPredicate(equal=encoder, field="encoder"))


def _placed(base: alt.Chart, classes: Sequence[Row], offset: float) -> alt.Chart:
    """Put a chart's marks at the classes' ranks, `offset` ranks to the right so that neighbours do not hide."""
    if not offset:
        return base.encode(x=rank_axis(classes))
    return base.transform_calculate(at=f"datum.rank + {offset}").encode(x=rank_axis(classes, "at"))


def _smoothed(base: alt.Chart, classes: int, **fields: str) -> alt.Chart:
    """Add running means over 5 % of the classes, by rank: new name = field."""
    half = max(1, classes // 40)
    means: list[Any] = [{"op": "mean", "field": field, "as": name} for name, field in fields.items()]
    return base.transform_window(means, frame=[-half, half], sort=[alt.SortField("rank")])


def span(
    one: Series, high: str, classes: Sequence[Row], y: dict[str, Any], *, width: float, opacity: float
) -> alt.Chart:
    """Return the range of a series up to the field `high`: a rule a class, beyond `MANY` a band of running means."""
    base, colour = rows_of(one.data, one.encoder), css(one.key.colour)
    if len(classes) > MANY:
        band = _smoothed(base, len(classes), low=one.field, high=high).mark_area(opacity=0.16, color=colour, aria=False)
        return cast(alt.Chart, band.encode(x=rank_axis(classes), y=alt.Y("low:Q", **y), y2="high:Q"))
    rule = _placed(base, classes, one.offset).mark_rule(color=colour, strokeWidth=width, opacity=opacity, aria=False)
    return cast(alt.Chart, rule.encode(y=alt.Y(f"{one.field}:Q", **y), y2=f"{high}:Q"))


def _trend(encoded: alt.Chart, one: Series, classes: int) -> alt.Chart:
    dash = list(one.key.dash) or [1, 0]
    if classes <= MANY:
        return cast(alt.Chart, encoded.mark_line(strokeWidth=1.6, opacity=0.75, strokeDash=dash))
    smooth = _smoothed(encoded, classes, smoothed=one.field).mark_line(strokeDash=dash)
    return cast(alt.Chart, smooth.encode(y="smoothed:Q"))


def _spots(encoded: alt.Chart, flags: str | None, classes: int) -> list[Chart]:
    """Return a series' points; those without a flag in most seeds are hollow. Many are small and faint."""
    if classes > MANY:
        return [encoded.mark_point(filled=True, size=8, opacity=0.3)]
    solid = encoded.mark_point(filled=True, opacity=1)
    if flags is None:
        return [solid]
    hollow = encoded.mark_point(filled=False, fill=css("paper"), opacity=1)  # which says all to who cannot see
    solid = encoded.mark_point(filled=True, opacity=1, aria=False)
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
    """Return horizontal bars between two fields, or from 0 to one, with thin rules for intervals, and `numbers`."""
    (start, end), (low, high) = fields, bounds
    drawn = base.mark_bar(height=alt.RelativeBandSize(0.55 if end else 0.62))
    drawn = drawn.encode(x=x(start), color=colour, tooltip=tooltip)
    return [
        drawn.encode(x2=end) if end else drawn,
        base.mark_rule(strokeWidth=1.6, aria=False).encode(x=x(low), x2=high),
        numbers(base, size).encode(x=x("label_at")),
    ]


def dots(
    base: alt.Chart, x: Callable[[str], alt.X], field: str, keys: Sequence[Key], tooltip: Mapping[str, str]
) -> list[Chart]:
    """Return a dot a row, coloured and shaped by the key that `field` names, with its interval and `numbers`."""
    encoded = base.mark_point(filled=True, opacity=1, size=80).encode(
        x=x("mean"),
        color=alt.Color(f"{field}:N", scale=colour_scale(keys)),
        shape=alt.Shape(f"{field}:N", scale=shape_scale(keys)),
        tooltip=[alt.Tooltip(f"{name}:N", title=title) for name, title in tooltip.items()],
    )
    whiskers = base.mark_rule(strokeWidth=1.4, color=css("muted"), aria=False).encode(x=x("ci_low"), x2="ci_high")
    return [whiskers, encoded, numbers(base, 11).encode(x=x("label_at"))]


def zoomed(values: Sequence[float], title: str) -> Callable[[str], alt.X]:
    """Return an x axis of accuracies around these values, with room for numbers on the right."""
    low, high = min(values), max(values)
    scale = alt.Scale(domain=[low - 0.02, high + (high - low) * 0.5 + 0.02], nice=False, zero=False)
    ticks = [tick / 20 for tick in range(20 + 1) if low - 0.02 <= tick / 20 <= high + 0.05]
    axis = alt.Axis(format=".0%", title=title, values=ticks, labelSeparation=8)
    return lambda field: alt.X(f"{field}:Q", scale=scale, axis=axis)


def numbers(base: alt.Chart, size: int) -> alt.Chart:
    """Write each row's `text` beside its mark; where the chart is narrow, its `short` one."""
    text = alt.ExprRef(f"width < {NARROW} ? datum.short : datum.text")
    return cast(alt.Chart, base.mark_text(align="left", dx=8, fontSize=size, text=text))


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
    return cast(alt.LayerChart, alt.layer(*layers).properties(height=44 * len(rows)))


# ---- figures


@dataclass(frozen=True)
class Panel:
    """One chart of a figure: its title, empty where the figure has a single panel, and the keys of its legend."""

    title: str
    chart: Chart
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of the report; its `name` is file stem and anchor, and where figures.toml describes it.

    Attributes:
        note: what these results add to how it is read.
        reading: what these results show there; may be empty.
        variant: "paper" or "calibrated" where the figure comes in both, else None.
    """

    name: str
    panels: Sequence[Panel]
    note: str = ""
    reading: str = ""
    variant: str | None = None

    @property
    def title(self) -> str:
        """What it shows."""
        return _FIGURES[self.name.removesuffix("-calibrated")]["title"]

    @property
    def how(self) -> str:
        """How to read it, for someone who never saw the paper."""
        return _FIGURES[self.name.removesuffix("-calibrated")][self.variant or "how"] + self.note

    @property
    def keys(self) -> list[Key]:
        """The legend of all panels; empty where labels say it all."""
        return list(dict.fromkeys(key for panel in self.panels for key in panel.keys))

    @property
    def shared_keys(self) -> bool:
        """Whether all panels have the same legend; else each shows its own."""
        return len({tuple(panel.keys) for panel in self.panels}) == 1

    @property
    def full_title(self) -> str:
        """The title with its variant, for where the figure stands alone."""
        return f"{self.title} ({self.variant})" if self.variant == "calibrated" else self.title


def panel_specs(figure: Figure) -> list[Spec]:
    """Return the panels as Vega-Lite descriptions of no width yet; rows stay references by name."""
    return [
        {key: value for key, value in panel.chart.to_dict(validate=False).items() if key not in ("$schema", "config")}
        | {"description": ": ".join(filter(None, (figure.title, panel.title)))}
        for panel in figure.panels  # validating takes as long as the rest, and is left to the tests
    ]


def file_spec(figure: Figure, panels: Sequence[Spec], data: Mapping[str, Sequence[Row]]) -> Spec:
    """Return the whole figure as one self-contained Vega-Lite description in light colours, with its legend."""
    columns = COLUMNS.get(len(panels), 3)
    shared: dict[str, Any] = {}
    charts = []
    for panel, spec in zip(figure.panels, panels, strict=True):
        shared |= spec.get("datasets", {}) | {name: rows for name, rows in data.items() if name in data_names(spec)}
        without = {key: value for key, value in spec.items() if key != "datasets"}
        charts.append(without | {"width": WIDTH[columns], "title": panel.title})
    scales = "shared" if figure.shared_keys else "independent"
    spec = {
        "title": {"text": figure.full_title, "fontSize": 15, "offset": 18},
        "concat": charts,
        "columns": columns,
        "spacing": 28,
        "resolve": {"scale": dict.fromkeys(("color", "shape"), scales)},
        "datasets": shared,
        "config": config(FILE_FONT, legend=bool(figure.keys)) | {"background": _LIGHT["paper"], "padding": 12},
    }
    light = re.sub(r"var\(--(\w+)\)", lambda name: _LIGHT[name[1]], json.dumps(spec))
    return dict(json.loads(light))


def save(figure: Figure, panels: Sequence[Spec], data: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Write the figure as SVG, PNG and PDF into `folder`."""
    svg = vl_convert.vegalite_to_svg(file_spec(figure, panels, data))
    png, pdf = vl_convert.svg_to_png(svg, scale=PNG_SCALE), vl_convert.svg_to_pdf(svg)
    contents: dict[str, str | bytes] = {"svg": svg, "png": png, "pdf": pdf}
    return [write(folder / f"{figure.name}.{suffix}", content) for suffix, content in contents.items()]


def data_names(spec: Spec) -> set[str]:
    """Return the names of the rows that a chart refers to."""
    return set(re.findall(r'"data": \{"name": "([^"]+)"\}', json.dumps(spec)))
