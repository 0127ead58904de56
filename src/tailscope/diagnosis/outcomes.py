"""Who gets which sample right: the classifier in use, the best remedy, and a classifier of the true distribution.

Two questions that a user without the full true training set can still answer. How well does a classifier do that was
fitted to the true distribution (`cross_fitted`, or `held_out` where there is a test set)? And how well does the best
of several re-balanced classifiers do, when it is not chosen on the samples that score it (`select_nested`)? Both
return outcomes per item, so that any two classifiers can be compared by a paired interval (`difference`).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator

from tailscope.classifiers import (
    CLASSIFIERS,
    LinearClassifier,
    LogitAdjustment,
    NearestClassMean,
    SoftmaxRegression,
    TauNorm,
)
from tailscope.classifiers.base import Diverged, FeatureClassifier, Floats, IntArray, Stopping, fit_softmax
from tailscope.classifiers.estimators import balanced_weights
from tailscope.diagnosis.inputs import Inputs, bursts
from tailscope.errors import UserError
from tailscope.intervals import FloatArray, Interval, paired, proportion
from tailscope.measures.rows import exponent, scaled
from tailscope.progress import Progress
from tailscope.report.text import percent
from tailscope.seeds import derive, numpy_stream
from tailscope.tables.table import FeatureTable

BoolArray = NDArray[np.bool_]
Samples = tuple[Floats, IntArray]
# Accuracies of cross-fitted classifiers vary more than independent items do, because folds share training samples: up
# to 1.35 times as much in simulations with Gaussian and CIFAR features.
INFLATION = 1.3
PARTS = (0.25, 0.5)
FOLDS = 5
TOL = 1e-4
LARGE_TOL, LARGE = 1e-3, 10**10  # beyond so many rows * features * classes, tolerance gives way to time
TAUS = (0.5, 1.0, 1.5)
MAX_ITER = 500


@dataclass(frozen=True)
class Bound:
    """The accuracy of a classifier fitted to the true distribution, on samples that it was not fitted to.

    It says that so much is within reach on these features. It is no upper bound: more samples, or a classifier that is
    not linear, may reach more.

    Attributes:
        correct: [m] of bool, per scored item; `accuracy` is its mean.
        extrapolated: the accuracy that infinitely many samples would give, by a line in 1/m, the mean of
            `extrapolated_items` [m]; None where there are fewer than 3 d samples a class. It may exceed 1.
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
        accuracy: its mean.
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
    classifier: str | None = None,
    folds: int = FOLDS,
    bursts: ArrayLike | None = None,
    seed: int = 0,
) -> Bound:
    """Fit a classifier to the unseen samples outside each fold and score it on the fold.

    Whatever the classifier chooses, its penalty by default, it chooses inside the training folds. Where there are 3 d
    samples a class it is also fitted to m/4 and m/2 of them, from which the accuracy is extrapolated. `features`
    [m, d] are of samples that the encoder was not trained on; related ones, with one id in `bursts` [m], share a fold.

    Raises:
        ValueError: fewer than two folds, or fewer samples or bursts than folds.
    """
    units, kind = (len(labels), "samples") if bursts is None else (len(np.unique(np.asarray(bursts))), "bursts")
    if not 2 <= folds <= units:
        raise ValueError(f"cannot cut {units} {kind} into {folds} folds")
    fold_of = assign_folds(labels, folds, bursts, seed)
    parts = *_parts(features, labels), 1 - 1 / folds
    correct = np.zeros((len(parts), len(labels)), dtype=bool)
    for k in range(folds):
        training, test = fold_of != k, fold_of == k
        shares = [part / parts[-1] for part in parts]
        predicted = _predict(classifier, features[training], labels[training], features[test], shares, seed)
        correct[:, test] = predicted == labels[test]
    notes = [*_notes(features, labels), f"cross-fitted in {folds} folds"]
    return _bound(correct, parts, INFLATION, notes)


def held_out(unseen: Samples, test: Samples, *, classifier: str | None = None, seed: int = 0) -> Bound:
    """Fit a classifier to all unseen samples and score it on a separate test set; else as `cross_fitted`."""
    parts = *_parts(*unseen), 1.0
    correct = _predict(classifier, *unseen, test[0], parts, seed) == test[1]
    return _bound(correct, parts, 1.0, _notes(*unseen))


def select_nested(
    correct: Mapping[str, BoolArray],
    labels: IntArray,
    folds: int = FOLDS,
    bursts: ArrayLike | None = None,
    seed: int = 0,
) -> Selection:
    """Choose the most accurate of several fitted classifiers on all folds but one, score it on that one.

    `correct` holds [m] of bool for each classifier, on unseen samples that it was not fitted to, simplest first: ties
    go to the first. Folds are made as by `cross_fitted`.

    >>> outcomes = {"a": np.array([True, False] * 4), "b": np.array([True, True] * 4)}
    >>> select_nested(outcomes, np.zeros(8, dtype=int), folds=2).chosen
    ('b', 'b')
    """
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
    reached = f"{remedy.best} reaches {percent(gain.estimate)} more than a fit to the unseen samples"
    notes = (*bound.notes, f"{reached}: they are few or uneven")
    return Bound(remedy.correct, remedy.accuracy, None, None, notes, remedy.best)


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
    weights: FloatArray = np.linalg.pinv(np.vander(1 / np.asarray(sizes), 2))[1]
    return weights


def _parts(features: Floats, labels: IntArray) -> tuple[float, ...]:
    """Return which parts to extrapolate from: below 3 d samples a class, the deficit does not yet fall like 1/m."""
    return PARTS if len(labels) >= 3 * features.shape[1] * len(np.unique(labels)) else ()


def _predict(
    classifier: str | None, features: Floats, labels: IntArray, test: Floats, shares: Sequence[float], seed: int
) -> IntArray:
    """Return predictions [len(shares), len(test)] after training on nested, stratified shares of the samples."""
    order = numpy_stream(seed, "bounds", "parts").permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    present, start, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    classifier = classifier or f"softmax(choose_l2=True, tol={_tolerance(features, len(present))})"
    position = np.arange(len(labels)) - np.repeat(start, count)
    predicted = np.empty((len(shares), len(test)), dtype=np.int64)
    for row, share in zip(predicted, shares, strict=True):
        part = by_class[position < np.ceil(share * np.repeat(count, count))]
        model = CLASSIFIERS.make(classifier)
        if "random_state" in model.get_params():
            model.set_params(random_state=derive(seed, "bounds", "classifier"))
        row[:] = model.fit(features[part], labels[part]).predict(test)
    return predicted


def _bound(correct: BoolArray, parts: Sequence[float], inflation: float, notes: Sequence[str]) -> Bound:
    items = extrapolation_weights(parts) @ correct if len(parts) > 1 else None
    extrapolated = None if items is None else paired(items[None]).widened(inflation)
    return Bound(correct[-1], paired(correct[-1:]).widened(inflation), extrapolated, items, tuple(notes))


def _notes(features: Floats, labels: IntArray) -> list[str]:
    counts = np.unique(labels, return_counts=True)[1]
    notes = ["not an upper bound"]
    if not _parts(features, labels):
        samples, dims = f"{counts.mean():.0f}", features.shape[1]
        notes.append(f"{samples} unseen samples a class are too few to extrapolate from in {dims} dimensions")
    if counts.min() < 2:
        notes.append(f"{int((counts < 2).sum())} classes have a single unseen sample")
    return notes


@dataclass(frozen=True)
class Outcomes:
    """What each classifier gets right among the same m scored samples, of the classes `labels` [m].

    Attributes:
        predicted: [m], by the classifier in use; `predicted_train` [n] of the training samples, by the same.
        current: [m] of bool, whether `predicted` is right.
        current_name: the file of the classifier in use, or how it was fitted.
        rebalanced: the best remedy, chosen on samples that it is not scored on.
        remedies: accuracy of every remedy on all unseen samples.
        bound: a classifier fitted to the true distribution, or the best remedy where that reaches more.
        inflation: by which intervals of differences to the bound are widened.
    """

    labels: IntArray
    predicted: IntArray
    predicted_train: IntArray
    current: BoolArray
    current_name: str
    rebalanced: Selection
    remedies: dict[str, float]
    bound: Bound
    inflation: float
    notes: tuple[str, ...]


def score(inputs: Inputs, seed: int, progress: Progress) -> Outcomes:
    """Fit and score every classifier that a verdict compares.

    Raises:
        UserError: the unseen samples are too few to fit or to choose a classifier on; a loss or logit is not finite.
    """
    power = exponent(inputs.rows["train"].lengths, inputs.rows["unseen"].lengths)
    train, unseen = _arrays(inputs.train, power), _arrays(inputs.unseen, power)
    scored = unseen if inputs.test is None else _arrays(inputs.test, power)
    for table in (inputs.unseen, inputs.scored):
        if table.labels.min() == table.labels.max():
            only = inputs.names[int(table.labels[0])]
            raise UserError(f"{table.source}: all samples are of class {only!r}; add others, or use --no-verdict")
    notes: list[str] = []
    with progress.task("classifiers", 3) as advance, _told_of_solvers(inputs, notes):
        current, name = _current(inputs, *train, power)
        predicted = current.predict(scored[0])
        advance(1)
        fitted = _remedies(current, *train)
        right = {text: remedy.predict(unseen[0]) == unseen[1] for text, remedy in fitted.items()}
        rebalanced = _rebalanced(inputs, fitted, right, scored, seed)
        advance(1)
        inflation = INFLATION if inputs.test is None else 1.0
        bound = at_least(_fitted_bound(inputs, unseen, scored, seed), rebalanced, inflation)
        advance(1)
    return Outcomes(
        scored[1],
        predicted,
        current.predict(train[0]),
        predicted == scored[1],
        name,
        rebalanced,
        {text: float(correct.mean()) for text, correct in right.items()},
        bound,
        inflation,
        tuple(notes),
    )


def _fixed(weight: Floats, bias: Floats) -> LinearClassifier:
    """Return a classifier that `fit` leaves as it is, so that remedies adjust it instead of training another."""
    model = SoftmaxRegression()
    model.coef_, model.intercept_, model.classes_ = weight, bias, np.arange(len(weight))
    model.n_features_in_ = weight.shape[1]
    frozen: LinearClassifier = FrozenEstimator(model)
    return frozen


def _remedies(base: LinearClassifier, features: Floats, labels: IntArray) -> dict[str, FeatureClassifier]:
    """Return what re-balances a classifier on frozen features, fitted to training samples, simplest first.

    The last, class-balanced retraining, is cRT's objective, searched from the classifier in use.
    """
    found: dict[str, FeatureClassifier] = {
        **{f"logit_adjustment(tau={tau})": LogitAdjustment(base=base, tau=tau) for tau in TAUS},
        **{f"tau_norm(tau={tau})": TauNorm(base=base, tau=tau) for tau in TAUS},
        "ncm": NearestClassMean(),
    }
    for remedy in found.values():
        remedy.fit(features, labels)
    stopping = Stopping(_tolerance(features, len(base.classes_)), MAX_ITER)
    balance, start = balanced_weights(np.bincount(labels)), (base.coef_, base.intercept_)
    weight, bias, _ = fit_softmax(features, labels, balance, SoftmaxRegression().l2, stopping, start=start)
    return found | {"crt": _fixed(weight, bias)}


def _tolerance(features: Floats, classes: int) -> float:
    """Return at which relative change a softmax regression stops."""
    return LARGE_TOL if features.size * classes > LARGE else TOL


def _arrays(table: FeatureTable, power: int) -> Samples:
    """Return features times 2 ** power in 32 or 64 bits, and labels."""
    features = table.features if table.features.dtype.itemsize >= 4 else table.features.float()
    return scaled(features, power).numpy(), table.labels.numpy()


def _current(inputs: Inputs, features: Floats, labels: IntArray, power: int) -> tuple[LinearClassifier, str]:
    """Return the classifier in use, on features that were multiplied by 2 ** power, and its name."""
    given = inputs.classifier
    if given is not None:
        with np.errstate(over="ignore"):  # told below
            wide = scaled(given.weight.double(), -power), given.bias
            weight, bias = (tensor.double().numpy().astype(features.dtype) for tensor in wide)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError(f"{given.source}: weight or bias is beyond {features.dtype}, the type of the features")
        return _fixed(weight, bias), given.source
    model = SoftmaxRegression(tol=_tolerance(features, len(inputs.names)), max_iter=MAX_ITER).fit(features, labels)
    return _fixed(model.coef_, model.intercept_), "softmax regression on the training features"


def _rebalanced(
    inputs: Inputs, fitted: dict[str, FeatureClassifier], right: dict[str, BoolArray], scored: Samples, seed: int
) -> Selection:
    """Choose a remedy on unseen samples and score it on others: on the test set, or nested where there is none."""
    if inputs.test is None:
        labels, together = inputs.unseen.labels.numpy(), bursts(inputs.unseen)[0]
        units = len(labels) if together is None else len(np.unique(together))
        if units < 2:
            raise UserError(f"{inputs.unseen.source}: too few samples for a verdict; give more, or use --no-verdict")
        return select_nested(right, labels, folds=min(FOLDS, units), bursts=together, seed=seed)
    best = max(right, key=lambda name: right[name].mean())
    correct = fitted[best].predict(scored[0]) == scored[1]
    return Selection(correct, proportion(correct[None]), (best,), best)


def _fitted_bound(inputs: Inputs, unseen: Samples, scored: Samples, seed: int) -> Bound:
    try:
        if inputs.test is not None:
            return held_out(unseen, scored, seed=seed)
        return cross_fitted(*unseen, bursts=bursts(inputs.unseen)[0], seed=seed)
    except Diverged:
        raise
    except ValueError as error:
        why = f"no classifier can be fitted to the unseen samples ({' '.join(str(error).split())})"
        raise UserError(f"{inputs.unseen.source}: {why}; give more samples, or use --no-verdict") from None


@contextmanager
def _told_of_solvers(inputs: Inputs, notes: list[str]) -> Iterator[None]:
    """Turn solvers' warnings into notes, each once, and a loss or logit that is not finite into one line."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            yield
    except Diverged as error:
        start = f", which starts from {inputs.classifier.source}" if inputs.classifier else ""
        why = f"{inputs.train.source}: no classifier can be fitted{start}: {error}"
        raise UserError(f"{why}; check the values, or use --no-verdict") from None
    for entry in caught:
        note = f"a classifier {entry.message}"
        if not issubclass(entry.category, ConvergenceWarning):
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
        elif note not in notes:
            notes.append(note)
