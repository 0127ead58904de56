"""Which tables the stored results give."""

from tailscope.groups import GROUPS
from tailscope.report import geometry_rows, rows
from tailscope.report.measures import BY_FIELD, CALIBRATED, PAPER, Measure
from tailscope.report.results import TRAINED, Results
from tailscope.report.rows import Row
from tailscope.report.table_model import Column, Table
from tailscope.report.text import arrow

VERDICTS = {"holds": "✓", "fails": "✗", "undecided": "?"}
CI = ("ci_low", "ci_high")
ACCURACY = Column("mean", "accuracy", "share", "Mean over seeds, with its 95 % interval.", CI)
RECALLS = tuple(Column(group, f"{group} recall", "share", f"Mean recall of {group} classes.") for group in GROUPS)
CLASS = (
    Column("name", "class"),
    Column("rank", "rank", "count", "Frequency rank: 1 has the most training images."),
    Column("group", "group"),
    Column("count", "images", "count", "Training images in the long-tailed set."),
)
SPLIT = (
    Column("gap", "gap", "points", "Recall lost by training on the long-tailed set."),
    Column("representation", "by backbone", "points", "The part of the gap that the backbone costs."),
    Column("classifier", "by classifier", "points", "The part of the gap that the classifier costs."),
)
# Of geometry, the per-class table shows the calibrated measures of the long-tailed encoder; files hold the rest.
LOCAL = (
    Column("spread_gap_deg", "spread gap", "degrees", BY_FIELD["spread_gap_deg"].meaning),
    Column("spread_gap_flags_text", "seeds with q ≤ 0.05", "text", "Seeds in which the spread gap is beyond chance."),
    Column("center_shift_excess_deg", "excess shift", "degrees", BY_FIELD["center_shift_excess_deg"].meaning),
    Column("center_shift_flags_text", "seeds with q ≤ 0.05", "text", "Seeds in which the centre shift is not chance."),
    Column("escape_rank", "escape rank", "plain", BY_FIELD["escape_rank"].meaning),
)
PROVENANCE = (
    "row", "seed", "stage1", "stage2", "model", "parameters", "epochs", "steps", "batch", "learning_rate",
    "weight_decay", "augmentation", "sampler", "bn_mode", "selection", "subset_sha256", "precision", "compiled",
    "fused", "device", "seconds", "images_per_second", "key", "profile", "stage2_profile", "stage2_subset_sha256",
    "stage2_parameters", "stage2_key",
)  # fmt: skip


def tables(results: Results) -> list[Table]:
    """Return every table, in the order of the page."""
    found = []
    if "swap" in results:
        found.append(swap(results))
        if results["swap"]["attribution"] is not None:
            found += [attribution(results), groups(results)]
    if "ladder" in results:
        found.append(ladder(results))
    found.append(classes(results))
    if "geometry" in results:
        for variant in rows.VARIANTS:
            found += [geometry(results, variant), geometry_groups(results, variant)]
    if "claims" in results:
        found.append(claims(results))
    return [*found, provenance(results)]


def swap(results: Results) -> Table:
    """Return Table 1: accuracy of every pair of backbone and classifier."""
    seeds = results["swap"]["seeds"]
    single = {
        name: dict(zip(seeds, results["swap"]["cells"][name]["accuracy"], strict=True))
        for name in results["swap"]["cells"]
    }
    found = [
        row | {"pair": arrow(row["cell"])} | {f"seed_{seed}": single[row["cell"]][seed] for seed in seeds}
        for row in rows.cells(results)
    ]
    by_seed = [Column(f"seed_{seed}", f"seed {seed}", "share") for seed in seeds] if len(seeds) > 1 else []
    columns = [Column("pair", "backbone → classifier"), ACCURACY, *RECALLS, *by_seed]
    return Table("swap", "Accuracy by training set of backbone and classifier", columns, found)


def attribution(results: Results) -> Table:
    """Return the split of the gap."""
    columns = [
        Column("part", "part"),
        Column("points", "size", "points", "Percentage points of accuracy, with the 95 % interval.", CI),
        Column(
            "share",
            "share of the gap",
            "whole",
            "The part's Shapley value over the gap; only where the gap is clearly not 0.",
            ("share_low", "share_high"),
        ),
    ]
    return Table("attribution", "Where the gap comes from", columns, rows.attribution(results))


def groups(results: Results) -> Table:
    """Return recall and the split of the gap for head, body and tail."""
    recalls = [Column("lt", "lt → lt", "share"), Column("true", "true → true", "share")]
    return Table(
        "groups", "The gap by group of classes", [Column("group", "group"), *recalls, *SPLIT], rows.groups(results)
    )


def ladder(results: Results) -> Table:
    """Return Figure 3 as a table."""
    found = [
        row
        | {
            "augmentation": rows.AUGMENTATIONS.get(row["augmentation"], row["augmentation"]),
            "rung": rows.STAGES[row["rung"]],
        }
        for row in rows.ladder(results)
    ]
    columns = [Column("augmentation", "augmentation of stage 1"), Column("rung", "rung"), ACCURACY, *RECALLS]
    return Table("ladder", "The augmentation ladder", columns, found)


def classes(results: Results) -> Table:
    """Return one row a class: images, recalls, the split of its gap, calibrated geometry of the encoder lt."""
    columns = list(CLASS)
    found = rows.classes(results)
    if "swap" in results:
        names = rows.ordered_cells(results["swap"])
        columns += [Column(name, arrow(name), "whole", f"Recall of {arrow(name)}.") for name in names]
        columns += SPLIT if results["swap"]["attribution"] is not None else ()
    if "geometry" in results and "lt" in rows.encoders(results):
        measured = {row["index"]: row for row in geometry_rows.classes(results, "calibrated") if row["encoder"] == "lt"}
        found = [row | {column.field: measured[row["index"]][column.field] for column in LOCAL} for row in found]
        columns += LOCAL
    return Table("classes", "Class by class", columns, sorted(found, key=lambda row: row["rank"]))


def geometry(results: Results, variant: str) -> Table:
    """Return every measure of every encoder and class."""
    columns = [Column("encoder", "encoder"), *CLASS, *_measured()]
    title = f"Geometry by class, {variant}"
    return Table(f"geometry-classes-{variant}", title, columns, geometry_rows.classes(results, variant))


def geometry_groups(results: Results, variant: str) -> Table:
    """Return every measure of every encoder and group."""
    columns = [Column("encoder", "encoder"), Column("group", "group"), *_measured()]
    title = f"Geometry by group, {variant}"
    return Table(f"geometry-groups-{variant}", title, columns, geometry_rows.groups(results, variant))


def measures(results: Results, variant: str) -> Table:
    """Return `geometry_groups` for readers: one row a measure, one column an encoder and group."""
    found = geometry_rows.groups(results, variant)
    columns = [Column("measure", "measure")]
    columns += [Column(f"{row['encoder']} {row['group']}", f"{row['encoder']}, {row['group']}") for row in found]
    entries = []
    for column in _measured():
        written = {f"{row['encoder']} {row['group']}": column.written(row) for row in found}
        entries.append({"measure": column.heading, **written})
    return Table(f"measures-{variant}", f"Geometry by group, {variant}", columns, entries)


def claims(results: Results) -> Table:
    """Return the paper's claims and what these results say of them."""
    fields = ("claim", "figure", "statistic", "verdict")
    found = []
    for claim in results["claims"]["claims"]:
        low, high = claim["ci95"] or (None, None)
        mark = VERDICTS.get(claim["verdict"], "")
        found.append({**claim, "ci_low": low, "ci_high": high, "verdict": f"{mark} {claim['verdict']}".strip()})
    columns = [Column(field, field) for field in fields]
    columns.insert(3, Column("estimate", "estimate", "plain", "", CI))
    return Table("claims", "The paper's claims on these results", columns, found)


def provenance(results: Results) -> Table:
    """Return how every row of every result was trained."""
    found: list[Row] = []
    for verb in TRAINED:
        if verb in results:
            found += [{"verb": verb, **entry} for entry in results[verb]["provenance"]]
    return Table("provenance", "How each row was trained", [Column(f, f) for f in ("verb", *PROVENANCE)], found)


def _column(measure: Measure) -> Column:
    return Column(measure.field, measure.label, measure.kind, measure.meaning)


def _measured() -> list[Column]:
    unseen = Column("unseen_count", "unseen", "count", "Unseen samples of the class.")
    return [unseen, *(_column(measure) for measure in (*PAPER, *CALIBRATED))]
