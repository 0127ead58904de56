"""Figures 4 to 8: the geometry of each encoder's features, as the paper has it and calibrated against chance."""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from tailscope.report import geometry_rows, geometry_story, rows
from tailscope.report.figure import Figure, Panel
from tailscope.report.geometry_text import HOW, TITLES
from tailscope.report.look import ENCODER_KEYS, OTHER, Key
from tailscope.report.marks import MANY, Chart, Series, Span, group_bounds, lines, reference, span
from tailscope.report.measures import BY_FIELD
from tailscope.report.results import Results, first
from tailscope.report.rows import Row

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
STYLES = {"share": ".1%", "degrees": ".2f", "plain": ".3~g"}
GAP_EXTRA = (("spread_gap_q", "q, mean over seeds", ".3f"), ("spread_gap_flags", "seeds with q ≤ 0.05", "d"))
SHIFT_EXTRA = (
    ("center_shift_deg", "raw shift", ".2f"),
    ("center_shift_null_deg", "by chance", ".2f"),
    ("center_shift_q", "q, mean over seeds", ".3f"),
    ("center_shift_flags", "seeds with q ≤ 0.05", "d"),
)


class Drawing:
    """Draws the panels of one variant; panels of a figure share their scale, so that encoders can be compared."""

    def __init__(self, results: Results, variant: str) -> None:
        self.data = data_name(variant)
        self.classes = rows.profile(results)
        self.rows = geometry_rows.classes(results, variant)
        self.keys = {name: ENCODER_KEYS.get(name, OTHER) for name in rows.encoders(results)}

    def paper(self) -> dict[str, list[Panel]]:
        """Return the panels of Figures 4 to 8 as the paper has them."""
        return {
            "fig4": [self.encoders("variance"), self.encoders("covariance_norm")],
            "fig5": [self.encoders("first_pc_share", zero=True)],
            "fig6": [*(self.compactness(name) for name in self.keys), self.encoders("escape_rate", zero=True)],
            "fig7": [self.within(name, NEAREST) for name in self.keys],
            "fig8": [self.within(name, LOCAL, zero=True) for name in self.keys],
        }

    def calibrated(self) -> dict[str, list[Panel]]:
        """Return the panels of Figures 4 to 8 in the calibrated measures."""
        gap = self.encoders("spread_gap_deg", null=0, flags="spread_gap_flags", extra=GAP_EXTRA)
        shift = self.encoders("center_shift_excess_deg", null=0, flags="center_shift_flags", extra=SHIFT_EXTRA)
        return {
            "fig4": [self.encoders("covariance_norm_unbiased"), self.encoders("variance_ratio", null=1)],
            "fig5": [self.brackets(), self.encoders("effective_rank")],
            "fig6": [gap, self.encoders("escape_rank", null=0.5)],
            "fig7": [self.within(name, NEAREST) for name in self.keys],
            "fig8": [shift, self.encoders("displacement", null=0)],
        }

    def encoders(self, field: str, *, zero: bool = False, null: float | None = None, **series: Any) -> Panel:
        """Draw one measure for every encoder; `null` is the value that means no difference."""
        measure = BY_FIELD[field]
        drawn = [Series(self.data, field, key, name, ranged=True, **series) for name, key in self.keys.items()]
        y = self._y([field], measure.kind, zero=zero, include=null)
        nulls = [] if null is None else [reference(null)]
        layers = [*nulls, *lines(drawn, self.classes, y, STYLES[measure.kind])]
        return self._panel(measure.label[0].upper() + measure.label[1:], layers, self.keys.values())

    def within(self, encoder: str, fields: dict[str, Key], *, zero: bool = False) -> Panel:
        """Draw several angles of one encoder."""
        y = self._y(fields, "degrees", zero=zero)
        drawn = [Series(self.data, field, key, encoder, ranged=True) for field, key in fields.items()]
        return self._panel(f"encoder {encoder}", lines(drawn, self.classes, y, STYLES["degrees"]), fields.values())

    def compactness(self, encoder: str) -> Panel:
        """Draw the distribution of angles to the training samples' centre, of them alone and with unseen ones."""
        sides = (("train", SEEN, -0.17), ("true", ALL, 0.17))
        y = self._y([f"{side}_{q}" for side, _, _ in sides for q in ("q05", "q95")], "degrees", zero=True)
        layers: list[Chart] = []
        for side, key, offset in sides:
            for low, high, width, opacity in (("q05", "q95", 1.2, 0.9), ("q25", "q75", 5, 0.5)):
                ends = (f"{side}_{low}", f"{side}_{high}")
                one = Span(self.data, encoder, key, *ends, offset=offset, width=width, opacity=opacity)
                layers.append(span(one, self.classes, y))
        drawn = [Series(self.data, f"{side}_q50", key, encoder, offset=offset) for side, key, offset in sides]
        layers += lines(drawn, self.classes, y, STYLES["degrees"])
        return self._panel(f"encoder {encoder}", layers, (SEEN, ALL))

    def brackets(self) -> Panel:
        """Draw the bracket of the first PC share for every encoder."""
        ends = ("first_pc_share_low", "first_pc_share_high")
        y = self._y(ends, "share", zero=True)
        middle = (len(self.keys) - 1) / 2
        spans = [
            Span(self.data, name, key, *ends, offset=0.2 * (place - middle), width=4, opacity=0.9)
            for place, (name, key) in enumerate(self.keys.items())
        ]
        layers: list[Chart] = [span(one, self.classes, y) for one in spans]
        return self._panel("First PC share, between its brackets", layers, self.keys.values())

    def _y(self, fields: Iterable[str], kind: str, *, zero: bool, include: float | None = None) -> dict[str, Any]:
        """Return a y axis that holds the fields of all encoders with their ranges over seeds."""
        names = [f"{field}{end}" for field in fields for end in ("", "_min", "_max")]
        values = [row[name] for row in self.rows for name in names if row.get(name) is not None]
        values += [] if include is None else [include]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        low = min(low, 0.0) if zero else low
        room = 0.05 * (high - low) or 1.0
        scale = alt.Scale(domain=[low if zero and low == 0 else low - room, high + room], nice=False, zero=False)
        axis = alt.Axis(tickCount=6, format=".0%") if kind == "share" else alt.Axis(tickCount=6)
        return {"title": "degrees" if kind == "degrees" else None, "scale": scale, "axis": axis}

    def _panel(self, title: str, layers: Sequence[Chart], keys: Iterable[Key]) -> Panel:
        chart = alt.layer(*group_bounds(self.classes), *layers).properties(height=HEIGHT)
        return Panel(title, chart, tuple(keys))


def figures(results: Results, variant: str) -> list[Figure]:
    """Draw Figures 4 to 8 in one variant, "paper" or "calibrated"."""
    drawing = Drawing(results, variant)
    panels = drawing.paper() if variant == "paper" else drawing.calibrated()
    readings = geometry_story.readings(results, variant)
    few, seeds = len(drawing.classes) <= MANY, len(first(results)["seeds"])
    note = (
        " Lines join means over seeds; thin strokes at their points are the range over seeds."
        if few and seeds > 1
        else ""
    )
    suffix = "" if variant == "paper" else "-calibrated"
    return [
        Figure(f"{name}{suffix}", TITLES[name], HOW[variant, name] + note, readings[name], panels[name], variant)
        for name in TITLES
    ]


def data_name(variant: str) -> str:
    """Return the name of a variant's rows."""
    return f"geometry_{variant}"


def data(results: Results) -> dict[str, list[Row]]:
    """Return the rows that these charts refer to, by name."""
    return {data_name(variant): geometry_rows.classes(results, variant) for variant in rows.VARIANTS}
