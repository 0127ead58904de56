"""Who gets which sample right: the classifier in use, the best remedy, and a classifier of the true distribution.

Two questions that a user without the full true training set can still answer. How well would a classifier do that was
fitted to the true distribution (`learning_curve`)? And how well does the best of several re-balanced classifiers do,
when it is not chosen on the samples that score it (`select_nested`)? Both return outcomes per item, so that any two
classifiers can be compared by a paired interval (`difference`).
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator

from tailscope.classifiers import LinearClassifier, LogitAdjustment, NearestClassMean, SoftmaxRegression, TauNorm
from tailscope.classifiers.base import Diverged, FeatureClassifier, Floats, IntArray, Stopping, fit_softmax
from tailscope.classifiers.estimators import balanced_weights
from tailscope.diagnosis.curve_fits import FOLDS, BoolArray, Rows, assign_folds
from tailscope.diagnosis.inputs import Inputs, bursts
from tailscope.diagnosis.learning_curve import ClassifierBound, learning_curve
from tailscope.errors import UserError
from tailscope.intervals import Interval, paired, proportion
from tailscope.measures.rows import exponent, scaled
from tailscope.progress import Progress
from tailscope.tables.table import FeatureTable

TOL = 1e-4
LARGE_TOL, LARGE = 1e-3, 10**10  # beyond so many rows * features * classes, tolerance gives way to time
TAUS = (0.5, 1.0, 1.5)
MAX_ITER = 500
OWN_CLASSIFIER = "softmax regression on the training features"


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


def select_nested(
    correct: Mapping[str, BoolArray],
    labels: IntArray,
    folds: int = FOLDS,
    bursts: ArrayLike | None = None,
    seed: int = 0,
) -> Selection:
    """Choose the most accurate of several fitted classifiers on all folds but one, score it on that one.

    `correct` holds [m] of bool for each classifier, on unseen samples that it was not fitted to, simplest first: ties
    go to the first. Folds are made as by `assign_folds`.

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


def difference(a: ArrayLike, b: ArrayLike, inflation: float) -> Interval:
    """Return the mean of a - b over the same items [m], with a paired interval on inflated standard errors."""
    items = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return paired(items[None]).widened(inflation)


@dataclass(frozen=True)
class Outcomes:
    """What each classifier gets right among the same m scored samples, of the classes `labels` [m].

    Attributes:
        rows: [m] which samples of the scored file they are; all but those that took no part in the bound.
        predicted: [m], by the classifier in use; `predicted_train` [n] of the training samples, by the same.
        current: [m] of bool, whether `predicted` is right.
        current_name: the file of the classifier in use, or how it was fitted.
        rebalanced: the best remedy, chosen on samples that it is not scored on.
        remedies: accuracy of every remedy on all unseen samples.
        bound: of a classifier fitted to the true distribution; the best remedy counts as attained where it gets more
            right than whatever was fitted for the bound, and so does the classifier in use.
    """

    labels: IntArray
    rows: IntArray
    predicted: IntArray
    predicted_train: IntArray
    current: BoolArray
    current_name: str
    rebalanced: Selection
    remedies: dict[str, float]
    bound: ClassifierBound
    notes: tuple[str, ...]

    @property
    def inflation(self) -> float:
        """By which factor intervals of differences between fitted classifiers are widened."""
        return self.bound.attained.inflation


def score(inputs: Inputs, bound_at: int, seed: int, progress: Progress) -> Outcomes:
    """Fit and score every classifier that a verdict compares; `bound_at` is that of `learning_curve`.

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
        predicted, predicted_train = current.predict(scored[0]), current.predict(train[0])
        advance(1)
        fitted = _remedies(current, *train)
        right = {text: remedy.predict(unseen[0]) == unseen[1] for text, remedy in fitted.items()}
        rebalanced = _rebalanced(inputs, fitted, right, scored, seed)
        advance(1)
        bound = _bound(inputs, train, unseen, scored, bound_at, seed)
        advance(1)
    rows = bound.attained.rows
    predicted, labels, correct = predicted[rows], scored[1][rows], rebalanced.correct[rows]
    rebalanced = replace(rebalanced, correct=correct, accuracy=proportion(correct[None]))
    for reached, by in ((correct, rebalanced.best), (predicted == labels, name)):
        if (difference(reached, bound.attained.correct, bound.attained.inflation).ci95 or (0.0,))[0] > 0:
            bound = bound.at_least(reached, by)
    remedies = {text: float(correct.mean()) for text, correct in right.items()}
    found = predicted, predicted_train, predicted == labels, name, rebalanced, remedies, bound, tuple(notes)
    return Outcomes(labels, rows, *found)


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


def _arrays(table: FeatureTable, power: int) -> Rows:
    """Return features times 2 ** power in 32 or 64 bits, and labels."""
    features = table.features if table.features.dtype.itemsize >= 4 else table.features.float()
    return Rows(scaled(features, power).numpy(), table.labels.numpy())


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
    return _fixed(model.coef_, model.intercept_), OWN_CLASSIFIER


def _rebalanced(
    inputs: Inputs, fitted: dict[str, FeatureClassifier], right: dict[str, BoolArray], scored: Rows, seed: int
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


def _bound(inputs: Inputs, train: Rows, unseen: Rows, scored: Rows, bound_at: int, seed: int) -> ClassifierBound:
    test, together = None if inputs.test is None else scored, bursts(inputs.unseen)[0]
    try:
        return learning_curve(train, unseen, test, bound_at=bound_at, bursts=together, seed=seed)
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
