"""A stored diagnosis as flat rows, raw numbers under plain names. Its charts, tables and sentences draw from these."""

from pathlib import Path
from typing import Any

from tailscope.groups import GROUPS
from tailscope.report.measures import BY_FIELD
from tailscope.report.results import Result, ranks, read
from tailscope.report.rows import Row

_MEASURES: Row = dict.fromkeys(BY_FIELD)
"""What a result does not hold is undefined in it."""

ACCURACIES = {"current": "current", "rebalanced": "re-balanced", "classifier_bound": "classifier bound"}


def load(path: Path) -> Result:
    """Read diagnosis.json.

    Raises:
        UserError: it is no diagnosis.
    """
    return read(path, "diagnosis")


def classes(result: Result) -> list[Row]:
    """Return one row a class: its geometry, rank, recalls and verdict."""
    rank = ranks(result["counts"])
    recalls = {name: result["accuracy"][name]["per_class"] if result["accuracy"] else None for name in ACCURACIES}
    parts = result["verdict"]["classes"] if result["verdict"] else [{}] * len(result["classes"])
    found = []
    for k, (entry, part) in enumerate(zip(result["classes"], parts, strict=True)):
        row: Row = {**_MEASURES, **entry, "rank": rank[k], "count": result["counts"][k]}
        row["name"] = str(entry["name"])
        for name, values in recalls.items():
            row[f"recall_{name}"] = None if values is None else values[k]
        row["nearest"] = _name(result, entry["nearest_center_true_class"])
        row["bottleneck"] = part.get("bottleneck")
        row["reason"] = part.get("reason")
        for gap in ("classifier_gap", "representation_gap"):
            row[gap], row[f"{gap}_low"], row[f"{gap}_high"] = _ends(part.get(gap))
        found.append(row)
    return found


def groups(result: Result) -> list[Row]:
    """Return one row a group: its pooled geometry, mean recalls and gaps."""
    found = []
    for name in GROUPS:
        entry = result["groups"].get(name)
        if entry is None:
            continue
        row: Row = {**_MEASURES, **entry, "count": entry["train_count"]}
        if result["accuracy"]:
            row |= {f"recall_{key}": result["accuracy"][key]["groups"][name] for key in ACCURACIES}
        part = ((result["verdict"] or {}).get("groups") or {}).get(name) or {}
        row["bottleneck"], row["reason"] = part.get("bottleneck"), part.get("reason")
        for gap in ("classifier_gap", "representation_gap"):
            row[gap], row[f"{gap}_low"], row[f"{gap}_high"] = _ends(part.get(gap))
        found.append(row)
    return found


def accuracies(result: Result) -> list[Row]:
    """Return one row a classifier: what it is, accuracy with its interval, mean recall of each group."""
    found = []
    for name, label in ACCURACIES.items():
        cell = result["accuracy"][name]
        low, high = cell["ci95"] or (None, None)
        found.append(
            {
                "label": label,
                "what": cell["classifier"],
                "mean": cell["mean"],
                "ci_low": low,
                "ci_high": high,
                **cell["groups"],
            }
        )
    return found


def steps(result: Result) -> list[Row]:
    """Return the waterfall from the current accuracy to the ceiling, in per cent: one row a bar."""
    verdict = result["verdict"]
    means = {name: 100 * result["accuracy"][name]["mean"] for name in ACCURACIES}
    ceiling = 100 * verdict["ceiling"]
    bars = [
        ("current", 0.0, means["current"], "total", result["accuracy"]["current"]["ci95"]),
        ("re-balancing", means["current"], means["rebalanced"], "classifier", result["accuracy"]["rebalanced"]["ci95"]),
        (
            "classifier of the true distribution",
            means["rebalanced"],
            means["classifier_bound"],
            "classifier",
            result["accuracy"]["classifier_bound"]["ci95"],
        ),
        ("representation, at most", means["classifier_bound"], ceiling, "representation", None),
    ]
    return [
        {
            "step": step,
            "from": start,
            "to": end,
            "part": part,
            "low": None if bounds is None else 100 * bounds[0],
            "high": None if bounds is None else 100 * bounds[1],
            "text": f"{end:.1f} %" if part == "total" else f"{end - start:+.1f}",
            "label_at": max(start, end, 100 * bounds[1] if bounds else 0.0),
        }
        for step, start, end, part, bounds in bars
    ]


def comparisons(result: Result) -> list[Row]:
    """Return one row an encoder, group and aspect: its difference from the reference, and which is better."""
    found: list[Row] = []
    stored = result.get("comparison")
    if stored is None:
        return found
    for encoder, entry in stored["encoders"].items():
        names = {"reference": stored["reference"], "other": encoder}
        for kind, gap in (entry["accuracy"] or {}).items():
            points, low, high = _ends(gap)
            better = (
                None if low is None or high is None or low <= 0 <= high else names["other" if low > 0 else "reference"]
            )
            found.append(
                {
                    "encoder": encoder,
                    "of": "all",
                    "aspect": f"accuracy, {ACCURACIES[kind]} (points)",
                    "difference": None if points is None else 100 * points,
                    "low": None if low is None else 100 * low,
                    "high": None if high is None else 100 * high,
                    "better": better,
                }
            )
        for group, aspects in entry["groups"].items():
            for aspect, one in aspects.items():
                low, high = one["ci95"] or (None, None)
                found.append(
                    {
                        "encoder": encoder,
                        "of": group,
                        "aspect": aspect,
                        "difference": one["difference"],
                        "low": low,
                        "high": high,
                        "better": names.get(one["better"]),
                    }
                )
    return found


def _name(result: Result, index: int | None) -> str | None:
    return None if index is None else str(result["dataset"]["class_names"][index])


def _ends(gap: dict[str, Any] | None) -> tuple[float | None, float | None, float | None]:
    if gap is None:
        return None, None, None
    low, high = gap["ci95"] or (None, None)
    return gap["points"], low, high
