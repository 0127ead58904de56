"""The page: everything that stored results say, in one HTML file that loads nothing from anywhere."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files as package_files
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import vl_convert
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

import tailscope
from tailscope.errors import UserError
from tailscope.groups import GROUPS
from tailscope.measures.fields import SHOWN
from tailscope.report import (
    charts,
    comparison,
    comparison_charts,
    diagnosis,
    diagnosis_charts,
    drilldown,
    encoders,
    marks,
    memorization,
    memorization_charts,
    reading,
    rows,
    story,
)
from tailscope.report.diagnosis_schema import Diagnosis
from tailscope.report.marks import Figure
from tailscope.report.rows import Row
from tailscope.report.schema import ALONE, TRAINED, VARIANTS, AnyResult, Comparison, Memorization, Results
from tailscope.report.text import DASH, Table, arrow, number, percent, plural, significant, write_tables
from tailscope.report.thumbnails import Thumbnails
from tailscope.store.files import write

LAST_SECTIONS = (("warnings", "Warnings"), ("provenance", "How it was made"), ("words", "Words"))
MANY_ROWS, FIRST_ROWS = 2_000, 500  # of the table by class: beyond, only the first are elements in the page
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """What is shown: a template with its content, figures and the rows of their charts, and tables."""

    template: str
    figures: Sequence[Figure]
    data: Mapping[str, Sequence[Row]]
    tables: Sequence[Table]
    content: dict[str, Any]

    @cached_property
    def panels(self) -> dict[str, list[marks.Spec]]:
        """The descriptions of each figure's panels."""
        return {figure.name: marks.panel_specs(figure) for figure in self.figures}


def build(out: Path, *, figures: bool = True) -> Path:
    """Do what `tailscope.report.build` says."""

    def diagnosed(result: Any) -> Page:
        return of_diagnosis(result, Thumbnails.load(out, result))

    makers: list[Callable[[Any], Page]] = [diagnosed, of_comparison, of_memorization]
    trained = _require_results(out)
    written = list[Path]()
    for verb, make in zip(ALONE, makers, strict=True):
        if (out / f"{verb}.json").exists():
            result = reading.read(out / f"{verb}.json", verb)
            written.append(_write(out, reading.page_name(out, verb), make(result), figures=figures))
    if trained:
        written.append(_write(out, "report.html", of_experiments(rows.load(out)), figures=figures))
    if (former := out / "report.html") not in written:  # of one of them, when it was alone here
        former.unlink(missing_ok=True)
    return written[-1]


def _require_results(out: Path) -> bool:
    """Refuse a folder without any result; return whether it has some of those that one report tells together."""
    if not out.is_dir():
        raise UserError(f"{out}: {'not a folder' if out.exists() else 'no such folder'}; give the --out of a verb")
    there = [verb for verb in (*TRAINED, *ALONE) if (out / f"{verb}.json").exists()]
    if not there:
        *some, last = (f"{verb}.json" for verb in (*TRAINED, *ALONE))
        raise UserError(f"{out}: no results to report; run a verb that writes {', '.join(some)} or {last}")
    return not set(there).isdisjoint(TRAINED)


def write_alone(path: Path, page: Page) -> Path:
    """Write a page without tables and figures beside it, and return its path."""
    return write(path, _rendered(page, files=False))


def _write(out: Path, name: str, page: Page, *, figures: bool) -> Path:
    for figure in page.figures if figures else ():
        marks.save(figure, page.panels[figure.name], page.data, out / "figures")
    write_tables(out / "tables", page.tables)
    return write(out / name, _rendered(page, files=figures))


def _rendered(page: Page, *, files: bool) -> str:
    """Return the page as HTML, with links to its figures as files where there are such."""
    context = {
        "figures": {figure.name: figure for figure in page.figures},
        "files": files,
        "tables": {table.name: table for table in page.tables},
        "measures": list(SHOWN.values()),
        "version": tailscope.__version__,
        "data": _columns({name: [_rounded(row) for row in rows] for name, rows in page.data.items()}),
        "specs": {f"{name}-{k}": _drawn(spec) for name, specs in page.panels.items() for k, spec in enumerate(specs)},
        "config": marks.config(marks.PAGE_FONT, legend=False),
        "style": Markup(_asset("page.css")),
        "script": Markup(_asset("page.js")),
        "vega": Markup(_vega()),
    }
    html: str = _template(page.template).render(context | page.content)
    return html


def of_experiments(results: Results) -> Page:
    """Return the page of the results of `swap`, `ladder` and `geometry`."""
    result, figures = rows.first(results), charts.figures(results)
    counts, recipe = result["counts"], result["recipe"]
    advice = story.advice(results)
    named = {"swap": "Swap", "ladder": "Ladder", "geometry": "Features", "claims": "Claims"}
    content = {
        "headline": story.headline(results),
        "findings": [text for text in story.findings(results) if not any(text in one for one in advice)],
        "caveats": story.caveats(results),
        "advice": [{"text": text} for text in advice],
        "warnings": rows.warnings(results),
        "dataset": result["dataset"],
        "recipe": recipe,
        "facts": [
            plural(len(counts), "class"),
            f"{max(counts):,} to {min(counts):,} training images a class",
            plural(len(result["seeds"]), "seed"),
            f"recipe {recipe['name']}" + ("" if recipe["converged"] else ", not converged"),
        ],
        "sections": [
            ("verdict", "Verdict"),
            ("data", "Data"),
            *((verb, label) for verb, label in named.items() if verb in results),
            ("classes-table", "Classes"),
            *LAST_SECTIONS,
        ],
        "geometry": [figure.name for figure in figures if figure.variant],
        "by_measure": _by_measure(results) if "geometry" in results else [],
        "groups": [group for group in GROUPS if group in result["groups"]],
        "class_note": story.class_note(results),
        "runs": [_provenance(verb, results[verb]) for verb in TRAINED if verb in results],
        "sources": ", ".join(f"{verb}.json" for verb in results),
    }
    return Page("experiments.html.j2", figures, charts.data(results), rows.tables(results), content)


def _by_measure(results: Results) -> list[Table]:
    """Return what of the geometry is shown as tables, of either variant."""
    made = [one for v in VARIANTS[::-1] for one in (rows.measures_table(results, v), rows.collapse_table(results, v))]
    return [table for table in made if table.rows]


def of_diagnosis(result: Diagnosis, thumbnails: Thumbnails | None = None) -> Page:
    """Return the page of a diagnosis, with thumbnails of its samples where there are some."""
    counts, dataset = result["counts"], result["dataset"]
    test_images = dataset.get("test_images")
    beside = encoders.findings(result)[1:]
    shown = None if thumbnails is None else thumbnails.shown(result)
    inputs = [
        (f"{encoder}, {role}", f"{one['source']} (SHA-256 {one['sha256'][:12]})")
        for encoder, given in result["spec"]["encoders"].items()
        for role, one in given.items()
        if one is not None
    ]
    content = {
        "headline": diagnosis.headline(result),
        "findings": [text for text in diagnosis.findings(result) if text not in beside],
        "beside": beside,
        "caveats": diagnosis.caveats(result),
        "warnings": result["warnings"],
        "advice": result["advice"],
        "dataset": dataset,
        "facts": [
            plural(len(counts), "class"),
            f"{max(counts):,} to {min(counts):,} training samples a class",
            plural(dataset["unseen_images"], "unseen sample"),
            *([plural(test_images, "test sample")] if test_images else []),
            f"{result['spec']['permutations']:,} permutations",
        ],
        "sections": [
            ("verdict", "Verdict"),
            *([("encoders", "Encoders")] if result.get("comparison") else []),
            *([("advice", "What else to try")] if result["advice"][1:] else []),
            ("by-count", "By count"),
            ("classes-table", "Classes"),
            *([("samples", "Samples")] if result.get("drilldown") else []),
            ("pairs", "Pairs"),
            *LAST_SECTIONS,
        ],
        "groups": [group for group in GROUPS if result["groups"].get(group)],
        "folds": drilldown.folds(result, shown),
        "samples_note": drilldown.note(result, shown),
        "facts_of_making": [*_facts_of_making(result), *inputs],
        "spec": _spec(result),
        "sources": "diagnosis.json",
    }
    figures = diagnosis_charts.figures(result)
    return Page("diagnosis.html.j2", figures, diagnosis_charts.data(result), diagnosis.tables(result), content)


def _words(words: ModuleType, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module of sentences says of a result, and what the result says of itself."""
    return {
        "headline": words.headline(result),
        "findings": words.findings(result),
        "caveats": words.caveats(result),
        "advice": [{"text": text} for text in words.advice(result)],
        **{name: result[name] for name in ("warnings", "dataset", "recipe")},
    }


def of_comparison(result: Comparison) -> Page:
    """Return the page of a comparison of methods."""
    figures = comparison_charts.figures(result)
    gaps = [("gaps", "Gaps")] if figures[0].name == "plane" else []
    content = {
        **_words(comparison, result),
        "facts": comparison.facts(result),
        "sections": [
            ("verdict", "Verdict"),
            ("methods-table", "Methods"),
            *gaps,
            ("classes-table", "Classes"),
            *LAST_SECTIONS,
        ],
        "groups": [group for group in GROUPS if group in result["groups"]],
        "baseline": result["baseline"],
        "rule": result["rule"],
        "calls": comparison.settings(result),
        "run": _provenance("compare", result),
        "sources": "compare.json",
    }
    return Page("comparison.html.j2", figures, comparison_charts.data(result), comparison.tables(result), content)


def of_memorization(result: Memorization) -> Page:
    """Return the page of memorisation by subsampled training."""
    parts = [card for card in result["provenance"] if card["row"] == "part"]
    seconds = [taken for card in parts if (taken := card.get("seconds")) is not None]
    whole = [card for card in result["provenance"] if card["row"] != "part"]
    content = {
        **_words(memorization, result),
        "facts": memorization.facts(result),
        "sections": [
            ("verdict", "Verdict"),
            ("memorised-classes", "Memorised"),
            ("gap", "Spread gap"),
            ("classes-table", "Classes"),
            *LAST_SECTIONS,
        ],
        "groups": [group for group in GROUPS if group in result["groups"]],
        "share": percent(result["share"], 0),
        "trainings": parts,
        "seconds": number(sum(seconds) / len(seconds)) if seconds else DASH,
        "run": _provenance("memorization", {**result, "provenance": whole}),
        "sources": "memorization.json",
    }
    figures, tables = memorization_charts.figures(result), memorization.tables(result)
    return Page("memorization.html.j2", figures, memorization_charts.data(result), tables, content)


def _columns(data: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Any]]]:
    """Return the rows as columns, which repeat no names; a field that a row lacks is None.

    >>> _columns({"a": [{"x": 1}, {"x": 2, "y": 3}]})
    {'a': {'x': [1, 2], 'y': [None, 3]}}
    """
    return {
        name: {field: [row.get(field) for row in entries] for field in dict.fromkeys(chain.from_iterable(entries))}
        for name, entries in data.items()
    }


def _rounded(row: Row) -> Row:
    """Return a row with six significant digits: enough for a chart, and the page stays small."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def _drawn(spec: marks.Spec) -> dict[str, Any]:
    """Return a panel's description for its container, with the names of the rows that it needs."""
    needed = marks.data_names(spec) - set(spec.get("datasets", {}))
    return {"spec": spec | {"width": "container"}, "rows": sorted(needed)}


# ---- how results were made


def _provenance(verb: str, result: Any) -> dict[str, Any]:
    """Return what surrounds a result file: its facts, its full spec, and a card a row with its seeds side by side."""
    entries = result["provenance"]
    by_row = {row: [entry for entry in entries if entry["row"] == row] for row in _distinct(e["row"] for e in entries)}
    facts = [
        *_facts_of_making(result),
        ("arithmetic of backbones", _arithmetics(entries, "arithmetic")),
        ("arithmetic of classifiers", _arithmetics(entries, "stage2_arithmetic")),
        ("subset SHA-256", ", ".join(digest[:16] for digest in _distinct(result.get("subset_sha256", [])))),
    ]
    return {
        "verb": verb,
        "facts": [(name, value or DASH) for name, value in facts],
        "spec": _spec(result),
        "cards": [_card(row, members) for row, members in by_row.items()],
    }


def _facts_of_making(result: AnyResult) -> Facts:
    environment = result.get("environment", {})
    hardware = environment.get("hardware", {})
    versions = [f"{name} {version}" for name, version in environment.get("versions", {}).items()]
    plugins = [
        " ".join(filter(None, [one["name"], one["version"], f"(SHA-256 {one['sha256'][:16]})"]))
        for one in environment.get("plugins", [])
    ]
    return [
        ("command", result.get("command") or DASH),
        ("written", result.get("created") or DASH),
        ("versions", ", ".join(versions) or DASH),
        *([("plug-ins", ", ".join(plugins))] if plugins else []),
        ("processor", f"{hardware.get('cpu') or DASH}, {hardware.get('cores') or DASH} cores"),
        ("accelerator", hardware.get("gpu") or "none"),
    ]


def _spec(result: Any) -> str:
    return json.dumps(result["spec"], indent=2, ensure_ascii=False)


def _arithmetics(entries: Sequence[Row], field: str) -> str:
    """Return what the rows' stages were computed by, each once; more than one is worth a word."""
    found = _distinct(_text(field, entry[field]) for entry in entries if entry.get(field))
    return f"differs between rows or seeds: {'; '.join(found)}" if len(found) > 1 else "".join(found)


def _card(row: str, members: Sequence[Row]) -> dict[str, Any]:
    """Return one row's provenance: a field's value once where seeds agree, else one value a seed."""
    names = [name for name in _distinct(name for member in members for name in member) if name not in ("row", "seed")]
    values = {name: [_text(name, member.get(name)) for member in members] for name in names}
    fields = [(name.replace("_", " "), v if len(set(v)) > 1 else v[:1]) for name, v in values.items()]
    seconds = [member["seconds"] for member in members if member.get("seconds") is not None]
    facts = [
        str(members[0].get("model") or DASH),
        f"{_text('epochs', members[0].get('epochs'))} epochs",
        f"{number(sum(seconds) / len(seconds))} s a seed" if seconds else "",
        "arithmetic differs between seeds" if len({str(member.get("arithmetic")) for member in members}) > 1 else "",
    ]
    seeds = [member.get("seed") for member in members]
    return {"title": arrow(row), "summary": ", ".join(filter(None, facts)), "seeds": seeds, "fields": fields}


def _text(name: str, value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return f"{len(value)} values, {max(value)} to {min(value)}" if value else DASH
    if isinstance(value, dict):
        return ", ".join(DASH if part is None else str(part) for part in value.values())
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value) if name in ("seconds", "images_per_second") else significant(value, 6)
    return str(value)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# ---- assets


def _template(name: str) -> Any:
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "texts_after": _texts_after}
    environment.globals |= {"MANY_ROWS": MANY_ROWS, "FIRST_ROWS": FIRST_ROWS}
    return environment.get_template(name)


def _texts_after(table: Table, first: int) -> dict[str, Any]:
    """Return a table's rows after the first ones as texts, by column, for the page's script to make rows of.

    Rows of elements would take several times as much.
    """
    rest = table.rows[first:]
    return {
        "cells": [[column.written(row).replace(" %", "\u00a0%") for row in rest] for column in table.columns],
        "fields": [column.field for column in table.columns],
        "anchors": {k: row["anchor"] for k, row in enumerate(rest) if row.get("anchor")},
    }


@cache
def _vega() -> str:
    """Return the Vega runtime as one script; nothing in it may end the script early."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _prose(text: str) -> Markup:
    r"""Return text as HTML in which no unit, arrow or option of the command line breaks in the middle.

    >>> str(_prose("1 % of <b>: give --ceiling"))
    '1\xa0% of &lt;b&gt;: give <code>--ceiling</code>'
    """
    kept = text.replace(" %", "\u00a0%").replace(" → ", "\u00a0→\u00a0")
    return Markup(OPTION.sub(r"<code>\g<0></code>", str(escape(kept))))


def _asset(name: str) -> str:
    return package_files("tailscope.report").joinpath(name).read_text(encoding="utf-8")
