"""From classes to samples: confusions, the samples to look at, and the map, as rows and tables."""

from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from tailscope.report.diagnosis_schema import KINDS, Diagnosis, DrillDown, Sample
from tailscope.report.rows import Row
from tailscope.report.text import Column, Table, plural

if TYPE_CHECKING:
    from tailscope.report.thumbnails import Shown

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


def scores(stored: DrillDown | None, classes: int) -> list[Row]:
    """Return precision and F1 of each class, and the anchor of its samples; undefined where nothing was judged."""
    if stored is None:
        return [{"precision": None, "f1": None}] * classes
    shown = set(_folded(stored))
    return [
        {"precision": entry["precision"], "f1": entry["f1"], "anchor": f"samples-{k}" if k in shown else None}
        for k, entry in enumerate(stored["classes"])
    ]


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


def folds(result: Diagnosis, shown: "Shown | None" = None) -> list[dict[str, Any]]:
    """Return of each class that the page has room for: anchor, title, and the table of its samples with thumbnails."""
    stored, names = result.get("drilldown"), result["dataset"]["class_names"]
    if stored is None:
        return []
    return [
        {
            "anchor": f"samples-{k}",
            "name": names[k],
            "found": _found(stored, k),
            "table": Table(f"samples-{k}", f"Samples of {names[k]}", SAMPLE, _pictured(stored, k, names[k], shown)),
        }
        for k in _folded(stored)
    ]


def note(result: Diagnosis, shown: "Shown | None" = None) -> str:
    """Return what the lists of samples hold, and what they and the thumbnails leave out."""
    stored = result.get("drilldown")
    if stored is None:
        return ""
    left_out, without = len(stored["classes"]) - len(_folded(stored)), _unlisted(stored)
    in_table = left_out - without
    rest = f" The {plural(in_table, 'class')} with fewer mistakes are in tables/diagnosis-samples.csv." * (in_table > 0)
    if without:
        rest += f" Of {plural(without, 'class')} with still fewer none are listed, for their number."
    kept = f"Of each kind at most {stored['listed']} samples a class are listed"
    of = f"of the {plural(stored['scored'], 'scored sample')} in the {stored['file']} file"
    return f"{kept}, {of}.{rest}{_thumbnails(shown)}"


def _unlisted(stored: DrillDown) -> int:
    """Return how many classes have no samples listed although they have mistakes."""
    kinds = [entry["samples"]["nearest_misses"] for entry in stored["classes"]]
    return sum(kind["count"] > 0 and not kind["first"] for kind in kinds)


def shown_samples(stored: DrillDown) -> list[Sample]:
    """Return the samples in the lists of the page, the first of every list before all second ones, some twice."""
    lists = [stored["classes"][k]["samples"][kind]["first"] for k in _folded(stored) for kind in KINDS]
    return [one for one in chain.from_iterable(zip_longest(*lists)) if one is not None]


def _thumbnails(shown: "Shown | None") -> str:
    """Return how many of the listed samples have a thumbnail; nothing where no images were given."""
    if shown is None or not shown.samples:
        return ""
    unreadable = f"; {plural(shown.unreadable, 'image')} cannot be read" * (shown.unreadable > 0)
    room = "; the page has no room for more" * (len(shown.pictures) + shown.unreadable < shown.samples)
    number = "all" if len(shown.pictures) == shown.samples else f"{len(shown.pictures):,} of"
    return f" Thumbnails of {number} {plural(shown.samples, 'sample')}{unreadable}{room}."


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


def _pictured(stored: DrillDown, k: int, name: str, shown: "Shown | None") -> list[Row]:
    """Return the samples of a class, with what the page shows of their images and says of it to who cannot see it."""
    pictures = {} if shown is None else shown.pictures
    return [
        {**row, "picture": pictures.get(row["row"]), "alt": f"{row['sample']}, {name}"} for row in _samples(stored, k)
    ]


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
