"""Run the command line as users do, and write what each phase of a diagnosis took to the file $TAILSCOPE_PHASES."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = {
    "read": "tailscope.diagnosis.diagnose:prepare",
    "soundness": "tailscope.diagnosis.diagnose:doubts",
    "geometry": "tailscope.diagnosis.diagnose:describe",
    "classifiers": "tailscope.diagnosis.outcomes:score",
    "of these: learning curve": "tailscope.diagnosis.outcomes:_fits",
    "of these: fits to training samples": "tailscope.diagnosis.outcomes:fitted_to_training",
    "of these: choice of a remedy": "tailscope.diagnosis.outcomes:choose",
    "verdict": "tailscope.diagnosis.verdict:judge",
    "samples to look at": "tailscope.diagnosis.samples:drill_down",
    "collapse": "tailscope.diagnosis.diagnose:_collapse",
    "writing": "tailscope.report.objects:Diagnosis.save",
    "report": "tailscope.report:build",
}
"""Functions as their callers know them."""


def main() -> int:
    """Time the phases of one command, in seconds on the clock and of the processor."""
    found: dict[str, list[float]] = {}
    for phase, place in PHASES.items():
        module, _, path = place.partition(":")
        *outer, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, timed(getattr(owner, name), phase, found))
    from tailscope.cli import main as command

    started, used = time.perf_counter(), time.process_time()
    try:
        command()
    except SystemExit as ended:
        if ended.code:
            raise
    found["all"] = [time.perf_counter() - started, time.process_time() - used]
    Path(os.environ["TAILSCOPE_PHASES"]).write_text(json.dumps(found))
    return 0


def timed(function: Callable[..., Any], phase: str, found: dict[str, list[float]]) -> Callable[..., Any]:
    """Return the function, adding what it takes to its phase."""

    def run(*given: Any, **named: Any) -> Any:
        started, used = time.perf_counter(), time.process_time()
        try:
            return function(*given, **named)
        finally:
            before = found.get(phase, [0.0, 0.0])
            spent = time.perf_counter() - started, time.process_time() - used
            found[phase] = [old + new for old, new in zip(before, spent, strict=True)]
            print(f"{phase}: {spent[0]:.1f} s", file=sys.stderr, flush=True)

    return run


if __name__ == "__main__":
    sys.exit(main())
