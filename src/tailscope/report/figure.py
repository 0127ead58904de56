"""A figure: panels of charts with what a reader needs to know, for the page and as files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert

from tailscope.report.files import write
from tailscope.report.look import LIGHT, Key, Spec, as_file, config
from tailscope.report.marks import Chart
from tailscope.report.rows import Row

PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
FILE_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
COLUMNS = {1: 1, 2: 2, 4: 2}  # panels side by side in files, by panels in a figure; else three
WIDTH = {1: 620, 2: 340, 3: 260}  # pixels of a panel in files, by columns
PNG_SCALE = 2.0


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
    scales = "shared" if len({tuple(panel.keys) for panel in figure.panels}) == 1 else "independent"
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
    return set(_names(spec))


def _names(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        data = node.get("data")
        if isinstance(data, dict) and set(data) == {"name"}:
            yield data["name"]
        for value in node.values():
            yield from _names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _names(value)
