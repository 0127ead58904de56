"""The full round of `make test-faults`: its parts side by side, and what they counted to results/faults.json."""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tailscope.results import versions

TESTS = Path(__file__).resolve().parents[1]
RESULT = TESTS.parent / "results" / "faults.json"
FUZZ = "TAILSCOPE_FUZZ"
CASES = 2_000
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: written by `python -m tests.faults` -->\n", "<!-- end of counts -->"


def fuzzed() -> list[str]:
    """Return the test files that fuzz a reader: they read how often from the environment."""
    return sorted(str(path) for path in TESTS.glob("test_*.py") if FUZZ in path.read_text(encoding="utf-8"))


def start(name: str, folder: Path, arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    """Start one part."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "faults.counting", *arguments]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    counts = {"TAILSCOPE_FAULTS_COUNTS": str(folder / f"{name}.json"), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(command, cwd=TESTS.parent, env={**os.environ, **counts, **environment})


def hardware() -> dict[str, Any]:
    """Return what it ran on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": platform.processor() or platform.machine(), "cores": cores, "system": platform.system()}


def table(document: dict[str, Any]) -> str:
    """Return the counts as the page shows them."""
    environment, fuzz = document["environment"], document["fuzz"]
    cores, version = environment["hardware"]["cores"], environment["versions"]["tailscope"]
    rows = [(name, f"{value:g}") for name, value in document["faults"].items() if name != "seconds"]
    rows += [("tests that fuzz", len(fuzz["cases"])), ("fuzzed cases", f"{fuzz['all cases']:,}")]
    rows += [("fuzzed cases of a test, at least", f"{min(fuzz['cases'].values(), default=0):,}")]
    rows += [("minutes", round(document["seconds"] / 60)), ("passed", "yes" if document["passed"] else "no")]
    lines = [f"| {name} | {value} |" for name, value in rows]
    about = f"{document['created'][:10]}, {cores} cores, tailscope {version}"
    return "\n".join([about, "", "| what | count |", "|---|---|", *lines, ""])


def page(text: str, document: dict[str, Any]) -> str:
    """Return the page with the counts in their place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(document) + END + rest.partition(END)[2]


def main() -> int:
    """Run both parts and write the counts; return 0 if nothing failed."""
    started, amount = time.monotonic(), sys.argv[1] if len(sys.argv) > 1 else "1"
    cases = str(max(20, round(CASES * float(amount))))
    with TemporaryDirectory() as name:
        folder = Path(name)
        parts = [
            start("faults", folder, ["-m", "faults", str(TESTS / "faults")], TAILSCOPE_FAULTS=amount),
            start("fuzz", folder, ["-m", "slow or not slow", *fuzzed()], TAILSCOPE_FUZZ=cases),
        ]
        codes = [part.wait() for part in parts]
        counts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    document = {
        "schema": "tailscope.faults/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": not any(codes),
        "share_of_the_full_round": float(amount),
        "seconds": round(time.monotonic() - started),
        **counts,
        "environment": {"versions": versions(), "hardware": hardware()},
    }
    text = json.dumps(document, indent=1)
    print(text)
    if amount == "1":
        RESULT.write_text(text + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
