"""What is true where the whole distribution is at hand: the classifier bound, on samples kept for this alone."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.verdicts.sources import Encoded, Floats, IntArray, Source, ranks
from tailscope.classifiers.base import Stopping, fit_softmax
from tailscope.seeds import numpy_stream

PENALTIES = tuple(10 ** (-k / 2) for k in range(2, 13))  # 0.1 to 1e-6
STOPPING = Stopping(1e-5, 500)
PAST = 0.02  # penalties end where accuracy is so much below the best
ROWS, MOST = 5_000, 5  # training sets of D* are drawn until they have so many rows, at most so often


class Facts(NamedTuple):
    """What is true of a source.

    Attributes:
        right: for each test sample, how often classifiers fitted to D* get it right; the mean is the bound.
        attribution: what `swap` says of the encoder, or None.
    """

    right: NDArray[np.float64]
    attribution: dict[str, Any] | None


def bound(source: Source, encoded: Encoded) -> NDArray[np.float64]:
    """Return, for each test sample, how often classifiers fitted to D* get it right.

    Each is fitted to `bound_at` samples of every class. What an encoder was trained on is among them: that is what the
    bound of its diagnosis means.
    """
    size = source.bound_at * (int(encoded.labels.max()) + 1)
    right = []
    for draw in range(max(1, min(MOST, ROWS // size))):
        rank = ranks(encoded.labels, numpy_stream(draw, "verdicts", source.name, "truth"))
        if encoded.seen is not None:
            rank = ranks_with_first(encoded.labels, encoded.seen, rank)
        fitted = rank < source.bound_at
        scored = encoded.test_features, encoded.test_labels
        right.append(reached(encoded.features[fitted], encoded.labels[fitted], *scored))
    found: NDArray[np.float64] = np.mean(right, axis=0)
    return found


def ranks_with_first(labels: IntArray, first: NDArray[np.bool_], order: IntArray) -> IntArray:
    """Return each row's place in its class where the rows `first` come first, and otherwise `order` decides."""
    by = np.lexsort((order, ~first, labels))
    counts = np.bincount(labels)
    found = np.empty(len(labels), dtype=np.int64)
    found[by] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def reached(features: Floats, labels: IntArray, scored: Floats, scored_labels: IntArray) -> NDArray[np.bool_]:
    """Return which scored samples the best softmax regression gets right.

    The L2 penalty is chosen, for each half of the scored samples, on the other half: no sample helps to choose what it
    is scored by.
    """
    weights, start = np.ones(int(labels.max()) + 1, dtype=features.dtype), None
    right: list[NDArray[np.bool_]] = []
    for penalty in PENALTIES:
        weight, bias, _ = fit_softmax(features, labels, weights, penalty, STOPPING, start=start)
        start = weight, bias
        right.append((scored @ weight.T + bias).argmax(1) == scored_labels)
        if right[-1].mean() < max(one.mean() for one in right) - PAST:
            break
    outcomes = np.stack(right)
    half = ranks(scored_labels, numpy_stream(0, "verdicts", "halves")) % 2 == 0
    found = np.empty(len(scored_labels), dtype=bool)
    for part in (half, ~half):
        found[part] = outcomes[outcomes[:, ~part].mean(axis=1).argmax()][part]
    return found
