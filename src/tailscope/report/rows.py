"""The stored results of one folder, as flat rows of raw numbers under plain names, and as tables.

Charts, tables and sentences all draw from these rows. The report reads nothing else and computes no experiment.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tailscope import paper
from tailscope.errors import UserError
from tailscope.groups import GROUPS
from tailscope.intervals import CELLS
from tailscope.measures.fields import COLLAPSE, SHOWN
from tailscope.report.reading import read
from tailscope.report.schema import PARTS, TRAINED, VARIANTS, Cell, Measured, Part, Results, Swap, Trained
from tailscope.report.text import Column, Table, arrow, write_tables

Row = dict[str, Any]

STAGES = {"stage1": "Stage I", "stage2": "Stage II", "stage2_aa": "Stage II + AutoAugment", "bound": "empirical bound"}
AUGMENTATIONS = {
    "none": "none",
    "mixup": "MixUp",
    "autoaugment": "AutoAugment",
    "autoaugment+mixup": "AutoAugment + MixUp",
}
ENCODERS = ("lt", "lt+mixup", "true")
Q_LINE = 0.05  # the usual false discovery rate
QUANTILES = ("q05", "q25", "q50", "q75", "q95")
# A flag says how often, over the seeds, a class's q reaches the line: a mean of q values would not be a q value.
FLAGS = {"spread_gap_q": "spread_gap_flags", "center_shift_q": "center_shift_flags"}


# ---- results


def load(out: Path | str) -> Results:
    """Read the result files in `out`, by verb; `UserError` where there is none, or one is not what its verb writes."""
    found = {verb: Path(out) / f"{verb}.json" for verb in (*TRAINED, "claims")}
    found = {verb: path for verb, path in found.items() if path.exists()}
    if not any(verb in found for verb in TRAINED):
        names = ", ".join(f"{verb}.json" for verb in TRAINED)
        raise UserError(f"{out}: no results to report; run one of the verbs that write {names}")
    return cast(Results, {verb: read(path, verb) for verb, path in found.items()})


def first(results: Results) -> Trained:
    """Return the result that describes the data: swap's, else the first of the others."""
    return next(results[verb] for verb in TRAINED if verb in results)


_OF_STAGE2 = {"stage2", "views", "bn_mode", "stage2_loss", "stage2_start", "stage2_augment"}
"""Fields of a recipe that `geometry`, which has no stage 2, does not use."""
_TOLD_OTHERWISE = {"name", "card", "stage2_sampler"}
"""Those of a recipe that are told by other fields, or by the rows of `ladder` themselves."""


def mismatches(results: Results) -> list[str]:
    """Return a warning for each file that was made of other images or by another recipe than the first.

    Seeds, backbones and whatever only one of the verbs has may differ.
    """
    known: dict[str, Trained] = {verb: results[verb] for verb in TRAINED if verb in results}
    reference = next(iter(known))
    decided = results.get("claims", {}).get("spec", known[reference]["spec"])
    stale = f"claims.json was decided by another {reference}.json than this one: run `tailscope reproduce` again"
    return [stale] * (decided != known[reference]["spec"]) + [
        f"{verb}.json and {reference}.json differ in their {field}: do not compare their numbers"
        for verb, one in known.items()
        for field in _differing(known[reference], one, stage2="geometry" not in (verb, reference))
    ]


def _differing(one: Trained, other: Trained, *, stage2: bool) -> Iterator[str]:
    """Yield in what two results differ whose numbers belong together; what older files do not say differs in nothing.

    A recipe leaves out fields at their defaults. A profile is told by its counts.
    """
    a, b = one["spec"], other["spec"]
    if one["dataset"]["name"] != other["dataset"]["name"]:
        yield "data set"
    elif _apart(a, b, "fingerprint"):
        yield "images"
    if one["counts"] != other["counts"]:
        yield "counts"
    for name in ("protocol", "subset_seed"):
        if _apart(a, b, name):
            yield name.replace("_", " ")
    recipes = a.get("recipe"), b.get("recipe")
    if one["recipe"]["name"] != other["recipe"]["name"]:
        yield "recipe"
    elif isinstance(recipes[0], dict) and isinstance(recipes[1], dict):
        fields = {*recipes[0], *recipes[1]} - _TOLD_OTHERWISE - (set() if stage2 else _OF_STAGE2)
        yield from (f"recipe's {name}" for name in sorted(fields) if recipes[0].get(name) != recipes[1].get(name))
    sources = a.get("plugins", {}), b.get("plugins", {})
    yield from (f"plug-in {name}" for name in sources[0] if _apart(*sources, name))


def _apart(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool:
    return name in a and name in b and a[name] != b[name]


# ---- rows


def ends(name: str, bounds: Sequence[float] | None) -> Row:
    """Return an interval as two fields, None where there is no interval.

    >>> ends("ci", [0.1, 0.2])
    {'ci_low': 0.1, 'ci_high': 0.2}
    """
    low, high = bounds or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def ci95(row: Row) -> tuple[float, float] | None:
    """Return a row's interval, if it has one."""
    return None if row["ci_low"] is None else (row["ci_low"], row["ci_high"])


def ranks(counts: Sequence[int]) -> list[int]:
    """Return each class's frequency rank: 1 has the most training images, ties by index.

    >>> ranks([5, 50, 5])
    [2, 1, 3]
    """
    order = sorted(range(len(counts)), key=lambda k: -counts[k])
    return sorted(range(1, len(counts) + 1), key=lambda rank: order[rank - 1])


def profile(results: Results) -> list[Row]:
    """Return one row a class: index, rank (1 = most frequent), name, group, training images."""
    result = first(results)
    columns = (ranks(result["counts"]), result["dataset"]["class_names"], result["groups"], result["counts"])
    return [
        {"index": k, "rank": rank, "name": name, "group": group, "count": count}
        for k, (rank, name, group, count) in enumerate(zip(*columns, strict=True))
    ]


def ordered_cells(swap: Swap) -> list[str]:
    """Return the names of swap's cells: those of the paper first, then the matched ones."""
    return _known_first(CELLS, swap["cells"])


def accuracy(cell: Cell) -> Row:
    """Return a cell's mean accuracy with its interval, its best seed, and its groups' mean recalls."""
    groups = {group: cell["groups"].get(group) for group in GROUPS}
    means = {name: cell.get(name) for name in ("g_mean", "h_mean")}
    return {"mean": cell["mean"], "highest": max(cell["accuracy"]), **ends("ci", cell["ci95"]), **groups, **means}


def cells(results: Results) -> list[Row]:
    """Return one row a swap cell: cell, backbone, classifier, accuracy, interval, group recalls, the paper's."""
    swap = results["swap"]
    printed = paper.table1(paper.dataset_of(swap))
    found = []
    for name in ordered_cells(swap):
        backbone, classifier = name.split("->")
        about = {"cell": name, "backbone": backbone, "classifier": classifier, "paper": printed.get(name)}
        found.append(about | accuracy(swap["cells"][name]))
    return found


def attribution(results: Results) -> list[Row]:
    """Return the gap, its two parts and the interaction, with intervals; nothing where a cell is missing."""
    stored = results["swap"]["attribution"]
    if stored is None:
        return []
    whole: Part = {"points": stored["gap"], "ci95": stored["gap_ci95"], "share": None, "share_ci95": None}
    rest: Part = whole | {"points": stored["interaction"], "ci95": stored["interaction_ci95"]}
    parts: dict[str, Part] = {"gap": whole, **{name: stored[name] for name in PARTS}, "interaction": rest}
    return [
        {"part": name, "points": part["points"], "share": part["share"]}
        | ends("ci", part["ci95"])
        | ends("share", part["share_ci95"])
        for name, part in parts.items()
    ]


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
    stored, found = results["swap"]["cells"], []
    for group in GROUPS:
        recalls = {cell: stored[cell]["groups"].get(group) for cell in CELLS if cell in stored}
        if (parts := split(recalls))["gap"] is not None:
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
    printed = paper.figure3(paper.dataset_of(results["ladder"]))
    return [
        {
            "augmentation": name,
            "rung": rung,
            "augmentation_label": AUGMENTATIONS.get(name, name),
            "rung_label": label,
            "paper": printed.get(f"{name}: {rung}"),
            **accuracy(cell),
        }
        for name in _known_first(AUGMENTATIONS, stored)
        for rung, label in STAGES.items()
        if (cell := stored[name].get(rung))
    ]


def _known_first(known: Iterable[str], stored: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys([*known, *stored]) if name in stored]


# ---- rows of geometry: means over seeds


def encoders(results: Results) -> list[str]:
    """Return the encoders that geometry.json holds, the known ones first and in order."""
    return _known_first(ENCODERS, results["geometry"]["encoders"])


def geometry_classes(results: Results, variant: str) -> list[Row]:
    """Return one row an encoder and class: profile, every measure's mean over seeds, its range, flags, quantiles.

    `m_min` and `m_max` are the range of a measure `m` over the seeds, None where they agree. `spread_gap_flags` and
    `center_shift_flags` count the seeds whose q is at most 0.05 (`_text`: "2 of 3"), `seeds` those that were measured.
    """
    about = profile(results)
    found = []
    for encoder in encoders(results):
        stored = results["geometry"]["encoders"][encoder]
        runs = [run[variant]["classes"] for run in stored["seeds"].values()]
        for k, mean in enumerate(stored["mean"][variant]["classes"]):
            found.append({"encoder": encoder, **about[k], **_measures(mean, [run[k] for run in runs])})
    return found


def geometry_groups(results: Results, variant: str) -> list[Row]:
    """Return one row an encoder and group that has a value: every measure, pooled over the group's classes."""
    found = []
    for encoder in encoders(results):
        stored = results["geometry"]["encoders"][encoder]
        for group in GROUPS:
            if (mean := stored["mean"][variant]["groups"].get(group)) is not None:
                entries = [one for run in stored["seeds"].values() if (one := run[variant]["groups"].get(group))]
                found.append({"encoder": encoder, "group": group, **_measures(mean, entries)})
    return found


def collapse(results: Results, variant: str) -> list[Row]:
    """Return one row a measure of all classes together: each encoder's training and unseen samples, means over seeds.

    There are none in files from before these were measured.
    """
    known = {
        encoder: of
        for encoder in encoders(results)
        if (of := results["geometry"]["encoders"][encoder]["mean"][variant].get("collapse"))
    }
    return [
        {"measure": measure.title, "meaning": measure.meaning}
        | {f"{encoder}_{part}": of[part].get(name) for encoder, of in known.items() for part in ("train", "unseen")}
        for name, measure in (COLLAPSE.items() if known else ())
    ]


def warnings(results: Results) -> list[str]:
    """Return the warnings of all result files, each once, and those of files that do not belong together."""
    found = [text for verb in TRAINED if verb in results for text in results[verb]["warnings"]]
    raised: dict[str, list[str]] = {}  # in which runs of geometry
    for encoder in encoders(results) if "geometry" in results else ():
        for seed, run in results["geometry"]["encoders"][encoder]["seeds"].items():
            for variant, entry in run.items():
                for text in entry.get("warnings", []):
                    raised.setdefault(text, []).append(f"{encoder} seed {seed} {variant}")
    for text, (where, *more) in raised.items():
        found.append(f"{text} ({where} and {len(more)} more)" if more else f"{text} ({where})")
    return list(dict.fromkeys([*found, *mismatches(results)]))


def flagged(row: Row, q_field: str) -> bool:
    """Return whether a class's q reaches 0.05 in more than half of the seeds."""
    return 2 * int(row[FLAGS[q_field]]) > int(row["seeds"])


def _measures(mean: Measured, runs: Sequence[Mapping[str, Any]]) -> Row:
    row: Row = {"unseen_count": mean.get("unseen_count"), "seeds": len(runs)}
    for field in SHOWN:
        row[field] = mean.get(field)
        values = [run[field] for run in runs if run.get(field) is not None]
        apart = len(values) > 1 and min(values) < max(values)
        row[f"{field}_min"], row[f"{field}_max"] = (min(values), max(values)) if apart else (None, None)
    for q_field, flag in FLAGS.items():
        tested = [run[q_field] for run in runs if run.get(q_field) is not None]
        row[flag] = sum(q <= Q_LINE for q in tested)
        row[f"{flag}_text"] = f"{row[flag]} of {len(tested)}" if tested else None
    for side in ("train", "true"):
        angles: Any = mean.get(f"angles_{side}_quantiles_deg") or [None] * len(QUANTILES)
        row.update({f"{side}_{name}": angle for name, angle in zip(QUANTILES, angles, strict=True)})
    return row


# ---- tables

CI = ("ci_low", "ci_high")
ACCURACY = Column("mean", "accuracy", "share", "Mean over seeds, with its 95 % interval.", CI)
GROUP = Column("group", "group")
GROUP_RECALLS = tuple(Column(group, f"{group} recall", "share", f"Mean recall of {group} classes.") for group in GROUPS)
RECALL_MEANS = (
    Column("g_mean", "G-mean", "share", "Geometric mean of the recalls of all classes: 0 where one is never found."),
    Column("h_mean", "H-mean", "share", "Harmonic mean of the same recalls, which the lowest pull down furthest."),
)
CLASS = (
    Column("name", "class"),
    Column("rank", "rank", "count", "Frequency rank: 1 has the most training images."),
    GROUP,
    Column("count", "images", "count", "Training images in the long-tailed set."),
)
SPLIT = (
    Column("gap", "gap", "points", "Recall lost by training on the long-tailed set."),
    Column("representation", "by representation", "points", "The part of the gap that the backbone costs."),
    Column("classifier", "by classifier", "points", "The part of the gap that the classifier costs."),
)
MEASURES = tuple(map(Column.of, SHOWN))
# Of geometry, the per-class table shows the calibrated measures of the long-tailed encoder; files hold the rest.
LOCAL = (
    Column.of("spread_gap_deg"),
    Column("spread_gap_flags_text", "seeds with q ≤ 0.05", "text", "Seeds in which the spread gap is beyond chance."),
    Column.of("center_shift_excess_deg"),
    Column("center_shift_flags_text", "seeds with q ≤ 0.05", "text", "Seeds in which the centre shift is not chance."),
    Column.of("escape_rank"),
)
UNSEEN = Column("unseen_count", "unseen", "count", "Unseen samples of the class.")
VERDICTS = {"holds": "✓", "fails": "✗", "undecided": "?"}
PROVENANCE = (
    "verb", "row", "seed", "stage1", "stage2", "model", "parameters", "epochs", "steps", "batch", "learning_rate",
    "weight_decay", "augmentation", "sampler", "bn_mode", "selection", "subset_sha256", "precision", "compiled",
    "fused", "device", "seconds", "images_per_second", "key", "profile", "stage2_profile", "stage2_subset_sha256",
    "stage2_parameters", "stage2_key",
)  # fmt: skip


def write(out: Path | str, results: Results) -> list[Path]:
    """Write every table to `out`/tables as CSV, Markdown and LaTeX, and return the paths."""
    return write_tables(Path(out) / "tables", tables(results))


def tables(results: Results) -> list[Table]:
    """Return every table, in the order of the page."""
    found = []
    if "swap" in results:
        found.append(_swap_table(results))
        if results["swap"]["attribution"] is not None:
            found += _gap_tables(results)
    if "ladder" in results:
        labelled = [row | {name: row[f"{name}_label"] for name in ("augmentation", "rung")} for row in ladder(results)]
        columns = [Column("augmentation", "augmentation of stage 1"), Column("rung", "rung")]
        columns += [ACCURACY, *GROUP_RECALLS, *_recall_means(labelled)]
        found.append(Table("ladder", "The augmentation ladder", columns, labelled))
    found.append(_class_table(results))
    if "geometry" in results:
        for variant in VARIANTS:
            found += _geometry_tables(results, variant)
            found += [table for table in [collapse_table(results, variant)] if table.rows]
    if "claims" in results:
        found.append(_claims_table(results))
    trained: list[Row] = [
        {"verb": verb, **card} for verb in TRAINED if verb in results for card in results[verb]["provenance"]
    ]
    return [*found, Table("provenance", "How each row was trained", [Column(f, f) for f in PROVENANCE], trained)]


def _swap_table(results: Results) -> Table:
    """Return Table 1: accuracy of every pair of backbone and classifier."""
    seeds, stored = results["swap"]["seeds"], results["swap"]["cells"]
    found = []
    for row in cells(results):
        single = zip(seeds, stored[row["cell"]]["accuracy"], strict=True)
        found.append(row | {"pair": arrow(row["cell"])} | {f"seed_{seed}": value for seed, value in single})
    by_seed = [Column(f"seed_{seed}", f"seed {seed}", "share") for seed in seeds] if len(seeds) > 1 else []
    columns = [Column("pair", "backbone → classifier"), ACCURACY, *GROUP_RECALLS, *_recall_means(found), *by_seed]
    return Table("swap", "Accuracy by training set of backbone and classifier", columns, found)


def _recall_means(found: Sequence[Row]) -> Sequence[Column]:
    """Return the columns of mean recalls, none for files from before these were measured."""
    return RECALL_MEANS if any(row["g_mean"] is not None for row in found) else ()


def _gap_tables(results: Results) -> list[Table]:
    """Return the split of the gap, of all classes and for head, body and tail."""
    share = "The part's Shapley value over the gap; only where the gap is clearly not 0."
    parts = [
        Column("part", "part"),
        Column("points", "size", "points", "Percentage points of accuracy, with the 95 % interval.", CI),
        Column("share", "share of the gap", "whole", share, ("share_low", "share_high")),
    ]
    recalls = [Column("lt", "lt → lt", "share"), Column("true", "true → true", "share")]
    return [
        Table("attribution", "Where the gap comes from", parts, attribution(results)),
        Table("groups", "The gap by group of classes", [GROUP, *recalls, *SPLIT], groups(results)),
    ]


def _class_table(results: Results) -> Table:
    """Return one row a class: images, recalls, the split of its gap, calibrated geometry of the encoder lt."""
    columns, found = list(CLASS), classes(results)
    if "swap" in results:
        names = ordered_cells(results["swap"])
        columns += [Column(name, arrow(name), "whole", f"Recall of {arrow(name)}.") for name in names]
        columns += SPLIT if results["swap"]["attribution"] is not None else ()
    if "geometry" in results and "lt" in encoders(results):
        measured = [row for row in geometry_classes(results, "calibrated") if row["encoder"] == "lt"]
        for row, one in zip(found, measured, strict=True):
            row.update({column.field: one[column.field] for column in LOCAL})
        columns += LOCAL
    return Table("classes", "Class by class", columns, sorted(found, key=lambda row: row["rank"]))


def _geometry_tables(results: Results, variant: str) -> list[Table]:
    """Return every measure of every encoder, by class and by group."""
    by_class, by_group = geometry_classes(results, variant), geometry_groups(results, variant)
    return [
        Table(name, title, [Column("encoder", "encoder"), *of, UNSEEN, *MEASURES], found)
        for name, title, of, found in (
            (f"geometry-classes-{variant}", f"Geometry by class, {variant}", CLASS, by_class),
            (f"geometry-groups-{variant}", f"Geometry by group, {variant}", (GROUP,), by_group),
        )
    ]


def collapse_table(results: Results, variant: str) -> Table:
    """Return how far features have collapsed, of each encoder's training and unseen samples."""
    found = collapse(results, variant)
    columns = [
        Column(f"{encoder}_{part}", f"{encoder}, {said}", "plain")
        for encoder in encoders(results)
        for part, said in (("train", "training"), ("unseen", "unseen"))
        if found and f"{encoder}_{part}" in found[0]
    ]
    columns = [Column("measure", "measure"), *columns, Column("meaning", "in words")]
    return Table(f"geometry-collapse-{variant}", f"How far the features have collapsed, {variant}", columns, found)


def measures_table(results: Results, variant: str) -> Table:
    """Return the geometry of groups for readers: one row a measure, one column an encoder and group."""
    _, table = _geometry_tables(results, variant)
    names = {f"{row['encoder']}, {row['group']}": row for row in table.rows}
    entries = [
        {"measure": column.heading, **{name: column.written(row) for name, row in names.items()}}
        for column in table.columns[2:]
    ]
    return Table(f"measures-{variant}", table.title, [Column(name, name) for name in ("measure", *names)], entries)


def _claims_table(results: Results) -> Table:
    """Return the paper's claims and what these results say of them."""
    columns = [Column(field, field) for field in ("claim", "figure", "statistic", "verdict")]
    columns.insert(3, Column("estimate", "estimate", "plain", "", CI))
    found = []
    for claim in results["claims"]["claims"]:
        verdict = f"{VERDICTS.get(claim['verdict'], '')} {claim['verdict']}".strip()
        found.append({**claim, **ends("ci", claim["ci95"]), "verdict": verdict})
    return Table("claims", "The paper's claims on these results", columns, found)
