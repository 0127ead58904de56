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

from tailscope.origin import versions

TESTS = Path(__file__).resolve().parents[1]
RESULT = TESTS.parent / "results" / "faults.json"
FUZZ = "TAILSCOPE_FUZZ"
CASES = 2_000


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
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
