"""Who gets which sample right: the classifier in use, the best remedy, and a classifier of the true distribution."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning

from tailscope.bounds import INFLATION, Bound, Selection, at_least, cross_fitted, held_out, select_nested
from tailscope.classifiers import LinearClassifier, LogitAdjustment, NearestClassMean, SoftmaxRegression, TauNorm
from tailscope.classifiers.base import Diverged, FeatureClassifier, Floats, IntArray, Stopping, fit_softmax
from tailscope.classifiers.estimators import balanced_weights
from tailscope.diagnosis.inputs import Inputs, bursts
from tailscope.diagnosis.soundness import fit_scale
from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable
from tailscope.geometry.rows import scaled
from tailscope.intervals import proportion
from tailscope.progress import Progress

BoolArray = npt.NDArray[np.bool_]
FOLDS = 5
TOL = 1e-4
LARGE_TOL, LARGE = 1e-3, 10**10  # beyond so many rows * features * classes, tolerance gives way to time
TAUS = (0.5, 1.0, 1.5)
MAX_ITER = 500


@dataclass(frozen=True)
class Outcomes:
    """What each classifier gets right among the same m scored samples.

    Attributes:
        labels: [m].
        predicted: [m], by the classifier in use.
        predicted_train: [n], of the training samples by the same.
        current: [m] of bool.
        current_name: the file of the classifier in use, or how it was fitted.
        rebalanced: the best remedy, chosen on samples that it is not scored on.
        remedies: accuracy of every remedy on all unseen samples.
        bound: a classifier fitted to the true distribution, or the best remedy where that reaches more.
        inflation: by which intervals of differences to the bound are widened.
        notes: warnings.
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


class FixedClassifier(LinearClassifier):
    """A linear classifier that `fit` leaves as it is, so that remedies adjust it instead of training another.

    Args:
        weight: [C, d].
        bias: [C].
    """

    def __init__(self, weight: Floats, bias: Floats) -> None:
        self.weight = weight
        self.bias = bias
        self.coef_, self.intercept_ = weight, bias
        self.classes_ = np.arange(len(weight))
        self.n_features_in_ = weight.shape[1]

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Do nothing."""
        return self

    def __sklearn_clone__(self) -> Self:
        return self


def score(inputs: Inputs, seed: int, progress: Progress) -> Outcomes:
    """Fit and score every classifier that a verdict compares.

    Raises:
        UserError: the unseen samples are too few to fit or to choose a classifier on; a loss or logit is not finite.
    """
    power = fit_scale(inputs)
    train, unseen = _arrays(inputs.train, power), _arrays(inputs.unseen, power)
    scored = unseen if inputs.test is None else _arrays(inputs.test, power)
    for table in (inputs.unseen, inputs.scored):
        if table.labels.min() == table.labels.max():
            only = inputs.names[int(table.labels[0])]
            raise UserError(f"{table.source}: all samples are of class {only!r}; add others, or use --no-verdict")
    notes: list[str] = []
    with progress.task("classifiers", 3) as advance, _convergence(notes), _divergence(inputs):
        current, name = _current(inputs, *train, power)
        predicted = current.predict(scored[0])
        advance(1)
        fitted = remedies(current, *train)
        right = {text: remedy.predict(unseen[0]) == unseen[1] for text, remedy in fitted.items()}
        rebalanced = _rebalanced(inputs, fitted, right, scored, seed)
        advance(1)
        inflation = INFLATION if inputs.test is None else 1.0
        bound = at_least(_bound(inputs, unseen, scored, seed), rebalanced, inflation)
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


def remedies(base: FixedClassifier, features: Floats, labels: IntArray) -> dict[str, FeatureClassifier]:
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
    stopping = Stopping(tolerance(features, len(base.classes_)), MAX_ITER)
    balance, start = balanced_weights(np.bincount(labels)), (base.coef_, base.intercept_)
    weight, bias, _ = fit_softmax(features, labels, balance, SoftmaxRegression().l2, stopping, start=start)
    return found | {"crt": FixedClassifier(weight, bias)}


def tolerance(features: Floats, classes: int) -> float:
    """Return at which relative change a softmax regression stops."""
    return LARGE_TOL if features.size * classes > LARGE else TOL


def _arrays(table: FeatureTable, power: int) -> tuple[Floats, IntArray]:
    """Return features times 2 ** power in 32 or 64 bits, and labels."""
    features = table.features if table.features.dtype.itemsize >= 4 else table.features.float()
    return scaled(features, power).numpy(), table.labels.numpy()


def _current(inputs: Inputs, features: Floats, labels: IntArray, power: int) -> tuple[FixedClassifier, str]:
    """Return the classifier in use, on features that were multiplied by 2 ** power, and its name."""
    given = inputs.classifier
    if given is not None:
        with np.errstate(over="ignore"):  # told below
            weight, bias = (
                tensor.double().numpy().astype(features.dtype)
                for tensor in (scaled(given.weight.double(), -power), given.bias)
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError(f"{given.source}: weight or bias is beyond {features.dtype}, the type of the features")
        return FixedClassifier(weight, bias), given.source
    model = SoftmaxRegression(tol=tolerance(features, len(inputs.names)), max_iter=MAX_ITER).fit(features, labels)
    return FixedClassifier(model.coef_, model.intercept_), "softmax regression on the training features"


def _rebalanced(
    inputs: Inputs,
    fitted: dict[str, FeatureClassifier],
    right: dict[str, BoolArray],
    scored: tuple[Floats, IntArray],
    seed: int,
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


def _bound(inputs: Inputs, unseen: tuple[Floats, IntArray], scored: tuple[Floats, IntArray], seed: int) -> Bound:
    classifier = f"softmax(choose_l2=True, tol={tolerance(unseen[0], len(inputs.names))})"
    try:
        if inputs.test is not None:
            return held_out(*unseen, *scored, classifier=classifier, seed=seed)
        return cross_fitted(*unseen, classifier=classifier, folds=FOLDS, bursts=bursts(inputs.unseen)[0], seed=seed)
    except Diverged:
        raise
    except ValueError as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{inputs.unseen.source}: no classifier can be fitted to the unseen samples ({why}); give more samples, or "
            "use --no-verdict"
        ) from None


@contextmanager
def _divergence(inputs: Inputs) -> Iterator[None]:
    """Turn a loss or logit that is not finite into one line."""
    try:
        yield
    except Diverged as error:
        given = inputs.classifier
        start = "" if given is None else f", which starts from {given.source}"
        raise UserError(
            f"{inputs.train.source}: no classifier can be fitted{start}: {error}; check the values, or use --no-verdict"
        ) from None


@contextmanager
def _convergence(notes: list[str]) -> Iterator[None]:
    """Turn solvers' warnings into notes, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield
    for entry in caught:
        note = f"a classifier {entry.message}"
        if not issubclass(entry.category, ConvergenceWarning):
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
        elif note not in notes:
            notes.append(note)
