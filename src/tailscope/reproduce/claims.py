"""The paper's claims as checked statements, and its tables and figures beside ours.

Claims are orderings of accuracies, and the geometry of the features, measured as the paper has it: unseen samples are
D* without D_LT. Calibrated twins (`...-beyond-chance`) stand beside the claims that sampling alone would let hold: raw
escape rates and centre shifts grow towards rare classes even where training changed nothing, because few samples place
a centre badly. The twins are measured against test images, which no encoder has trained on.

Accuracies stand beside the paper's printed ones: paper | ours (mean ± sd over seeds, n) | difference. Figures 4 to 8
are plots without printed values, so their tables hold ours alone, by group of classes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from tailscope import paper
from tailscope.groups import GROUPS
from tailscope.report import rows
from tailscope.report.text import DASH, Column, Table, number, percent, to_csv, to_latex, to_markdown
from tailscope.reproduce.evidence import (
    NEARLY_EQUAL,
    NO_TREND,
    Claim,
    Evidence,
    FloatArray,
    Geometry,
    means,
    over_seeds,
    permutation_p,
    positive,
    within,
)
from tailscope.store.files import write as write_file

AUGMENTATIONS = rows.AUGMENTATIONS | {"none": "no augmentation"}
RUNGS = {"stage1": "Stage I", "stage2": "Stage II", "stage2_aa": "Stage II + AA", "bound": "Empirical bound"}
_BEATS = "a classifier trained on D* beats one trained on D_LT"
TABLE1 = {
    ("true->lt", "lt->true"): (
        "representation-is-the-bottleneck",
        "true→lt beats lt→true: the representation is a larger bottleneck than the classifier",
    ),
    ("lt->true", "lt->lt"): ("better-classifier-helps", f"On the long-tailed backbone, {_BEATS}"),
    ("true->true", "true->lt"): ("true-true-is-best", f"On the true backbone, {_BEATS}"),
}
WITH_RARITY = "rank correlation with class rarity of"


def check(evidence: Evidence) -> list[Claim]:
    """Return every claim that the results bear on, with its statistic and its verdict, in the order of the paper."""
    return [*_table1(evidence), *_figure3(evidence), *_figures4to8(evidence)]


def document(evidence: Evidence, claims: Sequence[Claim], created: str) -> dict[str, Any]:
    """Return the contents of `claims.json`."""
    return {
        "schema": "tailscope.claims/1",
        "created": created,
        "dataset": evidence.dataset,
        "recipe": dict(evidence.recipe),
        "seeds": evidence.first["seeds"],
        "spec": evidence.first["spec"],
        "claims": [asdict(claim) for claim in claims],
    }


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return how many claims hold, fail and are undecided.

    >>> tally([{"verdict": "holds"}, {"verdict": "holds"}, {"verdict": "fails"}])
    '2 hold, 1 fails, 0 undecided'
    """
    n = Counter(claim["verdict"] for claim in claims)
    words = [f"{n[verdict]} {verdict if n[verdict] == 1 else verdict[:-1]}" for verdict in ("holds", "fails")]
    return ", ".join([*words, f"{n['undecided']} undecided"])


def label(row: str) -> str:
    """Return a row's name for readers.

    >>> label("true->lt"), label("mixup: stage2_aa"), label("lt stage1")
    ('true→lt', 'Stage II + AA (MixUp)', 'lt, own classifier (Stage I)')
    """
    name, _, rung = row.partition(": ")
    if rung:
        return f"{RUNGS[rung]} ({AUGMENTATIONS[name]})"
    if row.endswith(" stage1"):
        return f"{row.removesuffix(' stage1')}, own classifier (Stage I)"
    return row.replace("->", "→")


# -- accuracy -------------------------------------------------------------------------------------------------------


def _table1(evidence: Evidence) -> Iterator[Claim]:
    """Yield the orderings of Table 1; those with a backbone that was not trained are undecided."""
    printed = paper.table1(evidence.dataset)
    for pair, (name, sentence) in TABLE1.items() if "swap" in evidence.results else ():
        yield _ordering(evidence, Claim(f"table1/{name}", sentence, "Table 1, Figure 2", ""), pair, printed)


def _figure3(evidence: Evidence) -> Iterator[Claim]:
    """Yield every ordering of Figure 3 within a column and within a row, neighbours in the paper's order.

    Neighbours imply the rest. Nothing is yielded for data that the paper has no Figure 3 of.
    """
    known, printed = evidence.accuracies().keys(), paper.figure3(evidence.dataset)
    for name, sentence, pair in _figure3_orderings(printed) if printed else ():
        if known >= set(pair):
            yield _ordering(evidence, Claim(f"fig3/{name}", sentence, "Figure 3", ""), pair, printed)


def _figure3_orderings(printed: Mapping[str, float]) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Yield name, sentence, and the rows with the higher and with the lower accuracy."""
    for name, title in AUGMENTATIONS.items():
        for low, high in pairwise(sorted(RUNGS, key=lambda rung: printed[f"{name}: {rung}"])):
            sentence = f"With {title} in stage 1, {RUNGS[high]} is above {RUNGS[low]}"
            yield f"{name}/{high}-above-{low}", sentence, (f"{name}: {high}", f"{name}: {low}")
    for rung, title in RUNGS.items():
        for low, high in pairwise(sorted(AUGMENTATIONS, key=lambda name: printed[f"{name}: {rung}"])):
            sentence = f"{title}: {AUGMENTATIONS[high]} is above {AUGMENTATIONS[low]}"
            yield f"{rung}/{high}-above-{low}", sentence, (f"{high}: {rung}", f"{low}: {rung}")


def _ordering(evidence: Evidence, claim: Claim, pair: tuple[str, str], printed: Mapping[str, float]) -> Claim:
    """Decide that the first of two rows has the higher accuracy."""
    higher, lower = pair
    claim = replace(
        claim,
        statistic=f"accuracy of {label(higher)} − accuracy of {label(lower)}",
        published=round(printed[higher] - printed[lower], 6) if printed else None,
    )
    known = evidence.accuracies()
    if missing := [label(row) for row in pair if row not in known]:
        return claim.undecided(f"not run: {', '.join(missing)}")
    decided = positive(claim.measured(evidence.difference(higher, lower), len(known[higher])))
    if decided.verdict == "undecided" or evidence.recipe["converged"]:
        return decided
    shortened = f"after the shortened recipe {evidence.recipe['name']}, not the paper's"
    return replace(decided, reason="; ".join(filter(None, (shortened, decided.reason))))


# -- geometry -------------------------------------------------------------------------------------------------------


def _figures4to8(evidence: Evidence) -> Iterator[Claim]:
    """Yield every claim of Figures 4 to 8; all are undecided after a recipe that has not converged."""
    if "geometry" not in evidence.results:
        return
    geometry, recipe = Geometry(evidence.results["geometry"]), evidence.recipe
    for figure in (_figure4, _figure5, _figure6, _figure7, _figure8):
        for claim in figure(geometry):
            shortened = f"recipe {recipe['name']} is shortened: geometry is not converged"
            yield claim if recipe["converged"] else claim.undecided(shortened)


def _figure4(geometry: Geometry) -> Iterator[Claim]:
    for field in ("variance", "covariance_norm"):
        title, lt, true = field.replace("_", " "), geometry.values("lt", field), geometry.values("true", field)
        yield _grows(geometry, f"fig4/{field}-grows", f"{title} under the lt encoder", lt)
        flat = Claim(
            f"fig4/{field}-flat-under-true",
            f"No trend of {title} over the classes under the true encoder",
            "Figure 4",
            f"{WITH_RARITY} {title} under the true encoder; none is: within ±{NO_TREND}, and p > 0.05",
        )
        yield within(_correlated(geometry, flat, true, two_sided=True), -NO_TREND, NO_TREND)
        yield _above(
            geometry,
            f"fig4/{field}-steeper-under-lt",
            f"The trend of {title} towards rare classes is stronger under lt than under true",
            f"{WITH_RARITY} {title}, lt − true",
            geometry.correlations(lt) - geometry.correlations(true),
        )


def _figure5(geometry: Geometry) -> Iterator[Claim]:
    lt, true = (means(geometry.values(encoder, "first_pc_share")) for encoder in ("lt", "true"))
    yield _above(
        geometry,
        "fig5/first-pc-larger-under-lt",
        "The first principal component explains more of a class's variance under lt than under true",
        "first-PC share, mean over classes, lt − true",
        lt - true,
    )


def _figure6(geometry: Geometry) -> Iterator[Claim]:
    escape = {e: geometry.values(e, "escape_rate") for e in ("lt", "lt+mixup", "true")}
    spread = {e: geometry.values(e, "spread_true_deg") for e in ("lt", "lt+mixup")}
    gap = {e: spread[e] - geometry.values(e, "spread_train_deg") for e in spread}
    rank = geometry.values("lt", "escape_rank", "calibrated")
    held_out_gap = geometry.values("lt", "spread_gap_deg", "calibrated")
    for name, title, values in (
        ("escape-grows", "escape rate under lt", escape["lt"]),
        ("escape-grows-beyond-chance", "escape rank under lt (1/2 by chance)", rank),
        ("spread-grows", "spread over D* under lt", spread["lt"]),
        ("gap-grows", "compactness gap (spread over D* − over D_LT) under lt", gap["lt"]),
        ("gap-grows-beyond-chance", "compactness gap to test images under lt (0° by chance)", held_out_gap),
    ):
        yield _grows(geometry, f"fig6/{name}", title, values)
    tail, wider = geometry.tail, spread["lt+mixup"] - spread["lt"]
    degrees = "degrees of spread over D*, lt with MixUp − lt"
    for name, sentence, statistic, values in (
        ("escape-larger-under-lt", "More unseen samples of tail classes escape under lt than under true",
         "escape rate, mean over tail classes, lt − true", tail(escape["lt"]) - tail(escape["true"])),
        ("mixup-lowers-escape", "MixUp lets fewer unseen samples of tail classes escape",
         "escape rate, mean over tail classes, lt − lt with MixUp", tail(escape["lt"]) - tail(escape["lt+mixup"])),
        ("mixup-shrinks-gap", "MixUp shrinks the compactness gap of tail classes",
         "degrees of gap, mean over tail classes, lt − lt with MixUp", tail(gap["lt"]) - tail(gap["lt+mixup"])),
        ("mixup-widens", "MixUp widens the classes on average", f"{degrees}, mean over classes", means(wider)),
        ("mixup-widens-all", "MixUp widens every class", f"{degrees}, smallest of the classes",
         np.fmin.reduce(wider, axis=1)),
    ):  # fmt: skip
        yield _above(geometry, f"fig6/{name}", sentence, statistic, values)


def _figure7(geometry: Geometry) -> Iterator[Claim]:
    for kind, word, stem in (("center", "centre", "nearest_center"), ("sample", "sample", "nearest_center_sample")):
        title = f"{word} to nearest wrong centre"
        lost = {
            e: means(geometry.values(e, f"{stem}_train_deg") - geometry.values(e, f"{stem}_true_deg"))
            for e in ("lt", "lt+mixup", "true")
        }
        loss = f"degrees lost of {title} once unseen samples count, mean over classes"
        sentence = f"Separation shrinks once unseen samples count ({title})"
        yield _above(geometry, f"fig7/{kind}-shrinks", sentence, f"{loss}, lt", lost["lt"])
        for other, words in (("lt+mixup", "with MixUp"), ("true", "under the true encoder")):
            sentence = f"Separation shrinks less {words} ({title})"
            name = f"fig7/{kind}-shrinks-less-{other}"
            yield _above(geometry, name, sentence, f"{loss}, lt − {other}", lost["lt"] - lost[other])


def _figure8(geometry: Geometry) -> Iterator[Claim]:
    shift = {e: geometry.values(e, "center_shift_deg") for e in ("lt", "lt+mixup")}
    excess = geometry.values("lt", "center_shift_excess_deg", "calibrated")
    spread = geometry.values("lt", "spread_train_deg")
    known = np.isfinite(shift["lt"]) & np.isfinite(spread)
    width = geometry.tail(np.where(known, spread, np.nan))
    ratio = geometry.tail(np.where(known, shift["lt"], np.nan)) / np.where(width == 0, np.nan, width)
    low, high = NEARLY_EQUAL
    equal = Claim(
        "fig8/shift-equals-width",
        "The centres of tail classes shift by nearly the mean angle of their training samples",
        "Figure 8",
        f"centre shift / mean angle, each a mean over tail classes, lt; nearly equal is: within [{low:g}, {high:g}]",
    )
    yield within(equal.measured(over_seeds(ratio), geometry.seeds), low, high)
    yield _grows(geometry, "fig8/shift-grows", "centre shift under lt", shift["lt"])
    yield _grows(geometry, "fig8/shift-grows-beyond-chance", "centre shift under lt in excess of chance", excess)
    yield _above(
        geometry,
        "fig8/mixup-lowers-shift",
        "MixUp lowers the centre shift of tail classes",
        "degrees of shift, mean over tail classes, lt − lt with MixUp",
        geometry.tail(shift["lt"]) - geometry.tail(shift["lt+mixup"]),
    )


def _grows(geometry: Geometry, name: str, title: str, values: FloatArray) -> Claim:
    """Decide that a measure [S, C] grows towards rare classes."""
    sentence = f"{title[0].upper()}{title[1:]} grows towards rare classes"
    return positive(_correlated(geometry, Claim(name, sentence, _figure(name), f"{WITH_RARITY} {title}"), values))


def _above(geometry: Geometry, name: str, sentence: str, statistic: str, values: FloatArray) -> Claim:
    """Decide that one number a seed [S] is above 0."""
    claim = Claim(name, sentence, _figure(name), statistic)
    return positive(claim.measured(over_seeds(values), geometry.seeds))


def _correlated(geometry: Geometry, claim: Claim, values: FloatArray, *, two_sided: bool = False) -> Claim:
    """Return the claim with the correlation's mean over seeds; its t interval is cut to [-1, 1]."""
    p = permutation_p(geometry.rarity(), values.mean(axis=0), two_sided=two_sided)
    measured = claim.measured(over_seeds(geometry.correlations(values)), geometry.seeds, p)
    return replace(measured, ci95=measured.ci95 and [max(-1.0, min(1.0, bound)) for bound in measured.ci95])


def _figure(name: str) -> str:
    return f"Figure {name.removeprefix('fig').split('/')[0]}"


# -- tables ---------------------------------------------------------------------------------------------------------

LT_TRUE, ALL = ("lt", "true"), ("lt", "lt+mixup", "true")
MEASURES = {
    "variance": "variance (trace)",
    "covariance_norm": "covariance (Frobenius norm)",
    "first_pc_share": "share of variance",
    "spread_train_deg": "mean angle to the centre, D_LT, °",
    "spread_true_deg": "mean angle to the centre, D*, °",
    "escape_rate": "escape rate of unseen samples",
    "nearest_center_train_deg": "centre to nearest wrong centre, D_LT, °",
    "nearest_center_true_deg": "centre to nearest wrong centre, D*, °",
    "nearest_center_sample_train_deg": "sample to nearest wrong centre, D_LT, °",
    "nearest_center_sample_true_deg": "sample to nearest wrong centre, D*, °",
    "center_shift_deg": "centre shift, °",
}
SPREADS = ("spread_train_deg", "spread_true_deg")
FIGURES: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "fig4": ("Figure 4: second moments over D*", LT_TRUE, ("variance", "covariance_norm")),
    "fig5": ("Figure 5: first principal component over D*", LT_TRUE, ("first_pc_share",)),
    "fig6": ("Figure 6: intra-class compactness", ALL, (*SPREADS, "escape_rate")),
    "fig7": ("Figure 7: inter-class separation", ALL, [name for name in MEASURES if name.startswith("nearest")]),
    "fig8": ("Figure 8: localisation of the centres", ALL, ("center_shift_deg", *SPREADS)),
}
"""Of each plot: its caption, the encoders and the measures in it."""

PRINTED = {"table1": ("Table 1: swapping the data set", 0.015), "fig3": ("Figure 3: the augmentation ladder", 0.02)}
"""Of each printed table: its caption, and how close to the paper a reproduction should come."""


def build(evidence: Evidence) -> Iterator[tuple[Table, Table]]:
    """Yield every table that the results give, as (numbers for CSV, the same for readers)."""
    dataset, made_by = evidence.dataset, label_of(evidence.recipe)
    for name, printed in (("table1", paper.table1(dataset)), ("fig3", paper.figure3(dataset))):
        ours = {row: accuracy for row, accuracy in evidence.accuracies().items() if (": " in row) == (name == "fig3")}
        own = [row for row in ours if row.endswith(" stage1")] if name == "table1" else []
        beside = printed | (paper.stage1(dataset) if own else {})
        if ours:
            order = [*(printed or (row for row in ours if row not in own)), *own]
            yield _accuracies(name, made_by, {row: ours.get(row, []) for row in order}, beside)
    if "geometry" in evidence.results:
        for name in FIGURES:
            yield _figure_table(name, made_by, evidence.results["geometry"])


def write(out: Path, tables: Sequence[tuple[Table, Table]]) -> list[Path]:
    """Write each table to OUT/tables/paper-NAME as CSV, Markdown and LaTeX; return the paths."""
    return [
        write_file(out / "tables" / f"paper-{numbers.name}.{suffix}", text)
        for numbers, written in tables
        for suffix, text in (("csv", to_csv(numbers)), ("md", to_markdown(written)), ("tex", to_latex(written)))
    ]


def label_of(recipe: Mapping[str, Any]) -> str:
    """Return what results of a recipe may be called."""
    name = recipe["name"]
    return f"recipe {name}" if recipe["converged"] else f"recipe {name}: shortened, NOT a reproduction"


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation over seeds (n − 1 in the denominator); no deviation for one seed.

    >>> spread([0.7, 0.8]), spread([0.7]), spread([])
    ((0.75, 0.07071067811865482), (0.7, None), (None, None))
    """
    mean = float(np.mean(values)) if values else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def in_percent(fractions: Sequence[float]) -> str:
    """Return mean ± standard deviation over seeds in per cent, without its sign.

    >>> in_percent([0.7, 0.8]), in_percent([0.7]), in_percent([])
    ('75.00 ± 7.07', '70.00', '–')
    """
    return _mean_sd(*spread([100 * value for value in fractions]), 2)


def _accuracies(
    name: str, made_by: str, ours: Mapping[str, Sequence[float]], printed: Mapping[str, float]
) -> tuple[Table, Table]:
    caption, tolerance = PRINTED[name]
    title, found = f"{caption} ({made_by})", []
    for cell, values in ours.items():
        mean, sd = spread(values)
        theirs = printed.get(cell)
        difference = None if theirs is None or mean is None else mean - theirs
        row = {"cell": cell, "paper": theirs, "ours": mean, "ours_sd": sd, "seeds": len(values)}
        row |= {"label": label(cell), "paper_written": percent(theirs, 2), "difference": difference}
        row["written"] = f"{in_percent(values)} ({len(values)})" if values else "not run"
        row["difference_written"] = DASH if difference is None else number(100 * difference, 2)
        row["close"] = None if difference is None else "yes" if abs(difference) <= tolerance else "no"
        found.append(row)
    numbers = [Column(field, field) for field in ("cell", "paper", "ours", "ours_sd", "seeds", "difference", "close")]
    written = [
        Column("label", "backbone → classifier" if name == "table1" else "rung (augmentation of stage 1)"),
        Column("paper_written", "paper"),
        Column("written", "ours, %: mean ± sd (seeds)"),
        Column("difference_written", "difference, points"),
        Column("close", f"within {100 * tolerance:g} points"),
    ]
    return Table(name, title, numbers, found), Table(name, title, written, found)


def _figure_table(name: str, made_by: str, geometry: Mapping[str, Any]) -> tuple[Table, Table]:
    caption, encoders, measures = FIGURES[name]
    title = f"{caption} ({made_by})"
    found = []
    for field, encoder in product(measures, encoders):
        runs = [run["paper"]["groups"] for run in geometry["encoders"][encoder]["seeds"].values()]
        row = {"measure": field, "words": MEASURES[field], "encoder": encoder, "seeds": len(runs)}
        for group in GROUPS:
            values = [run[group][field] for run in runs if run.get(group) and run[group][field] is not None]
            mean, sd = spread(values if len(values) == len(runs) else [])
            row |= {group: mean, f"{group}_sd": sd, f"{group}_written": _mean_sd(mean, sd, 1 if "deg" in field else 3)}
        found.append(row)
    fields = ["measure", "encoder", "seeds", *(f"{group}{end}" for group in GROUPS for end in ("", "_sd"))]
    written = [
        Column("words", "measure"),
        Column("encoder", "encoder"),
        *(Column(f"{group}_written", f"{group}: mean ± sd") for group in GROUPS),
        Column("seeds", "seeds", "count"),
    ]
    return Table(name, title, [Column(f, f) for f in fields], found), Table(name, title, written, found)


def _mean_sd(mean: float | None, sd: float | None, digits: int) -> str:
    """Return a mean with its standard deviation if there is one."""
    return number(mean, digits) if mean is None or sd is None else f"{number(mean, digits)} ± {number(sd, digits)}"
