"""The claims about the geometry of the features: Figures 4 to 8.

Everything is measured as the paper has it: unseen samples are D* without D_LT. Calibrated twins (`...-beyond-chance`)
stand beside the claims that sampling alone would let hold: raw escape rates and centre shifts grow towards rare classes
even where training changed nothing, because few samples place a centre badly. The twins are measured against test
images, which no encoder has trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tailscope.paper.evidence import Evidence, FloatArray, Geometry, means, over_seeds
from tailscope.paper.verdicts import (
    NEARLY_EQUAL,
    NO_TREND,
    Claim,
    permutation_p,
    positive,
    rank_correlation,
    within,
)

FIGURE4 = {"variance": "variance", "covariance_norm": "covariance norm"}
FIGURE7 = {
    "center": ("nearest_center_train_deg", "nearest_center_true_deg", "centre to nearest wrong centre"),
    "sample": ("nearest_center_sample_train_deg", "nearest_center_sample_true_deg", "sample to nearest wrong centre"),
}
WITH_RARITY = "rank correlation with class rarity of"
Values = Sequence[float | None]


def figures4to8(evidence: Evidence) -> Iterator[Claim]:
    """Yield every claim of Figures 4 to 8; all are undecided after a recipe that has not converged."""
    if "geometry" not in evidence.results:
        return
    geometry = Geometry(evidence.results["geometry"])
    recipe = evidence.recipe
    for figure in (_figure4, _figure5, _figure6, _figure7, _figure8):
        for claim in figure(geometry):
            if recipe["converged"]:
                yield claim
            else:
                yield claim.undecided(f"recipe {recipe['name']} is shortened: geometry is not converged")


def _figure4(geometry: Geometry) -> Iterator[Claim]:
    for field, title in FIGURE4.items():
        lt, true = (geometry.values(encoder, field) for encoder in ("lt", "true"))
        yield _grows(geometry, f"fig4/{field}-grows", "Figure 4", f"{title} under the lt encoder", lt)
        flat = Claim(
            f"fig4/{field}-flat-under-true",
            f"No trend of {title} over the classes under the true encoder",
            "Figure 4",
            f"{WITH_RARITY} {title} under the true encoder; none is: within ±{NO_TREND}, and p > 0.05",
        )
        p = permutation_p(geometry.rarity(), _mean(true), two_sided=True)
        yield within(_correlated(geometry, flat, true, p), -NO_TREND, NO_TREND)
        steeper = Claim(
            f"fig4/{field}-steeper-under-lt",
            f"The trend of {title} towards rare classes is stronger under lt than under true",
            "Figure 4",
            f"{WITH_RARITY} {title}, lt − true",
        )
        yield _exceeds(geometry, steeper, _correlations(geometry, lt), _correlations(geometry, true))


def _figure5(geometry: Geometry) -> Iterator[Claim]:
    claim = Claim(
        "fig5/first-pc-larger-under-lt",
        "The first principal component explains more of a class's variance under lt than under true",
        "Figure 5",
        "first-PC share, mean over classes, lt − true",
    )
    lt, true = (means(geometry.values(encoder, "first_pc_share")) for encoder in ("lt", "true"))
    yield _exceeds(geometry, claim, lt, true)


def _figure6(geometry: Geometry) -> Iterator[Claim]:
    escape = {e: geometry.values(e, "escape_rate") for e in ("lt", "lt+mixup", "true")}
    spread = {e: geometry.values(e, "spread_true_deg") for e in ("lt", "lt+mixup")}
    gap = {e: spread[e] - geometry.values(e, "spread_train_deg") for e in spread}
    rank = geometry.values("lt", "escape_rank", "calibrated")
    held_out_gap = geometry.values("lt", "spread_gap_deg", "calibrated")
    what = "Figure 6"

    for name, title, values in (
        ("escape-grows", "escape rate under lt", escape["lt"]),
        ("escape-grows-beyond-chance", "escape rank under lt (1/2 by chance)", rank),
        ("spread-grows", "spread over D* under lt", spread["lt"]),
        ("gap-grows", "compactness gap (spread over D* − over D_LT) under lt", gap["lt"]),
        ("gap-grows-beyond-chance", "compactness gap to test images under lt (0° by chance)", held_out_gap),
    ):
        yield _grows(geometry, f"fig6/{name}", what, title, values)
    sentences = (
        ("escape-larger-under-lt", "More unseen samples of tail classes escape under lt than under true",
         "escape rate, mean over tail classes, lt − true", escape["lt"], escape["true"]),
        ("mixup-lowers-escape", "MixUp lets fewer unseen samples of tail classes escape",
         "escape rate, mean over tail classes, lt − lt with MixUp", escape["lt"], escape["lt+mixup"]),
        ("mixup-shrinks-gap", "MixUp shrinks the compactness gap of tail classes",
         "degrees of gap, mean over tail classes, lt − lt with MixUp", gap["lt"], gap["lt+mixup"]),
    )  # fmt: skip
    for name, sentence, statistic, larger, smaller in sentences:
        claim = Claim(f"fig6/{name}", sentence, what, statistic)
        yield _exceeds(geometry, claim, geometry.tail(larger), geometry.tail(smaller))
    wider = spread["lt+mixup"] - spread["lt"]
    degrees = "degrees of spread over D*, lt with MixUp − lt"
    average = Claim("fig6/mixup-widens", "MixUp widens the classes on average", what, f"{degrees}, mean over classes")
    every = Claim("fig6/mixup-widens-all", "MixUp widens every class", what, f"{degrees}, smallest of the classes")
    yield positive(_measured(geometry, average, means(wider)))
    yield positive(_measured(geometry, every, _smallest(wider)))


def _figure7(geometry: Geometry) -> Iterator[Claim]:
    for kind, (before, after, title) in FIGURE7.items():
        shrinkage = {
            e: means(geometry.values(e, before) - geometry.values(e, after)) for e in ("lt", "lt+mixup", "true")
        }
        loss = f"degrees lost of {title} once unseen samples count, mean over classes"
        claim = Claim(
            f"fig7/{kind}-shrinks", f"Separation shrinks once unseen samples count ({title})", "Figure 7", f"{loss}, lt"
        )
        yield positive(_measured(geometry, claim, shrinkage["lt"]))
        for other, words in (("lt+mixup", "with MixUp"), ("true", "under the true encoder")):
            claim = Claim(
                f"fig7/{kind}-shrinks-less-{other}",
                f"Separation shrinks less {words} ({title})",
                "Figure 7",
                f"{loss}, lt − {other}",
            )
            yield _exceeds(geometry, claim, shrinkage["lt"], shrinkage[other])


def _figure8(geometry: Geometry) -> Iterator[Claim]:
    shift = {e: geometry.values(e, "center_shift_deg") for e in ("lt", "lt+mixup")}
    excess = geometry.values("lt", "center_shift_excess_deg", "calibrated")
    spread = np.where(np.isfinite(shift["lt"]), geometry.values("lt", "spread_train_deg"), np.nan)
    low, high = NEARLY_EQUAL
    equal = Claim(
        "fig8/shift-equals-width",
        "The centres of tail classes shift by nearly the mean angle of their training samples",
        "Figure 8",
        f"centre shift / mean angle, each a mean over tail classes, lt; nearly equal is: within [{low:g}, {high:g}]",
    )
    ratios = [a / b if a is not None and b else None for a, b in _pairs(geometry, shift["lt"], spread)]
    yield within(_measured(geometry, equal, ratios), low, high)
    yield _grows(geometry, "fig8/shift-grows", "Figure 8", "centre shift under lt", shift["lt"])
    yield _grows(
        geometry, "fig8/shift-grows-beyond-chance", "Figure 8", "centre shift under lt in excess of chance", excess
    )
    claim = Claim(
        "fig8/mixup-lowers-shift",
        "MixUp lowers the centre shift of tail classes",
        "Figure 8",
        "degrees of shift, mean over tail classes, lt − lt with MixUp",
    )
    yield _exceeds(geometry, claim, geometry.tail(shift["lt"]), geometry.tail(shift["lt+mixup"]))


def _grows(geometry: Geometry, name: str, figure: str, title: str, values: FloatArray) -> Claim:
    """Decide that a measure [S, C] grows towards rare classes."""
    sentence = f"{title[0].upper()}{title[1:]} grows towards rare classes"
    p = permutation_p(geometry.rarity(), _mean(values))
    claim = Claim(name, sentence, figure, f"{WITH_RARITY} {title}")
    return positive(_correlated(geometry, claim, values, p))


def _exceeds(geometry: Geometry, claim: Claim, larger: Values, smaller: Values) -> Claim:
    """Decide that one number a seed is larger than another."""
    differences = [None if a is None or b is None else a - b for a, b in zip(larger, smaller, strict=True)]
    return positive(_measured(geometry, claim, differences))


def _measured(geometry: Geometry, claim: Claim, values: Values, p: float | None = None) -> Claim:
    interval = over_seeds(values)
    return replace(claim, seeds=geometry.seeds) if interval is None else claim.measured(interval, geometry.seeds, p)


def _correlated(geometry: Geometry, claim: Claim, values: FloatArray, p: float | None) -> Claim:
    """Return the claim with the correlation's mean over seeds; its t interval is cut to [-1, 1]."""
    measured = _measured(geometry, claim, _correlations(geometry, values), p)
    ci95 = measured.ci95 and [max(-1.0, min(1.0, bound)) for bound in measured.ci95]
    return replace(measured, ci95=ci95)


def _correlations(geometry: Geometry, values: FloatArray) -> list[float | None]:
    return [rank_correlation(geometry.rarity(), row) for row in values]


def _mean(values: FloatArray) -> FloatArray:
    """Return the mean over seeds [C], NaN where a seed has no value."""
    mean: FloatArray = values.mean(axis=0)
    return mean


def _smallest(values: FloatArray) -> list[float | None]:
    return [float(np.nanmin(row)) if np.isfinite(row).any() else None for row in values]


def _pairs(geometry: Geometry, a: FloatArray, b: FloatArray) -> Iterator[tuple[float | None, float | None]]:
    """Yield each seed's means over the tail classes where both measures are defined."""
    known = np.isfinite(a) & np.isfinite(b)
    yield from zip(*(geometry.tail(np.where(known, v, np.nan)) for v in (a, b)), strict=True)
