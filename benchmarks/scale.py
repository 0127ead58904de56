"""scale: a diagnosis of a folder of Parquet files larger than memory, and what one row of it costs as rows grow.

The data are generated in a temporary folder: classes whose counts fall exponentially to a hundredth, and as many
held-out samples of each. `tailscope diagnose` runs as a user runs it, in a process of its own, whose memory is looked
at ten times a second. Memory is what the process itself holds (anonymous pages, `RssAnon` of Linux): pages of mapped
files are the system's, which forgets them where memory is short.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from benchmarks.measure import Spread
from benchmarks.record import Options, Record, Row

PARTS = (16, 4, 1)
PART_ROWS = 65_536
IMBALANCE = 100.0
APART = 0.25  # standard deviation of a coordinate of the classes' means; that of samples about them is 1
POLL = 0.1  # seconds
STEP = re.compile(r"(geometry|classifiers): ([\d.]+) s")
WORK = Path(__file__).resolve().parents[1] / "out" / "bench-scale"
GIB = 2**30
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """The whole data: training rows, held-out rows, features, classes and what `--memory` is given (3 GB at most)."""

    train: int
    unseen: int
    width: int
    classes: int
    memory: str


SIZES = {
    "full": Size(1_280_000, 50_000, 512, 1_000, "2.75GiB"),
    "quick": Size(20_000, 3_000, 512, 1_000, "2GiB"),
    "tiny": Size(800, 200, 16, 10, "2GiB"),
}


def run(options: Options) -> Record:
    """Diagnose a sixteenth, a quarter and all of the rows, of the smaller sizes all at once; what is done is kept."""
    from benchmarks.verdicts.run import JUDGED, Kept, fingerprint  # here because it imports PyTorch

    size, record = SIZES[options.size], Record("scale", options)
    kept = Kept(WORK / "parts.jsonl", fingerprint((*JUDGED, "src/tailscope/tables", "benchmarks/scale.py")))
    for part in PARTS if options.size == "full" else (1,):
        name = f"{options.size} 1/{part}"
        if name not in kept.records or options.size == "tiny":
            WORK.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                kept.add({"case": name, **measure(Path(folder), size, part)})
        record.raw[name] = kept.records[name]
        record.rows += rows_of(kept.records[name])
    return record


def measure(folder: Path, size: Size, part: int) -> dict[str, Any]:
    """Return seconds, processor seconds and peak memory of a diagnosis of a part of the training rows."""
    number = counts(size.train // part, size.classes)
    generate(folder / "train", number, size, 1)
    generate(folder / "unseen", np.full(size.classes, size.unseen // size.classes), size, 2)
    classifier(folder / "classifier.npz", number, size)
    arguments = ["--train", folder / "train", "--unseen", folder / "unseen", "--out", folder / "out"]
    arguments += ["--classifier", folder / "classifier.npz", "--memory", size.memory]
    command = [sys.executable, "-m", "tailscope", "diagnose", "--verbose", *map(str, arguments)]
    before = os.getloadavg()[0]
    watched = watch(command, {**os.environ, "TAILSCOPE_CACHE": str(folder / "cache")})
    said = json.loads((folder / "out" / "diagnosis.json").read_text(encoding="utf-8"))["dataset"]
    shape = {"train": said["train_images"], "unseen": said["unseen_images"], "width": size.width}
    load = [round(one, 1) for one in (before, os.getloadavg()[0])]
    return {"part": part, **shape, "classes": size.classes, "memory_option": size.memory, **watched, "load": load}


def counts(rows: int, classes: int) -> Counts:
    """Return how many samples each class has, falling exponentially; at least 2."""
    shape = IMBALANCE ** (-np.arange(classes) / (classes - 1))
    found: Counts = np.maximum(2, np.round(rows * shape / shape.sum())).astype(np.int64)
    return found


def means_of(size: Size) -> Floats:
    """Return the classes' means [C, d], before what is below 0 is cut off."""
    return np.float32(APART) * np.random.default_rng(0).standard_normal((size.classes, size.width), dtype=np.float32)


def classifier(path: Path, number: Counts, size: Size) -> None:
    """Write the classifier in use: linear discriminants with the training set's priors, as a long tail leaves it."""
    means = means_of(size).astype(np.float64)
    centers = means * ndtr(means) + np.exp(-0.5 * means**2) / np.sqrt(2 * np.pi)  # of a normal variable cut off at 0
    bias = np.log(number / number.sum()) - 0.5 * (centers**2).sum(axis=1)
    np.savez(path, weight=centers.astype(np.float32), bias=bias.astype(np.float32))


def generate(folder: Path, number: Counts, size: Size, seed: int) -> None:
    """Write so many samples of each class in any order, in files of `PART_ROWS`; the means are the same in all."""
    import pyarrow as pa  # here because only this benchmark needs it
    from pyarrow import parquet

    folder.mkdir(parents=True)
    means, stream = means_of(size), np.random.default_rng(seed)
    labels = stream.permutation(np.repeat(np.arange(size.classes), number))
    for k, start in enumerate(range(0, len(labels), PART_ROWS)):
        own = labels[start : start + PART_ROWS]
        rows = (means[own] + stream.standard_normal((len(own), size.width), dtype=np.float32)).clip(0)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), size.width)
        table = pa.table({"features": lists, "label": own})
        parquet.write_table(table, folder / f"{k:05d}.parquet", use_dictionary=False, compression="none")


def watch(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command to its end and return its seconds, those of processors, its peak memory in bytes, and its steps.

    Raises:
        RuntimeError: it failed.
    """
    started, used = time.monotonic(), _used()
    held = resident = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        child = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while child.poll() is None:
            status = _status(child.pid)
            held, resident = max(held, _bytes(status, "RssAnon")), max(resident, _bytes(status, "VmHWM"))
            time.sleep(POLL)
        seconds = time.monotonic() - started
        said.seek(0)
        text = said.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{text}")
    steps = {name: float(took) for name, took in STEP.findall(text)}
    measured = {"seconds": seconds, "cpu_seconds": _used() - used, "peak_bytes": held, "resident_bytes": resident}
    return {**measured, "steps": steps}


def _used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended, or there is no /proc
        return ""


def _bytes(status: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Return the lines of the table of one size."""
    what = f"{found['train']:,} and {found['unseen']:,} rows × {found['width']:,}, {found['classes']:,} classes"
    per_row = 1e6 * found["cpu_seconds"] / (found["train"] + found["unseen"])
    memory = f"holds {found['peak_bytes'] / GIB:.2f} GiB at most, with `--memory {found['memory_option']}`"
    note = f"{found['cpu_seconds'] / 60:.1f} minutes of a processor, {found['seconds'] / 60:.1f} by the clock; {memory}"
    return [Row(what, Spread.of([per_row]), "µs of a processor a row", note=note)]
