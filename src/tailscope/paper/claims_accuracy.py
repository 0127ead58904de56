"""The claims about accuracy: Table 1's (Figure 2's) and Figure 3's orderings."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

from tailscope.paper import published
from tailscope.paper.evidence import Evidence
from tailscope.paper.verdicts import Claim, positive

AUGMENTATIONS = {
    "none": "no augmentation",
    "mixup": "MixUp",
    "autoaugment": "AutoAugment",
    "autoaugment+mixup": "AutoAugment + MixUp",
}
RUNGS = {
    "stage1": "Stage I",
    "stage2": "Stage II",
    "stage2_aa": "Stage II + AA",
    "bound": "Empirical bound",
}
TABLE1 = (
    (
        "representation-is-the-bottleneck",
        "true→lt beats lt→true: the representation is a larger bottleneck than the classifier",
        "true->lt",
        "lt->true",
    ),
    ("better-classifier-helps", "On the long-tailed backbone, a classifier trained on D* beats one trained on D_LT",
     "lt->true", "lt->lt"),
    ("true-true-is-best", "On the true backbone, a classifier trained on D* beats one trained on D_LT",
     "true->true", "true->lt"),
)  # fmt: skip


def label(row: str) -> str:
    """Return a row's name for readers.

    >>> label("true->lt"), label("mixup: stage2_aa"), label("lt stage1")
    ('true→lt', 'Stage II + AA (MixUp)', 'lt, own classifier (Stage I)')
    """
    if row.endswith(" stage1") and ": " not in row:
        return f"{row.removesuffix(' stage1')}, own classifier (Stage I)"
    name, _, rung = row.partition(": ")
    return f"{RUNGS[rung]} ({AUGMENTATIONS[name]})" if rung else row.replace("->", "→")


def table1(evidence: Evidence) -> Iterator[Claim]:
    """Yield the orderings of Table 1, next to each other in the paper's order of accuracy.

    Those with a backbone that was not trained are undecided.
    """
    printed = published.table1(evidence.dataset or "")
    for name, sentence, higher, lower in TABLE1 if "swap" in evidence.results else ():
        yield _ordering(evidence, f"table1/{name}", sentence, "Table 1, Figure 2", (higher, lower), printed)


def figure3(evidence: Evidence) -> Iterator[Claim]:
    """Yield every ordering of Figure 3 within a column and within a row, neighbours in the paper's order.

    Neighbours imply the rest. Nothing is yielded for data that the paper has no Figure 3 of.
    """
    rows, printed = evidence.accuracies(), published.figure3(evidence.dataset or "")
    for name, sentence, higher, lower in _figure3_orderings(printed) if printed else ():
        if higher in rows and lower in rows:
            yield _ordering(evidence, f"fig3/{name}", sentence, "Figure 3", (higher, lower), printed)


def _figure3_orderings(printed: Mapping[str, float]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, sentence, higher row, lower row)."""
    for name, title in AUGMENTATIONS.items():
        climbing = sorted(RUNGS, key=lambda rung: printed[f"{name}: {rung}"])
        for low, high in pairwise(climbing):
            sentence = f"With {title} in stage 1, {RUNGS[high]} is above {RUNGS[low]}"
            yield f"{name}/{high}-above-{low}", sentence, f"{name}: {high}", f"{name}: {low}"
    for rung, title in RUNGS.items():
        climbing = sorted(AUGMENTATIONS, key=lambda name: printed[f"{name}: {rung}"])
        for low, high in pairwise(climbing):
            sentence = f"{title}: {AUGMENTATIONS[high]} is above {AUGMENTATIONS[low]}"
            yield f"{rung}/{high}-above-{low}", sentence, f"{high}: {rung}", f"{low}: {rung}"


def _ordering(
    evidence: Evidence, name: str, sentence: str, figure: str, rows: tuple[str, str], printed: Mapping[str, float]
) -> Claim:
    """Decide that the first of two rows has the higher accuracy."""
    higher, lower = rows
    claim = Claim(
        name,
        sentence,
        figure,
        f"accuracy of {label(higher)} − accuracy of {label(lower)}",
        published=round(printed[higher] - printed[lower], 6) if printed else None,
    )
    known = evidence.accuracies()
    missing = [label(row) for row in rows if row not in known]
    if missing:
        return claim.undecided(f"not run: {', '.join(missing)}")
    decided = positive(claim.measured(evidence.difference(higher, lower), len(known[higher])))
    if decided.verdict == "undecided" or evidence.recipe["converged"]:
        return decided
    shortened = f"after the shortened recipe {evidence.recipe['name']}, not the paper's"
    return replace(decided, reason="; ".join(reason for reason in (shortened, decided.reason) if reason))
