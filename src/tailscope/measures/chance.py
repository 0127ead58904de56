"""What chance alone gives: permutation tests of every class, continued where many classes demand it, then BH.

Under exchangeability the n training samples are a uniform n-subset of the class's n + m samples, so that every
statistic may be compared with its values over random subsets; p = (1 + #{as large or larger}) / (B + 1) is exact for
any dimension and distribution (Phipson & Smyth 2010). Samples that belong together (bursts of one scene, frames of one
video) change sides together. All subsets of a chunk are evaluated at once: two matrix products and elementwise maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from tailscope.effort import MOST_DRAWN
from tailscope.errors import UserError
from tailscope.measures.angles import resolution_deg
from tailscope.measures.fields import Entry
from tailscope.measures.rows import ClassRows, all_subsets, gather, map_parallel, subsets
from tailscope.seeds import numpy_stream

STATISTICS = ("shift", "gap", "spread", "escape", "log_variance_ratio")
SHIFT, GAP = STATISTICS.index("shift"), STATISTICS.index("gap")
TESTS = (("spread_gap", GAP, False), ("center_shift", SHIFT, True))
EXCEEDANCES = 20
MOST_PERMUTATIONS = 10**6
"""What a user may ask for at most."""
VERDICT_SAMPLES = 5  # training samples below which a class gets no verdict of its own
MATERIAL_GAP_DEG = 2.0
MATERIAL_RANK = 0.6


@dataclass(frozen=True)
class Pool:
    """All n + m samples of a class in coordinates along and across their mean direction.

    Subtracting the common mean before the products keeps small angles accurate in float32: squared chords come out
    as sums of small squares instead of as 1 minus a cosine.
    """

    along: Tensor  # [N] part of each sample along the mean's direction
    radius: Tensor  # [N] length of each sample
    across: Tensor  # [N, d] the rest
    unit_across: Tensor  # [N, d] the rest over the length
    height: Tensor  # [N] squared length of unit_across
    square: Tensor  # [N] squared distance from the mean
    gram: Tensor | None  # [N, N] across @ unit_across.T, where that saves work
    mean_length: float


def make_pool(rows: Tensor) -> Pool:
    """Return the pool of a class's rows [N, d], training samples first."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    mean_length = torch.linalg.vector_norm(mean).item()
    direction = (mean / mean_length if mean_length > 0 else mean).to(rows.dtype)
    along = rows @ direction
    across = torch.addmm(rows, along[:, None], direction[None, :], alpha=-1)
    rest = torch.linalg.vector_norm(across, dim=1)
    radius = torch.hypot(along, rest)
    square = rest.square() + (along - mean_length).square()
    unit_across = across / radius[:, None]
    gram = across @ unit_across.T if len(rows) < 2 * rows.shape[1] else None
    height = (rest / radius).square()
    return Pool(along, radius, across, unit_across, height, square, gram, mean_length)


def statistics(pool: Pool, member: Tensor) -> Tensor:
    """Return the statistics of subsets of a class: float64 [len(STATISTICS), L]; NaN where undefined.

    `member` [L, N] is 1 in the pool's dtype where a sample is in a subset, else 0. Rows, with M the mean of a subset:
    angle between M and the mean of all; mean angle of the other samples to M minus mean leave-one-out angle of the
    members; mean angle of the members to M; share of the others further from M than every member; log of the ratio of
    the members' variance to the others'. Angles in degrees.
    """
    size = member.sum(dim=1, keepdim=True)
    rest = len(pool.along) - size
    dots = member @ pool.gram if pool.gram is not None else (member @ pool.across) @ pool.unit_across.T
    along = (member @ pool.along)[:, None]
    across_squared = ((dots * member) @ pool.radius).clamp(min=0)[:, None]
    length = torch.sqrt(along.square() + across_squared)  # of the subset's sum
    shift = torch.atan2(across_squared.sqrt(), along)
    chord = _squared_chord(pool, dots, along / length, across_squared / length.square(), length)
    angle = 2 * torch.asin(chord.sqrt() / 2)
    # Taking sample j out of the sum moves the sum along j only.
    alone = torch.atan2(length * torch.sqrt(chord * (1 - chord / 4)), length * (1 - chord / 2) - pool.radius)
    inside = (angle * member).sum(dim=1, keepdim=True)
    spread = inside / size
    outside = (angle.sum(dim=1, keepdim=True) - inside) / rest
    width = (angle * member).amax(dim=1, keepdim=True)
    beyond = angle > width + math.radians(resolution_deg(angle.dtype))
    escape = beyond.sum(dim=1, keepdim=True) / rest
    gap = outside - (alone * member).sum(dim=1, keepdim=True) / size
    gap = torch.where(size > 1, gap, math.nan)
    ratio = _log_variance_ratio(pool, member, along, across_squared)
    parts = [torch.rad2deg(shift), torch.rad2deg(gap), torch.rad2deg(spread), escape, ratio]
    result = torch.stack([part.squeeze(1).double() for part in parts])
    return torch.where(rest.squeeze(1) > 0, result, math.nan)


def _squared_chord(pool: Pool, dots: Tensor, cosine: Tensor, height: Tensor, length: Tensor) -> Tensor:
    """Return |x/|x| - M/|M||^2 for every subset's M and every sample x, [L, N]."""
    chord = dots * (-2 / length)
    chord += pool.height
    chord += height
    difference = pool.along / pool.radius - cosine
    return chord.addcmul_(difference, difference).clamp_(0, 4)


def _log_variance_ratio(pool: Pool, member: Tensor, along: Tensor, across_squared: Tensor) -> Tensor:
    size = member.sum(dim=1, keepdim=True).double()
    rest = len(pool.along) - size
    within = (member @ pool.square)[:, None].double()
    offset = (along.double() / size - pool.mean_length).square() + across_squared.double() / size.square()
    inside = (within - size * offset) / (size - 1)
    outside = (pool.square.sum(dtype=torch.float64) - within - size.square() / rest * offset) / (rest - 1)
    valid = (size > 1) & (rest > 1) & (inside > 0) & (outside > 0)
    return torch.where(valid, inside / outside, math.nan).log()


@dataclass(frozen=True)
class Units:
    """What changes sides together: the unit of each of a class's samples, training units numbered first."""

    index: np.ndarray
    seen: int
    count: int

    def members(self, taken: np.ndarray, like: Tensor) -> Tensor:
        """Turn chosen units, bool [L, count], into the 0/1 matrix of chosen samples [L, N]."""
        samples = taken if self.count == len(self.index) else taken[:, self.index]
        return torch.from_numpy(samples).to(device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class Draws:
    """Statistics of one class: float64 [len(STATISTICS), 1 + B], the observed split first.

    With `complete`, the columns are all possible splits, each once.
    """

    values: Tensor
    complete: bool
    tolerance: float

    def null(self, statistic: str) -> float | None:
        """Return the statistic's mean over permutations, None where undefined."""
        row = self.values[STATISTICS.index(statistic)]
        mean = (row if self.complete else row[1:]).nanmean().item()
        return mean if math.isfinite(mean) else None

    def count(self, statistic: int) -> "Count | None":
        """Compare the observed split with the permutations; None where the statistic is undefined."""
        observed, drawn = self.values[statistic, 0].item(), self.values[statistic, 1:]
        if math.isnan(observed):
            return None
        high, low = _exceeds(drawn, observed, self.tolerance)
        return Count(observed, int(high.sum()), int(low.sum()), len(drawn), self.complete, self.tolerance)


@dataclass(frozen=True)
class Count:
    """How many of `draws` permutations of one class are as large (`high`) and as small (`low`) as the observed."""

    observed: float
    high: int
    low: int
    draws: int
    complete: bool
    tolerance: float

    def p(self, two_sided: bool) -> float:
        """Return (1 + #) / (B + 1), of the upper tail or twice the smaller tail.

        >>> [Count(1.0, 4, 999, 999, False, 0.0).p(two_sided) for two_sided in (False, True)]
        [0.005, 0.01]
        """
        upper, lower = (1 + self.high) / (self.draws + 1), (1 + self.low) / (self.draws + 1)
        return min(1.0, 2 * min(upper, lower)) if two_sided else upper

    def is_open(self, two_sided: bool) -> bool:
        """Say whether more permutations could make p much smaller."""
        fewest = min(self.high, self.low) if two_sided else self.high
        return not self.complete and fewest < EXCEEDANCES


def draw(pools: Sequence[Pool], units: Units, draws: int, rng: np.random.Generator, tolerance: float) -> list[Draws]:
    """Evaluate the observed split and `draws` random ones on each pool, the same splits for all pools.

    All splits are listed instead where there are no more than `draws`.
    """
    observed = (np.arange(units.count) < units.seen)[None]
    complete = units.count <= draws + 1 and math.comb(units.count, units.seen) <= draws + 1
    drawn = [all_subsets(units.seen, units.count)] if complete else subsets(units.seen, units.count, draws, rng)
    found: list[list[Tensor]] = [[] for _ in pools]
    for taken in drawn if complete else chain([observed], drawn):
        member = units.members(taken, pools[0].along)
        for values, pool in zip(found, pools, strict=True):
            values.append(statistics(pool, member).cpu())
    return [Draws(torch.cat(values, dim=1), complete, tolerance) for values in found]


def continue_draws(
    pool: Pool, units: Units, count: Count, statistic: int, limit: int, two_sided: bool, rng: np.random.Generator
) -> tuple[float, int]:
    """Draw on until 20 permutations exceed the observed split, or up to `limit` in all (Besag & Clifford 1991).

    Return the sequential p-value (20 over the number of draws at which the twentieth occurred; where it never does, one
    more than the count over one more than `limit`), doubled over two sides, and the number of draws.
    """
    drawn, counts = count.draws, [count.high, count.low]
    p = [(1 + number) / (drawn + 1) if number >= EXCEEDANCES else None for number in counts]
    sides = (0, 1) if two_sided else (0,)
    for taken in subsets(units.seen, units.count, limit - drawn, rng):
        values = statistics(pool, units.members(taken, pool.along))[statistic].cpu()
        for side in sides:
            if p[side] is None:
                hits = _exceeds(values, count.observed, count.tolerance)[side].cumsum(0) + counts[side]
                counts[side] = int(hits[-1])
                if counts[side] >= EXCEEDANCES:
                    p[side] = EXCEEDANCES / (drawn + int(torch.searchsorted(hits, EXCEEDANCES)) + 1)
        drawn += len(values)
        if all(p[side] is not None for side in sides):
            break
    smallest = min(p[side] or (1 + counts[side]) / (drawn + 1) for side in sides)
    return (min(1.0, 2 * smallest) if two_sided else smallest), drawn


def false_discovery(p: Sequence[float | None]) -> list[float | None]:
    """Return Benjamini-Hochberg q-values; undefined p-values leave the family.

    >>> false_discovery([0.01, None, 0.04])
    [0.02, None, 0.04]
    """
    known = [value for value in p if value is not None]
    if not known:
        return list(p)
    from scipy import stats  # here because it takes half a second to import, and without permutations has no use

    q = iter(stats.false_discovery_control(known).tolist())
    return [None if value is None else float(next(q)) for value in p]


def standardize(draws: Draws, statistic: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Return a class's statistic at mean 0 and deviation 1 over the observed split and `number` others, [1 + number].

    NaN where any is undefined. A class with too few splits for so many different ones has splits drawn among them.
    """
    values: np.ndarray = draws.values[statistic].numpy()
    if not np.isfinite(values).all():
        return np.full(1 + number, np.nan)
    if draws.complete:
        values = np.concatenate([values[:1], rng.choice(values, number)])
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > draws.tolerance else np.zeros_like(values)


def group_p(standardized: np.ndarray, two_sided: bool) -> float | None:
    """Return the permutation p-value of the sum of classes' statistics [classes, 1 + B], the same draw in every class.

    Classes where the statistic is NaN are left out; None where no class is left or there are no permutations.
    """
    defined = standardized[np.isfinite(standardized[:, 0])]
    if not len(defined) or defined.shape[1] < 2:
        return None
    total = torch.from_numpy(defined.sum(axis=0))
    high, low = _exceeds(total[1:], total[0].item(), 1e-9)
    return Count(0.0, int(high.sum()), int(low.sum()), len(total) - 1, False, 0.0).p(two_sided)


def _exceeds(values: Tensor, observed: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return where values are at least, and at most, the observed one; undefined values count as both."""
    return ~(values < observed - tolerance), ~(values > observed + tolerance)


@dataclass(frozen=True)
class Chance:
    """What permutations say about one class: values by chance, and per test of `TESTS` the comparison with them.

    `counts` are None below 5 training samples; `units` compares with centres that are means of unit vectors.
    """

    nulls: Entry = field(default_factory=dict)
    counts: tuple[Count | None, ...] = (None, None)
    units: tuple[Count | None, ...] = (None, None)


class ClassTests:
    """Permutation tests of all classes: `run` once a class, in any thread, then `finish`.

    Single samples change sides, or bursts of related ones. A burst with rows on both sides counts as one unit on each;
    `straddling` counts such bursts. `undrawn` counts classes that would need more permutations than there is time for.
    """

    def __init__(
        self, train: ClassRows, unseen: ClassRows, bursts: tuple[Tensor | None, Tensor | None],
        permutations: int, alpha: float, seed: int, keys: Sequence[str],
    ) -> None:  # fmt: skip
        self._sides = train, unseen
        self._bursts = [part.cpu().numpy() for part in bursts if part is not None]
        if len(self._bursts) == 1:
            raise UserError("bursts: give train_bursts and unseen_bursts, or neither")
        for side, part, what in zip(self._sides, self._bursts, ("train", "unseen"), strict=False):
            if part.shape != side.features.shape[:1] or part.dtype.kind == "f":
                raise UserError(f"{what}_bursts: expected {len(side.features)} integers, got {list(part.shape)}")
        self.straddling = len(np.intersect1d(self._bursts[0], self._bursts[1])) if self._bursts else 0
        self.undrawn = 0
        self._permutations, self._alpha, self._seed, self._keys = permutations, alpha, seed, keys
        # For the group tests; one array, since thousands of small ones would keep the threads' memory from being freed.
        self._standardized = np.full((len(TESTS), len(keys), permutations + 1), np.nan)

    def _units(self, k: int) -> Units:
        n, m = (side.count(k) for side in self._sides)
        if not self._bursts:
            return Units(np.arange(n + m), n, n + m)
        codes = [part[side.index(k).cpu().numpy()] for part, side in zip(self._bursts, self._sides, strict=True)]
        first, second = (np.unique(code, return_inverse=True) for code in codes)
        seen, total = len(first[0]), len(first[0]) + len(second[0])
        return Units(np.concatenate([first[1], seen + second[1]]), seen, total)

    def run(self, rows: Tensor, k: int) -> Chance:
        """Permute class k, whose rows [n + m, d] hold training samples first."""
        n, m = (side.count(k) for side in self._sides)
        if not (self._permutations and n and m):
            return Chance()
        pools = [make_pool(rows)]
        if n >= VERDICT_SAMPLES:
            pools.append(make_pool(torch.nn.functional.normalize(rows, dim=1)))
        rng = numpy_stream(self._seed, "geometry", "permute", self._keys[k])
        drawn = draw(pools, self._units(k), self._permutations, rng, resolution_deg(rows.dtype))
        raw = drawn[0]
        ratio = raw.null("log_variance_ratio")
        nulls = {
            "center_shift_null_deg": raw.null("shift"),
            "spread_gap_null_deg": raw.null("gap"),
            "spread_train_null_deg": raw.null("spread"),
            "escape_rate_null": raw.null("escape"),
            "variance_ratio_null": None if ratio is None else float(np.exp(ratio)),
        }
        for i, (_, statistic, _) in enumerate(TESTS):
            self._standardized[i, k] = standardize(raw, statistic, self._permutations, rng)
        if n < VERDICT_SAMPLES:
            return Chance(nulls)
        counts, units = (tuple(draws.count(statistic) for _, statistic, _ in TESTS) for draws in drawn)
        return Chance(nulls, counts, units)

    def finish(self, entries: Sequence[Entry], chances: Sequence[Chance]) -> list[bool]:
        """Fill in p, q and verdicts; return for which classes unit vectors would change the verdict on the gap."""
        differing: list[bool] = []
        for i, (name, _, two_sided) in enumerate(TESTS):
            counts = [chance.counts[i] for chance in chances]
            p = _p_values(counts, two_sided)
            unit_p = _p_values([chance.units[i] for chance in chances], two_sided)
            if name == "spread_gap":
                differing = [a != b for a, b in zip(self._flags(p), self._flags(unit_p), strict=True)]
            draws = [None if count is None else count.draws for count in counts]
            self._continue(i, counts, p, draws)
            names = [f"{name}_{part}" for part in ("p", "q", "flagged", "unit_p", "permutations")]
            columns = p, false_discovery(p), self._flags(p), unit_p, draws
            for entry, *values in zip(entries, *columns, strict=True):
                entry.update(zip(names, values, strict=True))
        for entry in entries:
            if entry["spread_gap_deg"] is not None and entry["train_count"] >= VERDICT_SAMPLES:
                large = entry["spread_gap_deg"] >= MATERIAL_GAP_DEG
                entry["spread_gap_material"] = bool(large or entry["escape_rank"] >= MATERIAL_RANK)
        return differing

    def _affordable(self, found: list[tuple[int, Count]], limit: int) -> list[tuple[int, Count]]:
        """Return those classes that there is time to draw on for, up to the limit each: the most extreme ones first."""
        costs = [(limit - count.draws) * sum(side.count(k) for side in self._sides) for k, count in found]
        if sum(costs) <= MOST_DRAWN:
            return found
        order = sorted(range(len(found)), key=lambda i: (min(found[i][1].high, found[i][1].low), i))
        kept = sorted(
            i for i, total in zip(order, accumulate(costs[i] for i in order), strict=True) if total <= MOST_DRAWN
        )
        self.undrawn = max(self.undrawn, len(found) - len(kept))
        return [found[i] for i in kept]

    def group_p(self, name: str, classes: Sequence[int]) -> float | None:
        """Return the p-value of one test over a group of classes, however small each is; None where undefined."""
        i = [test[0] for test in TESTS].index(name)
        return group_p(self._standardized[i, list(classes)], TESTS[i][2])

    def _flags(self, p: Sequence[float | None]) -> list[bool | None]:
        return [None if q is None else q <= self._alpha for q in false_discovery(p)]

    def _continue(
        self, test: int, counts: Sequence[Count | None], p: list[float | None], draws: list[int | None]
    ) -> None:
        """Draw more permutations, in place, where their number alone keeps classes from being flagged."""
        name, statistic, two_sided = TESTS[test]
        sides, family = 2 if two_sided else 1, [value for value in p if value is not None]
        floor = sides / (self._permutations + 1)
        lowest = sum(value <= floor for value in family)
        if floor * len(family) <= lowest * self._alpha or not lowest:
            return
        limit = math.ceil(sides * len(family) / self._alpha)
        found = [(k, c) for k, c in enumerate(counts) if c is not None and c.is_open(two_sided) and c.draws < limit]
        found = self._affordable(found, limit)

        def one(i: int) -> tuple[float, int]:
            k, count = found[i]
            rng = numpy_stream(self._seed, "geometry", "continue", name, self._keys[k])
            pool = make_pool(gather(*self._sides, k))
            return continue_draws(pool, self._units(k), count, statistic, limit, two_sided, rng)

        longer = map_parallel(one, len(found), self._sides[0].features.device)
        for (k, _), (value, number) in zip(found, longer, strict=True):
            p[k], draws[k] = value, number


def _p_values(counts: Sequence[Count | None], two_sided: bool) -> list[float | None]:
    return [None if count is None else count.p(two_sided) for count in counts]
