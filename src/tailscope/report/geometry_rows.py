"""The geometry of the features as flat rows: a class (or group) of an encoder each, means over seeds."""

from collections.abc import Sequence

from tailscope.groups import GROUPS
from tailscope.report.measures import BY_FIELD
from tailscope.report.results import Result, Results
from tailscope.report.rows import Q_LINE, Row, encoders, profile

QUANTILES = ("q05", "q25", "q50", "q75", "q95")
QUANTILE_FIELDS = {"angles_train_quantiles_deg": "train", "angles_true_quantiles_deg": "true"}
# A flag says how often, over the seeds, a class's q reaches the line: a mean of q values would not be a q value.
FLAGS = {"spread_gap_q": "spread_gap_flags", "center_shift_q": "center_shift_flags"}


def classes(results: Results, variant: str) -> list[Row]:
    """Return one row an encoder and class: profile, every measure's mean over seeds, its range, flags, quantiles.

    `m_min` and `m_max` are the range of a measure `m` over the seeds, None where they agree. `spread_gap_flags` and
    `center_shift_flags` count the seeds whose q is at most 0.05 (`_text`: "2 of 3"), `seeds` those that were measured.
    """
    by_index = {row["index"]: row for row in profile(results)}
    found = []
    for encoder in encoders(results):
        stored = results["geometry"]["encoders"][encoder]
        runs = [run[variant]["classes"] for run in stored["seeds"].values()]
        for position, mean in enumerate(stored["mean"][variant]["classes"]):
            entries = [run[position] for run in runs]
            found.append({"encoder": encoder, **by_index[mean["index"]], **_measures(mean, entries)})
    return found


def groups(results: Results, variant: str) -> list[Row]:
    """Return one row an encoder and group that has a value: every measure, pooled over the group's classes."""
    found = []
    for encoder in encoders(results):
        stored = results["geometry"]["encoders"][encoder]
        runs = [run[variant]["groups"] for run in stored["seeds"].values()]
        for group in GROUPS:
            mean = stored["mean"][variant]["groups"].get(group)
            if mean is not None:
                entries = [run[group] for run in runs if run.get(group) is not None]
                found.append({"encoder": encoder, "group": group, **_measures(mean, entries)})
    return found


def warnings(results: Results) -> list[str]:
    """Return the warnings of geometry's runs, each once, naming where it was raised."""
    found: dict[str, list[str]] = {}
    for encoder in encoders(results):
        for seed, run in results["geometry"]["encoders"][encoder]["seeds"].items():
            for variant, entry in run.items():
                for text in entry.get("warnings", []):
                    found.setdefault(text, []).append(f"{encoder} seed {seed} {variant}")
    return [f"{text} ({places[0]}{_more(len(places) - 1)})" for text, places in found.items()]


def flagged(row: Row, q_field: str) -> bool:
    """Return whether a class's q reaches 0.05 in more than half of the seeds."""
    return 2 * int(row[FLAGS[q_field]]) > int(row["seeds"])


def group_value(rows: Sequence[Row], encoder: str, group: str, field: str) -> float | None:
    """Return one measure of one group from `groups`'s rows, None where it is undefined."""
    for row in rows:
        if row["encoder"] == encoder and row["group"] == group:
            value = row.get(field)
            return None if value is None else float(value)
    return None


def _measures(mean: Result, entries: Sequence[Result]) -> Row:
    row: Row = {"unseen_count": mean.get("unseen_count"), "seeds": len(entries)}
    for field in BY_FIELD:
        row[field] = mean.get(field)
        values = [entry[field] for entry in entries if entry.get(field) is not None]
        apart = len(values) > 1 and min(values) < max(values)
        row[f"{field}_min"], row[f"{field}_max"] = (min(values), max(values)) if apart else (None, None)
    for q_field, flag in FLAGS.items():
        tested = [entry[q_field] for entry in entries if entry.get(q_field) is not None]
        row[flag] = sum(q <= Q_LINE for q in tested)
        row[f"{flag}_text"] = f"{row[flag]} of {len(tested)}" if tested else None
    for field, side in QUANTILE_FIELDS.items():
        values = mean.get(field) or [None] * len(QUANTILES)
        row.update({f"{side}_{name}": value for name, value in zip(QUANTILES, values, strict=True)})
    return row


def _more(count: int) -> str:
    return f" and {count} more" if count else ""
