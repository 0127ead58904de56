"""The tables and figures of the paper beside ours: paper | ours (mean ± sd over seeds, n) | difference.

Accuracies stand beside the paper's printed ones. Figures 4 to 8 are plots without printed values, so their tables
hold ours alone, by group of classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.groups import GROUPS
from tailscope.paper import targets
from tailscope.paper.claims import label
from tailscope.paper.evidence import Evidence
from tailscope.report.files import write as write_file
from tailscope.report.tables import Column, Table, to_csv, to_latex, to_markdown
from tailscope.report.text import DASH, number, percent

Row = dict[str, Any]
LT_TRUE = ("lt", "true")
ALL = ("lt", "lt+mixup", "true")
FIGURES: Mapping[str, tuple[str, Sequence[str], Mapping[str, str]]] = {
    "fig4": (
        "Figure 4: second moments over D*",
        LT_TRUE,
        {"variance": "variance (trace)", "covariance_norm": "covariance (Frobenius norm)"},
    ),
    "fig5": ("Figure 5: first principal component over D*", LT_TRUE, {"first_pc_share": "share of variance"}),
    "fig6": (
        "Figure 6: intra-class compactness",
        ALL,
        {
            "spread_train_deg": "mean angle to the centre, D_LT, °",
            "spread_true_deg": "mean angle to the centre, D*, °",
            "escape_rate": "escape rate of unseen samples",
        },
    ),
    "fig7": (
        "Figure 7: inter-class separation",
        ALL,
        {
            "nearest_center_train_deg": "centre to nearest wrong centre, D_LT, °",
            "nearest_center_true_deg": "centre to nearest wrong centre, D*, °",
            "nearest_center_sample_train_deg": "sample to nearest wrong centre, D_LT, °",
            "nearest_center_sample_true_deg": "sample to nearest wrong centre, D*, °",
        },
    ),
    "fig8": (
        "Figure 8: localisation of the centres",
        ALL,
        {
            "center_shift_deg": "centre shift, °",
            "spread_train_deg": "mean angle to the centre, D_LT, °",
            "spread_true_deg": "mean angle to the centre, D*, °",
        },
    ),
}
"""Of each plot: its caption, the encoders and the measures in it."""

PRINTED = {"table1": ("Table 1: swapping the data set", 0.015), "fig3": ("Figure 3: the augmentation ladder", 0.02)}
"""Of each printed table: its caption, and how close to the paper a reproduction should come."""


def build(evidence: Evidence) -> Iterator[tuple[Table, Table]]:
    """Yield every table that the results give, as (numbers for CSV, the same for readers)."""
    rows, dataset, made_by = evidence.accuracies(), evidence.dataset, label_of(evidence.recipe)
    for name, printed in (("table1", targets.table1(dataset)), ("fig3", targets.figure3(dataset))):
        ours = {row: accuracy for row, accuracy in rows.items() if (": " in row) == (name == "fig3")}
        own = [row for row in ours if row.endswith(" stage1")] if name == "table1" else []
        beside = printed | (targets.stage1(dataset) if own else {})
        if ours:
            order = [*(printed or (row for row in ours if row not in own)), *own]
            yield _accuracies(name, made_by, {row: ours.get(row, []) for row in order}, beside)
    if "geometry" in evidence.results:
        for name in FIGURES:
            yield _figure(name, made_by, evidence.results["geometry"])


def write(out: Path, tables: Sequence[tuple[Table, Table]]) -> list[Path]:
    """Write each table to OUT/tables/paper-NAME as CSV, Markdown and LaTeX; return the paths."""
    return [
        write_file(out / "tables" / f"paper-{numbers.name}.{suffix}", text)
        for numbers, written in tables
        for suffix, text in (("csv", to_csv(numbers)), ("md", to_markdown(written)), ("tex", to_latex(written)))
    ]


def label_of(recipe: Mapping[str, Any]) -> str:
    """Return what results of a recipe may be called."""
    name = recipe["name"]
    return f"recipe {name}" if recipe["converged"] else f"recipe {name}: shortened, NOT a reproduction"


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation over seeds (n − 1 in the denominator); no deviation for one seed.

    >>> spread([0.7, 0.8]), spread([0.7]), spread([])
    ((0.75, 0.07071067811865482), (0.7, None), (None, None))
    """
    mean = float(np.mean(values)) if values else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def in_percent(fractions: Sequence[float]) -> str:
    """Return mean ± standard deviation over seeds in per cent, without its sign.

    >>> in_percent([0.7, 0.8]), in_percent([0.7]), in_percent([])
    ('75.00 ± 7.07', '70.00', '–')
    """
    return _mean_sd(*spread([100 * value for value in fractions]), 2)


def _accuracies(
    name: str, made_by: str, ours: Mapping[str, Sequence[float]], printed: Mapping[str, float]
) -> tuple[Table, Table]:
    caption, tolerance = PRINTED[name]
    title = f"{caption} ({made_by})"
    rows = []
    for cell, values in ours.items():
        mean, sd = spread(values)
        paper = printed.get(cell)
        difference = None if paper is None or mean is None else mean - paper
        rows.append(
            {
                "cell": cell,
                "label": label(cell),
                "paper": paper,
                "ours": mean,
                "ours_sd": sd,
                "seeds": len(values),
                "difference": difference,
                "written": f"{in_percent(values)} ({len(values)})" if values else "not run",
                "paper_written": percent(paper, 2),
                "difference_written": DASH if difference is None else number(100 * difference, 2),
                "close": None if difference is None else "yes" if abs(difference) <= tolerance else "no",
            }
        )
    numbers = [Column(field, field) for field in ("cell", "paper", "ours", "ours_sd", "seeds", "difference", "close")]
    written = [
        Column("label", "backbone → classifier" if name == "table1" else "rung (augmentation of stage 1)"),
        Column("paper_written", "paper"),
        Column("written", "ours, %: mean ± sd (seeds)"),
        Column("difference_written", "difference, points"),
        Column("close", f"within {100 * tolerance:g} points"),
    ]
    return Table(name, title, numbers, rows), Table(name, title, written, rows)


def _figure(name: str, made_by: str, geometry: Mapping[str, Any]) -> tuple[Table, Table]:
    caption, encoders, measures = FIGURES[name]
    title = f"{caption} ({made_by})"
    rows: list[Row] = []
    for field, words in measures.items():
        for encoder in encoders:
            runs = [run["paper"]["groups"] for run in geometry["encoders"][encoder]["seeds"].values()]
            row: Row = {"measure": field, "words": words, "encoder": encoder, "seeds": len(runs)}
            for group in GROUPS:
                values = [run[group][field] for run in runs if run.get(group) and run[group][field] is not None]
                complete = bool(values) and len(values) == len(runs)
                row[group], row[f"{group}_sd"] = spread(values) if complete else (None, None)
                row[f"{group}_written"] = _mean_sd(row[group], row[f"{group}_sd"], 3 if "°" not in words else 1)
            rows.append(row)
    fields = ["measure", "encoder", "seeds", *(f"{group}{end}" for group in GROUPS for end in ("", "_sd"))]
    written = [
        Column("words", "measure"),
        Column("encoder", "encoder"),
        *(Column(f"{group}_written", f"{group}: mean ± sd") for group in GROUPS),
        Column("seeds", "seeds", "count"),
    ]
    return Table(name, title, [Column(f, f) for f in fields], rows), Table(name, title, written, rows)


def _mean_sd(mean: float | None, sd: float | None, digits: int) -> str:
    """Return a mean with its standard deviation if there is one."""
    return number(mean, digits) if mean is None or sd is None else f"{number(mean, digits)} ± {number(sd, digits)}"
