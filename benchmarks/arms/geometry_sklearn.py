"""The same measurements with scikit-learn and NumPy, class by class, as a competent user would write them.

`python -m benchmarks.arms.geometry_sklearn ours|sklearn FOLDER CLASSES MEASURED` is a whole process from start to end:
it measures the geometry of every class of FOLDER/train.npz and FOLDER/unseen.npz, the rival of MEASURED of CLASSES,
writes the result beside them, and prints one line of JSON. Ours is the command line itself, without verdict and
permutations.
"""

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from benchmarks.measure import Pace, peak_bytes

Array = np.ndarray[Any, Any]


def angle(cosine: Array) -> Array:
    """Return degrees."""
    degrees: Array = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return degrees


@dataclass
class Centers:
    """Class means of the training samples and of all samples, and the angle to the nearest other mean."""

    train: Array
    true: Array
    nearest_train: Array
    nearest_true: Array


def centers_of(train: Array, train_labels: Array, unseen: Array, unseen_labels: Array, classes: int) -> Centers:
    """Compute all centres and the distances between them."""
    means, all_means = [], []
    for k in range(classes):
        s, u = train[train_labels == k], unseen[unseen_labels == k]
        means.append(s.mean(0, dtype=np.float64))
        all_means.append((s.sum(0, dtype=np.float64) + u.sum(0, dtype=np.float64)) / (len(s) + len(u)))
    both = np.stack(means), np.stack(all_means)
    nearest = []
    for centers in both:
        cosine = cosine_similarity(centers)
        np.fill_diagonal(cosine, -1)
        nearest.append(angle(cosine.max(1)))
    return Centers(*both, *nearest)


def second_moments(t: Array, rng: np.random.Generator) -> dict[str, float]:
    """Size and shape of a class's covariance, biased and unbiased, and its first principal component."""
    n = len(t)
    covariance = np.cov(t, rowvar=False)
    trace, norm = np.trace(covariance), np.linalg.norm(covariance)
    fourth = (((t - t.mean(0)) ** 2).sum(1) ** 2).sum() / (n - 1)
    scale = (n - 1) / (n * (n - 2) * (n - 3))
    norm_squared = scale * ((n - 1) * (n - 2) * norm**2 + trace**2 - n * fourth)
    trace_squared = scale * (2 * norm**2 + (n * n - 3 * n + 1) * trace**2 - n * fourth)
    halves = np.array_split(rng.permutation(n), 2)
    low = []
    for a, b in (halves, halves[::-1]):
        direction = PCA(n_components=1).fit(t[a]).components_[0]
        low.append((t[b] @ direction).var(ddof=1) / trace)
    return {
        "variance": float(trace),
        "covariance_norm": float(norm),
        "covariance_norm_unbiased": float(np.sqrt(max(0.0, norm_squared))),
        "effective_rank": float(trace_squared / norm_squared),
        "first_pc_share": float(PCA(n_components=1).fit(t).explained_variance_ratio_[0]),
        "first_pc_share_low": float(np.mean(low)),
    }


def compactness(s: Array, u: Array, t: Array, center: Array, true_center: Array) -> dict[str, float]:
    """Angles of samples to their centres, escape, and the shift of the centre."""
    inside = angle(cosine_similarity(s, center[None])[:, 0])
    outside = angle(cosine_similarity(u, center[None])[:, 0])
    quantiles = np.quantile(np.concatenate([inside, outside]), [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        "spread_train_deg": inside.mean(),
        "angular_width_deg": inside.max(),
        "escape_rate": (outside > inside.max()).mean(),
        "spread_true_deg": angle(cosine_similarity(t, true_center[None])).mean(),
        "center_shift_deg": angle(cosine_similarity(center[None], true_center[None]))[0, 0],
        "median_true_deg": quantiles[2],
        "norm_ratio": np.linalg.norm(s, axis=1).mean() / np.linalg.norm(u, axis=1).mean(),
    }


def matched(s: Array, u: Array) -> dict[str, float]:
    """Leave-one-out gap, conformal escape and Chen and Qin's displacement."""
    n, total = len(s), s.sum(0)
    without = total - s
    own = angle((s * without).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(without, axis=1))
    gap = angle(cosine_similarity(u, without)).mean() - own.mean()
    furthest, rank = [], []
    for x in u:
        joint = (total + x)[None]
        lead = cosine_similarity(s, joint)[:, 0] - cosine_similarity(x[None], joint)[0, 0]
        furthest.append((lead > 0).all())
        rank.append((lead > 0).mean())
    spread_s, spread_u = s.var(0, ddof=1).sum(), u.var(0, ddof=1).sum()
    excess = ((s.mean(0) - u.mean(0)) ** 2).sum() - spread_s / n - spread_u / len(u)
    return {
        "spread_gap_deg": gap,
        "escape_conformal": float(np.mean(furthest)),
        "escape_rank": float(np.mean(rank)),
        "displacement": float(np.sign(excess) * np.sqrt(abs(excess) / spread_u)),
        "variance_ratio": spread_s / spread_u,
    }


def separation(s: Array, t: Array, k: int, centers: Centers) -> dict[str, float]:
    """Mean angle of samples to the nearest wrong centre."""
    found = {}
    for name, x, means in (("train", s, centers.train), ("true", t, centers.true)):
        cosine = cosine_similarity(x, means)
        cosine[:, k] = -1
        found[f"nearest_center_sample_{name}_deg"] = angle(cosine.max(1)).mean()
    return found


def permute(t: Array, n: int, permutations: int, rng: np.random.Generator) -> Array:
    """Return shift, gap, spread, escape and log variance ratio of random splits of a class, [permutations, 5]."""
    lengths = np.linalg.norm(t, axis=1)
    mean = t.mean(0)
    values = np.empty((permutations, 5))
    for b in range(permutations):
        order = rng.permutation(len(t))
        a, rest = order[:n], order[n:]
        s = t[a]
        center = s.mean(0)
        angles = angle(t @ center / (lengths * np.linalg.norm(center)))
        without = s.sum(0) - s
        own = angle((s * without).sum(1) / (lengths[a] * np.linalg.norm(without, axis=1)))
        shift = angle(center @ mean / (np.linalg.norm(center) * np.linalg.norm(mean)))
        ratio = np.log(s.var(0, ddof=1).sum() / t[rest].var(0, ddof=1).sum())
        inside, outside = angles[a], angles[rest]
        values[b] = shift, outside.mean() - own.mean(), inside.mean(), (outside > inside.max()).mean(), ratio
    return values


def measure_class(
    arrays: dict[str, Array], k: int, centers: Centers, permutations: int, rng: np.random.Generator
) -> dict[str, float]:
    """Return all measurements of class k."""
    s = arrays["train"][arrays["train_labels"] == k]
    u = arrays["unseen"][arrays["unseen_labels"] == k]
    t = np.concatenate([s, u])
    entry = {
        **second_moments(t, rng),
        **compactness(s, u, t, centers.train[k], centers.true[k]),
        **matched(s, u),
        **separation(s, t, k, centers),
    }
    if permutations:
        drawn = permute(t, len(s), permutations, rng)
        entry["spread_gap_p"] = (1 + (drawn[:, 1] >= entry["spread_gap_deg"]).sum()) / (permutations + 1)
    return entry


def some_classes(classes: int, measured: int) -> list[int]:
    """Return which classes are measured: evenly spaced, so that the long tail is represented."""
    return [int(k) for k in np.linspace(0, classes - 1, measured)]


def engine(pace: Pace, *, rows: int, dimension: int, classes: int, measured: int, permutations: int) -> None:
    """Measure some of the classes, once a step; items are classes. The centres of all are timed before."""
    from benchmarks.arms.ours import make_features

    arrays = make_features(rows, dimension, classes).arrays()
    started = time.perf_counter()
    centers = centers_of(**arrays, classes=classes)
    rng = np.random.default_rng(0)
    pace.ready(centers_seconds=time.perf_counter() - started)
    while True:
        for k in some_classes(classes, measured):
            measure_class(arrays, k, centers, permutations, rng)
        pace.step(measured)


# -- whole processes --------------------------------------------------------------------------------------------------


def whole(engine: str, folder: str, classes: int, measured: int) -> dict[str, float]:
    """Run and return the seconds of the part that grows with the classes measured, and the peak memory."""
    run = whole_ours if engine == "ours" else whole_rival
    return {"loop_seconds": run(Path(folder), classes, measured), "peak_bytes": peak_bytes()}


def whole_ours(folder: Path, classes: int, measured: int) -> float:
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


def whole_rival(folder: Path, classes: int, measured: int) -> float:
    """Load, measure class by class with scikit-learn and NumPy, and write JSON."""
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
    print(json.dumps(whole(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
