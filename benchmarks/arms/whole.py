"""A whole process from start to end: `python -m benchmarks.arms.whole ours|sklearn FOLDER CLASSES MEASURED`.

Measures the geometry of every class of FOLDER/train.npz and FOLDER/unseen.npz, the rival of MEASURED of CLASSES, writes
the result beside them, and prints one line of JSON. Ours is the command line itself, without verdict and permutations.
"""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from benchmarks.workers import peak_bytes


def main(engine: str, folder: str, classes: int, measured: int) -> dict[str, float]:
    """Run and return the seconds of the part that grows with the classes measured, and the peak memory."""
    run = ours if engine == "ours" else rival
    return {"loop_seconds": run(Path(folder), classes, measured), "peak_bytes": peak_bytes()}


def ours(folder: Path, classes: int, measured: int) -> float:
    """Run `tailscope diagnose` in this process; all classes at once, so nothing is scaled."""
    from tailscope import cli

    files = ["--train", f"{folder / 'train.npz'}", "--unseen", f"{folder / 'unseen.npz'}", "--out", f"{folder / 'out'}"]
    options = ["--permutations", "0", "--no-verdict", "--no-report", "--overwrite"]
    given = sys.argv
    sys.argv = ["tailscope", "diagnose", *files, *options]
    try:
        with redirect_stdout(sys.stderr):
            cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.argv = given
    return 0.0


def rival(folder: Path, classes: int, measured: int) -> float:
    """Load, measure class by class with scikit-learn and NumPy, and write JSON."""
    from benchmarks.arms.geometry_sklearn import centers_of, measure_class, some_classes

    arrays = {}
    for side in ("train", "unseen"):
        with np.load(folder / f"{side}.npz", allow_pickle=False) as file:
            arrays[side], arrays[f"{side}_labels"] = file["features"], file["labels"]
    centers = centers_of(**arrays, classes=classes)
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    found = [measure_class(arrays, k, centers, 0, rng) for k in some_classes(classes, measured)]
    seconds = time.perf_counter() - started
    (folder / "rival.json").write_text(json.dumps(found, default=float))
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
