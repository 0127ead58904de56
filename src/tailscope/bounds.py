"""What another classifier could reach on given features, from unseen samples of the true distribution.

Two questions that a user without the full true training set can still answer. How well does a classifier do that was
fitted to the true distribution (`cross_fitted`, or `held_out` where there is a test set)? And how well does the best
of several re-balanced classifiers do, when it is not chosen on the samples that score it (`select_nested`)? Both
return outcomes per item, so that any two classifiers can be compared by a paired interval (`difference`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tailscope.classifiers import CLASSIFIERS
from tailscope.classifiers.base import Floats, IntArray
from tailscope.intervals import FloatArray, Interval, paired, proportion
from tailscope.report.text import percent
from tailscope.seeds import derive, numpy_stream

BoolArray = NDArray[np.bool_]
CLASSIFIER = "softmax(choose_l2=True, tol=1e-4)"
# Accuracies of cross-fitted classifiers vary more than independent items do, because folds share training samples: up
# to 1.35 times as much in simulations with Gaussian and CIFAR features.
INFLATION = 1.3
PARTS = (0.25, 0.5)


@dataclass(frozen=True)
class Bound:
    """The accuracy of a classifier fitted to the true distribution, on samples that it was not fitted to.

    It says that so much is within reach on these features. It is no upper bound: more samples, or a classifier that is
    not linear, may reach more.

    Attributes:
        correct: [m] of bool, per scored item.
        accuracy: its mean, with an item interval.
        extrapolated: the accuracy that infinitely many samples would give, by a line in 1/m, with an item interval;
            None where there are fewer than 3 d samples a class, or where it was not asked for. It may exceed 1.
        extrapolated_items: [m], whose mean that is: for paired comparisons.
        notes: what a reader must know.
        remedy: the re-balanced classifier that took the fitted one's place, or None.
    """

    correct: BoolArray
    accuracy: Interval
    extrapolated: Interval | None
    extrapolated_items: FloatArray | None
    notes: tuple[str, ...]
    remedy: str | None = None


@dataclass(frozen=True)
class Selection:
    """The best of several classifiers, scored on items that had no part in choosing it.

    Attributes:
        correct: [m] of bool: each item's outcome under the classifier that the other folds chose.
        accuracy: its mean, with an item interval.
        chosen: the name that was chosen for each fold.
        best: the name chosen on all items: the one to recommend. Its own accuracy on them would flatter it.
    """

    correct: BoolArray
    accuracy: Interval
    chosen: tuple[str, ...]
    best: str


def cross_fitted(
    features: Floats,
    labels: IntArray,
    *,
    classifier: str = CLASSIFIER,
    folds: int = 5,
    bursts: ArrayLike | None = None,
    extrapolate: bool = True,
    seed: int = 0,
) -> Bound:
    """Fit a classifier to the unseen samples outside each fold and score it on the fold.

    Whatever the classifier chooses, its penalty by default, it chooses inside the training folds.

    Args:
        features: [m, d] of samples that the encoder was not trained on.
        labels: [m].
        classifier: a call-string of `tailscope.classifiers`.
        folds: at least 2.
        bursts: [m] ids of related samples, which share a fold; None where there are none.
        extrapolate: also fit on m/4 and m/2 samples and extrapolate, where there are 3 d samples a class.
        seed: of the folds and of the classifier's own choices.

    Raises:
        ValueError: fewer than two folds, or fewer samples or bursts than folds.
    """
    units, kind = (len(labels), "samples") if bursts is None else (len(np.unique(np.asarray(bursts))), "bursts")
    if not 2 <= folds <= units:
        raise ValueError(f"cannot cut {units} {kind} into {folds} folds")
    fold_of = assign_folds(labels, folds, bursts, seed)
    parts = (*(PARTS if extrapolate and _can_extrapolate(features, labels) else ()), 1 - 1 / folds)
    correct = np.zeros((len(parts), len(labels)), dtype=bool)
    for k in range(folds):
        training, test = fold_of != k, fold_of == k
        shares = [part / parts[-1] for part in parts]
        predicted = _predict(classifier, features[training], labels[training], features[test], shares, seed)
        correct[:, test] = predicted == labels[test]
    notes = _notes(features, labels, extrapolate)
    return _bound(correct, parts, INFLATION, (*notes, f"cross-fitted in {folds} folds"))


def held_out(
    features: Floats,
    labels: IntArray,
    test_features: Floats,
    test_labels: IntArray,
    *,
    classifier: str = CLASSIFIER,
    extrapolate: bool = True,
    seed: int = 0,
) -> Bound:
    """Fit a classifier to all unseen samples [m, d] and score it on a separate test set; else as `cross_fitted`."""
    parts = (*(PARTS if extrapolate and _can_extrapolate(features, labels) else ()), 1.0)
    correct = _predict(classifier, features, labels, test_features, parts, seed) == test_labels
    return _bound(correct, parts, 1.0, _notes(features, labels, extrapolate))


def select_nested(
    correct: Mapping[str, BoolArray],
    labels: IntArray,
    *,
    folds: int = 5,
    bursts: ArrayLike | None = None,
    seed: int = 0,
) -> Selection:
    """Choose the most accurate of several fitted classifiers on all folds but one, score it on that one.

    Args:
        correct: [m] of bool for each classifier, on unseen samples that it was not fitted to; simplest first, because
            ties go to the first.
        labels: [m], to stratify the folds.
        folds: at least 2.
        bursts: [m] ids of related samples, which share a fold.
        seed: of the folds.

    >>> outcomes = {"a": np.array([True, False] * 4), "b": np.array([True, True] * 4)}
    >>> select_nested(outcomes, np.zeros(8, dtype=int), folds=2).chosen
    ('b', 'b')

    Raises:
        ValueError: no classifiers, fewer than two folds, or fewer samples than folds.
    """
    if not correct or not 2 <= folds <= len(labels):
        raise ValueError(f"cannot choose among {len(correct)} classifiers on {len(labels)} samples in {folds} folds")
    names, outcomes = list(correct), np.stack(list(correct.values()))
    fold_of = assign_folds(labels, folds, bursts, seed)
    chosen = [int(outcomes[:, fold_of != k].mean(axis=1).argmax()) for k in range(folds)]
    scored = outcomes[np.array(chosen)[fold_of], np.arange(len(labels))]
    best = names[int(outcomes.mean(axis=1).argmax())]
    return Selection(scored, proportion(scored[None]), tuple(names[k] for k in chosen), best)


def difference(a: ArrayLike, b: ArrayLike, inflation: float = INFLATION) -> Interval:
    """Return the mean of a - b over the same items [m], with a paired interval on inflated standard errors."""
    items = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return paired(items[None]).widened(inflation)


def at_least(bound: Bound, remedy: Selection, inflation: float = INFLATION) -> Bound:
    """Return the bound, or the remedy in its place where the paired interval says that it gets more right.

    What a re-balanced classifier reaches is within reach. A classifier fitted to few or uneven unseen samples may
    reach less, and would make the representation look worse than it is.
    """
    gain = difference(remedy.correct, bound.correct, inflation)
    if gain.ci95 is None or gain.ci95[0] <= 0:
        return bound
    note = (
        f"{remedy.best} reaches {percent(gain.estimate)} more than a fit to the unseen samples: they are few or uneven"
    )
    return Bound(remedy.correct, remedy.accuracy, None, None, (*bound.notes, note), remedy.best)


def assign_folds(labels: IntArray, folds: int, bursts: ArrayLike | None, seed: int) -> IntArray:
    """Return each sample's fold [m], at random, classes spread evenly; a burst is placed whole, by its first label."""
    if bursts is not None:
        _, first, burst_of = np.unique(np.asarray(bursts), return_index=True, return_inverse=True)
        return assign_folds(labels[first], folds, None, seed)[burst_of]
    order = numpy_stream(seed, "bounds", "folds").permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    fold_of = np.empty(len(labels), dtype=np.int64)
    fold_of[by_class] = np.arange(len(labels)) % folds
    return fold_of


def extrapolation_weights(sizes: Sequence[float]) -> FloatArray:
    """Return the weights that turn accuracies at these training sizes into the intercept of their line in 1/size.

    >>> (extrapolation_weights([1, 2, 4]) @ np.array([0.5, 0.7, 0.8])).round(6)  # 0.9 - 0.4 / size
    np.float64(0.9)
    """
    inverse = 1 / np.asarray(sizes)
    deviation = inverse - inverse.mean()
    weights: FloatArray = 1 / len(inverse) - inverse.mean() * deviation / (deviation @ deviation)
    return weights


def _can_extrapolate(features: Floats, labels: IntArray) -> bool:
    """Return whether there are 3 d samples a class: below, the deficit does not yet fall like 1/m."""
    return bool(len(labels) >= 3 * features.shape[1] * len(np.unique(labels)))


def _predict(
    classifier: str, features: Floats, labels: IntArray, test: Floats, shares: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Return predictions [len(shares), len(test)] after training on nested, stratified shares of the samples."""
    order = numpy_stream(seed, "bounds", "parts").permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, start, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    position = np.arange(len(labels)) - np.repeat(start, count)
    predicted = np.empty((len(shares), len(test)), dtype=np.int64)
    for row, share in zip(predicted, shares, strict=True):
        part = by_class[position < np.ceil(share * np.repeat(count, count))]
        model = CLASSIFIERS.make(classifier)
        if "random_state" in model.get_params():
            model.set_params(random_state=derive(seed, "bounds", "classifier"))
        row[:] = model.fit(features[part], labels[part]).predict(test)
    return predicted


def _bound(correct: BoolArray, parts: Sequence[float], inflation: float, notes: tuple[str, ...]) -> Bound:
    items = extrapolation_weights(parts) @ correct if len(parts) > 1 else None
    extrapolated = None if items is None else paired(items[None]).widened(inflation)
    return Bound(correct[-1], paired(correct[-1:]).widened(inflation), extrapolated, items, notes)


def _notes(features: Floats, labels: IntArray, extrapolate: bool) -> tuple[str, ...]:
    counts = np.unique(labels, return_counts=True)[1]
    notes = ["not an upper bound"]
    if extrapolate and not _can_extrapolate(features, labels):
        samples, dims = f"{counts.mean():.0f}", features.shape[1]
        notes.append(f"{samples} unseen samples a class are too few to extrapolate from in {dims} dimensions")
    if counts.min() < 2:
        notes.append(f"{int((counts < 2).sum())} classes have a single unseen sample")
    return tuple(notes)
