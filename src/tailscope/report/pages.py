"""Which pages the results of a folder give."""

from pathlib import Path

from tailscope.report.results import TRAINED


def build(out: Path | str, *, figures: bool = True) -> Path:
    """Write the report of what lies in `out` and return the page: report.html.

    A diagnosis beside results of experiments gets a page of its own, diagnosis.html.

    Raises:
        UserError: there are no results, one cannot be read, or `out` cannot be written.
    """
    from tailscope.report import diagnosis_page, page  # here because they import drawing libraries, for a second

    out = Path(out)
    diagnosed = (out / "diagnosis.json").exists()
    trained = any((out / f"{verb}.json").exists() for verb in TRAINED)
    if diagnosed:
        name = "diagnosis.html" if trained else "report.html"
        written = diagnosis_page.build(out, name, figures=figures)
        if not trained:
            return written
    return page.build(out, figures=figures)
