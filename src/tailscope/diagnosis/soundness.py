"""Whether inputs can carry a verdict: whether files, labels and classifier belong together.

Where labels of two files mean different classes, where one file's features were scaled and another's not, or where
held-out samples are training samples, every number of a diagnosis is right and every conclusion from it wrong: then
the verdict is withheld, and the reason names them.

Two files that number the same classes differently (a class is missing and later ones moved up, names were sorted
another way) look like bad features. While labels agree, held-out centres nu and training centres mu point the same way,
sum nu . mu >= sum nu . nu, and (nu_a - nu_b) . (mu_a - mu_b) > 0 for any two classes. Merely bad features bring all of
these near 0. Labels that mean other classes turn the order of centres round.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.diagnosis.inputs import Inputs, named
from tailscope.effort import are_many_pairs
from tailscope.errors import first_few
from tailscope.measures.angles import class_centers
from tailscope.measures.rows import ClassRows, exponent, find_copies, gather, row_blocks, scaled, unseen_copies
from tailscope.report.text import percent
from tailscope.tables.mapped import map_rows

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

FloatArray = npt.NDArray[np.float64]
FEW = 20
MOST_APART = 4.0  # times the median length of another file's rows; memorised features are up to 1.3 times as long
RESCALED = 1.4  # times the spread within classes, and times the distances of their centres, of another file
SAME_FACTOR = 0.25  # of its logarithm: how far the two factors may differ
SURE = 5.0  # standard errors
MOST_RESCALED = 1000  # classes of which scales are compared
EVEN, UNEVEN = 0.002, 0.02  # deviation of the logarithms of lengths in normalised features, and in others
BELOW = -3.0  # standard errors
MARGIN = 20.0  # a chance of exp(-10), after the number of assignments has been allowed for
# A training centre may lie off for other reasons than the draw of its samples, memorisation above all: it counts as
# no surer than the mean of this many samples.
SUREST = 20
MOST_CLASSES = 4000  # beyond, where the best assignment takes minutes, only the centres as a whole are compared
LEAST_ALIKE = 0.5  # of the held-out centres' own size, along them; 1 or more where labels agree
LEAST_REVERSED = 0.25  # of the training centres' distances; 1 where only the labels differ
POOLED_ROWS, METRIC_ROWS, METRIC_RANK = 8192, 1024, 64
OWN_VARIANCE = 10  # samples of a class from which its own variance is used


def doubts(inputs: Mapping[str, Inputs]) -> list[str]:
    """Return why no verdict may be given on these files; what is found in one encoder's holds for all of them.

    A check is made where those before it found nothing: at another scale, labels seem to differ as well.
    """
    for check in (_lengths, _labels, _copies):
        found = [reason for one in inputs.values() for part in [*one.tables][1:] for reason in check(one, part)]
        if found:
            return list(dict.fromkeys(found))
    return []


def doubts_of_outcomes(inputs: Inputs, outcomes: "Outcomes") -> list[str]:
    """Return why no verdict may be given on these outcomes: a classifier that is worse than guessing."""
    if inputs.classifier is not None:
        reasons = _classifier(inputs, outcomes.predicted_train, f"--classifier ({named(inputs.classifier.source)})")
        if reasons:
            return reasons
    attained = outcomes.bound.attained
    if not (below_chance(outcomes.predicted, outcomes.labels) and attained.above_chance):
        return []
    scored = inputs.option("unseen" if inputs.test is None else "test")
    return [
        f"the labels of {scored} and of {inputs.option('train')} seem to mean different classes: the classifier in use "
        f"gets {percent(outcomes.current.mean())} of {scored} right, fewer than guessing would, one fitted to held-out "
        f"samples {percent(attained.accuracy.estimate)}"
    ]


def below_chance(predicted: Any, labels: Any) -> bool:
    """Return whether predictions are right less often than if they had nothing to do with the labels, beyond noise.

    >>> below_chance(np.arange(100) % 2, (np.arange(100) + 1) % 2), below_chance(np.zeros(100, int), np.arange(100) % 2)
    (True, False)
    """
    classes = int(max(predicted.max(), labels.max())) + 1
    shares = [np.bincount(codes, minlength=classes) / len(codes) for codes in (predicted, labels)]
    chance = float(shares[0] @ shares[1])
    deviation = math.sqrt(chance * (1 - chance) / len(labels))
    return bool((predicted == labels).mean() < chance + BELOW * deviation)


def mixed_rows(predicted: Any, labels: Any, classes: int) -> dict[int, int]:
    """Return the classes that a classifier takes for one another as if its rows were in another order: class -> row.

    Of the assignments of classes to rows by which most samples of each class are right, it takes the cycles that get
    half of their samples more right than the given one, beyond the best of so many assignments by chance. Of so many
    classes that their pairs cannot all be held it looks at none; a classifier that does worse than chance shows anyway.

    >>> labels = np.repeat(np.arange(3), 20)
    >>> mixed_rows(np.array([1, 0, 2])[labels], labels, 3), mixed_rows(np.zeros(60, int), labels, 3)
    ({0: 1, 1: 0}, {})
    """
    if are_many_pairs(classes):
        return {}
    hits = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    recall = hits / np.maximum(1, hits.sum(axis=1, keepdims=True))
    found: dict[int, int] = {}
    for cycle in cycles(range(classes), -recall):
        given, rows = list(cycle), list(cycle.values())
        gain = (recall[given, rows] - recall[given, given]).mean()
        after, before = hits[given, rows].sum(), hits[given, given].sum()
        z_squared = (after - before) ** 2 / max(1, after + before)
        if gain >= 0.5 and z_squared > MARGIN + 2 * len(cycle) * math.log(classes):
            found |= cycle
    return found


def _classifier(inputs: Inputs, predicted: Any, name: str) -> list[str]:
    """Say where a given classifier's rows mean other classes than the training labels."""
    labels, names = inputs.train.labels.numpy(), inputs.names
    mixed = mixed_rows(predicted, labels, len(names))
    if mixed:
        rows = first_few([f"its row {row} gets class {names[k]!r} of --train" for k, row in sorted(mixed.items())])
        return [f"the rows of {name} and the labels of {inputs.option('train')} seem to mean different classes: {rows}"]
    if below_chance(predicted, labels):
        right = f"{percent((predicted == labels).mean())} of {inputs.option('train')}"
        return [f"{name} gets {right} right, fewer than guessing would: it seems to belong to other features"]
    return []


def _lengths(inputs: Inputs, part: str) -> list[str]:
    """Say where rows of two files are not of one scale: one was normalised or multiplied, the other not."""
    name, train = inputs.option(part), inputs.option("train")
    sides = [lengths[lengths > -math.inf] for lengths in (inputs.rows[each].lengths for each in ("train", part))]
    if min(map(len, sides)) < FEW:
        return []
    apart = sides[1].median().item() - sides[0].median().item()
    spreads = [side.std().item() for side in sides]
    if abs(apart) > math.log2(MOST_APART):
        how = f"are {2.0 ** max(-1000.0, min(1000.0, apart)):.2g} times as long as those of {train}"
    elif min(spreads) < EVEN and max(spreads) > UNEVEN and inputs.train.width > 2:
        even, other = (name, train) if spreads[1] < spreads[0] else (train, name)
        how = f"and of {train} differ: those of {even} are all of one length, those of {other} are not"
    elif (factor := common_factor(*_scaled_alike(inputs, part))) is not None:
        how = f"lie {factor:.2g} times as far apart as those of {train}, within classes and between them"
    else:
        return []
    return [f"the rows of {name} {how}; one file seems to be scaled or normalised: extract both in the same way"]


def _scaled_alike(inputs: Inputs, part: str) -> list[ClassRows]:
    """Return the rows of training and held-out samples by class, at one scale where nothing overflows."""
    sides = [inputs.rows["train"], inputs.rows[part]]
    power = exponent(*(side.lengths for side in sides))
    kind = torch.promote_types(*(side.features.dtype for side in sides))
    same = [power == 0 and side.features.dtype == kind for side in sides]
    return [
        side if as_is else replace(side, features=map_rows(side.features, lambda block: scaled(block, power).to(kind)))
        for side, as_is in zip(sides, same, strict=True)
    ]


def common_factor(train: ClassRows, unseen: ClassRows) -> float | None:
    """Return by which factor the spread within classes and the distances of their centres both differ, or None.

    Memorised training samples spread less but their centres do not lie nearer; where held-out centres shrink, the
    spread stays. Standard errors are those of a jackknife over classes, of which it takes three.
    """
    smaller = [min(train.count(k), unseen.count(k)) for k in range(train.classes)]
    weights = dict([(k, count) for k, count in enumerate(smaller) if count >= 4][:MOST_RESCALED])
    if len(weights) < 3:
        return None
    first, second = (_sizes(rows, weights) for rows in (train, unseen))
    if not min(first.min(), second.min()) > 0:
        return None
    found = 0.5 * torch.log(second / first)  # [spread and distance, all classes and without each]
    factors, errors = found[:, 0], found[:, 1:].std(dim=1, correction=0) * math.sqrt(len(weights) - 1)
    sure = bool((factors.abs() > (SURE * errors).clamp(min=math.log(RESCALED))).all())
    same = (factors[0] - factors[1]).abs() <= SAME_FACTOR * factors.abs().min()
    return math.exp(factors[0].item()) if sure and same else None


def _sizes(rows: ClassRows, weights: Mapping[int, int]) -> Tensor:
    """Return the mean variance within classes, and the squared distances of their centres without their noise.

    Float64 [2, 1 + C], of all classes and without each.
    """
    parts = (rows.features[rows.index(k)].double() for k in weights)
    means, variances = zip(*((part.mean(dim=0), part.var(dim=0).sum()) for part in parts), strict=True)
    variance, centers = torch.stack(variances), torch.stack(means)
    centers -= centers.mean(dim=0)
    kept = 1 - torch.cat([torch.zeros(1, len(means)), torch.eye(len(means))]).to(centers)
    kept *= variance.new_tensor(list(weights.values()))
    kept /= kept.sum(dim=1, keepdim=True)
    noise = kept * (1 - kept) @ (variance / variance.new_tensor([rows.count(k) for k in weights]))
    apart = kept @ centers.square().sum(dim=1) - (kept @ centers).square().sum(dim=1)
    return torch.stack([kept @ variance, apart - noise])


def _copies(inputs: Inputs, part: str) -> list[str]:
    """Say where most held-out samples are training samples, unless equal rows are usual within the training samples."""
    first = inputs.rows["train"]
    share = unseen_copies(first, inputs.rows[part]).double().mean().item()
    if share <= 0.5:
        return []
    own = (gather(first, first, k)[: first.count(k)] for k in range(first.classes))
    if sum(find_copies(rows, len(rows))[1] for rows in own) > len(inputs.train) / 2:
        return []
    return [
        f"{percent(share, 0)} of the rows of {inputs.option(part)} are also in {inputs.option('train')}: too few "
        "held-out samples are left to judge by; give samples that had no part in training"
    ]


def _labels(inputs: Inputs, part: str) -> list[str]:
    """Say where the labels of held-out samples mean other classes than those of training samples."""
    moved = moved_labels(*_scaled_alike(inputs, part))
    if moved is None:
        return []
    names = inputs.names
    pairs = [f"class {names[a]!r} of --{part} looks like class {names[b]!r} of --train" for a, b in moved.items()]
    which = f": {first_few(pairs)}" if pairs else ", or their features do not come from one encoder"
    both = f"{inputs.option(part)} and of {inputs.option('train')}"
    return [f"the labels of {both} seem to mean different classes{which}"]


def moved_labels(train: ClassRows, unseen: ClassRows) -> dict[int, int] | None:
    """Return the training class that each held-out class seems to be, where it is clear; None where labels agree.

    They disagree where, in `SURE` standard errors, held-out centres are not even half found in the training centres;
    or where the assignment of held-out to training centres with the smallest sum of squared distances has cycles of
    classes that fit far better than the given labels. A cycle of L classes counts with z^2 - 2 L log C, z being its
    gain in standard errors of both sides: of C^L assignments of noise one in exp(x / 2) gains x or more. It must
    also turn round the order of its centres, so that no small but certain effect counts. That all classes from some
    number on are one too high or too low, because a class is missing, is one of 2 C hypotheses and needs less. The rows
    are at one scale, of lengths near 1.
    """
    shared = [k for k in range(train.classes) if train.count(k) and unseen.count(k)]
    if len(shared) < 2 or all(unseen.count(k) < 2 for k in shared):
        return None
    centers = _Centers(train, unseen, shared)
    alike, classes = centers.alike(), train.classes
    if classes > MOST_CLASSES:
        return None if alike else {}
    cost = centers.cost()
    moving = cycles(shared, cost)
    scores = [centers.score(cost, cycle, len(cycle) * math.log(classes) if alike else 0.0) for cycle in moving]
    found = {k: v for cycle, score in zip(moving, scores, strict=True) if score > 0 for k, v in cycle.items()}
    if alike and sum(scores) <= MARGIN:
        found = centers.shift(cost)
        if centers.score(cost, found, math.log(2 * classes)) <= MARGIN:
            return None
    return dict(sorted(found.items()))


class _Centers:
    """Centres of training samples `mu` [C, d] and of held-out ones `nu` about their means over the classes of both.

    They are in a metric that halves squared lengths where a class's own variance is the mean one: damped whitening
    along the directions in which some training samples deviate most from their classes' means. Held-out samples have no
    part in it, so that variances measured on them along any direction stay unbiased.
    """

    def __init__(self, train: ClassRows, unseen: ClassRows, shared: list[int]) -> None:
        self._train, self._unseen, self._shared = train, unseen, shared
        # Samples minus their class's mean [n, d], not in that metric, and their degrees of freedom.
        self._pooled = [_deviations(side, shared, POOLED_ROWS) for side in (unseen, train)]
        some = _deviations(train, shared, METRIC_ROWS)[0][:METRIC_ROWS]
        squares, vectors = torch.linalg.eigh((some @ some.T).double())
        mean, squares, vectors = squares.sum() / some.shape[1], squares[-METRIC_RANK:], vectors[:, -METRIC_RANK:]
        kept = squares > 1e-6 * squares[-1:]
        self._basis: Tensor = (vectors[:, kept] / squares[kept].sqrt()).T @ some.double()  # [r, d], orthonormal
        self._less: Tensor = 1 - (mean / (squares[kept] + mean)).sqrt()
        means = class_centers(train, unseen)
        self._mu, self._nu = (self._metric(side - side[shared].mean(dim=0)) for side in (means.train, means.unseen))

    def _metric(self, vectors: Tensor) -> Tensor:
        basis = self._basis.to(vectors)
        along: Tensor = (vectors @ basis.T) * self._less.to(vectors)
        return vectors - along @ basis

    def _noise(self) -> float:
        """Return the squared distance of a held-out sample from its class's centre."""
        deviations, freedom = self._pooled[0]
        return self._metric(deviations).double().square().sum().item() / freedom

    def _variances(self, along: Tensor, classes: Sequence[int]) -> FloatArray:
        """Return the variance of samples of one class each along a vector each [L, d], times its squared length.

        Of all classes together, held-out or training samples, or of the class alone where it has enough samples:
        whichever is most.
        """
        along = self._metric(along).to(self._pooled[0][0])
        pooled = [_squares_along(part, along) / max(1, free) for part, free in self._pooled]
        found: FloatArray = torch.stack(pooled).amax(dim=0).cpu().numpy()
        for i, k in enumerate(classes):
            if self._unseen.count(k) >= OWN_VARIANCE:
                own = self._unseen.features[self._unseen.index(k)].to(along) @ along[i]
                found[i] = max(found[i], own.double().var().item())
        return found

    def _error(self, on_mu: Mapping[int, Tensor], on_nu: Mapping[int, Tensor]) -> float:
        """Return the standard error of a number by how it changes with centres (its gradients [d] by class).

        Centres are taken about their mean, so that every class has a part in every other's.
        """
        total = 0.0
        for gradients, side, more in ((on_mu, self._train, 1 / SUREST), (on_nu, self._unseen, 0.0)):
            common = torch.stack(list(gradients.values())).sum(dim=0) / len(self._shared)
            # Of a closed cycle the gradients have no sum, and other classes no part in it.
            none = torch.linalg.vector_norm(common) <= 1e-6 * max(map(torch.linalg.vector_norm, gradients.values()))
            about = dict.fromkeys(self._shared, -common)
            parts = {k: gradients.get(k, 0) + about.get(k, 0 * common) for k in [*gradients, *(() if none else about)]}
            counts = np.array([1 / side.count(k) + more for k in parts])
            total += self._variances(torch.stack(list(parts.values())), list(parts)) @ counts
        return math.sqrt(total)

    def alike(self) -> bool:
        """Return False where the held-out centres are not found in the training centres, far beyond chance.

        Tested is LEAST_ALIKE |nu|^2 - nu . mu, summed over classes with weights that grow with their numbers of
        samples.
        """
        n, m = (np.array([float(side.count(k)) for k in self._shared]) for side in (self._train, self._unseen))
        weight = 1 / (1 / n + 1 / m + 1 / SUREST)
        mu, nu = self._mu[self._shared], self._nu[self._shared]
        own = nu.square().sum(dim=1).cpu().numpy() - self._noise() / m
        lacking = weight @ (LEAST_ALIKE * own - (nu * mu).sum(dim=1).cpu().numpy())
        weights = torch.from_numpy(weight).to(nu)[:, None]
        on_nu, on_mu = weights * (2 * LEAST_ALIKE * nu - mu), -weights * nu
        error = self._error(*(dict(zip(self._shared, on, strict=True)) for on in (on_mu, on_nu)))
        return not error > 0 or bool(lacking <= SURE * error)

    def cost(self) -> FloatArray:
        """Return half the squared distances of held-out from training centres [C', C], less what a row has in common.

        Squared lengths of training centres are taken without the part that the number of samples alone gives them.
        """
        deviations, freedom = self._pooled[1]
        noise = self._metric(deviations).double().square().sum().item() / max(1, freedom) or self._noise()
        counts = np.array([self._train.count(k) for k in range(self._train.classes)])
        own = np.ones(len(counts))
        own[self._shared] = 1 - 2 / len(self._shared)  # the rest is in the mean
        lengths = self._mu.square().sum(dim=1).cpu().numpy() - own * noise / np.maximum(1, counts)
        cost: FloatArray = 0.5 * lengths - (self._nu[self._shared] @ self._mu.T).cpu().numpy()
        cost[:, counts == 0] = np.nanmax(cost) + np.nanmax(np.abs(cost))
        return cost

    def shift(self, cost: FloatArray) -> dict[int, int]:
        """Return the best of the assignments by which all classes from some number on are one too high or low."""
        best, least = {}, 0.0
        for step in (1, -1):
            moved, gain = {}, 0.0
            for row, k in reversed(list(enumerate(self._shared))):
                if 0 <= k + step < self._train.classes and self._train.count(k + step):
                    moved[k] = k + step
                    gain += cost[row, k] - cost[row, k + step]
                    if gain > least and len(moved) > 1:
                        best, least = dict(moved), gain
        return best

    def score(self, cost: FloatArray, assigned: Mapping[int, int], price: float) -> float:
        """Return z^2 - 2 price of the gain of moving some classes, 0 for a gain of no size.

        For a cycle, gains in squared distance and in inner products are the same. For a chain the smaller counts: a
        training centre far out, as memorisation puts it, loses in distance to any other, one near 0 in inner products.
        `price` is the logarithm of the number of assignments from which this one was chosen.
        """
        if not assigned:
            return 0.0
        moving, mu, nu = list(assigned), self._mu, self._nu
        steps = torch.stack([mu[assigned[k]] - mu[k] for k in moving])
        by_product = {j: torch.zeros_like(mu[0]) for k in moving for j in (k, assigned[k])}
        for k in moving:
            by_product[assigned[k]] += nu[k]
            by_product[k] -= nu[k]
        entered = set(assigned.values())
        by_distance = {j: pull - mu[j] * ((j in entered) - (j in assigned)) for j, pull in by_product.items()}
        closer = sum(
            float(cost[row, k] - cost[row, assigned[k]]) for row, k in enumerate(self._shared) if k in assigned
        )
        product = (nu[moving] * steps).sum().item()
        least = max(0.0, LEAST_REVERSED / 2 * steps.square().sum().item())
        scores = []
        for gain, on_mu in ((closer, by_distance), (product, by_product)):
            error = self._error(on_mu, dict(zip(moving, steps, strict=True))) if gain > least else math.inf
            scores.append(max(0.0, (gain / error) ** 2 - 2 * price) if error > 0 else 2 * MARGIN)
        return min(scores)


def _squares_along(rows: Tensor, along: Tensor) -> Tensor:
    """Return the sum over rows [n, d] of their squared products with each of some vectors [L, d], float64 [L]."""
    return torch.stack([(b @ along.T).double().square().sum(dim=0) for b in row_blocks(rows, len(along))]).sum(dim=0)


def _deviations(samples: ClassRows, classes: list[int], most: int) -> tuple[Tensor, int]:
    """Return about `most` samples minus their class's mean, evenly from classes, and their degrees of freedom."""
    each = max(2, most // len(classes))
    parts = [samples.features[samples.index(k)[:each]].to(samples.dtype) for k in classes]
    return torch.cat([part - part.mean(dim=0) for part in parts]), sum(len(part) - 1 for part in parts)


def cycles(given: Sequence[int], cost: FloatArray) -> list[dict[int, int]]:
    """Return what moves together in the assignment of the given classes to others that costs least.

    These are cycles, and chains that end at a class that is not given; `cost` is [given, all classes].

    >>> cycles([0, 1, 2, 3], -np.eye(5)[[1, 0, 2, 4]])
    [{3: 4}, {0: 1, 1: 0}]
    """
    from scipy.optimize import linear_sum_assignment  # here because it takes a tenth of a second to import

    left = dict(zip(given, linear_sum_assignment(cost)[1].tolist(), strict=True))
    found = []
    for start in [*sorted(left.keys() - left.values()), *left]:  # chains from their beginning, then cycles
        chain, k = {}, start
        while k in left:
            chain[k] = left.pop(k)
            k = chain[k]
        if chain and chain[start] != start:
            found.append(chain)
    return found
