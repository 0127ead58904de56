"""What the paper's claims are decided on, and the rules by which one holds, fails, or stays undecided.

The evidence is stored results, and the per-item outcomes where the store still has them. A claim is a number that the
paper says is above 0 (or close to 1, or close to 0). It *holds* where the 95 % interval says so, *fails* where the
interval says the opposite, and is *undecided* in between, and where geometry comes from a shortened recipe. Intervals
over seeds need three of them. A single training is an anecdote, but a comparison of its accuracies item by item has an
interval of its own: it decides for this training alone, and says so. Rank correlations over classes must, to hold, also
be unlikely by chance: a permutation test over the classes, which is one-sided, so that they fail by the interval alone.
Nothing is corrected for the number of claims: each stands alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tailscope.intervals import Interval, paired
from tailscope.paper import dataset_of
from tailscope.report.text import plural
from tailscope.seeds import numpy_stream

FloatArray = NDArray[np.float64]
Outcomes = dict[str, NDArray[np.bool_]]
"""Of each row, [S, M]: seeds by test items, whether top-1 was right."""

ALPHA = 0.05
PERMUTATIONS = 9_999
MIN_SEEDS = 3
ONE_TRAINING = "one seed: for these trainings and other test images only"
NEARLY_EQUAL = (0.8, 1.25)
"""A ratio within these is "nearly 1": the convention of bioequivalence trials."""
NO_TREND = 0.5
"""A rank correlation below this in size is "no trend" (a convention: at 10 classes 0.65 is significant)."""


# -- evidence -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evidence:
    """Results of one data set and recipe by experiment, and which test images are right.

    Without `outcomes`, intervals of accuracies are over seeds alone.
    """

    results: Mapping[str, Mapping[str, Any]]
    outcomes: Outcomes = field(default_factory=dict)

    @property
    def first(self) -> Mapping[str, Any]:
        """Any of the results, for what all have in common."""
        return next(iter(self.results.values()))

    @property
    def dataset(self) -> str | None:
        """The paper's data set that this is about, if any."""
        return dataset_of(self.first)

    @property
    def recipe(self) -> dict[str, Any]:
        """Name, card and convergence of the recipe that made the results."""
        return dict(self.first["recipe"])

    def accuracies(self) -> dict[str, list[float]]:
        """Return accuracy per seed of every row: `lt->lt` ..., `lt stage1` ... and `none: stage1` ..."""
        swap = self.results.get("swap", {})
        cells = dict(swap.get("cells", {}))
        cells |= {f"{backbone} stage1": cell for backbone, cell in swap.get("stage1", {}).items()}
        for name, rungs in self.results.get("ladder", {}).get("augmentations", {}).items():
            cells |= {f"{name}: {rung}": cell for rung, cell in rungs.items() if cell}
        return {row: list(cell["accuracy"]) for row, cell in cells.items()}

    def difference(self, higher: str, lower: str) -> Interval:
        """Return by how much one row's accuracy exceeds another's, paired by seed and, where known, by test item."""
        if higher in self.outcomes and lower in self.outcomes:
            return paired(self.outcomes[higher].astype(np.float64) - self.outcomes[lower])
        rows = self.accuracies()
        return paired([[a - b] for a, b in zip(rows[higher], rows[lower], strict=True)])


@dataclass(frozen=True, eq=False)
class Geometry:
    """`geometry.json` as arrays: one value a seed and class."""

    result: Mapping[str, Any]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.result["seeds"])

    def rarity(self) -> FloatArray:
        """Return each class's rank [C] from the most frequent (1) to the rarest; ties share their mean rank."""
        return np.asarray(stats.rankdata(-np.asarray(self.result["counts"])), dtype=np.float64)

    def values(self, encoder: str, measure: str, variant: str = "paper") -> FloatArray:
        """Return a measure [S, C] of an encoder, NaN where it is undefined."""
        runs = self.result["encoders"][encoder]["seeds"].values()
        return np.asarray([[e.get(measure) for e in run[variant]["classes"]] for run in runs], dtype=np.float64)

    def tail(self, values: FloatArray) -> FloatArray:
        """Return the mean over the tail classes of each seed [S], NaN where none of them is defined."""
        return means(values[:, [group == "tail" for group in self.result["groups"]]])

    def correlations(self, values: FloatArray) -> FloatArray:
        """Return each seed's rank correlation [S] of a measure [S, C] with rarity, NaN where it has no meaning."""
        return np.asarray([rank_correlation(self.rarity(), row) for row in values], dtype=np.float64)


def means(values: FloatArray) -> FloatArray:
    """Return each row's mean over its defined entries, NaN where there is none.

    >>> means(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    array([ 2., nan])
    """
    return np.asarray([row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.nan for row in values])


# -- statistics -----------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float] | FloatArray) -> Interval | None:
    """Return the mean over seeds with its t interval; None where a seed has no value."""
    return paired([[float(v)] for v in values]) if len(values) and np.isfinite(values).all() else None


def rank_correlation(rarity: FloatArray, values: FloatArray) -> float | None:
    """Return Spearman's correlation of values [C] over the classes where they are defined; None without a meaning."""
    known = np.isfinite(values)
    if known.sum() < 3 or np.ptp(values[known]) == 0 or np.ptp(rarity[known]) == 0:
        return None
    return float(stats.spearmanr(rarity[known], values[known]).statistic)


def permutation_p(rarity: FloatArray, values: FloatArray, *, two_sided: bool = False) -> float | None:
    """Return the p-value of Spearman's correlation when classes and values are paired at random.

    p = (1 + #{permutations at least as extreme}) / (B + 1) with B = 9,999 (Phipson & Smyth 2010); one-sided p is
    for growth towards rare classes. `values` [C] are NaN where undefined.
    """
    known = np.isfinite(values)
    if rank_correlation(rarity, values) is None:
        return None
    x, y = (stats.rankdata(v[known]) for v in (rarity, values))
    shuffled = numpy_stream(0, "claims", "permutations").permuted(np.tile(x, (PERMUTATIONS, 1)), axis=1)
    products, observed = (ranks @ (y - y.mean()) for ranks in (shuffled, x))
    if two_sided:
        products, observed = np.abs(products), abs(observed)
    return float((1 + np.sum(products >= observed - 1e-9)) / (PERMUTATIONS + 1))


# -- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, what decides it, and what these results say.

    Attributes:
        statistic: the number that decides it, in words; `estimate` is its mean over seeds, None if not measured.
        ci95_kind: "mover" (new seeds and test images), "seeds" (new seeds, these images), "item" (this training, new
            images).
        p: permutation p-value over the classes, where the statistic is a rank correlation.
        published: the same number from the paper's own tables, where it printed them.
        as_claimed: whether the estimate alone is on the claimed side.
        reason: why it is undecided, or what to keep in mind.
    """

    id: str
    claim: str
    figure: str
    statistic: str
    estimate: float | None = None
    ci95: list[float] | None = None
    ci95_kind: str | None = None
    p: float | None = None
    published: float | None = None
    seeds: int = 0
    as_claimed: bool | None = None
    verdict: Literal["holds", "fails", "undecided"] = "undecided"
    reason: str | None = None

    def measured(self, interval: Interval | None, seeds: int, p: float | None = None) -> "Claim":
        """Return the claim with its number if any: the interval for new test images, else the one over seeds."""
        if interval is None:
            return replace(self, seeds=seeds)
        kind, bounds = interval.kind or ("seeds" if interval.ci95_seeds else None), interval.ci95 or interval.ci95_seeds
        return replace(self, estimate=interval.estimate, ci95=bounds and list(bounds), ci95_kind=kind, seeds=seeds, p=p)

    def undecided(self, reason: str) -> "Claim":
        """Return the claim as undecided, for a reason."""
        return replace(self, verdict="undecided", reason=reason)

    @property
    def enough(self) -> bool:
        """Whether there are enough seeds for the interval to decide; one over test items needs but one."""
        return self.ci95 is not None and (self.seeds >= MIN_SEEDS or (self.seeds == 1 and self.ci95_kind == "item"))


def positive(claim: Claim) -> Claim:
    """Decide a claim that its statistic is above 0.

    >>> positive(Claim("a", "", "", "", 0.2, [0.1, 0.3], seeds=3)).verdict
    'holds'
    """
    claim = _decided(claim, 0.0, np.inf, "the interval contains 0")
    if claim.verdict == "holds" and claim.p is not None and claim.p > ALPHA:
        return claim.undecided(f"could be chance over so few classes: p = {claim.p:.2g}")
    return claim


def within(claim: Claim, low: float, high: float) -> Claim:
    """Decide a claim that its statistic lies between two conventional limits; a p at most 5 % refutes it."""
    claim = _decided(claim, low, high, f"the interval is neither within [{low:g}, {high:g}] nor outside")
    if claim.enough and claim.p is not None and claim.p <= ALPHA:
        return replace(claim, verdict="fails", reason=f"unlikely by chance over the classes: p = {claim.p:.2g}")
    return claim


def _decided(claim: Claim, low: float, high: float, between: str) -> Claim:
    """Decide by the interval alone that a statistic lies between two limits."""
    if claim.estimate is None:
        return claim.undecided("not measured")
    claim, ci95 = replace(claim, as_claimed=bool(low < claim.estimate < high)), claim.ci95
    if ci95 is None or not claim.enough:
        return claim.undecided(f"{plural(claim.seeds, 'seed')}: {MIN_SEEDS} are needed")
    if claim.ci95_kind == "item":
        claim = replace(claim, reason=ONE_TRAINING)
    lower, upper = ci95
    if upper < low or lower > high:
        return replace(claim, verdict="fails")
    return replace(claim, verdict="holds") if low < lower and upper < high else claim.undecided(between)
