"""Who gets which sample right: the classifier in use, the best remedy, and a classifier of the true distribution.

Two questions that a user without the full true training set can still answer. How well would a classifier do that was
fitted to the true distribution (`learning_curve`)? And how well does the best of several re-balanced classifiers do,
when it is not chosen on the samples that score it (`remedies`)? Both return outcomes per item, so that any two
classifiers can be compared by a paired interval (`difference`).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning

from tailscope.classifiers import LinearClassifier, SoftmaxRegression
from tailscope.classifiers.base import Diverged, IntArray, fixed
from tailscope.classifiers.batches import fit_by_batches
from tailscope.diagnosis.curve_fits import BoolArray, Rows
from tailscope.diagnosis.inputs import Inputs, bursts
from tailscope.diagnosis.learning_curve import ClassifierBound, Fits, follow
from tailscope.diagnosis.remedies import (
    BATCHES,
    LEFT_OUT,
    Replacement,
    Scored,
    Selection,
    choose,
    fitted_remedy,
    fitted_to_training,
    is_large,
    is_long,
    stopping_of,
)
from tailscope.diagnosis.samples import Looks
from tailscope.errors import UserError
from tailscope.intervals import Interval, paired
from tailscope.measures.rows import scaled
from tailscope.progress import Progress
from tailscope.tables.mapped import map_rows, take_rows
from tailscope.tables.table import FeatureTable

OWN_CLASSIFIER = "softmax regression on the training features"


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
        now: whether `predicted` is right, and with which confidence.
        current_name: the file of the classifier in use, or how it was fitted.
        rebalanced: the best remedy, chosen on samples that it is not scored on.
        bound: of a classifier fitted to the true distribution; the best remedy counts as attained where it gets more
            right than whatever was fitted for the bound, and so does the classifier in use.
        looks: what tells which samples to look at.
        in_use: the classifier in use, on features times 2 ** `Inputs.power`.
        layer: the best remedy that is a linear layer.
    """

    labels: IntArray
    rows: IntArray
    predicted: IntArray
    predicted_train: IntArray
    now: Scored
    current_name: str
    rebalanced: Selection
    bound: ClassifierBound
    notes: tuple[str, ...]
    looks: Looks
    in_use: LinearClassifier
    layer: Replacement | None = None

    @property
    def current(self) -> BoolArray:
        """Which scored samples the classifier in use gets right, [m]."""
        return self.now.correct

    @property
    def inflation(self) -> float:
        """By which factor intervals of differences between fitted classifiers are widened."""
        return self.bound.attained.inflation


def score(
    inputs: Inputs,
    bound_at: int,
    seed: int,
    progress: Progress,
    remedies: Sequence[str] = (),
    device: torch.device | None = None,
) -> Outcomes:
    """Fit and score every classifier that a verdict compares; `bound_at` is that of `follow`.

    `remedies` are call-strings of `CLASSIFIERS` that are tried as well. What is fitted by mini-batches is fitted on the
    device, all else on the CPU.

    Raises:
        UserError: the unseen samples are too few to fit or to choose a classifier on; a loss or logit is not finite.
    """
    power = inputs.power
    train, unseen = _arrays(inputs.train, power), _arrays(inputs.unseen, power)
    scored = unseen if inputs.test is None else _arrays(inputs.test, power)
    for table in (inputs.unseen, inputs.scored):
        if table.labels.min() == table.labels.max():
            only = inputs.names[int(table.labels[0])]
            raise UserError(f"{table.source}: all samples are of class {only!r}; add others, or use --no-verdict")
    notes: list[str] = []
    test = None if inputs.test is None else scored
    with progress.task("classifiers", 3) as advance, _told_of_solvers(inputs, notes):
        current, name = _current(inputs, train, power, device)
        predicted, predicted_train = current.predict(scored.features), current.predict(train.features)
        advance(1)
        fits = _fits(inputs, train, unseen, test, seed)
        bound = follow(fits, bound_at)
        rows = bound.attained.rows
        advance(1)
        fitted = fitted_to_training(current, train, device) | {
            call: fitted_remedy(call, train, current) for call in remedies
        }
        rebalanced, layer = choose(fitted, current, fits, unseen, test, rows)
        advance(1)
    if is_large(train, len(inputs.names)):
        notes.append(LEFT_OUT)
    if is_long(train, len(inputs.names)):
        notes.append(BATCHES)
    now = Scored.by(current, Rows(take_rows(scored.features, rows), scored.labels[rows]))
    for reached, by in ((rebalanced.correct, rebalanced.best), (now.correct, name)):
        if (difference(reached, bound.attained.correct, bound.attained.inflation).ci95 or (0.0,))[0] > 0:
            bound = bound.at_least(reached, by)
    found = scored.labels[rows], rows, predicted[rows], predicted_train
    looks = Looks.of(current, scored, rows, fits)
    if layer is not None:  # of features as they were given
        layer = layer._replace(weight=np.ldexp(layer.weight, power))
    return Outcomes(*found, now, name, rebalanced, bound, tuple(notes), looks, current, layer)


def _arrays(table: FeatureTable, power: int) -> Rows:
    """Return features times 2 ** power in 32 or 64 bits, and labels."""
    features = table.features
    if power or features.dtype.itemsize < 4:
        wide = torch.promote_types(features.dtype, torch.float32)
        features = map_rows(features, lambda block: scaled(block.to(wide), power))
    return Rows(features.numpy(), table.labels.numpy())


def _current(inputs: Inputs, train: Rows, power: int, device: torch.device | None) -> tuple[LinearClassifier, str]:
    """Return the classifier in use, on features that were multiplied by 2 ** power, and its name."""
    given = inputs.classifier
    if given is not None:
        with np.errstate(over="ignore"):  # told below
            wide = scaled(given.weight.double(), -power), given.bias
            weight, bias = (tensor.double().numpy().astype(train.features.dtype) for tensor in wide)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError(
                f"{given.source}: weight or bias is beyond {train.features.dtype}, the type of the features"
            )
        return fixed(weight, bias), given.source
    if is_long(train, len(inputs.names)):
        model = fit_by_batches(SoftmaxRegression(), *train, device=device)
    else:
        model = SoftmaxRegression(**stopping_of(train, len(inputs.names))).fit(*train)
    return fixed(model.coef_, model.intercept_), OWN_CLASSIFIER


def _fits(inputs: Inputs, train: Rows, unseen: Rows, test: Rows | None, seed: int) -> Fits:
    """Fit what the bound is read off."""
    try:
        return Fits.of(train, unseen, test, bursts(inputs.unseen)[0], seed)
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
