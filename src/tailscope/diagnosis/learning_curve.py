"""The classifier bound: what a linear classifier would reach if every class had as many samples as the most frequent.

The bound is the accuracy of a softmax classifier with a chosen L2 penalty, fitted to the true distribution with
`bound_at` samples of every class. Who has a long-tailed training set and a few unseen samples a class cannot fit it,
but can say two things. `attained`, a lower limit, is what the best of several classifiers reaches that can be fitted
to what is there. `extrapolated` follows the accuracy at growing numbers of samples on to `bound_at`, with the curve's
own uncertainty; where the numbers do not determine it there is a reason instead, and only "at least" can be said.

The curve is logit(accuracy) = A - B n^-c with n the harmonic mean of the samples a class. Its points hardly determine
c, so it is drawn from a range and then weighed by how well it fits. A fit to training and unseen samples together is
a point of the same curve, far to the right of the others, but only where the encoder treats both alike: where it has
memorised the training samples, they are no samples of the true distribution. `Exchange` tests that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit
from torch import Tensor

from tailscope.classifiers.base import IntArray
from tailscope.diagnosis.curve_fits import (
    PENALTIES,
    BoolArray,
    Rows,
    Task,
    Trial,
    discriminant_trial,
    ladder,
    predict,
    short_trial,
    shrinkage_lda,
    softmax_path,
    softmax_trial,
)
from tailscope.intervals import Bounds, FloatArray, Interval, proportion
from tailscope.seeds import numpy_stream

KINDS = (
    "softmax regression on unseen samples",
    "class-balanced softmax regression on training and unseen samples",
    "linear discriminants of training and unseen samples",
    "linear discriminants of unseen samples",
)
OF_UNSEEN = KINDS[0], KINDS[3]
SHORT = (
    "there are so many classes and samples that the learning curve was drawn from linear discriminants instead of "
    "softmax regressions, which take hundreds of passes: where these would do better, the classifier costs more than "
    "is said"
)
DRAWS = 3000
# Accuracies of cross-fitted classifiers vary more than independent items do, because folds share training samples: up
# to 1.35 times as much in simulations with Gaussian and CIFAR features.
INFLATION = 1.3
EXPONENTS = (0.05, 0.7)  # of the curves that were seen on nine data sets, those that hit the truth had -0.05 to 0.5
# Standard deviation of the curve's own error, in accuracy, at its right end, and once more for each halving of n.
DISCREPANCY = 0.01
# log2 of the samples a class that a fit to unequal classes is worth, over their harmonic mean: mean and deviation.
WORTH = (0.1, 0.3)
# Curves that bend upwards, or start so near chance, are not followed: gain per doubling, share of the way from chance.
BEND, NEAR_CHANCE = 0.015, 0.2
# Training and unseen samples count as alike where a z test cannot tell them apart, or the difference is immaterial.
EXCHANGE_Z, EXCHANGE_DIFFERENCE = 2.6, 0.01


@dataclass(frozen=True)
class Attained:
    """The best classifier that can be fitted to what is there, scored on samples that had no part in it.

    Attributes:
        accuracy: with an item interval, widened where the items were cross-fitted.
        correct: [k] of bool, per scored item.
        rows: [k] the items' places in the test set, or in the unseen samples where there is no test set.
        classifier: which it is, in words.
        inflation: by which standard errors over these items are to be widened.
        chance: the accuracy of naming the most frequent class of the scored items.
    """

    accuracy: Interval
    correct: BoolArray
    rows: IntArray
    classifier: str
    inflation: float
    chance: float

    @property
    def above_chance(self) -> bool:
        """Whether the interval lies above chance: where it does not, nothing is known."""
        return self.accuracy.ci95 is not None and self.accuracy.ci95[0] > self.chance


@dataclass(frozen=True)
class Extrapolated:
    """The bound at `bound_at` samples a class.

    Attributes:
        mean: of the draws.
        ci95: their 2.5 and 97.5 % quantiles: items, folds and the curve.
        bound_at: samples a class.
        draws: [D] of the bound for new items, in [0, 1].
        gains: [D] of the bound minus the attained accuracy on the very items that were scored, >= 0: to pair it with
            other classifiers' outcomes on them, add these to `Attained.correct` and the items' noise to that, which
            needs no inflation: the folds' noise is in the gains.
    """

    mean: float
    ci95: Bounds
    bound_at: int
    draws: FloatArray
    gains: FloatArray


@dataclass(frozen=True)
class Exchange:
    """Whether training samples are like unseen ones to a classifier that was fitted to neither.

    Attributes:
        difference: the probability that it gives the true class, training minus unseen samples, within classes.
        z: that over its standard error; None where no class has two of both.
        alike: whether the training samples may count as samples of the true distribution.
    """

    difference: float
    z: float | None
    alike: bool


@dataclass(frozen=True)
class CurvePoint:
    """An accuracy that was measured.

    Attributes:
        samples: the harmonic mean of the samples a class that were fitted to.
        accuracy: on held-out samples.
        deviation: its standard deviation over draws of the training samples.
        source: what was fitted to: unseen samples, or these and the training samples ("pooled").
    """

    samples: float
    accuracy: float
    deviation: float
    source: Literal["unseen", "pooled"]


@dataclass(frozen=True)
class ClassifierBound:
    """What is known of the bound.

    Attributes:
        attained: the lower limit.
        extrapolated: the bound itself, or None.
        reason: why there is none: then the bound is "at least" the lower end of what is attained.
        bound_at: samples a class of the bound.
        points: of the curve, by samples.
        exchange: whether training samples took part in the curve.
        withheld: classes that took no part, for want of unseen samples.
        notes: what a reader must know: what took no part.
    """

    attained: Attained
    extrapolated: Extrapolated | None
    reason: str | None
    bound_at: int
    points: tuple[CurvePoint, ...]
    exchange: Exchange
    withheld: tuple[int, ...]
    notes: tuple[str, ...]

    def at_least(self, correct: BoolArray, classifier: str) -> "ClassifierBound":
        """Return the bound with a classifier that gets more of the scored items right, [k], as what is attained."""
        old, found = self.attained, self.extrapolated
        accuracy = _accuracy(correct, old.inflation)
        if found is not None:
            more = accuracy.estimate - old.accuracy.estimate
            gains = np.maximum(0, found.gains - more)
            found = _summed(np.clip(found.draws + more + gains - found.gains, 0, 1), gains, found.bound_at)
        attained = replace(old, accuracy=accuracy, correct=correct, classifier=classifier)
        return replace(self, attained=attained, extrapolated=found)


@dataclass(frozen=True)
class Fits:
    """What the bound is read off.

    Attributes:
        task: the samples, cut into folds.
        trials: fits to growing parts of the unseen samples.
        pooled: fits to training and unseen samples.
        discriminants: linear ones of the same; where the task is short, the pooled fits themselves.
    """

    task: Task
    trials: list[Trial]
    pooled: Trial
    discriminants: Trial

    @classmethod
    def of(cls, train: Rows, unseen: Rows, test: Rows | None, bursts: ArrayLike | None, seed: int) -> "Fits":
        """Fit everything.

        Args:
            train: the long-tailed training samples.
            unseen: samples of the true distribution that the encoder was not trained on; classes may differ in number.
            test: others, to score on; None scores unseen samples by cross-fitting.
            bursts: [m] ids of related unseen samples, which share a fold.
            seed: of folds, subsets and draws.

        Raises:
            ValueError: fewer than two classes have two unseen samples, or no test sample is of these.
            Diverged: a loss is not finite.
        """
        task = Task.of(train, unseen, test, bursts, seed)
        trials = ladder(task)
        everything = [np.concatenate([task.seen, rows]) for rows in task.fitted[: task.compared]]
        if task.short:
            pooled = short_trial(task, everything)
            return cls(task, trials, pooled, pooled)
        return cls(task, trials, softmax_trial(task, everything, trials[-1]), discriminant_trial(task, everything))


def follow(fits: Fits, bound_at: int) -> ClassifierBound:
    """Return what is known of the classifier bound at so many samples a class."""
    task, trials, pooled = fits.task, fits.trials, fits.pooled
    exchange = _exchange(task, trials[-1])
    candidates = {3: trials[-1], 2: pooled} if task.short else {0: trials[-1], 1: pooled, 2: fits.discriminants}
    attained = _attained(task, candidates)
    points = _points(task, trials)
    if exchange.alike:
        points.append(_pooled_point(task, pooled, trials[-1], points[-1].deviation))
    reason = _refusal(points, attained, task.samples.classes)
    stream = numpy_stream(task.seed, "learning curve", "draws")
    found = None if reason else _extrapolated(points, attained, bound_at, stream)
    return ClassifierBound(attained, found, reason, bound_at, tuple(points), exchange, task.withheld, _notes(task))


def _exchange(task: Task, trial: Trial) -> Exchange:
    """Compare what classifiers of unseen samples give the true class of training samples and of held-out ones."""
    strength, folds = trial.choose(task.scored), len(task.fitted)
    part = numpy_stream(task.seed, "learning curve", "exchange").integers(0, folds, len(task.seen))
    n, a, a2 = _moments(task, trial, strength, [task.seen[part == q] for q in range(folds)])
    m, b, b2 = _moments(task, trial, strength, [task.unseen[task.fold == q] for q in range(folds)])
    both = (n >= 2) & (m >= 2)
    n, a, a2, m, b, b2 = (value[both] for value in (n, a, a2, m, b, b2))
    weight = n * m / (n + m)
    variance = np.maximum(0, a2 - a**2 / n + b2 - b**2 / m) / (n + m - 2)
    error = float(np.sqrt((weight * variance).sum()))
    if error == 0:
        return Exchange(0.0, None, False)
    excess = float((weight * (a / n - b / m)).sum())
    difference, z = excess / float(weight.sum()), excess / error
    return Exchange(difference, z, abs(z) <= EXCHANGE_Z or abs(difference) <= EXCHANGE_DIFFERENCE)


def _moments(task: Task, trial: Trial, strength: int, parts: Sequence[IntArray]) -> FloatArray:
    """Return how many rows each class has, and the sums of their true class's probability and of its square, [3, C]."""
    found = np.zeros((3, task.samples.classes))
    for classifiers, rows in zip(trial.classifiers, parts, strict=True):
        probability = task.samples.probability(classifiers[strength], rows)
        for power in range(3):
            found[power] += np.bincount(task.samples.labels[rows], probability**power, task.samples.classes)
    return found


def _attained(task: Task, candidates: Mapping[int, Trial]) -> Attained:
    """Choose the best of all classifiers, by their place in `KINDS`, on other samples than it is scored on."""
    known = np.all([np.isfinite(trial.right).any(axis=0) for trial in candidates.values()], axis=0)
    tried = [(i, s) for i, trial in candidates.items() for s in trial.classifiers[0]]
    right = np.stack([candidates[i].right[s] for i, s in tried])
    kind, strength = tried[int(right[:, known].mean(axis=1).argmax())]
    if task.test is None:
        correct = np.zeros(len(task.unseen), dtype=bool)
        for q in range(len(task.fitted)):
            held = task.fold == q
            correct[held] = right[right[:, known & ~held].mean(axis=1).argmax(), held]
        correct, rows, labels = correct[known], task.rows[known], task.samples.labels[task.unseen[known]]
    else:
        placed, labels, rows = task.test
        correct = predict(final(task, kind, strength), placed) == labels
    inflation = INFLATION if task.test is None else 1.0
    chance = float(np.bincount(labels).max() / len(labels))
    return Attained(_accuracy(correct, inflation), correct, rows, KINDS[kind], inflation, chance)


def _accuracy(correct: BoolArray, inflation: float) -> Interval:
    """Return the mean of outcomes with Wilson's interval, widened about the mean, within [0, 1]."""
    low, high = proportion(correct[None]).widened(inflation).ci95 or (0.0, 1.0)
    return Interval(float(correct.mean()), (max(0.0, low), min(1.0, high)), None, "item")


def final(task: Task, kind: int, strength: int) -> Tensor:
    """Return one kind of classifier (of `KINDS`) [C, r + 1], fitted to all samples that it may be fitted to."""
    rows = task.unseen if KINDS[kind] in OF_UNSEEN else np.arange(len(task.samples.labels))
    if kind >= 2:
        return shrinkage_lda(task.samples, rows)[strength]
    path = PENALTIES[max(0, strength - 2) : strength + 1]
    return softmax_path(task.samples, rows, rows[:0], path, stop=False)[-1]


def pooled_kind(task: Task) -> int:
    """Return the place in `KINDS` of the fits to training and unseen samples that are of one kind with the curve's."""
    return 2 if task.short else 1


def _points(task: Task, trials: Sequence[Trial]) -> list[CurvePoint]:
    """Return the accuracies of growing numbers of unseen samples."""
    near = [[*trials[max(0, j - 1) : j], *trials[j + 1 : j + 2]] for j in range(len(trials))]
    levels = np.array([_levels(task, trial, beside) for trial, beside in zip(trials, near, strict=True)])
    folds = levels.shape[1]
    deviations = levels.std(axis=1, ddof=1)
    if task.test is None:  # less what is due to the folds' items, which are the same at every size
        rest = levels - levels.mean(axis=1, keepdims=True) - levels.mean(axis=0) + levels.mean()
        freedom = max(1, (folds - 1) * (len(levels) - 1))
        deviations = np.full(len(levels), np.sqrt(2 / folds * (rest**2).sum() / freedom))
    return [
        CurvePoint(_harmonic(trial.counts), float(level), float(deviation), "unseen")
        for trial, level, deviation in zip(trials, levels.mean(axis=1), deviations, strict=True)
    ]


def _pooled_point(task: Task, pooled: Trial, smaller: Trial, deviation: float) -> CurvePoint:
    """Return the accuracy of all samples together."""
    if task.test is None:
        return CurvePoint(_harmonic(pooled.counts), float(_levels(task, pooled, [smaller]).mean()), deviation, "pooled")
    placed, labels, _ = task.test
    classifier = final(task, pooled_kind(task), pooled.choose(task.scored, [smaller]))
    counts = np.bincount(task.samples.labels).astype(np.float64)
    return CurvePoint(_harmonic(counts), float((predict(classifier, placed) == labels).mean()), deviation, "pooled")


def _levels(task: Task, trial: Trial, near: Sequence[Trial]) -> FloatArray:
    """Return the accuracy in each fold, at a strength chosen on other samples."""
    found = []
    for q, classifiers in enumerate(trial.classifiers):
        held = task.fold == q
        if task.test is None:
            found.append(trial.right[trial.choose(task.scored & ~held, near), held].mean())
        else:
            placed, labels, _ = task.test
            found.append((predict(classifiers[trial.choose(task.scored, near)], placed) == labels).mean())
    return np.array(found)


def _harmonic(counts: FloatArray) -> float:
    return float(1 / np.mean(1 / np.maximum(counts, 0.5)))


def _refusal(points: Sequence[CurvePoint], attained: Attained, classes: int) -> str | None:
    """Return why the points do not determine the bound, or None."""
    if not attained.above_chance:
        return "what is attained is not above chance"
    if len(points) < 3:
        return "there are too few unseen samples a class for a curve"
    level = np.array([point.accuracy for point in points])
    if level[-1] < 1 / classes + (1 - 1 / classes) * min(2 / classes, NEAR_CHANCE):
        return "the accuracies are too near chance to be followed"
    gains = np.diff(level)
    if points[-1].source == "unseen" and gains[-1] >= gains[-2] and gains[-1] >= gains[0] + BEND:
        return "the accuracies still rise faster and faster"
    return None


def _extrapolated(
    points: Sequence[CurvePoint], attained: Attained, bound_at: int, stream: np.random.Generator
) -> Extrapolated:
    """Follow the points to `bound_at`, but not below what is attained."""
    items, reached = len(attained.correct), attained.accuracy.estimate
    gains = np.maximum(0, _followed(points, 0.5 / items, bound_at, stream) - reached)
    share = (reached * items + 2) / (items + 4)  # as Wilson's: not 0 where all are right
    noise = np.sqrt(share * (1 - share) / items) * stream.normal(size=DRAWS)  # that of the folds is in the curve's
    return _summed(np.clip(reached + gains + noise, 0, 1), gains, bound_at)


def _summed(draws: FloatArray, gains: FloatArray, bound_at: int) -> Extrapolated:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Extrapolated(float(draws.mean()), (float(low), float(high)), bound_at, draws, gains)


def _followed(points: Sequence[CurvePoint], margin: float, bound_at: int, stream: np.random.Generator) -> FloatArray:
    """Draw curves through the points and return the accuracy of each at `bound_at`, [D].

    Each draw has an exponent c, at which the curve is a line through the points; lines that fit badly are drawn less.
    """
    level = np.clip([point.accuracy for point in points], margin, 1 - margin)
    doublings = np.log2([point.samples for point in points])
    pooled = np.array([point.source == "pooled" for point in points])
    doublings = doublings + pooled * (WORTH[0] + WORTH[1] * stream.normal(size=(DRAWS, 1)))
    own_error = DISCREPANCY * (1 + doublings.mean(axis=0).max() - doublings.mean(axis=0))
    weight = (level * (1 - level)) ** 2 / (np.square([point.deviation for point in points]) + own_error**2)
    exponent = stream.uniform(*EXPONENTS, size=DRAWS)
    x, y, total = 2 ** (-exponent[:, None] * doublings), logit(level), weight.sum()
    x_mean, y_mean = x @ weight / total, float(weight @ y / total)
    x_rest, y_rest = x - x_mean[:, None], y - y_mean
    precision = x_rest**2 @ weight
    fall = -(x_rest * y_rest) @ weight / precision
    misfit = (y_rest + fall[:, None] * x_rest) ** 2 @ weight
    likelihood = np.exp(-0.5 * (misfit - misfit.min()))
    taken = stream.choice(DRAWS, DRAWS, p=likelihood / likelihood.sum())
    steep = np.maximum(0, fall + stream.normal(size=DRAWS) / np.sqrt(precision))[taken]
    height = y_mean + stream.normal(size=DRAWS) / np.sqrt(total)
    followed: FloatArray = expit(height - steep * (bound_at ** -exponent[taken] - x_mean[taken]))
    return followed


def _notes(task: Task) -> tuple[str, ...]:
    found = [SHORT] if task.short else []
    if task.withheld:
        lack, them = ("class lacks", "it") if len(task.withheld) == 1 else ("classes lack", "them")
        found.append(f"{len(task.withheld)} {lack} unseen samples: the bound leaves {them} out")
    if task.left_out:
        found.append(f"{task.left_out} samples were left out of the bound's fits, chosen at random, for their number")
    return tuple(found)
