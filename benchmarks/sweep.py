"""sweep: a comparison over many seeds, one run after the other, on two processes, and on a Ray cluster of this machine.

Every way is the whole command, imports and the start of processes and of the cluster included, one thread each. In the
last one a worker is killed in the middle of a training. Whatever the way, the numbers must be the same to the bit, and
each backbone is trained once.

What a way costs is what passes beyond the trainings: the seconds by the clock, less those that the store remembers of
each backbone, over those that train at a time. A machine that is faster in one minute than in the next changes both.
Ray is held against processes of this machine, which train two at a time as well.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import Options, number, origin

WAYS = {
    "one after the other": (),
    "two processes, `--jobs 2`": ("--jobs", "2"),
    "Ray, a worker killed": ("--on", "ray", "--jobs", "2"),
}
SIZES = {"full": (12, "resnet32(width=32)"), "quick": (4, "resnet8"), "tiny": (1, "resnet8(width=4)")}
"""Seeds and network."""
KILL_AFTER = {"full": 15.0, "quick": 1.0, "tiny": 1.0}
"""Seconds after the third backbone is begun that its worker is killed."""
MOST = 0.05


def run(options: Options, ways: Mapping[str, tuple[str, ...]] = WAYS) -> dict[str, Any]:
    """Carry out the sweep each way; return the rows, and whether the numbers are the same.

    Raises:
        RuntimeError: a way ended with an error.
    """
    seeds, model = SIZES[options.size]
    found, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for place, (way, asked) in enumerate(ways.items()):
            kill = KILL_AFTER[options.size] if "killed" in way else None
            out = Path(folder) / str(place)
            lines, seconds = _carried_out(out, seeds, model, asked, kill)
            results.append(_numbers(out))
            trained = _trained(out) / (2 if asked else 1)
            timed = {"seconds": round(seconds, 1), "training": round(trained, 1), "beyond": round(seconds - trained, 1)}
            found.append({"way": way, **timed, **_told(lines, out)})
            print(f"{way}: {seconds:.1f} s, {seconds - trained:.1f} s of them beyond the trainings", flush=True)
    return {
        "seeds": seeds,
        "model": model,
        "cores": os.cpu_count(),
        "ways": found,
        "same_numbers": all(result == results[0] for result in results),
    }


def _carried_out(
    out: Path, seeds: int, model: str, asked: tuple[str, ...], kill: float | None
) -> tuple[list[str], float]:
    """Run the command; return what it told and the seconds that it took."""
    command = [sys.executable, "-m", "tailscope", "compare", "--data", "digits", "--recipe", "demo", "--device", "cpu"]
    command += ["--methods", "ce; crt", "--gaps", "none", "--seeds", str(seeds), "--model", model, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # by default Ray's are nicer
    for name in ("RAY_ADDRESS", "TAILSCOPE_STORE"):
        environment.pop(name, None)
    started, lines, begun = time.monotonic(), list[str](), 0
    with subprocess.Popen(
        [*command, *asked], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if match := re.search(r"seed \d+ lt: begun .*process (\d+)", line):
                begun += 1
                if kill is not None and begun == 3:
                    threading.Timer(kill, os.kill, (int(match[1]), signal.SIGKILL)).start()
    if process.returncode:
        raise RuntimeError("\n".join(lines[-5:]))
    return lines, time.monotonic() - started


def _told(lines: list[str], out: Path) -> dict[str, Any]:
    done = [match[1] for line in lines if (match := re.match(r"done: digits seed (\d+) lt \(", line))]
    return {
        "backbones": len(list((out / "store" / "stage1").glob("*/DONE"))),
        "trained_twice": len(done) - len(set(done)),
        "lost": [line for line in lines if "its worker was lost" in line],
    }


def _trained(out: Path) -> float:
    """Return the seconds that the backbones took."""
    return sum(
        float(json.loads(path.read_text())["seconds"]) for path in (out / "store" / "stage1").glob("*/meta.json")
    )


def _numbers(out: Path) -> Any:
    """Return what the result says of the methods, without the seconds that they took."""
    methods = json.loads((out / "compare.json").read_text())["methods"]
    return [{name: value for name, value in method.items() if name != "seconds"} for method in methods]


def table(document: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    processes = document["ways"][1]
    lines = [
        "| | seconds | in trainings, of each slot | beyond them | overhead of Ray | |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["ways"]:
        cells = [row["way"], *(number(row[name]) for name in ("seconds", "training", "beyond")), "", ""]
        if row["way"].startswith("Ray"):
            cost = (row["beyond"] - processes["beyond"]) / processes["seconds"]
            cells[4:] = [f"{100 * cost:+.1f} %", "reached" if cost <= MOST else "**missed**"]
        lines.append(f"| {' | '.join(cells)} |")
    same = "the same to the bit each way" if document["same_numbers"] else "**not the same**"
    again = sum(row["trained_twice"] for row in document["ways"])
    lost = [line for row in document["ways"] for line in row["lost"]]
    return "\n".join(
        [
            *lines,
            "",
            f"{document['seeds']} backbones ({document['model']}, digits) and as many classifiers. The overhead of Ray"
            " is what passes beyond the trainings, less what does with two processes, as a share of their seconds; the"
            f" goal is {100 * MOST:.0f} % at most. Numbers: {same}; backbones that were trained twice: {again}.",
            "",
            *(f"Told: `{line}`." for line in lost),
            "",
            f"{origin(document)}; {document['size']} size.",
        ]
    )
