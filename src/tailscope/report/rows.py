"""The stored results as flat rows, raw numbers under plain names. Charts, tables and sentences all draw from these."""

from collections.abc import Mapping, Sequence
from typing import Any

from tailscope.groups import GROUPS
from tailscope.paper import targets
from tailscope.report.results import Result, Results, first, ranks

Row = dict[str, Any]

CELLS = ("lt->lt", "lt->true", "true->lt", "true->true")
STAGES = {
    "stage1": "Stage I",
    "stage2": "Stage II",
    "stage2_aa": "Stage II + AutoAugment",
    "bound": "empirical bound",
}
AUGMENTATIONS = {
    "none": "none",
    "mixup": "MixUp",
    "autoaugment": "AutoAugment",
    "autoaugment+mixup": "AutoAugment + MixUp",
}
ENCODERS = ("lt", "lt+mixup", "true")
VARIANTS = ("paper", "calibrated")
Q_LINE = 0.05  # the usual false discovery rate


def profile(results: Results) -> list[Row]:
    """Return one row a class: index, rank (1 = most frequent), name, group, training images."""
    result = first(results)
    names, counts, groups = result["dataset"]["class_names"], result["counts"], result["groups"]
    rank = ranks(counts)
    return [
        {"index": k, "rank": rank[k], "name": str(names[k]), "group": groups[k], "count": counts[k]}
        for k in range(len(counts))
    ]


def ordered_cells(swap: Result) -> list[str]:
    """Return the names of swap's cells: those of the paper first, then the matched ones."""
    stored = swap["cells"]
    return [*(name for name in CELLS if name in stored), *(name for name in stored if name not in CELLS)]


def accuracy(cell: Mapping[str, Any]) -> Row:
    """Return a cell's mean accuracy with its interval, its best seed, and its groups' mean recalls."""
    low, high = cell["ci95"] or (None, None)
    groups = {group: cell["groups"].get(group) for group in GROUPS}
    return {"mean": cell["mean"], "highest": max(cell["accuracy"]), "ci_low": low, "ci_high": high, **groups}


def cells(results: Results) -> list[Row]:
    """Return one row a swap cell: cell, backbone, classifier, accuracy, interval, group recalls, the paper's."""
    swap = results["swap"]
    printed = targets.table1(targets.dataset_of(swap))
    found = []
    for name in ordered_cells(swap):
        backbone, classifier = name.split("->")
        about = {"cell": name, "backbone": backbone, "classifier": classifier, "paper": printed.get(name)}
        found.append(about | accuracy(swap["cells"][name]))
    return found


def cell_seeds(results: Results) -> list[Row]:
    """Return one row a swap cell and seed."""
    swap = results["swap"]
    return [
        {"cell": name, "seed": seed, "accuracy": value}
        for name in ordered_cells(swap)
        for seed, value in zip(swap["seeds"], swap["cells"][name]["accuracy"], strict=True)
    ]


def attribution(results: Results) -> list[Row]:
    """Return the gap, its two parts and the interaction: points and share as fractions, with intervals.

    There must be an attribution: all four cells.
    """
    stored = results["swap"]["attribution"]
    found = [_part("gap", stored["gap"], stored["gap_ci95"])]
    for part in ("representation", "classifier"):
        entry = stored[part]
        found.append(_part(part, entry["points"], entry["ci95"], entry["share"], entry["share_ci95"]))
    return [*found, _part("interaction", stored["interaction"], stored["interaction_ci95"])]


def _part(
    part: str,
    points: float,
    ci95: Sequence[float] | None,
    share: float | None = None,
    share_ci95: Sequence[float] | None = None,
) -> Row:
    low, high = ci95 or (None, None)
    share_low, share_high = share_ci95 or (None, None)
    return {
        "part": part,
        "points": points,
        "ci_low": low,
        "ci_high": high,
        "share": share,
        "share_low": share_low,
        "share_high": share_high,
    }


def split(a: Mapping[str, float | None]) -> dict[str, float | None]:
    """Split the gap between recalls by cell into representation and classifier (two-player Shapley value).

    All three are None where one of the four recalls is missing or undefined.

    >>> split({"lt->lt": 0.25, "lt->true": 0.5, "true->lt": 0.75, "true->true": 1.0})
    {'gap': 0.75, 'representation': 0.5, 'classifier': 0.25}
    """
    ll, lt, tl, tt = (a.get(cell) for cell in CELLS)
    if ll is None or lt is None or tl is None or tt is None:
        return {"gap": None, "representation": None, "classifier": None}
    representation = ((tl - ll) + (tt - lt)) / 2
    return {"gap": tt - ll, "representation": representation, "classifier": tt - ll - representation}


def groups(results: Results) -> list[Row]:
    """Return one row a group that exists: mean recall of its classes before and after, and the split of that gap.

    `attribution.groups` weighs test items instead, which differs where classes have unequally many.
    """
    stored = results["swap"]["cells"]
    found = []
    for group in GROUPS:
        recalls = {cell: stored[cell]["groups"].get(group) for cell in CELLS if cell in stored}
        parts = split(recalls)
        if parts["gap"] is not None:
            found.append({"group": group, "lt": recalls["lt->lt"], "true": recalls["true->true"], **parts})
    return found


def classes(results: Results) -> list[Row]:
    """Return one row a class: the profile, every cell's recall, the split of the gap."""
    found = profile(results)
    if "swap" not in results:
        return found
    stored = results["swap"]["cells"]
    for row in found:
        recalls = {cell: stored[cell]["per_class"][row["index"]] for cell in ordered_cells(results["swap"])}
        row.update(recalls, **split(recalls))
    return found


def ladder(results: Results) -> list[Row]:
    """Return one row an augmentation and rung: accuracy, interval, group recalls, the paper's."""
    stored = results["ladder"]["augmentations"]
    printed = targets.figure3(targets.dataset_of(results["ladder"]))
    known = [
        *(name for name in AUGMENTATIONS if name in stored),
        *(name for name in stored if name not in AUGMENTATIONS),
    ]
    return [
        {
            "augmentation": name,
            "rung": rung,
            "paper": printed.get(f"{name}: {rung}"),
            **accuracy(stored[name][rung]),
        }
        for name in known
        for rung in STAGES
        if stored[name].get(rung)
    ]


def encoders(results: Results) -> list[str]:
    """Return the encoders that geometry.json holds, the known ones first and in order."""
    stored = results["geometry"]["encoders"]
    return [*(name for name in ENCODERS if name in stored), *(name for name in stored if name not in ENCODERS)]
