"""The page: everything that the stored results say, in one HTML file that loads nothing from anywhere."""

from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import tailscope
from tailscope.groups import GROUPS
from tailscope.report import charts, geometry_rows, look, measures, provenance, results, rows, story, table_contents
from tailscope.report import tables as table_files
from tailscope.report.figure import PAGE_FONT, Figure, data_names, panel_specs, save
from tailscope.report.files import write
from tailscope.report.geometry_text import VARIANTS
from tailscope.report.look import Spec
from tailscope.report.results import Results
from tailscope.report.text import plural

WASH = {"light": "#f4f6f8", "dark": "#1d2328"}


def build(out: Path | str, *, figures: bool = True) -> Path:
    """Write `out`/report.html, its tables and, unless `figures` is False, its figures as SVG, PNG and PDF.

    Reads only the result files that lie in `out`; computes and trains nothing.

    Raises:
        UserError: there are no results, one cannot be read, or `out` cannot be written.
    """
    out = Path(out)
    found = results.load(out)
    drawn = charts.figures(found)
    panels = {figure.name: panel_specs(figure) for figure in drawn}
    data = charts.data(found)
    if figures:
        for figure in drawn:
            save(figure, panels[figure.name], data, out / "figures")
    table_files.write(out, found)
    context = _context(found, drawn, panels) | {"data": charts.columns(data), "files": figures}
    return write(out / "report.html", template("template.html.j2").render(context))


def _context(found: Results, drawn: list[Figure], panels: dict[str, list[Spec]]) -> dict[str, Any]:
    result = results.first(found)
    shown = {figure.name: entry(figure) for figure in drawn}
    tables = {table.name: table for table in table_contents.tables(found)}
    if "geometry" in found:
        tables |= {f"measures-{name}": table_contents.measures(found, name) for name in VARIANTS}
    return {
        "headline": story.headline(found),
        "findings": story.findings(found),
        "caveats": story.caveats(found),
        "warnings": warnings(found),
        "dataset": result["dataset"],
        "recipe": result["recipe"],
        "facts": _facts(found),
        "sections": _sections(found),
        "figures": shown,
        "geometry": [figure.name for figure in drawn if figure.variant],
        "variants": [(name, *VARIANTS[name]) for name in VARIANTS] if "geometry" in found else [],
        "tables": tables,
        "groups": [group for group in GROUPS if group in result["groups"]],
        "class_note": _class_note(found),
        "runs": provenance.by_result(found),
        "terms": measures.TERMS,
        "measures": [*measures.PAPER, *measures.CALIBRATED] if "geometry" in found else [],
        "sources": ", ".join(f"{verb}.json" for verb in found),
        "version": tailscope.__version__,
        "specs": specs(drawn, panels),
        "config": look.config(PAGE_FONT, legend=False),
        "style": Markup(style()),
        "script": Markup(asset("page.js")),
        "vega": Markup(vega()),
    }


def warnings(found: Results) -> list[str]:
    """Return the warnings of all result files, each once, and those of files that do not belong together."""
    texts = [text for verb in results.TRAINED if verb in found for text in found[verb]["warnings"]]
    texts += geometry_rows.warnings(found) if "geometry" in found else []
    return list(dict.fromkeys([*texts, *results.mismatches(found)]))


def entry(figure: Figure) -> dict[str, Any]:
    """Return what the template's macro `figure` needs."""
    parts = [
        {"title": panel.title, "legend": panel.keys, "id": f"{figure.name}-{k}"}
        for k, panel in enumerate(figure.panels)
    ]
    shared = len({tuple(panel.keys) for panel in figure.panels}) == 1
    return {"figure": figure, "panels": parts, "shared_keys": shared}


def specs(drawn: list[Figure], panels: dict[str, list[Spec]]) -> dict[str, Any]:
    """Return each panel's description for its container, with the names of the rows that it needs."""
    found = {}
    for figure in drawn:
        for k, spec in enumerate(panels[figure.name]):
            needed = sorted(data_names(spec) - set(spec.get("datasets", {})))
            found[f"{figure.name}-{k}"] = {"spec": spec | {"width": "container"}, "rows": needed}
    return found


def _facts(found: Results) -> list[str]:
    result = results.first(found)
    counts = result["counts"]
    recipe = result["recipe"]
    return [
        plural(len(counts), "class"),
        f"{max(counts):,} to {min(counts):,} training images a class",
        plural(len(result["seeds"]), "seed"),
        f"recipe {recipe['name']}" + ("" if recipe["converged"] else ", not converged"),
    ]


def _sections(found: Results) -> list[tuple[str, str]]:
    """Return the navigation: anchors and labels of the sections that exist."""
    optional = {"swap": ("swap", "Swap"), "ladder": ("ladder", "Ladder"), "geometry": ("geometry", "Features")}
    return [
        ("verdict", "Verdict"),
        ("data", "Data"),
        *(entry for verb, entry in optional.items() if verb in found),
        *([("claims", "Claims")] if "claims" in found else []),
        ("classes-table", "Classes"),
        ("warnings", "Warnings"),
        ("provenance", "How it was made"),
        ("words", "Words"),
    ]


def _class_note(found: Results) -> str:
    parts = []
    if "swap" in found:
        parts.append("Recalls are means over seeds; the gap, in points, is true → true minus lt → lt.")
    if "geometry" in found and "lt" in rows.encoders(found):
        parts.append("Spread gap, centre shift and escape rank are the calibrated ones of the encoder lt.")
    return " ".join([*parts, "An en dash means undefined."])


def style() -> str:
    """Return the style sheet, after the colours as CSS variables: light, dark where preferred, light on paper."""
    light = _variables(look.LIGHT | {"wash": WASH["light"]})
    dark = _variables(look.DARK | {"wash": WASH["dark"]})
    return (
        f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ {light} }} }}\n" + asset("page.css")
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


@cache
def vega() -> str:
    """Return the Vega runtime as one script; nothing in it may end the script early."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def asset(name: str) -> str:
    """Return a file of this package as text."""
    return package_files("tailscope.report").joinpath(name).read_text(encoding="utf-8")


def template(name: str) -> Any:
    """Return a template; the macros that stand before the page in `template.html.j2` are there in every one."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = lambda text: text.replace(" %", "\u00a0%").replace(" → ", "\u00a0→\u00a0")
    text = asset(name)
    if name != "template.html.j2":
        text = asset("template.html.j2").split("<!doctype html>")[0] + text
    return environment.from_string(text)
