"""Colours, shapes and the charts' common style.

Charts name their colours by the page's CSS variables, so light, dark and print need no redrawing; in files the
variables are replaced by the light values. The hues are those of Okabe & Ito (2008), which the common forms of
colour blindness keep apart; shapes and dashes repeat what they say.
"""

import json
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2329",
    "muted": "#5b6671",
    "line": "#e3e7ea",
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
GROUP_KEYS = {name: Key(name, name, "bar") for name in ("head", "body", "tail")}
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
    text = json.dumps(spec)
    for name, colour in LIGHT.items():
        text = text.replace(css(name), colour)
    loaded: Spec = json.loads(text)
    return loaded


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
