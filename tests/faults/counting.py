"""A plug-in of pytest that counts the cases that Hypothesis tried, test by test."""

import json
import os
from pathlib import Path

import pytest
from hypothesis.statistics import collector

CASES: dict[str, int] = {}


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item):
    """Listen to what Hypothesis says of its phases; nested tests report to the test that runs them."""
    name = f"{item.path.name}::{item.name}"

    def count(statistics: dict) -> None:
        cases = sum(len(statistics.get(phase, {}).get("test-cases", ())) for phase in ("reuse-phase", "generate-phase"))
        CASES[name] = CASES.get(name, 0) + cases

    with collector.with_value(count):
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the counts of a session that fuzzes."""
    path = os.environ.get("TAILSCOPE_FAULTS_COUNTS")
    if path and not Path(path).exists() and CASES:
        least = int(os.environ.get("TAILSCOPE_FUZZ", "1"))
        fuzzed = {name: cases for name, cases in sorted(CASES.items()) if cases >= least}
        failed = session.testsfailed
        Path(path).write_text(json.dumps({"cases": fuzzed, "all cases": sum(CASES.values()), "failed": failed}))
