"""The split of the gap, Figure 2's bars and Figure 3's ladder: horizontal charts of accuracies with intervals."""

from collections.abc import Sequence

import altair as alt

from tailscope.report import rows
from tailscope.report.figure import Figure, Panel
from tailscope.report.look import BACKBONE_KEYS, PAPER_KEY, PART_KEYS, Key, css
from tailscope.report.marks import Chart, colour_scale, rows_of, shape_scale
from tailscope.report.results import Result, Results
from tailscope.report.rows import Row
from tailscope.report.text import arrow, number, percent, points, with_interval

NARROW = 330  # pixels; narrower charts leave out what the tooltip and the table say too
ACCURACY = "accuracy on balanced test images"
PRINTED = " Upright ticks are the numbers that the paper printed."
RUNG_KEYS = (
    Key(rows.STAGES["stage1"], "muted", "circle"),
    Key(rows.STAGES["stage2"], "sky", "square"),
    Key(rows.STAGES["stage2_aa"], "blue", "triangle-up"),
    Key(rows.STAGES["bound"], "green", "diamond"),
)


def data(results: Results) -> dict[str, list[Row]]:
    """Return the rows that these charts refer to, by name."""
    found = {}
    if "swap" in results:
        if results["swap"]["attribution"] is not None:
            found["attribution"] = _waterfall(rows.attribution(results))
        found["cells"] = [row | _cell(row) for row in _labelled(rows.cells(results))]
        found["cell_seeds"] = [row | {"label": arrow(row["cell"])} for row in rows.cell_seeds(results)]
    if "ladder" in results:
        found["ladder"] = [row | _rung(row) for row in _labelled(rows.ladder(results))]
    return found


def attribution(results: Results) -> Figure:
    """Draw the gap and its two parts as a waterfall with intervals."""
    keys = [Key("gap", "muted"), *PART_KEYS.values()]
    bars = _waterfall(rows.attribution(results))
    edges = [0.0, *(row[name] for row in bars for name in ("low", "high", "end") if row[name] is not None)]
    low, high = min(edges), max(edges)
    scale = alt.Scale(domain=[low, high + (high - low) * 0.6], nice=False)  # room for the numbers on the right
    ticks = [tick for tick in range(-100, 101, 5 if high - low < 30 else 10) if low <= tick <= high]
    axis = alt.Axis(title="percentage points of accuracy", values=ticks, labelSeparation=8)
    y_axis = alt.Axis(labelFontSize=13, domain=False, ticks=False)
    base = rows_of("attribution").encode(y=alt.Y("part:N", sort=[row["part"] for row in bars], title=None, axis=y_axis))
    layers: list[Chart] = [
        base.mark_bar(height=alt.RelativeBandSize(0.55)).encode(
            x=alt.X("start:Q", scale=scale, axis=axis),
            x2="end:Q",
            color=alt.Color("part:N", scale=colour_scale(keys)),
            tooltip=[alt.Tooltip("part:N"), alt.Tooltip("text:N", title="points")],
        ),
        base.mark_rule(strokeWidth=1.6).encode(x=alt.X("low:Q", scale=scale), x2="high:Q"),
        _numbers(base, 13).encode(x=alt.X("label_at:Q", scale=scale)),
    ]
    return Figure(
        "attribution",
        "Where the gap comes from",
        "The gap between training on the long-tailed set and on the full one, then its two parts laid end to end."
        f"{_whiskers(results['swap'])}",
        "",
        [Panel("", alt.layer(*layers).properties(height=44 * len(bars)))],
    )


def swap(results: Results) -> Figure:
    """Draw Figure 2: accuracy of every pair of backbone and classifier, with intervals and single seeds."""
    stored = rows.cells(results)
    present = {row["backbone"] for row in stored}
    printed = any(row["paper"] is not None for row in stored)
    keys = [Key(_backbone(name), key.colour, "bar") for name, key in BACKBONE_KEYS.items() if name in present]
    keys += [PAPER_KEY] if printed else []
    order = [arrow(row["cell"]) for row in stored]
    y = alt.Y("label:N", sort=order, title="backbone → classifier", axis=alt.Axis(labelFontSize=13, ticks=False))
    base = rows_of("cells").encode(y=y)
    pair = alt.Tooltip("label:N", title="backbone → classifier")
    layers: list[Chart] = [
        base.mark_bar(height=alt.RelativeBandSize(0.62)).encode(
            x=_unit("mean:Q"),
            color=alt.Color("key:N", scale=colour_scale(keys)),
            tooltip=[pair, alt.Tooltip("text:N", title="accuracy")],
        ),
        base.mark_rule(strokeWidth=1.6).encode(x=_unit("ci_low:Q"), x2="ci_high:Q"),
        _numbers(base, 12).encode(x=_unit("label_at:Q")),
    ]
    if printed:
        layers.append(_paper_ticks(base, keys, 30).encode(x=_unit("paper:Q")))
    if len(results["swap"]["seeds"]) > 1:
        seeds = rows_of("cell_seeds").mark_point(filled=True, size=16, opacity=1, color=css("ink"))
        tooltip = [pair, alt.Tooltip("seed:N"), alt.Tooltip("accuracy:Q", format=".2%")]
        layers.append(seeds.encode(y=y, x=_unit("accuracy:Q"), tooltip=tooltip))
    return Figure(
        "fig2",
        "Figure 2. Swap the data set between the two stages",
        "Accuracy when the backbone is trained on one set and the classifier on the other. If replacing the backbone "
        "(true → lt) helps more than replacing the classifier (lt → true), the features are the bottleneck."
        f"{_whiskers(results['swap'])}{' Dots are single seeds.' if len(results['swap']['seeds']) > 1 else ''}"
        f"{PRINTED if printed else ''}",
        _swap_reading(results["swap"]),
        [Panel("", alt.layer(*layers).properties(height=34 * len(stored)), keys)],
    )


def ladder(results: Results) -> Figure:
    """Draw Figure 3: accuracy of every rung for every augmentation of stage 1."""
    stored = rows.ladder(results)
    rungs = [key for key in RUNG_KEYS if any(rows.STAGES[row["rung"]] == key.label for row in stored)]
    paper = [row["paper"] for row in stored if row["paper"] is not None]
    keys = [*rungs, *([PAPER_KEY] if paper else [])]
    order = list(dict.fromkeys(_rung(row)["augmentation_label"] for row in stored))
    lines = "split(replace(datum.label, ' + ', '|+ '), '|')"  # a narrow chart has no room for long labels
    augmentations = alt.Axis(ticks=False, labelExpr=lines)
    base = rows_of("ladder").encode(
        y=alt.Y("augmentation_label:N", sort=order, title="augmentation of stage 1", axis=augmentations),
        yOffset=alt.YOffset("rung_label:N", sort=[key.label for key in rungs]),
    )
    low = min([*paper, *(row["mean"] if row["ci_low"] is None else row["ci_low"] for row in stored)])
    high = max([*paper, *(row["mean"] if row["ci_high"] is None else row["ci_high"] for row in stored)])
    scale = alt.Scale(domain=[low - 0.02, high + (high - low) * 0.5 + 0.02], nice=False, zero=False)
    ticks = [tick / 20 for tick in range(20 + 1) if low - 0.02 <= tick / 20 <= high + 0.05]
    title = [alt.Tooltip("augmentation_label:N", title="stage 1"), alt.Tooltip("rung_label:N", title="rung")]
    layers: list[Chart] = [
        base.mark_rule(strokeWidth=1.4, color=css("muted")).encode(x=alt.X("ci_low:Q", scale=scale), x2="ci_high:Q"),
        base.mark_point(filled=True, opacity=1, size=80).encode(
            x=alt.X(
                "mean:Q", scale=scale, axis=alt.Axis(format=".0%", title=ACCURACY, values=ticks, labelSeparation=8)
            ),
            color=alt.Color("rung_label:N", scale=colour_scale(keys)),
            shape=alt.Shape("rung_label:N", scale=shape_scale(keys)),
            tooltip=[*title, alt.Tooltip("text:N", title="accuracy")],
        ),
        _numbers(base, 11).encode(x=alt.X("label_at:Q", scale=scale)),
    ]
    if paper:
        layers.insert(1, _paper_ticks(base, keys, 17).encode(x=alt.X("paper:Q", scale=scale)))
    return Figure(
        "fig3",
        "Figure 3. The augmentation ladder",
        "Each block is one augmentation of stage 1. Stage I is the network as trained; Stage II retrains its "
        "classifier with all classes drawn equally often; then AutoAugment joins there too. The bound fits the "
        "classifier to the full set: what is still missing there, no classifier on these features regains."
        f"{PRINTED if paper else ''}",
        "",
        [Panel("", alt.layer(*layers).properties(height=22 * len(stored)), keys)],
    )


def _numbers(base: alt.Chart, size: int) -> alt.Chart:
    """Write each row's number beside its mark; where the chart is narrow, without its interval."""
    text = alt.ExprRef(f"width < {NARROW} ? datum.short : datum.text")
    numbers: alt.Chart = base.mark_text(align="left", dx=8, fontSize=size, text=text)
    return numbers


def _paper_ticks(base: alt.Chart, keys: Sequence[Key], height: int) -> alt.Chart:
    """Mark the paper's number of each row that it printed, with an upright line of so many pixels."""
    ticks: alt.Chart = (
        base.transform_filter("isValid(datum.paper)")
        .mark_point(filled=True, opacity=1, size=height**2)
        .encode(
            color=alt.ColorDatum(PAPER_KEY.label, scale=colour_scale(keys)),
            shape=alt.ShapeDatum(PAPER_KEY.label, scale=shape_scale(keys)),
            tooltip=[alt.Tooltip("paper:Q", title=PAPER_KEY.label, format=".2%")],
        )
    )
    return ticks


def _unit(field: str) -> alt.X:
    axis = alt.Axis(format=".0%", values=[0, 0.2, 0.4, 0.6, 0.8, 1.0], title=ACCURACY, labelSeparation=8)
    return alt.X(field, scale=alt.Scale(domain=[0, 1.4], nice=False), axis=axis)


def _backbone(name: str) -> str:
    return f"backbone trained on {name}"


def _cell(row: Row) -> Row:
    return {"label": arrow(row["cell"]), "key": _backbone(row["backbone"])}


def _labelled(stored: list[Row]) -> list[Row]:
    """Add each number as text, with its interval, and where to write it.

    Beside the paper's numbers they form a column: next to the paper's mark, ours would be taken for the paper's.
    """
    found = []
    for row in stored:
        bounds = None if row["ci_low"] is None else (row["ci_low"], row["ci_high"])
        short, paper = percent(row["mean"]), row["paper"]
        text = with_interval(short, bounds) + ("" if paper is None else f", paper {number(100 * paper, 1)}")
        end = max(row["mean"], row["highest"], *(bounds or ()), paper or 0.0)
        found.append(row | {"short": short, "text": text, "label_at": end})
    if any(row["paper"] is not None for row in stored):
        column = max(row["label_at"] for row in found)
        found = [row | {"label_at": column} for row in found]
    return found


def _rung(row: Row) -> Row:
    augmentation = rows.AUGMENTATIONS.get(row["augmentation"], row["augmentation"])
    return {"augmentation_label": augmentation, "rung_label": rows.STAGES[row["rung"]]}


def _waterfall(attribution: list[Row]) -> list[Row]:
    """Lay the gap and its two parts end to end, in points; the interaction is no part of the sum."""
    found = []
    start = 0.0
    for row in attribution[:3]:
        end = start + 100 * row["points"]
        low, high = (None if bound is None else start + 100 * bound for bound in (row["ci_low"], row["ci_high"]))
        bounds = None if low is None else (row["ci_low"], row["ci_high"])
        share = "" if row["share"] is None else f"  =  {percent(row['share'], 0)}"
        found.append(
            {
                "part": row["part"],
                "start": start,
                "end": end,
                "low": low,
                "high": high,
                "label_at": max(start, end, *(() if high is None else (high,))),
                "short": points(row["points"]) + share,
                "text": with_interval(points(row["points"]), bounds) + share,
            }
        )
        start = 0.0 if row["part"] == "gap" else end
    return found


def _whiskers(swap: Result) -> str:
    known = any(cell["ci95"] is not None for cell in swap["cells"].values())
    return " Thin lines are 95 % intervals." if known else ""


def _swap_reading(swap: Result) -> str:
    if swap["attribution"] is None:
        return ""
    means = {name: swap["cells"][name]["mean"] for name in rows.CELLS}
    backbone = 100 * (means["true->lt"] - means["lt->lt"])
    classifier = 100 * (means["lt->true"] - means["lt->lt"])
    return (
        f"Here, replacing only the backbone changes accuracy by {number(backbone)} points, replacing only the "
        f"classifier by {number(classifier)}."
    )
