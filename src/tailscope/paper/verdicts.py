"""From numbers to verdicts: the rules by which a claim holds, fails, or stays undecided.

A claim is a number that the paper says is above 0 (or close to 1, or close to 0). It *holds* where the 95 % interval
says so, *fails* where the interval says the opposite, and is *undecided* in between, and where geometry comes from a
shortened recipe. Intervals over seeds need three of them. A single training is an anecdote, but a comparison of its
accuracies item by item has an interval of its own: it decides for this training alone, and says so. Rank correlations
over classes must, to hold, also be unlikely by chance: a permutation test over the classes, which is one-sided, so that
they fail by the interval alone. Nothing is corrected for the number of claims: each stands alone.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tailscope.intervals import Interval
from tailscope.seeds import numpy_stream

Verdict = Literal["holds", "fails", "undecided"]
FloatArray = NDArray[np.float64]

ALPHA = 0.05
PERMUTATIONS = 9_999
MIN_SEEDS = 3
ONE_TRAINING = "one seed: for these trainings and other test images only"
NEARLY_EQUAL = (0.8, 1.25)
"""A ratio within these is "nearly 1": the convention of bioequivalence trials."""
NO_TREND = 0.5
"""A rank correlation below this in size is "no trend" (a convention: at 10 classes 0.56 is significant)."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, what decides it, and what these results say.

    Attributes:
        id: a stable name.
        claim: the sentence.
        figure: the table or figure that it is about.
        statistic: the number that decides it, in words.
        estimate: the number, mean over seeds; None where it cannot be measured here.
        ci95: its 95 % interval.
        ci95_kind: "mover" (new seeds and test images), "seeds" (new seeds, these images), "item" (this training, new
            images).
        p: permutation p-value over the classes, where the statistic is a rank correlation.
        published: the same number from the paper's own tables, where it printed them.
        seeds: how many there are.
        as_claimed: whether the estimate alone is on the claimed side.
        verdict: holds, fails or undecided.
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
    verdict: Verdict = "undecided"
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the claim as `claims.json` holds it."""
        return asdict(self)

    def measured(self, interval: Interval, seeds: int, p: float | None = None) -> "Claim":
        """Return the claim with its number: the interval for new test images, else the one over seeds."""
        kind = interval.kind or ("seeds" if interval.ci95_seeds else None)
        bounds = interval.ci95 or interval.ci95_seeds
        ci95 = None if bounds is None else list(bounds)
        return replace(self, estimate=interval.estimate, ci95=ci95, ci95_kind=kind, seeds=seeds, p=p)

    @property
    def enough(self) -> bool:
        """Whether there are enough seeds for the interval to decide; one over test items needs but one."""
        return self.seeds >= MIN_SEEDS or (self.seeds == 1 and self.ci95_kind == "item")

    def undecided(self, reason: str) -> "Claim":
        """Return the claim as undecided, for a reason."""
        return replace(self, verdict="undecided", reason=reason)


def positive(claim: Claim) -> Claim:
    """Decide a claim that its statistic is above 0.

    >>> positive(Claim("a", "", "", "", 0.2, [0.1, 0.3], seeds=3)).verdict
    'holds'
    >>> positive(Claim("a", "", "", "", 0.2, [0.1, 0.3], p=0.3, seeds=3)).verdict
    'undecided'
    """
    claim = replace(claim, as_claimed=None if claim.estimate is None else claim.estimate > 0)
    low, high = claim.ci95 or (None, None)
    if low is None or high is None or not claim.enough:
        return claim.undecided(_too_little(claim))
    claim = _for_this_training(claim)
    if high < 0:
        return replace(claim, verdict="fails")
    if low <= 0:
        return claim.undecided("the interval contains 0")
    if claim.p is not None and claim.p > ALPHA:
        return claim.undecided(f"could be chance over so few classes: p = {claim.p:.2g}")
    return replace(claim, verdict="holds")


def within(claim: Claim, low: float, high: float) -> Claim:
    """Decide a claim that its statistic lies between two conventional limits; a p at most 5 % refutes it.

    >>> within(Claim("a", "", "", "", 1.0, [0.9, 1.1], seeds=3), 0.8, 1.25).verdict
    'holds'
    >>> within(Claim("a", "", "", "", 0.5, [0.4, 0.6], seeds=3), 0.8, 1.25).verdict
    'fails'
    """
    claim = replace(claim, as_claimed=None if claim.estimate is None else low < claim.estimate < high)
    lower, upper = claim.ci95 or (None, None)
    if lower is None or upper is None or not claim.enough:
        return claim.undecided(_too_little(claim))
    claim = _for_this_training(claim)
    if claim.p is not None and claim.p <= ALPHA:
        return replace(claim, verdict="fails", reason=f"unlikely by chance over the classes: p = {claim.p:.2g}")
    if upper < low or lower > high:
        return replace(claim, verdict="fails")
    if low < lower and upper < high:
        return replace(claim, verdict="holds")
    return claim.undecided(f"the interval is neither within [{low:g}, {high:g}] nor outside")


def rank_correlation(rarity: FloatArray, values: FloatArray) -> float | None:
    """Return Spearman's correlation over the classes where `values` is defined; None where it has no meaning.

    Args:
        rarity: [C], larger for rarer classes.
        values: [C], NaN where undefined.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([5.0, np.nan, 9.0])) is None
    True
    """
    known = np.isfinite(values)
    if known.sum() < 3 or np.ptp(values[known]) == 0 or np.ptp(rarity[known]) == 0:
        return None
    return float(stats.spearmanr(rarity[known], values[known]).statistic)


def permutation_p(rarity: FloatArray, values: FloatArray, *, two_sided: bool = False) -> float | None:
    """Return the p-value of Spearman's correlation when classes and values are paired at random.

    p = (1 + #{permutations at least as extreme}) / (B + 1) with B = 9,999 (Phipson & Smyth 2010); one-sided p is
    for growth towards rare classes.

    Args:
        rarity: [C], larger for rarer classes.
        values: [C], NaN where undefined.
        two_sided: whether falling counts as well.
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


def _too_little(claim: Claim) -> str:
    """Return why the claim cannot be decided whatever its number is."""
    if claim.estimate is None:
        return "not measured"
    return f"{claim.seeds} {'seed' if claim.seeds == 1 else 'seeds'}: {MIN_SEEDS} are needed"


def _for_this_training(claim: Claim) -> Claim:
    """Return the claim with the reservation that an interval over test items alone calls for."""
    return replace(claim, reason=ONE_TRAINING) if claim.ci95_kind == "item" else claim
