"""Which tables a diagnosis gives."""

from tailscope.groups import GROUPS
from tailscope.report import diagnosis_rows
from tailscope.report.measures import BY_FIELD, CALIBRATED, PAPER
from tailscope.report.results import Result
from tailscope.report.table_model import Column, Table

CI = ("ci_low", "ci_high")
ACCURACY = (
    Column("label", "classifier"),
    Column("what", "which"),
    Column("mean", "accuracy", "share", "Share of scored samples that are right, with its 95 % interval.", CI),
    *(Column(group, f"{group} recall", "share", f"Mean recall of {group} classes.") for group in GROUPS),
)
ABOUT = (
    Column("name", "class"),
    Column("rank", "rank", "count", "Frequency rank: 1 has the most training samples."),
    Column("group", "group"),
    Column("count", "training", "count", "Training samples."),
    Column("unseen_count", "unseen", "count", "Unseen samples."),
)
RECALLS = (
    Column("recall_current", "recall now", "whole", "Recall of the classifier in use."),
    Column("recall_rebalanced", "re-balanced", "whole", "Recall of the best remedy."),
    Column("recall_classifier_bound", "bound", "whole", "Recall of a classifier fitted to the true distribution."),
)
GAPS = (
    Column("bottleneck", "bottleneck", "text", "What costs this class more, where its own samples can tell."),
    Column(
        "classifier_gap",
        "classifier gap",
        "points",
        "Recall that a classifier fitted to the true distribution gains.",
        ("classifier_gap_low", "classifier_gap_high"),
    ),
    Column(
        "representation_gap",
        "representation gap, at most",
        "points",
        "What even that classifier misses, up to the ceiling.",
        ("representation_gap_low", "representation_gap_high"),
    ),
)
SHOWN = ("spread_gap_deg", "spread_gap_q", "center_shift_excess_deg", "center_shift_q", "escape_rank")


def tables(result: Result) -> list[Table]:
    """Return every table, in the order of the page."""
    found = [groups(result), classes(result), pairs(result), measures(result)]
    if result["accuracy"] is not None:
        found.insert(0, accuracy(result))
    if result.get("comparison") is not None:
        found.append(comparison(result))
    return found


def accuracy(result: Result) -> Table:
    """Return the three accuracies that the verdict compares."""
    return Table("diagnosis-accuracy", "The accuracies behind the verdict", ACCURACY, diagnosis_rows.accuracies(result))


def groups(result: Result) -> Table:
    """Return head, body and tail: recalls, gaps, and the tests that need no class to be large enough."""
    columns = [Column("group", "group"), Column("classes", "classes", "count"), *ABOUT[3:]]
    columns += [*RECALLS, *GAPS] if result["accuracy"] is not None else []
    columns += [Column("spread_gap_p", "p of the spread gap", "p", "Test of the whole group."), *_measures()]
    return Table("diagnosis-groups", "By group of classes", columns, diagnosis_rows.groups(result))


def classes(result: Result) -> Table:
    """Return one row a class: counts, recalls, verdict, calibrated geometry, nearest class."""
    columns = [*ABOUT]
    columns += [*RECALLS, *GAPS] if result["accuracy"] is not None else []
    nearest = Column(
        "nearest_center_true_deg", "nearest centre", "degrees", BY_FIELD["nearest_center_true_deg"].meaning
    )
    columns += [*_measures(), nearest, Column("nearest", "which class", "text", "The class whose centre is nearest.")]
    rows = sorted(diagnosis_rows.classes(result), key=lambda row: row["rank"])
    return Table("diagnosis-classes", "Class by class", columns, rows)


def measures(result: Result) -> Table:
    """Return every measure of every class, for files."""
    columns = [*ABOUT, *(Column(m.field, m.label, m.kind, m.meaning) for m in (*PAPER, *CALIBRATED))]
    return Table("diagnosis-measures", "Every measure of every class", columns, diagnosis_rows.classes(result))


def pairs(result: Result) -> Table:
    """Return the pairs of classes that lie closest together."""
    columns = [
        Column("first", "class"),
        Column("second", "and"),
        Column("angle_deg", "angle between centres", "degrees", "Centres over training and unseen samples."),
        Column("first_as_second", "first taken for second", "share", "By the classifier in use."),
        Column("second_as_first", "second taken for first", "share", "By the classifier in use."),
    ]
    return Table("diagnosis-pairs", "The ten closest pairs of classes", columns, result["pairs"])


def comparison(result: Result) -> Table:
    """Return what other encoders do differently from the first."""
    columns = [
        Column("encoder", "encoder"),
        Column("of", "classes"),
        Column("aspect", "aspect"),
        Column("difference", "difference", "plain", "From the first encoder, with its paired 95 % interval."),
        Column("low", "from", "plain"),
        Column("high", "to", "plain"),
        Column("better", "better", "text", "Where the interval excludes 0."),
    ]
    return Table(
        "diagnosis-comparison",
        f"Encoders against {result['comparison']['reference']}",
        columns,
        diagnosis_rows.comparisons(result),
    )


def _measures() -> list[Column]:
    return [Column(f, BY_FIELD[f].label, BY_FIELD[f].kind, BY_FIELD[f].meaning) for f in SHOWN]
