"""Groups of classes (head, body, tail): mean measurements, and tests that need no class to be large enough alone."""

from collections.abc import Callable, Sequence
from typing import Any

from tailscope.geometry.calibration import false_discovery
from tailscope.geometry.fields import MEASURES, NUMBERS, Entry
from tailscope.groups import GROUPS

TESTED = ("spread_gap", "center_shift")
_AVERAGED = {*NUMBERS, "quantiles"} - {"p"}


def pool_groups(
    entries: Sequence[Entry], p_values: Callable[[str, Sequence[int]], float | None], alpha: float
) -> dict[str, Entry | None]:
    """Return one pooled entry for head, body and tail; None for each where there are no groups.

    Counts are summed; every other number is the mean over the classes where it is defined, each class counting once;
    lists are averaged place by place.

    Args:
        entries: the classes.
        p_values: gives the p-value of "spread_gap" or "center_shift" over some classes, however small each is.
        alpha: largest q-value, over the groups, at which a group is flagged.
    """
    pooled = {group: [e for e in entries if e["group"] == group] for group in GROUPS}
    result: dict[str, Entry | None] = {
        group: _pool(group, members) if members else None for group, members in pooled.items()
    }
    found = {group: entry for group, entry in result.items() if entry is not None}
    for field in TESTED:
        values = [p_values(field, [e["index"] for e in pooled[group]]) for group in found]
        for entry, p, q in zip(found.values(), values, false_discovery(values), strict=True):
            entry[f"{field}_p"], entry[f"{field}_q"] = p, q
            entry[f"{field}_flagged"] = None if q is None else q <= alpha
    return result


def _pool(group: str, members: Sequence[Entry]) -> Entry:
    entry: Entry = {"group": group, "classes": len(members)}
    for field, measure in MEASURES.items():
        if measure.unit == "count":
            entry[field] = sum(member[field] for member in members)
        elif measure.unit in _AVERAGED:
            entry[field] = _mean([member[field] for member in members if member[field] is not None])
    return entry


def _mean(values: Sequence[Any]) -> Any:
    if not values:
        return None
    if isinstance(values[0], list):
        return [sum(place) / len(values) for place in zip(*values, strict=True)]
    return sum(values) / len(values)
