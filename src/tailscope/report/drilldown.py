"""From classes to samples: confusions, the samples to look at, and the map, as rows and tables."""

from typing import Any

from tailscope.report.diagnosis_schema import KINDS, Diagnosis, DrillDown
from tailscope.report.rows import Row
from tailscope.report.text import Column, Table, plural

MOST_FOLDS = 200  # classes whose samples the page shows; the table has all

CONFUSIONS = (
    Column("true", "class"),
    Column("predicted", "taken for"),
    Column("count", "samples", "count", "Scored samples of the class that the classifier in use takes for the other."),
    Column("share", "share of the class", "share", "Of all scored samples of the class."),
)
SAMPLE = (
    Column("kind", "why", "text", "Why it is listed."),
    Column("place", "place", "count", "The first is the nearest, farthest or most likely of its class."),
    Column("sample", "sample", "text", "Its id, or its row in the file of features, counted from 0."),
    Column("predicted", "taken for", "text", "By the classifier in use."),
    Column("confidence", "with probability", "whole", "What the classifier in use gives the class it names."),
    Column("true_probability", "its class has", "whole", "What the classifier in use gives the class of its label."),
    Column("angle_deg", "angle to its centre", "degrees", "To the mean of all samples of its class."),
    Column("suspected", "may belong to", "text", "By a classifier that was not fitted to the sample."),
    Column("suspected_probability", "probability of that", "whole", "By the same."),
)
SAMPLES = (Column("class", "class"), *SAMPLE)


# ---- rows and tables


def scores(stored: DrillDown | None, k: int) -> Row:
    """Return precision and F1 of class k, and the anchor of its samples; undefined where nothing was judged."""
    if stored is None:
        return {"precision": None, "f1": None}
    entry = stored["classes"][k]
    shown = k in _folded(stored)
    return {"precision": entry["precision"], "f1": entry["f1"], "anchor": f"samples-{k}" if shown else None}


def tables(result: Diagnosis) -> list[Table]:
    """Return the tables of confusions and of samples; none where nothing was judged."""
    stored, names = result.get("drilldown"), result["dataset"]["class_names"]
    if stored is None:
        return []
    samples = [{"class": names[k], **row} for k in range(len(names)) for row in _samples(stored, k)]
    return [
        Table("diagnosis-confusions", "What is taken for what most often", CONFUSIONS, stored["confusions"]["top"]),
        Table("diagnosis-samples", "Samples to look at", SAMPLES, samples),
    ]


def folds(result: Diagnosis) -> list[dict[str, Any]]:
    """Return of each class that the page has room for: anchor, title, and the table of its samples."""
    stored, names = result.get("drilldown"), result["dataset"]["class_names"]
    if stored is None:
        return []
    return [
        {
            "anchor": f"samples-{k}",
            "name": names[k],
            "found": _found(stored, k),
            "table": Table(f"samples-{k}", f"Samples of {names[k]}", SAMPLE, _samples(stored, k)),
        }
        for k in _folded(stored)
    ]


def note(result: Diagnosis) -> str:
    """Return what the lists of samples hold, and what they leave out."""
    stored = result.get("drilldown")
    if stored is None:
        return ""
    left_out = len(stored["classes"]) - len(_folded(stored))
    rest = f" The {plural(left_out, 'class')} with fewer mistakes are in tables/diagnosis-samples.csv." * (left_out > 0)
    kept = f"Of each kind at most {stored['listed']} samples a class are listed"
    return f"{kept}, of the {plural(stored['scored'], 'scored sample')} in the {stored['file']} file.{rest}"


def _found(stored: DrillDown, k: int) -> str:
    """Return what was found in a class, in a few words."""
    entry, kinds = stored["classes"][k], stored["classes"][k]["samples"]
    wrong, doubted = kinds["nearest_misses"]["count"], kinds["likely_mislabelled"]["count"]
    return f"{wrong:,} of {entry['scored']:,} wrong, {doubted:,} likely mislabelled"


def _folded(stored: DrillDown) -> list[int]:
    """Return the classes whose samples the page shows, in their order: those with most mistakes."""
    kinds = [entry["samples"] for entry in stored["classes"]]
    some = [k for k, entry in enumerate(kinds) if any(kind["first"] for kind in entry.values())]
    some.sort(key=lambda k: -kinds[k]["nearest_misses"]["count"])
    return sorted(some[:MOST_FOLDS])


def _samples(stored: DrillDown, k: int) -> list[Row]:
    """Return the samples of a class, by kind; each says what its kind is about and leaves the rest undefined."""
    found = []
    for kind, label in KINDS.items():
        for place, one in enumerate(stored["classes"][k]["samples"][kind]["first"], start=1):
            row: Row = {**one, "kind": label, "place": place}
            row["sample"] = f"row {one['row']}" if one["id"] is None else one["id"]
            if kind != "likely_mislabelled":
                row |= {"suspected": None, "suspected_probability": None}
            found.append(row)
    return found
