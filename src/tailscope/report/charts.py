"""All figures that the stored results allow, in the order of the page, and the rows they are drawn from."""

from typing import Any

from tailscope.report import charts_classes, charts_geometry, charts_swap, rows
from tailscope.report.figure import Figure
from tailscope.report.results import Results
from tailscope.report.rows import Row

DIGITS = 6  # significant ones; enough for a chart, and the page stays small


def figures(results: Results) -> list[Figure]:
    """Return the figures in the order of the page."""
    found = [charts_classes.profile(results)]
    if "swap" in results:
        found += [charts_swap.swap(results), charts_classes.classes(results)]
        if results["swap"]["attribution"] is not None:
            found.insert(0, charts_swap.attribution(results))
    if "ladder" in results:
        found.append(charts_swap.ladder(results))
    if "geometry" in results:
        found += [figure for variant in rows.VARIANTS for figure in charts_geometry.figures(results, variant)]
    return found


def data(results: Results) -> dict[str, list[Row]]:
    """Return the rows of all charts by name."""
    found = charts_classes.data(results) | charts_swap.data(results)
    if "geometry" in results:
        found |= charts_geometry.data(results)
    return {
        name: [{key: _rounded(value) for key, value in row.items()} for row in rows] for name, rows in found.items()
    }


def columns(data: dict[str, list[Row]]) -> dict[str, dict[str, list[Any]]]:
    """Return the rows as columns, which repeat no names; a field that a row lacks is None.

    >>> columns({"a": [{"x": 1}, {"x": 2, "y": 3}]})
    {'a': {'x': [1, 2], 'y': [None, 3]}}
    """
    found = {}
    for name, entries in data.items():
        fields = list(dict.fromkeys(field for row in entries for field in row))
        found[name] = {field: [row.get(field) for row in entries] for field in fields}
    return found


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
