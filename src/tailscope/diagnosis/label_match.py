"""Whether the labels of two files mean the same classes: are held-out centres where the training centres are?

Two files that number the same classes differently (a class is missing and later ones moved up, names were sorted
another way) look like bad features, and every verdict on them is wrong. While labels agree, held-out centres nu and
training centres mu point the same way, sum nu . mu >= sum nu . nu, and (nu_a - nu_b) . (mu_a - mu_b) > 0 for any two
classes. Merely bad features bring all of these near 0. Labels that mean other classes turn the order of centres round.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.measures.angles import class_centers
from tailscope.measures.rows import ClassRows

# A training centre may lie off for other reasons than the draw of its samples, memorisation above all: it counts as
# no surer than the mean of this many samples.
SUREST = 20
LEAST_Z = 5.0
MOST_CLASSES = 4000  # beyond, where the best assignment takes minutes, only the centres as a whole are compared
MARGIN = 20.0  # a chance of exp(-10), after the number of assignments has been allowed for
LEAST_ALIKE = 0.5  # of the held-out centres' own size, along them; 1 or more where labels agree
LEAST_REVERSED = 0.25  # of the training centres' distances; 1 where only the labels differ
POOLED_ROWS = 8192
METRIC_ROWS, METRIC_RANK = 1024, 64
FEW = 32  # samples of a class from which the noise of its centre is known well enough
OWN_VARIANCE = 10  # samples of a class from which its own variance is used

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """What is known of two files' labels.

    Attributes:
        agree: False where they mean different classes beyond doubt.
        pairs: (held-out class, training class that it seems to be), where that is clear.
    """

    agree: bool = True
    pairs: tuple[tuple[int, int], ...] = ()


class _Metric:
    """A symmetric map of vectors [n, d] that halves squared lengths where a class's own variance is the mean one.

    It is damped whitening along the directions in which some training samples deviate most from their classes' means.
    Held-out samples have no part in it, so that variances measured on them along any direction stay unbiased.
    """

    def __init__(self, deviations: Tensor) -> None:
        squares, vectors = torch.linalg.eigh((deviations @ deviations.T).double())
        kept = (squares > 1e-6 * squares[-1:]) & (
            torch.arange(len(squares), device=squares.device) >= len(squares) - METRIC_RANK
        )
        mean = squares.sum() / deviations.shape[1]
        self._basis: Tensor = (vectors[:, kept] / squares[kept].sqrt()).T @ deviations.double()  # [r, d], orthonormal
        self._less: Tensor = 1 - (mean / (squares[kept] + mean)).sqrt()

    def __call__(self, vectors: Tensor) -> Tensor:
        basis = self._basis.to(vectors.dtype)
        along: Tensor = (vectors @ basis.T) * self._less.to(vectors.dtype)
        return vectors - along @ basis


@dataclass(frozen=True)
class _Sets:
    """Centres of training samples [C, d] and held-out ones [C, d] about their means over the `rows` that have both.

    Both are in a metric in which directions of much variance within classes count less. `deviations` [n, d] are
    held-out samples minus their class's centre, not in that metric, with `freedom` degrees of freedom; `others` the
    same of training samples.
    """

    train: ClassRows
    unseen: ClassRows
    mu: Tensor
    nu: Tensor
    metric: "_Metric"
    rows: list[int]
    deviations: Tensor
    freedom: int
    others: tuple[Tensor, int]

    def variances(self, along: Tensor, classes: list[int]) -> FloatArray:
        """Return the variance of samples of one class each along a vector each [L, d], times its squared length.

        Of all classes together, held-out or training samples, or of the class alone where it has enough samples:
        whichever is most.
        """
        along = self.metric(along).to(self.deviations)
        pooled = [
            (part @ along.T).double().square().sum(dim=0) / max(1, freedom)
            for part, freedom in ((self.deviations, self.freedom), self.others)
        ]
        found: FloatArray = torch.stack(pooled).amax(dim=0).cpu().numpy()
        for i, k in enumerate(classes):
            if self.unseen.count(k) >= OWN_VARIANCE:
                own = self.unseen.features[self.unseen.index(k)].to(self.deviations) @ along[i]
                found[i] = max(found[i], own.double().var().item())
        return found

    def noise(self) -> float:
        """Return the squared distance of a sample from its class's centre."""
        return self.metric(self.deviations).double().square().sum().item() / self.freedom

    def error(self, on_mu: dict[int, Tensor], on_nu: dict[int, Tensor]) -> float:
        """Return the standard error of a number by how it changes with centres (its gradients [d] by class).

        Centres are taken about their mean, so that every class has a part in every other's.
        """
        total = 0.0
        for gradients, side, more in ((on_mu, self.train, 1 / SUREST), (on_nu, self.unseen, 0.0)):
            shared = torch.stack(list(gradients.values())).sum(dim=0) / len(self.rows)
            nothing = torch.zeros_like(shared)
            # Of a closed cycle the gradients have no sum, and other classes no part in it.
            none = torch.linalg.vector_norm(shared) <= 1e-6 * max(map(torch.linalg.vector_norm, gradients.values()))
            classes = list(dict.fromkeys([*gradients, *(() if none else self.rows)]))
            inside = set(self.rows)
            along = torch.stack([gradients.get(k, nothing) - (shared if k in inside else nothing) for k in classes])
            total += self.variances(along, classes) @ np.array([1 / side.count(k) + more for k in classes])
        return math.sqrt(total)


def match_labels(train: ClassRows, unseen: ClassRows) -> Match:
    """Compare the labels of training and held-out samples by the centres of their classes.

    They disagree where, in `LEAST_Z` standard errors, held-out centres are not even half found in the training centres;
    or where the assignment of held-out to training centres with the smallest sum of squared distances has cycles of
    classes that fit far better than the given labels. A cycle of L classes counts with z^2 - 2 L log C, z being its
    gain in standard errors of both sides: of C^L assignments of noise one in exp(x / 2) gains x or more. It must
    also turn round the order of its centres, so that no small but certain effect counts. That all classes from some
    number on are one too high or too low, because a class is missing, is one of 2 C hypotheses and needs less.

    Args:
        train: rows whose length is near 1, at one scale with `unseen`.
        unseen: rows of two or more of the same classes.
    """
    from scipy.optimize import linear_sum_assignment  # here because it takes a tenth of a second to import

    sets = _sets(train, unseen)
    if sets is None:
        return Match()
    alike, classes = _alike(sets), len(sets.mu)
    if classes > MOST_CLASSES:
        return Match(alike)
    cost = _cost(sets)
    found, total = [], 0.0
    assigned = dict(zip(sets.rows, linear_sum_assignment(cost)[1].tolist(), strict=True))
    for cycle in cycles(assigned):
        score = _score(sets, cost, {k: assigned[k] for k in cycle}, len(cycle) * math.log(classes) if alike else 0.0)
        total += score
        found += [(k, assigned[k]) for k in cycle if score > 0]
    if alike and total <= MARGIN:
        shift = _shift(sets, cost)
        if _score(sets, cost, shift, math.log(2 * classes)) <= MARGIN:
            return Match()
        found = list(shift.items())
    return Match(False, tuple(sorted(found)))


def _sets(train: ClassRows, unseen: ClassRows) -> _Sets | None:
    """Return the centres and what varies about them, or None where too little is known."""
    centers = class_centers(train, unseen)
    rows = [k for k in range(len(centers.train)) if train.count(k) and unseen.count(k)]
    if len(rows) < 2:
        return None
    deviations, freedom = _deviations(unseen, rows, POOLED_ROWS)
    if freedom < 1:
        return None
    others = _deviations(train, rows, POOLED_ROWS)
    metric = _Metric(_deviations(train, rows, METRIC_ROWS)[0][:METRIC_ROWS])
    mu, nu = (metric(side - side[rows].mean(dim=0)) for side in (centers.train, centers.unseen))
    return _Sets(train, unseen, mu, nu, metric, rows, deviations, freedom, others)


def _deviations(samples: ClassRows, classes: list[int], most: int) -> tuple[Tensor, int]:
    """Return about `most` samples minus their class's mean, evenly from classes, and their degrees of freedom."""
    each = max(2, most // len(classes))
    parts = [samples.features[samples.index(k)[:each]].to(samples.dtype) for k in classes]
    return torch.cat([part - part.mean(dim=0) for part in parts]), sum(len(part) - 1 for part in parts)


def _alike(sets: _Sets) -> bool:
    """Return False where the held-out centres are not found in the training centres, far beyond chance.

    Tested is LEAST_ALIKE |nu|^2 - nu . mu, summed over classes with weights that grow with their numbers of samples.
    """
    n, m = (np.array([float(side.count(k)) for k in sets.rows]) for side in (sets.train, sets.unseen))
    weight = 1 / (1 / n + 1 / m + 1 / SUREST)
    mu, nu = sets.mu[sets.rows], sets.nu[sets.rows]
    own = nu.square().sum(dim=1).cpu().numpy() - sets.noise() / m
    lacking = weight @ (LEAST_ALIKE * own - (nu * mu).sum(dim=1).cpu().numpy())
    weights = torch.from_numpy(weight).to(nu)[:, None]
    on_nu, on_mu = weights * (2 * LEAST_ALIKE * nu - mu), -weights * nu
    error = sets.error(dict(zip(sets.rows, on_mu, strict=True)), dict(zip(sets.rows, on_nu, strict=True)))
    return not error > 0 or bool(lacking <= LEAST_Z * error)


def _cost(sets: _Sets) -> FloatArray:
    """Return half the squared distances of held-out from training centres [C', C], less what a row has in common.

    Squared lengths of training centres are taken without the part that the number of samples alone gives them.
    """
    absent = [k for k in range(len(sets.mu)) if not sets.train.count(k)]
    lengths = sets.mu.square().sum(dim=1).cpu().numpy()
    pooled, inside = sets.noise(), set(sets.rows)
    for k in range(len(sets.mu)):
        n, own = sets.train.count(k), 1 - 2 / len(inside) if k in inside else 1.0  # the rest is in the mean
        if n > 1:
            deviations, freedom = _deviations(sets.train, [k], FEW)
            lengths[k] -= own * sets.metric(deviations).double().square().sum().item() / freedom / n
        elif k in inside:
            lengths[k] -= own * pooled / max(1, n)
    cost: FloatArray = 0.5 * lengths - (sets.nu[sets.rows] @ sets.mu.T).cpu().numpy()
    cost[:, absent] = np.nanmax(cost) + np.nanmax(np.abs(cost))
    return cost


def _shift(sets: _Sets, cost: FloatArray) -> dict[int, int]:
    """Return the best of the assignments by which all held-out classes from some number on are one too high or low."""
    best, least = {}, 0.0
    for step in (1, -1):
        moved, gain = {}, 0.0
        for row in range(len(sets.rows) - 1, -1, -1):
            k = sets.rows[row]
            if 0 <= k + step < len(sets.mu) and sets.train.count(k + step):
                moved[k] = k + step
                gain += cost[row, k] - cost[row, k + step]
                if gain > least and len(moved) > 1:
                    best, least = dict(moved), gain
    return best


def cycles(assigned: dict[int, int]) -> list[list[int]]:
    """Return the classes that move together: cycles, and chains that end at a class without held-out samples.

    >>> cycles({0: 1, 1: 0, 2: 2, 3: 4})
    [[3], [0, 1]]
    """
    taken = set(assigned.values())
    starts = [*(k for k in assigned if k not in taken), *assigned]  # chains from their beginning, then cycles
    found: list[list[int]] = []
    seen: set[int] = set()
    for start in starts:
        chain, k = [], start
        while k in assigned and k not in seen:
            seen.add(k)
            chain.append(k)
            k = assigned[k]
        if chain and assigned[start] != start:
            found.append(chain)
    return found


def _score(sets: _Sets, cost: FloatArray, assigned: dict[int, int], price: float) -> float:
    """Return z^2 - 2 price of the gain of moving some classes, 0 for a gain of no size.

    For a cycle, gains in squared distance and in inner products are the same. For a chain the smaller counts: a
    training centre far out, as memorisation puts it, loses in distance to any other, one near 0 in inner products.

    Args:
        sets: the centres.
        cost: as `_cost`.
        assigned: the training class of each held-out class that moves.
        price: the logarithm of the number of assignments from which this one was chosen.
    """
    moving = list(assigned)
    if not moving:
        return 0.0
    steps = torch.stack([sets.mu[assigned[k]] - sets.mu[k] for k in moving])
    on_nu = dict(zip(moving, steps, strict=True))
    by_product = {j: torch.zeros_like(sets.mu[0]) for k in moving for j in (k, assigned[k])}
    for k in moving:
        by_product[assigned[k]] += sets.nu[k]
        by_product[k] -= sets.nu[k]
    by_distance = {
        j: pull - sets.mu[j] * ((j in assigned.values()) - (j in assigned)) for j, pull in by_product.items()
    }
    closer = sum(float(cost[row, k] - cost[row, assigned[k]]) for row, k in enumerate(sets.rows) if k in assigned)
    product = (sets.nu[moving] * steps).sum().item()
    least = LEAST_REVERSED / 2 * steps.square().sum().item()
    scores = []
    for gain, on_mu in ((closer, by_distance), (product, by_product)):
        error = sets.error(on_mu, on_nu) if gain > max(0.0, least) else math.inf
        scores.append(max(0.0, (gain / error) ** 2 - 2 * price) if error > 0 else 2 * MARGIN)
    return min(scores)
