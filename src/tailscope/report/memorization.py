"""Memorisation by class in words and tables: how much there is, where, and whether the spread gap tells it."""

from collections.abc import Mapping
from typing import Any

from tailscope.groups import GROUPS
from tailscope.report.rows import CI, CLASS, Row, ends, ranks
from tailscope.report.schema import Correlations, MemorizedClasses, RankCorrelation
from tailscope.report.schema import Memorization as Stored
from tailscope.report.text import Column, Table, listed, number, percent, plural, significant, with_interval

SHOWN_CLASSES = 20
"""Classes up to which a terminal shows each; of more it shows the groups."""


def headline(result: Stored) -> str:
    """Return what was found in a few words."""
    side = _side(result["correlation"])
    if side is None:
        classes = plural(result["correlation"]["classes"], "class")
        return f"Spread gap and memorisation: no clear relation over {classes}"
    return f"Classes with a wider spread gap are memorised {'more' if side > 0 else 'less'}"


def _side(correlation: RankCorrelation) -> int | None:
    """Return on which side of 0 a correlation clearly lies: 1 or -1; None where it does not."""
    low, high = correlation["ci95"] or (-1.0, 1.0)
    return 1 if low > 0 else -1 if high < 0 else None


def findings(result: Stored) -> list[str]:
    """Return what was found: the relation, how much is memorised, in which groups and class."""
    total, correlation = result["total"], result["correlation"]
    found = [
        f"Over {plural(correlation['classes'], 'class')}, the rank correlation of memorisation and spread gap is"
        f" {_correlation(correlation)}; among classes of like count (partial) it is"
        f" {_given(correlation)}."
    ]
    if total["memorization"] is not None:
        found.append(
            f"{percent(total['above'])} of {plural(total['images'], 'image')} are memorised, by more than"
            f" {result['threshold']:g}; were it no matter which images a network had, chance would call"
            f" {percent(total['above_by_chance'])} so."
        )
    groups = [(name, one) for name in GROUPS if (one := result["by_group"].get(name)) and _known(one)]
    found += [f"{name.capitalize()} classes: {_said(one)}." for name, one in groups[:: max(1, len(groups) - 1)]]
    classes = [one for one in result["classes"] if _known(one)]
    if classes:
        most = max(classes, key=lambda one: one["memorization"] or 0.0)
        found.append(f"Most memorised is “{most['name']}” ({plural(most['count'], 'image')}): {_said(most)}.")
    return found


def _known(one: MemorizedClasses) -> bool:
    return one["memorization"] is not None


def _said(one: MemorizedClasses) -> str:
    return (
        f"networks get {percent(one['recall_kept'])} of the images right that they were trained on, and"
        f" {percent(one['recall_left_out'])} of those they were not; memorisation"
        f" {_with(one['memorization'], one['ci95'])}"
    )


def _correlation(one: RankCorrelation) -> str:
    return "undefined" if one["spearman"] is None else _with(one["spearman"], one["ci95"])


def _given(correlation: Correlations) -> str:
    given = correlation["given_counts"]
    undefined = "undefined, for one of the two ranks the classes just as their counts do"
    return undefined if correlation["spearman"] is not None and given["spearman"] is None else _correlation(given)


def _with(value: float | None, bounds: list[float] | None) -> str:
    return with_interval(number(value, 2), bounds, 2, 1.0)


def caveats(result: Stored) -> list[str]:
    """Return what limits the findings."""
    trained = plural(len(result["seeds"]) * result["trainings"], "training")
    subsets = "this subset" if len(result["seeds"]) == 1 else "these subsets"
    found = [
        f"Intervals of memorisation are for other random parts and networks on the images of {subsets} ({trained});"
        " that of the correlation is for other classes."
    ]
    missing = [one["name"] for one in result["classes"] if not _known(one)]
    if missing:
        found.append(f"Undefined for {listed(missing)}: no training left an image out, or none kept one.")
    if not result["recipe"]["converged"]:
        found.append(
            f"Not converged: the recipe “{result['recipe']['name']}” is shortened, and longer training memorises more."
        )
    return found


def advice(result: Stored) -> list[str]:
    """Return what follows for reading spread gaps."""
    if (side := _side(result["correlation"])) is None:
        return ["Train more networks, or take data of more classes, before reading spread gaps as memorisation here."]
    if side < 0:
        return ["Do not read a wide spread gap as memorisation on data like these."]
    given = _side(result["correlation"]["given_counts"])
    rest = "" if given == 1 else ", though it may say no more than how many images the class has"
    return [f"Read a class’s spread gap as a sign of memorisation{rest}: it needs one network instead of many."]


# -- rows and tables --------------------------------------------------------------------------------------------------


def rows(result: Stored) -> list[Row]:
    """Return one row a class, the most frequent first; intervals as two fields."""
    places = ranks(result["counts"])
    found = [_row(one) | {"rank": place} for place, one in zip(places, result["classes"], strict=True)]
    return sorted(found, key=lambda row: row["rank"])


def group_rows(result: Stored) -> list[Row]:
    """Return one row a group that has classes."""
    return [{"group": name, **_row(one)} for name in GROUPS if (one := result["by_group"].get(name))]


def _row(stored: Mapping[str, Any]) -> Row:
    return {**stored, **ends("ci", stored["ci95"]), **ends("gap", stored.get("spread_gap_ci95"))}


MEASURED = (
    Column("memorization", "memorisation", "decimal", "Right when kept minus right when left out, mean of images.", CI),
    Column("recall_kept", "right when kept", "share", "Of the networks that were trained on an image, mean of images."),
    Column("recall_left_out", "right when left out", "share", "Of the networks that were not trained on it."),
    Column("above", "memorised", "share", "Share of images whose memorisation is above the threshold."),
    Column("above_by_chance", "by chance", "share", "The same if it made no difference which networks had an image."),
    Column("undefined", "undefined", "count", "Images that all trainings kept, or none; left out of all means."),
)
_MEANING = "Of a backbone trained on the whole set, mean over seeds."
GAP = Column("spread_gap_deg", "spread gap", "degrees", _MEANING, ("gap_low", "gap_high"))


def tables(result: Stored) -> list[Table]:
    """Return all tables: by class, and by group."""
    plain = Column("spread_gap_deg", "spread gap", "degrees", "Mean of the classes where it is defined.")
    return [
        Table("memorization-classes", "Memorisation by class", [*CLASS, *MEASURED, GAP], rows(result)),
        Table("memorization-groups", "By group of classes", [CLASS[2], *MEASURED, plain], group_rows(result)),
    ]


def summary_rows(result: Stored) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the lines of classes, or where these are many of groups, as a terminal shows them."""
    few = len(result["classes"]) <= SHOWN_CLASSES
    found = rows(result) if few else group_rows(result)
    heading = ["class" if few else "group", "images", "memorisation", "kept", "left out", "memorised", "by chance"]
    lines = [
        [
            str(row["name" if few else "group"]),
            number(row["count"] if few else row["images"], 0),
            _with(row["memorization"], row["ci95"]),
            *(percent(row[name]) for name in ("recall_kept", "recall_left_out", "above", "above_by_chance")),
            significant(row["spread_gap_deg"]),
        ]
        for row in found
    ]
    return [*heading, "spread gap, °"], lines


def facts(result: Stored) -> list[str]:
    """Return what stands above the headline."""
    counts = result["counts"]
    return [
        plural(len(counts), "class"),
        f"{max(counts):,} to {min(counts):,} training images a class",
        f"{plural(result['trainings'], 'training')} on {percent(result['share'], 0)} of them",
        plural(len(result["seeds"]), "seed"),
        f"recipe {result['recipe']['name']}" + ("" if result["recipe"]["converged"] else ", not converged"),
    ]
