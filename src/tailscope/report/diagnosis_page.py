"""The page of a diagnosis: the verdict first, then what it rests on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

import tailscope
from tailscope.geometry.fields import FIELDS
from tailscope.groups import GROUPS
from tailscope.report import charts, diagnosis_charts, diagnosis_rows, diagnosis_story, diagnosis_tables, look, measures
from tailscope.report import page as base
from tailscope.report import tables as table_files
from tailscope.report.figure import PAGE_FONT, Figure, panel_specs, save
from tailscope.report.files import write
from tailscope.report.look import Spec
from tailscope.report.results import Result
from tailscope.report.table_model import Table
from tailscope.report.text import plural

TERMS = (
    ("classifier", "The last, linear layer, which turns features into classes."),
    ("representation", "What turns images into features: the encoder."),
    ("unseen samples", "Samples of the true distribution that had no part in training."),
    ("re-balanced", "The best remedy on frozen features, chosen on samples that it is not scored on."),
    (
        "classifier bound",
        "A linear classifier fitted to the true distribution, scored on other samples: what is within reach.",
    ),
    ("classifier gap", "Classifier bound minus current accuracy."),
    ("representation gap", "Ceiling minus classifier bound: at most what the representation costs."),
    ("[a, b]", "95 % interval over samples, for this encoder; it does not cover other trainings."),
    ("q", "p-value after Benjamini-Hochberg over the classes: the share of false alarms among flagged classes."),
    ("point", "One percentage point of accuracy."),
)


def build(out: Path, name: str = "report.html", *, figures: bool = True) -> Path:
    """Write the page of `out`/diagnosis.json as `out`/NAME, its tables and, unless `figures` is False, its figures.

    Raises:
        UserError: the result cannot be read, or `out` cannot be written.
    """
    result = diagnosis_rows.load(out / "diagnosis.json")
    drawn = diagnosis_charts.figures(result)
    panels = {figure.name: panel_specs(figure) for figure in drawn}
    data = {
        name: [{key: _short(value) for key, value in row.items()} for row in rows]
        for name, rows in diagnosis_charts.data(result).items()
    }
    if figures:
        for figure in drawn:
            save(figure, panels[figure.name], data, out / "figures")
    tables = {table.name: table for table in diagnosis_tables.tables(result)}
    _write_tables(out / "tables", tables)
    context = _context(result, drawn, panels, tables) | {"data": charts.columns(data), "files": figures}
    return write(out / name, base.template("diagnosis.html.j2").render(context))


def _context(
    result: Result, drawn: list[Figure], panels: dict[str, list[Spec]], tables: dict[str, Table]
) -> dict[str, Any]:
    shown = [*measures.PAPER, *measures.CALIBRATED]
    return {
        "headline": diagnosis_story.headline(result),
        "findings": diagnosis_story.findings(result),
        "caveats": diagnosis_story.caveats(result),
        "advice": result["advice"],
        "warnings": result["warnings"],
        "dataset": result["dataset"],
        "facts": _facts(result),
        "figures": {figure.name: base.entry(figure) for figure in drawn},
        "tables": tables,
        "groups": [group for group in GROUPS if result["groups"].get(group)],
        "terms": TERMS,
        "measures": [(m.field, m.label, m.meaning, FIELDS[m.field]) for m in shown if m.field in FIELDS],
        "inputs": _inputs(result),
        "spec": json.dumps(result["spec"], indent=1),
        "version": tailscope.__version__,
        "specs": base.specs(drawn, panels),
        "config": look.config(PAGE_FONT, legend=False),
        "style": Markup(base.style()),
        "script": Markup(base.asset("page.js")),
        "vega": Markup(base.vega()),
    }


def _facts(result: Result) -> list[str]:
    counts, data = result["counts"], result["dataset"]
    return [
        plural(len(counts), "class"),
        f"{max(counts):,} to {min(counts):,} training samples a class",
        plural(data["unseen_images"], "unseen sample"),
        *([plural(data["test_images"], "test sample")] if data["test_images"] else []),
        f"{result['spec']['permutations']:,} permutations",
    ]


def _inputs(result: Result) -> list[tuple[str, str]]:
    """Return what the diagnosis was given, and by what it was made."""
    found = [("Command", result["command"]), ("Created", result["created"])]
    for encoder, inputs in result["spec"]["encoders"].items():
        for role, one in inputs.items():
            if one is not None:
                found.append((f"{encoder}, {role}", f"{one['source']} (SHA-256 {one['sha256'][:12]})"))
    versions = ", ".join(f"{name} {version}" for name, version in result["environment"]["versions"].items())
    hardware = result["environment"]["hardware"]
    return [*found, ("Versions", versions), ("Hardware", f"{hardware['cpu']}, {hardware['cores']} cores")]


def _write_tables(folder: Path, tables: dict[str, Table]) -> None:
    writers: dict[str, Callable[[Table], str]] = {
        "csv": table_files.to_csv,
        "md": table_files.to_markdown,
        "tex": table_files.to_latex,
    }
    for table in tables.values():
        for suffix, writer in writers.items():
            write(folder / f"{table.name}.{suffix}", writer(table))


def _short(value: Any) -> Any:
    return float(f"{value:.{charts.DIGITS}g}") if isinstance(value, float) else value
