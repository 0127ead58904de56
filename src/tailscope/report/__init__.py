"""The report: one HTML page with figures and tables, made from stored results alone.

`build` writes it; `load` reads the results it is made of; `story` and `tables` say the same in sentences and files.
"""

from tailscope.report import story, tables
from tailscope.report.pages import build
from tailscope.report.results import load

__all__ = ["build", "load", "story", "tables"]
