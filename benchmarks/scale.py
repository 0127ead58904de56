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

from benchmarks.measure import Spread
from benchmarks.record import Options, Record, Row

PARTS = (16, 4, 1)
PART_ROWS = 65_536
IMBALANCE = 100.0
APART = 0.25  # standard deviation of a coordinate of the classes' means; that of samples about them is 1
POLL = 0.1  # seconds
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """The whole data: training rows, held-out rows, features, classes and what `--memory` is given."""

    train: int
    unseen: int
    width: int
    classes: int
    memory: str


SIZES = {
    "full": Size(1_280_000, 50_000, 512, 1_000, "2GiB"),
    "quick": Size(20_000, 3_000, 512, 1_000, "2GiB"),
    "tiny": Size(800, 200, 16, 10, "2GiB"),
}


def run(options: Options) -> Record:
    """Diagnose a sixteenth, a quarter and all of the rows; of the smaller sizes all alone."""
    size, record = SIZES[options.size], Record("scale", options)
    for part in PARTS if options.size == "full" else (1,):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TAILSCOPE_BENCH_DIR")) as folder:
            found = measure(Path(folder), size, part)
        record.raw[f"1/{part}"] = found
        record.rows += rows_of(found)
    return record


def measure(folder: Path, size: Size, part: int) -> dict[str, Any]:
    """Return seconds, processor seconds and peak memory of a diagnosis of a part of the rows."""
    generate(folder / "train", counts(size.train // part, size.classes), size, 1)
    generate(folder / "unseen", np.full(size.classes, size.unseen // size.classes), size, 2)
    arguments = ["diagnose", "--train", folder / "train", "--unseen", folder / "unseen", "--out", folder / "out"]
    command = [sys.executable, "-m", "tailscope", *map(str, arguments), "--memory", size.memory]
    watched = watch(command, {**os.environ, "TAILSCOPE_CACHE": str(folder / "cache")})
    said = json.loads((folder / "out" / "diagnosis.json").read_text(encoding="utf-8"))
    rows = said["dataset"]["train_images"] + said["dataset"]["unseen_images"]
    shape = {"train": said["dataset"]["train_images"], "rows": rows, "width": size.width, "classes": size.classes}
    return {"part": part, **shape, "memory_option": size.memory, **watched, "load_after": os.getloadavg()[0]}


def counts(rows: int, classes: int) -> np.ndarray:
    """Return how many samples each class has, falling exponentially; at least 2."""
    shape = IMBALANCE ** (-np.arange(classes) / (classes - 1))
    return np.maximum(2, np.round(rows * shape / shape.sum())).astype(np.int64)


def generate(folder: Path, number: np.ndarray, size: Size, seed: int) -> None:
    """Write so many samples of each class in any order, in files of `PART_ROWS`; the means are the same in all."""
    import pyarrow as pa  # here because only this benchmark needs it
    from pyarrow import parquet

    folder.mkdir(parents=True)
    means = np.float32(APART) * np.random.default_rng(0).standard_normal((size.classes, size.width), dtype=np.float32)
    stream = np.random.default_rng(seed)
    labels = stream.permutation(np.repeat(np.arange(size.classes), number))
    for k, start in enumerate(range(0, len(labels), PART_ROWS)):
        own = labels[start : start + PART_ROWS]
        rows = (means[own] + stream.standard_normal((len(own), size.width), dtype=np.float32)).clip(0)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), size.width)
        table = pa.table({"features": lists, "label": own})
        parquet.write_table(table, folder / f"{k:05d}.parquet", use_dictionary=False, compression="none")


def watch(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command to its end and return its seconds, those of processors, and its peak memory in bytes.

    Raises:
        RuntimeError: it failed.
    """
    started, used = time.monotonic(), _used()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    held = mapped = 0
    while child.poll() is None:
        status = _status(child.pid)
        held = max(held, _bytes(status, "RssAnon"))
        mapped = max(mapped, _bytes(status, "VmHWM"))
        time.sleep(POLL)
    seconds = time.monotonic() - started
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{child.stdout.read() if child.stdout else ''}")
    return {"seconds": seconds, "cpu_seconds": _used() - used, "peak_bytes": held, "resident_bytes": mapped}


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
    what = f"{found['train']:,} × {found['width']:,}, {found['classes']:,} classes"
    per_row = 1e6 * found["cpu_seconds"] / found["rows"]
    memory = f"holds at most {found['peak_bytes'] / GIB:.2f} GiB, --memory {found['memory_option']}"
    note = f"{found['seconds'] / 60:.1f} minutes, {found['cpu_seconds'] / 60:.1f} of a processor; {memory}"
    return [Row(what, Spread.of([per_row]), "us/row of a processor", note=note)]
