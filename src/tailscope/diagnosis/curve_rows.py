"""Which rows a learning curve is drawn from: of classes with enough, as many as there is time and memory for."""

import bisect

import numpy as np

from tailscope.classifiers.base import IntArray
from tailscope.effort import ELEMENT, MOST_SCORING, is_long_curve
from tailscope.seeds import numpy_stream

LEAST = 2  # unseen samples without which a class is withheld: one to fit to and one to score
MOST_WORK = 2e10  # rows times features times classes: beyond, not every row is used
MOST_HELD = 2**27  # rows times features: of few classes, what memory has room for, several times over


def class_codes(train: IntArray, unseen: IntArray, test: IntArray | None) -> tuple[IntArray, tuple[int, ...]]:
    """Return the new index of each class, -1 where it has too few unseen samples, and which these are, by labels.

    Raises:
        ValueError: fewer than two classes have enough, or no test sample is of these.
    """
    highest = max(int(rows.max(initial=0)) for rows in (train, unseen, test) if rows is not None)
    enough = np.bincount(unseen, minlength=highest + 1) >= LEAST
    if enough.sum() < 2:
        raise ValueError(f"fewer than two classes have {LEAST} unseen samples: no bound can be told")
    code = np.where(enough, np.cumsum(enough) - 1, -1)
    if test is not None and not (code[test] >= 0).any():
        raise ValueError("no test sample is of a class that has unseen samples")
    known = np.bincount(np.concatenate([rows for rows in (train, unseen, test) if rows is not None])) > 0
    return code, tuple(int(k) for k in np.flatnonzero(known & ~enough))


def used_rows(seen: IntArray, unseen: IntArray, features: int, seed: int) -> tuple[IntArray, IntArray, bool]:
    """Return which rows of those with a class >= 0 to use, and whether searches over them would still take too long.

    Linear discriminants take no search: then as many rows are used as can be scored and held.
    """
    classes, held = int(unseen.max()) + 1, MOST_HELD / features
    rows, kept = _capped(seen, unseen, min(MOST_WORK / (features * classes), held), seed)
    if not is_long_curve(len(rows) + len(kept), features, classes):
        return rows, kept, False
    return *_capped(seen, unseen, min(MOST_SCORING / ((features + ELEMENT) * classes), held), seed), True


def _capped(seen: IntArray, unseen: IntArray, most: float, seed: int) -> tuple[IntArray, IntArray]:
    """Return which rows to use of those with a class >= 0: of each class the same number at most, unseen ones first."""
    classes = int(unseen.max()) + 1
    stream = numpy_stream(seed, "learning curve", "rows")
    found: list[IntArray] = []
    for labels, share in ((unseen, 0.6), (seen, 1.0)):
        rows = np.flatnonzero(labels >= 0)
        counts = np.bincount(labels[rows], minlength=classes)
        cap = _water_level(counts, share * most - sum(map(len, found)))
        found.append(rows[rank_in_class(labels[rows], stream.permutation(len(rows))) < max(LEAST, cap)])
    return found[1], found[0]


def _water_level(counts: IntArray, room: float) -> int:
    """Return the highest cap on counts [C] under which their sum is within the room."""
    return bisect.bisect_right(range(1, int(counts.max()) + 1), room, key=lambda cap: np.minimum(counts, cap).sum())


def rank_in_class(labels: IntArray, order: IntArray) -> IntArray:
    """Return each row's rank within its class in an order of the rows."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - starts[labels[by_class]]
    return rank
