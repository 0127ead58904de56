"""The fits that a learning curve is drawn from: many linear classifiers on nested samples of the same rows, fast.

All fits share one turn of the features into the axes of their covariance, scaled so that the curvature of the softmax
loss is about the same along each. There the L2 penalty stays diagonal, a few L-BFGS steps suffice, and the next weaker
penalty starts from the last one's classifier. Where there are fewer rows than features only the rows' span is kept:
the cost grows with min(N, d).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tailscope.classifiers.base import Diverged, Floats, IntArray, row_blocks
from tailscope.classifiers.estimators import balanced_weights
from tailscope.diagnosis.curve_rows import class_codes, rank_in_class, used_rows
from tailscope.intervals import FloatArray
from tailscope.seeds import numpy_stream
from tailscope.tables.mapped import empty_rows, map_rows

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)
FOLDS = 5
# Rows times features times classes: beyond `FEWER_FOLDS` not every fold is fitted. Where there is a test set the fits
# to all samples need the folds only to be compared: few, beyond `COMPARED_IN_ALL`.
FEWER_FOLDS, COMPARED_IN_ALL = 2e9, 2e8
STEPS = 6
ENOUGH = 1e-5  # a step that lowers the objective f by less than this * max(1, f) ends the search
MEMORY = 8
PENALTIES = tuple(10 ** (-k / 2) for k in range(2, 15))  # 0.1, 0.03, 0.01 ... 1e-7
SHRINKAGES = (0.01, 0.1, 0.5)
DAMPING = 0.1
RANK = 1e-7
DOMINANT = 100.0

BoolArray = NDArray[np.bool_]


class Space(NamedTuple):
    """Centred features turned into the axes of their covariance and scaled.

    Attributes:
        mean: [d].
        axes: [d, r]: placed = (x - mean) @ axes.
        penalty: [r + 1]: with l2 / 2 before it, what the square of a weight costs; the last is the bias, which is free.
    """

    mean: Tensor
    axes: Tensor
    penalty: Tensor

    def place(self, features: Floats, chosen: IntArray | None = None) -> Tensor:
        """Return coordinates [N, r + 1] of features [N, d], or of the chosen ones; the last is 1."""
        number = len(features) if chosen is None else len(chosen)
        placed = empty_rows(number, self.axes.shape[1] + 1, torch.float32)
        placed[:, -1] = 1
        for block in row_blocks(number, features.shape[1]):
            own = features[block if chosen is None else chosen[block]]
            rows = torch.from_numpy(np.ascontiguousarray(own, dtype=np.float32))
            placed[block, :-1] = (rows - self.mean) @ self.axes
        return placed


@dataclass(frozen=True)
class Samples:
    """Rows that classifiers are fitted to and scored on.

    Attributes:
        space: in which they are placed.
        placed: [N, r + 1].
        labels: [N] class indices.
        classes: C.
        scatter: [r, r], placed' placed without the ones.
    """

    space: Space
    placed: Tensor
    labels: IntArray
    classes: int
    scatter: Tensor

    @classmethod
    def of(cls, features: Floats, labels: IntArray, classes: int) -> "Samples":
        """Place features [N, d] in their own space."""
        space = find_space(features)
        placed = space.place(features)
        return cls(space, placed, labels, classes, placed[:, :-1].T @ placed[:, :-1])

    def correct(self, classifier: Tensor, rows: IntArray) -> BoolArray:
        """Return which rows a classifier [C, r + 1] gets right."""
        correct: BoolArray = predict(classifier, self.placed[rows]) == self.labels[rows]
        return correct

    def probability(self, classifier: Tensor, rows: IntArray) -> NDArray[np.float64]:
        """Return what softmax gives the true class of each row."""
        own = np.empty(len(rows))
        for block in row_blocks(len(rows), self.classes):
            shares = (self.placed[rows[block]] @ classifier.T).softmax(1)
            own[block] = shares[torch.arange(len(shares)), self.labels[rows[block]]].double().numpy()
        return own


def predict(classifier: Tensor, placed: Tensor) -> IntArray:
    """Return the class of each placed row."""
    found = [(placed[block] @ classifier.T).argmax(1) for block in row_blocks(len(placed), len(classifier))]
    predicted: IntArray = torch.cat(found).numpy() if found else np.zeros(0, dtype=np.int64)
    return predicted


def find_space(features: Floats) -> Space:
    """Return the space of features [N, d].

    The penalty is in units of the mean feature variance, so that scaling all features changes no prediction. A feature
    of more than a hundred times the median variance is scaled down to that: one of another unit would rule them all.
    """
    rows = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    mean = rows.mean(0)
    blocks, variances = list(row_blocks(*rows.shape)), torch.zeros_like(mean)
    for block in blocks:
        variances += (rows[block] - mean).square().sum(0) / len(rows)
    if not variances.any():  # constant features
        return Space(mean, torch.zeros(rows.shape[1], 1), torch.tensor([1.0, 0.0]))
    unit = (DOMINANT * variances[variances > 0].median() / variances).clamp(max=1).sqrt()
    wide = len(rows) < rows.shape[1]
    scatter = torch.zeros(min(rows.shape), min(rows.shape))
    for block in [slice(None)] if wide else blocks:
        centred = (rows[block] - mean) * unit
        scatter += centred @ centred.T if wide else centred.T @ centred
    eigenvalues, axes = torch.linalg.eigh(scatter.double() / len(rows))
    kept = eigenvalues > RANK * eigenvalues[-1]
    eigenvalues, axes = eigenvalues[kept], axes[:, kept]
    if wide:
        axes = centred.double().T @ (axes / (len(rows) * eigenvalues).sqrt())
    variance = eigenvalues.sum() / rows.shape[1]
    scale = (0.5 * eigenvalues + DAMPING * variance).rsqrt()
    penalty = torch.cat([variance * scale.square(), torch.zeros(1, dtype=torch.float64)])
    return Space(mean, unit[:, None] * (axes * scale).float(), penalty.float())


def softmax_path(
    samples: Samples, rows: IntArray, held_out: IntArray, strengths: Sequence[float], stop: bool
) -> list[Tensor]:
    """Fit class-balanced softmax regressions to rows, from the strongest penalty to the weakest.

    Args:
        samples: where they are.
        rows: to fit to; every class occurs.
        held_out: rows that tell when weaker penalties are of no use.
        strengths: of the penalty, falling.
        stop: to end the path where neither the held-out likelihood nor the accuracy rises any more.

    Returns:
        classifiers [C, r + 1], one for each strength that was tried.
    """
    index = torch.from_numpy(rows)
    placed, labels = map_rows(samples.placed, lambda block: block, index), torch.from_numpy(samples.labels[rows])
    weights = balanced_weights(np.bincount(samples.labels[rows], minlength=samples.classes).clip(1))
    weight = torch.from_numpy(weights[samples.labels[rows]] / len(rows)).float()
    found: list[Tensor] = []
    merits: list[tuple[float, float]] = []  # of each, the held-out likelihood and accuracy
    search = _Search(placed, labels, weight, samples.classes)
    for strength in strengths:
        found.append(search.run(strength * samples.space.penalty))
        if stop and len(held_out):
            probability = samples.probability(found[-1], held_out).clip(1e-30)
            merits.append((float(np.log(probability).mean()), float(samples.correct(found[-1], held_out).mean())))
            if len(merits) > 1 and all(now <= max(before) for *before, now in zip(*merits, strict=True)):
                break
    return found


def shrinkage_lda(samples: Samples, rows: IntArray) -> list[Tensor]:
    """Fit linear discriminants with equal priors to rows, one for each of `SHRINKAGES` of the covariance."""
    left_out = np.setdiff1d(np.arange(len(samples.labels)), rows)
    placed, others = samples.placed[rows, :-1], samples.placed[left_out, :-1]
    counts = torch.from_numpy(np.bincount(samples.labels[rows], minlength=samples.classes).clip(1)).float()[:, None]
    sums = torch.zeros(samples.classes, placed.shape[1]).index_add_(0, torch.from_numpy(samples.labels[rows]), placed)
    means = sums / counts
    within = (samples.scatter - others.T @ others - means.T @ sums) / max(1, len(rows) - samples.classes)
    metric = samples.space.penalty[:-1]  # the identity of the features, turned and scaled
    sphere = torch.diag(metric * (within.diagonal() / metric).mean().clamp(min=1e-6))
    found = []
    for shrinkage in SHRINKAGES:
        weight = torch.linalg.solve((1 - shrinkage) * within + shrinkage * sphere, means.T).T
        found.append(torch.cat([weight, -0.5 * (weight * means).sum(1, keepdim=True)], dim=1))
    return found


class _Search:
    """A search by L-BFGS for the least weighted cross-entropy plus penalised squares, under one penalty after another.

    What was learnt of the cross-entropy's curvature serves the next penalty too.
    """

    def __init__(self, placed: Tensor, labels: Tensor, weight: Tensor, classes: int) -> None:
        self.rows = placed, labels, weight
        self.here = torch.zeros(classes, placed.shape[1])
        self.loss, self.gradient = _cross_entropy(*self.rows, self.here)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # steps and changes of the cross-entropy's gradient

    def run(self, penalty: Tensor) -> Tensor:
        """Take at most `STEPS` steps under a penalty [r + 1] and return where they end, [C, r + 1]."""
        for _ in range(STEPS):
            full = self.gradient + penalty * self.here
            direction = _two_loops(full, [(step, change + penalty * step) for step, change in self.pairs])
            value, slope, length = self._value(self.loss, self.here, penalty), float((direction * full).sum()), 1.0
            while True:
                there = self.here - length * direction
                loss, gradient = _cross_entropy(*self.rows, there)
                gain = value - self._value(loss, there, penalty)
                if gain >= 1e-4 * length * slope or length < 1e-3:
                    break
                length /= 2
            if gain <= 0:  # rounding: no step helps
                break
            self.pairs = [*self.pairs, (there - self.here, gradient - self.gradient)][-MEMORY:]
            self.here, self.loss, self.gradient = there, loss, gradient
            if gain < ENOUGH * max(1.0, value):
                break
        return self.here

    @staticmethod
    def _value(loss: float, classifier: Tensor, penalty: Tensor) -> float:
        return loss + 0.5 * float((classifier.square().sum(0) * penalty).sum())


def _cross_entropy(placed: Tensor, labels: Tensor, weight: Tensor, classifier: Tensor) -> tuple[float, Tensor]:
    """Return the weighted cross-entropy of a classifier [C, r + 1] and its gradient.

    Raises:
        Diverged: it is not finite.
    """
    gradient, total = torch.zeros_like(classifier), 0.0
    for block in row_blocks(len(labels), len(classifier)):
        logits = placed[block] @ classifier.T
        each = torch.arange(len(logits)), labels[block]
        logits -= logits.amax(1, keepdim=True)
        own = logits[each]
        normaliser = logits.exp_().sum(1, keepdim=True)
        total += float((normaliser[:, 0].log() - own) @ weight[block])
        logits /= normaliser
        logits[each] -= 1
        logits *= weight[block, None]
        gradient += logits.T @ placed[block]
    if not np.isfinite(total):
        raise Diverged("the loss or its gradient is not finite")
    return total, gradient


def _two_loops(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the inverse Hessian that the pairs of steps and gradient changes imply, times the gradient."""
    direction = gradient.clone()
    shares = []
    for step, change in reversed(pairs):
        share = (step * direction).sum() / (step * change).sum()
        direction -= share * change
        shares.append(share)
    if pairs:
        step, change = pairs[-1]
        direction *= (step * change).sum() / change.square().sum()
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        direction += step * (share - (change * direction).sum() / (step * change).sum())
    return direction


# ---- nested samples and folds


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


class Rows(NamedTuple):
    """Features [N, d] and class indices [N]."""

    features: Floats
    labels: IntArray


@dataclass(frozen=True)
class Task:
    """Samples of all kinds in one table, cut into folds.

    Attributes:
        samples: training samples, then unseen ones.
        seen: places of the training samples.
        unseen: places of the unseen ones, [m].
        rows: [m] which of the given unseen samples they are.
        fold: [m].
        fitted: for each of these, places of the unseen samples to fit to, in a random order.
        compared: in how many of these the fits to all samples are.
        test: placed test samples, their labels and rows; None in cross-fitting.
        withheld: classes left out.
        left_out: rows left out for their number.
        seed: of subsets.
        short: whether linear discriminants take the place of softmax regressions, whose searches would take too long.
    """

    samples: Samples
    seen: IntArray
    unseen: IntArray
    rows: IntArray
    fold: IntArray
    fitted: list[IntArray]
    compared: int
    test: tuple[Tensor, IntArray, IntArray] | None
    withheld: tuple[int, ...]
    left_out: int
    seed: int
    short: bool = False

    @classmethod
    def of(cls, train: Rows, unseen: Rows, test: Rows | None, bursts: ArrayLike | None, seed: int) -> "Task":
        """Take the classes that have unseen samples, and as many rows as there is time for."""
        code, withheld = class_codes(train.labels, unseen.labels, None if test is None else test.labels)
        work = train.features.shape[1] * (int(code.max()) + 1)
        seen, kept, short = used_rows(code[train.labels], code[unseen.labels], train.features.shape[1], seed)
        features = _together((train.features, seen), (unseen.features, kept))
        labels = code[np.concatenate([train.labels[seen], unseen.labels[kept]])]
        samples = Samples.of(features, labels, int(code.max()) + 1)
        places = np.arange(len(seen), len(labels))
        related = None if bursts is None else np.asarray(bursts)[kept]
        folds = min(FOLDS, len(kept) if related is None else len(np.unique(related)))
        if folds < 2:
            raise ValueError("the unseen samples are a single burst: no bound can be told")
        fold = assign_folds(labels[places], folds, related, seed)
        order = numpy_stream(seed, "learning curve", "order").permutation(len(places))
        work *= len(labels)
        some = folds if short and test is None else int(np.clip(FOLDS * FEWER_FOLDS / work, 2, folds))
        fitted = [places[order[fold[order] != q]] for q in range(some)]
        compared = some if test is None or work < COMPARED_IN_ALL else 2
        scored = None
        if test is not None:
            items = np.flatnonzero(code[test.labels] >= 0)
            scored = samples.space.place(test.features, items), code[test.labels[items]], items
        left_out = int((code[np.concatenate([train.labels, unseen.labels])] >= 0).sum()) - len(labels)
        parts = np.arange(len(seen)), places, kept, fold
        return cls(samples, *parts, fitted, compared, scored, withheld, left_out, seed, short)

    @property
    def scored(self) -> BoolArray:
        """Which unseen samples a fold that is fitted holds out, [m]."""
        scored: BoolArray = self.fold < len(self.fitted)
        return scored


@dataclass
class Trial:
    """One kind of classifier, fitted in each fold with several strengths of its regularisation.

    Attributes:
        counts: [C] samples of each class that were fitted to, mean over folds.
        right: [L, m] whether each unseen sample is got right by each strength; NaN where it was not held out.
        classifiers: for each fold, by strength.
    """

    counts: FloatArray
    right: FloatArray
    classifiers: list[dict[int, Tensor]] = field(default_factory=list)

    def choose(self, items: BoolArray, near: Sequence["Trial"] = ()) -> int:
        """Return the strength that is best on some of the unseen samples; neighbours on the curve count half."""
        own = self._accuracy(items)
        total, weight = np.nan_to_num(own), np.ones(len(own))
        for trial in near:
            theirs = trial._accuracy(items)
            total += 0.5 * np.nan_to_num(theirs)
            weight += 0.5 * np.isfinite(theirs)
        return int(np.where(np.isfinite(own), total / weight, -1).argmax())

    def _accuracy(self, items: BoolArray) -> FloatArray:
        right = self.right[:, items]
        tried, known = np.isfinite(right).any(axis=1), np.isfinite(right).any(axis=0)
        accuracy = np.full(len(right), np.nan)
        accuracy[tried] = right[np.ix_(tried, known)].mean(axis=1)
        return accuracy


def _together(*parts: tuple[Floats, IntArray]) -> NDArray[np.float32]:
    """Return the chosen rows of several feature matrices in one, copied once."""
    found = empty_rows(sum(len(rows) for _, rows in parts), parts[0][0].shape[1], torch.float32).numpy()
    start = 0
    for features, rows in parts:
        for block in row_blocks(len(rows), features.shape[1]):
            found[start + block.start : start + min(block.stop, len(rows))] = features[rows[block]]
        start += len(rows)
    return found


def ladder(task: Task) -> list[Trial]:
    """Fit to growing nested parts of the unseen samples, the whole last."""
    labels = task.samples.labels
    found: list[Trial] = []
    parts: list[list[IntArray]] = []
    for fraction in FRACTIONS:
        part = []
        for rows in task.fitted:
            counts = np.bincount(labels[rows])
            wanted = np.maximum(1, np.round(fraction * counts))[labels[rows]]
            part.append(rows[rank_in_class(labels[rows], np.arange(len(rows))) < wanted])
        if not parts or len(part[0]) > len(parts[-1][0]):
            parts.append(part)
    for part in parts:
        found.append(short_trial(task, part) if task.short else softmax_trial(task, part, None))
    return found


def softmax_trial(task: Task, training: list[IntArray], smaller: Trial | None) -> Trial:
    """Fit softmax regressions in each fold; the strengths begin near the best of a fit to fewer samples."""
    trial = _empty(task, training, len(PENALTIES))
    first = 0 if smaller is None else max(0, smaller.choose(np.ones(len(task.unseen), dtype=bool)) - 1)
    last = len(PENALTIES)
    for q, rows in enumerate(training):
        held = task.fold == q
        path = softmax_path(task.samples, rows, task.unseen[held], PENALTIES[first:last], stop=q == 0)
        last = first + len(path)
        _score(task, trial, q, dict(enumerate(path, first)))
    return trial


def discriminant_trial(task: Task, training: list[IntArray]) -> Trial:
    """Fit linear discriminants in each fold."""
    trial = _empty(task, training, len(SHRINKAGES))
    for q, rows in enumerate(training):
        _score(task, trial, q, dict(enumerate(shrinkage_lda(task.samples, rows))))
    return trial


def short_trial(task: Task, training: list[IntArray]) -> Trial:
    """Fit linear discriminants in each fold, after the first only with the shrinkage that was best there."""
    trial = _empty(task, training, len(SHRINKAGES))
    for q, rows in enumerate(training):
        found = dict(enumerate(shrinkage_lda(task.samples, rows)))
        best = set(found) if q == 0 else set(trial.classifiers[0])
        _score(task, trial, q, {strength: found[strength] for strength in sorted(best)})
        if q == 0:
            best = {trial.choose(task.fold == 0)}
            trial.classifiers[0] = {strength: found[strength] for strength in best}
            trial.right[[strength for strength in found if strength not in best]] = np.nan
    return trial


def _empty(task: Task, training: list[IntArray], strengths: int) -> Trial:
    classes = task.samples.classes
    counts = np.mean([np.bincount(task.samples.labels[rows], minlength=classes) for rows in training], axis=0)
    return Trial(counts, np.full((strengths, len(task.unseen)), np.nan))


def _score(task: Task, trial: Trial, q: int, classifiers: dict[int, Tensor]) -> None:
    held = task.fold == q
    for strength, classifier in classifiers.items():
        trial.right[strength, held] = task.samples.correct(classifier, task.unseen[held])
    trial.classifiers.append(classifiers)
