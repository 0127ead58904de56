"""Which samples to look at: what is taken for what, and of every class the samples that say most about its mistakes.

Three kinds of samples are listed of each class, all of them scored ones, which had no part in what judges them:
**nearest misses**, wrong by the smallest margin; **farthest out**, at the largest angle to the centre of their class;
and **likely mislabelled**, by confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating
Uncertainty in Dataset Labels", section 3): a cross-fitted classifier is as sure of another class as it is, on average,
of samples with that class's label. A map places some of all samples on a plane.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.decomposition import PCA
from torch import Tensor

from tailscope.classifiers.base import FeatureClassifier, Floats, IntArray, row_blocks
from tailscope.diagnosis.curve_fits import Rows
from tailscope.diagnosis.inputs import Inputs
from tailscope.diagnosis.learning_curve import Fits
from tailscope.intervals import FloatArray
from tailscope.measures.angles import angles_to
from tailscope.measures.rows import scaled
from tailscope.seeds import derive, numpy_stream
from tailscope.tables.mapped import take_rows

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

LISTED = 5  # samples of a kind in each class
MOST_LISTED = 2_000  # samples of a kind in all classes
MOST_CELLS = 40  # classes whose confusion matrix is given whole
TOP = 20  # confusions that are listed
DRAWN = 1_000  # samples on the map
KINDS = ("nearest_misses", "farthest_out", "likely_mislabelled")


class Looks(NamedTuple):
    """What is asked of each of m scored samples, beside whether it is right.

    Attributes:
        margins: [m] the classifier in use's logit of the class that it names minus that of the true one; 0 where right.
        suspected: [m] the class that it probably belongs to; -1 where its label is not doubted.
        probability: [m] of that class, by a classifier that was not fitted to the sample.
        own: [m] of the class of its label, by the same.
    """

    margins: FloatArray
    suspected: IntArray
    probability: FloatArray
    own: FloatArray

    @classmethod
    def of(cls, current: FeatureClassifier, scored: Rows, rows: IntArray, fits: Fits) -> "Looks":
        """Ask it of the rows [m] of the scored file; of the unseen samples where there is no test set."""
        logits, labels = _cross_fitted(fits, rows)
        classes = np.setdiff1d(np.arange(len(current.classes_)), fits.task.withheld)
        found, probability, own = doubt_labels(logits, labels, len(classes))
        suspected = np.where(found < 0, -1, classes[found])
        return cls(
            _margins(current, Rows(take_rows(scored.features, rows), scored.labels[rows])), suspected, probability, own
        )


def doubt_labels(
    logits: Callable[[slice], Floats], labels: IntArray, classes: int
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Find labels that are probably wrong, by confident learning (Northcutt et al. 2021, equations 1 and 2).

    A class counts for a sample where its probability reaches the mean that it has in samples with its label; of the
    classes that count the most probable is taken. `logits` [n, C] of a slice of the samples are those of classifiers
    that were not fitted to them.

    Returns:
        For each of m samples the class where it differs from the label, else -1; its probability; the label's.

    >>> logits = np.log(np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.05, 0.95]]))
    >>> doubt_labels(lambda rows: logits[rows], np.array([0, 0, 1, 1, 0]), 2)[0].tolist()
    [-1, -1, -1, -1, 1]
    """
    blocks = list(row_blocks(len(labels), classes))
    own = np.empty(len(labels))
    for block in blocks:
        own[block] = np.take_along_axis(softmax(logits(block), axis=1), labels[block, None], axis=1)[:, 0]
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, own, minlength=classes)
    threshold = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # nobody is of a class without samples
    found, probability = np.full(len(labels), -1), np.zeros(len(labels))
    for block in blocks:
        given = softmax(logits(block), axis=1)
        counting = np.where(given >= threshold, given, -1.0)
        best, most = counting.argmax(axis=1), counting.max(axis=1)
        found[block] = np.where((most >= 0) & (best != labels[block]), best, -1)
        probability[block] = np.maximum(most, 0)
    return found, probability, own


def _cross_fitted(fits: Fits, rows: IntArray) -> tuple[Callable[[slice], Floats], IntArray]:
    """Return logits [n, C'] of classifiers that were not fitted to the scored samples `rows`, and their labels."""
    task, pooled = fits.task, fits.pooled.classifiers
    wanted = fits.pooled.choose(task.scored)
    strength = min(set.intersection(*map(set, pooled)), key=lambda one: abs(one - wanted))
    if task.test is not None:
        placed, labels, _ = task.test
        fold = np.zeros(len(labels), dtype=np.int64)
    else:
        kept = np.isin(task.rows, rows)
        places, fold = task.unseen[kept], task.fold[kept]
        placed, labels = task.samples.placed[places], task.samples.labels[places]

    def logits(block: slice) -> Floats:
        kind = np.float32 if task.short else np.float64  # single precision is much faster
        found: Floats = np.empty((len(labels[block]), len(pooled[0][strength])), dtype=kind)
        for q in np.unique(fold[block]):
            held = fold[block] == q
            found[held] = (placed[block][held] @ pooled[q][strength].T).numpy()
        return found

    return logits, labels


def _margins(current: FeatureClassifier, rows: Rows) -> FloatArray:
    margins = np.empty(len(rows.labels))
    for block in row_blocks(len(rows.labels), len(current.classes_)):
        found = current.logits(rows.features[block])
        margins[block] = found.max(axis=1) - np.take_along_axis(found, rows.labels[block, None], axis=1)[:, 0]
    return margins


# ---- what the result holds


def drill_down(inputs: Inputs, outcomes: "Outcomes", centers: Tensor, seed: int) -> dict[str, Any]:
    """Return confusions, each class's precision, recall, F1 and samples to look at, and a map, as results hold them.

    `centers` [C, d] are the classes' means; `seed` draws the samples of the map.
    """
    angles = _angles(inputs, outcomes, centers)
    return {
        "file": "unseen" if inputs.test is None else "test",
        "scored": len(outcomes.labels),
        "listed": min(LISTED, MOST_LISTED // len(inputs.names)) or LISTED,
        "confusions": _confusions(outcomes, inputs.names),
        "classes": _classes(inputs, outcomes, angles),
        "map": _map(inputs, outcomes, seed),
    }


def _confusions(outcomes: "Outcomes", names: Sequence[str]) -> dict[str, Any]:
    """Return how often which class is taken for which: all cells of few classes, and the most frequent mistakes."""
    classes, counts = len(names), np.bincount(outcomes.labels, minlength=len(names))
    cells, numbers = np.unique(outcomes.labels * classes + outcomes.predicted, return_counts=True)
    true, named = np.divmod(cells, classes)
    wrong = np.flatnonzero(true != named)
    wrong = wrong[np.argsort(-numbers[wrong], kind="stable")]
    matrix = np.zeros((classes, classes), dtype=np.int64) if classes <= MOST_CELLS else None
    if matrix is not None:
        matrix[true, named] = numbers
    top = [
        {
            "true": names[true[k]],
            "predicted": names[named[k]],
            "count": int(numbers[k]),
            "share": float(numbers[k] / counts[true[k]]),
        }
        for k in wrong[:TOP]
    ]
    return {"matrix": None if matrix is None else matrix.tolist(), "pairs": len(wrong), "top": top}


def _classes(inputs: Inputs, outcomes: "Outcomes", angles: FloatArray) -> list[dict[str, Any]]:
    """Return each class's precision, recall and F1, and its samples of each kind."""
    classes = len(inputs.names)
    of, named = (np.bincount(part, minlength=classes) for part in (outcomes.labels, outcomes.predicted))
    right = np.bincount(outcomes.labels[outcomes.current], minlength=classes)
    order = np.argsort(outcomes.labels, kind="stable")
    members = np.split(order, np.cumsum(of)[:-1])
    most = np.full(classes, min(LISTED, MOST_LISTED // classes))
    if not most.any():  # so many classes that only those with most mistakes have samples listed
        most[np.argsort(right - of, kind="stable")[: MOST_LISTED // LISTED]] = LISTED
    return [
        {
            "scored": int(of[k]),
            "predicted": int(named[k]),
            "precision": _ratio(right[k], named[k]),
            "recall": _ratio(right[k], of[k]),
            "f1": _ratio(2 * right[k], of[k] + named[k]),
            "samples": _samples(inputs, outcomes, angles, members[k], int(most[k])),
        }
        for k in range(classes)
    ]


def _samples(inputs: Inputs, outcomes: "Outcomes", angles: FloatArray, members: IntArray, most: int) -> dict[str, Any]:
    """Return of each kind how many samples a class has, and the first of them."""
    looks = outcomes.looks
    wrong = members[~outcomes.current[members]]
    doubted = members[looks.suspected[members] >= 0]
    directed = members[np.isfinite(angles[members])]
    excess = looks.probability - looks.own
    ordered = (
        wrong[np.argsort(looks.margins[wrong], kind="stable")],
        directed[np.argsort(-angles[directed], kind="stable")],
        doubted[np.argsort(-excess[doubted], kind="stable")],
    )
    return {
        kind: {"count": len(found), "first": [_sample(inputs, outcomes, angles, int(k)) for k in found[:most]]}
        for kind, found in zip(KINDS, ordered, strict=True)
    }


def _sample(inputs: Inputs, outcomes: "Outcomes", angles: FloatArray, k: int) -> dict[str, Any]:
    """Return what is known of scored sample k."""
    table, looks, names, confidence = inputs.scored, outcomes.looks, inputs.names, float(outcomes.now.confidence[k])
    row, suspected = int(outcomes.rows[k]), int(looks.suspected[k])
    return {
        "row": row if table.numbers is None else int(table.numbers[row]),
        "id": None if table.ids is None else str(table.ids[row]),
        "predicted": names[outcomes.predicted[k]],
        "confidence": confidence,
        "true_probability": confidence * float(np.exp(-looks.margins[k])),
        "angle_deg": float(angles[k]) if np.isfinite(angles[k]) else None,
        "suspected": None if suspected < 0 else names[suspected],
        "suspected_probability": None if suspected < 0 else float(looks.probability[k]),
    }


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _angles(inputs: Inputs, outcomes: "Outcomes", centers: Tensor) -> FloatArray:
    """Return each scored sample's angle in degrees to the centre of its class, [m]; NaN where it has none."""
    features, found = inputs.scored.features, np.full(len(outcomes.labels), np.nan)
    for k in np.unique(outcomes.labels):
        of = np.flatnonzero(outcomes.labels == k)
        rows = features[outcomes.rows[of]]
        wide = scaled(rows if rows.dtype.itemsize >= 4 else rows.float(), inputs.power)
        found[of] = np.where(
            wide.any(dim=1).numpy(), angles_to(wide, scaled(centers[k].cpu(), inputs.power)).numpy(), np.nan
        )
    return found


def _map(inputs: Inputs, outcomes: "Outcomes", seed: int) -> dict[str, Any]:
    """Return the places on a plane of scored samples, drawn at random: by UMAP where it is installed, else by PCA."""
    draw = numpy_stream(seed, "samples", "map").permutation(len(outcomes.labels))[:DRAWN]
    draw.sort()
    features = scaled(inputs.scored.features[outcomes.rows[draw]].double(), inputs.power).numpy()
    explained = None
    if not np.ptp(features, axis=0).any():
        method, places, explained = "PCA", np.zeros((len(draw), 2)), []
    elif find_spec("umap") is not None and len(draw) > 15:
        method, umap = "UMAP", import_module("umap")
        fixed = {"random_state": derive(seed, "samples", "umap") % 2**32, "n_jobs": 1}  # more would not be repeatable
        places = umap.UMAP(n_components=2, **fixed).fit_transform(features)
    else:
        pca = PCA(min(2, *features.shape), svd_solver="full")
        method, places = "PCA", pca.fit_transform(features)
        explained = [float(share) for share in pca.explained_variance_ratio_ if np.isfinite(share)]
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    scale = np.abs(places).max() or 1.0
    return {
        "method": method,
        "explained": explained,
        "x": np.round(places[:, 0] / scale, 4).tolist(),
        "y": np.round(places[:, 1] / scale, 4).tolist(),
        "label": outcomes.labels[draw].tolist(),
        "predicted": outcomes.predicted[draw].tolist(),
        "sample": [_named(inputs, int(row)) for row in outcomes.rows[draw]],
    }


def _named(inputs: Inputs, row: int) -> str:
    """Return what a scored sample is called: its id, or its row."""
    table = inputs.scored
    if table.ids is not None:
        return str(table.ids[row])
    return f"row {row if table.numbers is None else int(table.numbers[row])}"
