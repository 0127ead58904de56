"""A whole process from start to end: `python -m benchmarks.arms.whole ours|sklearn FEATURES.npz CLASSES MEASURED`.

Loads features, measures the geometry of every class (the rival: of MEASURED of CLASSES) and prints one line of JSON.
"""

import json
import sys
import time

import numpy as np

from benchmarks.workers import peak_bytes


def main(engine: str, path: str, classes: int, measured: int) -> dict[str, float]:
    """Run and return the seconds of the part that grows with the classes measured, and the peak memory."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    loop_seconds = 0.0
    if engine == "ours":
        import torch

        from tailscope.geometry import describe
        from tailscope.training.runtime import keep_freed_memory

        keep_freed_memory()
        tensors = [torch.from_numpy(arrays[name]) for name in ("train", "train_labels", "unseen", "unseen_labels")]
        names = [str(k) for k in range(classes)]
        describe(tensors[0], tensors[1], tensors[2], tensors[3], names, permutations=0)
    else:
        from benchmarks.arms.geometry_sklearn import centers_of, measure_class, some_classes

        centers = centers_of(**arrays, classes=classes)
        rng = np.random.default_rng(0)
        started = time.perf_counter()
        for k in some_classes(classes, measured):
            measure_class(arrays, k, centers, 0, rng)
        loop_seconds = time.perf_counter() - started
    return {"loop_seconds": loop_seconds, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
