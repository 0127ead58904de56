"""The report: one HTML page with figures and tables, made from stored results alone.

`build` writes it; `load` reads the results it is made of; `write_tables` writes them as tables.
"""

from pathlib import Path

from tailscope.report.rows import load
from tailscope.report.rows import write as write_tables

__all__ = ["build", "load", "write_tables"]


def build(out: Path | str, *, figures: bool = True) -> Path:
    """Write the report of what lies in `out`, its tables and, unless `figures` is False, its figures; return the page.

    A diagnosis or a comparison beside other results gets a page of its own, diagnosis.html or compare.html. Nothing is
    computed or trained.

    Raises:
        UserError: there are no results, one cannot be read, or `out` cannot be written.
    """
    from tailscope.report import page  # here because it imports libraries that draw, for a second

    return page.build(Path(out), figures=figures)
