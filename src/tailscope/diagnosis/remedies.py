"""Remedies: classifiers that may replace the one in use on the same features, and the choice of one.

Most are fitted to the training samples: the classifier in use re-balanced by a formula or by a few trained numbers, and
classifiers trained anew for balance, each with several penalties. The **pooled fit** uses the unseen samples too: it is
the class-balanced softmax regression of the bound's own fits, so that no sample is scored by a classifier that was
fitted to it. Which remedy is best, strengths and penalties included, is chosen on unseen samples and scored on others:
on a test set, or, fold by fold, on the unseen samples that took no part in the choice (`select_nested`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from tailscope.classifiers import (
    CLASSIFIERS,
    CRT,
    LWS,
    DisAlign,
    LabelAwareSmoothing,
    LinearClassifier,
    LogitAdjustedSoftmax,
    LogitAdjustment,
    NearestClassMean,
    TauNorm,
)
from tailscope.classifiers.base import Diverged, FeatureClassifier, Floats, IntArray, row_blocks, take_base
from tailscope.classifiers.batches import fit_by_batches
from tailscope.diagnosis.curve_fits import PENALTIES, SHRINKAGES, BoolArray, Rows, Task, Trial
from tailscope.diagnosis.learning_curve import Fits, final, pooled_kind
from tailscope.effort import MOST_CHOSEN_ON, is_long_search
from tailscope.errors import UserError, foreign_code
from tailscope.intervals import FloatArray, Interval, Z, proportion
from tailscope.seeds import numpy_stream
from tailscope.tables.mapped import take_rows

TAUS = (0.5, 1.0, 1.5)
L2S = (0.001, 0.01, 0.1)  # from a classifier in use, which is seldom penalised more
TOL = 1e-4
# Rows * features * classes beyond which time counts: many remedies are searched for less exactly (within 0.2 points of
# accuracy), and beyond LARGE the classifier in use as well.
MEDIUM, MEDIUM_TOL = 10**8, 3e-4
LARGE, LARGE_TOL = 10**10, 1e-3
MAX_ITER = 500
WEAKEST = 0.99e-4  # penalty of a pooled fit: weaker ones are as good, but not for who fits to the end
POOLED = " on training and unseen samples"
LEFT_OUT = (
    "the training set is so large that of the remedies that train a classifier only class-balanced retraining with one "
    "penalty was tried"
)
BATCHES = (
    "there are so many training samples and classes that softmax regressions were fitted to them by mini-batches in a "
    "few passes, and not to the optimum"
)
BINS = 15


class Scored(NamedTuple):
    """What one classifier makes of m samples.

    Attributes:
        correct: [m] whether it is right.
        confidence: [m] the probability that it gives the class it names.
    """

    correct: BoolArray
    confidence: FloatArray

    @classmethod
    def of(cls, logits: Callable[[slice], Floats], labels: IntArray, classes: int) -> "Scored":
        """Score a classifier by its logits [n, C] of a slice of the samples.

        Raises:
            Diverged: a logit is NaN or infinite.
        """
        correct, confidence = np.empty(len(labels), dtype=bool), np.empty(len(labels))
        for block in row_blocks(len(labels), classes):
            with np.errstate(over="ignore", invalid="ignore"):  # told by the next line
                found = logits(block)
            if not np.isfinite(found).all():
                raise Diverged("logits are not finite")
            correct[block] = found.argmax(axis=1) == labels[block]
            confidence[block] = 1 / np.exp(found - found.max(axis=1, keepdims=True)).sum(axis=1)
        return cls(correct, confidence)

    @classmethod
    def by(cls, classifier: FeatureClassifier, rows: Rows) -> "Scored":
        """Score a classifier on rows, whose labels are its own."""
        return cls.of(lambda block: classifier.logits(rows.features[block]), rows.labels, len(classifier.classes_))

    def at(self, rows: IntArray | BoolArray) -> "Scored":
        """Return what it makes of some of the samples."""
        return Scored(self.correct[rows], self.confidence[rows])

    def calibration_error(self, bins: int = BINS) -> Interval:
        """Return the expected calibration error (ECE: Guo et al. 2017, section 2), with an interval.

        It is the mean over samples of |share right - mean confidence| in each sample's bin, of `bins` bins of
        confidence of equal width. With few samples it comes out too high, because chance alone makes a difference in
        each bin: sqrt(2 / pi) standard errors where there is none in truth. The interval is the estimate, plus and
        minus 1.96 standard errors (of the mean over samples of the signed differences); its lower end is further
        lowered by what chance alone gives in those bins whose difference is within 2 standard errors of 0.

        >>> scored = Scored(np.array([True, True, True, False]), np.array([0.9, 0.9, 0.9, 0.9]))
        >>> round(scored.calibration_error().estimate, 6)
        0.15
        """
        number = len(self.correct)
        excess = self.confidence - self.correct
        place = np.minimum((self.confidence * bins).astype(np.int64), bins - 1)
        counts, sums = np.bincount(place, minlength=bins), np.bincount(place, excess, minlength=bins)
        rest = excess - (sums / np.maximum(counts, 1))[place]
        error = float(np.abs(sums).sum() / number)
        if number < 2:
            return Interval(error, None, None, None)
        deviations = np.sqrt(np.bincount(place, rest**2, minlength=bins))  # of the sums
        by_chance = float(np.sqrt(2 / np.pi) * deviations[np.abs(sums) < 2 * deviations].sum() / number)
        half = Z * float((np.sign(sums)[place] * excess).std(ddof=1)) / number**0.5
        return Interval(error, (max(0.0, error - half - by_chance), min(1.0, error + half)), None, "item")


@dataclass(frozen=True)
class Selection:
    """The best of several classifiers, scored on items that had no part in choosing it.

    Attributes:
        scored: [m] items, each under the classifier that the others chose.
        accuracy: its mean.
        chosen: the name that was chosen for each fold.
        best: the name chosen on all items: the one to recommend. Its own accuracy on them would flatter it.
        tried: the accuracy of each on all items that it was chosen on.
    """

    scored: Scored
    accuracy: Interval
    chosen: tuple[str, ...]
    best: str
    tried: dict[str, float]

    @property
    def correct(self) -> BoolArray:
        """Which items are got right, [m]."""
        return self.scored.correct


class Replacement(NamedTuple):
    """The best remedy that is a linear layer: what may take the place of a network's last layer.

    Attributes:
        name: of the remedy.
        weight: [C, d].
        bias: [C].
    """

    name: str
    weight: Floats
    bias: Floats


def select_nested(tried: Mapping[str, Scored], fold_of: IntArray) -> Selection:
    """Choose the best of several fitted classifiers on all folds but one, score it on that one.

    `tried` holds what each classifier makes of m unseen samples that it was not fitted to, simplest first. `fold_of`
    [m] counts from 0. The best is the most accurate, the first of equals; but the most accurate pooled fit (names end
    in `POOLED`) is the best unless another is better by more than a standard error of their paired difference (the
    rule of Breiman et al. 1984, section 3.4.3): it has the most samples, and more once it is fitted to all of them.

    >>> one, other = ([True, False] * 4, [True, True] * 4)
    >>> tried = {name: Scored(np.array(right), np.ones(8)) for name, right in (("a", one), ("b", other))}
    >>> select_nested(tried, np.arange(8) // 4).chosen
    ('b', 'b')
    """
    names, correct = list(tried), np.stack([one.correct for one in tried.values()])
    pooled = np.array([name.endswith(POOLED) for name in names])
    chosen = [_best(correct[:, fold_of != k], pooled) for k in range(int(fold_of.max()) + 1)]
    of, items = np.array(chosen)[fold_of], np.arange(len(fold_of))
    confidence = np.stack([one.confidence for one in tried.values()])
    scored, means = Scored(correct[of, items], confidence[of, items]), correct.mean(axis=1)
    accuracies = dict(zip(names, means.tolist(), strict=True))
    best = names[_best(correct, pooled)]
    return Selection(scored, proportion(scored.correct[None]), tuple(names[k] for k in chosen), best, accuracies)


def _best(correct: BoolArray, pooled: BoolArray) -> int:
    """Return which of some classifiers to take, by what each gets right of some samples, [K, m]."""
    means = correct.mean(axis=1)
    best = int(means.argmax())
    if not pooled.any() or pooled[best]:
        return best
    other = int(np.where(pooled, means, -1).argmax())
    lead = correct[best].astype(np.float64) - correct[other]
    return best if lead.mean() > lead.std() / len(lead) ** 0.5 else other


def fitted_to_training(
    current: LinearClassifier, train: Rows, device: torch.device | None = None
) -> dict[str, FeatureClassifier]:
    """Return what re-balances a classifier on frozen features, fitted to training samples, simplest first.

    Of large training sets only what is quickly fitted. Searches begin at the classifier in use; those by mini-batches
    are made on the device.
    """
    classes = len(current.classes_)
    large, stopping = is_large(train, classes), stopping_of(train, classes)
    if not large:
        stopping["tol"] = MEDIUM_TOL if train.features.size * classes > MEDIUM else CRT().tol
    adjusted = LogitAdjustment(base=current).fit(*train)
    found: dict[str, FeatureClassifier] = {
        **{f"logit_adjustment(tau={tau})": LogitAdjustment(base=current, tau=tau) for tau in TAUS},
        **{f"tau_norm(tau={tau})": TauNorm(base=current, tau=tau) for tau in TAUS},
        "ncm": NearestClassMean(),
        **({} if large else {"lws": LWS(base=current, **stopping), "disalign": DisAlign(base=current, **stopping)}),
    }
    for remedy in found.values():
        remedy.fit(*train)
    if is_long(train, classes):
        start = current.coef_, current.intercept_
        return found | {f"crt(l2={L2S[0]})": fit_by_batches(CRT(l2=L2S[0]), *train, start, device)}
    found |= _path("crt", CRT(**stopping), train, L2S[:1] if large else L2S, current)
    if large:
        return found
    found |= _path("logit_adjusted_loss", LogitAdjustedSoftmax(**stopping), train, L2S, adjusted)
    return found | _path("label_aware_smoothing", LabelAwareSmoothing(**stopping), train, L2S, current)


def fitted_remedy(call: str, train: Rows, current: LinearClassifier) -> FeatureClassifier:
    """Return the classifier that a call-string of `CLASSIFIERS` names, perhaps of a plug-in, fitted to samples.

    What re-balances another classifier and does not say which re-balances the current one.

    Raises:
        UserError: it cannot be fitted, or does not give logits [n, C].
    """
    with foreign_code(f"--remedy {call}: cannot be fitted"):
        model = CLASSIFIERS.make(call)
        take_base(model, current)
        model.fit(*train)
        found, wanted = np.shape(model.logits(train.features[:2])), (2, len(model.classes_))
    if found != wanted:
        raise UserError(f"--remedy {call}: gives logits {list(found)} of 2 samples, not {list(wanted)}")
    return model


def _path(
    name: str,
    kind: CRT | LogitAdjustedSoftmax | LabelAwareSmoothing,
    train: Rows,
    penalties: Sequence[float],
    start: LinearClassifier,
) -> dict[str, FeatureClassifier]:
    """Return one kind of classifier with each penalty, the strongest, which is the simplest, first."""
    models = kind.path(*train, penalties, (start.coef_, start.intercept_))
    return {f"{name}(l2={model.l2})": model for model in reversed(models)}


class _Stopping(TypedDict):
    tol: float
    max_iter: int


def is_large(train: Rows, classes: int) -> bool:
    """Return whether there is no time to train every remedy."""
    return train.features.size * classes > LARGE


def is_long(train: Rows, classes: int) -> bool:
    """Return whether there is no time for a search over all training samples: then mini-batches take its place."""
    return is_long_search(len(train.features), train.features.shape[1], classes)


def stopping_of(train: Rows, classes: int) -> _Stopping:
    """Return at which relative change a classifier's search stops, and after how many iterations."""
    return {"tol": LARGE_TOL if is_large(train, classes) else TOL, "max_iter": MAX_ITER}


def choose(
    fitted: Mapping[str, FeatureClassifier],
    current: LinearClassifier,
    fits: Fits,
    unseen: Rows,
    test: Rows | None,
    items: IntArray,
) -> tuple[Selection, Replacement | None]:
    """Choose a remedy on unseen samples and score it on others; return the best that is a linear layer, too.

    There is no such layer where none gets more of the samples that chose right than the classifier in use does.

    Args:
        fitted: to the training samples.
        current: the classifier in use.
        fits: of the bound, of which the pooled ones are remedies, too.
        unseen: to choose on: those that the pooled fits hold out.
        test: to score on; None scores unseen samples, fold by fold.
        items: [k] which test samples to score.
    """
    task, pooled = fits.task, fits.pooled
    held_out = task.fold < len(pooled.classifiers)
    some = _chosen_on(task, held_out)
    rows = task.rows[some]
    chosen_on = Rows(take_rows(unseen.features, rows), unseen.labels[rows])
    tried = {name: Scored.by(classifier, chosen_on) for name, classifier in fitted.items()}
    # A pooled fit knows no class without unseen samples: it could not take the place of the classifier in use.
    strengths = {} if task.withheld else _pooled_names(task, pooled)
    tried |= {name: _cross_fitted(fits, s, some) for name, s in strengths.items()}
    nested = select_nested(tried, task.fold[some])
    if test is None and not np.array_equal(some, held_out):
        nested = _on_all(nested, fitted, strengths, fits, unseen)
    whole = final(task, pooled_kind(task), strengths[nested.best]) if nested.best in strengths else None
    layer: Replacement | None = _layer(nested, fitted, task, whole)
    if layer and layer.name != nested.best and nested.tried[layer.name] <= Scored.by(current, chosen_on).correct.mean():
        layer = None
    if test is None:
        return nested, layer
    if whole is not None and task.test is not None:
        placed, labels, _ = task.test
        scored = _placed(whole, placed, labels)
    else:
        scored = Scored.by(fitted[nested.best], Rows(take_rows(test.features, items), test.labels[items]))
    best = Selection(scored, proportion(scored.correct[None]), (nested.best,), nested.best, nested.tried)
    return best, layer


def _chosen_on(task: Task, held_out: BoolArray) -> BoolArray:
    """Return which unseen samples remedies are chosen on: where the task is short and they are many, some at random."""
    places = np.flatnonzero(held_out)
    if not task.short or len(places) <= MOST_CHOSEN_ON:
        return held_out
    some = np.zeros_like(held_out)
    some[numpy_stream(task.seed, "remedies", "chosen on").permutation(places)[:MOST_CHOSEN_ON]] = True
    return some


def _pooled_names(task: Task, pooled: Trial) -> dict[str, int]:
    """Return the strengths of pooled fits that are remedies, by the remedies' names."""
    if task.short:
        return {f"discriminants(shrinkage={SHRINKAGES[s]}){POOLED}": s for s in pooled.classifiers[0]}
    kept = [s for s in pooled.classifiers[0] if PENALTIES[s] > WEAKEST] or [min(pooled.classifiers[0])]
    return {f"crt(l2={PENALTIES[s]:.3g}){POOLED}": s for s in kept}


def _on_all(
    nested: Selection,
    fitted: Mapping[str, FeatureClassifier],
    strengths: Mapping[str, int],
    fits: Fits,
    unseen: Rows,
) -> Selection:
    """Score what was chosen on some unseen samples on all that folds hold out, each under its fold's choice."""
    task = fits.task
    held_out = task.fold < len(fits.pooled.classifiers)
    scored = Scored(np.zeros(len(task.fold), dtype=bool), np.zeros(len(task.fold)))
    for name in dict.fromkeys(nested.chosen):
        of = held_out & np.isin(task.fold, [q for q, one in enumerate(nested.chosen) if one == name])
        if name in strengths:
            one = _cross_fitted(fits, strengths[name], of)
        else:
            rows = task.rows[of]
            one = Scored.by(fitted[name], Rows(take_rows(unseen.features, rows), unseen.labels[rows]))
        scored.correct[of], scored.confidence[of] = one
    scored = scored.at(held_out)
    return replace(nested, scored=scored, accuracy=proportion(scored.correct[None]))


def _layer(
    selection: Selection, fitted: Mapping[str, FeatureClassifier], task: Task, pooled: Tensor | None
) -> Replacement:
    """Return the best remedy if it is a linear layer, else the best that is one.

    `pooled` is the best, [C, r + 1] on placed samples, where it was fitted to training and unseen samples.
    """
    if pooled is not None:
        weight = pooled[:, :-1].double() @ task.samples.space.axes.T.double()
        bias = pooled[:, -1].double() - weight @ task.samples.space.mean.double()
        return Replacement(selection.best, weight.numpy(), bias.numpy())
    linear = {name: one for name, one in fitted.items() if isinstance(one, LinearClassifier)}
    name = selection.best if selection.best in linear else max(linear, key=lambda one: selection.tried[one])
    return Replacement(name, linear[name].coef_, linear[name].intercept_)


def _cross_fitted(fits: Fits, strength: int, some: BoolArray) -> Scored:
    """Return what pooled fits make of some of the unseen samples, [m] of bool, that each was not fitted to."""
    task, samples = fits.task, fits.task.samples
    found = Scored(np.zeros(len(task.unseen), dtype=bool), np.zeros(len(task.unseen)))
    for q, classifiers in enumerate(fits.pooled.classifiers):
        held = some & (task.fold == q)
        places = task.unseen[held]
        one = _placed(classifiers[strength], samples.placed[places], samples.labels[places])
        found.correct[held], found.confidence[held] = one
    return found.at(some)


def _placed(classifier: Tensor, placed: Tensor, labels: IntArray) -> Scored:
    """Score a classifier [C, r + 1] on placed samples."""
    return Scored.of(lambda block: (placed[block] @ classifier.T).numpy(), labels, len(classifier))
